"""Artifacts: directories under a run's root, named by what shaped them, complete only once `manifest.json` is written.

Everything here works on a local path and on an object store alike. The manifest is committed last and conditionally
(local: `link`, S3: put-if-absent), so that of two drivers that build the same artifact exactly one commits, and a
reader never sees a partial one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs

MANIFEST = "manifest.json"


class UserError(ValueError):
    """Something that the user can mend: the message says what was expected, what came, where, and what to do."""


@dataclass(frozen=True)
class Storage:
    """Where a URI points: the pyarrow filesystem, the path on it, and the same access for fsspec and deltalake."""

    filesystem: fs.FileSystem
    path: str
    options: Mapping[str, str]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)


def storage(uri: str) -> Storage:
    """The filesystem behind `uri` (a local path, `file://...` or `s3://bucket/...`).

    S3 takes the standard variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION and, for
    other servers than Amazon's, AWS_ENDPOINT_URL. Raises UserError for any other scheme.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return Storage(fs.LocalFileSystem(), os.path.abspath(rest if separator else uri), {})
    if scheme != "s3":
        raise UserError(f"{uri}: expected a local path or s3://bucket/path, got the scheme '{scheme}'")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=8)
    options = {"region": region}
    keywords: dict[str, Any] = {"region": region, "retry_strategy": retry, "connect_timeout": 10, "request_timeout": 60}
    if endpoint:
        options["endpoint_url"] = endpoint
        keywords |= {
            "endpoint_override": endpoint.partition("://")[2] or endpoint,
            "scheme": endpoint.partition("://")[0] or "https",
        }
    return Storage(fs.S3FileSystem(**keywords), rest.rstrip("/"), options)


def join(uri: str, *parts: str) -> str:
    """`uri/part/...` with single slashes between."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def digest(*content: Any) -> str:
    """12 hex digits over the canonical JSON of `content` (dataclasses as their fields)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no canonical JSON form: {value!r}")


def list_files(uri: str, suffix: str = "") -> list[str]:
    """URIs of the files at `uri` (itself, or all below it, sorted), whose name ends with `suffix`.

    Hidden files and folders (a leading `.` or `_`) are left out. Raises UserError where there is nothing.
    """
    place = storage(uri)
    info = place.filesystem.get_file_info(place.path)
    if info.type == fs.FileType.NotFound:
        raise UserError(f"{uri}: expected a file or a folder, found nothing; check the path in the run file")
    if info.type == fs.FileType.File:
        return [uri]
    found = place.filesystem.get_file_info(fs.FileSelector(place.path, recursive=True))
    prefix = uri.rstrip("/")
    names = sorted(item.path[len(place.path.rstrip("/")) + 1 :] for item in found if item.type == fs.FileType.File)
    return [
        f"{prefix}/{name}"
        for name in names
        if name.endswith(suffix) and not any(part[0] in "._" for part in name.split("/"))
    ]


def fingerprint(uri: str) -> list[list[str | int]]:
    """What says that the files at `uri` are the same as before: [name, size, mtime in ns] of each, sorted by name."""
    root = storage(uri)
    result: list[list[str | int]] = []
    for name in list_files(uri):
        place = storage(name)
        info = place.filesystem.get_file_info(place.path)
        result.append([place.path[len(root.path) :].lstrip("/"), info.size, info.mtime_ns or 0])
    return result


def read_bytes(uri: str) -> bytes:
    """The content of a file. Raises FileNotFoundError."""
    place = storage(uri)
    with place.filesystem.open_input_stream(place.path) as stream:
        return bytes(stream.read())


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, content: bytes) -> None:
    """Write or replace a file; a reader sees the old content or the new, never a part (local: temporary and rename)."""
    place = storage(uri)
    if not place.is_local:
        with place.filesystem.open_output_stream(place.path) as stream:
            stream.write(content)
        return
    os.makedirs(os.path.dirname(place.path), exist_ok=True)
    temporary = f"{place.path}.{uuid.uuid4().hex}.tmp"
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, place.path)


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, json.dumps(value, indent=1, default=_plain).encode() + b"\n")


def write_table(uri: str, table: pa.Table) -> None:
    """Write a small table as one zstd parquet file, atomically."""
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(uri, sink.getvalue().to_pybytes())


@dataclass(frozen=True)
class Artifact:
    """A committed directory and what its manifest says."""

    uri: str
    manifest: Mapping[str, Any]


def find(uri: str) -> Artifact | None:
    """The artifact at `uri`, or None while it is not committed."""
    try:
        return Artifact(uri, read_json(join(uri, MANIFEST)))
    except FileNotFoundError:
        return None


def open_artifact(uri: str) -> Artifact:
    """The artifact at `uri`. Raises UserError where no manifest has been committed."""
    found = find(uri)
    if found is None:
        raise UserError(
            f"{uri}: expected an artifact, but it has no {MANIFEST}; build it with `lum-ray prepare` or `train`"
        )
    return found


def commit(uri: str, manifest: Mapping[str, Any]) -> Artifact:
    """Write the manifest unless one is there: the first committer wins, and its manifest is what is returned."""
    content = json.dumps(manifest, indent=1, default=_plain).encode() + b"\n"
    target = join(uri, MANIFEST)
    place = storage(target)
    if place.is_local:
        os.makedirs(os.path.dirname(place.path), exist_ok=True)
        temporary = f"{place.path}.{uuid.uuid4().hex}.tmp"
        write_bytes(temporary, content)
        try:
            os.link(temporary, place.path)
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
    else:
        import s3fs

        client = s3fs.S3FileSystem(endpoint_url=place.options.get("endpoint_url"), use_listings_cache=False)
        with contextlib.suppress(FileExistsError):
            client.pipe_file(place.path, content, mode="create")
    return open_artifact(uri)
