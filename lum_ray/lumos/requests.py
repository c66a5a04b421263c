"""Requests to rows: raw events, profiles and calendars as a client sends them, checked once, at the boundary.

Errors name the field: `users[3].events[0].time: ...`. Shapes: R requests.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lum_ray.artifacts import UserError
from lum_ray.data.reader import rows_from_tables
from lum_ray.data.rejects import with_value
from lum_ray.data.requests import RequestFields
from lum_ray.data.rows import Rows, Samples
from lum_ray.data.schema import clean_events
from lum_ray.lumos.collate import Calendar, EventLayout
from lum_ray.lumos.timelines import tokenize

FAR_FUTURE = 2**31 - 1
MOST_SHOWN = 60
MOST_DAYS_AHEAD = 366
"""A cut may lie this far behind the stored histories: so far the calendar has its holidays."""
History = Callable[[Sequence[str]], dict[str, Rows]]


@dataclass(frozen=True)
class Request:
    """One user. `events` are raw rows as in the event table (without the user column); they join what is stored of the
    user, if anything is. `calendar` replaces what is known of the coming days: {event_type, start_day, end_day, value}.
    Days are ISO dates or day numbers, as in the run file; `cut_day` defaults to the day after the stored history.
    """

    user: str
    cut_day: int | str | None = None
    events: Sequence[Mapping[str, Any]] | None = None
    profile: Mapping[str, Any] | None = None
    calendar: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class RequestReader(RequestFields):
    """Reads requests for one checkpoint.

    `event_columns`: the raw columns that the behaviours use, with their Arrow types; `start_day`, `end_day`: those of
    the training data (days).
    """

    layout: EventLayout
    event_columns: Mapping[str, str]
    start_day: int
    end_day: int
    history_of: History | None

    def rows(self, requests: Sequence[Request]) -> tuple[Rows, Samples]:
        """Tokenize the requests: their rows (R users) and one sample each."""
        if not requests:
            raise UserError("users: expected at least one")
        stored = self.history_of([request.user for request in requests]) if self.history_of else {}
        pieces, cuts = [], []
        for i, request in enumerate(requests):
            where = f"users[{i}]"
            known = stored.get(request.user)
            cut = self.day(request.cut_day, f"{where}.cut_day") if request.cut_day is not None else self.end_day
            if not self.start_day <= cut <= self.end_day + MOST_DAYS_AHEAD:
                raise UserError(
                    f"{where}.cut_day: expected a day from {self.shown(self.start_day)} to "
                    f"{self.shown(self.end_day + MOST_DAYS_AHEAD)}, got {request.cut_day!r}"
                )
            if known is not None and request.events is None and cut > self.end_day:
                raise UserError(
                    f"{where}.cut_day: her stored history ends before {self.shown(self.end_day)}, and the days from "
                    f"then to {self.shown(cut)} are not known to be idle; send the events since ([] for none), or ask "
                    "for that day"
                )
            if known is None and request.events is None:
                raise UserError(
                    f"{where}.user: {request.user!r} is not known; send her events, or publish a newer state"
                )
            piece = known
            if request.events is not None or request.profile is not None:
                inline = self._inline(request, where, cut)
                piece = (
                    inline if known is None else _join(known, inline, request.profile is not None, f"{where}.events")
                )
            assert piece is not None
            # a stored history may go on behind the cut of the request: the cut hides it; and predictions have no end
            pieces.append(replace(piece, end_day=np.full(1, FAR_FUTURE, np.int32)))
            cuts.append(cut)
        return Rows.concat(pieces), Samples(
            np.arange(len(requests)), np.array(cuts, np.int32), np.zeros(len(requests), np.int32)
        )

    def scenario(self, rows: Sequence[Mapping[str, Any]], where: str, cut: int) -> Calendar:
        """Calendar rows of a request, known for sure and for every user of it. Raises UserError naming the field."""
        known = self.layout.types
        columns: dict[str, list[Any]] = {name: [] for name in ("event_type", "start_day", "end_day", "value")}
        for j, row in enumerate(rows):
            place = f"{where}[{j}]"
            kind = row.get("event_type")
            if kind not in known:
                raise UserError(
                    f"{place}.event_type: expected one of {', '.join(known) or 'none (the run has no calendar)'}, "
                    f"got {kind!r}"
                )
            start = self.day(row.get("start_day"), f"{place}.start_day")
            end = self.day(row["end_day"], f"{place}.end_day") if row.get("end_day") is not None else start
            if end < max(start, cut):
                raise UserError(
                    f"{place}.end_day: expected a day from {self.shown(max(start, cut))} on, got {row.get('end_day')!r}"
                )
            value = row.get("value")
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise UserError(f"{place}.value: expected a finite number, got {value!r}")
            for name, item in (("event_type", kind), ("start_day", start), ("end_day", end), ("value", value)):
                columns[name].append(item)
        count = len(rows)
        table = pa.table(
            {
                "scope": pa.repeat("global", count),
                "key": pa.nulls(count, pa.string()),
                "start_day": pa.array(columns["start_day"], pa.int32()),
                "end_day": pa.array(columns["end_day"], pa.int32()),
                "event_type": pa.array(columns["event_type"], pa.string()),
                "value": pa.array(columns["value"], pa.float64()),
                "known_at": pa.nulls(count, pa.int32()),
            }
        )
        return Calendar(table, self.layout)

    def _inline(self, request: Request, where: str, cut: int) -> Rows:
        """The request's own events and profile as a row. Raises UserError for an event at or after the cut."""
        data = self.run.data
        raw = [dict(event) for event in request.events or []]
        times = [event.get(data.events.time) for event in raw]
        table = {data.events.user: pa.array([request.user] * len(raw), pa.string()),
                 data.events.time: self._times(times, where)}  # fmt: skip
        for name, kind in self.event_columns.items():
            missing = [j for j, event in enumerate(raw) if name not in event]
            if missing:
                raise UserError(
                    f"{where}.events[{missing[0]}].{name}: missing; every event holds {', '.join(self.event_columns)}"
                )
            table[name] = _column([event[name] for event in raw], kind, f"{where}.events", name)
        events, rejects = clean_events(pa.table(table), replace(data, start=None, end=None), f"{where}.events")
        if rejects.num_rows:
            first = rejects.to_pylist()[:5]
            raise UserError("; ".join(f"{where}.events[{row['row']}]: {with_value(row)}" for row in first))
        late = np.flatnonzero(events["day"].to_numpy() >= cut)
        if len(late):
            raise UserError(
                f"{where}.events[{late[0]}].{data.events.time}: expected a time before the cut, {self.shown(cut)}, "
                f"got {times[late[0]]}; "
                "leave it out or ask for a later cut_day"
            )
        return rows_from_tables(
            tokenize(events, data.behaviours),
            self.profile_table(request.user, request.profile, where),
            [item.name for item in data.behaviours],
            self.start_day,
            cut,
        )

    def _times(self, times: Sequence[Any], where: str) -> pa.Array:
        def parse(j: int, value: Any) -> Any:
            try:
                if isinstance(value, str):
                    return (
                        datetime.date.fromisoformat(value)
                        if len(value) == 10
                        else datetime.datetime.fromisoformat(value)
                    )
                if isinstance(value, (datetime.date, int)) and not isinstance(value, bool):
                    return value
            except ValueError:
                pass
            expected = "an ISO date or an ISO timestamp with a zone" if self.dated else "a day number"
            raise UserError(f"{where}.events[{j}].{self.run.data.events.time}: expected {expected}, got {value!r}")

        values = [parse(j, value) for j, value in enumerate(times)]
        if not values:
            return pa.array([], pa.int32())
        if all(isinstance(value, datetime.datetime) for value in values):
            naive = [j for j, value in enumerate(values) if value.tzinfo is None]
            if naive and self.run.data.time_zone != "UTC":
                raise UserError(
                    f"{where}.events[{naive[0]}]: the timestamp has no zone; write it like 2017-09-20T18:30:00-04:00"
                )
            return pa.array(
                [v if v.tzinfo else v.replace(tzinfo=datetime.UTC) for v in values], pa.timestamp("us", "UTC")
            )
        if len({type(value) for value in values}) > 1:
            raise UserError(f"{where}.events: expected times of one kind, got timestamps, dates and numbers mixed")
        if not isinstance(values[0], int):
            return pa.array(values, pa.date32())
        far = [j for j, value in enumerate(values) if abs(value) > FAR_FUTURE]
        if far:
            raise UserError(
                f"{where}.events[{far[0]}].{self.run.data.events.time}: expected a day number, got {values[far[0]]}"
            )
        return pa.array(values, pa.int32())


def _column(values: Sequence[Any], kind: str, where: str, name: str) -> pa.Array:
    """The values as an Arrow array of the raw table's type. Raises UserError naming the first that is not one."""
    wanted = pa.type_for_alias(kind)
    try:
        return pa.array(values, wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        for j, value in enumerate(values):
            try:
                pa.array([value], wanted)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                shown = repr(value)[:MOST_SHOWN]
                raise UserError(f"{where}[{j}].{name}: expected a value of type {kind}, got {shown}") from None
        raise


def _join(stored: Rows, inline: Rows, with_profile: bool, where: str) -> Rows:
    """The stored history of a user and her newer events."""
    if len(stored.days) and len(inline.days) and inline.days[0] <= stored.days[-1]:
        raise UserError(
            f"{where}: expected events after the stored history, which goes up to day {stored.days[-1]}; "
            "leave older ones out"
        )
    # what the request says of her replaces what is stored; what it leaves out stays
    source = inline if with_profile else stored
    segment = inline.segment if with_profile and inline.segment[0] else stored.segment
    return replace(
        stored,
        offsets=np.array([0, len(stored.days) + len(inline.days)], np.int64),
        days=np.concatenate([stored.days, inline.days]),
        values=np.concatenate([stored.values, inline.values]),
        segment=segment,
        profile=source.profile,
    )
