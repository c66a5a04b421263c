"""Semantic IDs: a tree over the items' text embeddings, a digit per level, and one that tells colliding items apart.

Source: GTS-LUM, semantic IDs: kNN graph of the text embeddings, hierarchical spectral clustering, the ID is the path.

Choices:
- A path depends on the embedding alone: items with equal embeddings (equal texts) are one point to the clustering and
  share a leaf, where the collision digit tells them apart.
- `Departs:` a node's clusters are moved towards the cells of their means for a few steps, so that `assign` gives items
  like old ones the paths of the old ones. Of Complete Journey's product types (TF-IDF of their texts, branching 8),
  `assign` agrees with .99 of the paths instead of .76, and .65 of nearest neighbours share a leaf instead of .49;
  the price is a larger largest leaf.
- Everything runs in one thread: sums in another order would move items on the border between two children.

Shapes: N items, M new items, U distinct embeddings, E embedding width, D depth, C nodes of the tree, P prefixes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lum_ray.artifacts import UserError
from lum_ray.data.rows import Int64
from lum_ray.gts.spectral import Affinity, Float32, chunks, split, unit_mean

Bool = npt.NDArray[np.bool_]
LANDMARKS_ABOVE = 20_000
LANDMARKS = 4_000
REFINEMENTS = 3


@dataclass(frozen=True)
class Tree:
    """The IDs of N items and what assigns IDs to new ones.

    A node without stored children passes everything on to child 0 (a single embedding needs no further levels). A tree
    without nodes is `random_tree`'s: it draws the path of a new item from a hash of its embedding.
    """

    branching: int
    depth: int
    paths_ND: Int64
    """Digits 0..branching-1, the root's child first."""
    collision_N: Int64
    """0.. within a leaf, by position in the catalogue."""
    children_C1: Int64
    """C + 1 of them: node c's children are the nodes children[c] .. children[c + 1] - 1, digit by digit; 0 is the root.
    Nodes come level by level."""
    centroids_CE: Float32
    """Unit mean of the unit embeddings below each node."""

    def __len__(self) -> int:
        return len(self.paths_ND)

    @property
    def collisions(self) -> int:
        """How many different collision digits there are: the size of the largest leaf."""
        return int(self.collision_N.max()) + 1

    @cached_property
    def leaves(self) -> Int64:
        """Each item's leaf as one number: its digits read in base `branching`, so prefixes are ranges."""
        return encode(self.paths_ND, self.branching)

    @cached_property
    def _order(self) -> tuple[Int64, Int64]:
        """Items by (leaf, collision digit), and the leaf of each."""
        order = np.lexsort((self.collision_N, self.leaves)).astype(np.int64)
        return order, self.leaves[order]

    def _range(self, prefix_PL: Int64) -> tuple[Int64, Int64]:
        """Where in `_order` the items below each prefix begin and end, two arrays (P,)."""
        span = self.branching ** (self.depth - prefix_PL.shape[1])
        code_P = encode(prefix_PL, self.branching)
        leaves = self._order[1]
        return np.searchsorted(leaves, code_P * span), np.searchsorted(leaves, (code_P + 1) * span)

    def items(self, prefix: tuple[int, ...]) -> Int64:
        """The items below a prefix of 0..depth digits, by (leaf, collision digit)."""
        begin, end = self._range(np.array([prefix], np.int64))
        return self._order[0][begin[0] : end[0]]

    def find(self, paths_MD: Int64, collision_M: Int64) -> Int64:
        """The item of each full ID, (M,) int64, -1 where there is none."""
        begin, end = self._range(paths_MD)
        place = begin + collision_M
        there = (collision_M >= 0) & (place < end) & ((paths_MD >= 0) & (paths_MD < self.branching)).all(axis=1)
        return np.where(there, self._order[0][np.where(there, place, 0)], -1)

    def assign(self, embeddings_ME: npt.ArrayLike) -> Int64:
        """Paths (M, depth) int64 of items, by walking down to the nearest child centroid (cosine; ties: lower digit).

        A fitted item's own path may differ: clusters of a graph are not the cells of their means. Raises UserError for
        another width than the tree's, NaN, infinite or zero rows.
        """
        x_ME = unit_rows(embeddings_ME)
        if not len(self.centroids_CE):
            return _paths_by_hash(x_ME, self.branching, self.depth)
        if x_ME.shape[1] != self.centroids_CE.shape[1]:
            raise UserError(
                f"embeddings of new items: expected the width {self.centroids_CE.shape[1]} of the tree, got "
                f"{x_ME.shape[1]}; encode them with the encoder that the tree was built from"
            )
        paths_MD = np.zeros((len(x_ME), self.depth), np.int64)
        node_M = np.zeros(len(x_ME), np.int64)
        for level in range(self.depth):
            for node in np.unique(node_M[node_M >= 0]):
                rows = np.flatnonzero(node_M == node)
                begin, end = self.children_C1[node : node + 2]
                if begin == end:
                    node_M[rows] = -1  # one embedding: zeros from here on
                    continue
                digit = (x_ME[rows] @ self.centroids_CE[begin:end].T).argmax(axis=1)
                paths_MD[rows, level] = digit
                node_M[rows] = begin + digit
        return paths_MD

    def with_items(self, embeddings_ME: npt.ArrayLike) -> Tree:
        """The tree with M more items at the end of the catalogue: nothing is refitted, no old ID changes, and the new
        items' collision digits go on after the old ones. Raises UserError as `assign` does."""
        paths_ND = np.concatenate([self.paths_ND, self.assign(embeddings_ME)])
        digits = collision_digits(encode(paths_ND, self.branching))
        collision_N = np.concatenate([self.collision_N, digits[len(self) :]])
        return replace(self, paths_ND=paths_ND, collision_N=collision_N)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Plain arrays from which `from_arrays` makes the same tree."""
        return {
            "shape": np.array([self.branching, self.depth], np.int64),
            "paths_ND": self.paths_ND,
            "collision_N": self.collision_N,
            "children_C1": self.children_C1,
            "centroids_CE": self.centroids_CE,
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> Tree:
        """The tree that `to_arrays` took apart. Raises KeyError for a missing array."""
        branching, depth = arrays["shape"].tolist()
        return Tree(
            branching=branching,
            depth=depth,
            paths_ND=arrays["paths_ND"].astype(np.int64),
            collision_N=arrays["collision_N"].astype(np.int64),
            children_C1=arrays["children_C1"].astype(np.int64),
            centroids_CE=arrays["centroids_CE"].astype(np.float32),
        )


def encode(digits_PL: Int64, branching: int) -> Int64:
    """Digits (P, L), most significant first, as one number each, (P,) int64; zeros for L = 0."""
    code_P = np.zeros(len(digits_PL), np.int64)
    for digit_P in digits_PL.T:
        code_P = code_P * branching + digit_P
    return code_P


def collision_digits(leaf_N: Int64) -> Int64:
    """How many items with the same leaf come before each, (N,) int64."""
    order = np.argsort(leaf_N, kind="stable")
    ordered = leaf_N[order]
    digits = np.empty(len(leaf_N), np.int64)
    digits[order] = np.arange(len(leaf_N)) - np.searchsorted(ordered, ordered)
    return digits


def unit_rows(embeddings_NE: npt.ArrayLike) -> Float32:
    """Rows of length one, (N, E) float32. Raises UserError for NaN, infinite or zero rows, naming items."""
    x_NE = np.asarray(embeddings_NE)
    if x_NE.ndim != 2 or not x_NE.shape[1] or x_NE.dtype.kind not in "fiu":
        raise UserError(
            f"item embeddings: expected numbers of shape (items, width), got {x_NE.dtype} of shape {x_NE.shape}"
        )
    result = np.empty(x_NE.shape, np.float32)
    norm_N = np.empty(len(x_NE))
    for rows in chunks(len(x_NE)):
        exact = x_NE[rows].astype(np.float64)
        norm_N[rows] = np.linalg.norm(exact, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            # + 0.0 makes -0.0 positive: equal embeddings have equal bytes
            result[rows] = exact / norm_N[rows, None] + 0.0
    bad = np.flatnonzero(~(np.isfinite(norm_N) & (norm_N > 0)))
    if len(bad):
        shown = ", ".join(f"{i} ({'zeros' if norm_N[i] == 0 else 'NaN or infinite'})" for i in bad[:5].tolist())
        raise UserError(
            f"item embeddings: expected finite rows with a direction, got {len(bad)} without, by position in the "
            f"catalogue: {shown}; check the items' texts (empty?) and the text encoder's number format"
        )
    return result


def build_tree(
    embeddings_NE: npt.ArrayLike,
    branching: int,
    depth: int,
    neighbours: int,
    affinity: Affinity,
    seed: int,
    *,
    landmarks_above: int = LANDMARKS_ABOVE,
    landmarks: int = LANDMARKS,
    refinements: int = REFINEMENTS,
) -> Tree:
    """Hierarchical spectral clustering of items by their text embeddings, (N, E) of any float type and length.

    Each node of more than `branching` distinct embeddings is split by spectral clustering of its kNN graph, a smaller
    one into one embedding per child. `neighbours` is k, within limits that follow the node's size (see
    `spectral.graph_neighbours`); `affinity` gives the edge weights: 1, or a Gaussian of the distance in units of both
    ends' distance to their k-th neighbour. Above `landmarks_above` distinct embeddings in a node, `landmarks` of them
    are clustered and the others follow their nearest ones (Nyström). `refinements` steps then move items to the nearest
    mean; 0 leaves the spectral clusters as they are. Children are ordered by size, largest first, then by first item.
    Deterministic given `seed`.

    Source: GTS-LUM, semantic IDs. Departs: the paper leaves graph, sizes and collisions open.
    Raises UserError for settings out of range and for rows that are NaN, infinite or zero.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    _check(branching, depth, neighbours, affinity)
    x_NE = unit_rows(embeddings_NE)
    if not len(x_NE):
        raise UserError("ID tree: expected at least one item, got none; check `data.items`")
    first_U, distinct_N, weight_U = _distinct(x_NE)
    x_UE = x_NE[first_U]
    digits_UD = np.zeros((len(x_UE), depth), np.int64)
    children = [1]
    centroids: list[Float32] = []
    queue: list[tuple[tuple[int, ...], Int64]] = [((), np.arange(len(x_UE)))]
    with threadpool_limits(limits=1):
        while len(centroids) < len(queue):
            prefix, rows = queue[len(centroids)]
            centroids.append(unit_mean(x_UE[rows], weight_U[rows]))
            if len(rows) == 1 or len(prefix) == depth:
                label = np.zeros(0, np.int64)
            elif len(rows) <= branching:
                label = np.arange(len(rows))
            else:
                state = np.random.SeedSequence([seed, *prefix, len(prefix)])
                node_seed = int(state.generate_state(1)[0])
                label = split(x_UE[rows], branching, neighbours, affinity, node_seed, landmarks_above, landmarks)
                label = _refined(x_UE[rows], weight_U[rows], label, refinements)
            for digit, below in enumerate(_ordered(rows, label, first_U, weight_U)):
                digits_UD[below, len(prefix)] = digit
                queue.append(((*prefix, digit), below))
            children.append(len(queue))
    paths_ND = digits_UD[distinct_N]
    return Tree(
        branching=branching,
        depth=depth,
        paths_ND=paths_ND,
        collision_N=collision_digits(encode(paths_ND, branching)),
        children_C1=np.array(children, np.int64),
        centroids_CE=np.stack(centroids),
    )


def random_tree(n: int, branching: int, depth: int, seed: int) -> Tree:
    """The control: N items in random order spread evenly over all leaves (sizes differ by at most one, on each level).

    No two items collide while n <= branching ** depth. Raises UserError for settings out of range.
    """
    _check(branching, depth, 1, "connectivity")
    if n < 1:
        raise UserError(f"ID tree: expected at least one item, got {n}; check `data.items`")
    place_N = np.random.default_rng(seed).permutation(n).astype(np.int64)
    paths_ND = np.empty((n, depth), np.int64)
    for level in range(depth):  # place / n, written in base `branching`
        paths_ND[:, level], place_N = np.divmod(place_N * branching, n)
    return Tree(
        branching=branching,
        depth=depth,
        paths_ND=paths_ND,
        collision_N=collision_digits(encode(paths_ND, branching)),
        children_C1=np.ones(1, np.int64),
        centroids_CE=np.empty((0, 0), np.float32),
    )


def _check(branching: int, depth: int, neighbours: int, affinity: str) -> None:
    if branching < 2 or depth < 1 or neighbours < 1 or branching**depth >= 2**62:
        raise UserError(
            f"ID tree: expected branching >= 2, depth >= 1, neighbours >= 1 and fewer than 2^62 leaves, got branching "
            f"{branching}, depth {depth}, neighbours {neighbours}"
        )
    if affinity not in ("connectivity", "gaussian"):
        raise UserError(f"ID tree: expected the affinity 'connectivity' or 'gaussian', got '{affinity}'")


def _distinct(x_NE: Float32) -> tuple[Int64, Int64, Int64]:
    """Distinct rows by first appearance: the first item of each (U,), each item's row (N,), items of each row (U,)."""
    seen: dict[bytes, int] = {}
    row_N = np.empty(len(x_NE), np.int64)
    for i, row in enumerate(x_NE):
        row_N[i] = seen.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), len(seen))
    first_U = np.unique(row_N, return_index=True)[1].astype(np.int64)
    return first_U, row_N, np.bincount(row_N).astype(np.int64)


def _refined(x_NE: Float32, weight_N: Int64, label_N: Int64, steps: int) -> Int64:
    """The labels after each row has gone to the label with the nearest mean, `steps` times or until none goes."""
    for _ in range(steps):
        names = np.unique(label_N)
        means = np.stack([unit_mean(x_NE[label_N == name], weight_N[label_N == name]) for name in names])
        nearest = names[(x_NE @ means.T).argmax(axis=1)]
        if (nearest == label_N).all():
            break
        label_N = nearest
    return label_N


def _ordered(rows: Int64, label: Int64, first_U: Int64, weight_U: Int64) -> list[Int64]:
    """The rows of each label: the most items first, then the earliest item."""
    groups = [rows[label == name] for name in np.unique(label)]
    return sorted(groups, key=lambda group: (-weight_U[group].sum(), first_U[group].min()))


def _paths_by_hash(x_ME: Float32, branching: int, depth: int) -> Int64:
    paths_MD = np.empty((len(x_ME), depth), np.int64)
    for i, row in enumerate(x_ME):
        place = int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest())
        for level in range(depth):
            place, paths_MD[i, level] = divmod(place, branching)
    return paths_MD
