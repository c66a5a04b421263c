"""Lanes: what a rank of the loader reads. A lane owns whole buckets and runs through them once an epoch.

Shapes: L = 64 lanes, N users.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lum_ray.artifacts import UserError
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Int64, Rows, UInt64, mix

LANES = 64
"""More ranks than lanes cannot be fed; a change of this number changes the order of every run."""

FETCHES = 8
"""Buckets that a loader fetches from an object store at a time."""


@dataclass
class LoaderStats:
    """What a loader did since it was made. What was read counts when it is read, ahead of the steps that were taken."""

    rows_read: int = 0
    bytes_read: int = 0
    """Column chunks; and a file's footer, once."""
    rows_without_cut: int = 0
    """Summed over the steps that were taken."""
    wait_s: float = 0.0
    """Time that the consumer waited for a step."""


class LaneReader:
    """Rows of lanes in their epochs' orders: buckets by hash(seed, epoch, lane, bucket), users of a bucket by
    hash(seed, epoch, bucket, user). Keeps the bucket in use of each lane, or (`keep_all`) every bucket. With `ahead`,
    threads fetch the bucket that a lane needs next.
    """

    def __init__(self, timelines: Timelines, seed: int, stats: LoaderStats, keep_all: bool, ahead: bool) -> None:
        self._timelines, self._seed, self._stats, self._keep_all = timelines, seed, stats, keep_all
        self._users = timelines.bucket_users
        self._buckets: dict[int, dict[int, Rows]] = {}  # lane -> bucket -> rows
        self._ordered: dict[int, tuple[int, int, Rows]] = {}  # lane -> epoch, bucket, its rows in that epoch's order
        self._plan: dict[int, tuple[int, list[int], list[int]]] = {}  # lane -> epoch, buckets, rows before each
        self._ahead = ahead
        self._fetches: dict[int, Future[int]] = {}  # bucket -> bytes asked of the store
        self._pool: ThreadPoolExecutor | None = None

    @property
    def none(self) -> Rows:
        """No rows, with the columns that others have."""
        return self._timelines.read([])

    def read(self, epoch: int, lane: int, begin: int, end: int) -> list[Rows]:
        """Rows [begin, end) of the lane's epoch, in one piece per bucket."""
        buckets, before = self._lane(epoch, lane)
        pieces = []
        for place in range(bisect_right(before, begin) - 1, bisect_left(before, end)):
            rows = self._in_order(epoch, lane, buckets[place])
            if self._ahead:
                following = buckets[place + 1] if place + 1 < len(buckets) else self._shuffled(epoch + 1, lane)[0]
                self._fetch(lane, int(following))
            pieces.append(rows.slice(max(begin - before[place], 0), min(end - before[place], len(rows))))
        return pieces

    def expect(self, epoch: int, lane: int, begin: int) -> None:
        """Row `begin` of the lane's epoch is to be read soon."""
        if self._ahead:
            buckets, before = self._lane(epoch, lane)
            self._fetch(lane, buckets[bisect_right(before, begin) - 1])

    def close(self) -> list[Future[Any]]:
        """End the threads that fetch. Returns the fetches that are still under way."""
        running: list[Future[Any]] = []
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
            running = [future for future in self._fetches.values() if not future.cancelled()]
        self._fetches.clear()
        return running

    def _fetch(self, lane: int, bucket: int) -> None:
        if bucket in self._buckets.get(lane, ()) or bucket in self._fetches:
            return
        self._pool = self._pool or ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        self._fetches[bucket] = self._pool.submit(self._timelines.fetch, bucket)

    def _shuffled(self, epoch: int, lane: int) -> Int64:
        """The lane's buckets in the order of an epoch."""
        buckets = np.arange(lane, len(self._users), LANES)
        buckets = buckets[self._users[buckets] > 0]
        return np.asarray(buckets[np.argsort(mix(self._seed, epoch, lane, buckets), kind="stable")], np.int64)

    def _lane(self, epoch: int, lane: int) -> tuple[list[int], list[int]]:
        if lane not in self._plan or self._plan[lane][0] != epoch:
            buckets = self._shuffled(epoch, lane)
            users = self._users[buckets]
            self._plan[lane] = (epoch, buckets.tolist(), (np.cumsum(users) - users).tolist())
        return self._plan[lane][1:]

    def _bucket(self, lane: int, bucket: int) -> Rows:
        held = self._buckets.setdefault(lane, {})
        if bucket not in held:
            if not self._keep_all:
                held.clear()
            if (fetch := self._fetches.pop(bucket, None)) is not None:
                self._stats.bytes_read += fetch.result()
            rows, size = self._timelines.read_measured([bucket])
            if len(rows) != self._users[bucket]:
                raise UserError(
                    f"{self._timelines.uri}: bucket {bucket} has {len(rows)} users, its manifest says "
                    f"{self._users[bucket]}; remove the artifact's folder and prepare again"
                )
            held[bucket] = rows
            self._stats.rows_read += len(rows)
            self._stats.bytes_read += size
        return held[bucket]

    def _in_order(self, epoch: int, lane: int, bucket: int) -> Rows:
        # the whole bucket at once: a step takes a few rows of each lane, and 64 small selections cost more than it
        if lane not in self._ordered or self._ordered[lane][:2] != (epoch, bucket):
            rows = self._bucket(lane, bucket)
            keys: UInt64 = mix(self._seed, epoch, bucket, rows.user_hash)
            self._ordered[lane] = (epoch, bucket, rows.take(np.argsort(keys, kind="stable")))
        return self._ordered[lane][2]
