"""Figures about a tree: by hand where they can be, and random IDs must be told from better ones."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lum_ray.artifacts import UserError
from lum_ray.gts.semantic_ids import Tree, build_tree, collision_digits, encode, random_tree
from lum_ray.gts.tree_quality import adjusted_rand, against_random, entropy, neighbour_pairs, quality


def tree_of(paths: Any, branching: int = 2) -> Tree:
    """A tree of given paths; it cannot assign by centroids."""
    paths_ND = np.array(paths, np.int64)
    return Tree(
        branching, paths_ND.shape[1], paths_ND, collision_digits(encode(paths_ND, branching)), np.ones(1, np.int64),
        np.empty((0, 0), np.float32),
    )  # fmt: skip


def clusters(size: int = 12, width: int = 16) -> np.ndarray:  # type: ignore[type-arg]
    """4 groups of 4 groups of `size` items."""
    generator = np.random.default_rng(3)
    centres = np.repeat(generator.standard_normal((4, width)), 4, axis=0)
    centres = np.repeat(centres + 0.6 * generator.standard_normal(centres.shape), size, axis=0)
    return centres + 0.1 * generator.standard_normal(centres.shape)


def fit(items: Any, seed: int = 0) -> Tree:
    return build_tree(items, 4, 2, 5, "connectivity", seed)


def test_collisions_and_balance_by_hand() -> None:
    tree = tree_of([[0, 0], [0, 0], [0, 0], [0, 1], [1, 0], [1, 0], [1, 1], [0, 0]])
    figures = quality(tree, np.eye(8))
    assert (figures["items"], figures["leaves"], figures["largest_leaf"]) == (8, 4, 4)
    assert figures["colliding_share"] == 6 / 8
    assert figures["balance"] == pytest.approx(-(5 / 8 * np.log2(5 / 8) + 3 / 8 * np.log2(3 / 8)))
    assert figures["effective_leaves"] == pytest.approx(2 ** (4 / 8 * 1 + 2 / 8 * 2 + 2 * 1 / 8 * 3))
    assert "stability" not in figures
    assert entropy(np.array([3])) == 0


def test_co_occurrence_by_hand() -> None:
    tree = tree_of([[0, 0], [0, 0], [0, 1], [1, 0]])
    edges = np.array([[0, 1], [1, 2], [2, 3], [3, 3]])  # an item with itself says nothing
    figures = quality(tree, np.eye(4), edges, [1.0, 2.0, 5.0, 99.0])["against_random"]["co_occurrence"]
    assert figures["level_1"]["value"] == pytest.approx(3 / 8)
    assert figures["leaf"]["value"] == pytest.approx(1 / 8)
    assert quality(tree, np.eye(4), edges)["against_random"]["co_occurrence"]["leaf"]["value"] == pytest.approx(1 / 3)
    assert "co_occurrence" not in quality(tree, np.eye(4), edges[3:])["against_random"]


def test_random_ids_keep_the_sizes() -> None:
    # all pairs of 6 items in clusters of 4 and 2: 7 of 15 pairs are within one, whoever is in them
    tree = tree_of([[0]] * 4 + [[1]] * 2)
    edges = np.stack(np.triu_indices(6, 1), axis=1)
    figures = against_random(tree, edges, np.full(15, 1 / 15), 0)["leaf"]
    assert list(figures.values()) == pytest.approx([7 / 15] * 4)
    assert quality(tree, np.eye(6), edges)["against_random"]["co_occurrence"]["leaf"]["low"] == pytest.approx(7 / 15)


def test_nearest_neighbours_leave_out_the_item_itself() -> None:
    angle = np.radians(np.concatenate([np.arange(11), 180 + np.arange(11)]))
    items = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    edges, weight = neighbour_pairs(items, 100 + np.arange(22), 0)
    pairs = {tuple(pair) for pair in edges.tolist()}
    assert pairs == {(100 + i, 100 + j) for i in range(22) for j in range(22) if i != j and i // 11 == j // 11}
    assert weight.sum() == pytest.approx(1)


def test_a_good_tree_is_above_random_ids_and_random_ids_are_not() -> None:
    items = clusters()
    edges = np.stack([np.arange(192), np.arange(192) // 12 * 12 + (np.arange(192) + 5) % 12], axis=1)
    known = np.arange(192) % 12 > 0
    other = np.where(known[:, None], items[:, ::-1], 0)  # unknown rows are zeros
    good = quality(fit(items), items, edges, node2vec=(other, known))
    assert good["warning"] is None
    for figures in good["against_random"].values():
        assert figures["leaf"]["value"] > 0.9
        assert figures["leaf"]["low"] <= figures["leaf"]["random"] <= figures["leaf"]["high"] < 0.3
    poor = quality(random_tree(192, 4, 2, 1), items, edges, node2vec=(other, known))
    assert "co_occurrence: " in poor["warning"]
    assert "no more than random IDs about embedding: " in poor["warning"]
    json.dumps([good, poor], allow_nan=False)


def test_stability() -> None:
    items = clusters()
    found = quality(fit(items), items, refit=fit)["stability"]
    assert set(found) == {"seed", "left_out", "assigned"}
    assert found["seed"]["leaf"] == 1.0
    assert found["left_out"]["leaf"] > 0.9
    assert found["assigned"]["leaf"] > 0.9
    noise = quality(fit(items), items, refit=lambda x, seed: random_tree(len(x), 4, 2, seed))["stability"]
    assert abs(noise["left_out"]["leaf"]) < 0.1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=30))
def test_adjusted_rand_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import adjusted_rand_score

    one, other = np.array(pairs, np.int64).T
    assert adjusted_rand(one, other) == pytest.approx(adjusted_rand_score(one, other))


def test_the_smallest_catalogues_have_figures_and_no_warning() -> None:
    for count in (1, 2, 3):
        items = np.eye(3)[:count]
        figures = quality(fit(items), items, np.zeros((0, 2), np.int64), np.zeros(0), refit=fit)
        assert figures["warning"] is None
        json.dumps(figures, allow_nan=False)


def test_what_does_not_fit_the_tree_is_refused() -> None:
    tree = tree_of([[0, 0], [0, 1], [1, 0]])
    with pytest.raises(UserError, match="expected embeddings of the tree's 3 items, got 2"):
        quality(tree, np.eye(2))
    with pytest.raises(UserError, match=r"got 2 others: \[1, 3\] \(1.0\), \[0, 1\] \(nan\)"):
        quality(tree, np.eye(3), np.array([[1, 3], [0, 1], [0, 2]]), [1.0, np.nan, 2.0])
    with pytest.raises(UserError, match=r"got \(3, 2\), \(2,\)"):
        quality(tree, np.eye(3), np.array([[1, 3], [0, 1], [0, 2]]), [1.0, 2.0])
    with pytest.raises(UserError, match=r"shapes \(2, 3\) and \(2,\)"):
        quality(tree, np.eye(3), node2vec=(np.eye(3)[:2], np.ones(2, np.bool_)))
