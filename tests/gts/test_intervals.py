"""Slots of the local day, what they are called, and the buckets of gaps."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from lum_ray.gts.intervals import (
    DESCRIPTORS,
    GAPS,
    NO_TIME,
    SLOTLESS,
    descriptor_ids,
    descriptor_text,
    gap_buckets,
    slots,
    slots_per_day,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DIVISORS = [minutes for minutes in range(1, 1441) if 1440 % minutes == 0]


def stored(moment: datetime) -> tuple[int, int]:
    """(UTC microseconds, minutes ahead of UTC) of an aware datetime."""
    offset = moment.utcoffset()
    assert offset is not None
    return (moment - EPOCH) // timedelta(microseconds=1), offset // timedelta(minutes=1)


def name(moment: datetime, slot_minutes: int, holiday: bool = False) -> str:
    """The descriptor's words of a local time without a zone."""
    day = (moment.date() - EPOCH.date()).days
    slot = (moment.hour * 60 + moment.minute) // slot_minutes
    return descriptor_text(int(descriptor_ids(np.array(day), np.array(slot), slot_minutes, np.array(holiday))))


@pytest.mark.parametrize("slot_minutes", DIVISORS)
def test_slots_are_those_of_the_wall_clock(slot_minutes: int) -> None:
    # days around both changes of the clock, a leap day, a time before the epoch, zones of whole and of odd hours
    moments = [
        datetime(*day, tzinfo=UTC).astimezone(ZoneInfo(zone)) + timedelta(minutes=minutes)
        for day in [(2024, 3, 10), (2024, 11, 3), (2024, 2, 29), (1969, 12, 31)]
        for zone in ["America/New_York", "Asia/Kathmandu", "UTC"]
        for minutes in range(0, 1500, 37)
    ]
    moments = [moment.astimezone(UTC).astimezone(moment.tzinfo) for moment in moments]
    time_us, offset = np.array([stored(moment) for moment in moments]).T
    expected = [(moment.hour * 60 + moment.minute) // slot_minutes for moment in moments]
    found = slots(time_us, offset, slot_minutes)
    assert found.tolist() == expected and found.dtype == np.int64
    assert max(expected) < slots_per_day(slot_minutes)


def test_the_edges_of_a_slot_and_of_midnight() -> None:
    midnight, minute = 20_000 * 86_400_000_000, 60_000_000
    times = np.array([midnight - 1, midnight, midnight + 15 * minute - 1, midnight + 15 * minute])
    assert slots(times, np.zeros(4, np.int64), 15).tolist() == [95, 0, 0, 1]
    assert slots(times, np.full(4, -15), 15).tolist() == [94, 95, 95, 0]
    assert slots(times, np.array([NO_TIME, 0, NO_TIME, 0]), 1440).tolist() == [SLOTLESS, 0, SLOTLESS, 0]
    assert slots(np.array([-1]), np.array([0]), 5).tolist() == [287]


@pytest.mark.parametrize("slot_minutes", [0, -15, 7, 25, 2880])
def test_a_slot_that_does_not_divide_a_day_is_named(slot_minutes: int) -> None:
    for call in (
        lambda: slots(np.array([0]), np.array([0]), slot_minutes),
        lambda: descriptor_ids(np.array([0]), np.array([0]), slot_minutes, np.array([False])),
    ):
        with pytest.raises(ValueError, match=rf"slot_minutes.* got {slot_minutes};"):
            call()


def test_a_day_reads_well() -> None:
    wednesday, saturday = datetime(2024, 5, 15), datetime(2024, 5, 18)
    expected = {
        0: ("night", "night"), 4: ("night", "night"), 5: ("early morning", "early morning"),
        7: ("morning rush hour", "morning"), 9: ("late morning", "late morning"), 12: ("lunchtime", "lunchtime"),
        14: ("afternoon", "afternoon"), 17: ("evening rush hour", "early evening"), 19: ("evening", "evening"),
        22: ("night", "night"), 23: ("night", "night"),
    }  # fmt: skip
    for hour, (working, weekend) in expected.items():
        assert name(wednesday.replace(hour=hour), 15) == f"Wednesday {working}"
        assert name(saturday.replace(hour=hour, minute=59), 15) == f"Saturday {weekend}"
    assert name(wednesday.replace(hour=6, minute=59), 5) == "Wednesday early morning"
    assert name(wednesday.replace(hour=8), 15, holiday=True) == "Wednesday morning rush hour, public holiday"
    assert name(datetime(2024, 2, 29, 12), 30) == "Thursday lunchtime"
    assert name(datetime(1969, 12, 28, 12), 30) == "Sunday lunchtime"


def test_long_slots_take_the_part_in_which_they_start_and_whole_days_none() -> None:
    day = datetime(2024, 5, 19)
    assert [name(day.replace(hour=hour), 180) for hour in (0, 5, 8, 11, 14, 17, 20, 23)] == [
        "Sunday night", "Sunday night", "Sunday early morning", "Sunday late morning", "Sunday lunchtime",
        "Sunday afternoon", "Sunday early evening", "Sunday evening",
    ]  # fmt: skip
    assert [name(day.replace(hour=hour), 720) for hour in (11, 12)] == ["Sunday night", "Sunday lunchtime"]
    assert name(day.replace(hour=8), 1440) == "Sunday"
    number = (day.date() - date(1970, 1, 1)).days
    slotless = descriptor_ids(np.array([number]), np.array([SLOTLESS]), 15, np.array([True]))
    assert descriptor_text(int(slotless[0])) == "Sunday, public holiday"


def test_every_descriptor_is_reached_and_has_words_of_its_own() -> None:
    day, slot, holiday = (a.ravel() for a in np.meshgrid(np.arange(7), np.arange(-1, 288), [False, True]))
    assert np.unique(descriptor_ids(day, slot, 5, holiday)).tolist() == list(range(1, DESCRIPTORS))
    assert len({descriptor_text(number) for number in range(DESCRIPTORS)}) == DESCRIPTORS
    for outside in (-1, DESCRIPTORS):
        with pytest.raises(ValueError, match=f"got {outside}"):
            descriptor_text(outside)


def test_gap_buckets_double() -> None:
    minutes = np.array([-1, 0, 1, 2, 3, 4, 5, 15, 16, 17, 524_287, 524_288, 524_289, 10**9])
    assert gap_buckets(minutes).tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 20, 20, GAPS - 1, GAPS - 1]
    for length in (1440, 10_080):  # a day and a week, also when the clock changes within
        assert len(set(gap_buckets(length + np.array([-60, 0, 60])).tolist())) == 1
