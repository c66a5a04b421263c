"""Users' active days as flat arrays: decoded from the list columns of a part, clipped, and joined over parts.

Shapes: N users, A active days (all users together; events in sequences), U behaviours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.artifacts import UserError
from lum_ray.data.rows import Int32, Int64, UInt64, expand

USER = ("user", "user_hash")


@dataclass(frozen=True)
class History:
    """N users' active days, before profiles join."""

    user: pa.Array  # (N,) string
    user_hash: UInt64  # (N,)
    lengths: Int64  # (N,)
    days: Int32  # (A,)
    values: Int64  # (A, U)

    @staticmethod
    def concat(pieces: Sequence[History]) -> History:
        if len(pieces) == 1:
            return pieces[0]
        return History(
            user=pa.concat_arrays([piece.user for piece in pieces]),
            user_hash=np.concatenate([piece.user_hash for piece in pieces]),
            lengths=np.concatenate([piece.lengths for piece in pieces]),
            days=np.concatenate([piece.days for piece in pieces]),
            values=np.concatenate([piece.values for piece in pieces]),
        )


def nothing(width: int) -> History:
    none = np.zeros(0, np.int64)
    return History(
        pa.array([], pa.string()), none.astype(np.uint64), none, none.astype(np.int32), np.zeros((0, width), np.int64)
    )


def decode(table: pa.Table, behaviours: Sequence[str], where: str) -> History:
    """List columns as CSR."""
    offsets, days = _lists(table["days"])
    values = np.empty((len(days), len(behaviours)), np.int64)
    for index, name in enumerate(behaviours):
        theirs, flat = _lists(table[name])
        if not np.array_equal(theirs, offsets):
            lengths, found = np.diff(offsets), np.diff(theirs)
            wrong = np.flatnonzero(found != lengths)[:5]
            raise UserError(
                f"{where}: '{name}' must have one value per active day; expected {lengths[wrong].tolist()}, got "
                f"{found[wrong].tolist()} for the users {table['user'].take(wrong).to_pylist()}; "
                "prepare the timelines again"
            )
        values[:, index] = as_numpy(flat, np.int64)
    return History(
        user=_one(table["user"].cast(pa.string())),
        user_hash=as_numpy(table["user_hash"], np.uint64),
        lengths=np.diff(offsets),
        days=as_numpy(days, np.int32),
        values=values,
    )


def _lists(column: pa.ChunkedArray) -> tuple[Int64, pa.Array]:
    """Where each list begins in the flat values, from 0 (N + 1,), and the values; a null is an empty list."""
    lists = _one(column)
    if lists.null_count:  # the buffers may hold anything behind a null
        lengths = as_numpy(pc.fill_null(pc.list_value_length(lists), 0), np.int64)
        return np.concatenate([[0], np.cumsum(lengths)]), pc.list_flatten(lists)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], lists.values[offsets[0] : offsets[-1]]


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def clip(history: History, from_day: int, to_day: int) -> History:
    """The active days within [from_day, to_day), and the users who have any."""
    inside = (history.days >= from_day) & (history.days < to_day)
    if inside.all():
        return history
    row = np.repeat(np.arange(len(history.user)), history.lengths)
    lengths = np.bincount(row[inside], minlength=len(history.user)).astype(np.int64)
    there = np.flatnonzero(lengths)
    return History(
        user=history.user.take(pa.array(there)),
        user_hash=history.user_hash[there],
        lengths=lengths[there],
        days=history.days[inside],
        values=history.values[inside],
    )


def merge(history: History, where: str, repeats: bool = False) -> History:
    """One row per user, sorted by (hash, user); a user's rows (one a part, in the parts' order) are joined."""
    hashes = history.user_hash
    # hashes that ascend strictly are the common case (one part): nothing to sort, nobody twice
    if not np.all(hashes[1:] > hashes[:-1]):
        table = pa.table({"user": history.user, "user_hash": hashes})
        order = as_numpy(pc.sort_indices(table, sort_keys=[(name, "ascending") for name in reversed(USER)]), np.int64)
        users = history.user.take(order)
        hashes, lengths = hashes[order], history.lengths[order]
        same = (hashes[1:] == hashes[:-1]) & as_numpy(pc.equal(users[1:], users[:-1]), np.bool_)
        starts = np.flatnonzero(np.concatenate([[True], ~same]))
        ends = np.cumsum(history.lengths)
        _, index = expand((ends - history.lengths)[order], ends[order])
        history = History(
            user=users.take(starts),
            user_hash=hashes[starts],
            lengths=np.add.reduceat(lengths, starts),
            days=history.days[index],
            values=history.values[index],
        )
    check_days(history, where, repeats)
    return history


def check_days(history: History, where: str, repeats: bool) -> None:
    """Days must ascend inside a user, because `span` searches them; strictly unless they may repeat (sequences),
    because a day that comes twice has two values."""
    inside = np.ones(max(len(history.days) - 1, 0), np.bool_)
    starts = np.cumsum(history.lengths)[:-1]
    inside[starts[(starts > 0) & (starts < len(history.days))] - 1] = False
    step = np.diff(history.days.astype(np.int64))
    wrong = np.flatnonzero(inside & (step < (0 if repeats else 1)))[:5] + 1
    if len(wrong):
        row = np.searchsorted(np.cumsum(history.lengths), wrong, side="right")
        users = list(dict.fromkeys(history.user.take(row).to_pylist()))
        raise UserError(
            f"{where}: expected {'' if repeats else 'each (user, day) once and '}days ascending, over all parts; "
            f"not so for the users {users}; "
            "prepare the timelines anew, or remove the repeated rows"
        )


def as_numpy(column: pa.ChunkedArray | pa.Array, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A column without nulls as numpy (bool and integers). Raises pyarrow's ArrowInvalid where a value does not fit."""
    array = _one(column) if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(array.cast(pa.from_numpy_dtype(dtype)).to_numpy(zero_copy_only=False), dtype)


def stacked(columns: Sequence[pa.ChunkedArray], length: int) -> Int64:
    values = np.empty((length, len(columns)), np.int64)
    for index, column in enumerate(columns):
        values[:, index] = as_numpy(column, np.int64)
    return values
