"""The tokenizer of GTS-LUM: cases by hand, a plain loop, and prepare against an inline request."""

from __future__ import annotations

import datetime
import random
import tempfile
import zoneinfo
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lum_ray.artifacts import UserError
from lum_ray.config import Behaviour, Data, Events
from lum_ray.data import buckets, times
from lum_ray.data.prepare import Tokenizer, prepare_timelines
from lum_ray.data.raw import RawTables
from lum_ray.data.reader import Timelines, rows_from_tables
from lum_ray.data.rows import Rows, hash_strings, mix
from lum_ray.data.schema import clean_events
from lum_ray.gts import intervals
from lum_ray.gts.sequences import COLUMNS, ITEM, NO_TIME, OFFSET_MIN, TIME_US, merge, partial, tokenize

TOKENIZER = Tokenizer(partial, merge, 1, COLUMNS)
ZONE = "America/New_York"
UTC = datetime.UTC
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=UTC)
US = datetime.timedelta(microseconds=1)
DATA = Data(events=Events(item="item"), time_zone=ZONE, max_reject_share=0.5)


def _hash(item: str) -> int:
    return int(hash_strings([item]).view(np.int64)[0])


def _events(rows: list[tuple[Any, ...]], kind: pa.DataType) -> pa.Table:
    """(user, time, item) as a raw table."""
    users, moments, items = zip(*rows, strict=True) if rows else ((), (), ())
    strings = [pa.array(column, pa.string()) for column in (users, items)]
    return pa.table({"user": strings[0], "time": pa.array(moments, kind), "item": strings[1]})


def _inline(*tables: pa.Table) -> pa.Table:
    return tokenize(pa.concat_tables([clean_events(table, DATA)[0] for table in tables]))


def test_instants_and_days_of_one_user_by_hand() -> None:
    at = [
        datetime.datetime(2017, 3, 12, 6, 59, tzinfo=UTC),  # 01:59 EST, a minute before the clock goes forward
        datetime.datetime(2017, 3, 12, 7, 0, tzinfo=UTC),  # 03:00 EDT
        datetime.datetime(2017, 3, 13, 3, 30, tzinfo=UTC),  # 23:30 EDT, still the 12th
    ]
    instants = _events(
        [("u", at[2], "c"), ("u", at[1], "b"), ("u", at[0], "a"), ("u", at[1], "b")], pa.timestamp("us", "UTC")
    )
    days = _events([("u", datetime.date(2017, 3, 12), "a"), ("u", datetime.date(2017, 3, 11), "a")], pa.date32())
    found = _inline(instants, days)
    first = (datetime.date(2017, 3, 11) - datetime.date(1970, 1, 1)).days
    micro = [(moment - EPOCH) // US for moment in at]
    assert found.drop_columns("user").to_pylist() == [
        {"day": first, "item": _hash("a"), "time_us": first * times.DAY_US, "offset_min": NO_TIME},
        {"day": first + 1, "item": _hash("a"), "time_us": micro[0], "offset_min": -300},
        {"day": first + 1, "item": _hash("b"), "time_us": micro[1], "offset_min": -240},
        {"day": first + 1, "item": _hash("c"), "time_us": micro[2], "offset_min": -240},
        {"day": first + 1, "item": _hash("a"), "time_us": (first + 1) * times.DAY_US, "offset_min": NO_TIME},
    ]
    assert NO_TIME == intervals.NO_TIME


def test_a_basket_is_in_the_order_of_its_hashes_and_another_basket_in_another() -> None:
    items = [f"item-{number}" for number in range(20)]
    moments = [datetime.datetime(2020, 1, day, tzinfo=UTC) for day in (5, 6)]
    table = _inline(_events([("u", moment, item) for moment in moments for item in items], pa.timestamp("us", "UTC")))
    orders = []
    for moment in moments:
        micro = (moment - EPOCH) // US
        by_hash = sorted(map(_hash, items), key=lambda item: int(mix(item, micro)))
        assert table.filter(pa.compute.equal(table["time_us"], micro))["item"].to_pylist() == by_hash
        orders.append(by_hash)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0]) and orders[0] != [_hash(item) for item in items]


ROW = st.tuples(
    st.sampled_from(["a", "b", "é", ""]),
    st.integers(-3, 3),
    st.sampled_from([0, 1, 3_600_000_000, 86_399_999_999]),
    st.booleans(),
    st.sampled_from(["x", "y", "z", "é"]),
)


def _cleaned(rows: list[tuple[Any, ...]]) -> pa.Table:
    """Events as `clean_events` gives them, in UTC."""
    columns = {
        "user": pa.array([row[0] for row in rows], pa.string()),
        "day": pa.array([row[1] for row in rows], pa.int32()),
        "item": pa.array([row[4] for row in rows], pa.string()),
        "time_us": pa.array([row[1] * times.DAY_US + (0 if row[3] else row[2]) for row in rows], pa.int64()),
        "offset_min": pa.array([NO_TIME if row[3] else 0 for row in rows], pa.int64()),
    }
    return pa.table(columns)


@settings(deadline=None)
@given(st.lists(ROW, max_size=30), st.integers(0, 2**32), st.integers(1, 5))
def test_order_and_blocks_change_nothing_and_a_plain_loop_agrees(
    rows: list[tuple[Any, ...]], seed: int, blocks: int
) -> None:
    whole = tokenize(_cleaned(rows))
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert merge([partial(_cleaned(shuffled[index::blocks])) for index in range(blocks)]).equals(whole)
    seen = {tuple(row.values()) for row in _cleaned(rows).to_pylist()}
    expected = sorted(
        ((user, day, _hash(item), micro, offset) for user, day, item, micro, offset in seen),
        key=lambda row: (row[0].encode(), row[1], row[4] == NO_TIME, row[3], int(mix(row[2], row[3]))),
    )
    assert [tuple(row.values()) for row in whole.to_pylist()] == expected


MOMENT = st.datetimes(datetime.datetime(2017, 3, 11, 22), datetime.datetime(2017, 3, 13, 3)) | st.datetimes(
    datetime.datetime(2017, 11, 4, 22), datetime.datetime(2017, 11, 6, 3)
)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _prepared(folder: Path, tables: list[pa.Table], block_rows: int, data: Data = DATA) -> Path:
    (folder / "events").mkdir(parents=True)
    for index, table in enumerate(tables):
        pq.write_table(table, folder / "events" / f"{index}.parquet", row_group_size=4)
    uri = folder / "sequences" / "0123456789ab"
    prepare_timelines(data, RawTables(str(folder / "events")), str(uri), TOKENIZER, "local", block_rows=block_rows)
    return uri


def _equal(one: Rows, other: Rows) -> None:
    for name in ("user", "user_hash", "offsets", "days", "values", "first_day", "end_day"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), MOMENT, st.booleans(), st.sampled_from("xyz")), min_size=1),
    st.integers(0, 2**32),
)
def test_prepared_is_inline_whatever_the_files_and_blocks(rows: list[tuple[Any, ...]], seed: int) -> None:
    def tables(rows: list[tuple[Any, ...]], files: int) -> list[pa.Table]:
        instants = [(user, moment.replace(tzinfo=UTC), item) for user, moment, day, item in rows if not day]
        days = [(user, moment.date(), item) for user, moment, day, item in rows if day]
        made = [_events(instants[index::files], pa.timestamp("us", "UTC")) for index in range(files)]
        return [*made, _events(days, pa.date32())]

    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "FILE_ROWS", 8)
        one = _prepared(Path(name) / "one", tables(rows, 1), 1 << 20)
        other = _prepared(Path(name) / "other", tables(draw.sample(rows, len(rows)), 3), 5)
        assert _content(one) == _content(other)
        timelines = Timelines.open(str(one))
        stored = timelines.read(range(timelines.buckets))
    sequences = _inline(*tables(draw.sample(rows, len(rows)), 2))
    inline = rows_from_tables(sequences, None, COLUMNS, timelines.start_day, timelines.end_day, sequences=True)
    # the artifact goes bucket by bucket
    inline = inline.take(np.lexsort((inline.user_hash, buckets.bucket_of(inline.user_hash, 6))))
    _equal(stored, inline)
    zone = zoneinfo.ZoneInfo(ZONE)
    for day, (_, micro, offset) in zip(stored.days.tolist(), stored.values.tolist(), strict=True):
        local = (EPOCH + micro * US).astimezone(zone)
        if offset != NO_TIME:
            assert local.utcoffset() == datetime.timedelta(minutes=offset)
            assert day == (local.date() - EPOCH.date()).days
        else:
            assert micro == day * times.DAY_US


def test_the_artifact_says_what_it_is_and_repeated_days_are_fine(tmp_path: Path) -> None:
    noon = datetime.datetime(2020, 5, 1, 16, tzinfo=UTC)
    rows = [("u", noon, "x"), ("u", noon, "y"), ("u", noon, None), ("v", noon, "x"), ("u", noon, "x")]
    table = _events(rows, pa.timestamp("us", "UTC"))
    behaviours = (Behaviour("active", "binary", "count()"),)
    data = Data(behaviours, events=DATA.events, time_zone=ZONE, max_reject_share=0.5)
    assert clean_events(table, data)[0].column_names == ["user", "day"]  # as LUMOS reads it
    uri = _prepared(tmp_path, [table], 100, data)
    timelines = Timelines.open(str(uri))
    assert timelines.manifest["kind"] == "sequences"
    assert tuple(item.name for item in timelines.behaviours) == COLUMNS
    assert [timelines.manifest[name] for name in ("users", "active_days", "events", "rows_rejected")] == [2, 3, 4, 1]
    assert pq.read_table(uri / "rejects")["reason"].to_pylist() == ["`item` is null"]
    rows_read = timelines.read(range(64))
    user = rows_read.user.tolist().index("u")
    begin, end = rows_read.span(np.array([user]), rows_read.days[:1], rows_read.days[:1] + 1)
    assert sorted(rows_read.values[begin[0] : end[0], ITEM].tolist()) == sorted([_hash("x"), _hash("y")])
    assert set(rows_read.values[:, TIME_US].tolist()) == {(noon - EPOCH) // US}
    assert set(rows_read.values[:, OFFSET_MIN].tolist()) == {-240}


def test_a_repeated_id_is_dropped_before_events_are_ordered(tmp_path: Path) -> None:
    table = _events([("u", day, item) for day, item in ((1, "x"), (2, "y"), (3, "z"))], pa.int64())
    table = table.append_column("line", pa.array(["1", "2", "1"]))
    data = Data(events=Events(item="item", id="line"), max_reject_share=0.5)
    timelines = Timelines.open(str(_prepared(tmp_path, [table], 100, data)))
    rows = timelines.read(range(64))
    assert rows.days.tolist() == [1, 2] and rows.values[:, ITEM].tolist() == [_hash("x"), _hash("y")]


def test_whole_numbers_are_items_and_other_types_are_refused(tmp_path: Path) -> None:
    table = _events([("u", 1, "7")], pa.int64())
    numbers = table.set_column(2, "item", pa.array([7], pa.int16()))
    assert tokenize(clean_events(numbers, DATA)[0]).equals(tokenize(clean_events(table, DATA)[0]))
    with pytest.raises(UserError, match=r"column `item`: expected strings or whole numbers, got double; cast the ids"):
        _prepared(tmp_path / "a", [table.set_column(2, "item", pa.array([7.0]))], 100)
    with pytest.raises(UserError, match=r"missing column `item` \(data\.events\.item\); did you mean `itm`\?"):
        _prepared(tmp_path / "b", [table.rename_columns(["user", "time", "itm"])], 100)
    far = table.set_column(1, "time", pa.array([200_000_000]))
    assert clean_events(far, DATA)[1]["reason"].to_pylist() == [f"`time` is out of {times.RANGE}"]


def test_nothing_gives_nothing() -> None:
    none = tokenize(_cleaned([]))
    assert none.num_rows == 0 and none.column_names == ["user", "day", *COLUMNS]
    with pytest.raises(ValueError, match="at least one"):
        merge([])
