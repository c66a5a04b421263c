"""Cuts: what is visible, which cuts are allowed, what a target may look at. Each against a loop over days."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lum_ray.data.rows import Rows, Samples, mix, share
from lum_ray.data.windows import (
    SPLIT_SALT,
    UNKNOWN_AHEAD,
    CutPlan,
    DerivedTarget,
    HorizonTarget,
    first_days,
    history,
    targets,
    visible,
)

FIRST, LAST = -10, 30  # days of the tests' histories, negative ones included


@st.composite
def some_rows(draw: st.DrawFn) -> Rows:
    count = draw(st.integers(1, 4))
    days = [sorted(draw(st.sets(st.integers(FIRST, LAST - 1), max_size=20))) for _ in range(count)]
    flat = np.array([day for user in days for day in user], np.int32)
    values = draw(st.lists(st.integers(0, 3), min_size=2 * len(flat), max_size=2 * len(flat)))
    bound = st.integers(FIRST, LAST)
    return Rows(
        user=np.array([f"u{i}" for i in range(count)], object),
        user_hash=mix(draw(st.integers(0, 1000)), np.arange(count)),
        offsets=np.cumsum([0, *map(len, days)]).astype(np.int64),
        days=flat,
        values=np.array(values, np.int64).reshape(len(flat), 2),
        first_day=np.array(draw(st.lists(bound, min_size=count, max_size=count)), np.int32),
        end_day=np.array(draw(st.lists(bound, min_size=count, max_size=count)), np.int32),
        segment=np.full(count, "", object),
        profile={"country": np.array((["a", "b", None] * 2)[:count], object)},
    )


def some_samples(rows: Rows, data: st.DataObject) -> Samples:
    pairs = data.draw(st.lists(st.tuples(st.integers(0, len(rows) - 1), st.integers(FIRST - 5, LAST + 5)), max_size=6))
    row, cut = np.array(pairs, np.int64).reshape(-1, 2).T
    return Samples(row, cut.astype(np.int32), np.zeros(len(row), np.int32))


def value(rows: Rows, row: int, day: int, behaviour: int) -> int:
    own = slice(rows.offsets[row], rows.offsets[row + 1])
    found = np.flatnonzero(rows.days[own] == day)
    return int(rows.values[own][found[0], behaviour]) if len(found) else 0


def with_changes(rows: Rows, changed: np.ndarray) -> Rows:
    """`rows` with other values on the active days where `changed` (A,)."""
    values = rows.values.copy()
    values[changed] += 100
    return dataclasses.replace(rows, values=values)


def test_a_fact_is_visible_strictly_before_the_cut() -> None:
    assert visible([9, 10, 11, UNKNOWN_AHEAD], 10).tolist() == [True, False, False, True]


@given(some_rows(), st.integers(1, 30), st.data())
def test_history_holds_the_active_days_of_the_window_and_no_other(rows: Rows, days: int, data: st.DataObject) -> None:
    samples = some_samples(rows, data)
    sample, position, index = history(rows, samples, days)
    expected = [
        (s, int(rows.days[a]) - int(cut) + days, a)
        for s, (row, cut) in enumerate(zip(samples.row, samples.cut, strict=True))
        for a in range(rows.offsets[row], rows.offsets[row + 1])
        if cut - days <= rows.days[a] < cut
    ]
    assert list(zip(sample.tolist(), position.tolist(), index.tolist(), strict=True)) == expected


DERIVED = (DerivedTarget("churned", "churned", 0, 4), DerivedTarget("back", "reactivated", 1, 3))
HORIZONS = (HorizonTarget("any", "any", 0, 5), HorizonTarget("sum", "sum", 1, 12))


@settings(max_examples=60, deadline=None)
@given(some_rows(), st.integers(1, 7), st.integers(FIRST, LAST), st.data())
def test_targets_equal_a_loop_over_days(rows: Rows, future: int, until_day: int, data: st.DataObject) -> None:
    samples = some_samples(rows, data)
    daily, over = targets(rows, samples, future, until_day, DERIVED, HORIZONS)
    assert daily.shape == (len(samples), future, 4)
    assert over.shape == (len(samples), 2)
    for s, (row, cut) in enumerate(zip(samples.row.tolist(), samples.cut.tolist(), strict=True)):
        until = min(int(rows.end_day[row]), until_day)
        for f in range(future):
            day = cut + f
            expected = [value(rows, row, day, b) if day < until else np.nan for b in (0, 1)]
            quiet = all(value(rows, row, d, 0) == 0 for d in range(day, day + 4))
            expected.append(float(quiet) if day + 4 <= until else np.nan)
            slept = all(value(rows, row, d, 1) == 0 for d in range(day - 3, day))
            known = day < until and day - 3 >= rows.first_day[row]
            expected.append(float(slept and value(rows, row, day, 1) > 0) if known else np.nan)
            np.testing.assert_array_equal(daily[s, f], expected)
        heads = [
            float(any(value(rows, row, d, 0) for d in range(cut, cut + 5))) if cut + 5 <= until else np.nan,
            sum(value(rows, row, d, 1) for d in range(cut, cut + 12)) if cut + 12 <= until else np.nan,
        ]
        np.testing.assert_array_equal(over[s], heads)


@settings(max_examples=60, deadline=None)
@given(some_rows(), st.integers(FIRST, LAST), st.data())
def test_nothing_after_the_bound_changes_a_target_and_nothing_after_the_cut_the_history(
    rows: Rows, until_day: int, data: st.DataObject
) -> None:
    samples = some_samples(rows, data)
    future = with_changes(rows, rows.days >= until_day)
    for before, after in zip(
        targets(rows, samples, 7, until_day, DERIVED, HORIZONS),
        targets(future, samples, 7, until_day, DERIVED, HORIZONS),
        strict=True,
    ):
        np.testing.assert_array_equal(before, after)
    for cut in set(samples.cut.tolist()):
        own = Samples(*(column[samples.cut == cut] for column in (samples.row, samples.cut, samples.draw)))
        changed = with_changes(rows, rows.days >= cut)
        _, _, index = history(rows, own, 10)
        np.testing.assert_array_equal(rows.values[index], changed.values[index])


def blank(hashes: np.ndarray) -> Rows:
    """Users without events, observed from day 0 to 100."""
    count = len(hashes)
    return Rows(
        user=np.array([f"u{i}" for i in range(count)], object),
        user_hash=hashes,
        offsets=np.zeros(count + 1, np.int64),
        days=np.zeros(0, np.int32),
        values=np.zeros((0, 2), np.int64),
        first_day=np.zeros(count, np.int32),
        end_day=np.full(count, 100, np.int32),
        segment=np.full(count, "", object),
        profile={},
    )


def test_targets_of_no_samples_have_their_shapes() -> None:
    none = Samples(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))
    daily, over = targets(blank(np.zeros(0, np.uint64)), none, 7, 100, DERIVED, HORIZONS)
    assert daily.shape == (0, 7, 4)
    assert over.shape == (0, 2)


plans = st.builds(
    CutPlan,
    from_day=st.integers(FIRST, LAST),
    until_day=st.integers(FIRST, LAST),
    every_days=st.integers(1, 9),
    min_history_days=st.integers(0, 10),
    segment_column=st.just("country"),
    segments=st.sampled_from([(), ("a",), ("a", "b")]),
    low=st.sampled_from([0.0, 0.3]),
    high=st.sampled_from([0.6, 1.0]),
)


def member(plan: CutPlan, rows: Rows, row: int) -> bool:
    place = float(share(mix(rows.user_hash[row], SPLIT_SALT)))
    inside = plan.low <= place < plan.high and (not plan.segments or rows.profile["country"][row] in plan.segments)
    return inside and not any(member(other, rows, row) for other in plan.excluded)


def allowed(plan: CutPlan, rows: Rows) -> list[tuple[int, int]]:
    """All (row, cut), by the words of the plan."""
    return [
        (row, cut)
        for row in range(len(rows))
        if member(plan, rows, row)
        for cut in range(plan.from_day, plan.until_day + 1, plan.every_days)
        if rows.first_day[row] + plan.min_history_days < cut < rows.end_day[row]
    ]


@given(some_rows(), plans, st.lists(plans, max_size=1))
def test_every_allowed_cut_once(rows: Rows, plan: CutPlan, excluded: list[CutPlan]) -> None:
    plan = dataclasses.replace(plan, excluded=tuple(excluded))
    samples = plan.every(rows)
    assert list(zip(samples.row.tolist(), samples.cut.tolist(), strict=True)) == allowed(plan, rows)


@given(some_rows(), plans, st.integers(0, 5), st.integers(1, 4))
def test_draws_are_allowed_cuts_of_each_row_that_has_any(rows: Rows, plan: CutPlan, epoch: int, draws: int) -> None:
    pairs = set(allowed(plan, rows))
    samples = plan.draw(rows, 3, epoch, draws)
    assert samples.row.tolist() == sorted([row for row in {row for row, _ in pairs} for _ in range(draws)])
    assert samples.draw.tolist() == list(range(draws)) * (len(samples) // draws)
    assert set(zip(samples.row.tolist(), samples.cut.tolist(), strict=True)) <= pairs


@given(some_rows(), plans, st.data())
def test_a_draw_depends_on_the_user_and_the_epoch_and_not_on_its_company(
    rows: Rows, plan: CutPlan, data: st.DataObject
) -> None:
    index = np.array(data.draw(st.permutations(range(len(rows)))))
    epochs = np.arange(len(rows)) * 7
    whole, permuted = plan.draw(rows, 1, epochs, 2), plan.draw(rows.take(index), 1, epochs[index], 2)
    assert {
        (row, cut, draw)
        for row, cut, draw in zip(whole.row.tolist(), whole.cut.tolist(), whole.draw.tolist(), strict=True)
    } == {
        (int(index[row]), cut, draw)
        for row, cut, draw in zip(permuted.row.tolist(), permuted.cut.tolist(), permuted.draw.tolist(), strict=True)
    }


def test_draws_vary_with_seed_epoch_and_draw_and_reach_every_cut() -> None:
    rows = blank(mix(5, np.arange(400)))
    plan = CutPlan(from_day=20, until_day=29, every_days=1, min_history_days=0)
    base = plan.draw(rows, 1, 0, 2).cut
    assert np.bincount(base - 20, minlength=10) == pytest.approx(80, abs=40)
    for other in (plan.draw(rows, 2, 0, 2).cut, plan.draw(rows, 1, 1, 2).cut, np.roll(base, 1)):
        assert 0.02 < (base == other).mean() < 0.25


def test_user_splits_are_disjoint_complete_and_the_stated_share() -> None:
    rows = blank(mix(9, np.arange(10_000)))
    train = CutPlan(0, 5, 1, 0, low=0.0, high=0.8)
    test = CutPlan(0, 5, 1, 0, low=0.8, high=1.0)
    assert np.all(train.users(rows) ^ test.users(rows))
    assert train.users(rows).mean() == pytest.approx(0.8, abs=0.02)


def test_first_day_is_the_registration_else_the_first_event_within_the_data() -> None:
    assert first_days(None, np.array([5, 20], np.int32), 10).tolist() == [10, 20]
    assert first_days(np.array([12, 3], np.int32), np.array([20, 20], np.int32), 10).tolist() == [12, 10]
