"""Semantic IDs: hand-made trees, what a path may depend on, and what building must survive."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lum_ray.artifacts import UserError
from lum_ray.gts import spectral
from lum_ray.gts.semantic_ids import Tree, build_tree, collision_digits, encode, random_tree
from lum_ray.gts.tree_quality import adjusted_rand


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    """A warning of scikit-learn or SciPy is a case that was not handled."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def groups(sizes: list[list[int]], width: int = 32, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Items of two-level groups, and their (group, subgroup) as one number each."""
    generator = np.random.default_rng(7)
    items, labels = [], []
    for i, part in enumerate(sizes):
        centre = generator.standard_normal(width)
        for j, size in enumerate(part):
            place = centre + 0.6 * generator.standard_normal(width)
            items.append(place + noise * generator.standard_normal((size, width)))
            labels += [i * len(part) + j] * size
    return np.concatenate(items), np.array(labels)


def build(items: Any, branching: int = 3, depth: int = 2, **changes: Any) -> Tree:
    return build_tree(items, branching, depth, **{"neighbours": 5, "affinity": "connectivity", "seed": 0} | changes)


def same(one: Tree, other: Tree) -> bool:
    left, right = one.to_arrays(), other.to_arrays()
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("affinity", ["connectivity", "gaussian"])
def test_a_planted_hierarchy_is_found_and_children_come_by_size(affinity: str) -> None:
    items, label = groups([[10, 9, 8], [14, 13, 12], [20, 19, 18]])
    tree = build(items, affinity=affinity)
    # the third group is the largest, so its first digit is 0; its first subgroup is the largest of its own
    expected = np.array([[2 - i // 3, i % 3] for i in label])
    assert tree.paths_ND.tolist() == expected.tolist()
    assert tree.collisions == 20


def test_equal_sizes_come_by_their_first_item() -> None:
    items, label = groups([[6, 6], [6, 6]], noise=0.1)
    order = np.random.default_rng(1).permutation(len(items))
    tree = build(items[order], branching=2)
    first = [int(np.flatnonzero(label[order] // 2 == i)[0]) for i in (0, 1)]
    digit = tree.paths_ND[first, 0].tolist()
    assert digit == ([0, 1] if first[0] < first[1] else [1, 0])


def test_fewer_items_than_children_get_one_each() -> None:
    items = np.eye(4)[[0, 1, 2]]
    tree = build(items, branching=8, depth=3)
    assert tree.paths_ND.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert tree.collision_N.tolist() == [0, 0, 0]
    assert tree.assign(5 * items[::-1]).tolist() == tree.paths_ND[::-1].tolist()


def test_a_catalogue_of_one() -> None:
    tree = build([[3.0, 4.0]])
    assert tree.paths_ND.tolist() == [[0, 0]]
    np.testing.assert_allclose(tree.centroids_CE, [[0.6, 0.8]], atol=1e-7)
    assert tree.assign([[-1.0, 0.0]]).tolist() == [[0, 0]]


def test_equal_embeddings_share_a_leaf_and_count_in_catalogue_order() -> None:
    items, _ = groups([[8, 8, 8]] * 3)
    twice = np.concatenate([items, 2 * items[:30], items[:1], items[:1]])  # length says nothing
    tree = build(twice)
    assert (tree.paths_ND[72:102] == tree.paths_ND[:30]).all()
    assert (tree.collision_N[72:102] > tree.collision_N[:30]).all()
    assert len(np.unique(build(np.ones((50, 4))).paths_ND, axis=0)) == 1
    assert build(np.ones((50, 4))).collision_N.tolist() == list(range(50))
    # copies make a node larger, but are no points of the graph: the same leaves
    assert adjusted_rand(tree.leaves[:72], build(items).leaves) == 1.0


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 60), st.integers(2, 6), st.integers(1, 3), st.sampled_from(["connectivity", "gaussian"]),
    st.integers(1, 12), st.integers(0, 99), st.booleans(),
)  # fmt: skip
def test_any_catalogue_gets_ids_that_are_unique_and_read_back(
    count: int, branching: int, depth: int, affinity: str, neighbours: int, seed: int, coarse: bool
) -> None:
    items = np.random.default_rng(seed).standard_normal((count, 3))
    items = np.sign(items) if coarse else items  # at most 8 distinct ones
    tree = build(items, branching, depth, affinity=affinity, neighbours=neighbours, seed=seed)
    assert tree.paths_ND.min() >= 0
    assert tree.paths_ND.max() < branching
    assert tree.find(tree.paths_ND, tree.collision_N).tolist() == list(range(count))
    assert same(tree, build(items, branching, depth, affinity=affinity, neighbours=neighbours, seed=seed))
    distinct = len(np.unique(items, axis=0))
    if distinct <= branching:
        assert len(np.unique(tree.paths_ND, axis=0)) == distinct


def test_a_graph_in_pieces_is_clustered_by_how_the_pieces_lie() -> None:
    # 12 clumps far tighter than their distances, in 3 groups: no kNN graph joins them
    items, label = groups([[40] * 4] * 3, width=64, noise=0.001)
    graph = spectral.knn_graph(items.astype(np.float32), 5, "connectivity")
    assert spectral.connected(graph)[0] == 12
    tree = build(items, branching=3, depth=1)
    assert adjusted_rand(label // 4, tree.leaves) == 1.0


def test_fewer_pieces_than_children_are_joined_at_their_closest_rows() -> None:
    angle = np.radians([0, 1, 2, 40, 41, 42, 100, 101, 102])
    items = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    graph = spectral.knn_graph(items, 2, "connectivity")
    count, piece = spectral.connected(graph)
    assert count == 3
    joined = spectral.joined(graph, items, piece)
    added = np.argwhere((joined - graph).toarray() > 0)
    assert sorted(map(tuple, added.tolist())) == [(2, 3), (3, 2), (5, 6), (6, 5)]


def test_the_form_for_large_graphs_cuts_as_scikit_learn_does() -> None:
    from sklearn.cluster import SpectralClustering

    items = np.random.default_rng(0).standard_normal((400, 5)).astype(np.float32)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    graph = spectral.knn_graph(items, 12, "gaussian")
    peer = SpectralClustering(
        6, affinity="precomputed", eigen_solver="arpack", assign_labels="cluster_qr", random_state=0
    )
    assert adjusted_rand(spectral.cluster_large(graph, 6, 0), peer.fit_predict(graph)) == 1.0


def test_landmarks_find_what_all_items_would() -> None:
    items, label = groups([[150, 140, 130]] * 3, noise=0.4)
    tree = build(items, landmarks_above=500, landmarks=200, refinements=0)
    assert adjusted_rand(label, tree.leaves) > 0.99
    noise = np.random.default_rng(0).standard_normal((600, 6))
    few = {"landmarks_above": 500, "landmarks": 100, "refinements": 0}
    assert same(build(noise, **few), build(noise, **few))
    assert not same(build(noise, **few), build(noise, **few, seed=1))  # other landmarks


def test_neighbours_follow_the_nodes_size() -> None:
    assert spectral.graph_neighbours(80, 8, 10) == 10
    assert spectral.graph_neighbours(31, 8, 10) == 3  # an average child, no more
    assert spectral.graph_neighbours(9, 8, 10) == 2
    assert spectral.graph_neighbours(800, 8, 10) == 50  # half a child
    assert spectral.graph_neighbours(20_000, 8, 10) == 250  # as the edges allow
    assert spectral.graph_neighbours(3, 2, 10) == 2


def test_new_items_take_the_nearest_child_and_leave_old_ids_alone() -> None:
    items, _ = groups([[10, 9, 8], [14, 13, 12], [20, 19, 18]])
    tree = build(items)
    new = items[::5] * 3 + 1e-4
    grown = tree.with_items(new)
    assert (grown.paths_ND[: len(tree)] == tree.paths_ND).all()
    assert (grown.collision_N[: len(tree)] == tree.collision_N).all()
    assert (grown.paths_ND[len(tree) :] == tree.paths_ND[::5]).all()
    assert grown.collision_N[len(tree)] == 10  # the first item's subgroup had 0..9
    assert grown.find(grown.paths_ND, grown.collision_N).tolist() == list(range(len(grown)))
    assert grown.with_items(np.empty((0, 32))).collision_N.tolist() == grown.collision_N.tolist()


def test_refinement_makes_assignment_agree_with_the_fit() -> None:
    items = np.random.default_rng(0).standard_normal((400, 6))
    agree = [
        (build(items, 4, 2, refinements=steps).assign(items) == build(items, 4, 2, refinements=steps).paths_ND).mean()
        for steps in (0, 50)
    ]
    assert agree[1] == 1.0
    assert agree[0] < 0.95


def test_reading_by_prefix_and_by_full_id() -> None:
    items, label = groups([[10, 9, 8], [14, 13, 12], [20, 19, 18]])
    tree = build(items)
    assert sorted(tree.items((0,)).tolist()) == np.flatnonzero(label // 3 == 2).tolist()
    assert tree.items((2, 1)).tolist() == np.flatnonzero(label == 1).tolist()
    assert len(tree.items(())) == len(tree)
    ids = np.array([[0, 0], [0, 0], [2, 2], [0, 3], [0, 0]])
    assert tree.find(ids, np.array([0, 20, 7, 0, -1])).tolist() == [int(np.flatnonzero(label == 6)[0]), -1, 26, -1, -1]


def test_arrays_survive_safetensors(tmp_path: Path) -> None:
    tree = build(groups([[8, 8, 8]] * 3)[0])
    for case in (tree, random_tree(9, 4, 2, 0)):
        save_file(case.to_arrays(), tmp_path / "tree.safetensors")
        again = Tree.from_arrays(load_file(tmp_path / "tree.safetensors"))
        assert same(case, again)
        assert (again.branching, again.depth) == (case.branching, case.depth)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(2, 9), st.integers(1, 4), st.integers(0, 9))
def test_random_ids_are_even_on_every_level(count: int, branching: int, depth: int, seed: int) -> None:
    tree = random_tree(count, branching, depth, seed)
    for level in range(1, depth + 1):
        sizes = np.bincount(encode(tree.paths_ND[:, :level], branching), minlength=branching**level)
        assert sizes.max() - sizes.min() <= 1
    assert tree.find(tree.paths_ND, tree.collision_N).tolist() == list(range(count))


def test_random_ids_take_new_items_evenly_and_by_their_embedding_alone() -> None:
    tree = random_tree(64, 4, 2, 0)
    items = np.random.default_rng(0).standard_normal((1600, 8))
    paths = tree.assign(items)
    assert (tree.assign(items[:9] * 2) == paths[:9]).all()
    assert np.bincount(encode(paths, 4), minlength=16).min() > 60  # 100 expected, 4 standard deviations


def test_collision_digits_by_hand() -> None:
    assert collision_digits(np.array([5, 2, 5, 5, 2, 9])).tolist() == [0, 0, 1, 2, 1, 0]


def test_rows_without_a_direction_are_named() -> None:
    items = np.ones((9, 3))
    items[4], items[7, 1] = 0, np.nan
    with pytest.raises(UserError, match=r"got 2 without.*: 4 \(zeros\), 7 \(NaN or infinite\)"):
        build(items)
    items[:] = np.inf
    with pytest.raises(UserError, match=r"got 9 without.* 4 \(NaN or infinite\);"):  # five are shown
        build(items)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branching": 1}, "branching 1"),
        ({"depth": 0}, "depth 0"),
        ({"branching": 2**21, "depth": 3}, "fewer than 2\\^62"),
        ({"neighbours": 0}, "neighbours 0"),
        ({"affinity": "rbf"}, "got 'rbf'"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(np.eye(3), **change)


def test_what_is_no_table_of_embeddings_is_refused() -> None:
    with pytest.raises(UserError, match="got none"):
        build(np.empty((0, 3)))
    with pytest.raises(UserError, match=r"shape \(3,\)"):
        build(np.ones(3))
    with pytest.raises(UserError, match="expected the width 3 of the tree, got 2"):
        build(np.eye(3)).assign(np.eye(2))
