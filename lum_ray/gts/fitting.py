"""What is fitted before the train cut: how often items were had and together, the graph's and the table's embeddings,
the ID tree, words and scales.

Legend: N items, M edges, E text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lum_ray.artifacts import UserError
from lum_ray.data.rows import Int64, Rows
from lum_ray.data.windows import profile_at, visible
from lum_ray.gts.align_stage import vocabulary, word_table
from lum_ray.gts.config import GtsConfig, GtsInputs
from lum_ray.gts.encoders import node2vec
from lum_ray.gts.semantic_ids import Tree, build_tree, random_tree
from lum_ray.gts.tables import FittedTable, fit_table

MAX_CATEGORIES = 10_000
SMOOTHING = 1.0
"""Instants that every item is taken to have had once more, so that none has the chance 0."""


@dataclass(frozen=True)
class Statistics:
    """Of the training users' events before the cut: `count_N` instants with each item, and how often two items shared
    an instant (`edges_M2`, the smaller index first, `weights_M`)."""

    count_N: Int64
    edges_M2: Int64
    weights_M: npt.NDArray[np.float64]


def statistics(buckets: Iterable[Rows], index_of: Callable[[Int64], Int64], count: int, until_day: int) -> Statistics:
    """See `Statistics`; one bucket is in memory at a time. Raises UserError where no event lies before `until_day`."""
    counts = np.zeros(count, np.int64)
    keys, weights = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for rows in buckets:
        row = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
        item = index_of(rows.values[:, 0])
        kept = visible(rows.days, until_day) & (item >= 0)
        row, item, instant = row[kept], item[kept], rows.values[kept, 1:]
        counts += np.bincount(item, minlength=count)
        new = np.ones(len(row), np.bool_)
        new[1:] = (row[1:] != row[:-1]) | (instant[1:] != instant[:-1]).any(axis=1)
        pairs = _pairs(item, np.append(np.flatnonzero(new), len(row)), count)
        keys, index = np.unique(np.concatenate([keys, pairs]), return_inverse=True)
        added = np.concatenate([weights, np.ones(len(pairs), np.int64)])
        weights = np.bincount(index, added, minlength=len(keys)).astype(np.int64)
    if not counts.any():
        raise UserError(
            f"no event of a known item lies before day {until_day}, where training must end; check `split` and "
            "`data.items` against the data"
        )
    return Statistics(counts, np.stack([keys // count, keys % count], axis=1), weights.astype(np.float64))


def _pairs(item: Int64, starts: Int64, count: int) -> Int64:
    """smaller * count + larger for every two items of an instant; instants of one size are done at once."""
    found = [np.zeros(0, np.int64)]
    sizes = np.diff(starts)
    for size in np.unique(sizes[sizes > 1]).tolist():
        members = item[starts[:-1][sizes == size][:, None] + np.arange(size)]
        one, two = np.triu_indices(size, 1)
        a, b = members[:, one].ravel(), members[:, two].ravel()
        found.append(np.minimum(a, b) * count + np.maximum(a, b))
    return np.concatenate(found)


def fit_tree(config: GtsConfig, text_NE: npt.NDArray[np.float32], known_N: npt.NDArray[np.bool_], seed: int) -> Tree:
    """The ID tree of the items that were had before the cut; the others are assigned to it. In catalogue order."""
    first = np.flatnonzero(known_N)
    if config.ids == "random":
        return random_tree(len(text_NE), config.branching, config.depth, seed)
    tree = build_tree(text_NE[first], config.branching, config.depth, config.neighbours, config.affinity, seed)
    later = np.flatnonzero(~known_N)
    if len(later):
        tree = tree.with_items(text_NE[later])
    order = np.argsort(np.concatenate([first, later]))
    return replace(tree, paths_ND=tree.paths_ND[order], collision_N=tree.collision_N[order])


def fit_inputs(
    config: GtsConfig,
    items: Sequence[str],
    texts: Sequence[str],
    hash_N: Int64,
    numbers: Mapping[str, npt.NDArray[np.float64]],
    categories: Mapping[str, npt.NDArray[np.object_]],
    text_NE: npt.NDArray[np.float32],
    tree: Tree,
    found: Statistics,
    edges: tuple[Int64, npt.NDArray[np.float64]],
    profiles: Mapping[str, Any],
    holidays: Int64,
    seed: int,
) -> tuple[GtsInputs, FittedTable]:
    """Everything that the model must know of the data, and the encoder of the items table, which new items need.
    `edges`: the graph; `profiles`: what `fit_profiles` gave."""
    count = len(items)
    graph, known = node2vec(*edges, count, width=config.graph_width, seed=seed)
    had = np.flatnonzero(found.count_N)  # what only came later shapes nothing
    known_numbers = {name: column[had] for name, column in numbers.items()}
    known_categories = {name: column[had] for name, column in categories.items()}
    encoder = fit_table(known_numbers, known_categories, width=config.table_width, seed=seed)
    table = encoder.rows(numbers, categories) if encoder.width else np.zeros((count, 0), np.float32)
    known_words = vocabulary([texts[item] for item in had.tolist()])
    share_N = (found.count_N + SMOOTHING) / (found.count_N + SMOOTHING).sum()
    inputs = GtsInputs(
        items=tuple(items),
        vocabulary=known_words,
        profile_numbers=profiles["numbers"],
        profile_categories=profiles["categories"],
        profile_values=profiles["values"],
        arrays={
            "hash_N": hash_N,
            "text_NE": text_NE,
            "graph_NG": graph,
            "graph_known_N": known,
            "table_NH": table,
            "paths_ND": tree.paths_ND,
            "collision_N": tree.collision_N,
            "count_N": found.count_N,
            "log_q_N": np.log(share_N).astype(np.float32),
            "words_NT": word_table(texts, known_words, config.text_tokens),
            "profile_scale": profiles["scale"],
            "holidays": holidays,
        },
    )
    return inputs, encoder


def fit_profiles(
    buckets: Iterable[Rows], numbers: Sequence[str], categories: Sequence[str], until_day: int
) -> dict[str, Any]:
    """Mean and deviation of the users' numbers, and the values of their categories, of those known before the cut."""
    moments = np.zeros((len(numbers), 3))
    values: list[set[str]] = [set() for _ in categories]
    for rows in buckets:
        known = visible(rows.first_day, until_day)
        profile = profile_at(rows, np.flatnonzero(known), until_day)
        for index, name in enumerate(numbers):
            column = profile[name].astype(np.float64)
            column = column[np.isfinite(column)]
            moments[index] += [len(column), column.sum(), (column**2).sum()]
        for index, name in enumerate(categories):
            values[index].update(str(value) for value in profile[name].tolist() if value is not None)
    large = [f"{name} ({len(v)})" for name, v in zip(categories, values, strict=True) if len(v) > MAX_CATEGORIES]
    if large:
        raise UserError(
            f"data.profiles.categories: expected at most {MAX_CATEGORIES} values, got {', '.join(large[:5])}; "
            "leave them out"
        )
    mean = moments[:, 1] / np.maximum(moments[:, 0], 1)
    deviation = np.sqrt(np.maximum(moments[:, 2] / np.maximum(moments[:, 0], 1) - mean**2, 0))
    return {
        "numbers": tuple(numbers),
        "categories": tuple(categories),
        "values": tuple(tuple(sorted(v)) for v in values),
        "scale": np.stack([mean, np.where(deviation > 0, deviation, 1.0)], axis=1),
    }
