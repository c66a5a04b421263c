"""Each metric against scikit-learn or a computation by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, mean_absolute_error, mean_absolute_percentage_error, roc_auc_score

from lum_ray.evaluation import metrics


@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_auc_equals_sklearn_with_ties_and_weights(levels: int) -> None:
    random = np.random.default_rng(levels)
    y = random.integers(0, 2, 500)
    score = random.integers(0, levels, 500) + y * levels // 5
    weight = random.poisson(1.0, 500)
    assert metrics.roc_auc(y, score) == pytest.approx(roc_auc_score(y, score), abs=1e-12)
    assert metrics.roc_auc(y, score, weight) == pytest.approx(roc_auc_score(y, score, sample_weight=weight), abs=1e-12)


def test_auc_of_ties_one_class_and_nan() -> None:
    assert metrics.roc_auc([0, 1, 0, 1], [0.3] * 4) == 0.5
    assert metrics.roc_auc([0, 1], [2, 1]) == 0
    assert math.isnan(metrics.roc_auc([1, 1], [0.1, 0.2]))
    assert math.isnan(metrics.roc_auc([0, 1], [0.1, np.nan]))
    assert math.isnan(metrics.roc_auc([], []))


def test_daily_auc_is_averaged_over_days_not_pooled() -> None:
    # Within each day the order is perfect; pooled it is not.
    y, score, day = [0, 1, 0, 1], [0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]
    assert metrics.auc_by_day(y, score, day) == {0: 1.0, 1: 1.0}
    assert metrics.mean_daily_auc(y, score, day) == 1.0
    assert metrics.roc_auc(y, score) == 0.75
    assert metrics.mean_daily_auc([*y, 1], [*score, 0.3], [*day, 2]) == 1.0  # a day of one class is left out
    assert math.isnan(metrics.mean_daily_auc([1, 1], [0, 1], [0, 1]))


def test_errors_against_sklearn_and_by_hand() -> None:
    random = np.random.default_rng(1)
    y, predicted = random.gamma(1, 5, 200), random.gamma(1, 5, 200)
    assert metrics.mae(y, predicted) == pytest.approx(mean_absolute_error(y, predicted))
    assert metrics.mape(y, predicted) == pytest.approx(mean_absolute_percentage_error(y, predicted))
    binary, p = random.integers(0, 2, 200), random.random(200)
    assert metrics.brier(binary, p) == pytest.approx(brier_score_loss(binary, p))
    assert metrics.mape([0, 10, 20], [5, 5, 30]) == pytest.approx((0.5 + 0.5) / 2)  # the row of 0 is not counted
    assert metrics.wmape([0, 10, 20], [5, 5, 30]) == pytest.approx(20 / 30)  # here it is
    assert metrics.total_bias([0, 10, 20], [5, 5, 30]) == pytest.approx(40 / 30 - 1)
    assert metrics.interval_coverage([1, 2, 3, 4], [1, 0, 4, 0], [1, 1, 5, 9]) == 0.5
    assert math.isnan(metrics.wmape([0, 0], [1, 1]))


def test_ece_by_hand_and_of_equal_predictions() -> None:
    p = np.repeat([0.1, 0.5, 0.9], 10)
    y = np.concatenate([np.r_[np.ones(3), np.zeros(7)], np.r_[np.ones(5), np.zeros(5)], np.ones(10)])
    assert metrics.ece(y, p, bins=3) == pytest.approx((0.2 + 0.0 + 0.1) / 3)
    assert metrics.ece(y, np.full(30, 0.4)) == pytest.approx(abs(0.4 - y.mean()))  # one bin: nobody is split off
    points = metrics.reliability("active", np.r_[y, np.nan], np.r_[p, 0.7], bins=3)
    assert points.rows == (10, 10, 10)
    assert points.observed == pytest.approx((0.3, 0.5, 1.0))


def test_equal_mass_bins_hold_equal_mass() -> None:
    counts = np.bincount(metrics.equal_mass_bins(np.random.default_rng(0).random(1000), 10))
    assert counts.tolist() == [100] * 10


def test_hurdle_parts_by_hand() -> None:
    found = metrics.hurdle(
        y=[10, 20, 0, np.nan], gate=[1, 1, 0, 0], p=[0.9, 0.8, 0.1, 0.2], mean=[9, 16, 1, 2], median=[8, 25, 7, 7]
    )
    assert found["p_active_roc_auc"] == 1
    assert found["p_active_brier"] == pytest.approx((0.01 + 0.04 + 0.01 + 0.04) / 4)
    assert found["value_if_active_mae"] == pytest.approx((2 + 5) / 2)
    assert found["value_if_active_mape"] == pytest.approx((0.2 + 0.25) / 2)
    assert found["wmape"] == pytest.approx((1 + 4 + 1 + 2) / 30)


def test_lognormal_point_minimises_mape() -> None:
    mu, sigma = 1.0, 0.8
    y = np.exp(np.random.default_rng(0).normal(mu, sigma, 200_000))
    mean, median = np.exp(mu + sigma**2 / 2), np.exp(mu)
    point = metrics.lognormal_point(np.full(1, mean), np.full(1, median))[0]
    assert point == pytest.approx(np.exp(mu - sigma**2))
    at = [metrics.mape(y, np.full(len(y), value)) for value in (point, point * 0.9, point * 1.1, median, mean)]
    assert min(at) == at[0]
    assert at[3] < at[4]
