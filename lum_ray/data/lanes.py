"""Lanes: what a rank of the loader reads. A lane owns whole buckets and runs through them once an epoch.

Shapes: L = 64 lanes, N users.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
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
    """Rows of a rank's lanes in their epochs' orders: buckets by hash(seed, epoch, lane, bucket), users of a bucket by
    hash(seed, epoch, bucket, user). Keeps the bucket in use of each lane, or (`keep_all`) every bucket from the start.
    With `ahead`, threads fetch the bucket that a lane needs next.
    """

    def __init__(
        self, timelines: Timelines, lanes: Int64, seed: int, stats: LoaderStats, keep_all: bool, ahead: bool
    ) -> None:
        self._timelines, self._lanes, self._seed, self._stats = timelines, lanes, seed, stats
        self._keep_all, self._ahead = keep_all, ahead
        self._users = timelines.bucket_users
        self._all: tuple[Rows, Int64] | None = None  # every bucket's rows, and where each bucket begins
        self._orders: dict[int, tuple[int, Int64]] = {}  # lane -> epoch, its rows among all in that epoch's order
        self._bucket: dict[int, tuple[int, Rows]] = {}  # lane -> bucket, its rows
        self._ordered: dict[int, tuple[int, int, Rows]] = {}  # lane -> epoch, bucket, its rows in that epoch's order
        self._plan: dict[int, tuple[int, list[int], list[int]]] = {}  # lane -> epoch, buckets, rows before each
        self._fetches: dict[int, Future[int]] = {}  # bucket -> bytes asked of the store
        self._pool: ThreadPoolExecutor | None = None

    def select(self, pieces: Sequence[tuple[int, Int64, Int64]]) -> tuple[Rows, Int64]:
        """Of each piece (epoch, begin (L,), end (L,)) the rows [begin, end) of this rank's lanes in that epoch, lane
        after lane: some `Rows` that hold them, and where in these they stand."""
        taken = [
            (epoch, lane, int(begin[lane]), int(end[lane]))
            for epoch, begin, end in pieces
            for lane in self._lanes[end[self._lanes] > begin[self._lanes]].tolist()
        ]
        if not taken:
            return self._timelines.read([]), np.zeros(0, np.int64)
        if self._keep_all:
            rows = self._everything()[0]
            return rows, np.concatenate([self._order(epoch, lane)[begin:end] for epoch, lane, begin, end in taken])
        if self._ahead:
            for epoch, lane, begin, _ in taken:
                buckets, before = self._shuffle(epoch, lane)
                self._fetch(lane, buckets[bisect_right(before, begin) - 1])
        rows = Rows.concat([piece for one in taken for piece in self._read(*one)])
        return rows, np.arange(len(rows))

    def close(self) -> list[Future[Any]]:
        """End the threads that fetch. Returns the fetches that are still under way."""
        running: list[Future[Any]] = []
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
            running = [future for future in self._fetches.values() if not future.cancelled()]
        self._fetches.clear()
        return running

    def _everything(self) -> tuple[Rows, Int64]:
        if self._all is None:
            buckets = np.flatnonzero(self._users)
            buckets = buckets[np.isin(buckets % LANES, self._lanes)].tolist()
            if self._ahead:
                for bucket in buckets:
                    self._fetch(bucket % LANES, bucket)
            first = np.zeros(len(self._users), np.int64)
            first[buckets] = np.cumsum(self._users[buckets]) - self._users[buckets]
            self._all = Rows.concat([self._load(bucket) for bucket in buckets]), first
        return self._all

    def _order(self, epoch: int, lane: int) -> Int64:
        if lane not in self._orders or self._orders[lane][0] != epoch:
            rows, first = self._everything()
            own = []
            for bucket in self._shuffle(epoch, lane)[0]:
                begin, count = int(first[bucket]), int(self._users[bucket])
                own.append(begin + self._argsort(epoch, bucket, rows.user_hash[begin : begin + count]))
            self._orders[lane] = epoch, np.concatenate(own)
        return self._orders[lane][1]

    def _argsort(self, epoch: int, bucket: int, user_hash: UInt64) -> Int64:
        return np.argsort(mix(self._seed, epoch, bucket, user_hash), kind="stable").astype(np.int64, copy=False)

    def _read(self, epoch: int, lane: int, begin: int, end: int) -> list[Rows]:
        """Rows [begin, end) of the lane's epoch, in one piece per bucket."""
        buckets, before = self._shuffle(epoch, lane)
        pieces = []
        for place in range(bisect_right(before, begin) - 1, bisect_left(before, end)):
            rows = self._in_order(epoch, lane, buckets[place])
            if self._ahead:
                following = buckets[place + 1] if place + 1 < len(buckets) else self._shuffled(epoch + 1, lane)[0]
                self._fetch(lane, int(following))
            pieces.append(rows.slice(max(begin - before[place], 0), min(end - before[place], len(rows))))
        return pieces

    def _in_order(self, epoch: int, lane: int, bucket: int) -> Rows:
        # the whole bucket at once: a step takes a few rows of each lane, and 64 small selections cost more than it
        if lane not in self._ordered or self._ordered[lane][:2] != (epoch, bucket):
            if lane not in self._bucket or self._bucket[lane][0] != bucket:
                self._bucket.pop(lane, None)
                self._bucket[lane] = bucket, self._load(bucket)
            rows = self._bucket[lane][1]
            self._ordered[lane] = epoch, bucket, rows.take(self._argsort(epoch, bucket, rows.user_hash))
        return self._ordered[lane][2]

    def _fetch(self, lane: int, bucket: int) -> None:
        if bucket in self._fetches or (lane in self._bucket and self._bucket[lane][0] == bucket):
            return
        self._pool = self._pool or ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        self._fetches[bucket] = self._pool.submit(self._timelines.fetch, bucket)

    def _load(self, bucket: int) -> Rows:
        if (fetch := self._fetches.pop(bucket, None)) is not None:
            self._stats.bytes_read += fetch.result()
        rows, size = self._timelines.read_measured([bucket])
        if len(rows) != self._users[bucket]:
            raise UserError(
                f"{self._timelines.uri}: bucket {bucket} has {len(rows)} users, its manifest says "
                f"{self._users[bucket]}; remove the artifact's folder and prepare again"
            )
        self._stats.rows_read += len(rows)
        self._stats.bytes_read += size
        return rows

    def _shuffled(self, epoch: int, lane: int) -> Int64:
        """The lane's buckets in the order of an epoch."""
        buckets = np.arange(lane, len(self._users), LANES)
        buckets = buckets[self._users[buckets] > 0]
        return np.asarray(buckets[np.argsort(mix(self._seed, epoch, lane, buckets), kind="stable")], np.int64)

    def _shuffle(self, epoch: int, lane: int) -> tuple[list[int], list[int]]:
        """The lane's buckets in the order of an epoch, and the rows before each."""
        if lane not in self._plan or self._plan[lane][0] != epoch:
            buckets = self._shuffled(epoch, lane)
            users = self._users[buckets]
            self._plan[lane] = (epoch, buckets.tolist(), (np.cumsum(users) - users).tolist())
        return self._plan[lane][1:]
