"""The files of the raw tables: what a folder or a Delta table holds, and their rows in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lum_ray.artifacts import UserError, list_files, reach, storage
from lum_ray.data import delta

UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What Arrow raises for a damaged file."""


@dataclass(frozen=True)
class RawTables:
    """Where the raw tables are: a folder of parquet files, one file, or a Delta table each, local or s3://."""

    events: str
    profiles: str | None = None
    calendar: str | None = None


@dataclass(frozen=True)
class Overlay:
    """What a Delta table knows of a file that the file does not hold: columns of one value (name, Delta's type, text or
    None for null), and the rows that are deleted, ascending."""

    constants: tuple[tuple[str, str, str | None], ...] = ()
    deleted: tuple[int, ...] = ()


NOTHING = Overlay()


@dataclass(frozen=True)
class RawFile:
    """A parquet file of a raw table: its URI, its name in rejects, its size and the rows of each of its row groups."""

    uri: str
    name: str
    bytes: int
    row_groups: tuple[int, ...]
    schema: pa.Schema = field(repr=False, compare=False)
    overlay: Overlay = NOTHING

    @property
    def rows(self) -> int:
        return sum(self.row_groups) - len(self.overlay.deleted)


Keep = Callable[[pa.Array], bool]
"""Whether a file is wanted whose column holds values between these two."""


def raw_files(uri: str, table: str, prune: tuple[str, Keep] | None = None) -> list[RawFile]:
    """The parquet files of a raw table, by name, every footer read. `table` is `events`, `profiles` or `calendar`.

    `prune` (column, which files are wanted) leaves out files of a Delta table by what its log knows of the column.
    Raises UserError for no files, a file that is no parquet or is cut off, and a table without rows.
    """
    if delta.is_table(uri):
        found = delta.read_table(uri, prune[0] if prune else None)
        files = delta_files(found, table, prune)
        if found.files and not files:
            return []
    else:
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


def delta_files(found: delta.DeltaTable, table: str, prune: tuple[str, Keep] | None = None) -> list[RawFile]:
    """The files of a version (or those added since another) that `prune` wants, every footer read."""
    files = [file for file in found.files if prune is None or _wanted(file, found.columns, *prune)]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda file: _of_delta(file, found, table), files))


def _wanted(file: delta.DeltaFile, columns: Mapping[str, str], column: str, keep: Keep) -> bool:
    if file.bounds is None or column not in columns:
        return True
    return keep(pa.array([delta.constant(columns[column], bound).as_py() for bound in file.bounds],
                         delta.constant(columns[column], None).type))  # fmt: skip


def _of_delta(file: delta.DeltaFile, found: delta.DeltaTable, table: str) -> RawFile:
    missing = (
        f"version {found.version} of {found.uri} names this file, but VACUUM or somebody else has removed it; read a "
        "newer version, or restore the file"
    )
    raw = _footer(file.uri, found.uri, table, missing)
    there = raw.schema.names
    constants = tuple(
        (name, kind, file.partition.get(name))
        for name, kind in found.columns.items()
        if name in file.partition or name not in there
    )
    schema = raw.schema
    for name, kind, text in constants:
        if name in there:  # some writers keep partition columns in the files: the log's value counts
            schema = schema.remove(schema.get_field_index(name))
        schema = schema.append(pa.field(name, delta.constant(kind, text).type))
    return RawFile(raw.uri, raw.name, raw.bytes, raw.row_groups, schema, Overlay(constants, file.deleted))


def _footer(uri: str, root: str, table: str, missing: str | None = None) -> RawFile:
    file = open_parquet(uri, missing)
    metadata = file.metadata
    groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    below = uri[len(root.rstrip("/")) + 1 :] or uri.rsplit("/", 1)[-1]
    place = storage(uri)
    size = place.filesystem.get_file_info(place.path).size
    return RawFile(uri, f"{table}/{below}", int(size or 0), groups, file.schema_arrow)


def open_parquet(uri: str, missing: str | None = None, dictionary: Sequence[str] = ()) -> pq.ParquetFile:
    """The parquet file at `uri`; strings of the columns `dictionary` are read as dictionaries.

    Raises UserError naming the file where it is none, is cut off or is missing.
    """
    return reach(uri, lambda: _open_parquet(uri, missing, dictionary))


def _open_parquet(uri: str, missing: str | None, dictionary: Sequence[str]) -> pq.ParquetFile:
    place = storage(uri)
    try:
        stream = place.filesystem.open_input_file(place.path)
        file = pq.ParquetFile(stream, pre_buffer=not place.is_local, read_dictionary=list(dictionary))
        file.schema_arrow.names  # noqa: B018 (a damaged footer shows here: names that are no UTF-8, unknown types)
        return file
    except FileNotFoundError:
        hint = missing or "was it moved while the job ran?"
        raise UserError(f"{uri}: expected a parquet file, found nothing; {hint}") from None
    except UNREADABLE as error:
        raise unreadable(uri, error) from None


def unreadable(uri: str, error: Exception) -> UserError:
    """What to say of a file whose content cannot be read."""
    return UserError(
        f"{uri}: expected a complete parquet file, cannot read it ({' '.join(str(error).split())[:200]}); "
        "it is another format, was cut off or is damaged: write it again, or move it out of the folder"
    )


RowNumbers = int | npt.NDArray[np.int64]
"""The row in its file of each row of a batch, or of the first where they follow each other."""


def batches(
    uri: str,
    columns: Sequence[str],
    row_groups: Sequence[int] | None,
    first_row: int,
    batch_rows: int,
    overlay: Overlay = NOTHING,
    dictionary: Sequence[str] = (),
) -> Iterator[tuple[pa.Table, RowNumbers]]:
    """Yield (table, its rows in the file) of a file's row groups, at most `batch_rows` at a time.

    Strings of the columns `dictionary` come as dictionaries.
    """
    constants = {name: delta.constant(kind, text) for name, kind, text in overlay.constants if name in columns}
    stored = [name for name in columns if name not in constants]
    file = open_parquet(uri, dictionary=[name for name in dictionary if name in stored])
    groups = list(range(file.metadata.num_row_groups)) if row_groups is None else list(row_groups)
    deleted = np.array(overlay.deleted, np.int64)
    row = first_row
    try:
        for table in _joined(
            file.iter_batches(batch_rows, row_groups=groups, columns=stored, use_threads=False), batch_rows
        ):
            rows = table.num_rows
            for name, value in constants.items():
                table = table.append_column(name, pa.repeat(value, rows))
            inside = deleted[np.searchsorted(deleted, row) : np.searchsorted(deleted, row + rows)]
            if len(inside):
                kept = np.setdiff1d(np.arange(row, row + rows), inside, assume_unique=True)
                yield table.take(pa.array(kept - row)), kept
            else:
                yield table, row
            row += rows
    except UNREADABLE as error:
        raise unreadable(uri, error) from None


def _joined(pieces: Iterator[pa.RecordBatch], batch_rows: int) -> Iterator[pa.Table]:
    """Batches as tables of at most `batch_rows`: a dictionary ends with its row group, and so does its batch."""
    held: list[pa.RecordBatch] = []
    for piece in pieces:
        if held and sum(one.num_rows for one in held) + piece.num_rows > batch_rows:
            yield pa.Table.from_batches(held).unify_dictionaries().combine_chunks()
            held = []
        held.append(piece)
    if held:
        yield pa.Table.from_batches(held).unify_dictionaries().combine_chunks()


def empty_batch(uri: str, columns: Sequence[str], overlay: Overlay = NOTHING) -> pa.Table:
    """What `batches` yields, without a row."""
    constants = {name: delta.constant(kind, None).type for name, kind, _ in overlay.constants if name in columns}
    table = open_parquet(uri).schema_arrow.empty_table().select([name for name in columns if name not in constants])
    for name, kind in constants.items():
        table = table.append_column(name, pa.array([], kind))
    return table


def to_json(overlay: Overlay) -> dict[str, Any]:
    """An overlay as it travels with a task; {} for none."""
    return asdict(overlay) if overlay != NOTHING else {}


def from_json(plain: Mapping[str, Any]) -> Overlay:
    return Overlay(tuple((n, k, t) for n, k, t in plain.get("constants", ())), tuple(plain.get("deleted", ())))
