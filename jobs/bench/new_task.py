"""A new task in a minute: a 14th behaviour, added to the demo's run file by one line.

    python -m jobs.bench.new_task [--root DIR] [--steps N] [--quick]

Rows: `new_task/<name>/auc_gain` (our mean daily AUC minus that of a LightGBM for it, one seed, paired 95 % interval
over users), `new_task/lines/ours` (lines of the run file that it took) and `new_task/lines/lightgbm` (lines of code
that hold the hand-made features and the models for each day, which a team without this library would write).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import time
from collections.abc import Sequence
from types import ModuleType

from jobs.bench.quality_lumos import contest_run
from jobs.bench.rows import emit, hardware, note
from jobs.run_file import commented
from lum_ray import presets
from lum_ray.config import Behaviour, Run
from lum_ray.evaluation import boosted, features, strata
from lum_ray.steps.contest import contest

NEW = Behaviour("pastry", "binary", "any(department == 'PASTRY')")


def with_new_task(run: Run) -> Run:
    """The run with one more behaviour: a feature and a target at once."""
    behaviours = (*run.data.behaviours, NEW)
    return dataclasses.replace(run, name="new_task", data=dataclasses.replace(run.data, behaviours=behaviours))


def lines_of_code(module: ModuleType) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    source = inspect.getsource(module)
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and at not in texts for at, line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.new_task", description="A 14th behaviour.")
    parser.add_argument("--root", default="runs/bench", help="where the artifacts are")
    parser.add_argument("--steps", type=int, default=400, help="training steps of our model (default: the demo's)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a tiny model")
    options = parser.parse_args(arguments)
    before = contest_run("complete_journey", options.root, None, options.quick)
    if not options.quick:
        train = dataclasses.replace(before.train, steps=options.steps, validate_every=options.steps, ema=0.99)
        before = dataclasses.replace(before, data=presets.lumos_demo().data, train=train)
        before = dataclasses.replace(before, data=dataclasses.replace(before.data, engine="local"))
    run, start = with_new_task(before), time.perf_counter()
    found = contest(run, note, [NEW.name])
    seconds = time.perf_counter() - start
    row = next(row for row in found.strata.to_pylist() if row["by"] == strata.EVERY and row["task"] == NEW.name)
    shown = {"name": run.name, "quick": options.quick, "ours": row["ours"], "peer": row["peer"], "seconds": seconds}
    peer, machine, packages = f"{boosted.MODEL}: {row['peer']:.4f}", hardware(), ("torch", "lightgbm")
    emit(
        f"new_task/{NEW.name}/auc_gain",
        row["gain"],
        "AUC",
        peer=peer,
        ratio=row["ours"] / row["peer"],
        low=row["low"],
        high=row["high"],
        run=shown,
        machine=machine,
        packages=packages,
    )
    old, new = (set(commented(one).splitlines()) for one in (dataclasses.replace(before, name=run.name), run))
    added = sorted(new - old)
    note(f"added to the run file: {added}")
    emit("new_task/lines/ours", len(added), "lines", run={"lines": added}, machine=machine)
    hand_made = lines_of_code(features) + lines_of_code(boosted)
    emit("new_task/lines/lightgbm", hand_made, "lines", run={"files": "features, boosted"}, machine=machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
