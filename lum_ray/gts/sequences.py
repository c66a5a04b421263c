"""The one tokenizer of GTS-LUM: raw events -> one row per event of a user, exact integers in one order.

prepare, evaluate, predict and serve all come through here, so that they agree to the byte. Nothing is aggregated, and
nothing depends on a slot size or on the catalogue: slots, gaps, descriptors and ID paths are made of these integers
when windows are cut.

Choices that are not obvious:
- Events of a user at one instant have no order in the data (the lines of a receipt). Theirs is by a hash of the item
  and the instant: an order by item ID would be the same in every basket, and a model could read it.
- The same item twice at one instant is one event: the pieces of a line of a receipt are no behaviour of their own.
- An event of which only the day is known comes after the day's others, never at a false 00:00.

Legend: A events.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.data.rows import Int64, hash_strings, mix
from lum_ray.data.times import NO_TIME

TOKENIZER_VERSION: Final = 1
"""Part of every digest: raise it whenever the same events could give other integers."""
COLUMNS: Final = ("item", "time_us", "offset_min")
"""`Rows.values` of sequences: the item's 64-bit hash, UTC microseconds since 1970 (day * DAY_US where only the day is
known), and the minutes that local time is ahead of UTC then (NO_TIME where only the day is known)."""
ITEM, TIME_US, OFFSET_MIN = range(3)


def tokenize(events: pa.Table) -> pa.Table:
    """The sequences of `events` (user string, day int32, item string, time_us int64, offset_min int64), in any order.

    Returns (user string, day int32, item int64, time_us int64, offset_min int64), each (user, instant, item) once,
    sorted by (user, day, day-granular last, time_us, hash of item and time_us).
    Source: GTS-LUM, timestamp processing (a behaviour is an item at a time, in one of several granularities).
    Departs: the order within an instant, see above.
    """
    return partial(events)


def partial(events: pa.Table, behaviours: Sequence[Any] = ()) -> pa.Table:
    """A block's events as `tokenize` gives them. `behaviours` is there for `data.tasks.Tokenizer` and is not read."""
    encoded = events["item"].combine_chunks().dictionary_encode()
    hashes = hash_strings(encoded.dictionary.to_pylist()).view(np.int64)
    item = hashes[encoded.indices.to_numpy(zero_copy_only=False)]
    return _in_order(events.select(["user", "day"]).append_column("item", pa.array(item, pa.int64())), events)


def merge(partials: Sequence[pa.Table], behaviours: Sequence[Any] = ()) -> pa.Table:
    """The sequences of the events behind `partials`, the same whatever their number and order."""
    if not partials:
        raise ValueError("merge: expected at least one partial table, got none")
    table = pa.concat_tables(partials)
    return _in_order(table.select(["user", "day", "item"]), table)


def _in_order(keys: pa.Table, times: pa.Table) -> pa.Table:
    """Events (user, day, item hash) with the `time_us` and `offset_min` of `times`, sorted, each once."""
    encoded = keys["user"].combine_chunks().dictionary_encode()
    by_name = pc.array_sort_indices(encoded.dictionary).to_numpy(zero_copy_only=False)
    rank = np.empty(len(by_name), np.int64)
    rank[by_name] = np.arange(len(by_name))
    user = rank[encoded.indices.to_numpy(zero_copy_only=False)]
    day, item = _integers(keys["day"]), _integers(keys["item"])
    time_us, offset_min = _integers(times["time_us"]), _integers(times["offset_min"])
    # of one instant `mix` gives every item another number, so that equal keys are equal events
    where = (user << 33) + ((day + (1 << 31)) << 1) + (offset_min == NO_TIME)
    place = mix(item, time_us)
    order = np.lexsort((place, time_us, where))
    again = np.zeros(len(order), np.bool_)
    before, after = order[:-1], order[1:]
    again[1:] = (where[before] == where[after]) & (time_us[before] == time_us[after]) & (place[before] == place[after])
    kept = order[~again]
    names = encoded.dictionary.take(pa.array(by_name))
    return pa.table(
        {
            "user": names.take(pa.array(user[kept])),
            "day": pa.array(day[kept], pa.int32()),
            "item": pa.array(item[kept], pa.int64()),
            "time_us": pa.array(time_us[kept], pa.int64()),
            "offset_min": pa.array(offset_min[kept], pa.int64()),
        }
    )


def _integers(column: pa.ChunkedArray) -> Int64:
    array: npt.NDArray[Any] = column.combine_chunks().to_numpy(zero_copy_only=False)
    return array.astype(np.int64)
