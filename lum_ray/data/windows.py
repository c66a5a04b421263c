"""Point-in-time cuts: the only place that compares times with a cut.

A cut is a day number c, the first instant of day c in the run's time zone: what has day < c is visible, the first
predicted day is c. Shapes: S samples, F future days, U behaviours, D derived targets, H horizon targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lum_ray.data.rows import Int32, Int64, Rows, Samples, expand, mix, share

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
UNKNOWN_AHEAD = np.iinfo(np.int32).min
"""`known_at` of a calendar row that was always known."""
KNOWN_AT = "known_at"
"""The column of `Rows.profile` with the day on which the others became known, NaN: always. Not a number of a user."""


def visible(known_at: npt.ArrayLike, cut: npt.ArrayLike) -> Bool:
    """Whether what became known on day `known_at` may be used for a prediction at `cut`: strictly before it."""
    return np.asarray(np.less(known_at, cut))


def profile_at(rows: Rows, row: npt.NDArray[np.integer], cut: npt.ArrayLike) -> dict[str, npt.NDArray[np.generic]]:
    """The profiles' columns of samples (rows `row` (S,) at cuts (S,) or one), missing where not known at the cut."""
    columns = {name: column[row] for name, column in rows.profile.items() if name != KNOWN_AT}
    if KNOWN_AT in rows.profile:
        known_at = np.nan_to_num(rows.profile[KNOWN_AT][row].astype(np.float64), nan=UNKNOWN_AHEAD)
        hidden = ~visible(known_at, cut)
        for column in columns.values():
            column[hidden] = np.nan if np.issubdtype(column.dtype, np.number) else None
    return columns


def came_before(rows: Rows, day: int) -> Int64:
    """The rows (M,) of the users with an event before `day`: that others come later is not known by then."""
    there = np.diff(rows.offsets) > 0
    first = np.full(len(rows), day, np.int64)
    first[there] = rows.days[rows.offsets[:-1][there]]
    return np.flatnonzero(visible(first, day)).astype(np.int64)


def history(rows: Rows, samples: Samples, history_days: int) -> tuple[Int64, Int64, Int64]:
    """The active days of each sample's window [cut - history_days, cut).

    Returns (sample (A,), position in the window 0..history_days-1 (A,), index into `rows.days` (A,)).
    """
    begin, end = rows.span(samples.row, samples.cut - history_days, samples.cut)
    sample, index = expand(begin, end)
    return sample, (rows.days[index] - samples.cut[sample] + history_days).astype(np.int64), index


@dataclass(frozen=True)
class DerivedTarget:
    """`churned`: `behaviour` is 0 on the day and the `days - 1` after; `reactivated`: 1 after `days` of 0."""

    name: str
    form: Literal["churned", "reactivated"]
    behaviour: int
    days: int


@dataclass(frozen=True)
class HorizonTarget:
    """`any` or `sum` of column `behaviour` over [cut, cut + days)."""

    name: str
    over: Literal["any", "sum"]
    behaviour: int
    days: int


def targets(
    rows: Rows,
    samples: Samples,
    future_days: int,
    until_day: int,
    derived: Sequence[DerivedTarget] = (),
    horizons: Sequence[HorizonTarget] = (),
) -> tuple[Float64, Float64]:
    """Daily targets (S, F, U + D) and horizon targets (S, H), in stored units; NaN where not observed.

    A target is observed when every day that it looks at lies before min(`until_day`, the user's end): in training
    `until_day` is the first validation day, so that no label reads past it.
    """
    width = rows.values.shape[1]
    until = np.minimum(rows.end_day[samples.row], until_day).astype(np.int64)
    ahead = max(
        [future_days, *(future_days - 1 + d.days for d in derived if d.form == "churned"), *(h.days for h in horizons)]
    )
    behind = max([0, *(d.days for d in derived if d.form == "reactivated")])
    begin, end = rows.span(samples.row, samples.cut - behind, samples.cut + ahead)
    sample, index = expand(begin, end)
    dense = np.zeros((len(samples), behind + ahead, width))
    dense[sample, rows.days[index] - samples.cut[sample] + behind] = rows.values[index]
    day = samples.cut[:, None].astype(np.int64) + np.arange(future_days)

    daily = np.full((len(samples), future_days, width + len(derived)), np.nan)
    daily[:, :, :width] = np.where((day < until[:, None])[:, :, None], dense[:, behind : behind + future_days], np.nan)
    for column, target in enumerate(derived, start=width):
        sums = np.concatenate(
            [np.zeros((len(samples), 1)), np.cumsum(dense[:, :, target.behaviour] > 0, axis=1)], axis=1
        )
        at = np.arange(future_days) + behind
        if target.form == "churned":
            value = (sums[:, at + target.days] - sums[:, at]) == 0
            observed = day + target.days <= until[:, None]
        else:
            value = (dense[:, at, target.behaviour] > 0) & (sums[:, at] - sums[:, at - target.days] == 0)
            observed = (day < until[:, None]) & (
                day - target.days >= rows.first_day[samples.row].astype(np.int64)[:, None]
            )
        daily[:, :, column] = np.where(observed, value, np.nan)

    over = np.full((len(samples), len(horizons)), np.nan)
    for column, horizon in enumerate(horizons):
        window = dense[:, behind : behind + horizon.days, horizon.behaviour]
        value = (window > 0).any(axis=1) if horizon.over == "any" else window.sum(axis=1)
        over[:, column] = np.where(samples.cut + horizon.days <= until, value, np.nan)
    return daily, over


@dataclass(frozen=True)
class CutPlan:
    """Which cuts may be taken of which users: days [from_day, until_day] every `every_days`, users of `segments`
    (empty: all) whose hash share lies in [low, high), whose first day is more than `min_history_days` before the cut,
    and with at least one observed day after it. Users inside one of `excluded` (plans) are left out.
    """

    from_day: int
    until_day: int
    every_days: int
    min_history_days: int
    segment_column: str | None = None
    segments: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    excluded: tuple[CutPlan, ...] = ()

    def users(self, rows: Rows) -> Bool:
        """Which rows belong to this plan (N,)."""
        place = share(mix(rows.user_hash, SPLIT_SALT))
        inside = (place >= self.low) & (place < self.high)
        if self.segments and self.segment_column:
            inside &= np.isin(rows.profile[self.segment_column].astype(str), self.segments)
        for other in self.excluded:
            inside &= ~other.users(rows)
        return np.asarray(inside)

    def ranges(self, rows: Rows) -> tuple[Int64, Int64]:
        """For each row: its first allowed cut and how many there are (0 for rows outside), two arrays (N,)."""
        earliest = np.maximum(self.from_day, rows.first_day.astype(np.int64) + self.min_history_days + 1)
        steps = -((self.from_day - earliest) // self.every_days)
        first = self.from_day + steps * self.every_days
        last = np.minimum(self.until_day, rows.end_day.astype(np.int64) - 1)
        count = np.where(self.users(rows), np.maximum(0, (last - first) // self.every_days + 1), 0)
        return first, count

    def every(self, rows: Rows) -> Samples:
        """All allowed (row, cut) pairs, by row, then by cut."""
        first, count = self.ranges(rows)
        row, index = expand(np.zeros(len(rows), np.int64), count)
        cut = first[row] + index * self.every_days
        return Samples(row, cut.astype(np.int32), np.zeros(len(row), np.int32))

    def draw(self, rows: Rows, seed: int, epoch: npt.ArrayLike, draws: int) -> Samples:
        """`draws` cuts of each row that has any, by hash(seed, epoch, user, draw); `epoch` is one or one a row."""
        first, count = self.ranges(rows)
        row = np.repeat(np.flatnonzero(count), draws)
        draw = np.tile(np.arange(draws), len(row) // max(draws, 1)).astype(np.int32)
        epochs = np.broadcast_to(np.asarray(epoch, np.int64), (len(rows),))
        picked = mix(seed, epochs[row], rows.user_hash[row], draw) % count[row].astype(np.uint64)
        cut = first[row] + picked.astype(np.int64) * self.every_days
        return Samples(row.astype(np.int64), cut.astype(np.int32), draw)


SPLIT_SALT = 20_111
"""Keeps the user split independent of the bucket and of the draws, which use the same hash of the user."""


def first_days(registered: Int32 | None, first_event: Int32, start_day: int) -> Int32:
    """max(registration if given, else first event; start of the data), per user."""
    return np.maximum(first_event if registered is None else registered, start_day).astype(np.int32)
