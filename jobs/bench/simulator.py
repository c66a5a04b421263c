"""Trained on worlds whose truth is known: how far from the Bayes oracle, and what is found where nothing is.

    python -m jobs.bench.simulator [--what oracle,null,yearly,treatment] [--quick] [--root DIR] [--max-minutes N]

Rows (bars in BARS): simulator/oracle/active_auc_gap and active_any_7_auc_gap (the oracle's AUC minus ours on the same
rows), simulator/null/tasks_above_constant, brier_excess and log_loss_excess, simulator/yearly/attention_ratio,
simulator/treatment/effect and effect_active_days. Exit code 1 if a bar is missed or a part was left out for want of
time. Each trained configuration is an artifact under --root: a second call trains nothing, and one that was stopped
goes on where it was. --quick is a smoke test: tiny models, no bars.

Legend: n rows of predictions, N users, R resamples, M heads, F future days, T history days.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from jobs.bench.rows import emit, hardware, note
from jobs.bench.time_limit import time_limit
from lum_ray import presets, steps
from lum_ray.artifacts import join, storage
from lum_ray.config import Run, Source, Split, Subset
from lum_ray.data.adapters.oracle import oracle, read_world
from lum_ray.data.adapters.worlds import World
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.evaluation import bootstrap, metrics
from lum_ray.evaluation.bootstrap import Interval, Weights
from lum_ray.evaluation.metrics import Floats, Ints
from lum_ray.evaluation.predictions import SCHEMA, Predictions, check
from lum_ray.stage import to_device
from lum_ray.steps.evaluate import by_cohort
from lum_ray.steps.predict import trained_stage
from lum_ray.steps.prepare import prepare, raw_tables
from lum_ray.steps.train import tasks_of

ORACLE = "oracle"
SHARE = "active_share_84"
COHORTS = {"treatment": 0.5, "control": 0.5}
NEAR_DAYS = (3, 10)
"""Days of nearly equal lag: this far before or after an event."""
PICTURE_BATCH = 32
BARS: dict[str, tuple[str, Callable[[Interval, float], bool]]] = {
    "simulator/oracle/active_auc_gap": ("at most 0.01", lambda at, _: at.value <= 0.01),
    "simulator/oracle/active_any_7_auc_gap": ("at most 0.01", lambda at, _: at.value <= 0.01),
    "simulator/null/tasks_above_constant": ("0", lambda at, _: at.value == 0),
    "simulator/null/brier_excess": ("not under 0 by more than its interval", lambda at, _: at.high >= 0),
    "simulator/null/log_loss_excess": ("not under 0 by more than its interval", lambda at, _: at.high >= 0),
    "simulator/yearly/attention_ratio": ("more than 1 (aim: 3)", lambda at, _: at.value > 1),
    "simulator/treatment/effect": ("the planted effect in it", lambda at, peer: at.low <= peer <= at.high),
    "simulator/treatment/effect_active_days": ("the planted effect in it", lambda at, peer: at.low <= peer <= at.high),
}


def signal_run(root: str, quick: bool) -> Run:
    """Rhythms, a yearly festival, matches and churn; a treatment in the last seven days."""
    return _sized(presets.lumos_simulator(), "simulator_signal", root, quick, {})


def null_run(root: str, quick: bool) -> Run:
    """Activity and spends without any signal."""
    run = presets.lumos_simulator()
    section = dataclasses.replace(run.section, history_days=84, cuts_per_window=6, width=32, swiglu_width=64)
    run = dataclasses.replace(run, section=section, train=dataclasses.replace(run.train, steps=250, micro_batch=32))
    return _sized(run, "simulator_null", root, quick, {"world": "null", "treatment_odds": 1.0})


def yearly_run(root: str, quick: bool) -> Run:
    """Three yearly festivals; only a user's reaction a year ago tells how the user will react.

    All cuts of a window must see the same festival a year before, so they lie close together at its end.
    """
    run = presets.lumos_simulator()
    run = dataclasses.replace(
        run,
        split=Split(
            validate_from="2024-06-10",
            train=Subset(from_day="2023-02-15"),
            validate=Subset(from_day="2024-06-10", until_day="2024-06-20", every_days=5),
            test=Subset(from_day="2024-07-05", until_day="2024-11-20", every_days=138),
        ),
        section=dataclasses.replace(run.section, history_days=406, cuts_per_window=8, cut_stride_days=4),
        train=dataclasses.replace(run.train, steps=250),
    )
    return _sized(run, "simulator_yearly", root, quick, {"world": "yearly", "treatment_odds": 1.0})


def _sized(run: Run, name: str, root: str, quick: bool, options: Mapping[str, Any]) -> Run:
    assert run.data.source is not None
    options = {**run.data.source.options, **options}
    section, train = run.section, run.train
    if quick:
        options |= {"users": 120, "shards": 1, "activity": 0.3}
        days = section.history_days if section.history_days > 400 else 28
        small = {"width": 8, "heads": 2, "swiglu_width": 8, "embed_width": 8, "cuts_per_window": 2}
        section = dataclasses.replace(section, history_days=days, **small)
        train = dataclasses.replace(train, steps=2, batch=8, micro_batch=8, validate_users=8)
    data = dataclasses.replace(run.data, source=Source("simulator", options=options), engine="local")
    return dataclasses.replace(run, name=name, root=root, data=data, section=section, train=train)


def daily_auc(y: Floats, p: Floats, offset: Ints, user: Ints, weights: Weights) -> Floats:
    """(R + 1,) of the AUC of each day ahead, averaged over the days."""
    return bootstrap.mean_defined(list(bootstrap.grouped_auc_resamples(y, p, offset, user, weights).values()))


def above_half(resamples: Floats, tests: int) -> bool:
    """Whether an AUC lies above 0.5 at the level of 5 % over `tests` of them (Bonferroni, two-sided, normal)."""
    known = resamples[1:][~np.isnan(resamples[1:])]
    return float(resamples[0]) - _bonferroni(tests) * float(known.std(ddof=1)) > 0.5


def _bonferroni(tests: int) -> float:
    return NormalDist().inv_cdf(1 - 0.05 / (2 * tests))


def excess(terms: tuple[Floats, Floats], user: Ints, weights: Weights, tests: int) -> Interval:
    """Mean of our loss minus the constant's, over rows, with an interval of 95 % over all `tests` of them."""
    resamples = bootstrap.ratio_resamples((terms[0] - terms[1], np.ones(len(user))), user, weights)
    half = _bonferroni(tests) * float(resamples[1:].std(ddof=1))
    return Interval(float(resamples[0]), float(resamples[0]) - half, float(resamples[0]) + half)


def log_losses(y: Floats, p: Floats) -> Floats:
    """-log of the probability of what happened, cut off at 1e-6."""
    return np.asarray(-np.log(np.clip(np.where(y > 0.5, p, 1 - p), 1e-6, None)))


def attention_pairs(world: World, cut: int, future_days: int, history_days: int) -> Iterator[tuple[int, Ints, Ints]]:
    """(future day 0.., positions of the same event a year before, positions of nearly equal lag without any event).

    Position t is day cut - history_days + t. Only days ahead with a yearly event, whose whole last occasion and its
    surroundings lie in the history, are given.
    """
    start, (low, high) = cut - history_days, NEAR_DAYS
    busy = {day for row in world.calendar for day in range(row.start, row.end + 1)}
    for ahead, row, other in itertools.product(range(future_days), world.calendar, world.calendar):
        year_apart = other.event_type == row.event_type and 350 <= row.start - other.start <= 380
        if not (row.start <= cut + ahead <= row.end and year_apart):
            continue
        around = [*range(other.start - high, other.start - low + 1), *range(other.end + low, other.end + high + 1)]
        quiet = np.array([day for day in around if day not in busy], np.int64) - start
        if around[0] >= start and around[-1] < cut and len(quiet):
            yield ahead, np.arange(other.start - start, other.end - start + 1, dtype=np.int64), quiet


@dataclass(frozen=True)
class Bench:
    """What a call shares: where artifacts are, and which bars were missed."""

    root: str
    quick: bool
    missed: list[str]

    def row(
        self, what: str, at: Interval, unit: str, run: Mapping[str, Any], peer: float | None = None, named: str = ""
    ) -> None:
        """Print a row and hold its bar against it. `peer` is the other figure of the unit, `named` what it is of."""
        emit(
            what,
            at.value,
            unit,
            peer=f"{named}: {peer:.5g}" if peer is not None else named or None,
            ratio=at.value / peer if peer else None,
            low=at.low,
            high=at.high,
            run={**run, "quick": self.quick, "bar": BARS[what][0]},
            machine=hardware("GPU" if torch.cuda.is_available() else None),
            packages=("torch", "numpy", "pyarrow"),
        )
        if not self.quick and not BARS[what][1](at, peer if peer is not None else float("nan")):
            self.missed.append(f"{what}: expected {BARS[what][0]}, got {at.value:.5g} [{at.low:.5g}, {at.high:.5g}]")

    def predictions(self, run: Run, users: int) -> tuple[pa.Table, dict[str, Any]]:
        """The prediction files of the test cuts, the baselines' too, and the settings for a row."""
        users = 40 if self.quick else users
        start = time.perf_counter()
        report = steps.evaluate(run, note, max_users=users)
        note(f"{run.name}: {report.uri} after {time.perf_counter() - start:.0f} s")
        place = storage(join(run.root, "predictions", report.uri.rsplit("/", 1)[-1] + "-test", "predictions"))
        return pq.read_table(place.path, filesystem=place.filesystem), settings(run) | {"report": report.uri}


def settings(run: Run) -> dict[str, Any]:
    """What shaped a run, for a row."""
    assert run.data.source is not None
    return {
        "name": run.name,
        "world": dict(run.data.source.options),
        "lumos": dataclasses.asdict(run.section),
        "train": dataclasses.asdict(run.train),
    }


def truth(run: Run) -> tuple[str, Any, World]:
    """Where the raw tables of a simulated world are, and the world."""
    place = storage(raw_tables(run)[0].events.removesuffix("/events"))
    return place.path, place.filesystem, read_world(place.path, place.filesystem)


def with_oracle(run: Run, table: pa.Table, names: Sequence[str]) -> Predictions:
    """`table` and the oracle's predictions of exactly its rows, for the behaviours `names`."""
    table = table.filter(pc.is_in(table["behaviour"], pa.array(names)))
    path, filesystem, _ = truth(run)
    cuts, users = sorted(set(table["cut_day"].to_pylist())), set(table["user"].to_pylist())
    exact = oracle(path, filesystem, cuts, run.section.future_days, users).as_predictions(ORACLE)
    keys = ["user", "cut_day", "day", "behaviour"]
    asked = table.filter(pc.equal(table["model"], run.name)).select(keys)
    exact = exact.join(asked, keys, join_type="inner").select(SCHEMA.names)
    return check(pa.concat_tables([table, exact.cast(SCHEMA)]), {name: tasks_of(run)[name] for name in names})


def measure_oracle(bench: Bench) -> None:
    run = signal_run(bench.root, bench.quick)
    table, shown = bench.predictions(run, 1200)
    predictions = with_oracle(run, table, ("active", "active_any_7"))
    weights = bootstrap.user_weights(len(predictions.users))
    for name in ("active", "active_any_7"):
        rows = predictions.outcomes[name]
        auc = {
            model: daily_auc(
                rows.y,
                predictions.forecasts[name, model, predictions.seeds(name, model)[0]]["p"],
                rows.day - rows.cut,
                rows.user,
                weights,
            )
            for model in (run.name, SHARE, ORACLE)
        }
        at = bootstrap.interval(auc[ORACLE] - auc[run.name])
        share = bootstrap.interval(auc[ORACLE] - auc[SHARE])
        peer = float(auc[ORACLE][0])
        shown |= {"auc": float(auc[run.name][0]), "oracle_auc": peer, "rows": len(rows.y)}
        shown |= {"share_84_gap": dataclasses.astuple(share), "users": len(predictions.users)}
        bench.row(f"simulator/oracle/{name}_auc_gap", at, "AUC", shown, named=f"Bayes oracle, AUC {peer:.4f}")


def measure_null(bench: Bench) -> None:
    run = null_run(bench.root, bench.quick)
    table, shown = bench.predictions(run, 2000)
    tasks = {name: task for name, task in tasks_of(run).items() if task.kind == "binary"}
    table = table.filter(pc.is_in(table["behaviour"], pa.array(list(tasks))))
    predictions = check(table.filter(pc.equal(table["model"], run.name)), tasks)
    weights = bootstrap.user_weights(len(predictions.users), 400)
    tests: dict[str, Floats] = {}
    excesses: dict[str, dict[str, Interval]] = {"brier": {}, "log_loss": {}}
    for name in tasks:
        rows, p = predictions.outcomes[name], predictions.forecasts[name, run.name, run.train.seed]["p"]
        known = ~np.isnan(rows.y)
        y, p, user, offset = rows.y[known], p[known], rows.user[known], (rows.day - rows.cut)[known]
        by_day = bootstrap.grouped_auc_resamples(y, p, offset, user, weights)
        tests |= {f"{name}, day {day + 1}": values for day, values in by_day.items()}
        constant = np.full(len(y), y.mean())  # in hindsight: nothing constant is better
        scores = (metrics.brier_terms(y, p)[0], metrics.brier_terms(y, constant)[0])
        excesses["brier"][name] = excess(scores, user, weights, len(tasks))
        excesses["log_loss"][name] = excess((log_losses(y, p), log_losses(y, constant)), user, weights, len(tasks))
    above = [name for name, values in tests.items() if above_half(values, len(tests))]
    highest = max(float(values[0]) for values in tests.values())
    shown |= {"users": len(predictions.users), "tests": len(tests), "above": above, "highest_auc": highest}
    count = Interval(float(len(above)), float(len(above)), float(len(above)))
    bench.row("simulator/null/tasks_above_constant", count, "tasks x days", shown, named="constant, AUC 0.5")
    for loss, found in excesses.items():
        best = min(found, key=lambda name: found[name].high)
        shown |= {"task": best, "all": {name: dataclasses.astuple(at) for name, at in found.items()}}
        bench.row(f"simulator/null/{loss}_excess", found[best], loss, shown, named="best constant in hindsight")


def measure_yearly(bench: Bench) -> None:
    run = yearly_run(bench.root, bench.quick)
    table, shown = bench.predictions(run, 600)
    predictions = with_oracle(run, table, ("active",))
    auc = {
        model: metrics.mean_daily_auc(rows.y, predictions.forecasts["active", model, 0]["p"], rows.day - rows.cut)
        for rows in [predictions.outcomes["active"]]
        for model in (run.name, ORACLE)
    }
    prepared = prepare(run)
    end_day = int(prepared.timelines.manifest["end_day"])
    stage = trained_stage(run, prepared, steps.train(run, note), end_day)
    _, _, world = truth(run)
    cuts = sorted(set(table["cut_day"].to_pylist()))
    users = set(table["user"].to_pylist())
    everybody = Timelines.open(prepared.timelines.uri)
    rows = everybody.read(np.flatnonzero(everybody.bucket_users).tolist())
    same_N, quiet_N = np.zeros(len(rows)), np.zeros(len(rows))
    per_cut: dict[int, float] = {}
    for cut in cuts:
        pairs = list(attention_pairs(world, cut, run.section.future_days, run.section.history_days))
        there = np.flatnonzero(np.isin(rows.user.astype(str), list(users)) & (rows.first_day < cut - 380))
        same, quiet = attended(stage, rows, there, cut, pairs)
        per_cut[cut] = float(same.sum() / quiet.sum()) if len(there) and pairs else float("nan")
        same_N[there] += same
        quiet_N[there] += quiet
    seen = np.flatnonzero(quiet_N > 0)
    weights = bootstrap.user_weights(len(seen))
    ratio = bootstrap.ratio_resamples((same_N[seen], quiet_N[seen]), np.arange(len(seen)), weights)
    shown |= {"users": len(seen), "by_cut": per_cut, "auc": auc[run.name], "oracle_auc": auc[ORACLE], "aim": 3.0}
    at = bootstrap.interval(ratio)
    bench.row("simulator/yearly/attention_ratio", at, "x", shown, named="days of nearly equal lag without an event")


def attended(
    stage: Any, rows: Rows, index: Ints, cut: int, pairs: Sequence[tuple[int, Ints, Ints]]
) -> tuple[Floats, Floats]:
    """For each user of `index`, over `pairs` and heads: mean attention of a day of the event, and of a quiet day."""
    same, quiet = np.zeros(len(index)), np.zeros(len(index))
    for start in range(0, len(index), PICTURE_BATCH):
        part = slice(start, start + PICTURE_BATCH)
        some = rows.take(index[part])
        samples = Samples(np.arange(len(some)), np.full(len(some), cut, np.int32), np.zeros(len(some), np.int32))
        batch = to_device(stage.collate(some, samples), next(stage.module.parameters()).device)
        with torch.no_grad():
            weights_NFT = stage.module.attention(batch).float().mean(1).cpu().numpy()
        for ahead, days, other in pairs:
            same[part] += weights_NFT[:, ahead, days].mean(1) / len(pairs)
            quiet[part] += weights_NFT[:, ahead, other].mean(1) / len(pairs)
    return same, quiet


def measure_treatment(bench: Bench) -> None:
    run = signal_run(bench.root, bench.quick)
    _, _, world = truth(run)
    planted = world.planted_effect()
    uri = steps.predict(run, note, world.treatment_from, COHORTS, world.options.salt)
    found = {(row["task"], row["estimate"]): row for row in by_cohort(run, uri, note).to_pylist()}
    for what, task, truly, days in (
        ("effect", "active_any_7", planted["active_any"], 1),
        ("effect_active_days", "active", planted["active_days"], world.options.treatment_days),
    ):
        raw, adjusted = (found[task, f"eval/cohort_difference{kind}"] for kind in ("", "_adjusted"))
        at = Interval(*(adjusted[name] * days for name in ("value", "low", "high")))
        shown = settings(run) | {"estimate": "adjusted by the prediction", "task": task, "predictions": uri}
        shown |= {"unadjusted": [raw[name] * days for name in ("value", "low", "high")]}
        shown |= {name: adjusted[name] for name in ("n_treatment", "n_control")}
        unit = "share of users" if what == "effect" else "days a user"
        bench.row(f"simulator/treatment/{what}", at, unit, shown, peer=truly, named="planted effect")


PARTS = {"oracle": measure_oracle, "null": measure_null, "yearly": measure_yearly, "treatment": measure_treatment}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.simulator", description="LUMOS where the truth is known."
    )
    parser.add_argument("--what", default=",".join(PARTS), help="parts, with commas between (default: all)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny models, no bars")
    parser.add_argument("--root", default="runs/bench", help="where the artifacts are")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop after this long (0: never)")
    options = parser.parse_args(arguments)
    wanted = options.what.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--what: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    bench = Bench(options.root, options.quick, [])
    done: list[str] = []
    with time_limit(options.max_minutes) as over:
        for name in wanted:
            start = time.perf_counter()
            PARTS[name](bench)
            done.append(name)
            note(f"{name}: {time.perf_counter() - start:.0f} s")
    for line in over:
        note(f"{line}; left out: {', '.join(name for name in wanted if name not in done)}")
    for line in bench.missed:
        note(line)
    return int(bool(bench.missed) or len(done) < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
