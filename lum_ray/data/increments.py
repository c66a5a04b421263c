"""What a wanted artifact of timelines or sequences can continue: an earlier one of the same lineage beside it.

The lineage is the digest of the tokenizer, the columns and the settings, without the raw tables' fingerprints. An
artifact of that lineage is a base where all that it has read is still there unchanged: its event files, or its version
of the Delta table with nothing taken away since. The new artifact then refers to the base's parts up to `since`, the
first day of the declared window for late events, and has one part of its own from there on: made of the new files and
of the states that the base has kept of the window. So parts never share a day, and every aggregate stays exact.

References never chain: each names the artifact that holds the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from lum_ray import artifacts
from lum_ray.artifacts import Artifact, UserError, join, storage
from lum_ray.config import Data
from lum_ray.data import delta
from lum_ray.data.raw import RawFile, RawTables
from lum_ray.data.reader import folder_of
from lum_ray.data.rejects import REJECTS
from lum_ray.data.schema import check_events


@dataclass(frozen=True)
class Base:
    """An artifact that the wanted one continues, the event files that it has not read, and the first day that the new
    part covers."""

    artifact: Artifact
    fresh: tuple[RawFile, ...]
    same_profiles: bool
    since: int

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.artifact.manifest

    @property
    def digest(self) -> str:
        return _name(self.artifact)

    def parts(self) -> list[dict[str, Any]]:
        """The base's parts before `since`, as references."""
        return [
            {**part, "artifact": part.get("artifact", self.digest), "to_day": min(part["to_day"], self.since)}
            for part in self.manifest["parts"]
            if part["from_day"] < self.since
        ]

    def rejects(self) -> pa.Table:
        """The rows that the base rejected (REJECTS), without those of profiles that are read anew."""
        place = storage(join(self.artifact.uri, "rejects", "0000.parquet"))
        try:
            found = pq.read_table(place.path, filesystem=place.filesystem)
        except FileNotFoundError:
            return REJECTS.empty_table()
        return found if self.same_profiles else found.filter(pc.starts_with(found["file"], "events/"))

    def states(self, files: int) -> list[list[tuple[str, bool]]]:
        """For each of our `files`: where the base's states of its users are, and whether all of them are its own."""
        kept = self.manifest["states"]
        theirs: int = kept["of_files"]
        found = []
        for index in range(files if kept["files"] else 0):
            first, stop = index * theirs // files, max((index + 1) * theirs // files, index * theirs // files + 1)
            names = {f"{number:04d}.arrow" for number in range(first, stop)}
            uris = [join(self.artifact.uri, "states", name) for name in kept["files"] if name in names]
            found.append([(uri, theirs >= files) for uri in uris])
        return found

    def known(self, files: int) -> list[list[tuple[str, list[int]]]]:
        """For each of our `files`: where the base has users of its buckets, as (URI, row groups)."""
        per_file = (1 << int(self.manifest["log2_buckets"])) // files
        found: list[dict[str, list[int]]] = [{} for _ in range(files)]
        for part in self.manifest["parts"]:
            folder = folder_of(self.artifact.uri, part)
            for file in part["files"]:
                for index, group in enumerate(file["row_groups"]):
                    found[group["bucket"] // per_file].setdefault(join(folder, file["name"]), []).append(index)
        return [list(uris.items()) for uris in found]


def find_base(
    data: Data, tables: RawTables, uri: str, lineage: str, prints: Mapping[str, Any], files: Sequence[RawFile]
) -> tuple[Base | None, str | None]:
    """The base that leaves the least to read for the artifact at `uri`, or why the newest of its lineage is none.

    `prints` are the fingerprints of the tables, `files` all event files. (None, None): no artifact of this lineage.
    """
    beside = {_name(found): found for found in siblings(uri)}
    related = [found for found in beside.values() if found.manifest.get("lineage") == lineage]
    related.sort(key=_how_new, reverse=True)
    best: Base | None = None
    refused: str | None = None
    for found in related:
        fresh = _not_read(found, data, tables, prints, files, beside)
        if isinstance(fresh, str):
            refused = refused or f"{_name(found)} cannot be continued: {fresh}"
            continue
        since = int(found.manifest["known_end_day"]) - data.late_days
        same = found.manifest["inputs"].get("profiles") == prints.get("profiles")
        base = Base(found, tuple(fresh), same, since)
        if best is None or _left(base) < _left(best):
            best = base
    return best, None if best is not None else refused


def siblings(uri: str) -> list[Artifact]:
    """The committed artifacts in the folder that the artifact at `uri` lies in, by name."""
    parent = uri.rstrip("/").rsplit("/", 1)[0]
    place = storage(parent)
    inside = place.filesystem.get_file_info(fs.FileSelector(place.path, allow_not_found=True))
    names = sorted(item.base_name for item in inside if item.type == fs.FileType.Directory)
    found = (artifacts.find(join(parent, name)) for name in names)
    return [artifact for artifact in found if artifact is not None]


def files_of(events_print: Any) -> dict[str, list[Any]] | None:
    """What a fingerprint says of each event file, by name; None where it is not one of files."""
    if not isinstance(events_print, list) or not all(isinstance(entry, list) for entry in events_print):
        return None
    return {name: rest for name, *rest in events_print}


def as_fingerprinted(files: Sequence[RawFile], prints: Mapping[str, Any]) -> list[RawFile]:
    """Of the event files, those that the fingerprints have: a file that came since is the next increment's.

    Raises UserError for one that was written anew since.
    """
    known = files_of(prints["events"])
    if not known or set(known) == {""}:
        return list(files)
    there = [file for file in files if file.name.removeprefix("events/") in known]
    for file in there:
        if file.bytes != known[file.name.removeprefix("events/")][0]:
            raise UserError(f"{file.uri}: was changed while it was being prepared; prepare again when it is whole")
    return there


def owners(manifest: Mapping[str, Any]) -> set[str]:
    """The other artifacts whose files a manifest refers to."""
    named = [manifest.get("profiles_of"), *(part.get("artifact") for part in manifest.get("parts", ()))]
    return {name for name in named if name is not None}


def _name(artifact: Artifact) -> str:
    return artifact.uri.rstrip("/").rsplit("/", 1)[-1]


def _how_new(found: Artifact) -> tuple[int, int, str]:
    read = found.manifest["inputs"]["events"]
    return found.manifest["known_end_day"], read["version"] if isinstance(read, dict) else len(read), _name(found)


def _left(base: Base) -> tuple[int, int]:
    return sum(file.bytes for file in base.fresh), -base.since


def _not_read(
    found: Artifact,
    data: Data,
    tables: RawTables,
    prints: Mapping[str, Any],
    files: Sequence[RawFile],
    beside: Mapping[str, Artifact],
) -> list[RawFile] | str:
    """The event files that came since `found` was made, or why it is no base."""
    gone = sorted(owners(found.manifest) - set(beside))
    if gone:
        return f"{gone[0]}, which holds a part of it, is gone"
    place = storage(join(found.uri, "states"))
    kept = place.filesystem.get_file_info(fs.FileSelector(place.path, allow_not_found=True))
    if not set(found.manifest["states"]["files"]) <= {item.base_name for item in kept}:
        return "its states are gone"
    then, now = found.manifest["inputs"]["events"], prints["events"]
    if isinstance(then, dict) and isinstance(now, dict):
        return _added(then, now, data, tables)
    before, after = files_of(then), files_of(now)
    if before is None or after is None:
        return "the events are of an adapter, or another kind of table"
    for name, rest in before.items():
        if after.get(name) != rest:
            return f"the event file {name} was {'changed' if name in after else 'removed'}"
    return [file for file in files if file.name.removeprefix("events/") not in before]


def _added(then: Mapping[str, Any], now: Mapping[str, Any], data: Data, tables: RawTables) -> list[RawFile] | str:
    if then["delta"] != now["delta"]:
        return f"the events are another Delta table, {now['delta']} instead of {then['delta']}"
    if then["version"] > now["version"]:
        return f"it has read version {then['version']} of the events, which is newer than {now['version']}"
    try:
        added = delta.added_since(tables.events, then["version"], data.events.time)
    except delta.NoIncrementError as error:
        return f"the events' {error}"
    return check_events(tables.events, data, added=added)
