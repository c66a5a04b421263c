"""What requests of both models hold: days as the run file writes them, and profiles. Errors name the field."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lum_ray import config as runs
from lum_ray.artifacts import UserError
from lum_ray.data.windows import KNOWN_AT


@dataclass(frozen=True)
class RequestFields:
    """How a run's requests are read, whatever its model makes of their events."""

    run: runs.Run

    @property
    def dated(self) -> bool:
        """Whether the run file writes its days as ISO dates."""
        split = self.run.split
        days = [day for part in (split.train, split.validate, split.test) for day in (part.from_day, part.until_day)]
        return any(isinstance(day, str) for day in (*days, split.validate_from))

    def day(self, value: Any, where: str) -> int:
        """An ISO date or a day number as a day number. Raises UserError naming the field."""
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise UserError(f"{where}: expected {'an ISO date' if self.dated else 'a day number'}, got {value!r}")
        try:
            return runs.day_number(value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def shown(self, day: int) -> int | str:
        """A day number as the run file writes days."""
        return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat() if self.dated else day

    def profile_table(self, user: str, profile: Mapping[str, Any] | None, where: str) -> pa.Table:
        """One row with every profile column of the run, null where the request says nothing.

        Raises UserError naming the field.
        """
        given = dict(profile or {})
        profiles = self.run.data.profiles
        columns: dict[str, pa.Array] = {"user": pa.array([user], pa.string())}
        if profiles is None:
            if given:
                raise UserError(f"{where}.profile: this model was trained without profiles; leave it out")
            return pa.table(columns)
        known = {*profiles.numbers, *profiles.categories, *profiles.splits}
        roles = {name for name in (profiles.registered, profiles.ends, profiles.segment) if name}
        unknown = sorted(set(given) - known - roles)
        if unknown:
            raise UserError(f"{where}.profile.{unknown[0]}: unknown; known are {', '.join(sorted(known | roles))}")
        day = given.get(profiles.registered) if profiles.registered else None
        registered = None if day is None else self.day(day, f"{where}.profile.{profiles.registered}")
        segment = given.get(profiles.segment) if profiles.segment else None
        columns["registered"] = pa.array([registered], pa.int32())
        columns["ends"] = pa.array([None], pa.int32())
        columns["segment"] = pa.array([text_of(segment)], pa.string())
        if profiles.known_at:
            columns[KNOWN_AT] = pa.array([None], pa.int32())
        for name in sorted(known):
            value = given.get(name)
            try:
                columns[name] = (
                    pa.array([None if value is None else float(value)], pa.float64())
                    if name in profiles.numbers
                    else pa.array([text_of(value)], pa.string())
                )
            except (TypeError, ValueError):
                raise UserError(f"{where}.profile.{name}: expected a number, got {value!r}") from None
        return pa.table(columns)


def text_of(value: Any) -> str | None:
    """A category as the raw tables' are read: Arrow writes booleans in lower case."""
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)
