"""Times of raw tables as local days, instants and offsets, all whole numbers.

A timestamp with a zone belongs to the day of its instant in the run's time zone, one without a zone is read as UTC (see
`schema`, which refuses it elsewhere); dates and day numbers are days already, in whatever zone the run is.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

DAY_US = 86_400_000_000
NO_TIME = -32768
"""`offset_min` of an event of which only the day is known."""


def to_day(column: pa.ChunkedArray, time_zone: str) -> pa.Array:
    """Times as day numbers (int32): null stays null, and so does what does not fit."""
    found = column.type
    if pa.types.is_timestamp(found):
        # Arrow takes the day in the column's zone
        column = pc.cast(_zoned(column, time_zone), pa.date32(), safe=False)
    elif pa.types.is_date64(found):
        column = pc.cast(column, pa.date32(), safe=False)
    array = column.combine_chunks()
    if pa.types.is_date32(array.type):
        return array.view(pa.int32())
    numbers = pc.cast(array, pa.int64(), safe=False)
    info = np.iinfo(np.int32)
    fits = pc.and_(pc.greater_equal(numbers, int(info.min)), pc.less_equal(numbers, int(info.max)))
    return pc.cast(pc.if_else(fits, numbers, pa.scalar(None, pa.int64())), pa.int32())


def to_instant(column: pa.ChunkedArray, time_zone: str) -> tuple[pa.Array, pa.Array]:
    """Times as (UTC microseconds since 1970, minutes that local time is ahead of UTC at that instant), int64 both.

    A date or a day number d is (d * DAY_US, NO_TIME). Minutes are rounded down (zones had seconds before 1972). Null
    stays null, and so does a day whose microseconds do not fit.
    """
    if pa.types.is_timestamp(column.type):
        zoned = _zoned(column, time_zone)
        time_us = pc.cast(zoned, pa.int64()).combine_chunks()
        local_us = pc.cast(pc.local_timestamp(zoned), pa.int64()).combine_chunks()
        ahead = pc.floor(pc.divide(pc.cast(pc.subtract(local_us, time_us), pa.float64()), 60e6))
        return time_us, pc.cast(ahead, pa.int64())
    day = pc.cast(to_day(column, time_zone), pa.int64())
    fits = pc.less_equal(pc.abs(day), np.iinfo(np.int64).max // DAY_US)
    time_us = pc.multiply(pc.if_else(fits, day, pa.scalar(None, pa.int64())), DAY_US)
    return time_us, pc.if_else(pc.is_valid(time_us), pa.scalar(NO_TIME, pa.int64()), pa.scalar(None, pa.int64()))


def _zoned(column: pa.ChunkedArray, time_zone: str) -> pa.ChunkedArray:
    # an instant without a zone only comes here when the run's zone is UTC
    zoned = pc.cast(column, pa.timestamp("us", tz=column.type.tz or "UTC"), safe=False)
    return pc.cast(zoned, pa.timestamp("us", tz=time_zone))
