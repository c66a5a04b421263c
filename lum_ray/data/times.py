"""Times of raw tables as local days, instants and offsets, all whole numbers.

A timestamp with a zone belongs to the day of its instant in the run's time zone, one without a zone is read as UTC (see
`schema`, which refuses it elsewhere); dates and day numbers are days already, in whatever zone the run is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

DAY_US = 86_400_000_000
DAY_MS = 86_400_000
DATES = (-719_162, 2_932_896)
"""The years 1 to 9999, which dates and timestamps must lie in: whatever lies out of it is a fault of an export."""
DAYS_AWAY = 100_000_000
"""Day numbers may lie this far from 0, so that their microseconds and whatever is added to them fit."""
RANGE = "the years 1 to 9999 (day numbers: within 100,000,000)"
NO_TIME = -32768
"""`offset_min` of an event of which only the day is known."""


def to_day(column: pa.ChunkedArray, time_zone: str) -> pa.Array:
    """Times as day numbers (int32): null stays null, and what lies outside of RANGE becomes null."""
    found = column.type
    if pa.types.is_timestamp(found):
        if time_zone == "UTC":
            numbers = pc.cast(_inside(column), pa.int64()).combine_chunks()
            whole = pc.fill_null(numbers, 0).to_numpy(zero_copy_only=False) // _per_day(found.unit)
            days = pa.array(whole.astype(np.int32), pa.int32(), mask=_nulls(numbers))
            return _between(days, days, *DATES)
        # Arrow takes the day in the column's zone
        column = pc.cast(pc.cast(_inside(column), pa.timestamp(found.unit, time_zone)), pa.date32(), safe=False)
    elif pa.types.is_date64(found):
        numbers = pc.cast(column, pa.int64())
        column = pc.cast(_between(column, numbers, *(day * DAY_MS for day in DATES)), pa.date32())
    array = column.combine_chunks()
    if pa.types.is_date32(array.type):
        numbers = array.view(pa.int32())
        return _between(numbers, numbers, *DATES)
    if pa.types.is_uint64(array.type):
        # no negative number compares with this type
        array = pc.if_else(pc.less_equal(array, pa.scalar(DAYS_AWAY, pa.uint64())), array, pa.scalar(None, pa.uint64()))
    numbers = pc.cast(array, pa.int64())
    return pc.cast(_between(numbers, numbers, -DAYS_AWAY, DAYS_AWAY), pa.int32())


def _inside(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Timestamps with null for those that are out of DATES by more than a day (an offset is less)."""
    per_day = _per_day(column.type.unit)
    # as nanoseconds 64 bits do not reach that far; their ends are left a day for the offset
    most = np.iinfo(np.int64).max - per_day
    low, high = (DATES[0] - 1) * per_day, (DATES[1] + 2) * per_day
    zoned = column if column.type.tz else pc.cast(column, pa.timestamp(column.type.unit, "UTC"))
    return _between(zoned, pc.cast(zoned, pa.int64()), max(low, -most), min(high, most))


def _per_day(unit: str) -> int:
    return DAY_US // 10**6 * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]


def _nulls(array: pa.Array) -> npt.NDArray[np.bool_] | None:
    return array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None


def _between(values: Any, numbers: Any, low: int, high: int) -> Any:
    """`values` with null where `numbers` is not in [low, high]."""
    fits = pc.and_(pc.greater_equal(numbers, low), pc.less_equal(numbers, high))
    return pc.if_else(fits, values, pa.scalar(None, values.type))


def to_instant(column: pa.ChunkedArray, time_zone: str) -> tuple[pa.Array, pa.Array]:
    """Times as (UTC microseconds since 1970, minutes that local time is ahead of UTC at that instant), int64 both.

    A date or a day number d is (d * DAY_US, NO_TIME). Minutes are rounded down (zones had seconds before 1972). Null
    stays null, and what lies outside of RANGE becomes null.
    """
    if pa.types.is_timestamp(column.type):
        # down, before 1970 too: a cast drops nanoseconds towards 0, into the next day at its end
        floored = pc.floor_temporal(_inside(column), unit="microsecond")
        zoned = pc.cast(pc.cast(floored, pa.timestamp("us", "UTC")), pa.timestamp("us", time_zone))
        time_us = pc.cast(zoned, pa.int64()).combine_chunks()
        local_us = pc.cast(pc.local_timestamp(zoned), pa.int64()).combine_chunks()
        ahead = pc.floor(pc.divide(pc.cast(pc.subtract(local_us, time_us), pa.float64()), 60e6))
        return time_us, pc.cast(ahead, pa.int64())
    time_us = pc.multiply(pc.cast(to_day(column, time_zone), pa.int64()), DAY_US)
    return time_us, pc.if_else(pc.is_valid(time_us), pa.scalar(NO_TIME, pa.int64()), pa.scalar(None, pa.int64()))
