"""The questions of reading R in a batch: after which group of which sample, what is the positive, what is masked.

Legend: T targets (one a (sample, group, item)), R queries (one a (sample, group)), X masked pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lum_ray.data.rows import Samples, UInt64, mix

Int64 = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]
POSITIVE_SALT = 11


@dataclass(frozen=True)
class Queries:
    """R queries by (sample, group), ascending; `targets` of query r are items[offsets[r] : offsets[r + 1]]."""

    sample: Int64
    group: Int64
    offsets: Int64
    items: Int64
    positive: Int64

    @staticmethod
    def of(rows_T: Int64, groups_T: Int64, items_T: Int64, seed: int, users_B: UInt64, samples: Samples) -> Queries:
        """The queries behind the targets; each takes one of its targets as its positive, by hash(user, cut, draw,
        group): over the draws of an epoch every target has its turn."""
        order = np.lexsort((items_T, groups_T, rows_T))
        rows_T, groups_T, items_T = rows_T[order], groups_T[order], items_T[order]
        new = np.ones(len(rows_T), np.bool_)
        new[1:] = (rows_T[1:] != rows_T[:-1]) | (groups_T[1:] != groups_T[:-1])
        starts = np.flatnonzero(new)
        offsets = np.append(starts, len(rows_T)).astype(np.int64)
        sample, group = rows_T[starts], groups_T[starts]
        drawn = mix(
            seed, POSITIVE_SALT, users_B[sample], samples.cut[sample], samples.draw[sample], group, samples.step
        )
        width = np.diff(offsets).astype(np.uint64)
        positive = items_T[offsets[:-1] + (drawn % np.maximum(width, np.uint64(1))).astype(np.int64)]
        return Queries(sample, group, offsets, items_T, positive.astype(np.int64))

    def find(self, sample_S: Int64, group_S: Int64) -> Int64:
        """The query of each (sample, group), -1 where there is none."""
        if not len(self.sample):
            return np.full(len(sample_S), -1, np.int64)
        wide = int(max(self.group.max(initial=0), group_S.max(initial=0))) + 2
        keys, wanted = self.sample * wide + self.group + 1, sample_S * wide + group_S + 1
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[place] == wanted, place, -1).astype(np.int64)

    def masked(self, candidate_items: Int64) -> Arrays:
        """The pairs (query, column 1 + c) whose candidate is one of the query's targets, the positive included: a
        true duplicate, by its id, is no negative."""
        query = np.repeat(np.arange(len(self.sample)), np.diff(self.offsets))
        column = np.minimum(np.searchsorted(candidate_items, self.items), len(candidate_items) - 1)
        hit = candidate_items[column] == self.items
        return {"masked_query_X": query[hit].astype(np.int64), "masked_column_X": (1 + column[hit]).astype(np.int64)}


def unique_places(parts: Sequence[Int64]) -> tuple[Int64, Callable[[Int64], Int64]]:
    """The distinct items of all parts (negative ones are none), and where in them an item is."""
    found = np.unique(np.concatenate([part.ravel() for part in parts]))
    found = found[found >= 0].astype(np.int64)
    if not len(found):
        found = np.zeros(1, np.int64)  # an empty batch still needs one row to index

    def places(items: Int64) -> Int64:
        return np.minimum(np.searchsorted(found, items), len(found) - 1).astype(np.int64)

    return found, places


def end_tokens(group_BL: Int64, queries: Queries) -> Int64:
    """The position of the last token of each query's group (R,), -1 for a history without any (group -1)."""
    ends = np.full(len(queries.sample), -1, np.int64)
    if len(ends):
        same = group_BL[queries.sample] == queries.group[:, None]
        length = group_BL.shape[1]
        ends = np.where(same.any(axis=1) & (queries.group >= 0), length - 1 - same[:, ::-1].argmax(axis=1), -1)
    return ends.astype(np.int64)
