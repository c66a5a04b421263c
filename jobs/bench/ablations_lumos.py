"""What each of LUMOS's choices is worth: one changed at a time, on OULAD or on the simulator.

    python -m jobs.bench.ablations_lumos [--dataset oulad|simulator] [--path DIR] [--only positions,events] [--seeds N]
                                         [--max-minutes N] [--quick] [--root DIR]

A row an arm: ablations_lumos/<dataset>/<ablation>/<arm>/auc_gain, the arm's AUC of `active` (of each day ahead,
averaged) minus that of the ablation's base, paired over users; on stderr the whole table and a verdict on each of the
paper's statements. Each (arm, seed) is a checkpoint and a prediction file under --root: a second call computes what is
missing only, and one that was stopped goes on where it was. Exit code 1 if an ablation was left out for want of time.

Arms and statements, and why each has the base it has: `jobs/bench/ablation_arms.py`.

An interval is over users. It does not hold what another seed would change: that is what --seeds is for, and where
seeds disagree about the sign, the verdict is "no effect" too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from jobs.bench.ablation_arms import ABLATIONS, DATASETS, STATEMENTS, base_run
from jobs.bench.rows import emit, hardware, note
from jobs.bench.simulator import daily_auc, log_losses, settings
from jobs.bench.time_limit import time_limit
from lum_ray import catalog, config, steps, weights
from lum_ray.artifacts import commit, find, join, storage, write_table
from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.evaluation import bootstrap
from lum_ray.evaluation.bootstrap import Interval
from lum_ray.evaluation.metrics import Floats
from lum_ray.evaluation.predictions import Predictions, check
from lum_ray.steps.predict import prediction_tables, trained_stage
from lum_ray.steps.prepare import cut_plan, prepare
from lum_ray.steps.train import tasks_of


@dataclass(frozen=True)
class Arm:
    """An arm's figures over users, averaged over seeds: (R + 1,) of each metric, entry 0 the value itself."""

    run: Run
    figures: Mapping[str, Floats]
    by_seed: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Found:
    """An arm beside its base: the arm's figure minus the base's, and what that says."""

    ablation: str
    arm: str
    shown: Arm
    base: Arm
    gains: Mapping[str, Interval]
    verdicts: Mapping[str, str]


def verdict(gain: Interval, by_seed: Sequence[float]) -> str:
    """Whether an arm `helps` or `hurts`, or has `no effect`: 0 lies in the interval, or seeds differ in sign."""
    if gain.low > 0 and min(by_seed) > 0:
        return "helps"
    return "hurts" if gain.high < 0 and max(by_seed) < 0 else "no effect"


def judge(verdicts: Sequence[str], expected: Sequence[str]) -> str:
    """What the arms' verdicts say of a statement."""
    if "helps" in verdicts:
        return "refuted"
    if all(one in expected for one in verdicts):
        return "confirmed"
    return "in part" if any(one in expected for one in verdicts) else "not shown"


@dataclass(frozen=True)
class Bench:
    """What a call shares."""

    dataset: str
    root: str
    path: str
    seeds: int
    quick: bool

    def run_of(self, name: str, arm: str, seed: int) -> Run:
        """The run of an arm. All have one name, so that the same settings in two ablations are one checkpoint."""
        ablation = ABLATIONS[name]
        fields = {**ablation.form, **ablation.only_for.get(self.dataset, {}), "train.seed": seed}
        if self.quick:
            fields |= {"train.steps": 2, "train.batch": 8, "train.micro_batch": 8}
        fields |= ablation.arms[arm]
        raw = config.dump(base_run(self.dataset, self.root, self.path, self.quick))
        return catalog.read_run(config.override(raw, [f"{key}={json.dumps(value)}" for key, value in fields.items()]))

    def measure(self, name: str) -> list[Found]:
        """Train and predict what is missing of an ablation, print its rows, and return them."""
        arms, tables = ABLATIONS[name].arms, []
        for arm in arms:
            for seed in range(self.seeds):
                note(f"{name}/{arm}, seed {seed}")
                table = predicted(self.run_of(name, arm, seed))
                tables.append(table.set_column(table.column_names.index("model"), "model", pa.repeat(arm, len(table))))
        first = self.run_of(name, ABLATIONS[name].base, 0)
        predictions = check(pa.concat_tables(tables), {n: t for n, t in tasks_of(first).items() if t.kind == "binary"})
        scored = {arm: score(predictions, arm, self.run_of(name, arm, 0)) for arm in arms}
        base = scored.pop(ABLATIONS[name].base)
        found = [compare(name, arm, shown, base) for arm, shown in scored.items()]
        for one in found:
            self.row(one, predictions)
        return found

    def row(self, one: Found, predictions: Predictions) -> None:
        gain, base = one.gains["auc"], ABLATIONS[one.ablation].base
        values = {key: float(values[0]) for key, values in one.shown.figures.items()}
        values |= {f"base_{key}": float(values[0]) for key, values in one.base.figures.items()}
        emit(
            f"ablations_lumos/{self.dataset}/{one.ablation}/{one.arm}/auc_gain",
            gain.value,
            "AUC",
            peer=f"{base}, AUC {values['base_auc']:.4f}",
            low=gain.low,
            high=gain.high,
            run={
                **settings(one.shown.run),
                **values,
                "binary_auc_gain": dataclasses.astuple(one.gains["binary_auc"]),
                "by_seed": one.shown.by_seed["auc"],
                "base_by_seed": one.base.by_seed["auc"],
                "verdict": one.verdicts["auc"],
                "users": len(predictions.users),
                "rows": len(predictions.outcomes["active"].y),
                "quick": self.quick,
            },
            machine=hardware("GPU" if torch.cuda.is_available() else None),
            packages=("torch", "numpy", "pyarrow"),
        )


def predicted(run: Run) -> pa.Table:
    """The run's prediction file of the test cuts, its yes-or-no tasks alone; trained and predicted where missing."""
    start, prepared = time.perf_counter(), prepare(run, note)
    checkpoint = steps.train(run, note)
    name = f"{checkpoint.rsplit('/', 1)[-1]}-{weights.fingerprint(checkpoint)[:6]}-ablation"
    folder = join(run.root, "predictions", name)
    place = join(folder, "predictions", "0000.parquet")
    if find(folder) is None:
        timelines, end_day = Timelines.open(prepared.timelines.uri), int(prepared.timelines.manifest["end_day"])
        stage = trained_stage(run, prepared, checkpoint, end_day)
        found = prediction_tables(stage, timelines, cut_plan(run, "test", end_day), run.name, run.train.seed)
        names = pa.array([name for name, task in tasks_of(run).items() if task.kind == "binary"])
        table = pa.concat_tables(part.filter(pc.is_in(part["behaviour"], names)) for part in found)
        write_table(place, table)
        commit(folder, {"kind": "predictions", "digest": name, "rows": table.num_rows})
        note(f"{checkpoint.rsplit('/', 1)[-1]}: {time.perf_counter() - start:.0f} s")
    file = storage(place)
    return pq.read_table(file.path, filesystem=file.filesystem)


def score(predictions: Predictions, arm: str, run: Run) -> Arm:
    """`auc`, `active_any_7_auc`, `log_loss` (of `active`) and `binary_auc` (the mean AUC of all yes-or-no tasks)."""
    sample = bootstrap.user_weights(len(predictions.users))
    found: dict[str, list[Floats]] = {"auc": [], "active_any_7_auc": [], "log_loss": [], "binary_auc": []}
    for seed in predictions.seeds("active", arm):
        auc: dict[str, Floats] = {}
        for task, rows in predictions.outcomes.items():
            known = ~np.isnan(rows.y)
            y, p, user = rows.y[known], predictions.forecasts[task, arm, seed]["p"][known], rows.user[known]
            auc[task] = daily_auc(y, p, (rows.day - rows.cut)[known], user, sample)
            if task == "active":
                terms = (log_losses(y, p), np.ones(len(y)))
                found["log_loss"].append(bootstrap.ratio_resamples(terms, user, sample))
        found["auc"].append(auc["active"])
        found["active_any_7_auc"].append(auc["active_any_7"])
        found["binary_auc"].append(bootstrap.mean_defined(list(auc.values())))
    by_seed = {key: tuple(float(one[0]) for one in values) for key, values in found.items()}
    return Arm(run, {key: np.mean(values, axis=0) for key, values in found.items()}, by_seed)


def compare(ablation: str, arm: str, shown: Arm, base: Arm) -> Found:
    gains, verdicts = {}, {}
    for key in ("auc", "binary_auc"):
        gains[key] = bootstrap.interval(shown.figures[key] - base.figures[key])
        differences = np.subtract(shown.by_seed[key], base.by_seed[key]).tolist()
        verdicts[key] = verdict(gains[key], differences)
    return Found(ablation, arm, shown, base, gains, verdicts)


def tell(found: Sequence[Found]) -> None:
    """The table of all arms, and what they say of the paper's statements, on stderr."""
    note(f"{'ablation':<23}{'arm':<17}{'AUC':<8}{'any of 7':<10}{'log loss':<10}{'gain in AUC [95 %]':<31}verdict")
    for name in dict.fromkeys(one.ablation for one in found):
        arms = [one for one in found if one.ablation == name]
        note(_line(name, ABLATIONS[name].base, arms[0].base, "base"))
        for one in arms:
            note(_line("", one.arm, one.shown, f"{_shown(one.gains['auc']):<31}{one.verdicts['auc']}"))
    note(f"\n{'statement':<50}{'verdict':<11}gain of the arms against it [95 %]")
    for statement in STATEMENTS:
        arms = [one for one in found if one.ablation == statement.ablation and one.arm in statement.arms]
        if arms:
            said = judge([one.verdicts[statement.figure] for one in arms], statement.expected)
            figures = "; ".join(f"{one.arm} {_shown(one.gains[statement.figure])}" for one in arms)
            note(f"{statement.text:<50}{said:<11}{figures}")


def _line(ablation: str, name: str, arm: Arm, rest: str) -> str:
    auc, week, loss = (float(arm.figures[key][0]) for key in ("auc", "active_any_7_auc", "log_loss"))
    return f"{ablation:<23}{name:<17}{auc:<8.4f}{week:<10.4f}{loss:<10.4f}{rest}"


def _shown(gain: Interval) -> str:
    return f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.ablations_lumos", description="What each choice of LUMOS is worth."
    )
    parser.add_argument("--dataset", choices=DATASETS, default="oulad")
    parser.add_argument("--path", default="../shared/data/oulad", help="the folder of OULAD's tables")
    parser.add_argument("--only", default=",".join(ABLATIONS), help="ablations, with commas between (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to N - 1 of every arm (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny models, two steps")
    parser.add_argument("--root", default="runs/bench", help="where the artifacts are")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop after this long (0: never)")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in ABLATIONS]:
        parser.error(f"--only: expected some of {', '.join(ABLATIONS)}, got {', '.join(unknown)}")
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    bench = Bench(options.dataset, options.root, options.path, options.seeds, options.quick)
    found: dict[str, list[Found]] = {}
    with time_limit(options.max_minutes) as over:
        for name in wanted:
            found[name] = bench.measure(name)
    for line in over:
        note(f"{line}; left out: {', '.join(name for name in wanted if name not in found)}")
    tell([one for part in found.values() for one in part])
    if options.quick:
        note("\n--quick: models of two steps; none of this says anything")
    return int(len(found) < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
