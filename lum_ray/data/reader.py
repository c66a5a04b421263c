"""Reading timelines into `Rows`: buckets of a `timelines` or `sequences` artifact, or plain tables (inline histories).

One decoder serves both, so that a stored user and the same user inline are the same arrays. A bucket's users come out
sorted by (hash, user) whatever the number of parts that hold them: a batch does not change when parts are compacted.
Shapes: N users, A active days (all users together; events in sequences), U behaviours.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lum_ray import artifacts
from lum_ray.artifacts import UserError
from lum_ray.data.history import USER, History, as_numpy, check_days, clip, decode, merge, nothing, stacked
from lum_ray.data.range_cache import RangeCache, Window
from lum_ray.data.rows import Int32, Int64, Rows, Strings, hash_strings
from lum_ray.data.windows import first_days

NOT_PROFILE = ("bucket", "user", "user_hash", "registered", "ends", "segment")
"""Columns of a profiles file that are not the user's raw numbers and categories."""


KINDS = ("timelines", "sequences")
"""A row of sequences is an event: a user's days may come again."""


@dataclass(frozen=True)
class Behaviour:
    """A stored daily number: binary (0/1) or an integer in units of `resolution`."""

    name: str
    kind: str
    resolution: float


@dataclass(frozen=True)
class _RowGroup:
    """One bucket's users in one file, as the manifest promises them."""

    uri: str
    index: int
    rows: int
    groups: int  # row groups in the file
    from_day: int = -(1 << 31)  # days outside [from_day, to_day) are another part's
    to_day: int = 1 << 31


class Timelines:
    """A committed `timelines` or `sequences` artifact. Nothing but its manifest is read until rows are asked for.

    Holds no open files, so that one object may be read from several threads. Reading raises UserError where a file is
    missing, or is not what the manifest says.
    """

    def __init__(self, artifact: artifacts.Artifact) -> None:
        manifest = artifact.manifest
        if manifest.get("kind") not in KINDS:
            raise UserError(
                f"{artifact.uri}: expected an artifact of kind 'timelines' or 'sequences', got {manifest.get('kind')!r}"
            )
        self.uri = artifact.uri
        self.manifest: Mapping[str, Any] = manifest
        self.behaviours = tuple(
            Behaviour(item["name"], item["kind"], float(item["resolution"])) for item in manifest["behaviours"]
        )
        self.start_day, self.end_day = int(manifest["first_day"]), int(manifest["end_day"])
        self.buckets = 1 << int(manifest["log2_buckets"])
        parts = sorted(manifest["parts"], key=lambda part: (part["from_day"], part["to_day"], part["path"]))
        self._groups = _by_bucket(
            [(folder_of(self.uri, part), part["files"], (part["from_day"], part["to_day"])) for part in parts]
        )
        profiles = {"path": "profiles", "artifact": manifest.get("profiles_of")}
        self._profiles = _by_bucket([(folder_of(self.uri, profiles), manifest["profiles"] or [], ())])
        self._footers: dict[str, pq.FileMetaData] = {}
        self._cache: RangeCache | None = None
        self._fetched: dict[tuple[str, int], Window] = {}
        self._opening: dict[str, threading.Lock] = {}

    @classmethod
    def open(cls, uri: str) -> Timelines:
        """The artifact at `uri` (local or s3://). Raises UserError where none is committed."""
        return cls(artifacts.open_artifact(uri))

    def with_cache(self, cache: RangeCache) -> Timelines:
        """The same timelines, whose buckets can be fetched ahead of being read."""
        copied = copy.copy(self)
        copied._cache, copied._fetched, copied._opening = cache, {}, {}
        return copied

    def fetch(self, bucket: int) -> int:
        """Bring a bucket to this machine for the next `read` of it. Returns the bytes that were asked of the store."""
        assert self._cache is not None, "fetch() is for timelines with a cache"
        asked = 0
        for group in [*self._groups.get(bucket, []), *self._profiles.get(bucket, [])]:
            # several threads fetch: one of them reads the footer
            with self._opening.setdefault(group.uri, threading.Lock()):
                if group.uri not in self._footers:
                    asked += self._read(group, ())[1]
            begin, end = _extent(self._footers[group.uri].row_group(group.index))
            content, size = self._cache.read(group.uri, begin, end)
            self._fetched[group.uri, group.index] = Window(content, begin)
            asked += size
        return asked

    @cached_property
    def bucket_users(self) -> Int64:
        """Distinct users of each bucket (buckets,).

        From the manifest where it has them or no user can be in two parts; otherwise the users' columns of the buckets
        that several parts hold are read once.
        """
        if "bucket_users" in self.manifest:
            return np.array(self.manifest["bucket_users"], np.int64)
        counts = np.zeros(self.buckets, np.int64)
        for bucket, groups in self._groups.items():
            counts[bucket] = sum(group.rows for group in groups)
        if int(counts.sum()) == int(self.manifest["users"]):
            return counts
        for bucket, groups in self._groups.items():
            if len(groups) > 1:
                table = pa.concat_tables([self._read(group, USER)[0] for group in groups])
                counts[bucket] = table.group_by(list(USER)).aggregate([]).num_rows
        return counts

    def read(self, buckets: Sequence[int], behaviours: Sequence[str] | None = None) -> Rows:
        """All users with events of `buckets`, bucket after bucket, each sorted by (hash, user).

        `behaviours` limits the columns of `Rows.values` (default: all; an empty tuple reads the active days alone).
        """
        return self.read_measured(buckets, behaviours)[0]

    def read_measured(self, buckets: Sequence[int], behaviours: Sequence[str] | None = None) -> tuple[Rows, int]:
        """As `read`, beside the bytes that were asked of the store (column chunks, and footers when first seen)."""
        names = tuple(item.name for item in self.behaviours) if behaviours is None else tuple(behaviours)
        pieces: list[Rows] = []
        bytes_read = 0
        for bucket in buckets:
            history, size = self._history(bucket, names)
            if history is None:
                continue
            profiles = [self._read(group, None) for group in self._profiles.get(bucket, [])]
            bytes_read += size + sum(own for _, own in profiles)
            profile = pa.concat_tables([table for table, _ in profiles]) if profiles else self._no_profiles
            pieces.append(_rows(history, profile, self.start_day, self.end_day))
        if not pieces:
            pieces.append(_rows(nothing(len(names)), self._no_profiles, self.start_day, self.end_day))
        return Rows.concat(pieces), bytes_read

    def stored(self, bucket: int) -> pa.Table:
        """A bucket's users as a part holds them (user, user_hash, days, one list a behaviour), over all parts."""
        names = tuple(item.name for item in self.behaviours)
        history, _ = self._history(bucket, names)
        history = history or nothing(len(names))
        offsets = pa.array(np.concatenate([[0], np.cumsum(history.lengths)]).astype(np.int32))
        lists = {"days": history.days} | {name: history.values[:, index] for index, name in enumerate(names)}
        columns = {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()}
        return pa.table({"user": history.user, "user_hash": pa.array(history.user_hash), **columns})

    def _history(self, bucket: int, names: Sequence[str]) -> tuple[History | None, int]:
        """A bucket's users over all parts (None: there are none), and the bytes that were asked of the store."""
        where, size, pieces = f"{self.uri}, bucket {bucket}", 0, []
        for group in self._groups.get(bucket, []):
            table, own = self._read(group, (*USER, "days", *names))
            size += own
            pieces.append(clip(decode(table, names, where), group.from_day, group.to_day))
        if not any(len(piece.user) for piece in pieces):
            return None, size
        return merge(History.concat(pieces), where, self.manifest["kind"] == "sequences"), size

    def _read(self, group: _RowGroup, columns: Sequence[str] | None) -> tuple[pa.Table, int]:
        """The row group's `columns` (None: all) and the bytes that were asked for."""
        return artifacts.reach(group.uri, lambda: self._read_once(group, columns))

    def _read_once(self, group: _RowGroup, columns: Sequence[str] | None) -> tuple[pa.Table, int]:
        place = artifacts.storage(group.uri)
        size = 0
        try:
            # the fetched bytes serve one read, and were counted when they were fetched
            fetched = self._fetched.pop((group.uri, group.index), None) if columns != () else None
            with pa.PythonFile(fetched) if fetched else place.filesystem.open_input_file(place.path) as stream:
                file = pq.ParquetFile(stream, metadata=self._footers.get(group.uri), pre_buffer=True)
                if group.uri not in self._footers:
                    size += int(file.metadata.serialized_size)
                    self._check(group, file)
                    self._footers[group.uri] = file.metadata
                about = file.metadata.row_group(group.index)
                if about.num_rows != group.rows:
                    raise UserError(
                        f"{group.uri}: row group {group.index} has {about.num_rows} rows, its manifest says "
                        f"{group.rows}; the file was changed since: remove the artifact's folder and prepare again"
                    )
                stored = file.schema_arrow.names
                names = stored if columns is None else list(columns)
                missing = sorted(set(names) - set(stored))
                if missing:
                    raise UserError(
                        f"{group.uri}: expected the columns {missing[:5]}, the file has {stored}; "
                        "prepare the timelines again"
                    )
                chunks = [about.column(index) for index in range(about.num_columns)]
                if not fetched:
                    size += sum(int(chunk.total_compressed_size) for chunk in chunks if _root(chunk) in names)
                return file.read_row_group(group.index, columns=names).select(names), size
        except FileNotFoundError as error:
            raise UserError(
                f"{group.uri}: the manifest of {self.uri} names this file, but it is not there; start again "
                "(`forget` may have rewritten it meanwhile), restore it, or remove the artifact's folder and prepare "
                "again"
            ) from error
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{group.uri}: expected a parquet file with {group.groups} row groups, but it cannot be read "
                f"({error}); if the store is well, the file is damaged: remove the artifact's folder and prepare again"
            ) from error

    def _check(self, group: _RowGroup, file: pq.ParquetFile) -> None:
        if file.metadata.num_row_groups != group.groups:
            raise UserError(
                f"{group.uri}: has {file.metadata.num_row_groups} row groups, its manifest says {group.groups}; "
                "the file was changed after the artifact was built: remove the artifact's folder and prepare again"
            )

    @cached_property
    def _no_profiles(self) -> pa.Table | None:
        """A profile table without rows, with the columns that every other bucket has."""
        if not self._profiles:
            return None
        return self._read(next(iter(self._profiles.values()))[0], None)[0].slice(0, 0)


def rows_from_tables(
    daily: pa.Table,
    profiles: pa.Table | None,
    behaviours: Sequence[str],
    start_day: int,
    end_day: int,
    sequences: bool = False,
) -> Rows:
    """Users that are in memory already, as `Timelines.read` gives a bucket: sorted by (hash, user).

    `daily` has user, day and one integer column a behaviour (units of its resolution), one row per user and day, in any
    order. `profiles` has user and optionally registered, ends, segment and raw columns; a user who is only there gets
    an empty history (and without a registration did not exist before `end_day`). Raises UserError where a (user, day)
    comes twice. With `sequences` a row is an event: days may come again, and a day's events keep the table's order.
    """
    names = daily["user"].cast(pa.string()).combine_chunks()
    known = [names] if profiles is None else [names, profiles["user"].cast(pa.string()).combine_chunks()]
    users = pc.unique(pa.concat_arrays(known))
    keyed = pa.table({"user": users, "user_hash": hash_strings(users.to_pylist())})
    keyed = keyed.take(pc.sort_indices(keyed, sort_keys=[(name, "ascending") for name in reversed(USER)]))
    row = as_numpy(pc.index_in(names, value_set=keyed["user"].combine_chunks()), np.int64)
    days = as_numpy(daily["day"], np.int32)
    order = np.lexsort((days, row))
    history = History(
        user=keyed["user"].combine_chunks(),
        user_hash=as_numpy(keyed["user_hash"], np.uint64),
        lengths=np.bincount(row, minlength=len(users)).astype(np.int64),
        days=days[order],
        values=stacked([daily[name] for name in behaviours], len(days))[order],
    )
    check_days(history, "the daily table", sequences)
    return _rows(history, profiles, start_day, end_day)


def folder_of(uri: str, part: Mapping[str, Any]) -> str:
    """Where the files of a part of the artifact at `uri` lie: with `artifact`, in that one beside it."""
    owner = artifacts.join(uri.rstrip("/").rsplit("/", 1)[0], part["artifact"]) if part.get("artifact") else uri
    return artifacts.join(owner, part["path"])


def _by_bucket(folders: Sequence[tuple[str, Sequence[Any], tuple[int, ...]]]) -> dict[int, list[_RowGroup]]:
    found: dict[int, list[_RowGroup]] = {}
    for folder, files, days in folders:
        for file in files:
            uri, groups = artifacts.join(folder, file["name"]), file["row_groups"]
            for index, group in enumerate(groups):
                entry = _RowGroup(uri, index, int(group["rows"]), len(groups), *days)
                found.setdefault(int(group["bucket"]), []).append(entry)
    return dict(sorted(found.items()))


def _extent(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """The bytes [begin, end) of a row group's columns in its file."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    begins = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    return min(begins), max(begin + chunk.total_compressed_size for begin, chunk in zip(begins, chunks, strict=True))


def _root(chunk: pq.ColumnChunkMetaData) -> str:
    """`days` of the parquet column `days.list.element`."""
    return str(chunk.path_in_schema).partition(".")[0]


def _rows(history: History, profiles: pa.Table | None, start_day: int, end_day: int) -> Rows:
    """Joins the users' profiles (missing users and nulls are normal) and bounds their observation."""
    count = len(history.user)
    if profiles is None:
        profiles = pa.table({"user": pa.array([], pa.string())})
    # take() with a null index gives null: a user without profile
    joined = profiles.take(pc.index_in(history.user, value_set=profiles["user"].cast(pa.string()).combine_chunks()))
    offsets = np.concatenate([[0], np.cumsum(history.lengths)]).astype(np.int64)
    first_event = np.full(count, end_day, np.int32)
    active = history.lengths > 0
    first_event[active] = history.days[offsets[:-1][active]]
    registered = _or(joined, "registered", first_event)
    end = np.minimum(_or(joined, "ends", np.full(count, end_day, np.int32)), end_day)
    segment = joined["segment"] if "segment" in joined.column_names else pa.nulls(count, pa.string())
    return Rows(
        user=_objects(history.user),
        user_hash=history.user_hash,
        offsets=offsets,
        days=history.days,
        values=history.values,
        first_day=first_days(registered, first_event, start_day),
        end_day=end.astype(np.int32),
        segment=_objects(pc.fill_null(segment.cast(pa.string()), "")),
        profile={name: _profile(joined[name]) for name in joined.column_names if name not in NOT_PROFILE},
    )


def _or(table: pa.Table, name: str, default: Int32) -> Int32:
    """Day column `name`, with `default` (N,) where it is null or not there."""
    if name not in table.column_names:
        return default
    return as_numpy(pc.coalesce(table[name].cast(pa.int32()), pa.array(default)), np.int32)


def _objects(column: pa.ChunkedArray | pa.Array) -> Strings:
    """Text (or anything else that is no number) as objects, None for null; always writable."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.array(array.cast(pa.string()).to_numpy(zero_copy_only=False), dtype=np.object_)


def _profile(column: pa.ChunkedArray) -> npt.NDArray[np.generic]:
    """Numbers and booleans as float64 with NaN, the rest as objects with None."""
    kind = column.type
    if (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    ):
        return np.array(column.combine_chunks().cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    return _objects(column)
