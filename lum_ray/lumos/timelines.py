"""The one tokenizer of LUMOS: raw events -> one row per user and active day, one exact integer per behaviour.

prepare, evaluate, predict and serve all come through here, so that they agree to the byte. Everything is integer
arithmetic, so no order of events, blocks or partial results changes a value: `partial` aggregates a block to mergeable
states, `merge` brings states together, `tokenize` is the one after the other.

Source: LUMOS, section 3 (daily behaviours). Gates and transforms are not applied here: the table stays raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.data.expressions import Aggregate, Units, parse, to_units
from lum_ray.data.rows import Int32, argsort_keys, distinct_keys, hash_strings, mix, number_keys

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
    """A block's events as mergeable states: (user dictionary of strings, day, state columns), a row per user and day,
    in the order of the users' dictionary, then by day.

    State columns: `<name>` int64 (null: no value yet) for sum, count, any, min, max; `<name>.sum` and `<name>.count`
    for mean; `<name>.values` list<int64> of distinct hashes for n_unique.
    """
    groups = _Groups.of(events["user"], events["day"])
    columns: dict[str, pa.Array] = {"user": groups.user, "day": groups.day}
    measured: dict[tuple[str | None, float], Units] = {}
    for behaviour in behaviours:
        aggregate, name = parse(behaviour.aggregate), behaviour.name
        if aggregate.function in ("count", "any"):
            counts = groups.count(_holds(events, aggregate))
            columns[name] = pa.array(counts if aggregate.function == "count" else (counts > 0).astype(np.int64))
            continue
        value = aggregate.evaluate(events)
        if aggregate.function == "n_unique":
            columns[f"{name}.values"] = groups.reduce("distinct", _identity(value), value.is_valid().to_numpy())
            continue
        key = (aggregate.expression, behaviour.resolution)
        units = measured[key] = measured.get(key) or _measured(value, behaviour, aggregate)
        column, operation = _states(name, aggregate)[0]
        columns[column] = groups.reduce(operation, units.whole, units.present)
        if aggregate.function == "mean":
            columns[f"{name}.count"] = pa.array(groups.count(units.present))
    return pa.table(columns)


def combine(partials: Sequence[pa.Table], behaviours: Sequence[Behaviour]) -> pa.Table:
    """Several tables of states (at least one) as one, whatever their number and order: as `partial` makes it, but with
    plain strings as users, in the order of their names. Narrower integers than `partial` gives will do."""
    states = _combined(partials, behaviours)
    for place, name in enumerate(states.column_names[2:], start=2):
        kind = pa.list_(pa.int64()) if pa.types.is_list(states[name].type) else pa.int64()
        states = states.set_column(place, name, states[name].cast(kind))
    return states


def _combined(partials: Sequence[pa.Table], behaviours: Sequence[Behaviour]) -> pa.Table:
    table = pa.concat_tables(partials, promote_options="permissive").combine_chunks()
    table = table.set_column(table.column_names.index("user"), "user", _by_name(table["user"]))
    keys, bits, _ = _keys(table["user"], table["day"])
    order = argsort_keys(keys, len(_array(table["user"]).dictionary) << bits)
    # blocks of a log are stretches of time, so that few users have a day in two of them: only these rows are reduced
    again = _repeated(keys[order])
    if again.any():
        reduced = _reduced(table.take(order[again]), behaviours)
        once = table.take(order[~again]).select(reduced.column_names)
        place = np.concatenate([keys[order[~again]], np.unique(keys[order[again]])])
        table = pa.concat_tables([once, reduced], promote_options="permissive").combine_chunks()
        order = np.argsort(place)
    return table.take(order).set_column(0, "user", table["user"].take(order).cast(pa.string()))


def _repeated(keys: Int64) -> Bool:
    """Which of ascending keys (N,) come more than once."""
    again = np.zeros(len(keys), np.bool_)
    same = keys[1:] == keys[:-1]
    again[1:] |= same
    again[:-1] |= same
    return again


def _reduced(table: pa.Table, behaviours: Sequence[Behaviour]) -> pa.Table:
    groups = _Groups.of(table["user"], table["day"])
    columns: dict[str, pa.Array] = {"user": groups.user, "day": groups.day}
    for behaviour in behaviours:
        for column, operation in _states(behaviour.name, parse(behaviour.aggregate)):
            state = _array(table[column])
            if operation == "distinct":
                rows = pc.list_parent_indices(state).to_numpy(zero_copy_only=False)
                values = pc.list_flatten(state).to_numpy(zero_copy_only=False).astype(np.int64)
                columns[column] = groups.lists(*_distinct(groups.of_row[rows], values))
            else:
                present = state.is_valid().to_numpy(zero_copy_only=False) if state.null_count else None
                columns[column] = groups.reduce(operation, _or_0(state), present)
    return pa.table(columns)


def merge(partials: Sequence[pa.Table], behaviours: Sequence[Behaviour]) -> pa.Table:
    """The daily table of the events behind `partials`, the same whatever their number and order."""
    if not partials:
        raise ValueError("merge: expected at least one partial table, got none")
    states = _combined(partials, behaviours)
    columns: dict[str, pa.Array] = {"user": _array(states["user"]), "day": _array(states["day"])}
    for behaviour in behaviours:
        aggregate = parse(behaviour.aggregate)
        found = [_array(states[column]) for column, _ in _states(behaviour.name, aggregate)]
        if aggregate.function == "n_unique":
            value = pc.list_value_length(found[0]).to_numpy(zero_copy_only=False).astype(np.int64)
        else:
            value = _mean(*map(_or_0, found)) if aggregate.function == "mean" else _or_0(found[0])
        columns[behaviour.name] = pa.array(
            (value > 0).astype(np.int64) if behaviour.kind == "binary" else value, pa.int64()
        )
    return pa.table(columns)


def _array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if isinstance(column, pa.Array):
        return column
    return column.combine_chunks() if column.num_chunks else pa.array([], column.type)


def _or_0(column: pa.Array) -> Int64:
    filled = pc.fill_null(column, 0) if column.null_count else column
    return np.asarray(filled.to_numpy(zero_copy_only=False).astype(np.int64, copy=False), np.int64)


def _by_name(user: pa.ChunkedArray) -> pa.DictionaryArray:
    """The same users with a dictionary that is sorted by name."""
    encoded = _array(user).dictionary_encode()
    order = pc.array_sort_indices(encoded.dictionary)
    place = np.empty(len(order), np.int32)
    place[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    codes = place[encoded.indices.to_numpy(zero_copy_only=False)]
    return pa.DictionaryArray.from_arrays(pa.array(codes), encoded.dictionary.take(order))


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


def _holds(events: pa.Table, aggregate: Aggregate) -> Bool | None:
    """The rows (N,) that `count` and `any` look for (None: all): a condition's where it holds, a column's where it is
    not null."""
    if aggregate.expression is None:
        return None
    value = aggregate.evaluate(events)
    holds = value if pa.types.is_boolean(value.type) else pc.is_valid(value)
    return np.asarray((pc.fill_null(holds, False) if holds.null_count else holds).to_numpy(), np.bool_)


def _measured(value: pa.ChunkedArray, behaviour: Behaviour, aggregate: Aggregate) -> Units:
    units = to_units(value, behaviour.resolution)
    bad = units.infinite | units.finer | units.large
    if bad.any():
        raise ValueError(
            f"{behaviour.name}: {aggregate}: expected finite multiples of {behaviour.resolution}, {bad.sum()} "
            "rows hold other numbers; round them or choose a finer resolution"
        )
    return units


def _identity(value: pa.ChunkedArray) -> Int64:
    """A 64-bit identity of each value: itself for whole numbers (3 and 3.0 are one), a hash for the others."""
    array = value.combine_chunks()
    if pa.types.is_string(array.type) or pa.types.is_dictionary(array.type):
        encoded = array.dictionary_encode()
        hashes = hash_strings(encoded.dictionary).view(np.int64)
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


def _keys(user: pa.ChunkedArray | pa.Array, day: pa.ChunkedArray) -> tuple[Int64, int, int]:
    """For each row a key that sorts by (place of the user in the dictionary, day); the bits of it that hold the day,
    and the first day."""
    codes = _array(user).indices.to_numpy(zero_copy_only=False).astype(np.int64)
    days = _array(day).to_numpy(zero_copy_only=False).astype(np.int64)
    first, last = (int(days.min()), int(days.max())) if len(days) else (0, 0)
    bits = (last - first).bit_length()
    return (codes << bits) + (days - first), bits, first


@dataclass(frozen=True)
class _Groups:
    """Rows (N,) grouped by (user, day), G groups in the order of the users' dictionary, then by day."""

    user: pa.DictionaryArray  # (G,)
    day: pa.Array  # (G,)
    of_row: Int32  # (N,)

    @staticmethod
    def of(user: pa.ChunkedArray | pa.Array, day: pa.ChunkedArray) -> _Groups:
        encoded = _array(user).dictionary_encode()
        found, bits, first = _keys(encoded, day)
        keys, of_row = number_keys(found, len(encoded.dictionary) << bits)
        names = pa.DictionaryArray.from_arrays(pa.array((keys >> bits).astype(np.int32)), encoded.dictionary)
        return _Groups(names, pa.array(((keys & ((1 << bits) - 1)) + first).astype(np.int32)), of_row)

    def reduce(self, operation: Operation, values: Int64, present: Bool | None) -> pa.Array:
        """One value a group, null where none of its rows is `present`; for `distinct` the sorted list of its values."""
        rows = None if present is None or present.all() else np.flatnonzero(present)
        of_row, values = (self.of_row, values) if rows is None else (self.of_row[rows], values[rows])
        if operation == "distinct":
            return self.lists(*_distinct(of_row, values))
        ufunc, neutral = _REDUCE[operation]
        reduced = np.full(len(self.day), neutral, np.int64)
        ufunc.at(reduced, of_row, values)
        if rows is None:
            return pa.array(reduced)
        some = np.zeros(len(self.day), np.bool_)
        some[of_row] = True
        return pa.array(reduced, pa.int64(), mask=~some)

    def count(self, rows: Bool | None) -> Int64:
        """How many of the rows (N,; None: all) each group has (G,)."""
        of_row = self.of_row if rows is None else self.of_row[np.flatnonzero(rows)]
        return np.bincount(of_row, minlength=len(self.day)).astype(np.int64, copy=False)

    def lists(self, group: Int64, values: Int64) -> pa.Array:
        """Values (V,) by ascending group as a list for every group (G,)."""
        offsets = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(self.day)))]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int64()))


def _distinct(group: Int32, values: Int64) -> tuple[Int64, Int64]:
    """The distinct ones of the pairs (group, value) (V,), sorted."""
    encoded = pa.array(values).dictionary_encode()
    known = encoded.dictionary.to_numpy()
    by_value = np.argsort(known)
    rank = np.empty(len(known), np.int64)
    rank[by_value] = np.arange(len(known))
    bits = max(len(known) - 1, 0).bit_length()
    pairs = (group.astype(np.int64) << bits) + rank[encoded.indices.to_numpy()]
    found = distinct_keys(pairs, (int(group.max(initial=-1)) + 1) << bits)
    return found >> bits, known[by_value][found & ((1 << bits) - 1)]
