"""Open questions of the GTS-LUM paper, each an experiment.

    python -m jobs.bench.questions_gts [--only cost,granularity,front,irrelevant,noise]
        [--dataset simulator|complete_journey] [--users N] [--max-minutes N] [--quick] [--root DIR]

Rows `questions_gts/<question>/...`, and a table of each question on stderr for the README:

- cost: quality and CPU time a user by layers, tokens, 8-bit weights, R alone against R + P at N candidates;
- granularity: slots of 15 minutes to a day, and the depth of the ID tree (rows `granularity/<dataset>/<which>/<arm>`);
- front: questions about users (gone for 28 days, a coupon redeemed, a campaign accepted; Complete Journey) as a target
  in front, behind, nowhere, and a linear head on the user embedding, AUC against LightGBM;
- irrelevant: what a target in front does that is not what comes next;
- noise: graph and table embeddings with noise, shuffled between items, half of them missing, against text alone.

Sizes are those of `ablations_gts --small`, with which the base is shared. Each phase's share is `ablations_gts --only
phase_1`. Checkpoints and lists are artifacts under --root (a local folder): a second call makes what is missing. One
seed. Exit code 1: something was left out for want of time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from jobs.bench.ablation_arms_gts import Fields, base_run
from jobs.bench.ablations_gts import Bench, Found, tell_arms
from jobs.bench.question_labels_gts import front
from jobs.bench.question_readings_gts import cost, irrelevant
from jobs.bench.rows import note
from jobs.bench.time_limit import time_limit
from lum_ray.artifacts import commit, find, join, read_bytes, write_bytes
from lum_ray.config import Run, Subset
from lum_ray.steps.gts_prepare import prepare_gts

QUESTIONS = ("cost", "granularity", "front", "irrelevant", "noise")
DATASETS = ("simulator", "complete_journey")
USERS = {"cost": 250, "irrelevant": 400, "front": 500}
ON_SHOPS = ("front",)
"""Questions that only Complete Journey answers."""
SPLIT = {"validate_from": "2017-09-20", "validate": "2017-09-20", "test": "2017-10-30"}
"""Of Complete Journey: labels that are known 28 days later fit before, between and behind these days."""
SLOTS, DEPTHS = (15, 60, 240, 1440), (2, 1, 3)
Arrays = dict[str, npt.NDArray[Any]]


def question_run(dataset: str, root: str, quick: bool = False) -> Run:
    """The base of `ablations_gts --small`; of Complete Journey with a split that leaves room for labels."""
    run = base_run(dataset, root, quick=quick, small=not quick)
    if dataset != "complete_journey":
        return run
    cuts = {part: Subset(from_day=SPLIT[part], until_day=SPLIT[part]) for part in ("validate", "test")}
    split = dataclasses.replace(run.split, validate_from=SPLIT["validate_from"], **cuts)
    return dataclasses.replace(run, name="questions_gts_complete_journey", split=split)


def granularity(dataset: str, root: str, quick: bool) -> list[Found]:
    """Longer slots and other depths, each against the base."""
    section = base_run(dataset, root, quick=quick, small=not quick).section
    arms: dict[str, dict[str, Fields]] = {
        "slot_minutes": {str(minutes): {"slot_minutes": minutes} for minutes in SLOTS},
        "depth": {str(depth): {"depth": depth} for depth in sorted(DEPTHS, key=lambda depth: depth != section.depth)},
    }
    bench = Bench(dataset, root, None, quick, not quick, arms, "questions_gts/granularity")
    found = [bench.measure(name, arm) for name, of in arms.items() for arm in tuple(of)[1:]]
    tell_arms(found, arms)
    return found


Spoil = Callable[[npt.NDArray[np.float32], npt.NDArray[np.bool_], np.random.Generator], Any]


def noisy(sigma: float) -> Spoil:
    """Gaussian noise of `sigma` deviations of each number."""

    def spoil(values_NE: npt.NDArray[np.float32], known_N: npt.NDArray[np.bool_], rng: np.random.Generator) -> Any:
        noise = rng.normal(size=values_NE.shape) * sigma * values_NE[known_N].std(axis=0)
        return (values_NE + noise * known_N[:, None]).astype(np.float32), known_N

    return spoil


def shuffled(values_NE: npt.NDArray[np.float32], known_N: npt.NDArray[np.bool_], rng: np.random.Generator) -> Any:
    """Each item has another's vector."""
    order = rng.permutation(len(values_NE))
    return values_NE[order], known_N[order]


def half_missing(values_NE: npt.NDArray[np.float32], known_N: npt.NDArray[np.bool_], rng: np.random.Generator) -> Any:
    """Half of the items have none. (The table's encoder always gives a row: theirs is its mean.)"""
    kept = rng.permutation(len(values_NE)) % 2 == 0
    return np.where(kept[:, None], values_NE, values_NE[known_N].mean(axis=0)).astype(np.float32), known_N & kept


SPOILS: dict[str, Spoil | None] = {
    "text": None,
    "all": None,
    "noise_0.5": noisy(0.5),
    "noise_1": noisy(1.0),
    "noise_2": noisy(2.0),
    "shuffled": shuffled,
    "half_missing": half_missing,
}
"""What happens to the graph's and the table's embeddings; text alone is what the others are compared with."""
TEXT_ALONE: dict[str, Fields] = {arm: {"modalities": ("text",)} if arm == "text" else {} for arm in SPOILS}


@dataclass(frozen=True)
class NoiseBench(Bench):
    """Arms with spoiled embeddings live under roots of their own, so that every step takes them for what was fitted."""

    def run_of(self, ablation: str, arm: str) -> Run:
        run, spoil = super().run_of(ablation, arm), SPOILS[arm]
        return run if spoil is None else dataclasses.replace(run, root=spoiled(run, arm, spoil))


def spoiled(run: Run, arm: str, spoil: Spoil) -> str:
    """A root with the run's prepared artifacts, whose graph and table embeddings went through `spoil`."""
    prepared = prepare_gts(run, note)
    name = prepared.fitted.uri.rsplit("/", 1)[-1]
    root = join(run.root, "noise", f"{arm}-{name}")
    place = join(root, "fitted", name)
    if find(place) is not None:
        return root
    for kind in ("raw", "items", "sequences", "tree"):
        shutil.copytree(join(run.root, kind), join(root, kind), dirs_exist_ok=True)
    arrays: Arrays = load_arrays(read_bytes(join(prepared.fitted.uri, "inputs.safetensors")))
    rng = np.random.default_rng(run.seed)
    arrays["graph_NG"], arrays["graph_known_N"] = spoil(arrays["graph_NG"], arrays["graph_known_N"], rng)
    everyone = np.ones(len(arrays["table_NH"]), np.bool_)
    arrays["table_NH"] = spoil(arrays["table_NH"], everyone, rng)[0]
    os.makedirs(place, exist_ok=True)
    for file in ("inputs.json", "table.safetensors"):
        shutil.copy(join(prepared.fitted.uri, file), join(place, file))
    kept = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    write_bytes(join(place, "inputs.safetensors"), save_arrays(kept))
    manifest: Mapping[str, Any] = prepared.fitted.manifest
    commit(place, {**manifest, "digest": f"{manifest['digest']}-{arm}"})
    return root


def noise(dataset: str, root: str, quick: bool) -> list[Found]:
    """Spoiled business embeddings against text alone: `hurts` says that they are worse than none."""
    arms = {"business_embeddings": TEXT_ALONE}
    bench = NoiseBench(dataset, root, None, quick, not quick, arms, "questions_gts/noise")
    found = [bench.measure("business_embeddings", arm) for arm in tuple(TEXT_ALONE)[1:]]
    tell_arms(found, arms)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.questions_gts", description="Open questions of the GTS-LUM paper."
    )
    parser.add_argument("--only", default=",".join(QUESTIONS), help="questions, with commas between (default: all)")
    parser.add_argument("--dataset", choices=DATASETS, default="simulator")
    parser.add_argument("--users", type=int, help="who are read in cost, irrelevant and front (default: 250, 400, 500)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny models, two steps")
    parser.add_argument("--root", default="runs/bench", help="where the artifacts are")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop after this long (0: never)")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in QUESTIONS]:
        parser.error(f"--only: expected some of {', '.join(QUESTIONS)}, got {', '.join(unknown)}")
    if options.users is not None and options.users < 1:
        parser.error(f"--users: expected at least 1, got {options.users}")
    dataset, root, quick = options.dataset, options.root, options.quick
    users = {name: options.users or (40 if quick else usual) for name, usual in USERS.items()}
    asked: dict[str, Callable[[], Any]] = {
        "cost": lambda: cost(dataset, question_run(dataset, root, quick), users["cost"], quick),
        "granularity": lambda: granularity(dataset, root, quick),
        "front": lambda: front(question_run("complete_journey", root, quick), users["front"], quick),
        "irrelevant": lambda: irrelevant(dataset, question_run(dataset, root, quick), users["irrelevant"], quick),
        "noise": lambda: noise(dataset, root, quick),
    }
    left = list(wanted)
    with time_limit(options.max_minutes) as over:
        while left:
            note(f"\n{left[0]} ({'complete_journey' if left[0] in ON_SHOPS else dataset})")
            asked[left[0]]()
            left.pop(0)
    for line in over:
        note(f"{line}; left out: {', '.join(left)}")
    if quick:
        note("\n--quick: models of two steps; none of this says anything")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
