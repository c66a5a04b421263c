"""What an audit asks a model about: a sample of a plan's cuts, one row each, and the same rows with another future.

Legend: B samples (each with a row of its own), A active days or events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from lum_ray.artifacts import UserError
from lum_ray.data.loader import evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Int64, Rows, Samples, expand, mix
from lum_ray.data.windows import CutPlan
from lum_ray.stage import Arrays

EARLIEST, LATEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max
STRANGER_SALT = 52_009


@dataclass(frozen=True)
class Cases:
    """`rows` and `samples` (B,): sample b is of row b. `user` (B,): whose, as a number."""

    rows: Rows
    samples: Samples
    user: Int64

    @staticmethod
    def of(rows: Rows, samples: Samples) -> Cases:
        """A row for each sample, so that each can have a future of its own."""
        own = rows.take(samples.row)
        user = np.unique(own.user_hash, return_inverse=True)[1].astype(np.int64)
        return Cases(own, replace(samples, row=np.arange(len(samples))), user)

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, index: Int64) -> Cases:
        """The samples at `index`."""
        samples = Samples(np.arange(len(index)), self.samples.cut[index], self.samples.draw[index], self.samples.step)
        return Cases(self.rows.take(index), samples, self.user[index])

    def parts(self, size: int) -> Iterator[Int64]:
        """The samples, `size` at a time."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))

    def with_rows(self, rows: Rows) -> Cases:
        return replace(self, rows=rows)

    def truncated(self, day: Int64 | None = None) -> Cases:
        """Nothing is left from each sample's cut on (or from `day` (B,) on): no event, no observed day."""
        until = self.samples.cut if day is None else day
        return self.with_rows(with_future(self.rows, until.astype(np.int64), None))

    def strangers(self) -> Int64:
        """For each sample another user's with the same cut, each taken once; -1 where nobody else has that cut."""
        cut = self.samples.cut
        order = np.lexsort((mix(STRANGER_SALT, self.rows.user_hash), cut))
        found = np.full(len(self), -1, np.int64)
        for group in np.split(order, np.flatnonzero(np.diff(cut[order])) + 1):
            if len(group) > 1:
                found[group] = np.roll(group, 1)
        return found


def cases_of(timelines: Timelines, plan: CutPlan, max_users: int, seed: int) -> Cases:
    """All cuts of a stable sample of the plan's users. Raises UserError where there are not at least two users."""
    pieces, cuts = [], []
    for rows, samples, _ in evaluation_batches(timelines, plan, _nothing, 1 << 16, 0, 1, max_users, seed):
        pieces.append(rows.take(samples.row))
        cuts.append(samples.cut)
    users = len({name for piece in pieces for name in piece.user.tolist()})
    if users < 2:
        raise UserError(
            f"split.test: an audit gives users each other's histories, so expected at least two users with a cut on "
            f"days {plan.from_day} to {plan.until_day}, got {users}; check the split's days, or raise --max-users"
        )
    cut = np.concatenate(cuts)
    return Cases.of(Rows.concat(pieces), Samples(np.arange(len(cut)), cut, np.zeros(len(cut), np.int32)))


def training_cases(timelines: Timelines, plan: CutPlan, seed: int, least: int) -> Cases:
    """At least `least` training samples, where there are as many: whole buckets, a cut of each user."""
    pieces, cuts, count = [], [], 0
    for bucket in np.flatnonzero(timelines.bucket_users).tolist():
        rows = timelines.read([bucket])
        samples = plan.draw(rows, seed, 0, 1)
        pieces.append(rows.take(samples.row))
        cuts.append(samples.cut)
        count += len(samples)
        if count >= least:
            break
    cut = np.concatenate(cuts) if cuts else np.zeros(0, np.int32)
    return Cases.of(Rows.concat(pieces), Samples(np.arange(len(cut)), cut, np.zeros(len(cut), np.int32)))


def with_future(
    rows: Rows, cut_B: Int64, other_B: Int64 | None, changed: Callable[[Int64], Int64] | None = None
) -> Rows:
    """`rows` (B) whose days from the cut on are those of the rows `other_B` (-1: their own) on the same days.

    None: there are no such days, and nothing is observed from the cut on. `changed` maps the values (A, U) of the days
    from the cut on.
    """
    index = np.arange(len(rows))
    begin, end = rows.span(index, EARLIEST, cut_B)
    if other_B is None:
        ahead, stop = end, end
    else:
        ahead, stop = rows.span(np.where(other_B >= 0, other_B, index), cut_B, LATEST)
    which, active = expand(np.stack([begin, ahead], axis=1).ravel(), np.stack([end, stop], axis=1).ravel())
    values = rows.values[active]
    if changed is not None:
        later = which % 2 == 1
        values[later] = changed(values[later])
    lengths = np.bincount(which // 2, minlength=len(rows))
    return replace(
        rows,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        days=rows.days[active],
        values=values,
        end_day=np.minimum(rows.end_day, cut_B).astype(np.int32) if other_B is None else rows.end_day,
    )


def differing(one: Arrays, other: Arrays) -> list[str]:
    """Names of the arrays that are not equal bit for bit, or that only one of the two has."""
    return sorted(
        name for name in {*one, *other} if name not in one or name not in other or not _same(one[name], other[name])
    )


def _same(one: np.ndarray[tuple[int, ...], np.dtype[np.generic]], other: object) -> bool:
    return np.array_equal(one, np.asarray(other), equal_nan=one.dtype.kind == "f")


def _nothing(rows: Rows, samples: Samples) -> Arrays:
    return {}
