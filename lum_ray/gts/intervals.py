"""Time slots, their semantic descriptors and the gaps between them, as integers.

Source: GTS-LUM, timestamp processing: time is cut into fixed intervals (15 minutes); each has a descriptor in words,
such as "Wednesday morning rush hour", and a time ID that its behaviours share. Here the time ID is the slot of the day
plus the bucketed gap to the group before. Shapes: any (...), the same for all arguments of a function (or ones that
broadcast).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from lum_ray.data.rows import Int64
from lum_ray.data.times import NO_TIME

DAY_MINUTES: Final = 1440
SLOTLESS: Final = -1
"""The slot of a day-granular event: its day is known, its time is not."""

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_WEEKEND = 5  # the first weekday of the weekend
# part of day -> (hour at which it starts, words on a working day, words at the weekend, when nobody rushes)
_PARTS: tuple[tuple[int, str, str], ...] = (
    (0, "night", "night"),
    (5, "early morning", "early morning"),
    (7, "morning rush hour", "morning"),
    (9, "late morning", "late morning"),
    (12, "lunchtime", "lunchtime"),
    (14, "afternoon", "afternoon"),
    (17, "evening rush hour", "early evening"),
    (19, "evening", "evening"),
    (22, "night", "night"),
)
_WHOLE_DAY = len(_PARTS) - 1  # the night's two ends are one part, which frees the last number
_STARTS = np.array([start * 60 for start, _, _ in _PARTS], np.int64)
_COUNT = len(_PARTS)

DESCRIPTORS: Final = 1 + len(_WEEKDAYS) * _COUNT * 2
"""How many descriptor ids there are: 0 is "none", then weekday x part of day x public holiday or not."""

_GAP_EDGES = 2 ** np.arange(20, dtype=np.int64)
GAPS: Final = 2 + len(_GAP_EDGES)
"""How many gap buckets there are: 0 is the first group, bucket k from 1 to 20 is at most 2^(k-1) minutes (the last: 364
days), 21 is longer than that."""


def slots_per_day(slot_minutes: int) -> int:
    """How many slots a day has. It doubles as the code of slot-less groups in tables of slots, which have one row more.

    Raises ValueError unless `slot_minutes` divides a day.
    """
    if slot_minutes < 1 or DAY_MINUTES % slot_minutes:
        raise ValueError(
            f"slot_minutes: expected a divisor of a day's {DAY_MINUTES} minutes, such as 5, 15, 30, 60, 180 or 1440, "
            f"got {slot_minutes}; choose one of these"
        )
    return DAY_MINUTES // slot_minutes


def slots(time_us: Int64, offset_min: Int64, slot_minutes: int) -> Int64:
    """The local slot of the day (...), 0 .. slots_per_day - 1, or SLOTLESS where `offset_min` is NO_TIME.

    `time_us`: UTC microseconds since the epoch, int64; `offset_min`: minutes that local time is ahead of UTC.
    Raises ValueError unless `slot_minutes` divides a day.
    """
    slots_per_day(slot_minutes)
    local = np.asarray(time_us, np.int64) // 60_000_000 + offset_min
    return np.where(np.equal(offset_min, NO_TIME), SLOTLESS, local % DAY_MINUTES // slot_minutes).astype(np.int64)


def descriptor_ids(
    day: npt.NDArray[np.integer], slot: Int64, slot_minutes: int, holiday: npt.NDArray[np.bool_]
) -> Int64:
    """The descriptor (...) of each group, 1 .. DESCRIPTORS - 1.

    `day`: local days since the epoch; `slot`: see `slots`; `holiday`: whether the day is a public holiday. A slot that
    is longer than a part of the day takes the part in which it starts; slot-less groups and slots of a day have none.
    Raises ValueError unless `slot_minutes` divides a day.

    Departs: the paper does not say where its time categories begin and end, nor does it name public holidays.
    """
    weekday = (np.asarray(day, np.int64) + 3) % 7  # 1970-01-01 was a Thursday: Monday comes first
    whole = (np.asarray(slot) == SLOTLESS) | (slots_per_day(slot_minutes) == 1)
    part = (np.searchsorted(_STARTS, slot * slot_minutes, side="right") - 1) % _WHOLE_DAY
    part = np.where(whole, _WHOLE_DAY, part)
    return (1 + (weekday * _COUNT + part) * 2 + holiday).astype(np.int64)


def descriptor_text(descriptor: int) -> str:
    """The words of a descriptor: "Wednesday morning rush hour, public holiday", "Sunday" for a whole day.

    Id 0, which no group has, is "no time".

    Raises ValueError outside 0 .. DESCRIPTORS - 1.
    """
    if not 0 <= descriptor < DESCRIPTORS:
        raise ValueError(f"descriptor: expected 0 .. {DESCRIPTORS - 1}, got {descriptor}")
    if descriptor == 0:
        return "no time"
    place, holiday = divmod(int(descriptor) - 1, 2)
    weekday, part = divmod(place, _COUNT)
    _, working, weekend = _PARTS[part]
    words = "" if part == _WHOLE_DAY else f" {weekend if weekday >= _WEEKEND else working}"
    return f"{_WEEKDAYS[weekday]}{words}{', public holiday' if holiday else ''}"


def gap_buckets(minutes: Int64) -> Int64:
    """The bucket (...) of the minutes since the group before: 0 where negative (there is none), else 1 + ceil(log2).

    A gap of 0 or 1 minute is bucket 1, one of more than 2^19 minutes (364 days) is GAPS - 1. The buckets do not depend
    on the slots' length. A day and a week stay in theirs when a change of the clock makes them longer or shorter.
    """
    bucket = 1 + np.searchsorted(_GAP_EDGES, minutes)
    return np.where(np.less(minutes, 0), 0, bucket).astype(np.int64)
