"""The streaming loader: which users every global step holds is a function of (seed, step) alone.

A bucket of the artifact belongs to one of 64 lanes, a lane to one rank. A lane runs through its buckets once an epoch
and gives each global step its share of rows; the epoch's order is the merge of the lanes in proportion to their sizes,
so any place in it can be computed without replaying what came before. The whole position is therefore the step.

The memory of a rank is one bucket for each of its lanes (or all its rows, where they fit in `cache_mib`): 64 / world
buckets. `prepare` chooses the number of buckets. From an object store the bucket that a lane needs next is fetched
while the one before is in use, and what was fetched stays on the local disk while there is room (`range_cache`): so a
byte is asked of the store once, and again in a later epoch only where the disk had no room for it.

Departs: Accio (section 3.5) gives each process a subset of the partitions, which ties the order of a run to the number
of processes; here the global batch is the same for every world size, and a run may resume on another one.

Shapes: L = 64 lanes, N users, S samples.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lum_ray.artifacts import UserError, storage
from lum_ray.data.lanes import LANES, LaneReader, LoaderStats
from lum_ray.data.range_cache import RangeCache, cache_limit
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Int64, Rows, Samples, expand, mix, share
from lum_ray.data.windows import CutPlan

Arrays = dict[str, npt.NDArray[Any]]
Collate = Callable[[Rows, Samples], Arrays]


@dataclass(frozen=True)
class Schedule:
    """Which rows of which lanes a step holds: arithmetic over the lanes' sizes, the same on every rank.

    Row i of a lane with n rows has the key (i + phase) / n, where the phase in [0, 1) is the lane's hash in that epoch;
    an epoch is all rows by (key, lane). So every lane gives its share, to within a row, to every stretch of the epoch,
    and lanes of a few rows do not meet in the same steps each time.

    Step s holds the places [s * batch, (s + 1) * batch) of
    the epochs laid end to end; a step may straddle epochs.
    """

    lane_rows: Int64  # (L,)
    batch: int
    seed: int

    @property
    def rows(self) -> int:
        return int(self.lane_rows.sum())

    def before(self, epoch: int, place: int) -> Int64:
        """How many rows of each lane lie before `place` (0..N) of an epoch (L,)."""
        # Lane l has ceil(n_l * t - phase_l) keys below t: over all lanes at most L away from N * t. So the counts at
        # (place - L) / N are a floor, those at (place + L) / N a ceiling, and only the rows between need be sorted; one
        # row more on either side is room for rounding.
        phase = share(mix(self.seed, epoch, np.arange(len(self.lane_rows))))
        low, high = (
            np.clip(np.ceil(self.lane_rows * ((place + slack) / self.rows) - phase), 0, self.lane_rows).astype(np.int64)
            for slack in (-LANES - 1, LANES + 1)
        )
        lane, index = expand(low, high)
        order = self.order(np.full(len(lane), epoch), lane, index)[: place - int(low.sum())]
        return np.asarray(low + np.bincount(lane[order], minlength=len(self.lane_rows)), np.int64)

    def pieces(self, step: int) -> list[tuple[int, Int64, Int64]]:
        """The step's (epoch, begin (L,), end (L,)): rows [begin, end) of each lane in that epoch."""
        first, stop = step * self.batch, (step + 1) * self.batch
        return [
            (
                epoch,
                self.before(epoch, max(first - epoch * self.rows, 0)),
                self.before(epoch, min(stop - epoch * self.rows, self.rows)),
            )
            for epoch in range(first // self.rows, (stop - 1) // self.rows + 1)
        ]

    def order(self, epoch: Int64, lane: Int64, index: Int64) -> Int64:
        """The permutation that puts rows (epoch, lane, index in the lane's epoch) into the global order."""
        key = (index + share(mix(self.seed, epoch, lane))) / self.lane_rows[lane]
        return np.lexsort((lane, key, epoch)).astype(np.int64)


def micro_batch_count(pieces: list[tuple[int, Int64, Int64]], world: int, micro_batch: int) -> int:
    """Micro-batches that every rank makes of a step: as many as the fullest rank needs."""
    lane_rows = sum((end - begin for _, begin, end in pieces), np.zeros(LANES, np.int64))
    fullest = max(int(lane_rows[rank::world].sum()) for rank in range(world))
    return -(-fullest // micro_batch)


@dataclass(frozen=True)
class Step:
    """One rank's share of a global step; `epoch` is that of the step's first row.

    The place of a row of which the plan allows no cut stays empty: `rows_without_cut` counts them.
    """

    index: int
    epoch: int
    micro_batches: list[Arrays]
    rows_without_cut: int


class Loader:
    """One rank's part of the steps, read, sampled and collated ahead of need in one background thread.

    `batch` counts rows (users) over all ranks; each row gives `draws` samples, which stay in one step. Every rank makes
    the same number of micro-batches of at most `micro_batch` rows; a micro-batch may be empty. An exception in the
    thread is raised where its step is taken, and again at every further try until `seek`: no step is passed over.

    Raises UserError for an artifact without users and for more ranks than lanes, ValueError for sizes below 1.
    """

    def __init__(
        self,
        timelines: Timelines,
        plan: CutPlan,
        collate: Collate,
        *,
        batch: int,
        micro_batch: int,
        draws: int,
        seed: int,
        rank: int,
        world: int,
        prefetch: int = 2,
        cache_mib: float = 256,
    ) -> None:
        sizes = {"batch": batch, "micro_batch": micro_batch, "draws": draws, "world": world, "prefetch": prefetch}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 to {world - 1} (world is {world}), got {rank}")
        _check_world(world)
        users = timelines.bucket_users
        if not users.any():
            raise UserError(
                f"{timelines.uri}: expected users to train on, but the artifact holds none; check its inputs"
            )
        self.stats = LoaderStats()
        self.schedule = Schedule(np.array([users[lane::LANES].sum() for lane in range(LANES)], np.int64), batch, seed)
        self._plan, self._collate, self._draws, self._seed = plan, collate, draws, seed
        self._own = np.arange(rank, LANES, world)
        self._world, self._micro_batch, self._prefetch = world, micro_batch, prefetch
        keep_all, remote = self._fits(timelines, cache_mib), not storage(timelines.uri).is_local
        if remote:
            timelines = timelines.with_cache(RangeCache(0 if keep_all else cache_limit()))
        self._lanes = LaneReader(timelines, self._own, seed, self.stats, keep_all, remote)
        self._position = 0
        self._pending: deque[Future[Step]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was seen once (the last of them may hold rows of the next epoch)."""
        return -(-self.schedule.rows // self.schedule.batch)

    @property
    def position(self) -> int:
        """The step that comes next: all that a checkpoint must keep."""
        return self._position

    def seek(self, step: int) -> Loader:
        """Go on at `step`; costs the buckets that are then in use, whatever the step."""
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        self.close()
        self._position = step
        return self

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """The step at the position; there is no last one."""
        self._ask()
        start = time.perf_counter()
        try:
            step = self._pending[0].result()  # a failed step stays at the head
        except StopIteration as error:  # would end the consumer's loop without a word
            raise RuntimeError("collate raised StopIteration") from error
        self.stats.wait_s += time.perf_counter() - start
        self.stats.rows_without_cut += step.rows_without_cut
        self._pending.popleft()
        self._position += 1
        self._ask()
        return step

    def close(self, timeout_s: float = 30.0) -> None:
        """End the thread. Waits at most `timeout_s` for the step that it is making; the loader may be used again.

        Raises TimeoutError where the thread is still busy then (a storage that does not answer).
        """
        if self._thread is None:
            return
        self._thread.shutdown(wait=False, cancel_futures=True)
        running: list[Future[Any]] = [future for future in self._pending if not future.cancelled()]
        self._pending.clear()
        self._thread = None
        started_at = time.monotonic()
        stuck = wait(running, timeout_s).not_done
        fetches = self._lanes.close()
        stuck |= wait(fetches, max(0.0, timeout_s - (time.monotonic() - started_at))).not_done
        if stuck:
            raise TimeoutError(
                f"the loader's thread is still at work {timeout_s:g} s after close(); is the storage reachable?"
            )

    def _ask(self) -> None:
        """Have the thread make the steps up to `prefetch` ahead of the position."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        while len(self._pending) < self._prefetch:
            self._pending.append(self._thread.submit(self._make, self._position + len(self._pending)))

    def _make(self, step: int) -> Step:
        pieces = self.schedule.pieces(step)
        rows, place_N = self._lanes.select(pieces)
        epochs, lanes, indices = [], [], []
        for epoch, begin, end in pieces:
            lane_of, index = expand(begin[self._own], end[self._own])
            indices.append(index)
            lanes.append(self._own[lane_of])
            epochs.append(np.full(len(index), epoch))
        epoch_N, lane_N, index_N = map(np.concatenate, (epochs, lanes, indices))
        order = self.schedule.order(epoch_N, lane_N, index_N)
        count = micro_batch_count(pieces, self._world, self._micro_batch)
        bounds = np.arange(count + 1) * len(order) // count
        micro_batches, rows_without_cut = [], 0
        for first, stop in itertools.pairwise(bounds):
            chosen = order[first:stop]
            micro = rows.take(place_N[chosen])
            samples = self._plan.draw(micro, self._seed, epoch_N[chosen], self._draws)
            rows_without_cut += len(micro) - len(samples) // self._draws
            micro_batches.append(self._collate(micro, replace(samples, step=step)))
        return Step(step, pieces[0][0], micro_batches, rows_without_cut)

    def _fits(self, timelines: Timelines, cache_mib: float) -> bool:
        """Whether this rank's rows fit in the cache, by the manifest's counts (200 bytes a user beside the days)."""
        rows = self.schedule.rows
        whole = int(timelines.manifest["active_days"]) * (4 + 8 * len(timelines.behaviours)) + rows * 200
        return whole * int(self.schedule.lane_rows[self._own].sum()) <= cache_mib * 2**20 * rows


def evaluation_batches(
    timelines: Timelines,
    plan: CutPlan,
    collate: Collate,
    micro_batch: int,
    rank: int,
    world: int,
    max_users: int | None = None,
    seed: int = 0,
) -> Iterator[tuple[Rows, Samples, Arrays]]:
    """Every allowed (row, cut) exactly once over all ranks, in bucket order, at most `micro_batch` samples at a time.

    Memory is bounded by a bucket. Ranks may make different numbers of batches. With `max_users`, only the users with
    the smallest hash(seed, user) among those that have a cut: the same ones whatever the world size, and a larger
    `max_users` adds users to them.
    """
    _check_world(world)
    limit = None if max_users is None else _smallest(timelines, plan, max_users, seed)
    for bucket in np.flatnonzero(timelines.bucket_users).tolist():
        if bucket % LANES % world != rank:
            continue
        rows = timelines.read([bucket])
        if limit is not None:
            rows = rows.take(np.flatnonzero(mix(seed, rows.user_hash) <= limit))
        samples = plan.every(rows)
        for start in range(0, len(samples), micro_batch):
            part = slice(start, start + micro_batch)
            chosen, row = np.unique(samples.row[part], return_inverse=True)
            some = rows.take(chosen)
            own = Samples(row.astype(np.int64), samples.cut[part], samples.draw[part])
            yield some, own, collate(some, own)


@lru_cache(maxsize=8)
def _smallest(timelines: Timelines, plan: CutPlan, max_users: int, seed: int) -> np.uint64:
    """The `max_users`-th smallest hash(seed, user) of the users with a cut. Reads days and profiles, no behaviours."""
    if max_users < 1:
        raise ValueError(f"max_users: expected at least 1, got {max_users}")
    kept = np.zeros(0, np.uint64)
    for bucket in np.flatnonzero(timelines.bucket_users).tolist():
        rows = timelines.read([bucket], behaviours=())
        kept = np.concatenate([kept, mix(seed, rows.user_hash[plan.ranges(rows)[1] > 0])])
        if len(kept) > max_users:
            kept = np.partition(kept, max_users - 1)[:max_users]
    return np.uint64(kept.max()) if len(kept) else np.uint64(0)


def _check_world(world: int) -> None:
    if world > LANES:
        raise UserError(
            f"world: expected at most {LANES} workers (a lane has one reader), got {world}; use fewer, larger ones"
        )
