"""Artifacts: directories under a run's root, named by what shaped them, complete only once `manifest.json` is written.

Everything here works on a local path and on an object store alike. The manifest is committed last and conditionally
(local: `link`, S3: put-if-absent), so that of two drivers that build the same artifact exactly one commits, and a
reader never sees a partial one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs

from lum_ray.storage import S3, MachineError, Storage, UserError, reach, reaching, storage

__all__ = [
    "MANIFEST",
    "Artifact",
    "MachineError",
    "Storage",
    "UserError",
    "checkpoint_record",
    "commit",
    "commit_folder",
    "digest",
    "download",
    "find",
    "fingerprint",
    "join",
    "list_files",
    "open_artifact",
    "reach",
    "reaching",
    "read_bytes",
    "read_json",
    "remove",
    "storage",
    "upload",
    "write_bytes",
    "write_json",
    "write_table",
]

MANIFEST = "manifest.json"


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
    with reaching(uri):
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
    """What says that the files at `uri` are the same as before: [name, size, mtime in ns or, on S3, etag] of each."""
    root, names = storage(uri), list_files(uri)
    prefix, paths = len(root.path), [storage(name).path for name in names]
    if root.s3:
        # pyarrow tells no etags
        found = _ask(root.s3, lambda client: client.find(root.path, detail=True))
        objects = [(path, found[path]) for path in paths if path in found]
        return [[path[prefix:].lstrip("/"), info["size"], info["ETag"].strip('"')] for path, info in objects]
    infos = root.filesystem.get_file_info(paths)
    return [[info.path[prefix:].lstrip("/"), info.size, info.mtime_ns or 0] for info in infos]


def read_bytes(uri: str) -> bytes:
    """The content of a file. Raises FileNotFoundError."""
    place = storage(uri)

    def read() -> bytes:
        with place.filesystem.open_input_stream(place.path) as stream:
            return bytes(stream.read())

    return reach(uri, read)


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def checkpoint_record(uri: str, models: Sequence[str], needed: Sequence[str] = ()) -> dict[str, Any]:
    """run.json of the checkpoint at `uri`, of one of `models`: what they need beside the weights, by name (`needed`).

    Raises UserError where there is none, it is damaged, lacks something, or is another model's.
    """
    place = join(uri, "run.json")
    try:
        found = read_json(place)
    except FileNotFoundError:
        raise UserError(
            f"{uri}: expected a checkpoint, found no run.json; train one with `lum-ray train RUN`"
        ) from None
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); restore it, or train anew with --fresh") from None
    record: dict[str, Any] = found if isinstance(found, dict) else {}
    if record.get("model") not in models:
        raise UserError(f"{uri}: expected a checkpoint of {' or '.join(models)}, got one of {record.get('model')!r}")
    lacking = [name for name in needed if name not in record]
    if lacking:
        raise UserError(f"{place}: expected {', '.join(needed)}; {', '.join(lacking)} missing; train anew with --fresh")
    return record


def write_bytes(uri: str, content: bytes) -> None:
    """Write or replace a file; a reader sees the old content or the new, never a part (local: temporary and rename).

    Raises UserError where the disk is full or the store does not take it.
    """
    place = storage(uri)
    with reaching(uri):
        if place.is_local:
            _replace(place.path, lambda path: _write(path, content))
            return
        with place.filesystem.open_output_stream(place.path) as stream:
            stream.write(content)


def upload(path: str, uri: str) -> None:
    """Copy a local file to `uri`, atomically as `write_bytes`, a piece at a time."""
    place = storage(uri)
    with reaching(uri):
        if place.is_local:
            _replace(place.path, lambda temporary: _copy(path, temporary))
        else:
            fs.copy_files(path, place.path, fs.LocalFileSystem(), place.filesystem)


def download(uri: str, path: str) -> None:
    """Copy the file at `uri` to a new local file, a piece at a time. Raises FileNotFoundError."""
    place = storage(uri)
    reach(uri, lambda: fs.copy_files(place.path, path, place.filesystem, fs.LocalFileSystem()))


def remove(uri: str) -> None:
    """Remove a folder and all below it, if it is there."""
    place = storage(uri)
    # another process may be removing it too; and S3 may list a folder of which nothing is left
    with reaching(uri), contextlib.suppress(FileNotFoundError):
        place.filesystem.delete_dir(place.path)


def _replace(path: str, write: Callable[[str], None]) -> None:
    """Have `write` fill a temporary file beside `path`, and put it in its place."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _copy(source: str, path: str) -> None:
    with open(source, "rb") as stream, open(path, "wb") as target:
        shutil.copyfileobj(stream, target, 1 << 22)
        target.flush()
        os.fsync(target.fileno())


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
    with reaching(target):
        if place.is_local:
            os.makedirs(os.path.dirname(place.path), exist_ok=True)
            temporary = f"{place.path}.{uuid.uuid4().hex}.tmp"
            try:
                _write(temporary, content)
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, place.path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
        else:
            assert place.s3 is not None
            # a try whose answer was lost may have written it: then the next finds it there
            with contextlib.suppress(FileExistsError):
                _ask(place.s3, lambda client: client.pipe_file(place.path, content, mode="create"))
    return open_artifact(uri)


def commit_folder(uri: str, manifest: Mapping[str, Any], fill: Callable[[Storage], None]) -> Artifact:
    """Have `fill` write the files of an artifact, and commit it. For files that are written in place, not atomically.

    On a local disk they are written beside it and appear at once; on S3 every object does, so that two drivers which
    write the same bytes do not disturb each other there.
    """
    place = storage(uri)
    with reaching(uri):
        if not place.is_local:
            fill(place)
            return commit(uri, manifest)
        apart = f"{place.path}.{uuid.uuid4().hex}.tmp"
        try:
            os.makedirs(apart)
            fill(Storage(place.filesystem, apart))
            commit(apart, manifest)
            os.rename(apart, place.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if find(uri) is None:  # else another driver was first
                raise UserError(f"{uri}: half-written by an earlier version of lum_ray; remove this folder") from None
        finally:
            shutil.rmtree(apart, ignore_errors=True)
    return open_artifact(uri)


def _ask(store: S3, act: Callable[[Any], Any]) -> Any:
    """What `act` gives with an s3fs client, tried again where the store does not answer or is not ready.

    Raises FileExistsError where a condition was not met, else OSError.
    """
    import s3fs
    from botocore.exceptions import BotoCoreError

    client = s3fs.S3FileSystem(**store.fsspec_options)
    deadline, pause_s = time.monotonic() + store.retry_s, 0.1
    while True:
        try:
            return act(client)
        except (FileExistsError, FileNotFoundError):
            raise
        except (OSError, BotoCoreError) as error:
            status = _http_status(error)
            if status == 412:  # s3fs has no name for it
                raise FileExistsError(str(error)) from error
            # 409: another put of the same object is under way; none: no answer
            final = status is not None and status < 500 and status not in (409, 429)
            if final or time.monotonic() > deadline:
                raise OSError(f"AWS Error (HTTP status {status}): {error}") from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 5.0)


def _http_status(error: BaseException) -> int | None:
    """The status of the answer behind an error of s3fs; None where there was no answer."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if status else None
