"""The search: does it prepare each data shape once, and does the time go into training?

    python -m jobs.bench.tune [--quick] [--only shapes|efficiency] [--seconds 60]

Rows: tune/shapes/count (artifacts that a space of 4 slot sizes x 3 depths x 5 learning rates prepares: 1 sequence table
and 3 trees, so 4) and tune/efficiency/share (seconds of training of all trials / (wall time of the search x trials at
once), with trials of about `--seconds`; the wall time holds the start of the processes, the prediction files and the
report). Exit code 1 if more shapes were prepared than there are.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time

from jobs.bench.rows import emit, hardware, note
from lum_ray import catalog, config, presets
from lum_ray.config import Run
from lum_ray.steps import train
from lum_ray.steps.session import start_ray
from tuning.ledger import Ledger
from tuning.sweep import places, tune
from tuning.trial import train_seconds

PACKAGES = ("ray", "optuna", "torch")
SHAPES = """
gts.slot_minutes: {choice: [15, 60, 240, 1440]}
gts.depth: {choice: [1, 2, 3]}
train.learning_rate: {choice: [0.0005, 0.001, 0.002, 0.004, 0.008]}
gts.align_steps: 0
train.steps: 2
train.validate_every: 1
"""
RATES = "train.learning_rate: {log: [0.0003, 0.01]}\ntrain.steps: STEPS\ntrain.validate_every: STEPS\n"


def run_of(preset: str, root: str, space: str, *sets: str) -> Run:
    """The preset with a space of that text."""
    file = os.path.join(root, "space.yaml")
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(space)
    extra = [f"root={root}", f"tune.space={file}", "tune.prune=false", "data.engine=local", *sets]
    return catalog.read_run(config.override(config.dump(presets.PRESETS[preset]()), extra))


def shapes(quick: bool) -> bool:
    """All 60 combinations, or 12 of them; True if each shape was prepared once."""
    with tempfile.TemporaryDirectory() as root:
        trials = 12 if quick else 60
        space = SHAPES.replace("[0.0005, 0.001, 0.002, 0.004, 0.008]", "[0.001]") if quick else SHAPES
        run = run_of("gts_tiny", root, space, f"tune.trials={trials}", "data.source.options.users=60")
        uri = tune(run, note)
        found = {name: len(os.listdir(os.path.join(root, name))) for name in ("sequences", "tree")}
        about = {"trials": len(Ledger(uri).records()), **found}
        emit("tune/shapes/count", float(sum(found.values())), "artifacts", run=about, machine=hardware(),
             packages=PACKAGES)  # fmt: skip
        return found == {"sequences": 1, "tree": 3}


def efficiency(quick: bool, seconds: float) -> None:
    """Trials of one length on all cores."""
    with tempfile.TemporaryDirectory() as root:
        start_ray()
        first = run_of("lumos_tiny", root, RATES.replace("STEPS", "50"), "train.steps=200", "train.validate_every=200",
                       "train.checkpoint_every=200", "name=calibration")  # fmt: skip
        per_step = train_seconds(train(first)) / 200
        parallel, _ = places(first)
        steps = max(20, int(seconds / per_step))
        trials = (2 if quick else 3) * parallel
        run = run_of("lumos_tiny", root, RATES.replace("STEPS", str(steps)), f"tune.trials={trials}",
                     f"train.checkpoint_every={max(1, steps // 4)}")  # fmt: skip
        began_at = time.monotonic()
        uri = tune(run, note)
        wall_s = time.monotonic() - began_at
        records = Ledger(uri).records()
        spent = [record.train_s for record in records]
        about = {"trials": len(records), "parallel": parallel, "wall_s": round(wall_s, 1), "steps": steps,
                 "trial_s": round(sum(spent) / len(spent), 1)}  # fmt: skip
        emit("tune/efficiency/share", sum(spent) / (wall_s * parallel), "share", run=about, machine=hardware(),
             packages=PACKAGES)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter trials")
    parser.add_argument("--only", choices=("shapes", "efficiency"))
    parser.add_argument("--seconds", type=float, default=60.0, help="of training a trial, about")
    options = parser.parse_args()
    fine = True
    # elsewhere: a search that runs in the repository is entered into its tuning/LOG.md
    with tempfile.TemporaryDirectory() as elsewhere, contextlib.chdir(elsewhere):
        if options.only != "efficiency":
            fine = shapes(options.quick)
        if options.only != "shapes":
            efficiency(options.quick, 5.0 if options.quick else options.seconds)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
