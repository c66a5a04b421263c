"""Event vectors of (user, cut, day): equal to a plain loop over calendar rows, and blind to what is not known yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lum_ray.data.rows import hash_strings
from lum_ray.data.windows import UNKNOWN_AHEAD
from lum_ray.lumos.collate import Calendar, EventLayout, as_of_days, profile_arrays, shuffled, stand_in

LAYOUT = EventLayout(("deadline", "match"), (2.0, 1.0), weekday=True, season=False)
SCHEMA = pa.schema(
    [("scope", pa.string()), ("key", pa.string()), ("start_day", pa.int32()), ("end_day", pa.int32()),
     ("event_type", pa.string()), ("value", pa.float64()), ("known_at", pa.int32())]
)  # fmt: skip


def table(*rows: dict[str, Any]) -> pa.Table:
    blank = {"scope": "global", "key": None, "event_type": "match", "value": None, "known_at": None}
    return pa.Table.from_pylist([blank | row for row in rows], schema=SCHEMA)


def expected(rows: pa.Table, user: str, segment: str, day: int, cut: int) -> np.ndarray[Any, Any]:
    """The event vector by the definition, one row after the other."""
    vector = LAYOUT.rhythm(np.array([day]))[0].copy()
    for row in rows.to_pylist():
        owner = {"global": True, "segment": row["key"] == segment, "user": row["key"] == user}[row["scope"]]
        known = row["known_at"]
        if known is None:
            known = row["start_day"] if row["scope"] == "user" else UNKNOWN_AHEAD
        if owner and row["start_day"] <= day <= row["end_day"] and known < cut and row["event_type"] in LAYOUT.types:
            at = LAYOUT.types.index(row["event_type"])
            vector[LAYOUT.rhythm_width + at] += 1
            vector[LAYOUT.rhythm_width + 2 + at] += (1.0 if row["value"] is None else row["value"]) / LAYOUT.scales[at]
    return vector


row_strategy = st.fixed_dictionaries(
    {
        "scope": st.sampled_from(["global", "segment", "user"]),
        "key": st.sampled_from(["a", "b", "s"]),
        "start_day": st.integers(0, 30),
        "event_type": st.sampled_from(["deadline", "match", "unheard_of"]),
        "value": st.one_of(st.none(), st.floats(-4, 4, width=16)),
        "known_at": st.one_of(st.none(), st.integers(-5, 30)),
    }
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(row_strategy, st.integers(0, 6)), max_size=8), st.integers(5, 30))
def test_look_up_equals_the_definition(rows: list[tuple[dict[str, Any], int]], cut: int) -> None:
    calendar = table(*({**row, "end_day": row["start_day"] + length} for row, length in rows))
    users, segments = ["a", "b", "a"], ["s", "", "b"]
    start = np.array([cut - 5, cut - 4, cut - 5])
    as_of = np.full((3, 9), cut)
    rows_ES, index = Calendar(calendar, LAYOUT).look_up(hash_strings(users), np.array(segments, object), start, as_of)
    for i, (user, segment) in enumerate(zip(users, segments, strict=True)):
        for j in range(9):
            np.testing.assert_allclose(
                rows_ES[index[i, j]], expected(calendar, user, segment, int(start[i]) + j, cut), atol=1e-6
            )


def test_distinct_days_are_built_once() -> None:
    calendar = Calendar(table({"start_day": 3, "end_day": 3}), LAYOUT)
    users = hash_strings([f"u{i}" for i in range(50)])
    rows_ES, _ = calendar.look_up(users, np.array([""] * 50, object), np.zeros(50, np.int64), np.full((50, 14), 14))
    assert len(rows_ES) == 14


def test_a_bases_range_grows_without_changing_what_it_said() -> None:
    calendar = Calendar(table({"start_day": 3, "end_day": 40}), LAYOUT)
    one = hash_strings(["u"])
    for start in (10, 0, 35):
        rows_ES, index = calendar.look_up(one, np.array([""], object), np.array([start]), np.full((1, 5), 99))
        count = rows_ES[index[0], LAYOUT.rhythm_width + 1]
        assert count.tolist() == [float(3 <= start + j <= 40) for j in range(5)]


def test_with_several_cuts_a_day_is_seen_as_of_the_first_cut_after_it() -> None:
    cuts = np.array([[5, 10]])
    assert as_of_days(cuts, np.array([3]), 7).tolist() == [[5, 5, 10, 10, 10, 10, 10]]


def test_a_shuffled_calendar_has_the_same_events_in_other_weeks() -> None:
    rows = [{"start_day": 12 * i, "end_day": 12 * i + i % 3, "known_at": 12 * i - 30} for i in range(60)]
    rows += [{"scope": "segment", "key": "s", "start_day": 7 * i, "end_day": 7 * i, "event_type": "deadline",
              "value": float(i)} for i in range(30)]  # fmt: skip
    before, after = table(*rows), shuffled(table(*rows))
    moved = {name: after[name].to_numpy() - before[name].to_numpy() for name in ("start_day", "end_day")}
    assert after.schema == before.schema
    assert (moved["start_day"] == moved["end_day"]).all()
    assert (moved["start_day"] % 7 == 0).all()
    assert (moved["start_day"] != 0).all()
    assert len(np.unique(moved["start_day"])) > 30  # each on its own
    for name in ("scope", "key", "event_type", "value"):
        assert after[name] == before[name]
    known = after["known_at"].to_numpy()[:60] - before["known_at"].to_numpy()[:60]
    assert (known == moved["start_day"][:60]).all()
    assert after["known_at"][60:].null_count == 30
    for kind, last in ((slice(0, 60), 710), (slice(60, 90), 209)):  # each type stays within its own time
        start = after["start_day"].to_numpy()[kind]
        assert start.min() >= 0
        assert start.max() <= last + 6
    assert shuffled(table(*rows)) == after


def test_a_calendar_of_a_week_or_of_nothing_cannot_be_shuffled() -> None:
    for rows in (table(), table({"start_day": 3, "end_day": 5})):
        assert shuffled(rows) == rows


def test_weekday_columns_start_on_monday() -> None:
    assert LAYOUT.rhythm(np.array([4]))[0, :7].argmax() == 0  # 1970-01-05 was a Monday
    season = EventLayout((), (), weekday=False, season=True)
    assert season.rhythm(np.array([0, 91])).shape == (2, 2)
    assert season.rhythm(np.array([0]))[0].tolist() == [0.0, 1.0]


def test_profile_arrays_mark_missing_and_unknown() -> None:
    rows = stand_in(1, ["age", "town"])
    profile = {"age": np.array([1.0, np.nan, 3.0]), "town": np.array(["x", None, "new"], object)}
    rows = replace(rows, profile=profile)
    numbers, categories = profile_arrays(
        rows, np.array([0, 1, 2]), np.zeros(3, np.int64), ["age"], [("town", ("w", "x"))]
    )
    assert numbers[:, 0].tolist()[::2] == [1.0, 3.0]
    assert np.isnan(numbers[1, 0])
    assert categories[:, 0].tolist() == [2, 0, 0]


def test_no_calendar_still_gives_the_rhythm() -> None:
    rows_ES, index = Calendar(None, EventLayout((), (), True, False)).look_up(
        hash_strings(["u"]), np.array([""], object), np.array([4]), np.full((1, 7), 11)
    )
    assert rows_ES[index[0]].argmax(axis=1).tolist() == list(range(7))
    with pytest.raises(KeyError):
        Calendar(pa.table({"event_type": ["match"]}), LAYOUT)
