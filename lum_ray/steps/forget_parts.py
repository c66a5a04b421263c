"""Timelines and sequences without some users: new files for the parts, and manifests that name them.

A manifest may refer to parts of another artifact beside it (`artifact`), so that all of one kind are done together:
first the new files, then every manifest, then the old files go. Files that no manifest names (rejects, states of the
last days) are replaced in place after the manifest; that its counts are those of the files before says that they are
still to be corrected, when a call that was killed is made again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.artifacts import join, storage
from lum_ray.data.buckets import bucket_of, write_buckets
from lum_ray.data.rows import hash_strings
from lum_ray.steps.forget_files import Manifest, new_name
from lum_ray.steps.traces import Sought, files_below, tables_of, theirs

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class NewFile:
    """What takes a file's place: its entry in manifests (None: nobody is left), the change in bytes, and of each user
    that went the active days (of sequences, the days of the events)."""

    entry: dict[str, Any] | None
    bytes: int
    days: Mapping[str, list[int]]


def files_of(uri: str, manifest: Mapping[str, Any]) -> Iterator[tuple[str, Entries, Mapping[str, Any] | None]]:
    """(folder, its files in the manifest, the part or None for profiles) of an artifact."""
    beside = uri.rstrip("/").rsplit("/", 1)[0]
    for part in manifest["parts"]:
        owner = join(beside, part["artifact"]) if part.get("artifact") else uri
        yield join(owner, part["path"]), part["files"], part
    owner = join(beside, manifest["profiles_of"]) if manifest.get("profiles_of") else uri
    yield join(owner, "profiles"), manifest["profiles"] or [], None


def rewrite_file(folder: str, entry: Mapping[str, Any], sought: Sought) -> NewFile | None:
    """Write a file anew, under another name, without the users; None where it has none of them."""
    old = join(folder, entry["name"])
    table = pa.concat_tables(tables_of(old)).combine_chunks()
    gone = theirs(table, sought)
    if not gone.any():
        return None
    left, out = table.filter(pa.array(~gone)), table.filter(pa.array(gone))
    days = (
        dict(zip(out["user"].to_pylist(), out["days"].to_pylist(), strict=True)) if "days" in out.schema.names else {}
    )
    if left.num_rows == 0:
        return NewFile(None, -_size(old), days)
    name = new_name(entry["name"], sought)
    groups, size = write_buckets(join(folder, name), left)
    return NewFile({**entry, "name": name, "row_groups": groups}, size - _size(old), days)


def new_manifest(
    uri: str,
    before: Mapping[str, Any],
    made: Mapping[str, NewFile],
    sought: Sought,
    raw_rows: Sequence[int] | None,
) -> Manifest | None:
    """The manifest over the files that were `made`, by the URIs of the old ones; None where it stays as it is.

    `raw_rows`: rows of the users in the raw tables behind it (events, profiles), None where nobody knows any more: then
    the manifest's `rows_forgotten` is null.
    """
    manifest: Manifest = copy.deepcopy(dict(before))
    changed, users = False, set[str]()
    for folder, entries, part in files_of(uri, manifest):
        found = [
            (place, made[old]) for place, entry in enumerate(entries) if (old := join(folder, entry["name"])) in made
        ]
        for place, new in reversed(found):
            entries[place : place + 1] = [dict(new.entry)] if new.entry else []
            changed = True
            if part is not None:
                inside = {
                    user: [d for d in days if part["from_day"] <= d < part["to_day"]] for user, days in new.days.items()
                }
                users |= {user for user, days in inside.items() if days}
                manifest["active_days"] -= sum(map(len, inside.values()))
                manifest["bytes"] += new.bytes
    manifest["users"] -= len(users)
    for bucket in bucket_of(hash_strings(sorted(users)), manifest["log2_buckets"]).tolist() if users else ():
        if "bucket_users" in manifest:
            manifest["bucket_users"][bucket] -= 1
    manifest["bytes_per_active_day"] = round(manifest["bytes"] / max(1, manifest["active_days"]), 3)
    changed |= _correct_states(uri, manifest, sought)
    rejects = _tables(join(uri, "rejects"))
    mine = theirs(rejects, sought)
    pending = bool(mine.any()) and manifest["rows_rejected"] == rejects.num_rows
    if changed or pending:
        changed = True
        bad = rejects.filter(pa.array(mine))["file"] if pending else pa.chunked_array([], pa.string())
        events = int(pc.sum(pc.starts_with(bad, "events/")).as_py() or 0)
        manifest["rows_rejected"] -= len(bad)
        known = manifest.get("rows_forgotten", 0)
        manifest["rows_forgotten"] = None if raw_rows is None or known is None else known + sum(raw_rows)
        if raw_rows is not None:
            manifest["events"] -= raw_rows[0] - events
            # an increment goes on counting from here
            for table, rows, rejected in zip(
                ("events", "profiles"), raw_rows, (events, len(bad) - events), strict=True
            ):
                count, were_rejected, were_forgotten = manifest["read"][table]
                manifest["read"][table] = [count, were_rejected - rejected, were_forgotten + rows]
    return manifest if changed else None


def _correct_states(uri: str, manifest: Manifest, sought: Sought) -> bool:
    """Take the users out of the counts of `states`, if these still have them."""
    states = manifest.get("states")
    table = _tables(join(uri, "states")) if states else pa.table({})
    if not states or states["rows"] != table.num_rows:
        return False
    mine = table.filter(pa.array(theirs(table, sought)))
    if mine.num_rows == 0:
        return False
    keys = [name for name in ("user", "day", "item", "time_us") if name in mine.column_names]
    if manifest["kind"] == "timelines":
        keys = ["user", "day"]
    states["rows"] -= mine.num_rows
    states["active_days"] -= mine.group_by(keys).aggregate([]).num_rows
    return True


def _tables(folder: str) -> pa.Table:
    """The tables of a folder as one, without a column where there is none."""
    tables = [table for uri in files_below(folder) for table in tables_of(uri)]
    return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})


def _size(uri: str) -> int:
    place = storage(uri)
    return int(place.filesystem.get_file_info(place.path).size or 0)
