"""The raw tables: their columns and types, what a row must be, and the table of rejected rows (`raw` has their files).

Checks come in two kinds. What is wrong with a file (not parquet, cut off, a missing or mistyped column, no rows) stops
everything with a UserError before anything starts. What is wrong with a row sends the row to the rejects, a table of
(file, row, reason, value, user): `file` is `<table>/<path below the table's folder>`, so that it does not depend on the
machine, `row` counts from 0 in the file. `reason` names columns and holds no data, since logs show it; the value that
it is about, and whose row it was, are columns of their own for whoever mends the rows.

Choices: a timestamp without a zone is refused unless the run's time zone is UTC (then it is read as UTC; see `times`).
Integer users and items are read as their decimal digits.
"""

from __future__ import annotations

import difflib
import zoneinfo
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.artifacts import UserError
from lum_ray.config import Data, day_number
from lum_ray.data.delta import DeltaTable
from lum_ray.data.expressions import parse, plain, to_units
from lum_ray.data.raw import NOTHING, Overlay, RawFile, RowNumbers, batches, delta_files, empty_batch, raw_files
from lum_ray.data.rejects import REJECTS, Rejected, decoded, mask, readable, row_numbers
from lum_ray.data.times import RANGE, to_day, to_instant

RESERVED = ("bucket", "user", "user_hash", "days", "day")
"""Columns of the timelines, which no behaviour may be named after."""
PROVENANCE = ("@id", "@file", "@row")
"""Columns that cleaned events carry besides where `events.id` is set, so that `drop_repeats` can find repeated rows."""


def check_events(
    uri: str, data: Data, log: Callable[[str], None] | None = None, added: DeltaTable | None = None
) -> list[RawFile]:
    """The event files, after checking the behaviours and the columns and types of every file.

    Of a Delta table, files that hold no day of [data.start, data.end) are left out; `log` hears how many. `added` takes
    its files in place of all. Raises UserError naming the file, the column, what was expected and how to mend it.
    """
    check_zone(data.time_zone)
    for item in data.behaviours:
        aggregate = parse(item.aggregate)
        taken = sorted({"user", "day"} & set(aggregate.columns))
        if taken:
            raise UserError(
                f"data.behaviours.{item.name}: {aggregate}: `{taken[0]}` is a name of lum_ray's own; rename the column"
            )
        if item.name in RESERVED:
            raise UserError(
                f"data.behaviours: `{item.name}` is the name of a column of the timelines; choose another name"
            )
        if aggregate.function in ("count", "n_unique", "any") and item.resolution != 1:
            raise UserError(
                f"data.behaviours.{item.name}.resolution: {aggregate} is whole, so expected 1 (the default), "
                f"got {item.resolution}"
            )
    pruned = _Pruned(data)
    prune = (data.events.time, pruned.keep)
    files = raw_files(uri, "events", prune) if added is None else delta_files(added, "events", prune)
    if pruned.left_out and log is not None:
        log(f"events: {pruned.left_out} of {pruned.seen} files hold no day from data.start to data.end: not read")
    if not files and added is None:
        raise UserError(
            f"data.events.path: {uri}: none of its {pruned.seen} files holds a day of data.start, {data.start}, to "
            f"data.end, {data.end}; mend these"
        )
    checked: list[pa.Schema] = []
    for file in files:
        # a table has many files, and few kinds of them
        if any(file.schema.equals(schema) for schema in checked):
            continue
        checked.append(file.schema)
        columns = {"user": data.events.user, "time": data.events.time} | (
            {"id": data.events.id} if data.events.id else {}
        )
        require(file, {f"data.events.{key}": name for key, name in columns.items()})
        check_user(file, data.events.user)
        check_time(file, data.events.time, data.time_zone)
        if (name := item_column(data)) is not None:
            require(file, {"data.events.item": name})
            check_user(file, name)
        for item in data.behaviours:
            aggregate = parse(item.aggregate)
            require(
                file, {f"data.behaviours.{item.name}": name for name in aggregate.columns if name in file.schema.names}
            )
            try:
                aggregate.check(file.schema)
            except UserError as error:
                raise UserError(f"data.behaviours.{item.name}: {error}; in {file.uri}") from None
    return files


class _Pruned:
    """Which files of a Delta table can hold a day of [data.start, data.end), by the bounds of their times."""

    def __init__(self, data: Data) -> None:
        self.data, self.seen, self.left_out = data, 0, 0

    def keep(self, bounds: pa.Array) -> bool:
        self.seen += 1
        least, greatest = pa.chunked_array([bounds.slice(0, 1)]), pa.chunked_array([bounds.slice(1, 1)])
        if pa.types.is_timestamp(bounds.type):
            # the log cuts times off at milliseconds
            greatest = pc.add(greatest, pa.scalar(1000, pa.duration("us")))
        days = [to_day(end, self.data.time_zone)[0].as_py() for end in (least, greatest)]
        early = self.data.start is not None and days[1] is not None and days[1] < day_number(self.data.start)
        late = self.data.end is not None and days[0] is not None and days[0] >= day_number(self.data.end)
        self.left_out += early or late
        return not (early or late)


def item_column(data: Data) -> str | None:
    """The column with the item of each event, where events are kept one by one: no behaviours aggregate them."""
    return None if data.behaviours else data.events.item


def check_zone(time_zone: str) -> None:
    """Raise UserError unless `time_zone` is a name of the IANA database."""
    try:
        zoneinfo.ZoneInfo(time_zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        close = difflib.get_close_matches(time_zone, sorted(zoneinfo.available_timezones()), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"data.time_zone: expected a name such as Europe/Berlin, got {time_zone!r}{hint}") from None


def require(file: RawFile, columns: dict[str, str]) -> None:
    """Raise UserError unless the file has the `columns` (run file path -> column)."""
    there = file.schema.names
    for path, name in columns.items():
        if there.count(name) > 1:
            raise UserError(
                f"{file.uri}: column `{name}` ({path}) is there {there.count(name)} times; rename the others"
            )
        if name not in there:
            close = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"it has: {', '.join(there[:20])}"
            raise UserError(f"{file.uri}: missing column `{name}` ({path}); {hint}")


def check_user(file: RawFile, column: str) -> None:
    """Raise UserError unless the column holds strings or whole numbers."""
    found = decoded(file.schema.field(column).type)
    if not (_is_string(found) or pa.types.is_integer(found)):
        raise wrong_type(file, column, "strings or whole numbers", "cast the ids to strings")


def check_time(file: RawFile, column: str, time_zone: str) -> None:
    """Raise UserError unless the column tells days: a timestamp with a zone, a date or a whole day number."""
    found = file.schema.field(column).type
    expected = "a timestamp with a time zone, a date or a whole day number"
    if pa.types.is_timestamp(found) and found.tz is None and time_zone != "UTC":
        mend = f"attach the zone that it was written in (data.time_zone, {time_zone}, may be another)"
        raise wrong_type(file, column, expected, mend)
    if not (pa.types.is_timestamp(found) or pa.types.is_date(found) or pa.types.is_integer(found)):
        raise wrong_type(
            file, column, expected, "cast it (strings: parse them as timestamps; seconds: make them timestamps)"
        )


def wrong_type(file: RawFile, column: str, expected: str, mend: str) -> UserError:
    """What to say of a column of the wrong type."""
    return UserError(
        f"{file.uri}: column `{column}`: expected {expected}, got {file.schema.field(column).type}; {mend}"
    )


def clean_events(
    table: pa.Table, data: Data, file: str = "events", first_row: RowNumbers = 0, since: int | None = None
) -> tuple[pa.Table, pa.Table]:
    """Events (N rows, as they are in a file or a request) for the tokenizer, and the rejects (REJECTS).

    Returns (user string, day int32, the columns that the behaviours use; without behaviours but with `events.item`:
    item string, time_us and offset_min, see `to_instant`; with `events.id` also PROVENANCE, see `drop_repeats`).
    Strings that come as dictionaries stay such where the events are aggregated at once (`_aggregated_at_once`).
    Rejected: a null user, a null time, a NaN or infinite number, a value finer than its behaviour's resolution or too
    large, a day outside [data.start, data.end), a null item, a null id; and where the days before `since +
    data.late_days` are known already, a day before `since`.
    Raises UserError for missing or mistyped columns.
    """
    require_in = RawFile(file, file, 0, (table.num_rows,), table.schema)
    require(require_in, {"data.events.user": data.events.user, "data.events.time": data.events.time})
    check_user(require_in, data.events.user)
    check_time(require_in, data.events.time, data.time_zone)
    rejected = Rejected(file, first_row, table.num_rows)
    coded = _aggregated_at_once(data)
    user = readable(_text(plain_column(table, data.events.user, file), coded), rejected, data.events.user)
    time = table[data.events.time]
    day = to_day(time, data.time_zone)
    rejected.add(mask(pc.is_null(user)), f"`{data.events.user}` is null")
    rejected.add(mask(pc.is_null(time)), f"`{data.events.time}` is null")
    rejected.add(mask(pc.is_null(day)), f"`{data.events.time}` is out of {RANGE}", time)
    if data.start is not None:
        rejected.add(
            mask(pc.less(day, day_number(data.start))), f"`{data.events.time}` is before data.start, {data.start}", time
        )
    if data.end is not None:
        rejected.add(
            mask(pc.greater_equal(day, day_number(data.end))),
            f"`{data.events.time}` is not before data.end, {data.end}",
            time,
        )

    if since is not None:
        older = pa.chunked_array([pc.subtract(since + data.late_days, pc.cast(day, pa.int64()))])
        late = f"comes more than data.late_days = {data.late_days} days before the end of what was known"
        rejected.add(mask(pc.less(day, since)), late, older)

    used: dict[str, pa.ChunkedArray] = {}
    aggregates = [(item, parse(item.aggregate)) for item in data.behaviours]
    for name in sorted({column for _, aggregate in aggregates for column in aggregate.columns}):
        require(require_in, {"data.behaviours": name})
        column = plain_column(table, name, file)
        if pa.types.is_dictionary(column.type):
            column = _text(column, coded)
        used[name] = readable(column, rejected, name)
        if pa.types.is_floating(used[name].type):
            rejected.add(mask(pc.invert(pc.is_finite(used[name]))), f"`{name}` is not a finite number", used[name])
    events = pa.table({"user": user, "day": pa.chunked_array([day])} | used)
    measured: set[tuple[str | None, float]] = set()
    for item, aggregate in aggregates:
        if aggregate.function in ("sum", "min", "max", "mean"):
            if (aggregate.expression, item.resolution) in measured:
                continue  # the same numbers: what is wrong with them has been said
            measured.add((aggregate.expression, item.resolution))
            value = aggregate.evaluate(events)
            units = to_units(value, item.resolution)
            rejected.add(units.infinite, f"{item.name}: {aggregate} is not finite", value)
            rejected.add(units.finer, f"{item.name}: {aggregate} is finer than the resolution {item.resolution}", value)
            rejected.add(units.large, f"{item.name}: {aggregate} is more than 2^48 times {item.resolution}", value)
    if (items := item_column(data)) is not None:
        require(require_in, {"data.events.item": items})
        check_user(require_in, items)
        own = readable(pc.cast(plain_column(table, items, file), pa.string()), rejected, items)
        time_us, offset_min = to_instant(time, data.time_zone)
        rejected.add(mask(pc.is_null(own)), f"`{items}` is null")
        for name, column in (("item", own), ("time_us", time_us), ("offset_min", offset_min)):
            events = events.append_column(name, column)
    if data.events.id is not None:
        require(require_in, {"data.events.id": data.events.id})
        identity = readable(pc.cast(plain_column(table, data.events.id, file), pa.string()), rejected, data.events.id)
        rejected.add(mask(pc.is_null(identity)), f"`{data.events.id}` is null")
        rows = pa.array(row_numbers(first_row, table.num_rows))
        for name, column in zip(PROVENANCE, (identity, pa.repeat(pa.scalar(file), table.num_rows), rows), strict=True):
            events = events.append_column(name, column)
    return (events.filter(pa.array(~rejected.bad)) if rejected.bad.any() else events), rejected.table(user)


def read_events(
    uri: str,
    data: Data,
    name: str | None = None,
    row_groups: Sequence[int] | None = None,
    first_row: int = 0,
    batch_rows: int = 1 << 18,
    each: Callable[[pa.Table], pa.Table] = lambda events: events,
    overlay: Overlay = NOTHING,
    since: int | None = None,
) -> tuple[list[pa.Table], pa.Table]:
    """The cleaned events and the rejects of a file, or of some of its row groups (the first starting at `first_row`).

    Read in batches of `batch_rows`, a table each; `each` is applied to every cleaned batch (prepare aggregates there,
    so that only one raw batch is in memory). Raises UserError naming the file where it cannot be read.
    """
    columns = _event_columns(data)
    dictionary = columns if _aggregated_at_once(data) else ()
    events, rejects = [], []
    for batch, row in batches(uri, columns, row_groups, first_row, batch_rows, overlay, dictionary):
        cleaned, bad = clean_events(batch, data, name or uri.rsplit("/", 1)[-1], row, since)
        events.append(each(cleaned))
        rejects.append(bad)
    if not events:
        empty = empty_batch(uri, columns, overlay)
        events.append(each(clean_events(empty, data)[0]))
    return events, pa.concat_tables([REJECTS.empty_table(), *rejects])


def _event_columns(data: Data) -> list[str]:
    names = {column for item in data.behaviours for column in parse(item.aggregate).columns}
    maybe = {name for name in (data.events.id, item_column(data)) if name is not None}
    return sorted(names | {data.events.user, data.events.time} | maybe)


def drop_repeats(events: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Events with PROVENANCE -> the first (by file, row) of each (user, id), sorted by these, and the rejected rest."""
    keys = ["user", *PROVENANCE]
    events = events.take(pc.sort_indices(events, sort_keys=[(name, "ascending") for name in keys])).combine_chunks()
    again = np.zeros(events.num_rows, np.bool_)
    if events.num_rows > 1:
        user, identity = (events[name].combine_chunks() for name in keys[:2])
        again[1:] = mask(pc.and_(pc.equal(user[1:], user[:-1]), pc.equal(identity[1:], identity[:-1])))
    bad = events.filter(pa.array(again))
    reason = pa.repeat(pa.scalar("repeats an id of its user"), bad.num_rows)
    rejects = pa.table([bad["@file"], bad["@row"], reason, bad["@id"], bad["user"]], schema=REJECTS)
    return events.filter(pa.array(~again)), rejects


def plain_column(table: pa.Table, name: str, file: str) -> pa.ChunkedArray:
    """The column as `expressions.plain` gives it. Raises UserError for whole numbers that do not fit in 64 bits."""
    try:
        return plain(table[name])
    except pa.ArrowInvalid:  # its message holds the value
        raise UserError(f"{file}: column `{name}`: expected numbers that fit in 64 bits; cast it") from None


def _aggregated_at_once(data: Data) -> bool:
    """Whether blocks become daily states as they are read: dictionaries pay then. Events that are kept one by one are
    sorted by their strings, and travel through files in which every batch would need the same dictionary."""
    return bool(data.behaviours) and data.events.id is None


def _text(column: pa.ChunkedArray, coded: bool) -> pa.ChunkedArray:
    """As strings; with `coded`, as the dictionary of strings that they came as."""
    return column if coded and pa.types.is_dictionary(column.type) else pc.cast(column, pa.string())


def _is_string(found: pa.DataType) -> bool:
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found))
