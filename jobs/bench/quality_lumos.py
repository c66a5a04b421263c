"""LUMOS against LightGBM with hand-made features, on test days that neither has seen.

    python -m jobs.bench.quality_lumos --dataset complete_journey|oulad|simulator
        [--path FOLDER] [--seeds N] [--max-minutes M] [--root DIR] [--quick]

Rows `quality_lumos/<dataset>/...`:
- `<task>/auc_gain`: our mean daily AUC minus LightGBM's, the mean over our seeds; `<task>/mape_gain`: the share of
  LightGBM's MAPE that ours saves, each fed its own least-MAPE forecast. Paired 95 % intervals over users. With several
  seeds also `average/<task>/...`: the same for the mean of their forecasts.
- `floor/<task>/<metric>`: what LightGBM must reach to count as a peer (FIELD.md, section 3).
- `calendar/<model>/<task>/...`: what each gains from knowing the calendar.
- OULAD: `<seen|unseen>_<past|future>/<task>/auc_gain`; the simulator: `<task>/gap_share`, how much of the gap between
  LightGBM and the Bayes oracle ours closes.

Every model's predictions are an artifact under --root: a call computes what is missing, seed by seed, and a second one
goes on where the first stopped. Exit code 1: LightGBM missed a floor (then it is no peer), a bar was missed, or
something was left out when --max-minutes were over.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from jobs.bench.rows import emit, hardware, note
from jobs.bench.time_limit import time_limit
from lum_ray import presets
from lum_ray.artifacts import storage
from lum_ray.config import Run
from lum_ray.data.adapters.oracle import oracle
from lum_ray.data.windows import CutPlan
from lum_ray.evaluation import bootstrap, metrics, protocol, strata
from lum_ray.evaluation.boosted import MODEL
from lum_ray.evaluation.bootstrap import Interval
from lum_ray.evaluation.history import Cuts
from lum_ray.evaluation.predictions import SCHEMA, Predictions, Task, check, read_predictions
from lum_ray.evaluation.strata import Grouping
from lum_ray.steps import contest
from lum_ray.steps.contest import AVERAGE, Contest, asked_cuts, contest_tasks, with_seed
from lum_ray.steps.prepare import cut_plan, prepare, raw_tables

DATASETS = ("complete_journey", "oulad", "simulator")
TASKS = {
    "complete_journey": (
        "active", "coupon_used", "private_label", "active_any_7", "coupon_used_any_7", "private_label_any_7",
        "active_any_28", "coupon_used_any_28", "private_label_any_28",
        "spend_sum_7", "lines_sum_7", "spend_sum_28", "lines_sum_28",
    ),
    "oulad": (
        "active", "active_any_7", "submitted_any_7", "clicks_sum_7",
        "active_any_28", "submitted_any_28", "clicks_sum_28",
    ),
    "simulator": ("active", "active_any_7"),
}  # fmt: skip
# task, metric -> (figure, whether more is better). Source: FIELD.md, section 3; held at its digits.
FLOORS: dict[str, dict[tuple[str, str], tuple[str, bool]]] = {
    "complete_journey": {
        ("active_any_7", "eval/roc_auc"): ("0.830", True),
        ("active", "eval/roc_auc_pooled"): ("0.763", True),
        ("coupon_used_any_7", "eval/roc_auc"): ("0.842", True),
        ("spend_sum_7", "eval/value_if_active_mape_least"): ("0.851", False),
        ("spend_sum_7", "eval/value_if_active_mae"): ("36.5", False),
    },
    "oulad": {
        ("active", "eval/roc_auc_day_1"): ("0.864", True),
        ("active", "eval/roc_auc_day_4"): ("0.849", True),
        ("active", "eval/roc_auc_day_7"): ("0.830", True),
        ("active_any_7", "eval/roc_auc"): ("0.912", True),
        ("active", "eval/brier_day_1"): ("0.123", False),
        ("clicks_sum_7", "eval/mae"): ("20.4", False),
    },
    "simulator": {},
}
ORACLE, LEAST_GAP_SHARE = "oracle", 0.5
CALENDAR_TASKS = ("active", "active_any_7")
QUADRANT_TASKS = ("active", "active_any_7", "submitted_any_7")
LEAST_AUC_GAIN = -0.005
"""The bar: the lower end of the interval of every AUC task."""


def contest_run(dataset: str, root: str, path: str | None, quick: bool) -> Run:
    """The preset of the contest over the artifacts under `root`; `quick`: tiny, to see that it works."""
    run = {
        "complete_journey": presets.lumos_complete_journey,
        "oulad": presets.lumos_oulad,
        "simulator": presets.lumos_simulator,
    }[dataset]()
    source, section, train = run.data.source, run.section, run.train
    assert source is not None
    source = dataclasses.replace(source, path=path if path is not None else source.path)
    if quick:
        small = {"users": 200, "shards": 1} if dataset == "simulator" else {}
        source = dataclasses.replace(source, options={**source.options, **small})
        section = dataclasses.replace(section, history_days=56, width=16, heads=2, encoder_heads=None, swiglu_width=16,
                                      embed_width=16, cuts_per_window=2, cut_stride_days=14)  # fmt: skip
        train = dataclasses.replace(train, steps=3, batch=16, micro_batch=16, validate_users=50)
    data = dataclasses.replace(run.data, source=source, engine="local")
    return dataclasses.replace(run, root=root, data=data, section=section, train=train)


@dataclass
class Bench:
    """What a call shares: its run, which rows it prints, and which bars were missed."""

    dataset: str
    run: Run
    quick: bool
    missed: list[str] = field(default_factory=list)

    def row(
        self, what: str, at: Interval, unit: str, shown: Mapping[str, Any], peer: str | None, ratio: float | None = None
    ) -> None:
        """Print one figure of the dataset."""
        emit(
            f"quality_lumos/{self.dataset}/{what}",
            at.value,
            unit,
            peer=peer,
            ratio=ratio,
            low=at.low,
            high=at.high,
            run={"name": self.run.name, "quick": self.quick, **shown},
            machine=hardware("GPU" if torch.cuda.is_available() else None),
            packages=("torch", "lightgbm", "numpy", "pyarrow"),
        )

    def miss(self, text: str) -> None:
        """Remember a missed bar; a quick call has none."""
        if not self.quick:
            self.missed.append(text)

    def floors(self, found: Contest) -> None:
        """Whether LightGBM reaches the floors that make it a peer."""
        figures = {(row["task"], row["metric"]): row for row in found.table.to_pylist() if row["model"] == MODEL}
        if self.dataset == "oulad":
            figures |= self.oulad_figures(found)
        for (task, metric), (text, more) in FLOORS[self.dataset].items():
            row, floor = figures[task, metric], float(text)
            value = round(row["value"], len(text.partition(".")[2]))
            reached = value >= floor if more else value <= floor
            at = Interval(row["value"], row["low"], row["high"])
            name = metric.removeprefix("eval/")
            self.row(f"floor/{task}/{name}", at, name, {"reached": reached}, f"floor: {text}", row["value"] / floor)
            if not reached:
                self.miss(f"LightGBM is no peer: {task} {name} {row['value']:.4f}, its floor is {text}")

    def oulad_figures(self, found: Contest) -> dict[tuple[str, str], dict[str, Any]]:
        """Two figures of LightGBM that the contest has not: its Brier score of the first day, and the error of the
        week's clicks over all students, idle ones too, by a model trained for that."""
        rows = found.predictions.outcomes["active"]
        (seed,) = found.predictions.seeds("active", MODEL)
        first = (rows.day == rows.cut) & ~np.isnan(rows.y)
        p = found.predictions.forecasts["active", MODEL, seed]["p"]
        weights = bootstrap.user_weights(len(found.predictions.users))
        terms = metrics.brier_terms(rows.y[first], p[first])
        brier = bootstrap.interval(bootstrap.ratio_resamples(terms, rows.user[first], weights))
        tasks = {"clicks_sum_7": Task("count", horizon=True)}
        uris = contest.peer(self.run, tasks, note, model=f"{MODEL}_all_rows")
        table = protocol.evaluate(read_predictions(uris, tasks), tasks).to_pylist()
        return {
            ("active", "eval/brier_day_1"): dataclasses.asdict(brier),
            ("clicks_sum_7", "eval/mae"): next(row for row in table if row["metric"] == "eval/mae"),
        }

    def gains(self, found: Contest) -> None:
        """Ours against LightGBM, task by task, and the same for the average of our seeds."""
        rows = {(row["model"], row["task"], row["metric"]): row for row in found.table.to_pylist()}
        everyone = [(found.ours, "")]
        if (averaged := f"{found.ours}_{AVERAGE}") in found.predictions.models:
            everyone.append((averaged, "average/"))
        for model, where in everyone:
            table = strata.compare(found.predictions, found.tasks, [strata.everybody(found.cuts)], model, MODEL)
            gains = []
            for row in table.to_pylist():
                if row["by"] != strata.EVERY or row["gain"] is None:
                    continue
                auc = row["metric"] == strata.AUC
                at = Interval(row["gain"], row["low"], row["high"])
                seeds = rows[model, row["task"], row["metric"]]
                shown = {"ours": row["ours"], "peer": row["peer"], "metric": row["metric"], "n": row["n"],
                         "users": row["users"], "seeds": seeds["seeds"], "seed_sd": seeds["seed_sd"]}  # fmt: skip
                named = f"{MODEL}: {row['peer']:.4f}"
                what = f"{where}{row['task']}/{'auc' if auc else 'mape'}_gain"
                self.row(what, at, "AUC" if auc else "share of MAPE", shown, named, row["ours"] / row["peer"])
                if auc:
                    gains.append(at.value)
                if auc and not where and at.low < LEAST_AUC_GAIN:
                    self.miss(f"{row['task']}: the gain is {at.value:+.4f} [{at.low:+.4f}, {at.high:+.4f}]")
            mean = float(np.mean(gains))
            self.row(f"{where}mean/auc_gain", Interval(mean, mean, mean), "AUC", {"tasks": len(gains)}, MODEL)

    def calendar(self, found: Contest) -> None:
        """What the calendar is worth to each model."""
        for row in found.worth.to_pylist() if found.worth is not None else []:
            auc = row["metric"] == strata.AUC
            who = "ours" if row["model"] == found.ours else row["model"]
            what = f"calendar/{who}/{row['task']}/{'auc' if auc else 'mape'}_gain"
            at = Interval(row["gain"], row["low"], row["high"])
            shown = {"with_calendar": row["with_calendar"], "without": row["without"]}
            self.row(what, at, "AUC" if auc else "share of MAPE", shown, f"without: {row['without']:.4f}")

    def quadrants(self, found: Contest, seeds: Sequence[int]) -> None:
        """Both models on seen and unseen students, on past presentations and the one to come.

        Past: 2013J, on days between those of validation; unseen there are the students held out for validation (which
        chose the best weights and the number of trees). Future: 2014B; seen are those who had been enrolled before.
        """
        run, prepared = self.run, prepare(self.run)
        end_day = int(prepared.timelines.manifest["end_day"])
        held, known = (cut_plan(run, part, end_day) for part in ("validate", "train"))
        past = CutPlan(held.from_day + 7, held.until_day, 14, 0, held.segment_column, held.segments)
        tasks = contest_tasks(run, QUADRANT_TASKS)
        uris = contest.peer(run, tasks, note, plans=(past,))
        for seed in seeds:
            uris += contest.ours(with_seed(run, seed), tasks, note, plans=(past,))
        cuts = asked_cuts(run, prepared, past)
        self.quadrant_rows(read_predictions(uris, tasks), tasks, halves("past", cuts, known.users(cuts.rows)))
        everyone = contest.everybody(prepared)
        students = {student(user) for user in everyone.user[known.users(everyone)].tolist()}
        again = np.array([student(user) in students for user in found.cuts.rows.user.tolist()])
        self.quadrant_rows(found.predictions, found.tasks, halves("future", found.cuts, again))

    def quadrant_rows(self, predictions: Predictions, tasks: Mapping[str, Task], grouping: Grouping) -> None:
        chosen = {name: task for name, task in tasks.items() if name in QUADRANT_TASKS}
        for row in strata.compare(predictions, chosen, [grouping], self.run.name, MODEL).to_pylist():
            if row["by"] == grouping.title and row["gain"] is not None:
                at = Interval(row["gain"], row["low"], row["high"])
                shown = {name: row[name] for name in ("ours", "peer", "n", "users")}
                what = f"{row['group']}_{grouping.title}/{row['task']}/auc_gain"
                self.row(what, at, "AUC", shown, f"{MODEL}: {row['peer']:.4f}", row["ours"] / row["peer"])

    def oracle_gap(self, found: Contest) -> None:
        """How much of the gap between LightGBM and the Bayes oracle ours closes, on the simulator."""
        place = storage(raw_tables(self.run)[0].events.removesuffix("/events"))
        asked = found.predictions.outcomes["active"]
        users = set(found.predictions.users.tolist())
        exact = oracle(
            place.path, place.filesystem, sorted(set(asked.cut.tolist())), self.run.section.future_days, users
        )
        tables = [exact.as_predictions(ORACLE)]
        tables += [pq.read_table(place.path, filesystem=place.filesystem) for place in map(storage, found.files)]
        keys = ["user", "cut_day", "day", "behaviour"]
        ours = next(table for table in tables[1:] if table["model"][0].as_py() == found.ours)
        tables[0] = tables[0].join(ours.select(keys), keys, join_type="inner").select(SCHEMA.names).cast(SCHEMA)
        names = pa.array(list(TASKS["simulator"]))
        tables = [table.filter(pc.is_in(table["behaviour"], names)) for table in tables]
        predictions = check(pa.concat_tables(tables), found.tasks)
        weights = bootstrap.user_weights(len(predictions.users))
        for task in TASKS["simulator"]:
            rows = predictions.outcomes[task]
            auc = {}
            for model in (found.ours, MODEL, ORACLE):
                runs = []
                for seed in predictions.seeds(task, model):
                    p = predictions.forecasts[task, model, seed]["p"]
                    by_day = bootstrap.grouped_auc_resamples(rows.y, p, rows.day - rows.cut, rows.user, weights)
                    runs.append(bootstrap.mean_defined(list(by_day.values())))
                auc[model] = np.mean(runs, axis=0)
            share = bootstrap.interval((auc[found.ours] - auc[MODEL]) / (auc[ORACLE] - auc[MODEL]))
            shown = {model: float(values[0]) for model, values in auc.items()}
            self.row(f"{task}/gap_share", share, "share of the gap", shown, f"{ORACLE}: {auc[ORACLE][0]:.4f}")
            if share.value < LEAST_GAP_SHARE:
                self.miss(f"{task}: {share.value:.2f} of the gap to the oracle, expected {LEAST_GAP_SHARE}")

    def tasks(self) -> dict[str, Task]:
        """The tasks of the dataset's contest."""
        return contest_tasks(self.run, TASKS[self.dataset])


def student(user: str) -> str:
    """Who an enrolment of OULAD is of: `AAA_2013J_11391` is one of student 11391."""
    return user.rsplit("_", 1)[-1]


def halves(title: str, cuts: Cuts, seen: np.ndarray[Any, np.dtype[np.bool_]]) -> Grouping:
    """Seen and unseen users, from whether each row of `cuts` was seen."""
    row = cuts.samples.row
    return Grouping(
        title, ("seen", "unseen"), cuts.rows.user[row], cuts.samples.cut.astype(np.int64), np.where(seen, 0, 1)[row]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.quality_lumos", description="LUMOS against LightGBM.")
    parser.add_argument("--dataset", choices=DATASETS, default="complete_journey")
    parser.add_argument("--path", help="the folder of OULAD's tables (default: ../shared/data/oulad)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to N - 1 of our model (default: 1)")
    parser.add_argument("--root", default="runs/bench", help="where the artifacts are")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop after this long (0: never)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a tiny model, no bars")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    path = options.path or ("../shared/data/oulad" if options.dataset == "oulad" else None)
    bench = Bench(options.dataset, contest_run(options.dataset, options.root, path, options.quick), options.quick)
    left_out = [f"seed {seed}" for seed in range(options.seeds)]
    left_out += ["the worth of the calendar"] if options.dataset != "simulator" else []
    with time_limit(options.max_minutes) as over:
        contest.peer(bench.run, bench.tasks(), note)
        for seed in range(options.seeds):
            contest.ours(with_seed(bench.run, seed), bench.tasks(), note)
            left_out.remove(f"seed {seed}")
        if left_out:
            contest.blind(bench.run, contest_tasks(bench.run, CALENDAR_TASKS), note)
            left_out.clear()
    for line in over:
        note(f"{line}; left out: {', '.join(left_out)}")
    done = [seed for seed in range(options.seeds) if f"seed {seed}" not in left_out]
    if not done:
        return 1
    calendar = CALENDAR_TASKS if options.dataset != "simulator" and not left_out else ()
    found = contest.contest(bench.run, note, TASKS[options.dataset], done, calendar=calendar)
    bench.floors(found)
    bench.gains(found)
    bench.calendar(found)
    if options.dataset == "oulad":
        bench.quadrants(found, done)
    if options.dataset == "simulator":
        bench.oracle_gap(found)
    note(f"report: {found.uri}/report.html")
    for line in bench.missed:
        note(f"missed: {line}")
    return int(bool(bench.missed or left_out))


if __name__ == "__main__":
    sys.exit(main())
