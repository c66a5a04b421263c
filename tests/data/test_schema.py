from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lum_ray.artifacts import UserError
from lum_ray.config import Behaviour, Data, Events
from lum_ray.data.raw import raw_files
from lum_ray.data.schema import PROVENANCE, check_events, clean_events, drop_repeats, read_events
from lum_ray.data.times import RANGE, to_day

BEHAVIOURS = (Behaviour("active", "binary", "count()"), Behaviour("spend", "continuous", "sum(price)", 0.01))
UTC = datetime.UTC


def _data(**changes: Any) -> Data:
    values: dict[str, Any] = {"behaviours": BEHAVIOURS}
    return Data(**(values | changes))


def _events(**columns: Any) -> pa.Table:
    default = {"user": ["a", "b"], "time": pa.array([3, 4], pa.int32()), "price": [1.0, 2.25]}
    return pa.table(default | columns)


def _read(uri: str, **options: Any) -> tuple[pa.Table, pa.Table]:
    tables, rejects = read_events(uri, _data(), **options)
    return pa.concat_tables(tables), rejects


def _write(folder: Path, table: pa.Table, name: str = "0000.parquet") -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / name)
    return str(folder)


@pytest.mark.parametrize(
    ("values", "zone", "expected"),
    [
        (pa.array([-5, 7], pa.int64()), "UTC", [-5, 7]),
        (pa.array([0, 2**40], pa.int64()), "UTC", [0, None]),
        (pa.array([datetime.date(1970, 1, 2), None]), "Asia/Tokyo", [1, None]),
        (pa.array([86_400_000 * 3], pa.date64()), "UTC", [3]),
        (pa.array([datetime.datetime(1969, 12, 31, 23)]), "UTC", [-1]),
        # 03:00 UTC is the evening before in New York, the same day in Berlin
        (pa.array([datetime.datetime(1970, 1, 2, 3, tzinfo=UTC)]), "America/New_York", [0]),
        (pa.array([datetime.datetime(1970, 1, 2, 3, tzinfo=UTC)]), "Europe/Berlin", [1]),
        # the hour of summer time: 22:30 UTC is 00:30 of the next day in July, 23:30 in January
        (pa.array([datetime.datetime(2020, 7, 1, 22, 30, tzinfo=UTC)]), "Europe/Berlin", [18445]),
        (pa.array([datetime.datetime(2020, 1, 1, 22, 30, tzinfo=UTC)]), "Europe/Berlin", [18262]),
        (pa.array([10**18], pa.timestamp("ns", tz="+05:00")), "UTC", [11574]),
    ],
)
def test_times_become_local_days(values: pa.Array, zone: str, expected: list[int | None]) -> None:
    days = to_day(pa.chunked_array([values]), zone)
    assert days.type == pa.int32() and days.to_pylist() == expected


def test_clean_rows_pass_unchanged_and_only_used_columns_stay() -> None:
    events, rejects = clean_events(_events(user=pa.array([7, 8]), other=[1, 2]), _data())
    assert events.to_pylist() == [{"user": "7", "day": 3, "price": 1.0}, {"user": "8", "day": 4, "price": 2.25}]
    assert rejects.num_rows == 0


@pytest.mark.parametrize(
    ("columns", "changes", "reason", "value"),
    [
        ({"user": [None, "b"]}, {}, "`user` is null", None),
        ({"time": pa.array([None, 4], pa.int32())}, {}, "`time` is null", None),
        ({"time": pa.array([2**40, 4], pa.int64())}, {}, f"`time` is out of {RANGE}", "1099511627776"),
        ({"price": [float("nan"), 1.0]}, {}, "`price` is not a finite number", "nan"),
        ({"price": [float("-inf"), 1.0]}, {}, "`price` is not a finite number", "-inf"),
        ({"price": [1.005, 1.0]}, {}, "spend: sum(price) is finer than the resolution 0.01", "1.005"),
        ({"price": [1e17, 1.0]}, {}, "spend: sum(price) is more than 2^48 times 0.01", "1e+17"),
        ({}, {"start": 4}, "`time` is before data.start, 4", "3"),
        (
            {"time": pa.array([9, 4], pa.int32())},
            {"end": "1970-01-06"},
            "`time` is not before data.end, 1970-01-06",
            "9",
        ),
        ({"id": [None, "x"]}, {"events": Events(id="id")}, "`id` is null", None),
    ],
)
def test_bad_rows_are_rejected_with_a_reason_and_their_value(
    columns: dict[str, Any], changes: dict[str, Any], reason: str, value: str | None
) -> None:
    events, rejects = clean_events(_events(**columns), _data(**changes), "events/x.parquet", first_row=100)
    user = columns.get("user", ["a"])[0]
    assert rejects.to_pylist() == [
        {"file": "events/x.parquet", "row": 100, "reason": reason, "value": value, "user": user}
    ]
    assert events["user"].to_pylist() == ["b"]


def test_a_row_is_rejected_once_and_division_by_zero_is_found() -> None:
    data = _data(behaviours=(BEHAVIOURS[0], Behaviour("ratio", "continuous", "sum(price / count)", 0.01)))
    table = _events(user=[None, "b"], price=[float("nan"), 1.0], count=[1, 0])
    _, rejects = clean_events(table, data)
    assert rejects["reason"].to_pylist() == ["`user` is null", "ratio: sum(price / count) is not finite"]


def test_null_numbers_are_no_fault() -> None:
    events, rejects = clean_events(_events(price=[None, 1.0]), _data())
    assert events.num_rows == 2 and rejects.num_rows == 0


@pytest.mark.parametrize(
    ("columns", "changes", "said"),
    [
        ({}, {"events": Events(user="usr")}, ["missing column `usr`", "did you mean `user`", "data.events.user"]),
        ({"time": ["x", "y"]}, {}, ["column `time`", "expected a timestamp with a time zone", "got string", "cast it"]),
        ({"user": [1.5, 2.0]}, {}, ["column `user`", "strings or whole numbers", "got double"]),
        ({"price": ["1", "2"]}, {}, ["data.behaviours.spend", "takes numbers, got a string"]),
        (
            {"prices": [1, 2], "price": [None, None]},
            {"behaviours": (*BEHAVIOURS, Behaviour("x", "count", "sum(pricess)"))},
            ["data.behaviours.x", "unknown column `pricess`", "did you mean `prices`"],
        ),
        (
            {"time": pa.array([1, 2], pa.timestamp("us"))},
            {"time_zone": "Europe/Berlin"},
            ["attach the zone", "timestamp[us]"],
        ),
        ({}, {"time_zone": "Europe/Berln"}, ["data.time_zone", "did you mean Europe/Berlin"]),
        ({}, {"behaviours": (Behaviour("days", "binary", "count()"),)}, ["`days` is the name of a column"]),
        (
            {},
            {"behaviours": (Behaviour("n", "binary", "count()", 0.5),)},
            ["data.behaviours.n.resolution", "expected 1"],
        ),
        ({}, {"behaviours": (Behaviour("n", "binary", "any(day > 3)"),)}, ["`day` is a name of lum_ray's own"]),
    ],
)
def test_bad_columns_stop_before_anything_starts(
    tmp_path: Path, columns: dict[str, Any], changes: dict[str, Any], said: list[str]
) -> None:
    uri = _write(tmp_path / "events", _events(**columns))
    with pytest.raises(UserError) as error:
        check_events(uri, _data(**changes))
    for part in said:
        assert part in str(error.value)


def test_the_second_file_is_checked_too(tmp_path: Path) -> None:
    _write(tmp_path / "events", _events())
    uri = _write(tmp_path / "events", _events(price=["1", "2"]), "0001.parquet")
    with pytest.raises(UserError, match=r"0001\.parquet"):
        check_events(uri, _data())


def test_naive_timestamps_are_utc_in_a_utc_run(tmp_path: Path) -> None:
    uri = _write(tmp_path / "events", _events(time=pa.array([0, 86_400_000_000 - 1], pa.timestamp("us"))))
    (file,) = check_events(uri, _data())
    assert _read(file.uri)[0]["day"].to_pylist() == [0, 0]


def test_a_missing_table_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing"):
        raw_files(str(tmp_path / "events"), "events")
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "a.csv").write_text("user,time\n")
    with pytest.raises(UserError, match=r"expected \*.parquet files, found \['a.csv'\]"):
        raw_files(str(tmp_path / "events"), "events")


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    uri = _write(tmp_path / "events", _events().slice(0, 0))
    with pytest.raises(UserError, match="expected rows, but the 1 file"):
        check_events(uri, _data())
    # an empty file beside others is no fault
    _write(tmp_path / "events", _events(), "0001.parquet")
    empty, full = check_events(uri, _data())
    assert _read(empty.uri)[0].num_rows == 0
    assert _read(full.uri)[0].num_rows == 2


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    uri = _write(tmp_path / "events", _events())
    (tmp_path / "events" / "0001.parquet").write_text("user,time,price\na,1,2.0\n" * 10)
    with pytest.raises(UserError, match=r"0001\.parquet: expected a complete parquet file.*another format"):
        check_events(uri, _data())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_cut_off_in_the_middle_is_named(tmp_path: Path, share: float) -> None:
    uri = _write(tmp_path / "events", _events())
    file = tmp_path / "events" / "0000.parquet"
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(UserError, match=r"0000\.parquet: expected a complete parquet file"):
        check_events(uri, _data())


def test_damaged_pages_are_named(tmp_path: Path) -> None:
    uri = _write(
        tmp_path / "events",
        pa.table({"user": ["a"] * 999, "time": pa.array(range(999), pa.int32()), "price": [1.0] * 999}),
    )
    file = tmp_path / "events" / "0000.parquet"
    content = bytearray(file.read_bytes())
    content[4:200] = bytes(196)
    file.write_bytes(content)
    (found,) = check_events(uri, _data())
    with pytest.raises(UserError, match=r"0000\.parquet: expected a complete parquet file"):
        read_events(found.uri, _data())


def test_rows_are_counted_in_the_file_whatever_the_batches(tmp_path: Path) -> None:
    prices = [float("nan") if row in (0, 5, 9) else 1.0 for row in range(10)]
    table = pa.table({"user": ["a"] * 10, "time": pa.array(range(10), pa.int32()), "price": prices})
    (tmp_path / "events").mkdir()
    path = str(tmp_path / "events" / "0000.parquet")
    pq.write_table(table, path, row_group_size=4)
    for batch_rows in (1, 3, 100):
        events, rejects = _read(path, batch_rows=batch_rows)
        assert rejects["row"].to_pylist() == [0, 5, 9] and events.num_rows == 7
    events, rejects = _read(path, row_groups=[1, 2], first_row=4)
    assert rejects["row"].to_pylist() == [5, 9] and events["day"].to_pylist() == [4, 6, 7, 8]


def test_repeats_of_a_user_and_id_are_dropped_but_the_first() -> None:
    data = _data(events=Events(id="line"))
    table = pa.table(
        {
            "user": ["a", "a", "b", "a"],
            "time": pa.array([1, 2, 1, 3], pa.int32()),
            "price": [1.0, 2.0, 3.0, 4.0],
            "line": [7, 7, 7, 8],
        }
    )
    later, _ = clean_events(table, data, "events/1.parquet")
    first, _ = clean_events(table.slice(0, 1), data, "events/0.parquet")
    kept, rejects = drop_repeats(pa.concat_tables([later, first]))
    assert sorted(kept["price"].to_pylist()) == [1.0, 3.0, 4.0]
    assert kept.column_names == ["user", "day", "price", *PROVENANCE]
    assert rejects.to_pylist() == [
        {"file": "events/1.parquet", "row": row, "reason": "repeats an id of its user", "value": "7", "user": "a"}
        for row in (0, 1)
    ]
