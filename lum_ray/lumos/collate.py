"""From rows, samples and the calendar to the arrays of a batch.

The calendar is never expanded per user: each distinct event vector of a batch is built once (`event_rows_ES`) and days
point at it. Shapes: B windows, T history days, C cuts of a window, X future days, E distinct event rows, S event width,
R calendar rows, A active days.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.data.rows import Int32, Int64, Rows, Strings, UInt64, expand, hash_strings, mix
from lum_ray.data.windows import UNKNOWN_AHEAD, profile_at, visible

Float32 = npt.NDArray[np.float32]
SHUFFLE_SALT = 30_013


@dataclass(frozen=True)
class EventLayout:
    """What an event vector holds: weekday (7), season (2), the number of events of each type, their values by type."""

    types: tuple[str, ...]
    scales: tuple[float, ...]
    weekday: bool
    season: bool

    @property
    def rhythm_width(self) -> int:
        return 7 * self.weekday + 2 * self.season

    @property
    def width(self) -> int:
        return max(1, self.rhythm_width + 2 * len(self.types))

    def rhythm(self, days: Int64) -> Float32:
        """Vectors (len(days), width) without any event."""
        rows = np.zeros((len(days), self.width), np.float32)
        if self.weekday:
            rows[np.arange(len(days)), (days + 3) % 7] = 1.0  # 1970-01-01 was a Thursday: Monday comes first
        if self.season:
            angle = 2 * np.pi * (days % 365.2425) / 365.2425
            rows[:, 7 * self.weekday], rows[:, 7 * self.weekday + 1] = np.sin(angle), np.cos(angle)
        return rows


def shuffled(table: pa.Table) -> pa.Table:
    """`table` (rows of a calendar) with every row moved by whole weeks, round the end of its event type's time to the
    beginning: as many events of each type on the same weekdays, but at the wrong time.

    How far is a hash of the row's place alone, so that training and the test are told the same wrong days. Each row
    moves on its own, since from a calendar that moved as a whole the right days could be learned. A type that is there
    for less than two weeks stays.
    """
    start, end = (table[name].to_numpy().astype(np.int64) for name in ("start_day", "end_day"))
    kinds, kind = np.unique(table["event_type"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    drawn, shift = mix(SHUFFLE_SALT, np.arange(len(start))), np.zeros(len(start), np.int64)
    for rows in (np.flatnonzero(kind == number) for number in range(len(kinds))):
        first = start[rows].min()
        weeks = int(end[rows].max() - first) // 7 + 1
        if weeks > 1:
            move = 7 * (1 + drawn[rows] % np.uint64(weeks - 1)).astype(np.int64)
            shift[rows] = first + (start[rows] - first + move) % (7 * weeks) - start[rows]
    for name in ("start_day", "end_day", "known_at"):
        place = table.column_names.index(name)
        table = table.set_column(place, table.schema.field(name), pc.add(table[name], pa.array(shift, pa.int32())))
    return table


class Calendar:
    """The rows of a calendar, ready to be looked up by user, cut and day."""

    def __init__(self, table: pa.Table | None, layout: EventLayout) -> None:
        """`table`: scope, key, start_day, end_day (inclusive), event_type, value, known_at (null: the default)."""
        self.layout = layout
        position = {name: index for index, name in enumerate(layout.types)}
        columns = {name: table[name].to_pylist() for name in table.column_names} if table is not None else {}
        kept = [i for i, name in enumerate(columns.get("event_type", [])) if name in position]
        scope = np.array([columns["scope"][i] for i in kept], object)
        self.type = np.array([position[columns["event_type"][i]] for i in kept], np.int64)
        scales = np.array(layout.scales or (1.0,))
        value = np.array([1.0 if columns["value"][i] is None else columns["value"][i] for i in kept], np.float64)
        self.value = (value / scales[self.type]).astype(np.float32) if len(kept) else value.astype(np.float32)
        self.start = np.array([columns["start_day"][i] for i in kept], np.int64)
        self.end = np.array([columns["end_day"][i] for i in kept], np.int64)
        stated = [columns["known_at"][i] for i in kept]
        self.known_at = np.array(
            [
                known if known is not None else self.start[j] if scope[j] == "user" else UNKNOWN_AHEAD
                for j, known in enumerate(stated)
            ],
            np.int64,
        )
        # users and segments are compared by hash, with the scope mixed in so that equal names do not meet
        owner = np.zeros(len(kept), np.uint64)
        for name, salt in (("segment", 1), ("user", 2)):
            chosen = scope == name
            if chosen.any():
                keys = [columns["key"][kept[i]] for i in np.flatnonzero(chosen)]
                owner[chosen] = mix(salt, hash_strings([str(key) for key in keys]))
        always = (self.known_at == UNKNOWN_AHEAD) & (scope != "user")
        self.fixed = _Owned(owner, np.flatnonzero(always))
        self.dated = _Owned(owner, np.flatnonzero(~always))
        self._bases: dict[int, tuple[int, Float32]] = {}

    def _base(self, segment: int, first: int, last: int) -> tuple[int, Float32]:
        """(first day, vectors) of the always-known rows of a segment hash, covering [first, last]."""
        have = self._bases.get(segment)
        if have is not None and have[0] <= first and have[0] + len(have[1]) > last:
            return have
        if have is not None:
            first, last = min(first, have[0]), max(last, have[0] + len(have[1]) - 1)
        days = np.arange(first, last + 1, dtype=np.int64)
        vectors = self.layout.rhythm(days)
        owners = np.array([0, segment], np.uint64) if segment else np.zeros(1, np.uint64)
        _, rows = self.fixed.of(owners)
        which, day = expand(np.maximum(self.start[rows], first), np.minimum(self.end[rows], last) + 1)
        self._add(vectors, day - first, rows[which])
        self._bases[segment] = (first, vectors)
        return self._bases[segment]

    def _add(self, vectors: Float32, at: Int64, rows: Int64) -> None:
        column = self.layout.rhythm_width + self.type[rows]
        np.add.at(vectors, (at, column), np.float32(1.0))
        np.add.at(vectors, (at, column + len(self.layout.types)), self.value[rows])

    def look_up(self, user_hash: UInt64, segment: Strings, start: Int64, as_of: Int64) -> tuple[Float32, Int64]:
        """Event vectors of windows: `start` (M,) first days, `as_of` (M, L) the cut at which each day is looked at.

        Returns (event_rows_ES float32, index (M, L) into them).
        """
        count, length = as_of.shape
        if count == 0 or length == 0:
            return np.zeros((1, self.layout.width), np.float32), np.zeros((count, length), np.int64)
        first, last = int(start.min()), int(start.max()) + length - 1
        names, code = np.unique(segment.astype(str), return_inverse=True)
        hashes = np.where(names == "", np.uint64(0), mix(1, hash_strings([str(name) for name in names])))
        bases = [self._base(int(value), first, last) for value in hashes]
        starts = np.array([base[0] for base in bases], np.int64)
        lengths = np.array([len(base[1]) for base in bases], np.int64)
        shift = np.cumsum(lengths) - lengths
        ids = (shift - starts)[code][:, None] + start[:, None] + np.arange(length)
        used, index = np.unique(ids, return_inverse=True)
        table = np.concatenate([base[1] for base in bases])
        rows_ES, index_ML = table[used], index.reshape(count, length)

        owners = np.stack([np.zeros(count, np.uint64), hashes[code], mix(2, user_hash)], axis=1)
        distinct = (owners[:, 1:] != 0) & (owners[:, 1:] != owners[:, :-1])
        pair, rows = self.dated.of(
            owners.ravel(), np.concatenate([np.ones((count, 1), bool), distinct], axis=1).ravel()
        )
        window = pair // 3
        low = np.maximum(self.start[rows], start[window])
        which, day = expand(low, np.minimum(self.end[rows] + 1, start[window] + length))
        window, rows = window[which], rows[which]
        place = day - start[window]
        seen = visible(self.known_at[rows], as_of[window, place])
        window, rows, place = window[seen], rows[seen], place[seen]
        if len(rows) == 0:
            return rows_ES, index_ML
        cells, cell = np.unique(window * length + place, return_inverse=True)
        vectors = rows_ES[index_ML.ravel()[cells]]
        self._add(vectors, cell, rows)
        _, chosen, inverse = np.unique(_row_hash(vectors), return_index=True, return_inverse=True)
        index_ML.ravel()[cells] = len(rows_ES) + inverse
        return np.concatenate([rows_ES, vectors[chosen]]), index_ML


class _Owned:
    """Calendar rows by owner: 0 for everybody, a segment's hash, a user's hash."""

    def __init__(self, owner: UInt64, rows: Int64) -> None:
        order = np.argsort(owner[rows], kind="stable")
        self.rows, self.owner = rows[order], owner[rows][order]

    def of(self, owners: UInt64, wanted: npt.NDArray[np.bool_] | None = None) -> tuple[Int64, Int64]:
        """All (position in `owners`, calendar row) of the wanted owners."""
        begin = np.searchsorted(self.owner, owners).astype(np.int64)
        end = np.searchsorted(self.owner, owners, side="right").astype(np.int64)
        which, index = expand(begin, end if wanted is None else np.where(wanted, end, begin))
        return which, self.rows[index]


def _row_hash(vectors: Float32) -> UInt64:
    """A 64-bit hash of each row's bytes."""
    words = np.ascontiguousarray(vectors).view(np.uint32).astype(np.uint64)
    return mix(*words.T)


def as_of_days(cuts_BC: Int64, start: Int64, length: int) -> Int64:
    """For each day of a window the first cut after it (B, length): the earliest prediction that sees that day.

    With several cuts in a window an event that became known between two of them must stay hidden from the earlier one.
    """
    days = start[:, None] + np.arange(length)
    as_of = np.repeat(cuts_BC.max(axis=1)[:, None], length, axis=1)
    for column in np.argsort(-cuts_BC[0]):  # all windows have the same spacing, newest cut first
        cut = cuts_BC[:, column][:, None]
        as_of = np.where(days < cut, np.minimum(as_of, cut), as_of)
    return as_of


def profile_arrays(
    rows: Rows, index: Int64, cut: Int64, numbers: Sequence[str], categories: Sequence[tuple[str, tuple[str, ...]]]
) -> tuple[Float32, Int64]:
    """(numbers_BN float32 with NaN where missing, categories_BG int64 with 0 where missing or unknown) as known at the
    windows' cuts (B,)."""
    profile = profile_at(rows, index, cut)
    numbers_BN = np.full((len(index), len(numbers)), np.nan, np.float32)
    for column, name in enumerate(numbers):
        if name in profile:
            numbers_BN[:, column] = profile[name].astype(np.float64)
    categories_BG = np.zeros((len(index), len(categories)), np.int64)
    for column, (name, values) in enumerate(categories):
        if name in profile:
            known = {value: place for place, value in enumerate(values, start=1)}
            found = profile[name]
            raw, inverse = np.unique(found.astype(str), return_inverse=True)
            codes = np.array([known.get(str(value), 0) for value in raw], np.int64)[inverse]
            missing = np.array([value is None for value in found])  # a null must not be taken for a value "None"
            categories_BG[:, column] = np.where(missing, 0, codes)
    return numbers_BN, categories_BG


def stand_in(behaviours: int, profile: Sequence[str]) -> Rows:
    """One user without any event, for a micro-batch that has no sample: shapes stay, every target is masked."""
    zero: Int32 = np.zeros(1, np.int32)
    return Rows(
        user=np.array([""], object),
        user_hash=np.zeros(1, np.uint64),
        offsets=np.zeros(2, np.int64),
        days=np.zeros(0, np.int32),
        values=np.zeros((0, behaviours), np.int64),
        first_day=zero,
        end_day=zero,
        segment=np.array([""], object),
        profile={name: np.array([None], object) for name in profile},
    )
