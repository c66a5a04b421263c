"""Files and artifacts without some users: what `forget` writes in place of what is there.

An artifact's files that its manifest names are written under new names beside the old ones; the new manifest comes
back, for the caller to put in place. Files that are read by listing their folder are replaced in place, at once.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from lum_ray.artifacts import UserError, digest, join, storage, write_bytes, write_table
from lum_ray.data.buckets import write_buckets
from lum_ray.steps.traces import Sought, starts_as_parquet, tables_of, theirs

Manifest = dict[str, Any]


def in_place(uri: str, sought: Sought) -> int:
    """Rewrite a table's file without the users, row group by row group, and return how many rows they had."""
    gone, content = _without(uri, sought)
    write_bytes(uri, content)
    return gone


def rewritten(uri: str, manifest: Mapping[str, Any], sought: Sought, raw_rows: Sequence[int] | None) -> Manifest | None:
    """The manifest of the artifact at `uri` over new files without the users; None where what it names is without them.

    `raw_rows`: rows of the users in the raw tables behind it (events, profiles), None where nobody knows any more: then
    the manifest's `rows_forgotten` is null. Raises UserError for an artifact of a kind that `forget` does not know.
    """
    match manifest["kind"]:
        case "timelines" | "sequences":
            return _timelines(uri, dict(manifest), sought, raw_rows)
        case "calendar":
            return _calendar(uri, dict(manifest), sought)
        case "state":
            return _state(uri, dict(manifest), sought)
    raise UserError(f"{uri}: holds a user, but `forget` knows no artifacts of kind {manifest['kind']!r}; remove it")


def named_files(manifest: Mapping[str, Any]) -> set[str]:
    """The paths below the artifact of the files that its manifest names."""
    match manifest["kind"]:
        case "timelines" | "sequences":
            folders = [(part["path"], part["files"]) for part in manifest["parts"]]
            folders.append(("profiles", manifest["profiles"] or []))
            return {f"{folder}/{entry['name']}" for folder, files in folders for entry in files}
        case "calendar":
            return {entry["name"] for entry in manifest["files"]}
    return {manifest["file"]}


def _new_name(name: str, sought: Sought) -> str:
    stem, dot, suffix = name.partition(".")
    return f"{re.sub('-[0-9a-f]{8}$', '', stem)}-{digest(name, sought.hashes)[:8]}{dot}{suffix}"


def _timelines(uri: str, manifest: Manifest, sought: Sought, raw_rows: Sequence[int] | None) -> Manifest | None:
    rejects = _rejects(uri)
    mine = theirs(rejects, sought)
    # on a second try after a kill the manifest may be new already, with the rejects still to be replaced
    changed = bool(mine.any()) and manifest["rows_rejected"] == rejects.num_rows
    users = set[str]()
    folders = [(part["path"], part["files"]) for part in manifest["parts"]]
    for folder, files in [*folders, ("profiles", manifest["profiles"] or [])]:
        for entry in list(files):
            old = join(uri, folder, entry["name"])
            table = pa.concat_tables(tables_of(old)).combine_chunks()
            gone = theirs(table, sought)
            if not gone.any():
                continue
            changed = True
            left = table.filter(pa.array(~gone))
            place = files.index(entry)
            files[place : place + 1] = []
            size = 0
            if left.num_rows:
                name = _new_name(entry["name"], sought)
                groups, size = write_buckets(join(uri, folder, name), left)
                files.insert(place, entry | {"name": name, "row_groups": groups})
            if folder != "profiles":
                out = table.filter(pa.array(gone))
                users |= set(out["user"].to_pylist())
                manifest["active_days"] -= int(pc.sum(pc.list_value_length(out["days"])).as_py())
                manifest["bytes"] += size - _size(old)
    if not changed:
        return None
    manifest["users"] -= len(users)
    manifest["bytes_per_active_day"] = round(manifest["bytes"] / max(1, manifest["active_days"]), 3)
    if raw_rows is not None:
        rejected = int(pc.sum(pc.starts_with(rejects.filter(pa.array(mine))["file"], "events/")).as_py() or 0)
        manifest["events"] -= raw_rows[0] - rejected
    before = manifest.get("rows_forgotten", 0)
    manifest["rows_forgotten"] = None if raw_rows is None or before is None else before + sum(raw_rows)
    manifest["rows_rejected"] -= int(mine.sum())
    return manifest


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
            entry = {"name": _new_name(entry["name"], sought), "rows": left.num_rows}
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
    name = _new_name(manifest["file"], sought)
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


def _size(uri: str) -> int:
    place = storage(uri)
    return int(place.filesystem.get_file_info(place.path).size or 0)


def prediction_rows(uris: Iterable[str]) -> int:
    """Rows of the prediction and ranking files among `uris`, by their footers."""
    total = 0
    for uri in uris:
        if uri.rsplit("/", 2)[-2] in ("predictions", "rankings"):
            place = storage(uri)
            with place.filesystem.open_input_file(place.path) as stream:
                total += pq.ParquetFile(stream).metadata.num_rows
    return total
