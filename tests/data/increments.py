"""A folder of event files and what is made of it, for the tests of increments and compaction."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lum_ray import artifacts
from lum_ray.artifacts import Artifact, digest
from lum_ray.config import Behaviour, Data, Events
from lum_ray.data.prepare import Tokenizer, prepare_timelines
from lum_ray.data.raw import RawTables
from lum_ray.data.reader import Timelines
from lum_ray.gts import sequences
from lum_ray.lumos import timelines

LUMOS = Tokenizer(timelines.partial, timelines.merge, 1, combine=timelines.combine)
GTS = Tokenizer(sequences.partial, sequences.merge, 1, sequences.COLUMNS, sequences.merge)
BEHAVIOURS = (
    Behaviour("active", "binary", "count()"),
    Behaviour("spend", "continuous", "sum(price)", 0.01),
    Behaviour("least", "continuous", "min(price)", 0.01),
    Behaviour("average", "continuous", "mean(price)", 0.01),
    Behaviour("shops", "count", "n_unique(item)"),
)
USERS = 40


def events(count: int, seed: int, first_day: int = 0, end_day: int = 40, source: str = "x") -> pa.Table:
    """Timestamps of an hour's grain, so that several events of a user come at one instant."""
    draw = np.random.default_rng(seed)
    hours = draw.integers(first_day * 24, end_day * 24, count)
    return pa.table(
        {
            "user": [f"user-{number}" for number in draw.integers(0, USERS, count)],
            "time": pa.array(hours * 3_600_000_000, pa.timestamp("us", "UTC")),
            "price": pa.array(draw.integers(-100, 10_000, count) / 100, mask=draw.random(count) < 0.1),
            "item": [f"item-{number}" for number in draw.integers(0, 9, count)],
            "line": [f"line-{source}-{number}" for number in range(count)],
        }
    )


def day_of(table: pa.Table) -> np.ndarray[Any, Any]:
    return table["time"].cast(pa.int64()).to_numpy() // (24 * 3_600_000_000)


class Root:
    """A folder of event files and the artifacts made of it."""

    def __init__(self, path: Path, tokenizer: Tokenizer = LUMOS, data: Data | None = None) -> None:
        self.path, self.tokenizer, self.said = path, tokenizer, list[str]()
        self.data = data or Data(behaviours=BEHAVIOURS, events=Events(item="item"), max_reject_share=0.5)
        if tokenizer is GTS:
            self.data = replace(self.data, behaviours=())
        (path / "events").mkdir(parents=True, exist_ok=True)

    def write(self, name: str, table: pa.Table) -> None:
        pq.write_table(table, self.path / "events" / f"{name}.parquet", row_group_size=50)

    def prepare(self, folder: str = "made", **options: Any) -> Artifact:
        tables = RawTables(str(self.path / "events"))
        profiles = None
        if self.data.profiles is not None:
            tables = replace(tables, profiles=str(self.path / "profiles"))
            profiles = artifacts.fingerprint(str(self.path / "profiles"))
        prints = {"events": artifacts.fingerprint(tables.events), "profiles": profiles}
        lineage = digest(self.data.late_days, self.data.start)
        uri = str(self.path / folder / digest(prints, self.data.late_days))
        return prepare_timelines(
            self.data, tables, uri, self.tokenizer, "local", prints, lineage=lineage, log=self.said.append, **options
        )

    def rebuild(self) -> Artifact:
        """As if nothing were there."""
        shutil.rmtree(self.path / "rebuilt", ignore_errors=True)
        return self.prepare("rebuilt")


def same_rows(one: Artifact, other: Artifact) -> None:
    """All users with all that a model reads of them, whatever the buckets."""
    found = []
    for artifact in (one, other):
        opened = Timelines.open(artifact.uri)
        counts = opened.bucket_users
        rows = opened.read(np.flatnonzero(counts).tolist())
        assert counts.sum() == len(rows) == artifact.manifest["users"]
        assert int(rows.offsets[-1]) == artifact.manifest["active_days"]
        found.append(rows.take(np.argsort(rows.user.astype(str))))
    a, b = found
    for name in ("user", "user_hash", "offsets", "days", "values", "first_day", "end_day", "segment"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.profile.keys() == b.profile.keys()
    for name in a.profile:
        np.testing.assert_array_equal(a.profile[name], b.profile[name])
    for name in ("first_day", "end_day", "known_end_day", "users", "active_days"):
        assert one.manifest[name] == other.manifest[name], name
