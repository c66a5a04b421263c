"""From a user's events to integer tokens, targets and what was seen before: pure functions of rows and samples.

Rows hold one row per event: `days` the local day, `values` item hash, UTC microseconds, minutes ahead of UTC (NO_TIME
for day-granular events), in time order. Events of unknown items are dropped before anything else is done.

Groups: the events of one slot of one local day. Where the clock is set back a slot comes twice in a day; these are two
groups, since one group of both would hold events that are later than the next group's (so a group is a *run* of events
of one day and slot). Slot-less groups come after their day's slots. Instants: events of the same day, time and
granularity.

Shapes: B samples, L tokens, A events, K known events, G groups of all rows, T targets, S seen items. In results a group
is its number counted from the oldest kept group of its sample, and a sample is its position in `samples`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from lum_ray.data.rows import Int64, Rows, Samples, expand
from lum_ray.data.times import NO_TIME
from lum_ray.gts.intervals import DAY_MINUTES, SLOTLESS, descriptor_ids, gap_buckets, slots, slots_per_day

PAD: Final = 0
DESCRIPTOR: Final = 1
BEHAVIOUR: Final = 2
SEP: Final = 3

IndexOf = Callable[[Int64], Int64]
"""Item hashes (M,) to positions in the catalogue (M,), -1 where unknown."""
Layout = Literal["full", "none"]
Bool = npt.NDArray[np.bool_]

RECENT: Final = (2, 5, 12, 30)
"""Of how many of the latest instants `seen_items` counts those with the item."""

_EARLIEST = np.iinfo(np.int32).min


@dataclass(frozen=True)
class _Runs:
    """Numbered runs of consecutive events that belong together, of all rows, ascending."""

    of_K: Int64  # the run of each event
    start: Int64  # the first event of each run, and K behind them

    @staticmethod
    def of(new_K: Bool) -> _Runs:
        """A run starts where `new_K`."""
        return _Runs(
            np.cumsum(new_K, dtype=np.int64) - 1, np.append(np.flatnonzero(new_K), len(new_K)).astype(np.int64)
        )


@dataclass(frozen=True)
class _Events:
    """The known events of rows: `rows` holds only them."""

    rows: Rows
    item_K: Int64
    known_before: Int64  # (A + 1,) how many of the rows' first a events are known
    new_row_K: Bool
    new_day_K: Bool

    @staticmethod
    def of(rows: Rows, index_of: IndexOf) -> _Events:
        item = index_of(rows.values[:, 0])
        known = item >= 0
        before = np.concatenate([[0], np.cumsum(known)]).astype(np.int64)
        offsets = before[rows.offsets]
        if before[-1] < len(item):
            rows = replace(rows, offsets=offsets, days=rows.days[known], values=rows.values[known])
            item = item[known]
        new_row = np.zeros(len(item) + 1, np.bool_)
        new_row[offsets[:-1]] = (
            True  # a row without events marks its neighbour's start, or the place behind the last event
        )
        new_row = new_row[: len(item)]
        return _Events(rows, item.astype(np.int64), before, new_row, new_row | _changes(rows.days))

    def instants(self) -> _Runs:
        time_us, offset = self.rows.values[:, 1], self.rows.values[:, 2]
        return _Runs.of(self.new_day_K | _changes(time_us) | _changes(offset == NO_TIME))

    def groups(self, slot_K: Int64) -> _Runs:
        return _Runs.of(self.new_day_K | _changes(slot_K))

    def slots(self, slot_minutes: int) -> Int64:
        return slots(self.rows.values[:, 1], self.rows.values[:, 2], slot_minutes)

    def before(self, samples: Samples) -> tuple[Int64, Int64]:
        """The known events [begin, end) (B,) before each sample's cut."""
        return self.rows.span(samples.row, _EARLIEST, samples.cut)


def _changes(values: npt.NDArray[np.generic]) -> Bool:
    """Where a value differs from the one before it; the first counts as different."""
    changed = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=changed[1:])
    return changed


def _last_groups(groups: _Runs, begin_B: Int64, end_B: Int64) -> Int64:
    """The group of the last event in [begin, end) (B,), -1 where there is none."""
    last = np.full(len(end_B), -1, np.int64)
    some = end_B > begin_B
    last[some] = groups.of_K[end_B[some] - 1]
    return last


def _gaps(events: _Events, groups: _Runs, slot_K: Int64, slot_minutes: int, group: Int64) -> Int64:
    """For each of `group` (...) the bucket of the time from the start of its user's group before to its own start.

    A group starts where its slot does, and the time is what really passed, whatever the clock did. Where one of the two
    is slot-less, only days are known: whole days.
    """
    own, before = groups.start[group], groups.start[np.maximum(group - 1, 0)]
    day_own, day_before = (events.rows.days[event].astype(np.int64) for event in (own, before))
    start_own, start_before = (
        day * DAY_MINUTES + slot_K[event] * slot_minutes - events.rows.values[event, 2]
        for day, event in ((day_own, own), (day_before, before))
    )
    vague = (slot_K[own] == SLOTLESS) | (slot_K[before] == SLOTLESS)
    minutes = np.where(vague, (day_own - day_before) * DAY_MINUTES, start_own - start_before)
    # a traveller's clock can lie behind that of the group before
    return gap_buckets(np.where(events.new_row_K[own], -1, np.maximum(minutes, 0)))


def token_arrays(
    rows: Rows,
    samples: Samples,
    index_of: IndexOf,
    holidays: Int64,
    slot_minutes: int,
    max_tokens: int,
    layout: Layout = "full",
) -> dict[str, Int64]:
    """The tokens of each sample's history: per group [descriptor] behaviour* [SEP], newest kept, at most `max_tokens`.

    Whole groups are kept; if the newest group alone is too long, its newest behaviours are, with descriptor and SEP.
    `holidays`: sorted local days (H,). `layout` "none": behaviours only. All arrays are int64; tokens lie on the left:

    - kind_BL: PAD, DESCRIPTOR, BEHAVIOUR or SEP;
    - item_BL: position in the catalogue, -1 if no behaviour;
    - descriptor_BL: see `intervals.descriptor_ids`, 0 if no descriptor;
    - slot_BL: the group's slot of the day, `intervals.slots_per_day` for slot-less groups; 0 on pads;
    - gap_BL: see `intervals.gap_buckets`; the group before may be one that was cut off; 0 on pads;
    - group_BL: the number of the group, counted from the oldest kept one, -1 on pads;
    - length_B: tokens; kept_B: behaviours among them; events_B: known events before the cut; unknown_B: unknown ones.

    Raises ValueError where `slot_minutes` does not divide a day, `max_tokens` leaves no room for a behaviour or
    `layout` is neither of the two.

    Source: GTS-LUM, timestamp processing: {tds_1, b_1, b_2, ..., [SEP], tds_2, ...}, at most 240 tokens.
    Departs: only a newest group that is too long is cut inside, so that a descriptor stands before all of its slot.
    """
    if layout not in ("full", "none"):
        raise ValueError(f"layout: expected full or none, got {layout!r}")
    extra = 2 if layout == "full" else 0  # tokens of a group that are no behaviours
    if max_tokens < 1 + extra:
        raise ValueError(f"max_tokens: expected at least {1 + extra} for the layout {layout!r}, got {max_tokens}")
    events = _Events.of(rows, index_of)
    slot_K = events.slots(slot_minutes)
    groups = events.groups(slot_K)
    begin, end = events.before(samples)
    all_begin, all_end = rows.span(samples.row, _EARLIEST, samples.cut)

    # how long the tokens of all groups before group g are (G + 1,), to find the oldest group that still has room
    cost = groups.start + extra * np.arange(len(groups.start))
    last = _last_groups(groups, begin, end)
    room = np.searchsorted(cost, cost[last + 1] - max_tokens)
    own = np.append(groups.of_K, len(groups.start) - 1)[begin]  # the user's first group
    oldest = np.where(end > begin, np.clip(np.maximum(room, own), None, last), 0)
    first = np.where(end > begin, np.maximum(groups.start[oldest], end - (max_tokens - extra)), end)
    # only a newest group that is too long can lose events, since older ones have room or are left out

    sample_K, event = expand(first, end)
    group_K = groups.of_K[event] - oldest[sample_K]
    place_K = event - first[sample_K] + group_K * extra + extra // 2
    sample_G, group = expand(oldest, last + 1)
    slot_G, day_G = slot_K[groups.start[group]], events.rows.days[groups.start[group]]
    shape = (len(samples), max_tokens)
    kind, descriptor = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    item = np.full(shape, -1, np.int64)
    kind[sample_K, place_K] = BEHAVIOUR
    item[sample_K, place_K] = events.item_K[event]
    size = np.minimum(groups.start[group + 1], end[sample_G]) - np.maximum(groups.start[group], first[sample_G]) + extra
    length_B = np.where(end > begin, end - first + extra * (last + 1 - oldest), 0)
    if layout == "full":
        begin_G = np.maximum(groups.start[group], first[sample_G]) - first[sample_G]
        begin_G += extra * (group - oldest[sample_G])
        kind[sample_G, begin_G] = DESCRIPTOR
        kind[sample_G, begin_G + size - 1] = SEP
        holiday = np.isin(day_G, holidays)
        descriptor[sample_G, begin_G] = descriptor_ids(day_G, slot_G, slot_minutes, holiday)

    slot, gap, number = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    used = np.arange(max_tokens) < length_B[:, None]  # in row order these are the groups' tokens, one after the other
    slot[used] = np.repeat(np.where(slot_G == SLOTLESS, slots_per_day(slot_minutes), slot_G), size)
    gap[used] = np.repeat(_gaps(events, groups, slot_K, slot_minutes, group), size)
    number[used] = np.repeat(group - oldest[sample_G], size)
    visible = all_end - all_begin
    return {
        "kind_BL": kind,
        "item_BL": item,
        "descriptor_BL": descriptor,
        "slot_BL": slot,
        "gap_BL": gap,
        "group_BL": number,
        "length_B": length_B,
        "events_B": end - begin,
        "kept_B": end - first,
        "unknown_B": visible - (end - begin),
    }


def _distinct(sample_T: Int64, group_T: Int64, item_T: Int64) -> tuple[Int64, Int64, Int64]:
    """Each (sample, group, item) once, sorted."""
    order = np.lexsort((item_T, group_T, sample_T))
    sample_T, group_T, item_T = sample_T[order], group_T[order], item_T[order]
    keep = _changes(sample_T) | _changes(group_T) | _changes(item_T)
    return sample_T[keep], group_T[keep], item_T[keep]


def next_items(rows: Rows, samples: Samples, index_of: IndexOf, until_day: int) -> tuple[Int64, Int64]:
    """What comes next: (sample (T,), item (T,)), the distinct known items at the first instant on or after each cut.

    Sorted. Day-granular items of a day are one instant, after the day's timed ones. A sample has none if that instant's
    day is not before min(`until_day`, the user's end). Events of unknown items are passed over.
    """
    events = _Events.of(rows, index_of)
    instants = events.instants()
    until = np.minimum(rows.end_day[samples.row].astype(np.int64), until_day)
    begin, end = events.rows.span(samples.row, samples.cut, until)
    some = np.flatnonzero(end > begin)
    begin = begin[some]  # an instant begins here, since a cut never lies within a day
    which, event = expand(begin, instants.start[instants.of_K[begin] + 1])
    sample_T, _, item_T = _distinct(some[which], np.zeros_like(which), events.item_K[event])
    return sample_T, item_T


def dense_targets(
    rows: Rows, samples: Samples, index_of: IndexOf, slot_minutes: int, tokens: dict[str, Int64]
) -> tuple[Int64, Int64, Int64]:
    """What comes next within the history: (sample (T,), group (T,), item (T,)), distinct and sorted.

    For each kept group but a sample's last: the items at the first instant after it, which is the first instant of the
    next group. `tokens`: what `token_arrays` gave for the same rows, samples and slots.

    Departs: the paper supervises the end of the sequence only.
    """
    events = _Events.of(rows, index_of)
    groups, instants = events.groups(events.slots(slot_minutes)), events.instants()
    last = _last_groups(groups, *events.before(samples))
    kept = tokens["group_BL"].max(axis=1) + 1
    sample, group = expand(last - kept + 2, last + 1)  # all kept groups but the oldest
    begin = groups.start[group]
    which, event = expand(begin, instants.start[instants.of_K[begin] + 1])
    number = group - (last - kept + 1)[sample] - 1
    return _distinct(sample[which], number[which], events.item_K[event])


def seen_items(
    rows: Rows,
    samples: Samples,
    index_of: IndexOf,
    slot_minutes: int,
    tokens: dict[str, Int64],
    groups: Literal["last", "all"],
    only: Int64 | None = None,
) -> dict[str, Int64]:
    """Which items a user has had, how often and how long ago, at the end of the last kept group or of all kept groups.

    The history of a query (sample, kept group) is every known event up to the end of that group, those before the
    oldest kept group among them. One entry for each distinct item of it, int64, by sample, then item, then group:

    - query_sample_S, query_group_S, item_S;
    - count_S: instants with the item; since_S: instants since it was last seen (1: in the last one);
    - instants_S: instants of the history;
    - recent_SW: of its latest RECENT instants, those with the item.

    `tokens`: what `token_arrays` gave for the same rows, samples and slots. `only`: the items (M,) that are asked for;
    without it "all" has as many entries as queries times items, which for long histories is most of a batch's memory.
    Raises ValueError for other `groups`.

    Departs: the paper has no such features; attention over 240 tokens cannot count a whole history.
    """
    if groups not in ("last", "all"):
        raise ValueError(f"groups: expected last or all, got {groups!r}")
    events = _Events.of(rows, index_of)
    runs, instants = events.groups(events.slots(slot_minutes)), events.instants()
    last = _last_groups(runs, *events.before(samples))
    kept = tokens["group_BL"].max(axis=1) + 1
    oldest = last - kept + 1

    # an occurrence is a (row, item, instant); sorted by these
    offsets = events.rows.offsets
    row_K = np.repeat(np.arange(len(rows), dtype=np.int64), np.diff(offsets))
    key_K = row_K * (events.item_K.max(initial=0) + 1) + events.item_K
    order = np.argsort(key_K, kind="stable")  # within an item the events stay in time order
    new_item = _changes(key_K[order])
    occurs = new_item | _changes(instants.of_K[order])
    order, new_item = order[occurs], new_item[occurs]
    before = np.concatenate([[0], np.cumsum(occurs)]).astype(np.int64)
    place = np.arange(len(order))
    first_place = np.maximum.accumulate(np.where(new_item, place, 0))
    count = place - first_place + 1
    group = runs.of_K[order]
    # it is the item's latest occurrence from the end of its group until the group in which the item comes again
    until = np.full(len(order), np.iinfo(np.int64).max)
    until[:-1] = np.where(new_item[1:], until[:-1], group[1:])

    sample, occurrence = expand(before[offsets[samples.row]], before[offsets[samples.row + 1]])
    if only is not None:
        wanted = np.isin(events.item_K[order], only)[occurrence]
        sample, occurrence = sample[wanted], occurrence[wanted]
    earliest = oldest if groups == "all" else last
    which, query = expand(
        np.maximum(group[occurrence], earliest[sample]), np.minimum(until[occurrence], (last + 1)[sample])
    )
    sample, occurrence = sample[which], occurrence[which]
    final = instants.of_K[runs.start[query + 1] - 1]
    first = instants.of_K[offsets[samples.row[sample]]]
    # occurrences by (row and item, instant), to find the first that still lies within a window
    wide = len(instants.start) + 1
    keys, own = first_place * wide + instants.of_K[order], first_place[occurrence] * wide
    begins = [np.searchsorted(keys, own + np.maximum(final - window + 1, 0)) for window in RECENT]
    return {
        "query_sample_S": sample,
        "query_group_S": query - oldest[sample],
        "item_S": events.item_K[order][occurrence],
        "count_S": count[occurrence],
        "since_S": final - instants.of_K[order][occurrence] + 1,
        "instants_S": final - first + 1,
        "recent_SW": np.stack([occurrence + 1 - begin for begin in begins], axis=1),
    }
