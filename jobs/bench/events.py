"""Synthetic event logs of any size for the data plane's benchmarks: files by time, users mixed, as a log is written.

Every user has a day with events in about twelve (8 %), and 1 + Poisson events on it, 200 in all. Memory is bounded by a
day; a folder is written once and found again by its options.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lum_ray.config import Behaviour, Data, Events

KINDS = ("browse", "search", "message", "play", "purchase")
KIND_SHARES = (0.42, 0.25, 0.15, 0.10, 0.08)
SHOPS = 40
BEHAVIOURS = (
    Behaviour("active", "binary", "count()"),
    Behaviour("events", "count", "count()"),
    *(Behaviour(kind, "count", f'count(kind == "{kind}")') for kind in KINDS),
    Behaviour("spend", "continuous", "sum(amount)", 0.01, "active"),
    Behaviour("largest", "continuous", "max(amount)", 0.01, "active"),
    Behaviour("average", "continuous", "mean(amount)", 0.01, "active"),
    Behaviour("units", "count", "sum(quantity)"),
    Behaviour("discounted", "binary", "any(discount > 0)"),
    Behaviour("shops", "count", "n_unique(shop)"),
)
DATA = Data(events=Events(), behaviours=BEHAVIOURS)


@dataclass(frozen=True)
class Log:
    """An event log of about `events` rows: `events_per_user` a user over `days` days, in `files` files by time."""

    events: int
    files: int = 16
    events_per_user: int = 200
    days: int = 360
    active_share: float = 0.08
    seed: int = 0

    @property
    def users(self) -> int:
        return max(1, self.events // self.events_per_user)

    def folder(self, root: str) -> str:
        """Where its files are, under `root`; they are written where they are not there yet."""
        name = "-".join(str(value) for value in asdict(self).values())
        folder = os.path.join(root, "events", name)
        if not os.path.exists(folder):
            self._write(folder)
        return folder

    def _write(self, folder: str) -> None:
        temporary = f"{folder}.{uuid.uuid4().hex}"
        os.makedirs(temporary)
        names = pa.array([f"u{number:09d}" for number in range(self.users)])
        for file in range(self.files):
            days = range(file * self.days // self.files, (file + 1) * self.days // self.files)
            with pq.ParquetWriter(os.path.join(temporary, f"{file:05d}.parquet"), SCHEMA) as writer:
                for day in days:
                    writer.write_table(self._day(day, names))
        with open(os.path.join(temporary, "_options.json"), "w", encoding="utf-8") as stream:
            json.dump(asdict(self), stream)
        os.rename(temporary, folder)

    def _day(self, day: int, names: pa.Array) -> pa.Table:
        draw = np.random.default_rng([self.seed, day])
        active = np.flatnonzero(draw.random(self.users) < self.active_share)
        mean = self.events_per_user / (self.days * self.active_share)
        user = np.repeat(active, 1 + draw.poisson(mean - 1, len(active)))
        draw.shuffle(user)
        count = len(user)
        kind = np.searchsorted(np.cumsum(KIND_SHARES)[:-1], draw.random(count)).astype(np.int8)
        buys = kind == KINDS.index("purchase")
        time_us = (START_DAY + day) * DAY_US + np.sort(draw.integers(0, DAY_US, count))
        amount = np.rint(100 * np.exp(2.5 + draw.standard_normal(count)) + 1) / 100
        discount = np.where(draw.random(count, np.float32) < 0.2, np.rint(amount * 10) / 100, 0.0)
        return pa.table(
            {
                "user": names.take(pa.array(user)),
                "time": pa.array(time_us, pa.timestamp("us", "UTC")),
                "kind": pa.array(KINDS).take(pa.array(kind)),
                "amount": pa.array(amount, mask=~buys),
                "discount": pa.array(discount, mask=~buys),
                "quantity": np.where(buys, draw.integers(1, 5, count), 0).astype(np.int32),
                "shop": draw.integers(0, SHOPS, count).astype(np.int32),
                "session": draw.integers(0, 1 << 40, count),
            },
            schema=SCHEMA,
        )


DAY_US = 86_400_000_000
START_DAY = 19_723  # 2024-01-01
SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("time", pa.timestamp("us", "UTC")),
        ("kind", pa.string()),
        ("amount", pa.float64()),
        ("discount", pa.float64()),
        ("quantity", pa.int32()),
        ("shop", pa.int32()),
        ("session", pa.int64()),
    ]
)
