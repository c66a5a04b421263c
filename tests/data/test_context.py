from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lum_ray.artifacts import UserError
from lum_ray.config import Behaviour, Calendar, Data, Profiles
from lum_ray.data.context import CALENDAR, canonical_calendar, canonical_profiles, clean_calendar, holiday_rows
from lum_ray.data.times import RANGE

ACTIVE = (Behaviour("active", "binary", "count()"),)


def _write(folder: Path, table: pa.Table) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "0000.parquet")
    return str(folder)


def _profiles(**changes: Any) -> Data:
    values: dict[str, Any] = {"registered": "since", "ends": "until", "segment": "course"}
    values |= {"numbers": ("age", "score"), "categories": ("town",), "splits": ("year",)}
    return Data(behaviours=ACTIVE, profiles=Profiles(**(values | changes)))


def _table(**columns: Any) -> pa.Table:
    default = {
        "user": ["b", "a"],
        "since": [datetime.date(1970, 1, 11), None],
        "until": pa.array([30, None], pa.int64()),
        "course": ["x", None],
        "age": pa.array([30, None], pa.int8()),
        "score": [0.5, float("nan")],
        "town": pa.array(["Ulm", None]).dictionary_encode(),
        "year": pa.array([2013, 2014], pa.int32()),
    }
    return pa.table(default | columns)


def test_profiles_are_canonical_and_gaps_stay_gaps(tmp_path: Path) -> None:
    profiles, rejects = canonical_profiles(_profiles(), _write(tmp_path / "p", _table()))
    assert rejects.num_rows == 0
    nothing = {"registered": None, "ends": None, "segment": None, "age": None, "score": None, "town": None}
    assert profiles.to_pylist() == [
        {"user": "a", **nothing, "year": "2014"},
        {
            "user": "b",
            "registered": 10,
            "ends": 30,
            "segment": "x",
            "age": 30.0,
            "score": 0.5,
            "town": "Ulm",
            "year": "2013",
        },
    ]


def test_infinite_profile_numbers_are_missing_and_noted(tmp_path: Path) -> None:
    profiles, rejects = canonical_profiles(_profiles(), _write(tmp_path / "p", _table(score=[float("inf"), 1.0])))
    assert profiles["score"].to_pylist() == [1.0, None]
    assert rejects.to_pylist() == [
        {
            "file": "profiles/0000.parquet",
            "row": 0,
            "reason": "`score` is infinite, taken as missing",
            "value": "inf",
            "user": "b",
        }
    ]


def test_a_profile_without_user_or_with_an_impossible_day_is_rejected(tmp_path: Path) -> None:
    table = _table(user=[None, "a"], until=pa.array([3, 2**40], pa.int64()))
    profiles, rejects = canonical_profiles(_profiles(), _write(tmp_path / "p", table))
    assert profiles.num_rows == 0
    assert rejects["reason"].to_pylist() == ["`user` is null", "`until` is no day"]
    assert rejects["value"].to_pylist() == [None, "1099511627776"] and rejects["user"].to_pylist() == [None, "a"]


def test_users_that_come_twice_stop(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one profile per user, these come more than once: a;"):
        canonical_profiles(_profiles(), _write(tmp_path / "p", _table(user=["a", "a"])))


@pytest.mark.parametrize(
    ("columns", "changes", "said"),
    [
        ({}, {"numbers": ("agee",)}, "missing column `agee` (data.profiles.numbers: agee); did you mean `age`"),
        ({"age": ["x", "y"]}, {}, "column `age`: expected numbers, got string"),
        ({"town": [1.5, 2.5]}, {}, "column `town`: expected strings"),
        ({"since": ["x", "y"]}, {}, "column `since`: expected a timestamp"),
        ({}, {"numbers": ("year",)}, "`year` is in numbers and in categories or splits"),
        ({"segment": ["x", "y"]}, {"categories": ("segment",)}, "`segment` is the name of a column of the timelines"),
    ],
)
def test_bad_profile_columns_stop(tmp_path: Path, columns: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        canonical_profiles(_profiles(**changes), _write(tmp_path / "p", _table(**columns)))
    assert said in str(error.value)


def _rows(**columns: Any) -> pa.Table:
    default = {
        "scope": ["user", "global"],
        "key": ["u1", None],
        "start_day": [datetime.date(1970, 1, 3), datetime.date(1970, 1, 2)],
        "end_day": [datetime.date(1970, 1, 5), datetime.date(1970, 1, 2)],
        "event_type": ["campaign", "match"],
    }
    return pa.table(default | columns)


def test_the_calendar_is_canonical_and_sorted(tmp_path: Path) -> None:
    data = Data(behaviours=ACTIVE, calendar=Calendar())
    known = pa.array([None, datetime.datetime(1970, 1, 1, 23, tzinfo=datetime.UTC)])
    rows, rejects = canonical_calendar(data, _write(tmp_path / "c", _rows(known_at=known, value=[None, 2])), 0, 10)
    assert rejects.num_rows == 0 and rows.schema == CALENDAR
    assert [list(row.values()) for row in rows.to_pylist()] == [
        ["global", None, 1, 1, "match", 2.0, 0],
        ["user", "u1", 2, 4, "campaign", None, None],
    ]


@pytest.mark.parametrize(
    ("columns", "reason", "value"),
    [
        ({"scope": ["team", "global"]}, "scope: is none of global, segment, user", "team"),
        ({"scope": [None, "global"]}, "scope: is none of global, segment, user", None),
        ({"key": [None, None]}, "key: is null, but the scope is not global", "user"),
        ({"start_day": pa.array([None, 1], pa.int32())}, "start_day: is no day", None),
        ({"end_day": [datetime.date(1970, 1, 2)] * 2}, "end_day: is before start_day", "1970-01-02"),
        ({"event_type": [None, "match"]}, "event_type: is null", None),
        ({"value": [float("nan"), None]}, "value: is not finite; null means 1", "nan"),
        (
            {"known_at": pa.array([2**40, None], pa.int64())},
            f"known_at: is out of {RANGE}",
            "1099511627776",
        ),
    ],
)
def test_bad_calendar_rows_are_rejected(columns: dict[str, Any], reason: str, value: str | None) -> None:
    rows, rejects = clean_calendar(_rows(**columns), Data(behaviours=ACTIVE), "calendar/x", 10)
    scope, key = (columns.get(name, default)[0] for name, default in (("scope", ["user"]), ("key", ["u1"])))
    user = key if scope == "user" else None
    assert rejects.to_pylist() == [{"file": "calendar/x", "row": 10, "reason": reason, "value": value, "user": user}]
    assert rows["event_type"].to_pylist() == ["match"]


def test_holidays_of_the_data_and_the_year_after() -> None:
    day = (datetime.date(2017, 12, 25) - datetime.date(1970, 1, 1)).days
    rows = holiday_rows("US", day, day + 366)
    assert rows.schema == CALENDAR and rows["start_day"].to_pylist()[0] == day
    assert set(rows["event_type"].to_pylist()) == {"holiday"} and 10 < rows.num_rows < 16
    assert holiday_rows("US", day, day + 1).num_rows == 1 and holiday_rows("US", day + 1, day + 2).num_rows == 0
    assert holiday_rows("DE-BY", day, day + 366).num_rows > holiday_rows("DE", day, day + 366).num_rows


@pytest.mark.parametrize(("place", "said"), [("UX", "did you mean"), ("DE-XX", "no subdivision 'XX'")])
def test_unknown_countries_are_refused(place: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        holiday_rows(place, 17000, 17365)
