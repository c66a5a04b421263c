"""Resamples equal the plain metric with weights; intervals cover a known truth; differences are paired."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.stats import norm

from lum_ray.evaluation import bootstrap, metrics


def clustered(
    random: np.random.Generator, users: int = 120, each: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, score, user; the score of class 1 is N(1, 1), of class 0 N(0, 1); a user's rows share their class."""
    user = np.repeat(np.arange(users), each)
    y = np.repeat(random.integers(0, 2, users), each).astype(float)
    score = random.normal(y, np.sqrt(0.5)) + np.repeat(random.normal(0, np.sqrt(0.5), users), each)
    return y, score, user


def test_auc_resamples_equal_the_weighted_auc() -> None:
    random = np.random.default_rng(0)
    y, score, user = clustered(random)
    score = np.round(score, 1)  # ties
    weights = bootstrap.user_weights(120, 20, seed=3)
    expected = [metrics.roc_auc(y, score, row[user]) for row in weights]
    assert bootstrap.auc_resamples(y, score, user, weights) == pytest.approx(expected, abs=1e-12)
    assert expected[0] == metrics.roc_auc(y, score)


def test_ratio_and_ece_resamples_equal_repeated_rows() -> None:
    random = np.random.default_rng(0)
    user, y, p = random.integers(0, 30, 300), random.integers(0, 2, 300).astype(float), random.random(300)
    weights = bootstrap.user_weights(30, 5)
    ratios = bootstrap.ratio_resamples(metrics.mae_terms(y, p), user, weights)
    errors = bootstrap.ece_resamples(y, p, user, weights)
    bins = metrics.equal_mass_bins(p)
    for row, ratio, error in zip(weights, ratios, errors, strict=True):
        repeated = np.repeat(np.arange(300), row[user])
        assert ratio == pytest.approx(metrics.mae(y[repeated], p[repeated]))
        gaps = np.bincount(bins[repeated], weights=(p - y)[repeated])
        assert error == pytest.approx(np.abs(gaps).sum() / len(repeated))
    assert errors[0] == pytest.approx(metrics.ece(y, p))


def test_interval_over_users_covers_the_truth_and_over_rows_does_not() -> None:
    truth = norm.cdf(1 / np.sqrt(2))  # P(N(1,1) > N(0,1))
    random = np.random.default_rng(5)
    covered = by_row = 0
    trials = 120
    for trial in range(trials):
        y, score, user = clustered(random)
        at = bootstrap.interval(bootstrap.auc_resamples(y, score, user, bootstrap.user_weights(120, 200, trial)))
        covered += at.low <= truth <= at.high
        rows = np.arange(len(y))
        at = bootstrap.interval(bootstrap.auc_resamples(y, score, rows, bootstrap.user_weights(len(y), 200, trial)))
        by_row += at.low <= truth <= at.high
    assert 0.88 <= covered / trials <= 0.99
    assert by_row < covered


def test_difference_is_paired() -> None:
    y, score, user = clustered(np.random.default_rng(0))
    weights = bootstrap.user_weights(120)
    one = bootstrap.auc_resamples(y, score, user, weights)
    other = bootstrap.auc_resamples(y, score + np.random.default_rng(1).normal(0, 0.05, len(y)), user, weights)
    alone, difference = bootstrap.interval(one), bootstrap.interval(one - other)
    assert difference.value == pytest.approx(alone.value - other[0])
    assert difference.high - difference.low < (alone.high - alone.low) / 5
    assert bootstrap.interval(one - one).low == bootstrap.interval(one - one).high == 0


def test_reflected_interval_holds_its_estimate() -> None:
    random = np.random.default_rng(0)
    user, p = np.arange(400), random.random(400)
    y = (random.random(400) < p).astype(float)
    at = bootstrap.interval(bootstrap.ece_resamples(y, p, user, bootstrap.user_weights(400)), reflected=True)
    assert 0 <= at.low < at.value <= at.high < 2 * at.value


def test_one_class_gives_nan() -> None:
    values = bootstrap.auc_resamples(np.ones(4), np.arange(4.0), np.arange(4), bootstrap.user_weights(4, 3))
    assert np.isnan(values).all()
    assert np.isnan(bootstrap.interval(values).low)
    kept = bootstrap.mean_defined([values, np.array([0.5, 0.6, 0.7, np.nan])])
    assert kept[:3].tolist() == [0.5, 0.6, 0.7]
    assert np.isnan(kept[3])


def test_two_hundred_resamples_of_a_hundred_thousand_rows_take_seconds() -> None:
    random = np.random.default_rng(0)
    y, score = (random.random(100_000) < 0.14).astype(float), random.random(100_000)
    user, weights = random.integers(0, 2500, 100_000), bootstrap.user_weights(2500)
    start = time.process_time()
    bootstrap.auc_resamples(y, score, user, weights)
    assert time.process_time() - start < 5
