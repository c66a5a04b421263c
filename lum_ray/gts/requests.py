"""Requests to rows: raw events and profiles as a client sends them, checked once, at the boundary.

What is stored of a user and what a request brings go through the one tokenizer together, so that an event that is in
both is one event. Errors name the field: `users[3].events[7].time: ...`. Shapes: R requests, A events.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lum_ray.artifacts import UserError
from lum_ray.data.reader import rows_from_tables
from lum_ray.data.rejects import with_value
from lum_ray.data.requests import RequestFields
from lum_ray.data.rows import Int64, Rows, Samples, Strings
from lum_ray.data.schema import clean_events
from lum_ray.gts.sequences import COLUMNS, merge, tokenize

FAR_FUTURE: Final = 2**31 - 1
MOST_DAYS_AHEAD: Final = 3660
"""No day of a request lies farther behind the stored histories: it is a slip, such as seconds for a day number."""
History = Callable[[Sequence[str]], dict[str, Rows]]


@dataclass(frozen=True)
class Request:
    """One user. `events` are raw rows as in the event table (its time and item columns; others are not read); they join
    what is stored of the user, if anything is, and so does what `profile` holds. Days are ISO dates or day numbers, as
    in the run file; `cut_day` defaults to the day after all that is known: the stored histories and the own events.
    """

    user: str
    cut_day: int | str | None = None
    events: Sequence[Mapping[str, Any]] | None = None
    profile: Mapping[str, Any] | None = None


class Read(NamedTuple):
    """`rows` (R users), one sample each, and `known_R`: whether anything is stored of the user, or events were sent."""

    rows: Rows
    samples: Samples
    known_R: npt.NDArray[np.bool_]

    def part(self, some: Int64) -> tuple[Rows, Samples]:
        """The rows and samples of the requests at `some`."""
        return self.rows.take(some), Samples(np.arange(len(some)), self.samples.cut[some], self.samples.draw[some])


@dataclass(frozen=True)
class RequestReader(RequestFields):
    """Reads requests for one checkpoint. `start_day`: of the training data; `end_day`: where `history_of` ends."""

    start_day: int
    end_day: int
    history_of: History | None

    def rows(self, requests: Sequence[Request]) -> Read:
        """Tokenize the requests. Raises UserError naming the field that is wrong; an unknown user is no error."""
        if not requests:
            raise UserError("users: expected at least one")
        for i, request in enumerate(requests):
            if not isinstance(request.user, str) or not request.user:
                raise UserError(f"users[{i}].user: expected an id that is a text, got {request.user!r}")
        stored = self.history_of([request.user for request in requests]) if self.history_of else {}
        pieces, cuts, known = [], [], []
        for i, request in enumerate(requests):
            found = stored.get(request.user)
            piece, cut = self._one(request, found, f"users[{i}]")
            # a stored history may go on behind the cut of the request: the cut hides it; and what comes has no end
            pieces.append(replace(piece, end_day=np.full(1, FAR_FUTURE, np.int32)))
            cuts.append(cut)
            known.append(found is not None or request.events is not None)
        count = len(requests)
        samples = Samples(np.arange(count), np.array(cuts, np.int32), np.zeros(count, np.int32))
        return Read(Rows.concat(pieces), samples, np.array(known))

    def _one(self, request: Request, stored: Rows | None, where: str) -> tuple[Rows, int]:
        """The request's user as rows, and its cut."""
        events, times = self._events(request, where)
        days, places = events["day"].to_numpy(), events["place"].to_numpy()
        latest = self.end_day + MOST_DAYS_AHEAD
        far = places[days >= latest]
        if len(far):
            first = int(far.min())
            raise UserError(
                f"{where}.events[{first}].{self.run.data.events.time}: expected a day before {self.shown(latest)}, got "
                f"{times[first]!r}"
            )
        cut = max(self.end_day, int(days.max(initial=self.end_day - 1)) + 1)
        if request.cut_day is not None:
            cut = self.day(request.cut_day, f"{where}.cut_day")
            if not self.start_day <= cut <= latest:
                raise UserError(
                    f"{where}.cut_day: expected a day from {self.shown(self.start_day)} to {self.shown(latest)}, got "
                    f"{request.cut_day!r}"
                )
        late = places[days >= cut]
        if len(late):
            first = int(late.min())
            raise UserError(
                f"{where}.events[{first}].{self.run.data.events.time}: expected a time before the cut, "
                f"{self.shown(cut)}, got {times[first]}; leave it out or ask for a later cut_day"
            )
        profile = self.profile_table(request.user, request.profile, where)
        if stored is not None and not request.events and not request.profile:
            return stored, cut
        own = tokenize(events.drop_columns(["place"]))
        daily = own if stored is None else merge([_table(stored), own])
        rows = rows_from_tables(daily, profile, COLUMNS, self.start_day, cut, sequences=True)
        if stored is None:
            return rows, cut
        given = request.profile or {}
        kept = {name: rows.profile[name] if name in given else column for name, column in stored.profile.items()}
        segment = self.run.data.profiles.segment if self.run.data.profiles else None
        return replace(
            stored,
            offsets=rows.offsets,
            days=rows.days,
            values=rows.values,
            segment=rows.segment if segment in given else stored.segment,
            profile=kept,
        ), cut

    def _events(self, request: Request, where: str) -> tuple[pa.Table, list[Any]]:
        """The request's events, cleaned, with the place (A,) of each in the request, and their times as they came."""
        names = self.run.data.events
        item = names.item or "item"
        raw = list(request.events or [])
        for j, event in enumerate(raw):
            if not isinstance(event, Mapping):
                raise UserError(f"{where}.events[{j}]: expected a mapping of {names.time} and {item}, got {event!r}")
            for name in (names.time, item):
                if event.get(name) is None:
                    raise UserError(f"{where}.events[{j}].{name}: missing; every event holds {names.time} and {item}")
            if isinstance(event[item], bool) or not isinstance(event[item], (str, int)):
                raise UserError(f"{where}.events[{j}].{item}: expected an item id, got {event[item]!r}")
        times = [event[names.time] for event in raw]
        parsed = [self._time(time, f"{where}.events[{j}].{names.time}") for j, time in enumerate(times)]
        # a repeat within an instant counts once anyway, so requests need no column that tells repeats apart
        data = replace(self.run.data, behaviours=(), start=None, end=None, events=replace(names, id=None))
        parts = []
        kinds = [next(kind for kind in KINDS if isinstance(value, kind)) for value in parsed]
        for kind, wanted in KINDS.items():
            places = [j for j, own in enumerate(kinds) if own is kind]
            table = pa.table(
                {
                    names.user: pa.array([request.user] * len(places), pa.string()),
                    names.time: pa.array([parsed[j] for j in places], wanted),
                    item: pa.array([str(raw[j][item]) for j in places], pa.string()),
                }
            )
            events, rejects = clean_events(table, data, f"{where}.events")
            if rejects.num_rows:
                some = [(places[row["row"]], with_value(row)) for row in rejects.to_pylist()[:5]]
                raise UserError("; ".join(f"{where}.events[{j}].{names.time}: {reason}" for j, reason in some))
            parts.append(events.append_column("place", pa.array(places, pa.int64())))
        return pa.concat_tables(parts), times

    def _time(self, value: Any, where: str) -> datetime.date | int:
        """A moment with its zone, a date or a day number. Raises UserError naming the field."""
        found: datetime.date | int | None = None
        if isinstance(value, str):
            try:
                found = _from_text(value)
            except ValueError:
                found = None
        elif isinstance(value, (datetime.date, int)) and not isinstance(value, bool):
            found = value
        if found is None:
            expected = "an ISO date or an ISO timestamp with a zone" if self.dated else "a day number"
            raise UserError(f"{where}: expected {expected}, got {value!r}")
        if isinstance(found, int) and abs(found) >= self.end_day + MOST_DAYS_AHEAD:
            raise UserError(f"{where}: expected a day before {self.shown(self.end_day + MOST_DAYS_AHEAD)}, got {found}")
        if isinstance(found, datetime.datetime) and found.tzinfo is None:
            if self.run.data.time_zone != "UTC":
                raise UserError(f"{where}: the timestamp has no zone; write it like 2017-09-20T18:30:00-04:00")
            found = found.replace(tzinfo=datetime.UTC)
        return found


KINDS: Final[dict[type, pa.DataType]] = {
    datetime.datetime: pa.timestamp("us", "UTC"),
    datetime.date: pa.date32(),
    int: pa.int64(),
}
"""Moments, and two ways to write a day; a user may have both, as in sources of different granularity. (A moment is a
date to Python, so it comes first.)"""


def _from_text(value: str) -> datetime.date:
    """An ISO date, or an ISO timestamp. Raises ValueError."""
    return datetime.date.fromisoformat(value) if len(value) == 10 else datetime.datetime.fromisoformat(value)


def _table(rows: Rows) -> pa.Table:
    """One user's stored events as the tokenizer gives them."""
    users: Strings = np.repeat(rows.user, np.diff(rows.offsets))
    columns = {name: pa.array(rows.values[:, i], pa.int64()) for i, name in enumerate(COLUMNS)}
    return pa.table({"user": pa.array(users, pa.string()), "day": pa.array(rows.days), **columns})
