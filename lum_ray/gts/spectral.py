"""Spectral clustering of unit vectors through their kNN graph, at any size: what splits a node of the ID tree.

Choices (`Departs:` the paper says no more than spectral clustering of the texts' embeddings):
- kNN graphs break apart at clumps larger than k, and then say nothing about how the clumps lie to each other. So k
  grows with the node (`graph_neighbours`), a graph of more pieces than labels has its pieces' means clustered, and one
  of fewer pieces is joined at the closest pairs.
- Up to `EXACT_UP_TO` rows scikit-learn clusters. Beyond, its ARPACK mode inverts a Laplacian whose factors are dense,
  and its LOBPCG mode stops before it has told near-separate groups apart; the same eigenvectors are then taken as the
  largest of the normalised adjacency, which needs products with the sparse graph only.
- Above the landmarks' limit, landmarks are clustered and the other rows follow their nearest ones (Nyström).

Shapes: N rows, L landmarks, E width, K neighbours, B labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lum_ray.data.rows import Int64

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Affinity = Literal["connectivity", "gaussian"]
EXACT_UP_TO = 1_000
EDGES = 5_000_000
"""Of a graph, about: what bounds memory and time of a node."""
WEAKEST = 1e-3
"""The smallest weight of an edge, so that no edge of the graph vanishes numerically."""
CHUNK = 4_096


def chunks(count: int) -> Iterator[slice]:
    """Slices of at most CHUNK rows that cover `count`."""
    return (slice(begin, begin + CHUNK) for begin in range(0, count, CHUNK))


def unit_mean(x_NE: Float32, weight_N: Int64) -> Float32:
    """The direction of the weighted mean of unit rows, (E,) float32; the first row where they cancel out."""
    mean_E = np.zeros(x_NE.shape[1])
    for rows in chunks(len(x_NE)):
        mean_E += weight_N[rows].astype(np.float64) @ x_NE[rows]
    norm = float(np.linalg.norm(mean_E))
    return x_NE[0] if norm < 1e-6 else (mean_E / norm).astype(np.float32)


def split(
    x_NE: Float32,
    labels: int,
    neighbours: int,
    affinity: Affinity,
    seed: int,
    landmarks_above: int,
    landmarks: int,
) -> Int64:
    """A label 0..labels-1 for each of N > labels distinct unit rows, (N,) int64."""
    if len(x_NE) <= max(landmarks_above, labels):
        return spectral(x_NE, labels, neighbours, affinity, seed)
    count = min(len(x_NE), max(landmarks, labels + 1))
    picked = np.sort(np.random.default_rng(seed).choice(len(x_NE), count, replace=False))
    landmarks_LE = x_NE[picked]
    label_L = spectral(landmarks_LE, labels, neighbours, affinity, seed)
    label_N = np.empty(len(x_NE), np.int64)
    votes = min(neighbours, count)
    for rows in chunks(len(x_NE)):
        cosine = x_NE[rows] @ landmarks_LE.T
        nearest = np.argpartition(-cosine, votes - 1, axis=1)[:, :votes]
        count_RB = np.zeros((len(cosine), labels))
        # a majority of the nearest; of equal counts, the closer ones win
        vote = 1.0 + np.take_along_axis(cosine, nearest, axis=1).astype(np.float64) / (votes + 1)
        np.add.at(count_RB, (np.arange(len(cosine))[:, None], label_L[nearest]), vote)
        label_N[rows] = count_RB.argmax(axis=1)
    label_N[picked] = label_L
    return label_N


def graph_neighbours(count: int, labels: int, neighbours: int) -> int:
    """k of a graph of `count` rows: at least half an average child, lest small clumps break the graph apart (so far as
    EDGES go), and `neighbours`; at most an average child, lest whole children blur."""
    child = count // labels
    return min(max(neighbours, min(child // 2, EDGES // count)), max(child, 2), count - 1)


def spectral(x_NE: Float32, labels: int, neighbours: int, affinity: Affinity, seed: int) -> Int64:
    """Spectral clustering of the kNN graph of N > labels distinct unit rows into labels 0..labels-1, (N,) int64."""
    graph = knn_graph(x_NE, graph_neighbours(len(x_NE), labels, neighbours), affinity)
    pieces, piece_N = connected(graph)
    if pieces > labels:
        ones = np.ones(len(x_NE), np.int64)
        means = np.stack([unit_mean(x_NE[piece_N == i], ones[piece_N == i]) for i in range(pieces)])
        return spectral(means, labels, neighbours, affinity, seed)[piece_N]
    if pieces == labels:
        return piece_N
    graph = joined(graph, x_NE, piece_N)
    if len(x_NE) > EXACT_UP_TO:
        return cluster_large(graph, labels, seed)
    from sklearn.cluster import SpectralClustering

    model = SpectralClustering(
        labels, affinity="precomputed", eigen_solver="arpack", assign_labels="cluster_qr", random_state=seed
    )
    return np.asarray(model.fit_predict(graph), np.int64)


def cluster_large(graph: Any, labels: int, seed: int) -> Int64:
    """What scikit-learn's SpectralClustering with `cluster_qr` computes, from products with the graph only, (N,).

    `graph` is a connected symmetric scipy CSR. Source of the labels: Damle, Minden, Ying 2019.
    """
    import scipy.sparse as sparse
    from scipy.linalg import qr, svd
    from scipy.sparse.linalg import eigsh

    root_N = np.sqrt(np.asarray(graph.sum(axis=1)).ravel())
    scale = sparse.diags(1 / root_N)
    start_N = np.random.default_rng(seed).uniform(-1, 1, len(root_N))
    _, vectors_NB = eigsh(scale @ graph @ scale, k=labels, which="LA", v0=start_N)
    embedding_NB = vectors_NB / root_N[:, None]
    pivots = qr(embedding_NB.T, pivoting=True, mode="r")[-1][:labels]
    left, _, right = svd(embedding_NB[pivots].T)
    return np.asarray(np.abs(embedding_NB @ (left @ right)).argmax(axis=1), np.int64)


def knn_graph(x_NE: Float32, k: int, affinity: Affinity) -> Any:
    """The symmetric graph (scipy CSR, float64) of each unit row and its k nearest by cosine.

    Weights: 1 (half where only one end has the other among its nearest), or for `gaussian` exp(-d / sqrt(r_i r_j)) of
    the cosine distance d, a Gaussian of the chord, with r an end's distance to its k-th neighbour.
    """
    import scipy.sparse as sparse
    from sklearn.neighbors import NearestNeighbors

    chord_NK, index_NK = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x_NE).kneighbors()
    weight_NK = np.ones(chord_NK.shape)
    if affinity == "gaussian":
        reach_N = np.maximum(chord_NK[:, -1].astype(np.float64), 1e-6)
        weight_NK = np.exp(-(chord_NK.astype(np.float64) ** 2) / (reach_N[:, None] * reach_N[index_NK]))
        weight_NK = np.maximum(weight_NK, WEAKEST)
    begin = np.arange(0, chord_NK.size + 1, k)
    graph = sparse.csr_matrix((weight_NK.ravel(), index_NK.ravel(), begin), shape=(len(x_NE), len(x_NE)))
    return (graph + graph.T) * 0.5


def connected(graph: Any) -> tuple[int, Int64]:
    """Connected components: how many, and each row's, (N,) int64."""
    from scipy.sparse.csgraph import connected_components

    count, piece_N = connected_components(graph, directed=False)
    return int(count), piece_N.astype(np.int64)


def joined(graph: Any, x_NE: Float32, piece_N: Int64) -> Any:
    """The graph made connected: each piece but the largest gets an edge to the closest row outside, until one is left
    (Borůvka's steps, so no more than log2 of the pieces)."""
    import scipy.sparse as sparse

    while piece_N.any():
        ends = []
        for piece in np.argsort(-np.bincount(piece_N), kind="stable")[1:]:
            inside, outside = np.flatnonzero(piece_N == piece), np.flatnonzero(piece_N != piece)
            best = -np.inf
            for rows in chunks(len(inside)):
                cosine = x_NE[inside[rows]] @ x_NE[outside].T
                i, j = divmod(int(cosine.argmax()), len(outside))
                if cosine[i, j] > best:
                    best, end = float(cosine[i, j]), (inside[rows][i], outside[j])
            ends.append(end)
        row, column = np.unique(np.sort(ends, axis=1), axis=0).T
        bridge = sparse.coo_matrix((np.full(len(row), 0.5), (row, column)), shape=graph.shape)
        graph = sparse.csr_matrix(graph + bridge + bridge.T)
        piece_N = connected(graph)[1]
    return graph
