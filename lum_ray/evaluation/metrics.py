"""Pure metric functions over numpy arrays, and the day-wise averages built from them.

Choices that are not obvious:
* Ties in a score count half (mid-ranks), so a constant score has an AUC of exactly 0.5.
* Every metric except the AUC and the calibration error is a ratio of two sums over rows. Such a metric is given by its
  `*_terms` (numerator and denominator per row), so that the bootstrap can resample users by a matrix product.
* A metric is decided by the functional that it is fed (FIELD.md, section 3): on the same log-normal the MAPE of the
  mean is 2.09, of the median 1.50, of exp(mu - sigma^2) 0.95. So each metric names its functional below, for every
  model alike: wMAPE and total bias take the mean, MAE the median, MAPE the median (`eval/mape`) and, as a row of its
  own, the forecast with the least expected percentage error (`eval/mape_least`): the model's own, else the point that
  minimises it under a log-normal of the model's mean and median.

Legend: n rows; y outcome (raw unit; 0 or 1 for binary tasks); p a probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Terms = tuple[Floats, Floats]


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def ratio(terms: Terms) -> float:
    """Sum of the numerators over the sum of the denominators; NaN where the denominators sum to 0."""
    below = float(terms[1].sum())
    return float(terms[0].sum()) / below if below != 0 else float("nan")


def roc_auc(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Area under the ROC curve, ties by mid-ranks, optionally weighted.

    Args: y (n,) 0 or 1; score (n,); weight (n,) not negative, 1 each if None.
    Returns NaN where only one class has weight, or where a score is NaN (an unfit model must not look like chance).
    """
    y_n, score_n = _floats(y), _floats(score)
    weight_n = np.ones(len(y_n)) if weight is None else _floats(weight)
    if np.isnan(score_n).any():
        return float("nan")
    positive = y_n > 0.5
    order = np.argsort(score_n[~positive], kind="stable")
    negative_scores = score_n[~positive][order]
    below = np.concatenate([[0.0], np.cumsum(weight_n[~positive][order])])
    at_least = below[np.searchsorted(negative_scores, score_n[positive], side="left")]
    at_most = below[np.searchsorted(negative_scores, score_n[positive], side="right")]
    pairs = float(weight_n[positive].sum() * below[-1])
    return float(weight_n[positive] @ (at_least + at_most)) / 2 / pairs if pairs > 0 else float("nan")


def auc_by_day(y: ArrayLike, score: ArrayLike, day_offset: ArrayLike) -> dict[int, float]:
    """AUC of each day offset (day - cut_day, 0 is the first predicted day), all cuts of an offset pooled."""
    y_n, score_n, offset_n = _floats(y), _floats(score), np.asarray(day_offset, dtype=np.int64)
    return {int(d): roc_auc(y_n[offset_n == d], score_n[offset_n == d]) for d in np.unique(offset_n)}


def mean_daily_auc(y: ArrayLike, score: ArrayLike, day_offset: ArrayLike) -> float:
    """The AUC of each day offset, averaged over the offsets that hold both classes; NaN where none does.

    Pass (cut, offset) group numbers in place of offsets for the average over single calendar days of single cuts.
    """
    found = [auc for auc in auc_by_day(y, score, day_offset).values() if not np.isnan(auc)]
    return float(np.mean(found)) if found else float("nan")


def mae_terms(y: ArrayLike, median: ArrayLike) -> Terms:
    """Mean absolute error in the unit of y; the median minimises it."""
    y_n = _floats(y)
    return np.abs(y_n - _floats(median)), np.ones(len(y_n))


def mape_terms(y: ArrayLike, point: ArrayLike) -> Terms:
    """Mean absolute percentage error over the rows with y != 0 (undefined elsewhere), as a share, not in percent.

    Fed the median as `eval/mape` and the least-MAPE forecast as `eval/mape_least`.
    """
    y_n = _floats(y)
    counted = y_n != 0
    divisor = np.where(counted, np.abs(y_n), 1.0)
    return np.where(counted, np.abs(y_n - _floats(point)) / divisor, 0.0), counted.astype(np.float64)


def wmape_terms(y: ArrayLike, mean: ArrayLike) -> Terms:
    """Sum of absolute errors over the sum of |y|, over all rows, zero days too; fed the unconditional mean."""
    y_n = _floats(y)
    return np.abs(y_n - _floats(mean)), np.abs(y_n)


def bias_terms(y: ArrayLike, mean: ArrayLike) -> Terms:
    """Total bias: sum(prediction) / sum(y) - 1; fed the mean (or p)."""
    y_n = _floats(y)
    return _floats(mean) - y_n, y_n


def brier_terms(y: ArrayLike, p: ArrayLike) -> Terms:
    """Mean squared error of a probability."""
    y_n = _floats(y)
    return (_floats(p) - y_n) ** 2, np.ones(len(y_n))


def coverage_terms(y: ArrayLike, low: ArrayLike, high: ArrayLike) -> Terms:
    """Share of outcomes inside [low, high], both ends included."""
    y_n = _floats(y)
    return ((_floats(low) <= y_n) & (y_n <= _floats(high))).astype(np.float64), np.ones(len(y_n))


def width_terms(low: ArrayLike, high: ArrayLike) -> Terms:
    """Mean width of the interval in the unit of y: coverage alone rewards intervals that say nothing."""
    low_n = _floats(low)
    return _floats(high) - low_n, np.ones(len(low_n))


def mae(y: ArrayLike, median: ArrayLike) -> float:
    """See `mae_terms`."""
    return ratio(mae_terms(y, median))


def mape(y: ArrayLike, point: ArrayLike) -> float:
    """See `mape_terms`."""
    return ratio(mape_terms(y, point))


def wmape(y: ArrayLike, mean: ArrayLike) -> float:
    """See `wmape_terms`."""
    return ratio(wmape_terms(y, mean))


def total_bias(y: ArrayLike, mean: ArrayLike) -> float:
    """See `bias_terms`."""
    return ratio(bias_terms(y, mean))


def brier(y: ArrayLike, p: ArrayLike) -> float:
    """See `brier_terms`."""
    return ratio(brier_terms(y, p))


def interval_coverage(y: ArrayLike, low: ArrayLike, high: ArrayLike) -> float:
    """See `coverage_terms`."""
    return ratio(coverage_terms(y, low, high))


def lognormal_point(conditional_mean: ArrayLike, median: ArrayLike) -> Floats:
    """The point that minimises MAPE if the value is log-normal: exp(mu - sigma^2), from its mean and its median.

    median = exp(mu) and mean = exp(mu + sigma^2 / 2), so exp(mu - sigma^2) = median * (median / mean)^2; never above
    the median. Rows without a positive mean give the median.
    """
    mean_n, median_n = _floats(conditional_mean), _floats(median)
    shrink = np.divide(median_n, mean_n, out=np.ones_like(mean_n), where=mean_n > 0)
    point_n: Floats = median_n * np.clip(shrink, 0.0, 1.0) ** 2
    return point_n


def equal_mass_bins(p: ArrayLike, bins: int = 10) -> Ints:
    """Bin number of each row, bins of (nearly) equal mass; rows of equal p always share a bin, so there may be
    fewer.
    """
    p_n = _floats(p)
    if len(p_n) == 0:
        return np.zeros(0, dtype=np.int64)
    last = (np.arange(1, bins) * len(p_n) + bins - 1) // bins - 1  # the last row of each bin but the highest
    edges = np.unique(np.sort(p_n)[np.maximum(last, 0)])
    return np.searchsorted(edges, p_n, side="left").astype(np.int64)


def ece(y: ArrayLike, p: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: |mean p - mean y| per bin of equal mass, averaged by mass."""
    y_n, p_n = _floats(y), _floats(p)
    if len(y_n) == 0:
        return float("nan")
    return float(np.abs(np.bincount(equal_mass_bins(p_n, bins), weights=p_n - y_n)).sum() / len(y_n))


@dataclass(frozen=True)
class Reliability:
    """The points of a reliability diagram: per bin the mean prediction, the observed share, and the rows."""

    task: str
    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    rows: tuple[int, ...]


def reliability(task: str, y: ArrayLike, p: ArrayLike, bins: int = 10) -> Reliability:
    """Points of the reliability diagram over bins of equal mass; rows with an unknown y (NaN) are left out."""
    known = ~np.isnan(_floats(y))
    y_n, p_n = _floats(y)[known], _floats(p)[known]
    if len(y_n) == 0:
        return Reliability(task, (), (), ())
    bin_n = equal_mass_bins(p_n, bins)
    count = np.bincount(bin_n)
    used = count > 0
    predicted = np.bincount(bin_n, weights=p_n)[used] / count[used]
    observed = np.bincount(bin_n, weights=y_n)[used] / count[used]
    return Reliability(task, tuple(predicted.tolist()), tuple(observed.tolist()), tuple(count[used].tolist()))


def hurdle(y: ArrayLike, gate: ArrayLike, p: ArrayLike, mean: ArrayLike, median: ArrayLike) -> dict[str, float]:
    """The three parts of a gated number: does the gate open, how much if it does, and the product.

    Args: y (n,) the value, 0 where the gate is shut; gate (n,) 0 or 1; p (n,) P(gate open); mean (n,) the unconditional
    E[value]; median (n,) the median of the value *given* an open gate.
    """
    y_n, open_n = _floats(y), _floats(gate) > 0.5
    mean_n, median_n = _floats(mean), _floats(median)
    return {
        "p_active_roc_auc": roc_auc(open_n, p),
        "p_active_brier": brier(open_n, p),
        "value_if_active_mae": mae(y_n[open_n], median_n[open_n]),
        "value_if_active_mape": mape(y_n[open_n], median_n[open_n]),
        "wmape": wmape(np.where(open_n, y_n, 0.0), mean_n),
    }
