"""Delta Lake tables: which parquet files a version has, what its log knows of them, and which came since another.

The files are read by our own reader (`raw`), so that a table gives the same bytes as the same rows in a folder; the log
is read by `deltalake`. A table is written `path@v12` where its version is pinned, as Spark writes it.

Choices that are not obvious:
- Deleted rows (deletion vectors) are left out row by row, and the others keep their row numbers in the rejects.
- Column mapping is refused: its files hold other names than the table.
- What came since a version is read from the commits, not from the difference of two lists of files: OPTIMIZE writes
  files of old rows (`dataChange` false), and takes files away whose rows are new.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from lum_ray.artifacts import UserError, join, read_bytes, storage

LOG = "_delta_log"
TYPES = {
    "string": pa.string(),
    "long": pa.int64(),
    "integer": pa.int32(),
    "short": pa.int16(),
    "byte": pa.int8(),
    "float": pa.float32(),
    "double": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", "UTC"),
    "timestamp_ntz": pa.timestamp("us"),
}
READ = ("deletionVectors", "timestampNtz", "typeWidening", "v2Checkpoint", "vacuumProtocolCheck")
"""Reader features under which our reader gives the right rows; column mapping is looked at by itself."""


@dataclass(frozen=True)
class DeltaFile:
    """A data file of a table: its path below the table, its URI, the values of its partition columns as text, its
    deleted rows, and the least and greatest value of one column, as text, where the log has them."""

    path: str
    uri: str
    partition: Mapping[str, str | None]
    deleted: tuple[int, ...] = ()
    bounds: tuple[str, str] | None = None


@dataclass(frozen=True)
class DeltaTable:
    """A version of a table: its id, its columns (name -> Delta's type, without nested ones) and its files."""

    uri: str
    id: str
    version: int
    columns: Mapping[str, str]
    files: tuple[DeltaFile, ...]


class NoIncrementError(Exception):
    """Why a version cannot be read as an earlier one and what was added since."""


def split(uri: str) -> tuple[str, int | None]:
    """`path@v12` as (path, 12), any other as (path, None)."""
    found = re.fullmatch(r"(.+)@v(\d+)", uri.rstrip("/"))
    return (found[1], int(found[2])) if found else (uri, None)


def is_table(uri: str) -> bool:
    """Whether `uri` (with or without a version) is a Delta table."""
    place = storage(join(split(uri)[0], LOG))
    return bool(place.filesystem.get_file_info(place.path).type == fs.FileType.Directory)


def pin(path: str, version: int | None, timestamp: str | None, where: str) -> int | None:
    """The version that `path` is read at: that one, the one of `timestamp` or the newest; None for no Delta table.

    Raises UserError, naming `where` in the run file, for a timestamp before the table, and for what is given for
    something else. A version that is not there is found when it is read.
    """
    plain, inside = split(path)
    given = version is not None or timestamp is not None
    if inside is not None and given:
        raise UserError(f"{where}.path: {path} names a version itself; leave out {where}.version and timestamp")
    if not is_table(path):
        if given or inside is not None:
            raise UserError(
                f"{where}.path: {plain}: expected a Delta table, because a version or a timestamp is given, but there "
                f"is no {LOG}; mend the path, or leave the version out for a folder of parquet files"
            )
        return None
    if version is not None:
        return version
    return int(_open(plain, inside, timestamp, where).version())


def table_print(uri: str) -> dict[str, Any]:
    """What says that a table (with its version, `path@v12`) is the same as before."""
    path, version = split(uri)
    table = _open(path, version)
    return {"delta": str(table.metadata().id), "version": int(table.version())}


def read_table(uri: str, bounds_of: str | None = None) -> DeltaTable:
    """The files of a table (with or without a version). `bounds_of` names the column whose bounds are wanted.

    Raises UserError for a version that is not there any more and for reader features that we do not have.
    """
    path, version = split(uri)
    table = _open(path, version)
    columns = _checked(path, table)
    partitions = list(table.metadata().partition_columns)
    actions = pa.table(table.get_add_actions(flatten=True))
    names = [f"partition.{name}" for name in partitions]
    values = [_texts(actions, name) for name in names]
    paths = [unquote(found) for found in actions["path"].to_pylist()]
    least, greatest = (_texts(actions, f"{end}.{bounds_of}") for end in ("min", "max"))
    deleted = _deleted(table)
    files = []
    for index, name in enumerate(paths):
        partition = {column: values[number][index] for number, column in enumerate(partitions)}
        bounds = _bounds(partition, bounds_of, least[index], greatest[index])
        files.append(DeltaFile(name, _uri(path, name), partition, deleted.get(name.rsplit("/", 1)[-1], ()), bounds))
    ordered = tuple(sorted(files, key=lambda file: file.path))
    return DeltaTable(path, str(table.metadata().id), int(table.version()), columns, ordered)


def added_since(uri: str, version: int, bounds_of: str | None = None) -> DeltaTable:
    """The table (with its version) with only the files whose rows came after `version`.

    Raises NoIncrementError where rows were taken away or changed since, and where the log does not reach back so far.
    """
    path, until = split(uri)
    table = _open(path, until)
    columns = _checked(path, table)
    files: dict[str, DeltaFile] = {}
    moved: set[str] = set()
    for number in range(version + 1, int(table.version()) + 1):
        try:
            lines = read_bytes(join(path, LOG, f"{number:020d}.json")).splitlines()
        except FileNotFoundError:
            raise NoIncrementError(f"version {number} is not in the log any more") from None
        for action in map(json.loads, filter(None, lines)):
            if (action.get("remove") or {}).get("dataChange"):
                raise NoIncrementError(f"version {number} took rows away or changed them")
            if "remove" in action:
                moved.add(unquote(action["remove"]["path"]))
            add = action.get("add")
            if not add or not add["dataChange"]:
                continue
            if add.get("deletionVector"):
                raise NoIncrementError(f"version {number} took rows away or changed them")
            stats = json.loads(add.get("stats") or "{}")
            partition = add["partitionValues"]
            ends = [(stats.get(key) or {}).get(bounds_of) for key in ("minValues", "maxValues")]
            least, greatest = (None if end is None else str(end) for end in ends)
            name = unquote(add["path"])
            bounds = _bounds(partition, bounds_of, least, greatest)
            files[name] = DeltaFile(name, _uri(path, name), partition, (), bounds)
    for name in sorted(moved & set(files)):
        place = storage(files[name].uri)
        if not place.filesystem.get_file_info(place.path).is_file:
            raise NoIncrementError(f"file {name}, which came since, was compacted and then removed by VACUUM")
    ordered = tuple(files[name] for name in sorted(files))
    return DeltaTable(path, str(table.metadata().id), int(table.version()), columns, ordered)


def constant(kind: str, text: str | None) -> pa.Scalar:
    """A partition value (text, as the log has it) as a scalar of Delta's type `kind`; None and "" are null."""
    wanted = _arrow(kind)
    if text is None or text == "":
        return pa.scalar(None, wanted)
    if pa.types.is_timestamp(wanted):
        text = text if wanted.tz is None or re.search(r"(Z|[+-]\d\d:?\d\d)$", text) else f"{text}Z"
        text = text if wanted.tz is not None else text.removesuffix("Z")
    return pc.cast(pa.scalar(text), wanted)


def _arrow(kind: str) -> pa.DataType:
    decimal = re.fullmatch(r"decimal\((\d+),\s*(\d+)\)", kind)
    return pa.decimal128(int(decimal[1]), int(decimal[2])) if decimal else TYPES[kind]


def is_plain(kind: Any) -> bool:
    """Whether Delta's type `kind` is one of single values that a run can read."""
    return isinstance(kind, str) and (kind in TYPES or kind.startswith("decimal("))


def _open(path: str, version: int | None, timestamp: str | None = None, where: str = "") -> Any:
    import deltalake
    from deltalake.exceptions import DeltaError

    uri = path if "://" in path else os.path.abspath(path)
    try:
        table = deltalake.DeltaTable(uri, storage_options=dict(storage(path).options))
        newest = table.version()
        if timestamp is not None:
            _load_as_of(table, _instant(timestamp, where), f"{where}.timestamp: {path}")
        elif version is not None and version != newest:
            table.load_as_version(version)
    except DeltaError as error:
        wanted = f"at version {version}" if version is not None else f"as of {timestamp}" if timestamp else ""
        raise UserError(
            f"{where or path}{f': {path}' if where else ''}: cannot read this Delta table {wanted} "
            f"({' '.join(str(error).split())[:200]}); "
            + (
                f"its newest version is {_newest(path)}; old ones may have been removed from the log"
                if wanted
                else "look at its _delta_log, or write the table again"
            )
        ) from None
    return table


def _load_as_of(table: Any, instant: datetime, where: str) -> None:
    table.load_as_version(instant)
    history: list[dict[str, Any]] = table.history(1)
    written = history[0].get("timestamp") if history else None
    # the library takes the earliest version for a time before it
    if written is not None and written > instant.timestamp() * 1000:
        first = datetime.fromtimestamp(written / 1000, UTC).isoformat()
        raise UserError(f"{where}: has no version as of {instant.isoformat()}; the earliest that is left is of {first}")


def _newest(path: str) -> int:
    place = storage(join(path, LOG))
    found = place.filesystem.get_file_info(fs.FileSelector(place.path))
    return max((int(item.base_name[:20]) for item in found if re.match(r"\d{20}\.", item.base_name)), default=-1)


def _instant(timestamp: str, where: str) -> datetime:
    try:
        instant = datetime.fromisoformat(timestamp)
        return instant if instant.tzinfo else instant.replace(tzinfo=UTC)
    except ValueError:
        raise UserError(
            f"{where}.timestamp: expected an ISO time such as 2024-03-01T00:00:00Z, got {timestamp!r}"
        ) from None


def _checked(path: str, table: Any) -> dict[str, str]:
    """The columns of a table that our reader gives the right rows of. Raises UserError for any other."""
    mode = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mode != "none":
        raise UserError(
            f"{path}: the table uses column mapping (delta.columnMapping.mode = {mode}), which is not read; write it "
            "without: ALTER TABLE ... SET TBLPROPERTIES ('delta.columnMapping.mode' = 'none') rewrites its files"
        )
    unknown = sorted(set(table.protocol().reader_features or ()) - {*READ, "columnMapping"})
    if unknown:
        raise UserError(
            f"{path}: the table needs readers that know {', '.join(unknown[:5])}, which is not read; drop the feature "
            "(ALTER TABLE ... DROP FEATURE), or write the rows to a table without it"
        )
    fields = json.loads(table.schema().to_json())["fields"]
    return {field["name"]: field["type"] for field in fields if is_plain(field["type"])}


def _deleted(table: Any) -> dict[str, tuple[int, ...]]:
    """Deleted rows by file name (they hold a UUID, and the URIs come back in another spelling)."""
    found = {}
    for batch in (
        pa.table(table.deletion_vectors()).to_batches()
        if "deletionVectors" in (table.protocol().reader_features or ())
        else ()
    ):
        for uri, keep in zip(batch["filepath"].to_pylist(), batch["selection_vector"], strict=True):
            gone = pc.indices_nonzero(pc.invert(keep.values))
            found[unquote(uri).rsplit("/", 1)[-1]] = tuple(gone.to_pylist())
    return found


def _texts(actions: pa.Table, name: str) -> list[str | None]:
    if name not in actions.column_names:
        return [None] * actions.num_rows
    texts: list[str | None] = pc.cast(actions[name], pa.string()).to_pylist()
    return texts


def _bounds(
    partition: Mapping[str, str | None], column: str | None, least: str | None, greatest: str | None
) -> tuple[str, str] | None:
    if column is not None and column in partition:
        least = greatest = partition[column] or None
    return None if least is None or greatest is None else (least, greatest)


def _uri(table: str, path: str) -> str:
    return path if "://" in path else join(table, path)
