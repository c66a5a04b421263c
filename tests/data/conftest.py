"""Synthetic timelines: plain tables, and a writer of them as an artifact, row by row, without the product's code."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings

from lum_ray.data.rows import hash_strings

settings.register_profile("data", deadline=None)  # a busy machine is no failure
settings.load_profile("data")

BEHAVIOURS = ("active", "spend", "visits")


@dataclass(frozen=True)
class World:
    """`daily`: user, day and one column a behaviour; `profiles`: some of the users and some without events."""

    daily: pa.Table
    profiles: pa.Table
    start_day: int
    end_day: int


def make_world(users: int, start_day: int = 100, end_day: int = 160, seed: int = 0, activity: float = 0.4) -> World:
    random = np.random.default_rng(seed)
    names = [f"user-{number}" for number in range(users)]
    active = random.random((users, end_day - start_day)) < activity
    active[:, 3] |= ~active.any(axis=1)
    row, day = np.nonzero(active)
    shuffle = random.permutation(len(row))
    row, day = row[shuffle], day[shuffle]
    daily = pa.table(
        {
            "user": np.array(names, object)[row],
            "day": (day + start_day).astype(np.int32),
            "active": np.ones(len(row), np.int64),
            "spend": random.integers(0, 10**9, len(row)),
            "visits": random.integers(0, 5, len(row)),
        }
    )
    known = [name for name in names if random.random() < 0.7] + ["nobody-1", "nobody-2"]
    maybe = random.random(len(known))
    profiles = pa.table(
        {
            "user": pa.array(known),
            "registered": pa.array([None if m < 0.3 else int(start_day + 40 * m - 15) for m in maybe], pa.int32()),
            "ends": pa.array([int(end_day - 5) if m > 0.8 else None for m in maybe], pa.int32()),
            "segment": pa.array([None if m < 0.2 else f"s{int(m * 10) % 2}" for m in maybe], pa.string()),
            "age": pa.array([None if m < 0.5 else m * 80 for m in maybe], pa.float64()),
            "town": pa.array([None if m > 0.5 else f"t{int(m * 6)}" for m in maybe], pa.string()),
        }
    )
    return World(daily, profiles, start_day, end_day)


def write_timelines(
    uri: Path,
    world: World,
    log2_buckets: int = 6,
    splits: Sequence[int] = (),
    files: int = 1,
    with_profiles: bool = True,
) -> str:
    """The artifact of `world`; `splits` are days at which a new part begins."""
    records: dict[str, list[dict[str, int]]] = {}
    for record in world.daily.sort_by("day").to_pylist():
        records.setdefault(record["user"], []).append(record)
    hashes = dict(zip(records, hash_strings(list(records)).tolist(), strict=True))
    bounds = [world.start_day, *splits, world.end_day]
    parts = []
    for first, stop in itertools.pairwise(bounds):
        rows = []
        for user, days in records.items():
            inside = [record for record in days if first <= record["day"] < stop]
            if inside:
                bucket = hashes[user] % 2**log2_buckets
                row = {"bucket": bucket, "user": user, "user_hash": hashes[user], "days": [r["day"] for r in inside]}
                rows.append(row | {name: [r[name] for r in inside] for name in BEHAVIOURS})
        lists = [(name, pa.list_(pa.int64())) for name in BEHAVIOURS]
        schema = pa.schema([*_KEYS, ("days", pa.list_(pa.int32())), *lists])
        path = f"part-{first}-{stop}"
        written = _write_groups(uri / path, rows, schema, files)
        parts.append({"path": path, "from_day": first, "to_day": stop, "files": written})
    profile_files = None
    if with_profiles:
        rows = world.profiles.to_pylist()
        for row, key in zip(rows, hash_strings([row["user"] for row in rows]).tolist(), strict=True):
            row |= {"user_hash": key, "bucket": key % 2**log2_buckets}
        schema = pa.schema([*_KEYS, *[field for field in world.profiles.schema if field.name != "user"]])
        profile_files = _write_groups(uri / "profiles", rows, schema, 1)
    manifest = {
        "kind": "timelines",
        "digest": "0" * 12,
        "log2_buckets": log2_buckets,
        "parts": parts,
        "profiles": profile_files,
        "behaviours": [
            {"name": "active", "kind": "binary", "resolution": 1},
            {"name": "spend", "kind": "continuous", "resolution": 0.01},
            {"name": "visits", "kind": "count", "resolution": 1},
        ],
        "first_day": world.start_day,
        "end_day": world.end_day,
        "users": len(records),
        "active_days": world.daily.num_rows,
    }
    (uri / "manifest.json").write_text(json.dumps(manifest))
    return str(uri)


_KEYS = [("bucket", pa.int32()), ("user", pa.string()), ("user_hash", pa.uint64())]


def _write_groups(
    folder: Path, rows: list[dict[str, object]], schema: pa.Schema, files: int
) -> list[dict[str, object]]:
    folder.mkdir(parents=True, exist_ok=True)
    buckets = sorted({row["bucket"] for row in rows})
    written = []
    for number in range(files):
        groups = []
        with pq.ParquetWriter(
            folder / f"{number:04}.parquet", schema, compression="zstd", write_statistics=False
        ) as writer:
            for bucket in buckets[number * len(buckets) // files : (number + 1) * len(buckets) // files]:
                own = sorted(
                    (row for row in rows if row["bucket"] == bucket), key=lambda row: (row["user_hash"], row["user"])
                )
                writer.write_table(pa.Table.from_pylist(own, schema))
                groups.append({"bucket": bucket, "rows": len(own)})
        written.append({"name": f"{number:04}.parquet", "row_groups": groups})
    return written


@pytest.fixture(scope="session")
def world() -> World:
    return make_world(users=300)


@pytest.fixture(scope="session")
def stored(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of `world` in one part of two files."""
    return write_timelines(tmp_path_factory.mktemp("timelines") / "one", world, files=2)


@pytest.fixture(scope="session")
def make() -> Callable[..., World]:
    return make_world


@pytest.fixture(scope="session")
def write() -> Callable[..., str]:
    return write_timelines
