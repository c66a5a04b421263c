"""Building an ID tree: seconds and memory by number of items, and how much of a planted hierarchy it finds.

    OMP_NUM_THREADS=1 python -m jobs.bench.tree [--quick] [--items 2000,20000,200000] [--noise 1.5]

Items: directions in 384 dimensions, each level of a hierarchy as wide and as deep as the tree adding a Gaussian step to
its parent (1, 0.7, 0.5, ... long), and `noise` for each item. Rows, for each number of items n, built in a process of
its own: tree/<n>/build_s, tree/<n>/peak_gib (above what the process held before), tree/<n>/planted_ari (the adjusted
Rand index with the planted leaves). For the fewest items, with two kNN sizes and both affinities:
tree/<n>/<neighbours>-<affinity>/planted_ari, /refit_ari (another seed), /left_out_ari (10 % of items left out) and
/neighbours_in_leaf (the share of nearest neighbours within a leaf, the interval being that of random IDs).
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.bench.rows import emit, hardware, note
from lum_ray.data.rows import Int64
from lum_ray.gts.semantic_ids import Tree, build_tree
from lum_ray.gts.tree_quality import adjusted_rand, quality

PACKAGES = ("numpy", "scipy", "scikit-learn")
STEP = 0.7
"""How much shorter the steps get from one level to the next."""


def planted(
    count: int, branching: int, depth: int, noise: float, seed: int, width: int = 384
) -> tuple[npt.NDArray[np.float32], Int64]:
    """Items (count, width) and their leaves (count,), numbered so that leaf // branching is the parent."""
    generator = np.random.default_rng(seed)
    places = np.zeros((1, width))
    for level in range(depth):
        steps = generator.standard_normal((len(places), branching, width)) * STEP**level / width**0.5
        places = (places[:, None] + steps).reshape(-1, width)
    leaf = generator.integers(0, len(places), count)
    items = np.empty((count, width), np.float32)
    for begin in range(0, count, 10_000):
        part = leaf[begin : begin + 10_000]
        items[begin : begin + 10_000] = places[part] + generator.standard_normal((len(part), width)) * (
            noise / width**0.5
        )
    return items, leaf


def peak_gib() -> float:
    """The most memory that this process has held, in GiB; NaN where the system does not say."""
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            found = re.search(r"VmHWM:\s+(\d+) kB", lines.read())
    except FileNotFoundError:
        found = None
    return int(found[1]) / 2**20 if found else float("nan")


def measured(count: int, noise: float, settings: dict[str, Any]) -> dict[str, float]:
    """Seconds, processor seconds, GiB above what was held before, adjusted Rand index with the planted leaves."""
    items, leaf = planted(count, settings["branching"], settings["depth"], noise, settings["seed"])
    build_tree(items[:300], **settings)  # imports are not the tree's
    before = peak_gib()
    begin, worked = time.perf_counter(), time.process_time()
    tree = build_tree(items, **settings)
    return {
        "build_s": time.perf_counter() - begin,
        "cpu_s": time.process_time() - worked,
        "peak_gib": peak_gib() - before,
        "planted_ari": adjusted_rand(leaf, tree.leaves),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.tree", description="Building an ID tree.")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 600 items")
    parser.add_argument("--items", default="2000,20000,200000", help="numbers of items, comma-separated")
    parser.add_argument("--branching", type=int, default=8)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--neighbours", type=int, default=10)
    parser.add_argument("--noise", type=float, default=1.5, help="of an item, beside steps of 1, 0.7, 0.49, ...")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    counts = [600] if options.quick else sorted(int(count) for count in options.items.split(","))
    depth = 2 if options.quick else options.depth
    settings = {
        "branching": options.branching,
        "depth": depth,
        "neighbours": options.neighbours,
        "affinity": "connectivity",
        "seed": options.seed,
    }
    machine = hardware()
    for count in counts:
        note(f"{count:,} items")
        fresh = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with fresh as process:
            found = process.submit(measured, count, options.noise, settings).result()
        run = settings | {"items": count, "noise": options.noise, "quick": options.quick, "cpu_s": found["cpu_s"]}
        for name, unit in (("build_s", "s"), ("peak_gib", "GiB"), ("planted_ari", "adjusted Rand")):
            emit(f"tree/{count}/{name}", found[name], unit, run=run, machine=machine, packages=PACKAGES)

    items, leaf = planted(counts[0], options.branching, depth, options.noise, options.seed)
    for neighbours in (options.neighbours, 3 * options.neighbours):
        for affinity in ("connectivity", "gaussian"):
            chosen = settings | {"neighbours": neighbours, "affinity": affinity}
            _quality_rows(items, leaf, chosen, options.noise, machine)
    return 0


def _refit(settings: dict[str, Any], items: npt.NDArray[Any], seed: int) -> Tree:
    return build_tree(items, **settings | {"seed": seed})


def _quality_rows(
    items: npt.NDArray[np.float32], leaf: Int64, settings: dict[str, Any], noise: float, machine: str
) -> None:
    tree = build_tree(items, **settings)
    figures = quality(tree, items, refit=partial(_refit, settings))
    name = f"tree/{len(items)}/{settings['neighbours']}-{settings['affinity']}"
    run = settings | {"items": len(items), "noise": noise, "quality": figures}
    stability = figures["stability"]
    for what, value in (
        ("planted_ari", adjusted_rand(leaf, tree.leaves)),
        ("refit_ari", stability["seed"]["leaf"]),
        ("left_out_ari", stability["left_out"]["leaf"]),
    ):
        emit(f"{name}/{what}", value, "adjusted Rand", run=run, machine=machine, packages=PACKAGES)
    shared = figures["against_random"]["embedding"]["leaf"]
    emit(
        f"{name}/neighbours_in_leaf",
        shared["value"],
        "share",
        peer="random IDs",
        ratio=shared["value"] / shared["random"] if shared["random"] else None,
        low=shared["low"],
        high=shared["high"],
        run=run,
        machine=machine,
        packages=PACKAGES,
    )


if __name__ == "__main__":
    sys.exit(main())
