"""What the baselines know of a user's history: sums and counts over windows that end before the cut.

Rows are sparse, so every window is the difference of two cumulative sums, found by binary search: no loop over users,
no dense days.

Legend: S samples, F future days, U behaviours, C = U + derived targets, H horizon targets, N users, A active days.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lum_ray.data.rows import Rows, Samples
from lum_ray.evaluation.metrics import Floats, Ints

LONGEST_DAYS = 365  # recency and tenure beyond a year are one value


@dataclass(frozen=True)
class Cuts:
    """Samples of some users with their targets in stored units, as `lum_ray.data.windows.targets` gives them."""

    rows: Rows
    samples: Samples
    daily: Floats  # (S, F, C), NaN where not observed
    over: Floats  # (S, H)


def observed_days(cuts: Cuts, days: int) -> Ints:
    """(S,) days of [cut - days, cut) on which the user existed."""
    cut = cuts.samples.cut.astype(np.int64)
    return np.asarray(np.clip(cut - cuts.rows.first_day[cuts.samples.row], 0, days))


def window_sums(cuts: Cuts, days: int) -> Floats:
    """(S, U) sums of the stored values over [cut - days, cut), from the user's first day on."""
    rows, samples = cuts.rows, cuts.samples
    begin, end = rows.span(samples.row, np.maximum(samples.cut - days, rows.first_day[samples.row]), samples.cut)
    totals = _running(rows.values)
    return (totals[end] - totals[begin]).astype(np.float64)


def weekday_sums(cuts: Cuts, weeks: int) -> tuple[Floats, Ints]:
    """Per weekday (day number mod 7) of [cut - 7 * weeks, cut): sums (S, 7, U) and observed days (S, 7)."""
    rows, samples = cuts.rows, cuts.samples
    weekday = rows.days.astype(np.int64) % 7
    owner = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
    key = ((owner * 7 + weekday) << 32) + rows.days.astype(np.int64) + (1 << 31)
    order = np.argsort(key)
    key, totals = key[order], _running(rows.values[order])
    stop = samples.cut.astype(np.int64)
    start = np.maximum(stop - 7 * weeks, np.minimum(rows.first_day[samples.row], stop))
    sums, seen = [], []
    for w in range(7):
        base = ((samples.row * 7 + w) << 32) + (1 << 31)
        begin, end = np.searchsorted(key, base + start), np.searchsorted(key, base + stop)
        sums.append((totals[end] - totals[begin]).astype(np.float64))
        seen.append((stop - 1 - w) // 7 - (start - 1 - w) // 7)
    return np.stack(sums, axis=1), np.stack(seen, axis=1)


def recency_days(cuts: Cuts) -> Ints:
    """(S,) days since the last active day before the cut, 1 for the day before; LONGEST_DAYS where there is none."""
    begin, end = cuts.rows.span(cuts.samples.row, cuts.samples.cut - LONGEST_DAYS, cuts.samples.cut)
    if len(cuts.rows.days) == 0:
        return np.full(len(cuts.samples), LONGEST_DAYS, dtype=np.int64)
    last = cuts.samples.cut.astype(np.int64) - cuts.rows.days[np.maximum(end - 1, 0)]
    return np.asarray(np.where(end > begin, last, LONGEST_DAYS))


def _running(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros((1, values.shape[1]), dtype=np.int64), np.cumsum(values, axis=0)])


def features(cuts: Cuts) -> Floats:
    """(S, 2 + 3 (1 + U)): recency, tenure, and per 7, 28, 84 days the share of active days and each behaviour's daily
    mean.
    """
    rows, samples = cuts.rows, cuts.samples
    parts = [np.log1p(recency_days(cuts)), np.log1p(observed_days(cuts, LONGEST_DAYS))]
    for days in (7, 28, 84):
        seen = np.maximum(observed_days(cuts, days), 1)
        begin, end = rows.span(samples.row, samples.cut - days, samples.cut)
        parts.append((end - begin) / seen)
        parts.extend(np.log1p(np.maximum(window_sums(cuts, days) / seen[:, None], 0)).T)
    return np.stack(parts, axis=1)


def design(static: Floats, cuts: Cuts, sample: Ints, offset: Ints) -> Floats:
    """One row per (sample, day offset): the sample's features, the target day's weekday as one-hot, the offset."""
    weekday = (cuts.samples.cut[sample].astype(np.int64) + offset) % 7
    return np.concatenate([static[sample], np.eye(7)[weekday], offset[:, None]], axis=1)
