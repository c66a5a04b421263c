"""The one tokenizer of LUMOS: raw events -> one row per user and active day, one exact integer per behaviour.

prepare, evaluate, predict and serve all come through here, so that they agree to the byte. Everything is integer
arithmetic, so no order of events, blocks or partial results changes a value: `partial` aggregates a block to mergeable
states, `merge` brings states together, `tokenize` is the one after the other.

Source: LUMOS, section 3 (daily behaviours). Gates and transforms are not applied here: the table stays raw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.data.expressions import Aggregate, parse, to_units
from lum_ray.data.rows import hash_strings, mix

TOKENIZER_VERSION = 1
"""Part of every digest: raise it whenever the same events could give other integers."""

Operation = Literal["sum", "min", "max", "distinct"]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class Behaviour(Protocol):
    """What the tokenizer needs to know of a daily behaviour (`config.Behaviour` has it)."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Literal["binary", "continuous", "count"]: ...
    @property
    def aggregate(self) -> str: ...
    @property
    def resolution(self) -> float: ...
    @property
    def gate(self) -> str | None: ...


def columns_used(behaviours: Sequence[Behaviour]) -> tuple[str, ...]:
    """The event columns that the behaviours' aggregates read, sorted. Raises UserError for a bad aggregate."""
    return tuple(sorted({column for item in behaviours for column in parse(item.aggregate).columns}))


def tokenize(events: pa.Table, behaviours: Sequence[Behaviour]) -> pa.Table:
    """The daily table of `events` (user string, day int32, raw columns).

    Returns (user string, day int32, one int64 column per behaviour), sorted by (user, day), a row per user and day with
    any event. Binary: 1 where the aggregate is above 0. Numbers: the aggregate in units of the resolution; a mean is
    rounded half to even after the exact sum and count; 0 where every value is null.
    Raises ValueError for a value that is not finite, finer than its resolution or too large (`schema` rejects them).
    """
    return merge([partial(events, behaviours)], behaviours)


def partial(events: pa.Table, behaviours: Sequence[Behaviour]) -> pa.Table:
    """A block's events as mergeable states: (user, day, state columns), sorted by (user, day).

    State columns: `<name>` int64 (null: no value yet) for sum, count, any, min, max; `<name>.sum` and `<name>.count`
    for mean; `<name>.values` list<int64> of distinct hashes for n_unique.
    """
    groups = _Groups.of(events)
    columns: dict[str, pa.Array] = {"user": groups.user, "day": groups.day}
    for behaviour in behaviours:
        aggregate = parse(behaviour.aggregate)
        for (column, operation), (values, present) in zip(
            _states(behaviour.name, aggregate), _values(events, behaviour, aggregate), strict=True
        ):
            columns[column] = groups.reduce(operation, values, present)
    return pa.table(columns)


def merge(partials: Sequence[pa.Table], behaviours: Sequence[Behaviour]) -> pa.Table:
    """The daily table of the events behind `partials`, the same whatever their number and order."""
    if not partials:
        raise ValueError("merge: expected at least one partial table, got none")
    table = pa.concat_tables(partials).combine_chunks()
    groups = _Groups.of(table)
    columns: dict[str, pa.Array] = {"user": groups.user, "day": groups.day}
    for behaviour in behaviours:
        aggregate = parse(behaviour.aggregate)
        states = []
        for column, operation in _states(behaviour.name, aggregate):
            state = (
                table[column].combine_chunks()
                if table.num_rows
                else table.schema.empty_table()[column].combine_chunks()
            )
            if operation == "distinct":
                rows = pc.list_parent_indices(state).to_numpy(zero_copy_only=False)
                states.append(groups.count_distinct(rows, pc.list_flatten(state).to_numpy(zero_copy_only=False)))
            else:
                present = state.is_valid().to_numpy(zero_copy_only=False)
                values = pc.fill_null(state, 0).to_numpy(zero_copy_only=False)
                reduced = groups.reduce(operation, values, present)
                states.append(pc.fill_null(reduced, 0).to_numpy(zero_copy_only=False))
        value = _mean(*states) if aggregate.function == "mean" else states[0]
        columns[behaviour.name] = pa.array(
            (value > 0).astype(np.int64) if behaviour.kind == "binary" else value, pa.int64()
        )
    return pa.table(columns)


def _states(name: str, aggregate: Aggregate) -> list[tuple[str, Operation]]:
    match aggregate.function:
        case "min":
            return [(name, "min")]
        case "max" | "any":
            return [(name, "max")]
        case "mean":
            return [(f"{name}.sum", "sum"), (f"{name}.count", "sum")]
        case "n_unique":
            return [(f"{name}.values", "distinct")]
        case _:
            return [(name, "sum")]


def _values(events: pa.Table, behaviour: Behaviour, aggregate: Aggregate) -> Iterator[tuple[Int64, Bool]]:
    """For each state column: what every event (N,) gives to it, and whether it gives anything."""
    everything = np.ones(events.num_rows, np.bool_)
    if aggregate.expression is None:
        yield np.ones(events.num_rows, np.int64), everything
        return
    value = aggregate.evaluate(events)
    if aggregate.function == "n_unique":
        yield _identity(value), value.is_valid().to_numpy()
        return
    if aggregate.function in ("any", "count"):
        # count(condition) counts the rows where it holds, count(column) those where it is not null
        holds = pc.fill_null(value, False) if pa.types.is_boolean(value.type) else pc.is_valid(value)
        yield holds.to_numpy().astype(np.int64), everything
        return
    units = to_units(value, behaviour.resolution)
    bad = units.infinite | units.finer | units.large
    if bad.any():
        raise ValueError(
            f"{behaviour.name}: {aggregate}: expected finite multiples of {behaviour.resolution}, {bad.sum()} "
            "rows hold other numbers; round them or choose a finer resolution"
        )
    yield np.where(units.present, units.whole, 0), units.present
    if aggregate.function == "mean":
        yield units.present.astype(np.int64), everything


def _identity(value: pa.ChunkedArray) -> Int64:
    """A 64-bit identity of each value: itself for whole numbers (3 and 3.0 are one), a hash for the others."""
    array = value.combine_chunks()
    if pa.types.is_string(array.type):
        encoded = array.dictionary_encode()
        hashes = hash_strings(encoded.dictionary.to_pylist()).view(np.int64)
        codes = pc.fill_null(encoded.indices, 0).to_numpy(zero_copy_only=False)
        return hashes[codes] if len(hashes) else np.zeros(len(array), np.int64)
    if pa.types.is_floating(array.type):
        number = pc.fill_null(array, 0.0).to_numpy(zero_copy_only=False)
        whole = (np.rint(number) == number) & (np.abs(number) < 2.0**53)
        return np.where(whole, np.where(whole, number, 0.0).astype(np.int64), mix(number.view(np.int64)).view(np.int64))
    return np.asarray(pc.fill_null(pc.cast(array, pa.int64()), 0).to_numpy(zero_copy_only=False), np.int64)


def _mean(total: Int64, count: Int64) -> Int64:
    """total / count rounded half to even, in integers; 0 where count is 0."""
    divisor = np.maximum(count, 1)
    quotient, rest = np.divmod(total, divisor)
    up = (2 * rest > divisor) | ((2 * rest == divisor) & (quotient % 2 == 1))
    return np.where(count > 0, quotient + up, 0)


_REDUCE: dict[str, tuple[np.ufunc, int]] = {
    "sum": (np.add, 0),
    "min": (np.minimum, int(np.iinfo(np.int64).max)),
    "max": (np.maximum, int(np.iinfo(np.int64).min)),
}


@dataclass(frozen=True)
class _Groups:
    """Rows (N,) grouped by (user, day), G groups in that order: `order` sorts the rows, `starts` begins each group."""

    user: pa.Array  # (G,)
    day: pa.Array  # (G,)
    order: Int64  # (N,)
    starts: Int64  # (G,)

    @staticmethod
    def of(table: pa.Table) -> _Groups:
        encoded = table["user"].combine_chunks().dictionary_encode()
        names = encoded.dictionary
        by_name = pc.array_sort_indices(names).to_numpy(zero_copy_only=False)
        rank = np.empty(len(names), np.int64)
        rank[by_name] = np.arange(len(names))
        codes = rank[encoded.indices.to_numpy(zero_copy_only=False)]
        day = table["day"].combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)
        keys = (codes << 32) + (day + (1 << 31))
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        starts = (
            np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
            if len(keys)
            else np.empty(0, np.int64)
        )
        first = order[starts]
        user = names.take(pa.array(by_name)).take(pa.array(codes[first]))
        return _Groups(user, pa.array(day[first], pa.int32()), order, starts)

    def reduce(self, operation: Operation, values: Int64, present: Bool) -> pa.Array:
        """One value a group, null where none of its rows is `present`; for `distinct` the sorted list of its values."""
        if operation == "distinct":
            group, distinct = self._distinct(np.flatnonzero(present), values[present])
            offsets = np.searchsorted(group, np.arange(len(self.starts) + 1)).astype(np.int32)
            return pa.ListArray.from_arrays(pa.array(offsets), pa.array(distinct, pa.int64()))
        if not len(self.starts):
            return pa.array([], pa.int64())
        ufunc, neutral = _REDUCE[operation]
        reduced = ufunc.reduceat(np.where(present, values, neutral)[self.order], self.starts)
        some = np.logical_or.reduceat(present[self.order], self.starts)
        return pa.array(reduced, pa.int64(), mask=~some)

    def count_distinct(self, rows: Int64, values: Int64) -> Int64:
        """The number of distinct `values` (V,), given with the row each comes from, of every group (G,)."""
        group, _ = self._distinct(rows, values)
        return np.bincount(group, minlength=len(self.starts)).astype(np.int64)

    def _distinct(self, rows: npt.NDArray[np.integer], values: Int64) -> tuple[Int64, Int64]:
        group_of = np.empty(len(self.order), np.int64)
        group_of[self.order] = np.repeat(np.arange(len(self.starts)), np.diff(np.append(self.starts, len(self.order))))
        group = group_of[rows]
        order = np.lexsort((values, group))
        group, values = group[order], values[order]
        new = np.ones(len(group), np.bool_)
        new[1:] = (group[1:] != group[:-1]) | (values[1:] != values[:-1])
        return group[new], values[new]
