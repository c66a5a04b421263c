"""Hand-made features: values by hand, each weekday where it belongs, and nothing from the cut on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lum_ray.data.rows import Rows, Samples
from lum_ray.evaluation import features
from lum_ray.evaluation.features import LENGTH, Ahead, Sheet
from tests.evaluation.small_world import rows_from_dense, world

NAMES, GATES = ("active", "coupon", "spend"), (None, None, 0)
CUT = 400


def by_hand() -> Rows:
    """User 0: active 1, 4, 10 and 24 days before the cut, for 100, 300, 200 and 400. User 1: never. User 2: only the
    ten days before the cut exist; active on all of them and, before their first day, on twenty more.
    """
    dense = np.zeros((3, CUT + 20, 3), dtype=np.int64)
    for back, spend in ((1, 100), (4, 300), (10, 200), (24, 400)):
        dense[0, CUT - back] = (1, 0, spend)
    dense[2, CUT - 30 : CUT] = (1, 1, 50)
    return rows_from_dense(dense, np.array([0, 0, CUT - 10]), CUT + 20)


def at(rows: Rows, cut: int = CUT) -> Samples:
    size = len(rows)
    return Samples(np.arange(size), np.full(size, cut, np.int32), np.zeros(size, np.int32))


def calendar(
    past: dict[str, list[int]], future: dict[str, dict[int, float]], days: int = 14, samples: int = 1
) -> Ahead:
    """Types with the days before the cut (1: the day before) that have one, and {days after it: value}."""
    types = tuple(dict.fromkeys([*past, *future]))
    counts = np.zeros((LENGTH + days, len(types)), np.float32)
    values = np.zeros_like(counts)
    for t, kind in enumerate(types):
        for back in past.get(kind, []):
            counts[back - 1, t] = values[back - 1, t] = 1
        for ahead, value in future.get(kind, {}).items():
            counts[LENGTH + ahead, t], values[LENGTH + ahead, t] = 1, value
    every = np.tile(np.arange(LENGTH + days, dtype=np.int32), (samples, 1))
    return Ahead(types, counts, values, every[:, :LENGTH], every[:, LENGTH:])


def column(sheet: Sheet, name: str) -> list[float]:
    found: list[float] = sheet.columns[:, sheet.names.index(name)].tolist()
    return found


def focus(rows: Rows, ahead: Ahead | None = None) -> Sheet:
    return features.focus(rows, at(rows), ahead or calendar({}, {}, samples=len(rows)), 0, "active")


NAN = pytest.approx(float("nan"), nan_ok=True)


def test_recency_and_gaps_by_hand() -> None:
    found = focus(by_hand())
    assert column(found, "active/recency") == [0, LENGTH, 0]  # days between the last one and the cut
    assert column(found, "active/gap_1") == [3, NAN, 1]
    assert column(found, "active/gap_2") == [6, NAN, 1]
    assert column(found, "active/gap_3") == [14, NAN, 1]
    assert column(found, "active/gap_4") == [NAN, NAN, 1]
    assert column(found, "active/gap_mean") == [pytest.approx(23 / 3), NAN, 1]
    assert column(found, "active/gap_deviation")[0] == pytest.approx(np.std([3, 6, 14]), rel=1e-6)
    assert column(found, "active/gap_longest") == [14, NAN, 1]
    assert column(found, "active/recency_over_gap") == [pytest.approx(3 / 23), NAN, 1]
    # user 0 was away longer than now three times, and came back within seven days of that twice
    assert column(found, "active/gaps_longer") == [1, NAN, 1]
    assert column(found, "active/own_hazard") == [pytest.approx(2.5 / 4), pytest.approx(0.5), pytest.approx(9.5 / 10)]


def test_gaps_against_the_present_silence() -> None:
    rows = by_hand()
    late = features.focus(rows, at(rows, CUT + 5), calendar({}, {}, samples=3), 0, "active")
    # silent for days 400..404: the gaps of 6 and 14 days were longer, and that of 6 ended within the next seven
    assert column(late, "active/recency")[0] == 5
    assert column(late, "active/gaps_longer")[0] == pytest.approx(2 / 3)
    assert column(late, "active/own_hazard")[0] == pytest.approx(1.5 / 3)
    for days, hazard in ((6, 0.5 / 2), (7, 1.5 / 2)):  # the gap of 14 days ends on the eighth day ahead, or the seventh
        late = features.focus(rows, at(rows, CUT + days), calendar({}, {}, samples=3), 0, "active")
        assert column(late, "active/own_hazard")[0] == pytest.approx(hazard)


def test_windows_by_hand() -> None:
    rows = by_hand()
    found = features.general(rows, at(rows), NAMES, GATES)
    assert column(found, "tenure") == [180, 180, 10]
    assert column(found, "active/mean_3") == [pytest.approx(1 / 3), 0, 1]
    assert column(found, "active/mean_7") == [pytest.approx(2 / 7), 0, 1]
    assert column(found, "active/mean_14") == [pytest.approx(3 / 14), 0, 1]
    assert column(found, f"active/mean_{LENGTH}") == [pytest.approx(4 / LENGTH), 0, 1]  # per day that the user existed
    assert column(found, "spend/mean_28") == [pytest.approx(1000 / 28), 0, 50]
    assert column(found, "spend/given_open_28") == [250, NAN, 50]
    assert column(found, "spend/most_84") == [400, 0, 50]
    assert column(found, "spend/last_1") == [100, NAN, 50]
    assert column(found, "spend/last_3") == [200, NAN, 50]
    assert column(found, "spend/deviation") == [pytest.approx(np.std([100, 300, 200, 400])), NAN, 0]
    weight = np.exp2(-np.arange(LENGTH) / 7)
    expected = weight[[0, 3, 9, 23]].sum() / weight.sum()
    assert column(found, "active/decay_7") == [pytest.approx(expected, rel=1e-5), 0, pytest.approx(1)]
    assert not any(name.startswith(("active/last", "coupon/given")) for name in found.names)  # they have no gate


def test_weeks_and_weekdays_by_hand() -> None:
    found = focus(by_hand())
    assert [column(found, f"active/day_{day}")[0] for day in range(1, 6)] == [1, 0, 0, 1, 0]
    assert [column(found, f"active/week_{week}") for week in (1, 2, 3, 4)] == [
        [2, 0, 7],
        [1, 0, 3],
        [0, 0, 0],
        [1, 0, 0],
    ]
    assert column(found, "active/weeks_4") == [pytest.approx(3 / 4), 0, 1]
    # 1, 4, 10 and 24 days before the cut are the weekdays of 6, 3, 4 and 4 days after it
    assert [column(found, f"active/weekday_back_1/{ahead}")[0] for ahead in range(7)] == [0, 0, 0, 1, 0, 0, 1]
    assert [column(found, f"active/weekday_back_2/{ahead}")[0] for ahead in range(7)] == [0, 0, 0, 0, 1, 0, 0]
    rate = 4.1 / (LENGTH + 1)
    four = [column(found, f"active/weekday_4/{ahead}")[0] for ahead in range(7)]
    assert four == [pytest.approx((n + 2 * rate) / 6, rel=1e-5) for n in (0, 0, 0, 1, 2, 0, 1)]
    # user 2 existed for ten days: the three newest weekdays twice, the others once
    own = (10 + 0.1) / 11
    ten = [column(found, f"active/weekday_4/{ahead}")[2] for ahead in range(7)]
    assert ten == [pytest.approx((n + 2 * own) / (n + 2), rel=1e-5) for n in (1, 1, 1, 1, 2, 2, 2)]


@pytest.mark.parametrize("ahead", range(7))
def test_the_weekday_of_the_target_day(ahead: int) -> None:
    """A user who is active on one weekday only: the feature of that day ahead is high, those of the others are low."""
    dense = np.zeros((1, CUT, 3), dtype=np.int64)
    dense[0, np.arange(CUT) % 7 == (CUT + ahead) % 7] = (1, 0, 0)
    found = focus(rows_from_dense(dense, np.zeros(1), CUT))
    rates = [column(found, f"active/weekday_52/{day}")[0] for day in range(7)]
    assert int(np.argmax(rates)) == ahead and rates[ahead] > 0.9 and sorted(rates)[-2] < 0.1


def test_days_of_an_event_count_while_the_user_existed() -> None:
    rows = by_hand()
    found = focus(rows, calendar({"sale": [1, 2, 12]}, {}, samples=3))
    assert column(found, "active/days_of_sale") == [3, 3, 2]
    rate = 4.1 / (LENGTH + 1)
    assert column(found, "active/during_sale")[0] == pytest.approx((1 + 5 * rate) / 8, rel=1e-5)


def test_coming_by_hand() -> None:
    ahead = calendar({"sale": [3, 40]}, {"sale": {2: 5.0}, "final": {0: 2.0, 6: 3.0}})
    today, third, week = (
        features.coming(ahead, np.array([4]), first, days) for first, days in ((0, 1), (3, 1), (0, 7))
    )

    def row(sheet: Sheet, kind: str, *fields: str) -> list[float]:
        return [column(sheet, f"coming/{kind}/{field}")[0] for field in fields]

    # day 0 was a Thursday, so day 4 is a Monday
    assert [column(sheet, "coming/weekday")[0] for sheet in (today, third, week)] == [0, 3, 0]
    assert row(today, "sale", "count", "value", "near_1", "near_2", "until", "since") == [0, 0, 0, 5, 2, 3]
    assert row(third, "sale", "count", "near_-1", "until", "since") == [0, 5, NAN, 1]
    assert row(today, "final", "count", "value", "until", "since") == [1, 2, 0, NAN]
    assert row(third, "final", "count", "until", "since") == [0, 3, 3]
    assert row(week, "final", "count", "value", "value_most") == [2, 5, 3]
    assert row(week, "sale", "share_28")[0] == pytest.approx(1 / 28)
    assert "coming/sale/near_-1" not in today.names


def at_rows(row: np.ndarray) -> Samples:
    """A sample of each row."""
    return Samples(row.astype(np.int64), np.zeros(len(row), np.int32), np.zeros(len(row), np.int32))


def test_the_profile_by_hand() -> None:
    kind = np.array(["b", None, "a"], dtype=object)
    rows = replace(by_hand(), profile={"age": np.array([30.0, np.nan, 50.0]), "kind": kind})
    known = features.vocabulary(rows)
    assert known == {"age": (), "kind": ("a", "b")}
    sheet = features.profile(rows, at_rows(np.array([2, 0, 1, 0])), known)
    assert sheet.categories == ("kind",)
    assert column(sheet, "age") == [50, 30, NAN, 30]
    assert column(sheet, "kind") == [0, 1, -1, 1]
    # a missing value is none of the vocabulary's, even where that holds the text "None"; nor is an unknown one
    other = replace(rows, profile=rows.profile | {"kind": np.array(["None", None, "c"], dtype=object)})
    assert column(features.profile(other, at_rows(np.arange(3)), {"kind": ("None",)}), "kind") == [0, -1, -1]
    # a category of which training knows no value
    assert column(features.profile(other, at_rows(np.arange(3)), {"kind": ()}), "kind") == [-1, -1, -1]


def every(rows: Rows, samples: Samples) -> Sheet:
    ahead = calendar({"sale": [1, 9]}, {"sale": {1: 1.0}}, samples=len(samples))
    return features.general(rows, samples, NAMES, GATES).beside(
        features.focus(rows, samples, ahead, 1, "coupon"), features.coming(ahead, samples.cut.astype(np.int64), 1, 1)
    )


WORLD = world(12, seed=3)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(60, 219), factor=st.integers(0, 9), shift=st.integers(0, 500), late=st.booleans())
def test_nothing_at_or_after_the_cut_matters(cut: int, factor: int, shift: int, late: bool) -> None:
    after = WORLD.days >= cut
    values = np.where(after[:, None], WORLD.values * factor + 1, WORLD.values)
    # other values, and other days that stay in order and not before the cut
    days = np.where(after, WORLD.days + shift, WORLD.days) if late else WORLD.days
    changed = replace(WORLD, values=values, days=days, end_day=WORLD.end_day + shift)
    one, other = every(WORLD, at(WORLD, cut)), every(changed, at(WORLD, cut))
    assert one.names == other.names
    np.testing.assert_array_equal(one.columns, other.columns)


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(80, 220), factor=st.integers(0, 9))
def test_days_before_the_first_count_nowhere(cut: int, factor: int) -> None:
    first = np.full(len(WORLD), cut - 20, np.int32)
    owner = np.repeat(np.arange(len(WORLD)), np.diff(WORLD.offsets))
    before = WORLD.days < first[owner]
    one = replace(WORLD, first_day=first)
    other = replace(one, values=np.where(before[:, None], WORLD.values * factor, WORLD.values))
    np.testing.assert_array_equal(every(one, at(one, cut)).columns, every(other, at(one, cut)).columns)


def test_the_day_before_the_cut_does_matter() -> None:
    values = np.where((WORLD.days == 149)[:, None], WORLD.values * 3 + 1, WORLD.values)
    one, other = every(WORLD, at(WORLD, 150)), every(replace(WORLD, values=values), at(WORLD, 150))
    assert not np.array_equal(one.columns, other.columns, equal_nan=True)


def test_pieces_are_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = every(WORLD, at(WORLD, 150))
    chunks = features.chunks
    monkeypatch.setattr(features, "chunks", lambda samples: chunks(samples, 5))
    # sums in another order: float32 keeps about seven digits of them
    np.testing.assert_allclose(every(WORLD, at(WORLD, 150)).columns, whole.columns, rtol=1e-5)
    nobody = WORLD.take(np.zeros(0, np.int64))
    assert every(nobody, at(nobody, 150)).columns.shape == (0, len(whole.names))
