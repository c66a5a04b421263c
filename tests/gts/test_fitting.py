"""What is fitted before the cut, by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lum_ray.artifacts import UserError
from lum_ray.gts.fitting import fit_profiles, fit_tree, statistics
from tests.gts.world import inputs_of, rows_of, tiny_config

HOUR = 3_600_000_000


def test_counts_and_pairs_of_instants_before_the_cut() -> None:
    inputs = inputs_of()
    rows = rows_of(inputs, users=2)
    hashes = inputs.arrays["hash_N"]
    # user 0: {3, 1} at once, 3 an hour later, then 1 and an unknown item at once, {3, 1} at the cut; user 1: {1, 3}
    item = [hashes[3], hashes[1], hashes[3], hashes[1], 12345, hashes[3], hashes[1], hashes[1], hashes[3]]
    time = [0, 0, 1, 2, 2, 48, 48, 0, 0]
    day = [10, 10, 10, 10, 10, 12, 12, 10, 10]
    values = np.stack([np.array(item), np.array(time) * HOUR, np.zeros(9, np.int64)], axis=1).astype(np.int64)
    made = dataclasses.replace(rows, offsets=np.array([0, 7, 9]), days=np.array(day, np.int32), values=values)
    found = statistics([made], inputs.index_of, inputs.count, 12)
    assert found.count_N[[1, 3]].tolist() == [3, 3] and found.count_N.sum() == 6
    assert found.edges_M2.tolist() == [[1, 3]] and found.weights_M.tolist() == [2.0]
    halves = [made.take(np.array([0])), made.take(np.array([1]))]
    again = statistics(halves, inputs.index_of, inputs.count, 12)
    assert np.array_equal(again.count_N, found.count_N) and again.weights_M.tolist() == [2.0]
    with pytest.raises(UserError, match="no event of a known item lies before day 10"):
        statistics([made], inputs.index_of, inputs.count, 10)


def test_an_item_that_came_later_is_assigned_and_moves_nothing() -> None:
    config = tiny_config()
    text = inputs_of(40).arrays["text_NE"]
    known = np.ones(40, np.bool_)
    known[[0, 17]] = False
    tree = fit_tree(config, text, known, 0)
    alone = fit_tree(config, text[known], known[known], 0)
    assert np.array_equal(tree.paths_ND[known], alone.paths_ND)
    assert np.array_equal(tree.collision_N[known], alone.collision_N)
    assert np.array_equal(tree.paths_ND[[0, 17]], alone.assign(text[[0, 17]]))


def test_profiles_of_users_who_were_there_before_the_cut() -> None:
    rows = rows_of(inputs_of(), users=3)
    made = dataclasses.replace(
        rows,
        first_day=np.array([1, 2, 50], np.int32),
        profile={"age": np.array([20.0, 40.0, 999.0]), "city": np.array(["a", None, "later"], np.object_)},
    )
    found = fit_profiles([made], ("age",), ("city",), 50)
    assert found["scale"].tolist() == [[30.0, 10.0]] and found["values"] == (("a",),)
