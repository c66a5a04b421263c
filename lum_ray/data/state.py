"""Histories behind user ids, for serving: one memory-mapped Arrow file, a record batch for each bucket.

Opening costs nothing whatever the size; a look-up reads only the pages of its users. A new snapshot is a new file, so
that a server swaps it by opening another URI.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.artifacts import (
    Artifact,
    UserError,
    commit,
    download,
    find,
    join,
    open_artifact,
    read_json,
    storage,
    upload,
    write_json,
)
from lum_ray.data.rows import Rows, hash_strings

FILE = "state.arrow"


def write_state(uri: str, buckets: Iterable[tuple[int, Rows]], log2_buckets: int, end_day: int) -> Artifact:
    """Write a snapshot of `buckets` ((bucket, its rows), ascending) at `uri`; an existing one is returned as it is.

    `end_day` (exclusive) is the day up to which the histories go: the default cut of a request.
    """
    if (found := find(uri)) is not None:
        return found
    users = 0
    index: dict[int, int] = {}
    with tempfile.NamedTemporaryFile(suffix=".arrow") as stream:
        writer: pa.RecordBatchFileWriter | None = None
        for position, (bucket, rows) in enumerate(buckets):
            batch = _to_batch(rows)
            writer = writer or pa.ipc.new_file(stream.name, batch.schema)
            writer.write_batch(batch)
            index[bucket] = position
            users += len(rows)
        if writer is None:
            raise UserError(f"{uri}: no users to publish; prepare timelines with at least one user first")
        writer.close()
        upload(stream.name, join(uri, FILE))
    return commit(
        uri,
        {
            "kind": "state",
            "log2_buckets": log2_buckets,
            "end_day": end_day,
            "users": users,
            "buckets": index,
            "file": FILE,
        },
    )


def pointer(root: str, run: str) -> str:
    """Where the pointer of a run's servers is: what was published last under `root`."""
    return join(root, "state", f"latest-{run}.json")


def latest(uri: str) -> dict[str, str]:
    """What the pointer at `uri` says: URIs by `state` and `checkpoint`, each where it is said. Raises UserError."""
    try:
        found = read_json(uri)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{uri}: not JSON ({error}); write it anew with `lum-ray publish`") from None
    return {name: str(found[name]) for name in ("state", "checkpoint") if found.get(name)}


def point(uri: str, **to: str | None) -> None:
    """Let the pointer at `uri` say `state` or `checkpoint`; what is None stays as it is. Local paths are made absolute,
    since servers have other working folders."""
    given = {name: value if "://" in value else os.path.abspath(value) for name, value in to.items() if value}
    write_json(uri, {**latest(uri), **given})


def _to_batch(rows: Rows) -> pa.RecordBatch:
    offsets = pa.array(rows.offsets.astype(np.int32))
    columns: dict[str, pa.Array] = {
        "user": pa.array(rows.user, pa.string()),
        "user_hash": pa.array(rows.user_hash),
        "days": pa.ListArray.from_arrays(offsets, pa.array(rows.days)),
        "values": pa.ListArray.from_arrays(
            offsets, pa.FixedSizeListArray.from_arrays(pa.array(rows.values.ravel()), rows.values.shape[1])
        ),
        "first_day": pa.array(rows.first_day),
        "end_day": pa.array(rows.end_day),
        "segment": pa.array(rows.segment, pa.string()),
    }
    for name, column in rows.profile.items():
        numeric = column.dtype != np.object_
        columns[f"profile.{name}"] = pa.array(column) if numeric else pa.array(column.tolist(), pa.string())
    return pa.RecordBatch.from_pydict(columns)


def _to_rows(batch: pa.RecordBatch) -> Rows:
    names = batch.schema.names
    days, values = batch["days"], batch["values"]
    profile = {}
    for name in names:
        if name.startswith("profile."):
            column = batch[name]
            numeric = pa.types.is_floating(column.type) or pa.types.is_integer(column.type)
            profile[name.removeprefix("profile.")] = (
                column.to_numpy(zero_copy_only=False) if numeric else np.array(column.to_pylist(), object)
            )
    return Rows(
        user=np.array(batch["user"].to_pylist(), object),
        user_hash=batch["user_hash"].to_numpy(),
        offsets=days.offsets.to_numpy().astype(np.int64),
        days=days.values.to_numpy(),
        values=values.values.values.to_numpy().reshape(-1, values.type.value_type.list_size),
        first_day=batch["first_day"].to_numpy(),
        end_day=batch["end_day"].to_numpy(),
        segment=np.array(batch["segment"].to_pylist(), object),
        profile=profile,
    )


@dataclass(frozen=True)
class State:
    """A snapshot, opened. `end_day` is the first day that it knows nothing of."""

    uri: str
    end_day: int
    log2_buckets: int
    _reader: pa.RecordBatchFileReader
    _index: dict[int, int]

    @staticmethod
    def open(uri: str) -> State:
        """Open the snapshot at `uri` (on an object store: one download to the local disk). Raises UserError."""
        artifact = open_artifact(uri)
        file = join(uri, str(artifact.manifest["file"]))
        place = storage(file)
        if place.is_local:
            memory = pa.memory_map(place.path)
        else:
            # a mapped file that has no name any more is gone with the process, however that ends
            with tempfile.TemporaryDirectory(prefix="lum_ray_state_") as folder:
                path = os.path.join(folder, FILE)
                download(file, path)
                memory = pa.memory_map(path)
        reader = pa.ipc.open_file(memory)
        index = {
            int(bucket): int(place) for bucket, place in json.loads(json.dumps(artifact.manifest["buckets"])).items()
        }
        return State(uri, int(artifact.manifest["end_day"]), int(artifact.manifest["log2_buckets"]), reader, index)

    def rows(self, users: Sequence[str]) -> dict[str, Rows]:
        """The histories of those of `users` that the snapshot knows, a `Rows` of one user each."""
        hashes = hash_strings(list(users))
        buckets = hashes & np.uint64((1 << self.log2_buckets) - 1)
        found: dict[str, Rows] = {}
        for bucket in np.unique(buckets):
            position = self._index.get(int(bucket))
            if position is None:
                continue
            batch = self._reader.get_batch(position)
            stored = batch["user_hash"].to_numpy()
            for place in np.flatnonzero(buckets == bucket).tolist():
                for row in np.flatnonzero(stored == hashes[place]):
                    if batch["user"][int(row)].as_py() == users[place]:
                        piece = pa.Table.from_batches([batch.slice(int(row), 1)]).combine_chunks().to_batches()[0]
                        found[users[place]] = _to_rows(
                            pa.RecordBatch.from_pydict(
                                {name: pa.concat_arrays([piece[name]]) for name in piece.schema.names}
                            )
                        )
        return found

    def find(self, prefix: str, limit: int) -> tuple[list[str], bool]:
        """At most `limit` ids that begin with `prefix`, itself first if it is one, and whether there are no more.

        Reads the ids of one bucket after another until there are enough.
        """
        found = list(self.rows([prefix])) if prefix else []
        for i in range(self._reader.num_record_batches):
            users = self._reader.get_batch(i)["user"]
            some = users.filter(pc.starts_with(users, pattern=prefix)).to_pylist()
            found += [str(user) for user in some if user != prefix]
            if len(found) > limit:
                return found[:limit], False
        return found, True

    def users(self) -> list[str]:
        """All user ids, in stored order."""
        return [
            str(user)
            for i in range(self._reader.num_record_batches)
            for user in self._reader.get_batch(i)["user"].to_pylist()
        ]
