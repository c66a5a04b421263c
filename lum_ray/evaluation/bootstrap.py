"""Intervals by bootstrap over users: one table of weights, shared by all models, so that differences are paired.

Users are resampled, not rows: the days and cuts of one user are not independent. A resample is a row of Poisson(1)
weights, one a user; row 0 is all ones and gives the point estimate, so a statistic returns its estimate and its
resamples in one vector (R + 1,), and the difference of two models is the difference of two vectors.

Legend: R resamples, N users, n rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lum_ray.evaluation.metrics import Floats, Ints, Terms, equal_mass_bins

Weights = NDArray[np.uint8]
# Resamples are worked on in blocks of about this many numbers: large enough to hide Python, small enough for the cache.
_BLOCK = 1 << 19


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % interval, in the unit of the value."""

    value: float
    low: float
    high: float


def user_weights(users: int, resamples: int = 200, seed: int = 0) -> Weights:
    """(R + 1, N) weights; row 0 is all ones, the others are Poisson(1) draws of a generator seeded by `seed`."""
    random = np.random.default_rng(seed)
    weights = np.ones((resamples + 1, users), dtype=np.uint8)
    for row in range(1, resamples + 1):
        weights[row] = random.poisson(1.0, users)
    return weights


def ratio_resamples(terms: Terms, user: Ints, weights: Weights) -> Floats:
    """(R + 1,) of a metric that is a ratio of two sums over rows; user (n,) indexes the columns of weights."""
    users = weights.shape[1]
    sums: Floats = np.stack([np.bincount(user, part, users) for part in terms], axis=1).astype(np.float64)
    totals = _weighted(weights, sums)
    return _divide(totals[:, 0], totals[:, 1])


def auc_resamples(y: Floats, score: Floats, user: Ints, weights: Weights) -> Floats:
    """(R + 1,) of the AUC with weighted users, ties by mid-ranks.

    Scores are sorted once; a resample is then a gather and a cumulative sum over the negatives (0.1 s for 200
    resamples of 100,000 rows). NaN where one class has no weight.
    """
    positive = y > 0.5
    negative_order = np.argsort(score[~positive], kind="stable")
    negative_user = user[~positive][negative_order]
    negative_scores = score[~positive][negative_order]
    positive_order = np.argsort(score[positive], kind="stable")
    positive_user = user[positive][positive_order]
    positive_scores = score[positive][positive_order]
    at_least = np.searchsorted(negative_scores, positive_scores, side="left")
    at_most = np.searchsorted(negative_scores, positive_scores, side="right")
    result = np.full(len(weights), np.nan)
    if len(negative_scores) == 0 or len(positive_scores) == 0:
        return result
    block = max(1, _BLOCK // len(y))
    for start in range(0, len(weights), block):
        chosen = weights[start : start + block]
        # Whole numbers of one type throughout: a cumulative sum that converts as it goes takes three times as long.
        below = np.zeros((len(chosen), len(negative_scores) + 1), dtype=np.int32)
        np.cumsum(chosen.take(negative_user, axis=1).astype(np.int32), axis=1, out=below[:, 1:])
        weight = chosen.take(positive_user, axis=1).astype(np.float64)
        ranks = below.take(at_least, axis=1)
        ranks += below.take(at_most, axis=1)
        above = np.einsum("rp,rp->r", weight, ranks) / 2
        result[start : start + block] = _divide(above, weight.sum(axis=1) * below[:, -1])
    return result


def grouped_auc_resamples(y: Floats, score: Floats, group: Ints, user: Ints, weights: Weights) -> dict[int, Floats]:
    """The AUC of each group of rows (a day offset; a cut and a day offset), (R + 1,) each; of no rows there is none."""
    if len(group) == 0:
        return {}
    order = np.argsort(group, kind="stable")
    names, starts = np.unique(group[order], return_index=True)
    slices = np.split(order, starts[1:])
    return {int(g): auc_resamples(y[i], score[i], user[i], weights) for g, i in zip(names, slices, strict=True)}


def mean_defined(parts: list[Floats]) -> Floats:
    """Average of vectors of resamples over the groups that have both classes at all.

    A group that loses a class in one resample alone is left out of that resample's mean.
    """
    kept = [part for part in parts if not np.isnan(part[0])]
    if not kept:
        return np.full(len(parts[0]) if parts else 1, np.nan)
    stacked = np.stack(kept)
    known = ~np.isnan(stacked)
    return _divide(np.where(known, stacked, 0.0).sum(axis=0), known.sum(axis=0).astype(np.float64))


def ece_resamples(y: Floats, p: Floats, user: Ints, weights: Weights, bins: int = 10) -> Floats:
    """(R + 1,) of the expected calibration error; the bins are those of the whole sample."""
    users = weights.shape[1]
    place = user * bins + equal_mass_bins(p, bins)
    gaps: Floats = np.bincount(place, p - y, users * bins).reshape(users, bins).astype(np.float64)
    rows = np.bincount(user, minlength=users).astype(np.float64)
    return _divide(np.abs(_weighted(weights, gaps)).sum(axis=1), _weighted(weights, rows[:, None])[:, 0])


def interval(resamples: Floats, reflected: bool = False) -> Interval:
    """Point estimate and percentile interval (2.5 % to 97.5 %) of a vector whose entry 0 is the estimate.

    reflected: for a statistic that resampling biases upwards (the calibration error: noise adds to every |gap|) the
    percentiles are mirrored at the estimate and cut off at 0; else the interval would not hold its own estimate.
    """
    value = float(resamples[0])
    drawn = resamples[1:][~np.isnan(resamples[1:])]
    if np.isnan(value) or len(drawn) == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    if reflected:
        low, high = min(value, max(0.0, 2 * value - high)), max(value, 2 * value - low)
    return Interval(value, low, high)


def _weighted(weights: Weights, sums: Floats) -> Floats:
    result = np.empty((len(weights), sums.shape[1]))
    block = max(1, _BLOCK // max(1, weights.shape[1]))
    for start in range(0, len(weights), block):
        result[start : start + block] = weights[start : start + block].astype(np.float64) @ sums
    return result


def _divide(above: Floats, below: Floats) -> Floats:
    result: Floats = np.divide(above, below, out=np.full(len(above), np.nan), where=below != 0)
    return result
