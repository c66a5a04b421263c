"""Whether x what: the expected lines of an item on a day, by both models, against the household's own habits.

    python -m jobs.bench.whether_what [--users N] [--steps N] [--gts-steps N] [--max-minutes N] [--quick] [--root DIR]

Complete Journey; 7 days from each test cut, the whole catalogue of product types. Expected lines of an item on a day =
P(active) E[lines | active] share(item): the first two are LUMOS's (`mean` of its prediction files), the share is the
softmax of GTS-LUM's scores (reading R) over a temperature. The peer: the household's own lines a day over the 84 days
before the cut, and its own share of them by item, both drawn to the average household's. Temperature, and how much is
drawn, are chosen on validation cuts.

Rows `whether_what/<rate>_<share>/deviance_gain`: the share of the peer's Poisson deviance that is saved, all four pairs
of a rate and a share, over household x item x day, with paired intervals over households. The deviance of all items of
a day has a short form, because shares add up to 1: no item is left out. Predictions are artifacts under --root. Exit
code 1: the interval of `lumos_gts` is not above 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from jobs.bench.question_readings_gts import Trained
from jobs.bench.questions_gts import question_run
from jobs.bench.rows import emit, hardware, note
from jobs.bench.time_limit import time_limit
from lum_ray import presets
from lum_ray.artifacts import list_files
from lum_ray.config import Run, Subset, day_number
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Int64, Rows, Samples
from lum_ray.evaluation.bootstrap import Interval, interval, ratio_resamples, user_weights
from lum_ray.stage import to_device
from lum_ray.steps.contest import ours
from lum_ray.steps.train import tasks_of

Floats = npt.NDArray[np.float64]
Pairs = set[tuple[str, int]]
FIRST_TEST, LAST_TEST, EVERY_DAYS = "2017-11-01", "2017-12-13", 14
VALIDATE = ("2017-09-20", "2017-09-27")
DAYS, HABIT_DAYS, BATCH = 7, 84, 64
HOUSEHOLDS = 2469
TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
DRAWN_DAYS = (1.0, 3.0, 7.0, 14.0, 28.0)
"""Of the average household's rate, added to the days of a household's own."""
DRAWN_LINES = (10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
"""Of the average share, added to the lines of a household's own."""


@dataclass(frozen=True)
class Asked:
    """S pairs of a household and a cut; their known lines over the days after it: for each distinct (pair, day, item)
    `pair_K`, `day_K`, `item_K` and `lines_K`, and the lines of each day (S, D)."""

    rows: Rows
    samples: Samples
    pair_K: Int64
    day_K: Int64
    item_K: Int64
    lines_K: Floats
    lines_SD: Floats

    @staticmethod
    def of(rows: Rows, cuts: Sequence[int], item_A: Int64, count: int, only: Pairs | None = None) -> Asked:
        """Every household of `rows` that was there before a cut, and is in `only`; `item_A`: its events' items."""
        row, cut = (part.ravel() for part in np.meshgrid(np.arange(len(rows)), np.array(cuts), indexing="ij"))
        there = rows.first_day[row] < cut
        if only is not None:
            there &= np.array([pair in only for pair in zip(rows.user[row].tolist(), cut.tolist(), strict=True)])
        row, cut = row[there], cut[there]
        begin, end = rows.span(row, cut, cut + DAYS)
        pair = np.repeat(np.arange(len(row)), end - begin)
        event = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)] or [np.zeros(0, np.int64)])
        known = item_A[event] >= 0
        pair, event = pair[known], event[known]
        day = rows.days[event] - cut[pair]
        key, lines = np.unique((pair * DAYS + day) * count + item_A[event], return_counts=True)
        of_day = key // count
        lines_SD = np.bincount(of_day, lines, len(row) * DAYS).reshape(len(row), DAYS)
        samples = Samples(row.astype(np.int64), cut.astype(np.int32), np.zeros(len(row), np.int32))
        return Asked(rows, samples, of_day // DAYS, of_day % DAYS, key % count, lines.astype(np.float64), lines_SD)


def deviance(asked: Asked, rate_SD: Floats, log_share_K: Floats) -> Floats:
    """Twice the log-likelihood that each pair's days lack of a perfect forecast, over all items (S,).

    Sum over items of y log(y / mu) - (y - mu) with mu = rate * share; the shares of a pair add up to 1.
    """
    rate_K = rate_SD[asked.pair_K, asked.day_K]
    one_K = asked.lines_K * (np.log(asked.lines_K) - np.log(rate_K) - log_share_K)
    return np.asarray(
        2 * (np.bincount(asked.pair_K, one_K, len(rate_SD)) - (asked.lines_SD - rate_SD).sum(axis=1)), np.float64
    )


def habits(asked: Asked, item_A: Int64, share_N: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """What a household's own 84 days say: days observed and lines (S,), and, at the K taken items, its lines of that
    item and the average share of it."""
    rows, samples = asked.rows, asked.samples
    start = samples.cut - HABIT_DAYS
    begin, end = rows.span(samples.row, start, samples.cut)
    days = np.clip(samples.cut - rows.first_day[samples.row], 1, HABIT_DAYS).astype(np.float64)
    lines, own_K = np.zeros(len(samples)), np.zeros(len(asked.pair_K))
    of_pair = np.searchsorted(asked.pair_K, np.arange(len(samples) + 1))
    for pair, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        counts = np.bincount(item_A[first:last][item_A[first:last] >= 0], minlength=len(share_N))
        lines[pair] = counts.sum()
        part = slice(of_pair[pair], of_pair[pair + 1])
        own_K[part] = counts[asked.item_K[part]]
    return days, lines, own_K, share_N[asked.item_K]


def log_shares(trained: Trained, asked: Asked, temperatures: Sequence[float]) -> Floats:
    """log softmax(R's scores / temperature) (T, K) at the taken items."""
    stage, result = trained.stage, np.zeros((len(temperatures), len(asked.pair_K)))
    of_pair = np.searchsorted(asked.pair_K, np.arange(len(asked.samples) + 1))
    for start in range(0, len(asked.samples), BATCH):
        some = np.arange(start, min(start + BATCH, len(asked.samples)))
        chosen, row = np.unique(asked.samples.row[some], return_inverse=True)
        samples = Samples(row.astype(np.int64), asked.samples.cut[some], asked.samples.draw[some])
        batch = to_device(stage.questions(asked.rows.take(chosen), samples), torch.device("cpu"))
        with torch.no_grad():
            scores = stage.scores(batch).double()
        part = slice(of_pair[some[0]], of_pair[some[-1] + 1])
        at = torch.from_numpy(asked.pair_K[part] - start), torch.from_numpy(asked.item_K[part])
        for place, temperature in enumerate(temperatures):
            result[place, part] = (scores / temperature).log_softmax(dim=1)[at].numpy()
    return result


def lumos_rates(run: Run) -> dict[tuple[str, int, int], float]:
    """(household, cut, day) -> the expected lines of that day, by LUMOS's prediction files of the test cuts."""
    result: dict[tuple[str, int, int], float] = {}
    for file in [file for uri in ours(run, {"lines": tasks_of(run)["lines"]}, note) for file in list_files(uri)]:
        if file.endswith(".parquet"):
            table = pq.read_table(file, columns=["user", "cut_day", "day", "mean"])
            keys = zip(*(table[name].to_pylist() for name in ("user", "cut_day", "day")), strict=True)
            result.update(zip(keys, table["mean"].to_pylist(), strict=True))
    return result


def lumos_run(root: str, users: int, steps: int, quick: bool) -> Run:
    """`lumos_demo`, shorter, with a test cut every other week for about `users` households."""
    run = presets.lumos_demo()
    section, train = run.section, dataclasses.replace(
        run.train, steps=steps, validate_every=min(run.train.validate_every, steps), checkpoint_every=steps
    )  # fmt: skip
    if quick:
        section = dataclasses.replace(section, history_days=56, width=16, heads=2, swiglu_width=16, embed_width=16,
                                      cuts_per_window=2, cut_stride_days=14)  # fmt: skip
        train = dataclasses.replace(train, batch=16, micro_batch=16, validate_users=50)
    some = (0.0, min(1.0, users / HOUSEHOLDS))
    test = Subset(from_day=FIRST_TEST, until_day=LAST_TEST, every_days=EVERY_DAYS, users=some)
    data = dataclasses.replace(run.data, engine="local")
    split = dataclasses.replace(run.split, test=test)
    return dataclasses.replace(
        run, name="whether_what", root=root, data=data, split=split, section=section, train=train
    )


def contest(lumos: Run, gts: Run, quick: bool) -> bool:
    """Print the rows; whether the pair of both models beats the peer."""
    rates = lumos_rates(lumos)
    trained = Trained.of(gts)
    timelines, chosen = Timelines.open(trained.prepared.sequences.uri), {user for user, _, _ in rates}
    parts = []
    for bucket in np.flatnonzero(timelines.bucket_users).tolist():
        rows = timelines.read([bucket])
        parts.append(rows.take(np.array([at for at, user in enumerate(rows.user.tolist()) if user in chosen], int)))
    rows = Rows.concat(parts)
    item_A = trained.prepared.catalogue.index_of(rows.values[:, 0])
    share_N = np.exp(trained.stage.inputs.arrays["log_q_N"].astype(np.float64))
    share_N /= share_N.sum()
    tests = range(day_number(FIRST_TEST), day_number(LAST_TEST) + 1, EVERY_DAYS)
    validate = Asked.of(rows, list(map(day_number, VALIDATE)), item_A, len(share_N))
    # LUMOS asks about no household within four weeks of its first day
    test = Asked.of(rows, tests, item_A, len(share_N), {(user, cut) for user, cut, _ in rates})
    kept = [(rows.user[row], int(cut)) for row, cut in zip(test.samples.row, test.samples.cut, strict=True)]
    lumos_SD = np.array([[max(rates[user, cut, cut + day], 1e-4) for day in range(DAYS)] for user, cut in kept])

    # chosen on validation
    days, lines, own_K, average_K = habits(validate, item_A, share_N)
    mean_rate = float(lines.sum() / days.sum())

    def own_rate(drawn: float, days: Floats, lines: Floats) -> Floats:
        return np.repeat(((lines + drawn * mean_rate) / (days + drawn))[:, None], DAYS, axis=1)

    def own_share(drawn: float, lines_K: Floats, own_K: Floats, average_K: Floats) -> Floats:
        return np.asarray(np.log((own_K + drawn * average_K) / (lines_K + drawn)))

    flat = np.log(average_K)
    drawn_days = min(DRAWN_DAYS, key=lambda drawn: deviance(validate, own_rate(drawn, days, lines), flat).sum())
    lines_K = lines[validate.pair_K]
    drawn_lines = min(
        DRAWN_LINES, key=lambda drawn: -(validate.lines_K * own_share(drawn, lines_K, own_K, average_K)).sum()
    )
    likelihood = log_shares(trained, validate, TEMPERATURES) @ validate.lines_K
    temperature = TEMPERATURES[int(likelihood.argmax())]
    note(
        f"chosen on validation: temperature {temperature:g}, {drawn_days:g} days and {drawn_lines:g} lines of the rest"
    )

    days, lines, own_K, average_K = habits(test, item_A, share_N)
    rate_SD = {"lumos": lumos_SD, "own": own_rate(drawn_days, days, lines)}
    share_K = {
        "gts": log_shares(trained, test, [temperature])[0],
        "own": own_share(drawn_lines, lines[test.pair_K], own_K, average_K),
        "average": np.log(average_K),
    }
    found = {(rate, share): deviance(test, rate_SD[rate], share_K[share]) for rate in rate_SD for share in share_K}
    weights = user_weights(len(rows))
    base = found["own", "own"]
    note(f"\n{len(test.samples):,} pairs of {len(np.unique(test.samples.row)):,} households and a cut, 7 days each")
    note("| rate | share | deviance a household and day | saved of the peer's |\n|---|---|---|---|")
    met = False
    for (rate, share), values in found.items():
        gain = interval(ratio_resamples((base - values, base), test.samples.row, weights))
        shown = f"{100 * gain.value:+.1f} % [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
        shown = "the peer" if (rate, share) == ("own", "own") else shown
        note(f"| {rate} | {share} | {values.mean() / DAYS:.2f} | {shown} |")
        if (rate, share) != ("own", "own"):
            about = {"deviance": float(values.mean() / DAYS), "temperature": temperature, "pairs": len(values),
                     "drawn_days": drawn_days, "drawn_lines": drawn_lines}  # fmt: skip
            _row(rate, share, gain, lumos, gts, quick, about, float(base.mean() / DAYS))
        met = met or ((rate, share) == ("lumos", "gts") and gain.low > 0)
    return met


def _row(
    rate: str, share: str, gain: Interval, lumos: Run, gts: Run, quick: bool, shown: dict[str, Any], peer: float
) -> None:
    about = {"lumos_steps": lumos.train.steps, "gts_steps": gts.train.steps, "gts": dataclasses.asdict(gts.section),
             "quick": quick, **shown}  # fmt: skip
    emit(f"whether_what/{rate}_{share}/deviance_gain", gain.value, "share of the Poisson deviance",
         peer=f"own rate x own share: {peer:.4f}", low=gain.low, high=gain.high, run=about, machine=hardware(),
         packages=("torch", "transformers", "numpy", "pyarrow"))  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.whether_what", description="Both models together against a household's habits."
    )
    parser.add_argument("--users", type=int, default=400, help="households (default: 400)")
    parser.add_argument("--steps", type=int, default=200, help="of LUMOS (default: 200)")
    parser.add_argument("--gts-steps", type=int, help="of GTS-LUM's Phase II (default: those of ablations_gts --small)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny models, two steps, no bar")
    parser.add_argument("--root", default="runs/bench", help="where the artifacts are")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop after this long (0: never)")
    options = parser.parse_args(arguments)
    if min(options.users, options.steps) < 1:
        parser.error(f"--users, --steps: expected at least 1, got {options.users} and {options.steps}")
    users, steps = (30, 2) if options.quick else (options.users, options.steps)
    gts = question_run("complete_journey", options.root, options.quick)
    if options.gts_steps is not None:
        train = dataclasses.replace(gts.train, steps=options.gts_steps, validate_every=options.gts_steps,
                                    checkpoint_every=options.gts_steps)  # fmt: skip
        gts = dataclasses.replace(gts, train=train)
    met = False
    with time_limit(options.max_minutes) as over:
        met = contest(lumos_run(options.root, users, steps, options.quick), gts, options.quick)
    for line in over:
        note(line)
    return int(not met and not options.quick)


if __name__ == "__main__":
    sys.exit(main())
