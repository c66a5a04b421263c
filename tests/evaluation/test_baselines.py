"""Baselines on hand-made rows: values by hand, no look past the cut, and the order in which they should come."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from lum_ray.data.rows import Rows
from lum_ray.evaluation import baselines, history
from lum_ray.evaluation.baselines import Cuts
from lum_ray.evaluation.predictions import SCHEMA, check
from tests.evaluation.small_world import END_DAY, SETTING, TASKS, cuts, rows_from_dense, splits, world


def by_hand() -> Rows:
    """User 0 active on days 0, 7, 14 (one weekday) and 20, spend 100 each; user 1 never; user 2 from day 10, daily."""
    dense = np.zeros((3, END_DAY, 3), dtype=np.int64)
    dense[0, [0, 7, 14, 20]] = (1, 0, 100)
    dense[2, 10:] = (1, 1, 300)
    return rows_from_dense(dense, np.array([0, 0, 10]), END_DAY)


def test_history_features_by_hand() -> None:
    at = cuts(by_hand(), [21, 28])
    assert history.observed_days(at, 84).tolist() == [21, 28, 21, 28, 11, 18]
    assert history.window_sums(at, 7)[:, 0].tolist() == [2, 0, 0, 0, 7, 7]
    assert history.window_sums(at, 84)[:, 2].tolist() == [400, 400, 0, 0, 3300, 5400]
    assert history.recency_days(at).tolist() == [1, 8, 365, 365, 1, 1]
    sums, seen = history.weekday_sums(at, weeks=2)
    assert sums[0, :, 0].tolist() == [2, 0, 0, 0, 0, 0, 1]  # days 7..20: 7 and 14 on weekday 0, 20 on weekday 6
    assert sums[1, :, 0].tolist() == [1, 0, 0, 0, 0, 0, 1]  # days 14..27
    assert seen[0].tolist() == [2] * 7
    assert seen[4].tolist() == [1, 1, 1, 2, 2, 2, 2]  # user 2 at 21: days 10..20


def test_scores_by_hand() -> None:
    train, test = cuts(by_hand(), [21], until_day=50), cuts(by_hand(), [28])
    share, share_over = baselines.fit_share(SETTING, train)(test)
    assert share[0, :, 0].tolist() == pytest.approx([4 / 28] * 7)
    assert share[2, :, 2].tolist() == pytest.approx([300] * 7)
    assert share[0, :, 3].tolist() == pytest.approx([1 - 4 / 28] * 7)  # churned
    assert share_over[0, 1] == pytest.approx(7 * 400 / 28)
    constant, _ = baselines.fit_constant(SETTING, train)(test)
    assert constant[:, 0, 0].tolist() == pytest.approx([1 / 3] * 3)
    weekday, over = baselines.fit_same_weekday(SETTING, train, weeks=4, prior_weeks=2)(test)
    expected = [
        (n + 2 / 3) / 6 for n in (3, 0, 0, 0, 0, 0, 1)
    ]  # day 28 is weekday 0; the mean of all training days is 1/3
    assert weekday[0, :, 0].tolist() == pytest.approx(expected)
    assert over[0, 0] == pytest.approx(1 - np.prod(1 - np.array(expected)))


def test_any_of_7_ranks_by_the_share_itself() -> None:
    train, test = splits()
    daily, over = baselines.fit_share(SETTING, train)(test)
    order = np.argsort(daily[:, 0, 0], kind="stable")
    gap = np.diff(daily[order, 0, 0])
    assert (np.diff(over[order, 0])[gap > 1e-9] > 0).all()
    assert abs(over[:, 0].mean() - np.nanmean(test.over[:, 0])) < 0.05  # on the scale of a probability


def test_nothing_at_or_after_the_cut_matters() -> None:
    rows = world(60)
    train, test = cuts(rows, [120, 134], until_day=150), cuts(rows, [150, 157])
    before = baselines.predict_baselines(SETTING, train, test)
    late = Rows(**{**vars(rows), "values": np.where((rows.days >= 157)[:, None], rows.values * 7 + 1, rows.values)})
    after = baselines.predict_baselines(SETTING, Cuts(late, *list(vars(train).values())[1:]), cuts(late, [150, 157]))
    wild = Rows(**{**vars(rows), "values": np.where((rows.days >= 120)[:, None], rows.values * 7 + 1, rows.values)})
    early = Cuts(wild, *list(vars(cuts(rows, [120], until_day=150)).values())[1:])
    for name in before:
        one, other = pl.from_arrow(before[name]), pl.from_arrow(after[name])
        assert one.drop("y").equals(other.drop("y")), name
        assert not one["y"].equals(other["y"])
    for features in (history.features(early), history.weekday_sums(early, 12)[0]):
        plain = Cuts(rows, *list(vars(early).values())[1:])
        same = history.features(plain) if features.ndim == 2 else history.weekday_sums(plain, 12)[0]
        np.testing.assert_array_equal(features, same)


def test_an_event_before_the_cut_does_matter() -> None:
    rows = world(60)
    train, test = cuts(rows, [120, 134], until_day=150), cuts(rows, [150])
    early = Rows(**{**vars(rows), "values": np.where((rows.days == 149)[:, None], rows.values * 7, rows.values)})
    for fit in (baselines.fit_share, baselines.fit_same_weekday, baselines.fit_logistic):
        score = fit(SETTING, train)
        assert not np.array_equal(score(test)[0], score(Cuts(early, test.samples, test.daily, test.over))[0])


def test_tables_have_the_schema_and_the_raw_unit() -> None:
    train, test = splits()
    found = baselines.predict_baselines(SETTING, train, test)
    assert list(found) == ["constant", "same_weekday", "active_share_84", "recency_frequency_logistic"]
    for predicted in found.values():
        assert predicted.schema == SCHEMA
        assert predicted.num_rows == len(test.samples) * (7 * 4 + 2)
    check(pa.concat_tables(found.values()), TASKS)
    frame = pl.from_arrow(found["active_share_84"])
    spend = frame.filter(behaviour="spend")
    assert spend["y"].sum() == pytest.approx(np.nansum(test.daily[:, :, 2]) * 0.01)  # cents to euros
    assert spend["mean"].sum() / spend["y"].sum() == pytest.approx(1, abs=0.15)
    horizon = frame.filter(behaviour="active_any_7")
    assert (horizon["day"] == horizon["cut_day"]).all()
    inside = spend.filter(pl.col("y") > 0).select((pl.col("y") >= pl.col("low")) & (pl.col("y") <= pl.col("high")))
    assert 0.82 < inside.to_series().mean() < 0.97  # a 90 % interval


def test_logistic_without_a_second_class_or_history() -> None:
    rows = by_hand()
    train, test = cuts(rows, [10], until_day=17), cuts(rows, [5])
    for predicted in baselines.predict_baselines(SETTING, train, test).values():
        check(predicted, TASKS)
