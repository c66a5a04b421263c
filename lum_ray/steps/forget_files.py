"""Files and artifacts without some users: what `forget` writes in place of what is there.

An artifact's files that its manifest names are written under new names beside the old ones; the new manifest comes
back, for the caller to put in place. Files that are read by listing their folder are replaced in place, at once.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from lum_ray.artifacts import UserError, digest, join, storage, write_bytes, write_table
from lum_ray.steps.traces import Sought, starts_as_parquet, tables_of, theirs

Manifest = dict[str, Any]


def in_place(uri: str, sought: Sought) -> int:
    """Rewrite a table's file without the users, row group by row group, and return how many rows they had."""
    gone, content = _without(uri, sought)
    write_bytes(uri, content)
    return gone


def rewritten(uri: str, manifest: Mapping[str, Any], sought: Sought) -> Manifest | None:
    """The manifest of a calendar or a state at `uri` over a new file without the users; None where it is without them.

    Raises UserError for an artifact of another kind.
    """
    match manifest["kind"]:
        case "calendar":
            return _calendar(uri, dict(manifest), sought)
        case "state":
            return _state(uri, dict(manifest), sought)
    raise UserError(f"{uri}: holds a user, but `forget` knows no artifacts of kind {manifest['kind']!r}; remove it")


def named_files(manifest: Mapping[str, Any]) -> set[str]:
    """The paths below a calendar or a state of the files that its manifest names."""
    return {entry["name"] for entry in manifest["files"]} if "files" in manifest else {manifest["file"]}


def new_name(name: str, sought: Sought) -> str:
    """The name of the file that takes a file's place: the same on a second try, and never longer by one more."""
    stem, dot, suffix = name.partition(".")
    return f"{re.sub('-[0-9a-f]{8}$', '', stem)}-{digest(name, sought.hashes)[:8]}{dot}{suffix}"


def _rejects(uri: str) -> pa.Table:
    place = storage(join(uri, "rejects", "0000.parquet"))
    try:
        with place.filesystem.open_input_file(place.path) as stream:
            return pq.read_table(stream)
    except FileNotFoundError:
        return pa.table({"file": pa.array([], pa.string()), "user": pa.array([], pa.string())})


def _calendar(uri: str, manifest: Manifest, sought: Sought) -> Manifest | None:
    rejects = _rejects(uri)
    rejected = int(theirs(rejects, sought).sum()) if manifest["rows_rejected"] == rejects.num_rows else 0
    files, rows = [], 0
    kinds = set[str]()
    for entry in manifest["files"]:
        table = pa.concat_tables(tables_of(join(uri, entry["name"])))
        gone = theirs(table, sought)
        left = table.filter(pa.array(~gone)).combine_chunks()
        kinds |= set(left["event_type"].to_pylist())
        rows += int(gone.sum())
        if gone.any():
            entry = {"name": new_name(entry["name"], sought), "rows": left.num_rows}
            write_table(join(uri, entry["name"]), left)
        files.append(entry)
    if rows + rejected == 0:
        return None
    counts = {"rows_rejected": manifest["rows_rejected"] - rejected}
    counts["rows_forgotten"] = manifest.get("rows_forgotten", 0) + rows + rejected
    return manifest | counts | {"files": files, "event_types": sorted(kinds)}


def _state(uri: str, manifest: Manifest, sought: Sought) -> Manifest | None:
    gone, content = _without(join(uri, manifest["file"]), sought)
    if gone == 0:
        return None
    name = new_name(manifest["file"], sought)
    write_bytes(join(uri, name), content)
    return manifest | {"file": name, "users": manifest["users"] - gone}


def _without(uri: str, sought: Sought) -> tuple[int, bytes]:
    """(rows of the users in a table's file, its new content); row groups and record batches keep their places."""
    gone, parquet = 0, starts_as_parquet(uri)
    with tempfile.TemporaryFile() as stream:
        writer: Any = None
        for table in tables_of(uri):
            mine = theirs(table, sought)
            gone += int(mine.sum())
            left = _encoded(table.filter(pa.array(~mine)).combine_chunks())
            if writer is None:
                writer = (pq.ParquetWriter(stream, left.schema, compression="zstd") if parquet
                          else pa.ipc.new_file(stream, left.schema))  # fmt: skip
            if parquet:
                writer.write_table(left, row_group_size=max(1, left.num_rows))
            else:
                arrays = [column.combine_chunks() for column in left.columns]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=left.schema))
        if writer is not None:
            writer.close()
        stream.seek(0)
        return gone, stream.read()


def _encoded(table: pa.Table) -> pa.Table:
    """Columns that are dictionaries with only what the rows have: the dictionaries of more rows held the users."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            column = pc.cast(table[field.name], field.type.value_type)
            table = table.set_column(place, field, pc.cast(column.dictionary_encode(), field.type))
    return table


def prediction_rows(uris: Iterable[str]) -> int:
    """Rows of the prediction and ranking files among `uris`, by their footers."""
    total = 0
    for uri in uris:
        if uri.rsplit("/", 2)[-2] in ("predictions", "rankings"):
            place = storage(uri)
            with place.filesystem.open_input_file(place.path) as stream:
                total += pq.ParquetFile(stream).metadata.num_rows
    return total
