"""Figures about an ID tree: collisions, balance, stability, and whether it says more than random IDs of the same sizes.

Random IDs are the tree's own labels handed out to the items in random order. The interval of RANDOM = 39 such trees is
their smallest and largest figure: one more of them falls outside with probability 2 / 40 = 5 %.

Shapes: N items, E embedding width, M co-occurring pairs, Q items whose neighbours are looked at, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lum_ray.artifacts import UserError
from lum_ray.data.rows import Int64
from lum_ray.gts.semantic_ids import Tree, encode, unit_rows

Float64 = npt.NDArray[np.float64]
Refit = Callable[[npt.NDArray[Any], int], Tree]
"""(embeddings, seed) -> tree, with the settings of the tree that is judged."""
RANDOM = 39
LEFT_OUT = 0.1
NEIGHBOURS = 10
QUERIES = 2_000


def quality(
    tree: Tree,
    embeddings_NE: npt.ArrayLike,
    edges_M2: Int64 | None = None,
    weights_M: npt.ArrayLike | None = None,
    *,
    node2vec: tuple[npt.ArrayLike, npt.NDArray[np.bool_]] | None = None,
    refit: Refit | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What to know of `tree`, whose items have the (text) embeddings (N, E); a dict that is plain JSON.

    `items`, `leaves`; `colliding_share` of items that share their leaf, `largest_leaf`; `balance`: entropy of the
    first level's sizes over log(branching); `effective_leaves`: exp(entropy of the leaves' sizes); `assigned_share` of
    items to whom `assign` gives the path that they have.
    With `refit`: `stability`, the adjusted Rand index of the first level and of the leaves, under another seed
    (`seed`), with 10 % of items left out, on the items kept (`left_out`), and on those left out, who were assigned
    (`assigned`).
    `against_random`: by evidence, then `level_1` and `leaf`: {value, random, low, high}. Evidence: `embedding`, the
    share of each item's NEIGHBOURS nearest neighbours that share its cluster, of up to QUERIES items;
    `co_occurrence`, the share of the weight of item pairs (`edges_M2`; `weights_M`, 1 by default) that lies within one
    cluster; `node2vec`, as `embedding` but in another space `(vectors_NF, known_N)`, of known items only.
    `warning`: which evidence is not above random IDs at any level that could tell, or None.

    Raises UserError for shapes that do not match the tree.
    """
    x_NE = unit_rows(embeddings_NE)
    if len(x_NE) != len(tree):
        raise UserError(f"tree quality: expected embeddings of the tree's {len(tree)} items, got {len(x_NE)}")
    leaf_sizes = np.unique(tree.leaves, return_counts=True)[1]
    first_sizes = np.unique(tree.paths_ND[:, 0], return_counts=True)[1]
    result: dict[str, Any] = {
        "items": len(tree),
        "leaves": len(leaf_sizes),
        "colliding_share": float(leaf_sizes[leaf_sizes > 1].sum() / len(tree)),
        "largest_leaf": int(leaf_sizes.max()),
        "balance": entropy(first_sizes) / float(np.log(tree.branching)),
        "effective_leaves": float(np.exp(entropy(leaf_sizes))),
        "assigned_share": float((tree.assign(x_NE) == tree.paths_ND).all(axis=1).mean()),
    }
    if refit is not None:
        result["stability"] = stability(tree, x_NE, refit, seed)
    evidence: dict[str, tuple[Int64, Float64]] = {}
    if len(tree) > 1:
        evidence["embedding"] = neighbour_pairs(x_NE, np.arange(len(tree)), seed)
    if edges_M2 is not None:
        evidence["co_occurrence"] = _checked_pairs(edges_M2, weights_M, len(tree))
    if node2vec is not None:
        vectors_NF, known_N = np.asarray(node2vec[0]), np.asarray(node2vec[1])
        if len(vectors_NF) != len(tree) or known_N.shape != (len(tree),):
            raise UserError(
                f"tree quality: expected node2vec vectors and `known` of the tree's {len(tree)} items, got shapes "
                f"{vectors_NF.shape} and {known_N.shape}"
            )
        known = np.flatnonzero(known_N)
        if len(known) > 1:
            evidence["node2vec"] = neighbour_pairs(unit_rows(vectors_NF[known]), known, seed)
    result["against_random"] = {
        name: against_random(tree, *pairs, seed) for name, pairs in evidence.items() if len(pairs[0])
    }
    result["warning"] = _warning(result["against_random"])
    return result


def entropy(sizes: npt.NDArray[np.integer[Any]]) -> float:
    """Of the distribution of items over clusters of these sizes (all above 0), in nats."""
    share = sizes / sizes.sum()
    return float(-(share * np.log(share)).sum())


def adjusted_rand(one_N: Int64, other_N: Int64) -> float:
    """The adjusted Rand index of two labellings: 1 for the same partition, 0 on average for random ones of these sizes.
    Two partitions into one cluster, or into single items, are the same: 1. Source: Hubert and Arabie 1985."""
    one = np.unique(one_N, return_inverse=True)[1].astype(np.int64)
    other = np.unique(other_N, return_inverse=True)[1].astype(np.int64)

    def pairs(label_N: Int64) -> float:
        count = np.unique(label_N, return_counts=True)[1].astype(np.float64)
        return float((count * (count - 1) / 2).sum())

    both, in_one, in_other = pairs(one * (int(other.max()) + 1) + other), pairs(one), pairs(other)
    total = len(one) * (len(one) - 1) / 2
    chance = in_one * in_other / max(total, 1)
    most = (in_one + in_other) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def stability(tree: Tree, x_NE: npt.NDArray[Any], refit: Refit, seed: int) -> dict[str, dict[str, float]]:
    """See `quality`."""
    generator = np.random.default_rng(seed)
    out = np.sort(generator.permutation(len(tree))[: round(LEFT_OUT * len(tree))])
    kept = np.setdiff1d(np.arange(len(tree)), out)
    other_seed = int(generator.integers(1, 2**31))
    smaller = refit(x_NE[kept], other_seed)
    compared = {
        "seed": (tree.paths_ND, refit(x_NE, other_seed).paths_ND),
        "left_out": (tree.paths_ND[kept], smaller.paths_ND),
        "assigned": (tree.paths_ND[out], smaller.assign(x_NE[out])),
    }
    return {
        name: {
            level: adjusted_rand(encode(one[:, :upto], tree.branching), encode(other[:, :upto], tree.branching))
            for level, upto in (("level_1", 1), ("leaf", tree.depth))
        }
        for name, (one, other) in compared.items()
        if len(one)
    }


def neighbour_pairs(x_KE: npt.NDArray[np.float32], item_K: Int64, seed: int) -> tuple[Int64, Float64]:
    """Pairs (item, one of its nearest others by cosine) of up to QUERIES of K items, and weights that sum to 1.

    Of equal texts, an item's own copy is as near as any: the copies count as neighbours of each other.
    """
    queries = np.sort(np.random.default_rng(seed).permutation(len(item_K))[:QUERIES])
    count = min(NEIGHBOURS, len(item_K) - 1)
    pairs = []
    for chunk in np.array_split(queries, -(-len(queries) // 128)):
        cosine = x_KE[chunk] @ x_KE.T
        cosine[np.arange(len(chunk)), chunk] = -np.inf
        nearest = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
        pairs.append(np.stack([np.repeat(item_K[chunk], count), item_K[nearest.ravel()]], axis=1))
    edges_M2 = np.concatenate(pairs)
    return edges_M2, np.full(len(edges_M2), 1 / len(edges_M2))


def against_random(tree: Tree, edges_M2: Int64, weight_M: Float64, seed: int) -> dict[str, dict[str, float]]:
    """The weighted share of pairs within one cluster, by level, beside its mean and 95 % interval over random IDs."""
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(tree)) for _ in range(RANDOM)]
    result = {}
    for level, label_N in (("level_1", tree.paths_ND[:, 0]), ("leaf", tree.leaves)):
        random = [_within(label_N[order], edges_M2, weight_M) for order in orders]
        value = _within(label_N, edges_M2, weight_M)
        result[level] = {"value": value, "random": float(np.mean(random)), "low": min(random), "high": max(random)}
    return result


def _within(label_N: Int64, edges_M2: Int64, weight_M: Float64) -> float:
    return float(weight_M[label_N[edges_M2[:, 0]] == label_N[edges_M2[:, 1]]].sum())


def _checked_pairs(edges_M2: Int64, weights_M: npt.ArrayLike | None, count: int) -> tuple[Int64, Float64]:
    """Pairs of two different items, with weights that sum to 1."""
    edges = np.asarray(edges_M2, np.int64)
    weight = np.ones(len(edges)) if weights_M is None else np.asarray(weights_M, np.float64)
    if edges.ndim != 2 or edges.shape[1] != 2 or weight.shape != (len(edges),):
        raise UserError(
            f"tree quality: expected co-occurrence as pairs (M, 2) and weights (M,), got {edges.shape}, {weight.shape}"
        )
    outside = np.flatnonzero(((edges < 0) | (edges >= count)).any(axis=1) | ~(weight >= 0) | ~np.isfinite(weight))
    if len(outside):
        shown = ", ".join(f"{edges[i].tolist()} ({weight[i]})" for i in outside[:5])
        raise UserError(
            f"tree quality: expected pairs of items 0..{count - 1} with weights of at least 0, got {len(outside)} "
            f"others: {shown}; the pairs must be positions in the tree's catalogue"
        )
    kept = (edges[:, 0] != edges[:, 1]) & (weight > 0)
    return edges[kept], weight[kept] / max(float(weight[kept].sum()), np.finfo(np.float64).tiny)


def _warning(evidence: dict[str, dict[str, dict[str, float]]]) -> str | None:
    poor = []
    for name, levels in evidence.items():
        telling = [figures for figures in levels.values() if figures["low"] < figures["high"]]
        if telling and not any(figures["value"] > figures["high"] for figures in telling):
            figures = levels["level_1"]
            poor.append(
                f"{name}: {figures['value']:.3f} of pairs within a first-level cluster, random IDs "
                f"{figures['low']:.3f} to {figures['high']:.3f}"
            )
    if not poor:
        return None
    return f"the ID tree says no more than random IDs about {'; '.join(poor)}. Check the items' texts and the encoder"
