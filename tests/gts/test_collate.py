"""Integer tokens, targets and seen items: equal to plain loops on small random worlds, and to cases solved by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from itertools import groupby
from typing import Any, Literal
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lum_ray.data.rows import Rows, Samples, hash_strings, mix
from lum_ray.gts.collate import (
    BEHAVIOUR,
    DESCRIPTOR,
    PAD,
    RECENT,
    SEP,
    dense_targets,
    next_items,
    seen_items,
    token_arrays,
)
from lum_ray.gts.intervals import NO_TIME, SLOTLESS, descriptor_ids, descriptor_text, gap_buckets

NAMES = ["a", "b", "c", "d", "again", "x", "y"]
HASHES = [int(h) for h in hash_strings(NAMES).view(np.int64)]
# two ids of one item, so that it can come twice in an instant; x and y are in no catalogue
PLACE = {**{hashed: place for place, hashed in enumerate(HASHES[:4])}, HASHES[4]: 0}
DAY_US, MINUTE_US = 86_400_000_000, 60_000_000


def index_of(hashes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.array([PLACE.get(int(hashed), -1) for hashed in hashes], np.int64)


@dataclass(frozen=True)
class Event:
    day: int
    time_us: int
    offset: int
    item: int  # hash

    @property
    def timed(self) -> bool:
        return self.offset != NO_TIME

    @property
    def instant(self) -> tuple[int, int, bool]:
        return self.day, self.time_us, self.timed


def timed(minute: int, offset: int, name: str) -> Event:
    return Event((minute + offset) // 1440, minute * MINUTE_US, offset, HASHES[NAMES.index(name)])


def dated(day: int, name: str) -> Event:
    return Event(day, day * DAY_US, NO_TIME, HASHES[NAMES.index(name)])


def at(zone: str, text: str, name: str, fold: int = 0) -> Event:
    """An event by the clock on the wall, e.g. "2024-11-03 01:30"."""
    moment = datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold)
    offset = moment.utcoffset()
    assert offset is not None
    return timed(int(moment.timestamp()) // 60, int(offset.total_seconds()) // 60, name)


def day_of(text: str) -> int:
    return (date.fromisoformat(text) - date(1970, 1, 1)).days


def rows_of(users: Sequence[Sequence[Event]], end_days: Sequence[int]) -> Rows:
    """Rows as the sequences artifact has them: in its order, the same item at the same instant once."""

    def order(event: Event) -> tuple[int, bool, int, int]:
        return event.day, not event.timed, event.time_us, int(mix(event.item, event.time_us))

    kept = [sorted(set(user), key=order) for user in users]
    flat = [event for user in kept for event in user]
    return Rows(
        user=np.array([f"u{i}" for i in range(len(users))], object),
        user_hash=np.arange(len(users), dtype=np.uint64),
        offsets=np.cumsum([0, *map(len, kept)]).astype(np.int64),
        days=np.array([event.day for event in flat], np.int32),
        values=np.array([(e.item, e.time_us, e.offset) for e in flat], np.int64).reshape(-1, 3),
        first_day=np.zeros(len(users), np.int32),
        end_day=np.array(end_days, np.int32),
        segment=np.full(len(users), "", object),
        profile={},
    )


def samples_of(*pairs: tuple[int, int]) -> Samples:
    row, cut = np.array(pairs, np.int64).reshape(-1, 2).T
    return Samples(row, cut.astype(np.int32), np.zeros(len(row), np.int32))


# The same by plain loops.


def events_of(rows: Rows, row: int) -> list[Event]:
    span = range(int(rows.offsets[row]), int(rows.offsets[row + 1]))
    return [Event(int(rows.days[a]), *(int(v) for v in rows.values[a][[1, 2, 0]])) for a in span]


def slot_of(event: Event, slot_minutes: int) -> int:
    return (event.time_us // MINUTE_US + event.offset) % 1440 // slot_minutes if event.timed else SLOTLESS


def groups_of(events: list[Event], slot_minutes: int) -> list[list[Event]]:
    return [list(some) for _, some in groupby(events, lambda e: (e.day, slot_of(e, slot_minutes)))]


def gap_of(group: list[Event], earlier: list[Event] | None, slot_minutes: int) -> int:
    if earlier is None:
        return 0
    now, then = group[0], earlier[0]
    if now.timed and then.timed:
        starts = [e.day * 1440 + slot_of(e, slot_minutes) * slot_minutes - e.offset for e in (now, then)]
        minutes = starts[0] - starts[1]
    else:
        minutes = (now.day - then.day) * 1440
    return int(gap_buckets(np.array(max(minutes, 0))))


@dataclass
class Plain:
    """One sample by the definitions."""

    groups: list[list[Event]]  # all, of known events before the cut
    first_kept: int
    tokens: list[tuple[int, int, int, int, int, int]]  # kind, item, descriptor, slot, gap, group
    counts: tuple[int, int, int]  # known events, kept behaviours, unknown events


def plain(rows: Rows, row: int, cut: int, holidays: set[int], slot_minutes: int, max_tokens: int, layout: str) -> Plain:
    seen = [event for event in events_of(rows, row) if event.day < cut]
    known = [event for event in seen if event.item in PLACE]
    groups = groups_of(known, slot_minutes)
    extra = 2 if layout == "full" else 0
    first, used = len(groups), 0
    while first > 0 and used + len(groups[first - 1]) + extra <= max_tokens:
        first -= 1
        used += len(groups[first]) + extra
    kept = groups[first:]
    if groups and not kept:
        first = len(groups) - 1
        kept = [groups[-1][-(max_tokens - extra) :]]
    tokens = []
    for number, group in enumerate(kept):
        place = first + number
        slot = slot_of(group[0], slot_minutes)
        code = 1440 // slot_minutes if slot == SLOTLESS else slot
        gap = gap_of(groups[place], groups[place - 1] if place else None, slot_minutes)
        rest = (code, gap, number)
        holiday = np.array(group[0].day in holidays)
        descriptor = int(descriptor_ids(np.array(group[0].day), np.array(slot), slot_minutes, holiday))
        tokens += [(DESCRIPTOR, -1, descriptor, *rest)] if extra else []
        tokens += [(BEHAVIOUR, PLACE[event.item], 0, *rest) for event in group]
        tokens += [(SEP, -1, 0, *rest)] if extra else []
    return Plain(groups, first, tokens, (len(known), sum(map(len, kept)), len(seen) - len(known)))


def plain_next(rows: Rows, row: int, cut: int, until: int) -> list[int]:
    after = [event for event in events_of(rows, row) if event.day >= cut and event.item in PLACE]
    if not after or after[0].day >= min(until, int(rows.end_day[row])):
        return []
    return sorted({PLACE[event.item] for event in after if event.instant == after[0].instant})


def plain_dense(sample: Plain) -> list[tuple[int, int]]:
    found = []
    for number, group in enumerate(sample.groups[sample.first_kept + 1 :]):
        found += [(number, item) for item in {PLACE[e.item] for e in group if e.instant == group[0].instant}]
    return sorted(found)


def plain_seen(sample: Plain, which: str) -> list[tuple[int, ...]]:
    """(group, item, count, since, instants, and of the latest RECENT ones) of each query."""
    found = []
    for last in range(sample.first_kept, len(sample.groups)):
        if which == "last" and last < len(sample.groups) - 1:
            continue
        history = [event for group in sample.groups[: last + 1] for event in group]
        instants = [{PLACE[e.item] for e in some} for _, some in groupby(history, lambda e: e.instant)]
        for item in range(len(PLACE)):
            held = [number for number, items in enumerate(instants) if item in items]
            if held:
                since = len(instants) - held[-1]
                recent = (sum(number >= len(instants) - window for number in held) for window in RECENT)
                found.append((last - sample.first_kept, item, len(held), since, len(instants), *recent))
    return sorted(found)


@st.composite
def histories(draw: st.DrawFn, first_day: int = 0, end_day: int = 6) -> list[Event]:
    """Few instants, so that many tie; the clock may change once, by an hour in either direction."""
    offset = draw(st.sampled_from([0, -300, 345, 840]))
    change, jump = draw(st.integers(0, 8640)), draw(st.sampled_from([0, 60, -60]))
    coarse = draw(st.sampled_from([1, 7, 30, 720]))
    events = []
    for _ in range(draw(st.integers(0, 14))):
        name = draw(st.sampled_from(NAMES))
        minute = draw(st.integers(-1, 8640 // coarse)) * coarse
        if draw(st.booleans()):
            events.append(timed(minute, offset + (jump if minute >= change else 0), name))
        else:
            events.append(dated(minute // 1440, name))
    return [event for event in events if first_day <= event.day < end_day]


SLOTS = st.sampled_from([5, 15, 30, 60, 180, 1440])
LAYOUTS: st.SearchStrategy[Literal["full", "none"]] = st.sampled_from(["full", "none"])
WORLDS = st.lists(st.tuples(histories(), st.integers(0, 7)), min_size=1, max_size=4)
PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 7)), max_size=6)
BLANK = (PAD, -1, 0, 0, 0, -1)
COLUMNS = ("kind_BL", "item_BL", "descriptor_BL", "slot_BL", "gap_BL", "group_BL")


@settings(deadline=None, max_examples=300)
@given(WORLDS, PAIRS, st.sets(st.integers(-1, 6)), SLOTS, st.integers(3, 24), LAYOUTS, st.integers(0, 8))
def test_everything_equals_plain_loops(
    world: list[tuple[list[Event], int]],
    pairs: list[tuple[int, int]],
    holidays: set[int],
    slot_minutes: int,
    max_tokens: int,
    layout: Literal["full", "none"],
    until: int,
) -> None:
    rows = rows_of([user for user, _ in world], [end for _, end in world])
    pairs = [(row % len(world), cut) for row, cut in pairs]
    samples = samples_of(*pairs)
    free = np.array(sorted(holidays), np.int64)
    tokens = token_arrays(rows, samples, index_of, free, slot_minutes, max_tokens, layout)
    assert all(array.dtype == np.int64 for array in tokens.values())
    expected = [plain(rows, row, cut, holidays, slot_minutes, max_tokens, layout) for row, cut in pairs]
    for number, sample in enumerate(expected):
        found = list(zip(*(tokens[name][number].tolist() for name in COLUMNS)))
        assert found == sample.tokens + [BLANK] * (max_tokens - len(sample.tokens))
        assert tokens["length_B"][number] == len(sample.tokens)
        assert tuple(int(tokens[name][number]) for name in ("events_B", "kept_B", "unknown_B")) == sample.counts

    row_T, item_T = next_items(rows, samples, index_of, until)
    assert list(zip(row_T.tolist(), item_T.tolist())) == [
        (number, item) for number, (row, cut) in enumerate(pairs) for item in plain_next(rows, row, cut, until)
    ]
    dense = dense_targets(rows, samples, index_of, slot_minutes, tokens)
    assert list(zip(*(array.tolist() for array in dense))) == [
        (number, *target) for number, sample in enumerate(expected) for target in plain_dense(sample)
    ]
    for groups in ("last", "all"):
        seen = seen_items(rows, samples, index_of, slot_minutes, tokens, groups)
        columns = [column for array in seen.values() for column in np.atleast_2d(array.T).tolist()]
        assert sorted(zip(*columns)) == [
            (number, *entry) for number, sample in enumerate(expected) for entry in plain_seen(sample, groups)
        ]
        assert all(array.dtype == np.int64 for array in seen.values())
        some = seen_items(rows, samples, index_of, slot_minutes, tokens, groups, only=np.array([3, 1]))
        asked = np.isin(seen["item_S"], [1, 3])
        assert all(some[name].tolist() == array[asked].tolist() for name, array in seen.items())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(histories(), histories()), min_size=1, max_size=3), st.integers(0, 6), SLOTS)
def test_nothing_at_or_after_the_cut_changes_an_input(
    worlds: list[tuple[list[Event], list[Event]]], cut: int, slot_minutes: int
) -> None:
    samples = samples_of(*((row, cut) for row in range(len(worlds))))
    found = []
    for future in (lambda old, new: old, lambda old, new: new, lambda old, new: []):
        users = [[e for e in old if e.day < cut] + [e for e in future(old, new) if e.day >= cut] for old, new in worlds]
        rows = rows_of(users, [7] * len(users))
        tokens = token_arrays(rows, samples, index_of, np.array([2]), slot_minutes, 12)
        seen = [seen_items(rows, samples, index_of, slot_minutes, tokens, groups) for groups in ("last", "all")]
        found.append(tokens | seen[0] | {f"all {name}": array for name, array in seen[1].items()})
    for other in found[1:]:
        for name, array in found[0].items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


def read(tokens: dict[str, Any], sample: int = 0) -> list[str]:
    """A sample's tokens as words: descriptors by their text, behaviours by name and slot."""
    words = []
    for place in range(int(tokens["length_B"][sample])):
        kind, item, descriptor, slot = (int(tokens[name][sample, place]) for name in COLUMNS[:4])
        words.append({DESCRIPTOR: descriptor_text(descriptor), SEP: "|", BEHAVIOUR: f"{NAMES[item]}{slot}"}[kind])
    return words


def tokens_of(
    events: list[Event], cut: str, slot_minutes: int, max_tokens: int = 30, holidays: Sequence[str] = ()
) -> dict[str, Any]:
    free = np.array([day_of(day) for day in holidays], np.int64)
    rows = rows_of([events], [2**31 - 1])
    return token_arrays(rows, samples_of((0, day_of(cut))), index_of, free, slot_minutes, max_tokens)


def test_an_hour_that_is_skipped_is_no_time_passed() -> None:
    zone = "America/New_York"
    tokens = tokens_of([at(zone, "2024-03-10 01:45", "a"), at(zone, "2024-03-10 03:00", "b")], "2024-03-11", 15)
    assert read(tokens) == ["Sunday night", "a7", "|", "Sunday night", "b12", "|"]
    assert tokens["gap_BL"][0, :6].tolist() == [0] * 3 + [int(gap_buckets(np.array(15)))] * 3


def test_an_hour_that_is_repeated_stays_in_time_order() -> None:
    zone = "America/New_York"
    events = [
        at(zone, "2024-11-03 01:10", "a"), at(zone, "2024-11-03 01:50", "b"),
        at(zone, "2024-11-03 01:10", "c", fold=1), at(zone, "2024-11-03 02:05", "d"),
    ]  # fmt: skip
    tokens = tokens_of(events, "2024-11-04", 15)
    night = "Sunday night"
    assert read(tokens) == [night, "a4", "|", night, "b7", "|", night, "c4", "|", night, "d8", "|"]
    assert tokens["gap_BL"][0, [0, 3, 6, 9]].tolist() == [0, *gap_buckets(np.array([45, 15, 60])).tolist()]
    # in slots of an hour both passes are one group; of a day, all is
    assert read(tokens_of(events, "2024-11-04", 60)) == [night, "a1", "b1", "c1", "|", night, "d2", "|"]
    assert read(tokens_of(events, "2024-11-04", 1440)) == ["Sunday", "a0", "b0", "c0", "d0", "|"]


def test_a_clock_that_goes_back_past_midnight_is_no_gap() -> None:
    # days come first in the order: what is an hour later on the clock of the day before stands in front
    midnight = day_of("2024-10-04") * 1440
    tokens = tokens_of([timed(midnight + 90, -120, "b"), timed(midnight + 30, 0, "a")], "2024-10-05", 15)
    assert read(tokens) == ["Thursday night", "b94", "|", "Friday night", "a2", "|"]
    assert tokens["gap_BL"][0, [0, 3]].tolist() == [0, gap_buckets(np.array(0))]


def test_leap_day_midnight_holiday_and_mixed_granularity() -> None:
    zone = "Asia/Kathmandu"  # 5:45 ahead: the UTC day is another
    events = [
        at(zone, "2024-02-28 23:59", "a"), at(zone, "2024-02-29 00:00", "b"), dated(day_of("2024-02-29"), "c"),
        at(zone, "2024-02-29 07:14", "x"), at(zone, "2024-03-01 00:00", "d"),
    ]  # fmt: skip
    tokens = tokens_of(events, "2024-03-01", 5, holidays=["2024-02-28", "2024-02-29"])
    assert read(tokens) == [
        "Wednesday night, public holiday", "a287", "|", "Thursday night, public holiday", "b0", "|",
        "Thursday, public holiday", "c288", "|",
    ]  # fmt: skip
    assert tokens["gap_BL"][0, [0, 3, 6]].tolist() == [0, *gap_buckets(np.array([5, 0])).tolist()]
    assert [int(tokens[name][0]) for name in ("length_B", "events_B", "kept_B", "unknown_B")] == [9, 3, 3, 1]
    assert read(tokens_of(events, "2024-02-29", 5)) == ["Wednesday night", "a287", "|"]


def test_the_newest_is_kept_in_whole_groups() -> None:
    days = ["2024-05-13", "2024-05-14", "2024-05-15"]
    events = [dated(day_of(day), name) for day, names in zip(days, ["a", "ab", "abc"]) for name in names]
    full = ["Monday", "|", "Tuesday", "|", "Wednesday", "|"]
    for max_tokens, first, behaviours in [
        (12, 0, 6),
        (11, 1, 5),
        (9, 1, 5),
        (8, 2, 3),
        (5, 2, 3),
        (4, 2, 2),
        (3, 2, 1),
    ]:
        tokens = tokens_of(events, "2024-05-16", 15, max_tokens)
        assert [word for word in read(tokens) if not word.endswith("96")] == full[2 * first :]
        assert tokens["kept_B"].tolist() == [behaviours] and tokens["events_B"].tolist() == [6]
        assert tokens["gap_BL"][0, 0] == (0 if first == 0 else gap_buckets(np.array(1440)))  # it knows what was cut off
    newest = rows_of([events], [30_000]).values[-1, 0]
    assert NAMES[tokens["item_BL"][0, 1]] == NAMES[HASHES.index(int(newest))]
    for too_few, layout in [(2, "full"), (0, "none")]:
        with pytest.raises(ValueError, match=rf"max_tokens.*got {too_few}"):
            token_arrays(rows_of([], []), samples_of(), index_of, np.array([]), 15, too_few, layout)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layout.*'text'"):
        token_arrays(rows_of([], []), samples_of(), index_of, np.array([]), 15, 9, "text")  # type: ignore[arg-type]


def test_one_event_and_none() -> None:
    rows = rows_of([[], [dated(5, "b")], [dated(5, "x")]], [9, 9, 9])
    samples = samples_of((0, 9), (1, 6), (1, 5), (2, 9))
    tokens = token_arrays(rows, samples, index_of, np.zeros(0, np.int64), 15, 10)
    assert tokens["length_B"].tolist() == [0, 3, 0, 0]
    assert tokens["unknown_B"].tolist() == [0, 0, 0, 1]
    assert [array.tolist() for array in next_items(rows, samples, index_of, 9)] == [[2], [1]]
    assert [array.tolist() for array in next_items(rows, samples, index_of, 5)] == [[], []]
    assert all(len(array) == 0 for array in dense_targets(rows, samples, index_of, 15, tokens))
    seen = seen_items(rows, samples, index_of, 15, tokens, "all")
    assert [array.tolist() for array in seen.values()] == [[1], [0], [1], [1], [1], [1], [[1, 1, 1, 1]]]
    with pytest.raises(ValueError, match=r"groups.*'first'"):
        seen_items(rows, samples, index_of, 15, tokens, "first")  # type: ignore[arg-type]


def test_the_next_basket_is_one_instant() -> None:
    noon = 10 * 1440 + 720
    timed_first = [dated(10, "a"), timed(noon, 0, "b"), timed(noon, 0, "c"), timed(noon + 1, 0, "d")]
    rows = rows_of([timed_first, [dated(10, "a"), dated(10, "b"), dated(11, "c")]], [12, 12])
    samples = samples_of((0, 10), (1, 10), (1, 11), (0, 11))
    assert [array.tolist() for array in next_items(rows, samples, index_of, 99)] == [[0, 0, 1, 1, 2], [1, 2, 0, 1, 2]]


def test_a_count_is_one_of_instants_and_reaches_behind_what_was_cut_off() -> None:
    events = [timed(day * 1440, 0, name) for day, names in enumerate(["a", "ab", "b", "c"]) for name in names]
    rows, samples = rows_of([events], [9]), samples_of((0, 9))
    tokens = token_arrays(rows, samples, index_of, np.zeros(0, np.int64), 15, 6)
    assert read(tokens) == ["Saturday night", "b0", "|", "Sunday night", "c0", "|"]
    seen = seen_items(rows, samples, index_of, 15, tokens, "all")
    assert list(zip(*(array.tolist() for array in list(seen.values())[1:]))) == [
        (0, 0, 2, 2, 3, [1, 2, 2, 2]), (1, 0, 2, 3, 4, [0, 2, 2, 2]),  # a: twice, last at the second instant
        (0, 1, 2, 1, 3, [2, 2, 2, 2]), (1, 1, 2, 2, 4, [1, 2, 2, 2]),  # b: twice, last at the third
        (1, 2, 1, 1, 4, [1, 1, 1, 1]),
    ]  # fmt: skip
    row_T, group_T, item_T = dense_targets(rows, samples, index_of, 15, tokens)
    assert (row_T.tolist(), group_T.tolist(), item_T.tolist()) == ([0], [0], [2])
