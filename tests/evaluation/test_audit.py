"""Verdicts over plain numbers, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lum_ray.evaluation import audit

USERS = np.arange(100)


def test_what_changed_is_leaky_and_what_cannot_change_is_not_judged() -> None:
    assert audit.unchanged("a", "b", 0.0, 1.0).verdict == "ok"
    assert audit.unchanged("a", "b", 1e-12, 1.0).verdict == "LEAKY"
    assert audit.unchanged("a", "b", 1e-12, 1.0, 1e-5).verdict == "ok"
    assert audit.unchanged("a", "b", math.nan, 1.0).verdict == "LEAKY"
    assert audit.unchanged("a", "b", 0.0, 0.0).verdict == "not applicable"  # without power


def test_largest_change_by_hand() -> None:
    one = np.array([1.0, np.nan, np.inf, 3.0])
    assert audit.largest_change(one, one) == 0
    assert audit.largest_change(one, np.array([1.0, np.nan, np.inf, 2.5])) == 0.5
    assert audit.largest_change(one, np.array([1.0, 0.0, np.inf, 3.0])) == math.inf
    assert audit.largest_change(one, np.array([1.0, np.nan, -np.inf, 3.0])) == math.inf
    assert audit.largest_change(one, one[:2]) == math.inf


def test_a_gain_is_leaky_only_beyond_its_interval_over_users() -> None:
    popular = (np.arange(100) % 10 == 0).astype(float)
    assert audit.no_gain("a", "b", "R@10", np.ones(100), popular, USERS).verdict == "LEAKY"
    assert audit.no_gain("a", "b", "R@10", np.roll(popular, 1), popular, USERS).verdict == "ok"
    assert audit.no_gain("a", "b", "R@10", np.zeros(100), popular, USERS).verdict == "ok"
    some = popular.copy()
    some[1] = 1.0  # one basket more of a hundred may be chance
    found = audit.no_gain("a", "b", "R@10", some, popular, USERS)
    assert found.verdict == "ok" and found.values["gain"] == pytest.approx(0.01)
    # fifty baskets of one user are one draw, not fifty
    half = np.where(np.arange(100) < 50, 1.0, popular)
    assert audit.no_gain("a", "b", "R@10", half, popular, USERS).verdict == "LEAKY"
    assert audit.no_gain("a", "b", "R@10", half, popular, np.maximum(USERS, 50)).verdict == "ok"
    assert audit.no_gain("a", "b", "R@10", np.full(100, np.nan), popular, USERS).verdict == "not applicable"


def test_p_leaks_if_it_gains_without_the_history_and_knows_more_than_popularity() -> None:
    none, some, most = np.zeros(100), (np.arange(100) % 3 == 0).astype(float), np.ones(100)
    own = (some, most)
    vanished = audit.no_rerank_gain("a", "b", "NDCG@10", own, (none, none), some, USERS)
    assert vanished.verdict == "ok" and vanished.values["own_gain_low"] > 0 == vanished.values["shuffled_gain"]
    assert audit.no_rerank_gain("a", "b", "NDCG@10", own, (none, most), some, USERS).verdict == "LEAKY"
    # a weak R that P lifts to popularity is no leak
    assert audit.no_rerank_gain("a", "b", "NDCG@10", own, (none, some), some, USERS).verdict == "ok"


def test_skill_in_a_world_without_signal() -> None:
    y = np.tile([0.0, 1.0], 200)
    rng = np.random.default_rng(0)
    user = np.arange(400) // 4
    assert audit.no_skill("a", "b", y, rng.random(400), user).verdict == "ok"
    assert audit.no_skill("a", "b", y, y + rng.normal(0, 2, 400), user).verdict == "LEAKY"
    assert audit.no_skill("a", "b", np.zeros(400), y, user).verdict == "not applicable"


def test_shares_names_and_the_file() -> None:
    assert audit.kept_share("a", "b", 49, 100).verdict == "ok"
    assert audit.kept_share("a", "b", 50, 100).verdict == "LEAKY"
    assert audit.kept_share("a", "b", 0, 0).verdict == "not applicable"
    wrong = audit.identical("tree", "b", [f"x{i}" for i in range(9)], 12)
    assert wrong.verdict == "LEAKY" and "x4, ..." in wrong.figure and "x5" not in wrong.figure
    checks = [audit.identical("fine", "b", [], 3), wrong, audit.unchanged("swap", "b", math.inf, 1.0)]
    assert audit.leaky(checks) == ["tree", "swap"]
    again = audit.from_plain(audit.to_plain(checks))
    assert again[:2] == checks[:2] and math.isnan(again[2].values["change"])
