"""Some users' timelines in memory, as compressed sparse rows, and the samples (a row, a cut, a draw) taken of them.

Shapes: N users, A active days (all users together), U behaviours, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Strings = npt.NDArray[np.object_]


@dataclass(frozen=True)
class Rows:
    """N users: active days ascending within a user, `values` integers in units of each behaviour's resolution.

    `first_day` is the day before which the user did not exist (pads), `end_day` the first day that was not observed.
    `profile` holds raw columns (float64 with NaN, or objects with None).
    """

    user: Strings  # (N,)
    user_hash: UInt64  # (N,)
    offsets: Int64  # (N + 1,)
    days: Int32  # (A,)
    values: Int64  # (A, U)
    first_day: Int32  # (N,)
    end_day: Int32  # (N,)
    segment: Strings  # (N,), "" where there is none
    profile: dict[str, npt.NDArray[np.generic]]  # name -> (N,)

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: npt.NDArray[np.integer]) -> Rows:
        """The users at `index` (M,), in that order."""
        begin, end = self.offsets[index], self.offsets[index + 1]
        _, active = expand(begin, end)
        return Rows(
            user=self.user[index],
            user_hash=self.user_hash[index],
            offsets=np.concatenate([[0], np.cumsum(end - begin)]).astype(np.int64),
            days=self.days[active],
            values=self.values[active],
            first_day=self.first_day[index],
            end_day=self.end_day[index],
            segment=self.segment[index],
            profile={name: column[index] for name, column in self.profile.items()},
        )

    def slice(self, begin: int, end: int) -> Rows:
        """The users [begin, end), as views of the same memory."""
        first, stop = int(self.offsets[begin]), int(self.offsets[end])
        return Rows(
            user=self.user[begin:end],
            user_hash=self.user_hash[begin:end],
            offsets=self.offsets[begin : end + 1] - first,
            days=self.days[first:stop],
            values=self.values[first:stop],
            first_day=self.first_day[begin:end],
            end_day=self.end_day[begin:end],
            segment=self.segment[begin:end],
            profile={name: column[begin:end] for name, column in self.profile.items()},
        )

    @staticmethod
    def concat(pieces: Sequence[Rows]) -> Rows:
        """The users of all pieces, in order. The pieces have the same behaviours and profile columns."""
        if len(pieces) == 1:
            return pieces[0]
        lengths = np.concatenate([np.diff(piece.offsets) for piece in pieces])
        return Rows(
            user=np.concatenate([piece.user for piece in pieces]),
            user_hash=np.concatenate([piece.user_hash for piece in pieces]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            days=np.concatenate([piece.days for piece in pieces]),
            values=np.concatenate([piece.values for piece in pieces]),
            first_day=np.concatenate([piece.first_day for piece in pieces]),
            end_day=np.concatenate([piece.end_day for piece in pieces]),
            segment=np.concatenate([piece.segment for piece in pieces]),
            profile={name: np.concatenate([piece.profile[name] for piece in pieces]) for name in pieces[0].profile},
        )

    def span(self, row: Int64, start_day: npt.ArrayLike, stop_day: npt.ArrayLike) -> tuple[Int64, Int64]:
        """For each of `row` (S,): the range [begin, end) of its active days within [start_day, stop_day)."""
        keys = _key(np.repeat(np.arange(len(self)), np.diff(self.offsets)), self.days)
        begin = np.searchsorted(keys, _key(row, np.asarray(start_day)))
        end = np.searchsorted(keys, _key(row, np.asarray(stop_day)))
        return begin.astype(np.int64), np.maximum(begin, end).astype(np.int64)


@dataclass(frozen=True)
class Samples:
    """What is cut from rows: for each sample its row, its cut (first predicted day) and its draw number; `step` is the
    global step that they are drawn for, the same on all ranks (0 outside training)."""

    row: Int64  # (S,)
    cut: Int32  # (S,)
    draw: Int32  # (S,)
    step: int = 0

    def __len__(self) -> int:
        return len(self.row)


def _key(row: npt.NDArray[np.integer], day: npt.NDArray[np.integer]) -> Int64:
    """Sorts by row, then by day (which may be negative)."""
    return (row.astype(np.int64) << 32) + (day.astype(np.int64) + (1 << 31))


def expand(begin: Int64, end: Int64) -> tuple[Int64, Int64]:
    """All (which range, index) of the ranges [begin, end) (S,), in order: two arrays (A,)."""
    length = np.maximum(end - begin, 0)
    which = np.repeat(np.arange(len(begin), dtype=np.int64), length)
    starts = np.cumsum(length) - length
    return which, (np.arange(len(which), dtype=np.int64) - starts[which] + begin[which]).astype(np.int64)


def mix(*parts: npt.ArrayLike) -> UInt64:
    """A stable 64-bit hash of integers (broadcast together), the same on every machine: splitmix64, chained."""
    with np.errstate(over="ignore"):
        state = np.zeros((), np.uint64)
        for part in parts:
            state = (
                state ^ np.asarray(part).astype(np.int64, copy=False).view(np.uint64)
                if np.asarray(part).dtype != np.uint64
                else state ^ np.asarray(part)
            )
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state, np.uint64)


def share(hashes: UInt64) -> npt.NDArray[np.float64]:
    """Hashes as numbers in [0, 1)."""
    return (hashes >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def hash_strings(texts: Sequence[str] | Strings | pa.Array) -> UInt64:
    """A stable 64-bit hash of each text (its UTF-8 bytes, eight at a time, the last ones padded with zeros).

    Vectorised over texts: it reads the buffers of an Arrow array of strings, which other sequences are made to.
    """
    array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())
    if len(array) == 0:
        return np.empty(0, np.uint64)
    _, offsets, content = array.cast(pa.string()).buffers()
    bounds = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    begin, lengths = bounds[:-1], np.diff(bounds)
    # all words of eight bytes, one beginning at each byte
    padded = (content.to_pybytes() if content is not None else b"") + bytes(8)
    words = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))
    state = mix(lengths)
    # a text's hash must not depend on its neighbours: bytes past its own end are zero, words past it are left out
    inside = np.arange(len(lengths))
    for at in range(0, int(lengths.max()), 8):
        inside = inside[lengths[inside] > at]
        over = 8 * np.maximum(at + 8 - lengths[inside], 0).astype(np.uint64)
        word = words[begin[inside] + at] & (np.uint64(2**64 - 1) >> over)
        state[inside] = mix(state[inside], word)
    return state


def distinct_keys(keys: Int64, space: int) -> Int64:
    """The distinct ones of `keys` (A,), which lie in [0, space), ascending.

    Without a sort where the space is not much larger than the keys are many.
    """
    if space > SPARSE * len(keys):
        return np.sort(pa.array(keys).unique().to_numpy())
    there = np.zeros(space, np.bool_)
    there[keys] = True
    return np.flatnonzero(there)


def argsort_keys(keys: Int64, space: int) -> Int64:
    """The stable order of `keys` (A,), which lie in [0, space).

    By 16 bits at a time, which numpy sorts by radix: for what is counted it takes a third of the time of a sort.
    """
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in range(16, max(space - 1, 0).bit_length(), 16):
        digit = (keys[order] >> shift & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]
    return order


def number_keys(keys: Int64, space: int) -> tuple[Int64, Int32]:
    """`distinct_keys` (G,), and the place of each key among them (A,)."""
    distinct = distinct_keys(keys, space)
    if space > SPARSE * len(keys):
        return distinct, pc.index_in(pa.array(keys), value_set=pa.array(distinct)).to_numpy()
    place = np.empty(space, np.int32)
    place[distinct] = np.arange(len(distinct), dtype=np.int32)
    return distinct, place[keys]


SPARSE = 32
"""A table of all keys pays while it is at most so many times as long as the list of keys."""


class HashIndex:
    """Where hashes stand in an array of distinct ones (N,) int64."""

    def __init__(self, hash_N: Int64) -> None:
        self._order = np.argsort(hash_N).astype(np.int64)
        self._ascending = hash_N[self._order]

    def of(self, hashes: Int64) -> Int64:
        """The places (A,) of these hashes (A,), -1 where there is none."""
        place = np.minimum(np.searchsorted(self._ascending, hashes), len(self._order) - 1)
        return np.where(self._ascending[place] == hashes, self._order[place], -1).astype(np.int64)
