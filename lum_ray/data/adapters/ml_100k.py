"""MovieLens 100K: 100,000 ratings of 943 people, from a folder with RecBole's `ml-100k.inter`, `.item` and `.user`.

The PyPI package recbole 1.2.1 carries that folder as `recbole/dataset_example/ml-100k` (`make peers` installs it).

Tables written:
- events: user, time, item, rating; by user, then in time order.
- items: item, title, genres (a text such as "Animation Children's Comedy"), year (null where unknown).
- profiles: user, age, gender, occupation.

The usual test of such data is to leave one out: each user's last rating is to be foretold. Cuts are days, so with the
option `leave_one_out` (the default) the times are made up: every user's last rating lies on day LAST_DAY, the one
before it on the day before, and so on, one rating a day. The order of each user's ratings is kept; their times of day,
the gaps between them and who of two users rated first are lost. So weekdays and popularity by day mean nothing, and all
models may learn from ratings of other users that were given later: the usual leak of leaving one out. With
`leave_one_out: false` times are those of the source, timestamps in UTC.

Three quarters of the ratings share their second with another one of the same user. Such ties stand in the order of the
source's file, which is no order of items: an order by item would raise NDCG (FIELD.md, section 3).

Source: Harper, Konstan, ACM TiiS 5, 19 (2015).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow import fs

from lum_ray.artifacts import UserError

LAST_DAY: Final = 1000
"""The made-up day of every user's last rating; the longest history begins 736 days before."""
# column of a file -> its name and type here
COLUMNS: Final[dict[str, dict[str, tuple[str, pa.DataType]]]] = {
    "inter": {
        "user_id:token": ("user", pa.string()),
        "timestamp:float": ("time", pa.float64()),
        "item_id:token": ("item", pa.string()),
        "rating:float": ("rating", pa.float64()),
    },
    "item": {
        "item_id:token": ("item", pa.string()),
        "movie_title:token_seq": ("title", pa.string()),
        "class:token_seq": ("genres", pa.string()),
        "release_year:token": ("year", pa.string()),
    },
    "user": {
        "user_id:token": ("user", pa.string()),
        "age:token": ("age", pa.int64()),
        "gender:token": ("gender", pa.string()),
        "occupation:token": ("occupation", pa.string()),
    },
}


def write(dest: str, filesystem: fs.FileSystem, path: str | None, options: Mapping[str, Any]) -> None:
    """Write events/, items/ and profiles/ under `dest` from the folder `path`.

    `options`: `leave_one_out`, true or false (default: true).
    Raises UserError for another option, a missing folder, file or column, and a value that is no number where one is
    expected.
    """
    leave_one_out = options.get("leave_one_out", True)
    if set(options) - {"leave_one_out"} or not isinstance(leave_one_out, bool):
        raise UserError(f"ml_100k: expected no options but `leave_one_out: true` or `false`, got {dict(options)}")
    if path is None:
        raise UserError(
            "ml_100k: expected the input's `path`: the folder with ml-100k.inter, .item and .user, such as "
            "recbole/dataset_example/ml-100k of the package recbole"
        )
    items = _read(path, "item")
    # the year of a film is unknown, or no number, for a few
    year = pc.if_else(pc.match_substring_regex(items["year"], r"^\d{4}$"), items["year"], pa.scalar(None, pa.string()))
    items = items.set_column(items.column_names.index("year"), "year", pc.cast(year, pa.int64()))
    tables = {"events": _events(_read(path, "inter"), leave_one_out), "items": items, "profiles": _read(path, "user")}
    for name, table in tables.items():
        filesystem.create_dir(f"{dest}/{name}", recursive=True)
        pq.write_table(table, f"{dest}/{name}/0000.parquet", filesystem=filesystem, compression="zstd")


def _read(folder: str, kind: str) -> pa.Table:
    file_path, columns = os.path.join(folder, f"ml-100k.{kind}"), COLUMNS[kind]
    if not os.path.isfile(file_path):
        raise UserError(
            f"ml_100k: expected the file {file_path}, found nothing; the folder must hold "
            f"{', '.join(f'ml-100k.{each}' for each in COLUMNS)}"
        )
    try:
        table = pa.csv.read_csv(
            file_path,
            # no quotes: a title may hold one
            parse_options=pa.csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pa.csv.ConvertOptions(column_types={name: found[1] for name, found in columns.items()}),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"ml_100k: {file_path}: expected RecBole's columns, tab by tab: {error}") from error
    missing = sorted(set(columns) - set(table.column_names))
    if missing:
        raise UserError(f"ml_100k: {file_path} lacks the columns {missing[:5]}, it has {table.column_names}")
    return pa.table({name: table[column] for column, (name, _) in columns.items()})


def _events(ratings: pa.Table, leave_one_out: bool) -> pa.Table:
    user = ratings["user"].combine_chunks().dictionary_encode().indices.to_numpy()
    time_s = ratings["time"].to_numpy()
    order = np.lexsort((time_s, user))  # stable: ties keep the order of the file
    ratings, user, time_s = ratings.take(pa.array(order)), user[order], time_s[order]
    if leave_one_out:
        until = np.cumsum(np.bincount(user))  # one past the user's last rating
        time = pa.array(LAST_DAY + 1 + np.arange(len(user)) - until[user], pa.int32())
    else:
        time = pa.array((time_s * 1e6).astype(np.int64), pa.timestamp("us", tz="UTC"))
    return ratings.set_column(ratings.column_names.index("time"), "time", time)
