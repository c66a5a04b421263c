"""The raw tables: their files, columns and types, what a row must be, and the table of rejected rows.

Checks come in two kinds. What is wrong with a file (not parquet, cut off, a missing or mistyped column, no rows) stops
everything with a UserError before anything starts. What is wrong with a row sends the row to the rejects, a table of
(file, row, reason): `file` is `<table>/<path below the table's folder>`, so that it does not depend on the machine,
`row` counts from 0 in the file.

Choices: a timestamp without a zone is refused unless the run's time zone is UTC (then it is read as UTC; see `times`).
Integer users and items are read as their decimal digits.
"""

from __future__ import annotations

import difflib
import zoneinfo
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lum_ray.artifacts import UserError, list_files, storage
from lum_ray.config import Data, day_number
from lum_ray.data.expressions import parse, plain, to_units
from lum_ray.data.times import to_day, to_instant

Bool = npt.NDArray[np.bool_]
REJECTS = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())])
RESERVED = ("bucket", "user", "user_hash", "days", "day")
"""Columns of the timelines, which no behaviour may be named after."""
PROVENANCE = ("@id", "@file", "@row")
"""Columns that cleaned events carry besides where `events.id` is set, so that `drop_repeats` can find repeated rows."""


@dataclass(frozen=True)
class RawTables:
    """Where the raw tables are: a folder of parquet files (or one file) each, local or s3://."""

    events: str
    profiles: str | None = None
    calendar: str | None = None


@dataclass(frozen=True)
class RawFile:
    """A parquet file of a raw table: its URI, its name in rejects, its size and the rows of each of its row groups."""

    uri: str
    name: str
    bytes: int
    row_groups: tuple[int, ...]
    schema: pa.Schema = field(repr=False, compare=False)

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


def raw_files(uri: str, table: str) -> list[RawFile]:
    """The parquet files of a raw table, by name, every footer read. `table` is `events`, `profiles` or `calendar`.

    Raises UserError for no files, a file that is no parquet or is cut off, and a table without rows.
    """
    uris = list_files(uri, ".parquet")
    if not uris:
        there = [name.rsplit("/", 1)[-1] for name in list_files(uri)][:5]
        raise UserError(f"data.{table}.path: {uri}: expected *.parquet files, found {there or 'an empty folder'}")
    with ThreadPoolExecutor(16) as pool:
        files = list(pool.map(lambda name: _footer(name, uri, table), uris))
    if not any(file.rows for file in files):
        raise UserError(
            f"data.{table}.path: {uri}: expected rows, but the {len(files)} file(s) hold none; "
            + (
                "check the export"
                if table == "events"
                else f"check the export, or remove `data.{table}` from the run file"
            )
        )
    return files


def _footer(uri: str, root: str, table: str) -> RawFile:
    file = open_parquet(uri)
    metadata = file.metadata
    groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    below = uri[len(root.rstrip("/")) + 1 :] or uri.rsplit("/", 1)[-1]
    place = storage(uri)
    size = place.filesystem.get_file_info(place.path).size
    return RawFile(uri, f"{table}/{below}", int(size or 0), groups, file.schema_arrow)


def open_parquet(uri: str, dictionary: Sequence[str] = ()) -> pq.ParquetFile:
    """The parquet file at `uri`; strings of the columns `dictionary` are read as dictionaries.

    Raises UserError naming the file where it is none, is cut off or is missing.
    """
    place = storage(uri)
    try:
        stream = place.filesystem.open_input_file(place.path)
        return pq.ParquetFile(stream, pre_buffer=not place.is_local, read_dictionary=list(dictionary))
    except FileNotFoundError:
        raise UserError(f"{uri}: expected a parquet file, found nothing; was it moved while the job ran?") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(uri, error) from None


def unreadable(uri: str, error: Exception) -> UserError:
    """What to say of a file whose content cannot be read."""
    return UserError(
        f"{uri}: expected a complete parquet file, cannot read it ({' '.join(str(error).split())[:200]}); "
        "it is another format, was cut off or is damaged: write it again, or move it out of the folder"
    )


def check_events(uri: str, data: Data) -> list[RawFile]:
    """The event files, after checking the behaviours and the columns and types of every file.

    Raises UserError naming the file, the column, what was expected and how to mend it.
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
    files = raw_files(uri, "events")
    for file in files:
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
            try:
                parse(item.aggregate).check(file.schema)
            except UserError as error:
                raise UserError(f"data.behaviours.{item.name}: {error}; in {file.uri}") from None
    return files


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
        if name not in there:
            close = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"it has: {', '.join(there[:20])}"
            raise UserError(f"{file.uri}: missing column `{name}` ({path}); {hint}")


def check_user(file: RawFile, column: str) -> None:
    """Raise UserError unless the column holds strings or whole numbers."""
    found = _decoded(file.schema.field(column).type)
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


class Rejected:
    """Collects for each row of a block the first reason against it."""

    def __init__(self, file: str, first_row: int, rows: int) -> None:
        self.file, self.first_row = file, first_row
        self.bad = np.zeros(rows, np.bool_)
        self._rows: list[npt.NDArray[np.int64]] = []
        self._reasons: list[pa.Array] = []

    def add(self, wrong: Bool, reason: str, values: pa.ChunkedArray | None = None) -> None:
        """Reject the rows of the mask `wrong` (N,) that are not rejected yet; `{}` in `reason` is a row's value."""
        rows = np.flatnonzero(wrong & ~self.bad)
        if len(rows) == 0:
            return
        self.bad[rows] = True
        # as Arrow writes them: Python has no datetime after the year 9999
        shown = (
            [None] * len(rows) if values is None else pc.cast(pc.take(values, pa.array(rows)), pa.string()).to_pylist()
        )
        self._rows.append(rows)
        self._reasons.append(pa.array([reason.format(value) for value in shown], pa.string()))

    def table(self) -> pa.Table:
        """The rejects so far, by row."""
        if not self._rows:
            return REJECTS.empty_table()
        rows = np.concatenate(self._rows)
        order = np.argsort(rows)
        reasons = pa.concat_arrays(self._reasons).take(pa.array(order))
        file = pa.repeat(pa.scalar(self.file), len(rows))
        return pa.table([file, pa.array(rows[order] + self.first_row, pa.int64()), reasons], schema=REJECTS)


def mask(values: Any) -> Bool:
    """An Arrow condition as numpy, null as False."""
    array = pc.fill_null(values, False) if values.null_count else values
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    return np.asarray(array.to_numpy(zero_copy_only=False), np.bool_)


def clean_events(table: pa.Table, data: Data, file: str = "events", first_row: int = 0) -> tuple[pa.Table, pa.Table]:
    """Events (N rows, as they are in a file or a request) for the tokenizer, and the rejects (file, row, reason).

    Returns (user string, day int32, the columns that the behaviours use; without behaviours but with `events.item`:
    item string, time_us and offset_min, see `to_instant`; with `events.id` also PROVENANCE, see `drop_repeats`).
    Strings that come as dictionaries stay such where the events are aggregated at once (`_aggregated_at_once`).
    Rejected: a null user, a null time, a NaN or infinite number, a value finer than its behaviour's resolution or too
    large, a day outside [data.start, data.end), a null item, a null id.
    Raises UserError for missing or mistyped columns.
    """
    require_in = RawFile(file, file, 0, (table.num_rows,), table.schema)
    require(require_in, {"data.events.user": data.events.user, "data.events.time": data.events.time})
    check_user(require_in, data.events.user)
    check_time(require_in, data.events.time, data.time_zone)
    rejected = Rejected(file, first_row, table.num_rows)
    coded = _aggregated_at_once(data)
    user, time = _text(_plain(table, data.events.user, file), coded), table[data.events.time]
    day = to_day(time, data.time_zone)
    rejected.add(mask(pc.is_null(user)), f"`{data.events.user}` is null")
    rejected.add(mask(pc.is_null(time)), f"`{data.events.time}` is null")
    rejected.add(mask(pc.is_null(day)), f"`{data.events.time}` is {{}}, which is not a day within 32 bits", time)
    if data.start is not None:
        rejected.add(mask(pc.less(day, day_number(data.start))), f"{{}} is before data.start, {data.start}", time)
    if data.end is not None:
        rejected.add(
            mask(pc.greater_equal(day, day_number(data.end))), f"{{}} is not before data.end, {data.end}", time
        )

    used: dict[str, pa.ChunkedArray] = {}
    aggregates = [(item, parse(item.aggregate)) for item in data.behaviours]
    for name in sorted({column for _, aggregate in aggregates for column in aggregate.columns}):
        require(require_in, {"data.behaviours": name})
        used[name] = _plain(table, name, file)
        if pa.types.is_dictionary(used[name].type):
            used[name] = _text(used[name], coded)
        if pa.types.is_floating(used[name].type):
            rejected.add(mask(pc.invert(pc.is_finite(used[name]))), f"`{name}` is {{}}", used[name])
    events = pa.table({"user": user, "day": pa.chunked_array([day])} | used)
    measured: set[tuple[str | None, float]] = set()
    for item, aggregate in aggregates:
        if aggregate.function in ("sum", "min", "max", "mean"):
            if (aggregate.expression, item.resolution) in measured:
                continue  # the same numbers: what is wrong with them has been said
            measured.add((aggregate.expression, item.resolution))
            value = aggregate.evaluate(events)
            units = to_units(value, item.resolution)
            rejected.add(units.infinite, f"{item.name}: {aggregate} is {{}}", value)
            rejected.add(
                units.finer, f"{item.name}: {aggregate} is {{}}, finer than the resolution {item.resolution}", value
            )
            rejected.add(
                units.large, f"{item.name}: {aggregate} is {{}}, more than 2^48 times {item.resolution}", value
            )
    if (items := item_column(data)) is not None:
        require(require_in, {"data.events.item": items})
        check_user(require_in, items)
        own = pc.cast(_plain(table, items, file), pa.string())
        time_us, offset_min = to_instant(time, data.time_zone)
        rejected.add(mask(pc.is_null(own)), f"`{items}` is null")
        rejected.add(mask(pc.is_null(time_us)), f"`{data.events.time}` is {{}}, too far for microseconds", time)
        for name, column in (("item", own), ("time_us", time_us), ("offset_min", offset_min)):
            events = events.append_column(name, column)
    if data.events.id is not None:
        require(require_in, {"data.events.id": data.events.id})
        identity = pc.cast(_plain(table, data.events.id, file), pa.string())
        rejected.add(mask(pc.is_null(identity)), f"`{data.events.id}` is null")
        rows = pa.array(np.arange(first_row, first_row + table.num_rows))
        for name, column in zip(PROVENANCE, (identity, pa.repeat(pa.scalar(file), table.num_rows), rows), strict=True):
            events = events.append_column(name, column)
    return (events.filter(pa.array(~rejected.bad)) if rejected.bad.any() else events), rejected.table()


def read_events(
    uri: str,
    data: Data,
    name: str | None = None,
    row_groups: Sequence[int] | None = None,
    first_row: int = 0,
    batch_rows: int = 1 << 18,
    each: Callable[[pa.Table], pa.Table] = lambda events: events,
) -> tuple[list[pa.Table], pa.Table]:
    """The cleaned events and the rejects of a file, or of some of its row groups (the first starting at `first_row`).

    Read in batches of `batch_rows`, a table each; `each` is applied to every cleaned batch (prepare aggregates there,
    so that only one raw batch is in memory). Raises UserError naming the file where it cannot be read.
    """
    columns = _event_columns(data)
    dictionary = columns if _aggregated_at_once(data) else ()
    events, rejects = [], []
    for batch, row in batches(uri, columns, row_groups, first_row, batch_rows, dictionary):
        cleaned, bad = clean_events(batch, data, name or uri.rsplit("/", 1)[-1], row)
        events.append(each(cleaned))
        rejects.append(bad)
    if not events:
        empty = open_parquet(uri).schema_arrow.empty_table()
        events.append(each(clean_events(empty, data)[0]))
    return events, pa.concat_tables([REJECTS.empty_table(), *rejects])


def _event_columns(data: Data) -> list[str]:
    names = {column for item in data.behaviours for column in parse(item.aggregate).columns}
    maybe = {name for name in (data.events.id, item_column(data)) if name is not None}
    return sorted(names | {data.events.user, data.events.time} | maybe)


def batches(
    uri: str,
    columns: Sequence[str],
    row_groups: Sequence[int] | None,
    first_row: int,
    batch_rows: int,
    dictionary: Sequence[str] = (),
) -> Iterator[tuple[pa.Table, int]]:
    """Yield (table, its first row in the file) of a file's row groups, at most `batch_rows` at a time.

    Strings of the columns `dictionary` come as dictionaries.
    """
    file = open_parquet(uri, dictionary)
    groups = list(range(file.metadata.num_row_groups)) if row_groups is None else list(row_groups)
    pieces: list[pa.RecordBatch] = []
    row, held = first_row, 0
    try:
        for batch in file.iter_batches(batch_rows, row_groups=groups, columns=list(columns), use_threads=False):
            # a dictionary ends with its row group, and so does its batch
            if held + batch.num_rows > batch_rows:
                yield _joined(pieces), row
                pieces, row, held = [], row + held, 0
            pieces.append(batch)
            held += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise unreadable(uri, error) from None
    if pieces:
        yield _joined(pieces), row


def _joined(pieces: Sequence[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(pieces).unify_dictionaries().combine_chunks()


def drop_repeats(events: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Events with PROVENANCE -> the first (by file, row) of each (user, id) without it, and the rejected rest."""
    keys = ["user", *PROVENANCE]
    events = events.take(pc.sort_indices(events, sort_keys=[(name, "ascending") for name in keys])).combine_chunks()
    again = np.zeros(events.num_rows, np.bool_)
    if events.num_rows > 1:
        user, identity = (events[name].combine_chunks() for name in keys[:2])
        again[1:] = mask(pc.and_(pc.equal(user[1:], user[:-1]), pc.equal(identity[1:], identity[:-1])))
    bad = events.filter(pa.array(again))
    reason = pc.binary_join_element_wise("repeats the id ", bad["@id"], " of user ", bad["user"], "")
    rejects = pa.table([bad["@file"], bad["@row"], reason], schema=REJECTS)
    return events.filter(pa.array(~again)).drop_columns(list(PROVENANCE)), rejects


def _plain(table: pa.Table, name: str, file: str) -> pa.ChunkedArray:
    try:
        return plain(table[name])
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: column `{name}`: expected numbers that fit in 64 bits: {error}; cast it") from None


def _aggregated_at_once(data: Data) -> bool:
    """Whether blocks become daily states as they are read: dictionaries pay then. Events that are kept one by one are
    sorted by their strings, and travel through files in which every batch would need the same dictionary."""
    return bool(data.behaviours) and data.events.id is None


def _text(column: pa.ChunkedArray, coded: bool) -> pa.ChunkedArray:
    """As strings; with `coded`, as the dictionary of strings that they came as."""
    return column if coded and pa.types.is_dictionary(column.type) else pc.cast(column, pa.string())


def _decoded(found: pa.DataType) -> pa.DataType:
    return found.value_type if pa.types.is_dictionary(found) else found


def _is_string(found: pa.DataType) -> bool:
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found))
