"""compact: all parts of an artifact of timelines or sequences as one of its own, so that it depends on no other.

The manifest is replaced at once, after the new part is written; whoever opens the artifact before or after reads the
same rows. Its states stay, so it can be continued as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from pyarrow import fs

from lum_ray.artifacts import (
    MANIFEST,
    Artifact,
    join,
    open_artifact,
    read_bytes,
    remove,
    storage,
    write_bytes,
    write_json,
)
from lum_ray.data import buckets
from lum_ray.data.increments import owners, siblings
from lum_ray.data.reader import Timelines, folder_of

THREADS = 4


def compact(uri: str, log: Callable[[str], None]) -> Artifact:
    """Merge the parts of the artifact at `uri`, and delete what of them was its own and nobody refers to.

    At most a file's users a thread are in memory. An artifact of one part of its own is left as it is, but for folders
    that nobody refers to any more.
    """
    artifact = open_artifact(uri)
    manifest = dict(artifact.manifest)
    if owners(manifest) or len(manifest["parts"]) > 1:
        log(f"merging {len(manifest['parts'])} parts of {manifest['kind']} {manifest['digest']}")
        manifest |= _merged(artifact)
        if manifest.pop("profiles_of", None) is not None:
            _copy_profiles(artifact)
        manifest.pop("bucket_users", None)
        # the first manifest was committed by its absence; this one holds the same rows
        write_json(join(uri, MANIFEST), manifest)
        artifact = open_artifact(uri)
    freed, kept = _sweep(artifact)
    if freed:
        log(f"freed {freed:,} bytes")
    if kept:
        log(f"kept {', '.join(kept)}: later artifacts refer to them")
    return artifact


def _merged(artifact: Artifact) -> dict[str, Any]:
    """What changes in the manifest, once the new part is written."""
    manifest = artifact.manifest
    log2_buckets = int(manifest["log2_buckets"])
    first_day, end_day = int(manifest["first_day"]), int(manifest["end_day"])
    path = f"part-{first_day}-{end_day}"
    files = buckets.choose_files(int(manifest["events"]), log2_buckets)
    width = (1 << log2_buckets) // files
    timelines = Timelines(artifact)
    users = timelines.bucket_users

    def make(index: int) -> tuple[dict[str, Any], int]:
        tables = [
            _with_bucket(timelines.stored(bucket), bucket)
            for bucket in range(index * width, (index + 1) * width)
            if users[bucket]
        ]
        if not tables:
            return {}, 0
        name = f"{index:04d}.parquet"
        groups, size = buckets.write_buckets(join(artifact.uri, path, name), pa.concat_tables(tables))
        return {"name": name, "row_groups": groups}, size

    with ThreadPoolExecutor(THREADS) as pool:
        made = list(pool.map(make, range(files)))
    size = sum(own for _, own in made)
    part = {"path": path, "from_day": first_day, "to_day": end_day, "files": [file for file, _ in made if file]}
    return {
        "parts": [part],
        "bytes": size,
        "bytes_per_active_day": round(size / max(1, manifest["active_days"]), 3),
    }


def _with_bucket(table: pa.Table, bucket: int) -> pa.Table:
    return table.add_column(0, "bucket", pa.array([bucket] * table.num_rows, pa.int32()))


def _copy_profiles(artifact: Artifact) -> None:
    manifest = artifact.manifest
    folder = folder_of(artifact.uri, {"path": "profiles", "artifact": manifest["profiles_of"]})
    for file in manifest["profiles"]:
        write_bytes(join(artifact.uri, "profiles", file["name"]), read_bytes(join(folder, file["name"])))


def _sweep(artifact: Artifact) -> tuple[int, list[str]]:
    """Delete the folders of parts that neither this artifact nor another refers to: (bytes freed, folders kept)."""
    own = {part["path"] for part in artifact.manifest["parts"]}
    digest = artifact.uri.rstrip("/").rsplit("/", 1)[-1]
    others = {
        part["path"]
        for found in siblings(artifact.uri)
        for part in found.manifest.get("parts", ())
        if part.get("artifact") == digest
    }
    freed, kept = 0, []
    for path, size in _folders(artifact.uri):
        if path in others - own:
            kept.append(path)
        elif path not in own:
            remove(join(artifact.uri, path))
            freed += size
    return freed, kept


def _folders(uri: str) -> Iterator[tuple[str, int]]:
    """The artifact's folders of parts, and the bytes in each."""
    place = storage(uri)
    for item in place.filesystem.get_file_info(fs.FileSelector(place.path)):
        if item.type == fs.FileType.Directory and item.base_name.startswith("part-"):
            inside = place.filesystem.get_file_info(fs.FileSelector(item.path, recursive=True))
            yield item.base_name, sum(int(file.size or 0) for file in inside)
