"""Features made by hand, as a careful analyst would for gradient boosting: the peer's side of the contest.

Everything is read from the days before the cut (`history`), the calendar as it was known at the cut (`Ahead`) and the
profile. The history is densified for some samples at a time, newest day first, so that a window is a slice and "the
same weekday" is every seventh column.

Legend: S samples, L days before the cut, U behaviours, T event types, X future days, E distinct event rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lum_ray.data.rows import Rows, Samples
from lum_ray.data.windows import KNOWN_AT, history, profile_at
from lum_ray.evaluation.metrics import Floats, Ints

Float32 = NDArray[np.float32]

LENGTH = 364
"""Days before the cut that features look at: 52 whole weeks."""
WINDOWS = (3, 7, 14, 28, 56, 84, 168, LENGTH)
HALF_LIVES = (3.0, 7.0, 14.0, 28.0, 56.0, 112.0)
WEEKS = (4, 8, 26, 52)
GAPS = 10
LONGEST_TENURE = 180
"""Tenure beyond it is one value: later cuts have longer ones than any training cut, and trees do not extrapolate."""
CHUNK = 4096


@dataclass(frozen=True)
class Ahead:
    """The calendar as it was known at each sample's cut: distinct days, and which of them each day is."""

    types: tuple[str, ...]
    counts_ET: Float32  # how many events of each type
    values_ET: Float32  # their values, summed, on a scale of their own
    past_SL: NDArray[np.int32]  # newest day first
    future_SX: NDArray[np.int32]

    def take(self, index: Ints) -> Ahead:
        """The samples at `index`."""
        return Ahead(self.types, self.counts_ET, self.values_ET, self.past_SL[index], self.future_SX[index])


@dataclass(frozen=True)
class Sheet:
    """A table of features: `columns` (S, C) named `names`; `categories` are the names of coded columns."""

    names: tuple[str, ...]
    columns: Float32
    categories: tuple[str, ...] = ()

    def beside(self, *others: Sheet) -> Sheet:
        """This table with the columns of others after its own."""
        every = (self, *others)
        return Sheet(
            tuple(name for sheet in every for name in sheet.names),
            np.concatenate([sheet.columns for sheet in every], axis=1),
            tuple(name for sheet in every for name in sheet.categories),
        )


def dense(rows: Rows, samples: Samples, days: int = LENGTH) -> tuple[Float32, Float32]:
    """(values (S, L, U) as stored, there (S, L)): column 0 is the day before the cut; `there` is 1 where the user
    existed."""
    sample, place, index = history(rows, samples, days)
    values = np.zeros((len(samples), days, rows.values.shape[1]), np.float32)
    values[sample, days - 1 - place] = rows.values[index]
    age = (samples.cut - rows.first_day[samples.row]).astype(np.int64)
    there = (np.arange(days) < age[:, None]).astype(np.float32)
    return values * there[..., None], there


def chunks(samples: Samples, size: int = CHUNK) -> Iterator[tuple[Ints, Samples]]:
    """The samples in pieces that fit in memory once they are dense, with their places."""
    for start in range(0, max(len(samples), 1), size):  # one piece without samples has the columns too
        index = np.arange(start, min(start + size, len(samples)))
        yield index, Samples(samples.row[index], samples.cut[index], samples.draw[index])


def general(rows: Rows, samples: Samples, names: tuple[str, ...], gates: tuple[int | None, ...]) -> Sheet:
    """What is known of every behaviour: means over windows, decaying means, values given an open gate, the last ones,
    and tenure. `gates`: the column of each behaviour's gate."""
    parts = [_general(rows, some, names, gates) for _, some in chunks(samples)]
    return Sheet(parts[0].names, np.concatenate([part.columns for part in parts]))


def _general(rows: Rows, samples: Samples, names: tuple[str, ...], gates: tuple[int | None, ...]) -> Sheet:
    values_SLU, there_SL = dense(rows, samples)
    columns: list[Float32] = []
    titles: list[str] = []

    def add(title: str, column: NDArray[np.floating]) -> None:
        titles.append(title)
        columns.append(column.astype(np.float32))

    age = (samples.cut - rows.first_day[samples.row]).astype(np.float32)
    add("tenure", np.minimum(age, LONGEST_TENURE))
    sums_SLU, seen_SL = values_SLU.cumsum(axis=1, dtype=np.float64), there_SL.cumsum(axis=1)
    opened_SLU = (values_SLU > 0).cumsum(axis=1)
    for days in WINDOWS:
        seen = np.maximum(seen_SL[:, days - 1], 1)
        for u, name in enumerate(names):
            add(f"{name}/mean_{days}", sums_SLU[:, days - 1, u] / seen)
    for u, name in enumerate(names):
        gate = gates[u]
        if gate is None:
            continue
        for days in (28, 84, LENGTH):
            open_days = opened_SLU[:, days - 1, gate]
            add(f"{name}/given_open_{days}", _ratio(sums_SLU[:, days - 1, u], open_days))
        add(f"{name}/most_84", values_SLU[:, :84, u].max(axis=1))
        squares = (values_SLU[:, :, u].astype(np.float64) ** 2).sum(axis=1)
        opened, mean = opened_SLU[:, -1, gate], _ratio(sums_SLU[:, -1, u], opened_SLU[:, -1, gate])
        add(f"{name}/deviation", np.sqrt(np.maximum(_ratio(squares, opened) - mean**2, 0)))
        place = positions(values_SLU[:, :, gate] > 0, 3)
        for k in range(3):
            at = np.minimum(place[:, k], LENGTH - 1).astype(np.int64)
            last = values_SLU[np.arange(len(at)), at, u]
            add(f"{name}/last_{k + 1}", np.where(place[:, k] < LENGTH, last, np.nan))
    for life in HALF_LIVES:
        weight_L = np.exp2(-np.arange(LENGTH, dtype=np.float32) / life)
        below = np.maximum(there_SL @ weight_L, 1e-6)
        mixed = np.einsum("slu,l->su", values_SLU, weight_L, optimize=True) / below[:, None]
        for u, name in enumerate(names):
            add(f"{name}/decay_{life:g}", mixed[:, u])
    return Sheet(tuple(titles), np.stack(columns, axis=1))


def vocabulary(rows: Rows) -> dict[str, tuple[str, ...]]:
    """The values of each category of the profile, sorted; a number's entry is empty."""
    return {
        name: ()
        if np.issubdtype(column.dtype, np.number)
        else tuple(sorted({str(value) for value in column if value is not None}))
        for name, column in rows.profile.items()
        if name != KNOWN_AT
    }


def profile(rows: Rows, samples: Samples, known: Mapping[str, tuple[str, ...]]) -> Sheet:
    """The profile's columns that are `known` (see `vocabulary`): numbers with NaN where missing, categories as places
    in their vocabulary, -1 where missing or unknown."""
    columns, profiles = [], profile_at(rows, samples.row, samples.cut)
    for name, values in known.items():
        found = profiles[name]
        if not np.issubdtype(found.dtype, np.number):
            place = {value: index for index, value in enumerate(values)}
            found = np.array([-1 if value is None else place.get(str(value), -1) for value in found], np.float32)
        columns.append(found.astype(np.float32))
    table = np.stack(columns, axis=1) if columns else np.zeros((len(samples), 0), np.float32)
    return Sheet(tuple(known), table, tuple(name for name, values in known.items() if values))


def focus(rows: Rows, samples: Samples, ahead: Ahead, column: int, name: str) -> Sheet:
    """What is known of one behaviour's yes and no: recency, gaps and the own hazard, each day of two weeks, counts by
    week, rates by weekday, and rates on days with an event of each type."""
    parts = []
    for index, some in chunks(samples):
        values_SLU, there_SL = dense(rows, some)
        parts.append(_focus(values_SLU[:, :, column] > 0, there_SL, ahead.take(index), name))
    return Sheet(parts[0].names, np.concatenate([part.columns for part in parts]))


def _focus(yes_SL: NDArray[np.bool_], there_SL: Float32, ahead: Ahead, name: str) -> Sheet:
    found: dict[str, NDArray[np.floating]] = {}
    place = positions(yes_SL, GAPS + 1)
    recency = place[:, 0]
    found["recency"] = recency
    gaps = np.diff(place, axis=1)
    gaps = np.where(place[:, 1:] < LENGTH, gaps, np.nan)
    known = ~np.isnan(gaps)
    count = known.sum(axis=1)
    total = np.where(known, gaps, 0).sum(axis=1)
    mean = _ratio(total, count)
    found["gap_mean"] = mean
    found["gap_deviation"] = np.sqrt(
        np.maximum(_ratio(np.where(known, gaps, 0) ** 2 @ np.ones(GAPS), count) - mean**2, 0)
    )
    found["gap_longest"] = np.where(count > 0, np.where(known, gaps, 0).max(axis=1), np.nan)
    for k in range(4):
        found[f"gap_{k + 1}"] = gaps[:, k]
    found["recency_over_gap"] = _ratio(recency + 1, mean)
    outlived = known & (gaps > recency[:, None])
    within = outlived & (gaps <= recency[:, None] + 7)
    found["gaps_longer"] = _ratio(outlived.sum(axis=1), count)
    found["own_hazard"] = (within.sum(axis=1) + 0.5) / (outlived.sum(axis=1) + 1.0)
    yes = yes_SL.astype(np.float32)
    for day in range(14):
        found[f"day_{day + 1}"] = yes[:, day]
    weekly = yes.reshape(len(yes), LENGTH // 7, 7)
    observed = there_SL.reshape(len(yes), LENGTH // 7, 7)
    for week in range(8):
        found[f"week_{week + 1}"] = weekly[:, week].sum(axis=1)
    active_weeks = (weekly.max(axis=2) > 0).astype(np.float32)
    weeks_seen = observed.max(axis=2)
    for weeks in WEEKS:
        found[f"weeks_{weeks}"] = active_weeks[:, :weeks].sum(axis=1) / np.maximum(weeks_seen[:, :weeks].sum(axis=1), 1)
    rate = (yes.sum(axis=1) + 0.1) / (there_SL.sum(axis=1) + 1)
    for weeks in WEEKS:
        some, seen = weekly[:, :weeks].sum(axis=1), observed[:, :weeks].sum(axis=1)
        for ahead_days in range(7):
            j = 6 - ahead_days  # the day before the cut is column 0: columns j, j + 7, .. are that weekday
            found[f"weekday_{weeks}/{ahead_days}"] = (some[:, j] + 2 * rate) / (seen[:, j] + 2)
    for ahead_days in range(7):
        for k in range(3):
            found[f"weekday_back_{k + 1}/{ahead_days}"] = weekly[:, k, 6 - ahead_days]
    for t, kind in enumerate(ahead.types):
        there = (ahead.counts_ET[:, t] > 0)[ahead.past_SL] * there_SL
        found[f"during_{kind}"] = ((yes * there).sum(axis=1) + 5 * rate) / (there.sum(axis=1) + 5)
        found[f"days_of_{kind}"] = there.sum(axis=1)
    return Sheet(tuple(f"{name}/{title}" for title in found), np.stack([*found.values()], axis=1).astype(np.float32))


def coming(ahead: Ahead, cut: Ints, first: int, days: int) -> Sheet:
    """The calendar of the `days` days from `first` days after the cut on: the first one's weekday, per event type how
    many and what value over the days, the value on the first one's neighbours, and how long since the last and until
    the next."""
    found: dict[str, NDArray[np.floating]] = {"weekday": ((cut + first + 3) % 7).astype(np.float32)}
    counts = ahead.counts_ET[ahead.future_SX]
    values = ahead.values_ET[ahead.future_SX]
    past = ahead.counts_ET > 0
    for t, kind in enumerate(ahead.types):
        found[f"{kind}/count"] = counts[:, first : first + days, t].sum(axis=1)
        found[f"{kind}/value"] = values[:, first : first + days, t].sum(axis=1)
        found[f"{kind}/value_most"] = values[:, first : first + days, t].max(axis=1)
        for near in (-1, 1, 2):
            if 0 <= first + near < counts.shape[1]:
                found[f"{kind}/near_{near}"] = values[:, first + near, t]
        later = np.where(counts[:, first:, t] > 0, np.arange(counts.shape[1] - first), np.inf).min(axis=1)
        found[f"{kind}/until"] = np.where(np.isinf(later), np.nan, later)
        back = positions(past[:, t][ahead.past_SL], 1)[:, 0]
        before = np.where(counts[:, :first, t] > 0, -np.arange(first), np.inf).min(axis=1, initial=np.inf)
        since = np.where(np.isinf(before), np.where(back < LENGTH, back + 1, np.nan), before) + first
        found[f"{kind}/since"] = since
        found[f"{kind}/share_28"] = past[:, t][ahead.past_SL[:, :28]].mean(axis=1)
    return Sheet(tuple(f"coming/{title}" for title in found), np.stack([*found.values()], axis=1).astype(np.float32))


def positions(yes_SL: NDArray[np.bool_], count: int) -> Floats:
    """(S, count) columns of the first `count` True of each row, the row's length where there are fewer."""
    length = yes_SL.shape[1]
    row, column = np.nonzero(yes_SL)
    rank = np.arange(len(row)) - np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(yes_SL)))])[row]
    result = np.full((len(yes_SL), count), float(length))
    kept = rank < count
    result[row[kept], rank[kept]] = column[kept]
    return result


def _ratio(above: NDArray[np.number], below: NDArray[np.number]) -> Floats:
    """NaN where there is nothing below: trees take a missing value as one of its own."""
    return np.asarray(np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0))
