"""Evaluation batches: every allowed (user, cut) exactly once over all ranks, and exact subsets of users."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from lum_ray.artifacts import UserError
from lum_ray.data.loader import Arrays, evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples, mix
from lum_ray.data.windows import CutPlan

PLAN = CutPlan(from_day=110, until_day=150, every_days=3, min_history_days=5)


def collate(rows: Rows, samples: Samples) -> Arrays:
    return {"hash": rows.user_hash[samples.row], "cut": samples.cut}


def evaluated(uri: str, world: int = 1, plan: CutPlan = PLAN, **changes: Any) -> list[list[tuple[int, int]]]:
    """(hash, cut) of each rank, in order."""
    found = []
    for rank in range(world):
        batches = list(evaluation_batches(Timelines.open(uri), plan, collate, 16, rank, world, **changes))
        for rows, samples, arrays in batches:
            assert 0 < len(samples) <= 16
            assert set(samples.row.tolist()) == set(range(len(rows)))
            assert arrays["hash"].tolist() == rows.user_hash[samples.row].tolist()
        pairs = [(arrays["hash"].tolist(), arrays["cut"].tolist()) for _, _, arrays in batches]
        found.append([pair for hashes, cuts in pairs for pair in zip(hashes, cuts, strict=True)])
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_evaluation_takes_every_allowed_cut_once(stored: str, ranks: int) -> None:
    rows = Timelines.open(stored).read(range(64))
    every = PLAN.every(rows)
    expected = list(zip(rows.user_hash[every.row].tolist(), every.cut.tolist(), strict=True))
    found = evaluated(stored, ranks)
    assert Counter(pair for rank in found for pair in rank) == Counter(expected)
    if ranks == 1:
        assert found[0] == expected


def test_evaluation_of_some_users_is_exact_stable_and_nested(stored: str) -> None:
    rows = Timelines.open(stored).read(range(64))
    barred = CutPlan(from_day=157, until_day=159, every_days=1, min_history_days=0)
    users = {}
    for count in (20, 50):
        chosen = evaluated(stored, plan=barred, max_users=count, seed=4)[0]
        spread = evaluated(stored, world=3, plan=barred, max_users=count, seed=4)
        assert sorted(pair for rank in spread for pair in rank) == sorted(chosen)
        users[count] = {key for key, _ in chosen}
        assert len(users[count]) == count
    assert users[20] < users[50]
    eligible = rows.user_hash[barred.ranges(rows)[1] > 0]
    assert users[20] == set(eligible[np.argsort(mix(4, eligible))[:20]].tolist())
    assert len({key for key, _ in evaluated(stored, plan=barred, max_users=10**6)[0]}) == len(eligible)
    assert {key for key, _ in evaluated(stored, plan=barred, max_users=20, seed=5)[0]} != users[20]


def test_more_ranks_than_lanes_are_refused(stored: str) -> None:
    batches = evaluation_batches(Timelines.open(stored), PLAN, collate, 8, 0, 65)
    with pytest.raises(UserError, match=r"at most 64 workers.*got 65"):
        next(batches)
