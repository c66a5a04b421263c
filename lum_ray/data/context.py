"""The raw tables beside the events in canonical form: profiles (what a user is), the calendar (what is coming).

Profiles: one row per user. An infinite number is taken as missing and noted in the rejects; a user who comes twice
stops the job, because neither row is better than the other. Calendar: rows as they came, with days as numbers;
`known_at` stays null where the default holds (see `windows`). Public holidays come from the `holidays` package.
"""

from __future__ import annotations

import datetime
import difflib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.artifacts import UserError
from lum_ray.config import Data, Profiles
from lum_ray.data.raw import RawFile, RowNumbers, batches, raw_files
from lum_ray.data.rejects import REJECTS, Rejected, mask, readable
from lum_ray.data.schema import check_time, check_user, check_zone, plain_column, require, wrong_type
from lum_ray.data.times import RANGE, to_day
from lum_ray.data.windows import KNOWN_AT

CANONICAL = ("bucket", "user", "user_hash", "registered", "ends", "segment", KNOWN_AT)
"""Columns of the profiles in the timelines that are not raw columns."""
CALENDAR = pa.schema(
    [
        ("scope", pa.string()),
        ("key", pa.string()),
        ("start_day", pa.int32()),
        ("end_day", pa.int32()),
        ("event_type", pa.string()),
        ("value", pa.float64()),
        ("known_at", pa.int32()),
    ]
)
SCOPES = ("global", "segment", "user")
DAY_ZERO = datetime.date(1970, 1, 1)
HOLIDAYS_AHEAD_DAYS = 366
"""Holidays are made for this long after the data's end, so that the days to predict have theirs."""


def profile_columns(profiles: Profiles) -> tuple[list[str], list[str]]:
    """(number columns, category columns) that are kept raw, in the run file's order; `splits` count as categories."""
    numbers = list(dict.fromkeys(profiles.numbers))
    categories = list(dict.fromkeys((*profiles.categories, *profiles.splits)))
    both = sorted(set(numbers) & set(categories))
    if both:
        raise UserError(
            f"data.profiles: `{both[0]}` is in numbers and in categories or splits; leave it in one of them"
        )
    own = {"registered": profiles.registered, "ends": profiles.ends, "segment": profiles.segment, "user": profiles.user}
    for name in (*numbers, *categories):
        if name in CANONICAL and not (name == "segment" and own["segment"] == "segment" and name in categories):
            raise UserError(
                f"data.profiles: `{name}` is the name of a column of the timelines; rename it in the raw table"
            )
    return numbers, [name for name in categories if name not in CANONICAL]


def check_profiles(uri: str, data: Data) -> list[RawFile]:
    """The profile files, after checking the columns and types of every file. Raises UserError."""
    profiles = data.profiles or Profiles()
    check_zone(data.time_zone)
    numbers, categories = profile_columns(profiles)
    files = raw_files(uri, "profiles")
    for file in files:
        named = {
            "user": profiles.user,
            "registered": profiles.registered,
            "ends": profiles.ends,
            "segment": profiles.segment,
            "known_at": profiles.known_at,
        }
        require(file, {f"data.profiles.{key}": name for key, name in named.items() if name is not None})
        require(file, {f"data.profiles.numbers: {name}": name for name in numbers})
        require(file, {f"data.profiles.categories: {name}": name for name in categories})
        check_user(file, profiles.user)
        for day in (profiles.registered, profiles.ends, profiles.known_at):
            if day is not None:
                check_time(file, day, data.time_zone)
        for name in numbers:
            if _group(file, name) not in ("number", "whole", "null"):
                raise wrong_type(file, name, "numbers", "cast it, or move it to data.profiles.categories")
        for name in (*categories, *([profiles.segment] if profiles.segment else [])):
            if _group(file, name) not in ("string", "whole", "null"):
                raise wrong_type(
                    file, name, "strings, booleans or whole numbers", "cast it, or move it to data.profiles.numbers"
                )
    return files


def _group(file: RawFile, name: str) -> str:
    found = file.schema.field(name).type
    found = found.value_type if pa.types.is_dictionary(found) else found
    if pa.types.is_null(found):
        return "null"
    if pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found):
        return "string"
    if pa.types.is_boolean(found) or pa.types.is_integer(found):
        return "whole"
    return "number" if pa.types.is_floating(found) or pa.types.is_decimal(found) else "other"


def clean_profiles(
    table: pa.Table, data: Data, file: str = "profiles", first_row: RowNumbers = 0
) -> tuple[pa.Table, pa.Table]:
    """Profiles (as they are in a file or a request) in canonical form, and the rejects (REJECTS).

    Returns (user, registered int32, ends int32, known_at int32 if the run has one, segment string, numbers float64,
    categories and splits string), nulls where unknown. Rejected: a null user, a day out of `times.RANGE`, a text that
    is no UTF-8; an infinite number becomes null and is noted. A user who comes twice is not looked for here (see
    `repeated_users`).
    """
    profiles = data.profiles or Profiles()
    numbers, categories = profile_columns(profiles)
    rejected = Rejected(file, first_row, table.num_rows)
    noted = Rejected(file, first_row, table.num_rows)

    def text(name: str) -> pa.ChunkedArray:
        return readable(pc.cast(plain_column(table, name, file), pa.string()), rejected, name)

    columns = {"user": text(profiles.user)}
    rejected.add(mask(pc.is_null(columns["user"])), f"`{profiles.user}` is null")
    days = {"registered": profiles.registered, "ends": profiles.ends}
    days |= {KNOWN_AT: profiles.known_at} if profiles.known_at else {}
    for key, name in days.items():
        columns[key] = pa.chunked_array([pa.nulls(table.num_rows, pa.int32())])
        if name is not None:
            day = to_day(table[name], data.time_zone)
            rejected.add(mask(pc.and_(pc.is_null(day), pc.is_valid(table[name]))), f"`{name}` is no day", table[name])
            columns[key] = pa.chunked_array([day])
    segment = pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
    columns["segment"] = segment if profiles.segment is None else text(profiles.segment)
    for name in numbers:
        number = pc.cast(plain_column(table, name, file), pa.float64(), safe=False)
        infinite = mask(pc.is_inf(number))
        noted.add(infinite & ~rejected.bad, f"`{name}` is infinite, taken as missing", number)
        columns[name] = pc.if_else(pc.is_finite(number), number, pa.scalar(None, pa.float64()))
    for name in categories:
        columns[name] = text(name)
    cleaned = pa.table(columns).filter(pa.array(~rejected.bad))
    return cleaned, pa.concat_tables([given.table(columns["user"]) for given in (rejected, noted)]).sort_by("row")


def repeated_users(profiles: pa.Table) -> list[str]:
    """At most five users that have more than one row, sorted."""
    counts = pc.value_counts(profiles["user"])
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    return sorted(twice)[:5]


def repeated_users_error(uri: str, users: list[str]) -> UserError:
    """What to say of users that come twice."""
    return UserError(
        f"{uri}: expected one profile per user, these come more than once: {', '.join(users)}; keep one row of each"
    )


def canonical_profiles(data: Data, uri: str) -> tuple[pa.Table, pa.Table]:
    """The whole profiles table at `uri` in canonical form, by user, and the rejects. Raises UserError."""
    tables, rejects = [], []
    for file in check_profiles(uri, data):
        for batch, row in batches(file.uri, file.schema.names, None, 0, 1 << 19, file.overlay):
            cleaned, bad = clean_profiles(batch, data, file.name, row)
            tables.append(cleaned)
            rejects.append(bad)
    profiles = pa.concat_tables(tables)
    if twice := repeated_users(profiles):
        raise repeated_users_error(uri, twice)
    return profiles.sort_by("user"), pa.concat_tables([REJECTS.empty_table(), *rejects])


def check_calendar(uri: str, data: Data) -> list[RawFile]:
    """The calendar's files, after checking the columns and types of every file. Raises UserError."""
    check_zone(data.time_zone)
    files = raw_files(uri, "calendar")
    for file in files:
        optional = {"value", "known_at"} - set(file.schema.names)
        require(file, {f"calendar.{name}": name for name in CALENDAR.names if name not in optional})
        for name in ("scope", "key", "event_type"):
            if _group(file, name) not in ("string", "null"):
                raise wrong_type(file, name, "strings", "cast it")
        for name in ("start_day", "end_day", "known_at"):
            if name in file.schema.names and not pa.types.is_null(file.schema.field(name).type):
                check_time(file, name, data.time_zone)
        if "value" in file.schema.names and _group(file, "value") not in ("number", "whole", "null"):
            raise wrong_type(file, "value", "numbers", "cast it; null means 1")
    return files


def clean_calendar(
    table: pa.Table, data: Data, file: str = "calendar", first_row: RowNumbers = 0
) -> tuple[pa.Table, pa.Table]:
    """Calendar rows (of a file or a what-if request) as CALENDAR, and the rejects.

    Rejected: an unknown scope, no key in segment or user scope, no or impossible days, an end before its start, no
    event type, a value that is NaN or infinite. The key of global rows is dropped.
    """
    rejected = Rejected(file, first_row, table.num_rows)
    none = pa.chunked_array([pa.nulls(table.num_rows)])
    raw = pa.table({name: table[name] if name in table.column_names else none for name in CALENDAR.names})
    columns = {
        name: readable(pc.cast(plain_column(raw, name, file), pa.string()), rejected, name)
        for name in ("scope", "key", "event_type")
    }
    columns["value"] = pc.cast(plain_column(raw, "value", file), pa.float64(), safe=False)
    for name in ("start_day", "end_day", "known_at"):
        empty = pa.types.is_null(raw[name].type)
        columns[name] = (
            pc.cast(raw[name], pa.int32()) if empty else pa.chunked_array([to_day(raw[name], data.time_zone)])
        )
    is_global = pc.equal(columns["scope"], "global")
    known = pc.is_in(columns["scope"], value_set=pa.array(SCOPES))
    rejected.add(~mask(known), f"scope: is none of {', '.join(SCOPES)}", columns["scope"])
    rejected.add(
        mask(pc.and_(pc.invert(is_global), pc.is_null(columns["key"]))),
        "key: is null, but the scope is not global",
        columns["scope"],
    )
    for name in ("start_day", "end_day"):
        rejected.add(mask(pc.is_null(columns[name])), f"{name}: is no day", raw[name])
    rejected.add(
        mask(pc.and_(pc.is_null(columns["known_at"]), pc.is_valid(raw["known_at"]))),
        f"known_at: is out of {RANGE}",
        raw["known_at"],
    )
    rejected.add(
        mask(pc.less(columns["end_day"], columns["start_day"])), "end_day: is before start_day", raw["end_day"]
    )
    rejected.add(mask(pc.is_null(columns["event_type"])), "event_type: is null")
    rejected.add(
        mask(pc.invert(pc.is_finite(columns["value"]))), "value: is not finite; null means 1", columns["value"]
    )
    columns["key"] = pc.if_else(is_global, pa.scalar(None, pa.string()), columns["key"])
    cleaned = pa.table(columns).select(CALENDAR.names).cast(CALENDAR)
    whose = pc.if_else(pc.equal(columns["scope"], "user"), columns["key"], pa.scalar(None, pa.string()))
    return cleaned.filter(pa.array(~rejected.bad)), rejected.table(whose)


def canonical_calendar(data: Data, uri: str | None, first_day: int, end_day: int) -> tuple[pa.Table, pa.Table]:
    """All calendar rows of a run, with the public holidays of [first_day, end_day + 366), sorted; and the rejects.

    `uri` None: the holidays alone. Raises UserError for an unknown country and for what `check_calendar` refuses.
    """
    tables, rejects = [CALENDAR.empty_table()], [REJECTS.empty_table()]
    for file in check_calendar(uri, data) if uri is not None else []:
        columns = [name for name in CALENDAR.names if name in file.schema.names]
        for batch, row in batches(file.uri, columns, None, 0, 1 << 19, file.overlay):
            cleaned, bad = clean_calendar(batch, data, file.name, row)
            tables.append(cleaned)
            rejects.append(bad)
    if data.calendar is not None and data.calendar.holidays:
        tables.append(holiday_rows(data.calendar.holidays, first_day, end_day + HOLIDAYS_AHEAD_DAYS))
    order = [(name, "ascending") for name in CALENDAR.names]
    return pa.concat_tables(tables).sort_by(order).combine_chunks(), pa.concat_tables(rejects)


def holiday_rows(place: str, first_day: int, end_day: int) -> pa.Table:
    """One global calendar row, `holiday`, for each public holiday within [first_day, end_day).

    `place`: a country, or a country and its subdivision, such as US, DE-BE. Raises UserError for one that is not known.
    """
    import holidays

    country, _, subdivision = place.partition("-")
    supported = holidays.list_supported_countries(include_aliases=True)
    if country not in supported:
        close = difflib.get_close_matches(country.upper(), list(supported), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"data.calendar.holidays: expected an ISO country code such as US or DE-BE, got {place!r}{hint}"
        )
    if subdivision and subdivision not in supported[country]:
        raise UserError(
            f"data.calendar.holidays: {country} has no subdivision {subdivision!r}; "
            f"it has {', '.join(supported[country][:60])}"
        )
    years = range(_date(first_day).year, _date(end_day).year + 1)
    found = holidays.country_holidays(country, subdiv=subdivision or None, years=years)
    days = np.array(sorted((date - DAY_ZERO).days for date in found), np.int32)
    days = days[(days >= first_day) & (days < end_day)]
    rows = {"scope": ["global"] * len(days), "start_day": days, "end_day": days, "event_type": ["holiday"] * len(days)}
    absent = {name: pa.nulls(len(days), CALENDAR.field(name).type) for name in ("key", "value", "known_at")}
    return pa.table(rows | absent).select(CALENDAR.names).cast(CALENDAR)


def _date(day: int) -> datetime.date:
    return DAY_ZERO + datetime.timedelta(days=day)


def has_dates(files: list[RawFile], column: str) -> bool:
    """Whether the times in `column` are dates or instants (true), not day numbers."""
    return all(not pa.types.is_integer(file.schema.field(column).type) for file in files)
