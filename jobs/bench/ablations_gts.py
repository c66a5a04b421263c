"""What each of GTS-LUM's choices is worth: one changed at a time, on Complete Journey or on the planted world.

    python -m jobs.bench.ablations_gts [--dataset complete_journey|simulator] [--only timestamps,target] [--steps N]
                                       [--max-minutes N] [--small] [--quick] [--root DIR]

Rows: ablations_gts/<dataset>/<ablation>/<arm>/<figure>_gain, the arm's figure on the test cuts minus that of the
ablation's base, paired over users; on stderr the table of all arms for the README, and a verdict on each of the
paper's statements. A gain whose interval holds 0 is `no effect`. Checkpoints and rankings are artifacts under
--root: a second call makes what is missing only, and an arm that was stopped goes on from its last checkpoint. Exit
code 1 if an arm was left out for want of time.

Arms, figures and statements: `jobs/bench/ablation_arms_gts.py`.

One seed: an interval is over users and does not hold what another seed would change.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from jobs.bench.ablation_arms_gts import ABLATIONS, DATASETS, FIGURES, STATEMENTS, Fields, base_run
from jobs.bench.rows import emit, hardware, note
from jobs.bench.time_limit import time_limit
from lum_ray.artifacts import UserError
from lum_ray.config import Run
from lum_ray.evaluation.bootstrap import Interval
from lum_ray.evaluation.ranking import Rankings, evaluate_rankings, read_rankings
from lum_ray.steps.gts_evaluate import rank_gts


@dataclass(frozen=True)
class Found:
    """An arm beside its base, by figure: both values, and the arm's gain over the base. Shares, from 0 to 1."""

    ablation: str
    arm: str
    value: Mapping[str, float]
    base: Mapping[str, float]
    gain: Mapping[str, Interval]
    baskets: int
    users: int


def verdict(gain: Interval) -> str:
    """Whether an arm `helps` or `hurts`, or has `no effect`: 0 lies in the interval."""
    if gain.low > 0:
        return "helps"
    return "hurts" if gain.high < 0 else "no effect"


def judge(verdicts: Sequence[str]) -> str:
    """What the verdicts on the arms that should hurt say of a statement."""
    if "helps" in verdicts:
        return "refuted"
    if "hurts" not in verdicts:
        return "no effect"
    return "in part" if "no effect" in verdicts else "confirmed"


@dataclass(frozen=True)
class Bench:
    """What a call shares: the arms of each ablation, the first of them its base, and how its rows are called.

    `ranked`: the lists of the runs that it met, by the run in words.
    """

    dataset: str
    root: str
    steps: int | None = None
    quick: bool = False
    small: bool = False
    arms: Mapping[str, Mapping[str, Fields]] = field(default_factory=lambda: ABLATIONS)
    named: str = "ablations_gts"
    ranked: dict[str, Rankings] = field(default_factory=dict)

    def run_of(self, ablation: str, arm: str) -> Run:
        """The run of an arm. All have one name: equal settings in two ablations are one checkpoint, and arms that
        differ in Phase II alone share Phase I."""
        run = base_run(self.dataset, self.root, self.steps, self.quick, self.small)
        return dataclasses.replace(run, section=dataclasses.replace(run.section, **self.arms[ablation][arm]))

    def lists(self, ablation: str, arm: str) -> Rankings:
        """The arm's lists of the test cuts; trained and ranked where missing."""
        run = self.run_of(ablation, arm)
        if repr(run) not in self.ranked:
            note(f"{ablation}/{arm}")
            start = time.perf_counter()
            self.ranked[repr(run)] = read_rankings(lists := rank_gts(run, note))
            note(f"{ablation}/{arm}: {time.perf_counter() - start:.0f} s, {lists}")
        return self.ranked[repr(run)]

    def measure(self, ablation: str, arm: str) -> Found:
        """Make what is missing of an arm and of its base, print the arm's rows, and return them."""
        base = next(iter(self.arms[ablation]))
        found = compare(ablation, arm, self.lists(ablation, base), self.lists(ablation, arm))
        self.rows(found, base)
        return found

    def rows(self, found: Found, base: str) -> None:
        run = self.run_of(found.ablation, found.arm)
        assert run.data.source is not None
        shown: dict[str, Any] = {
            "name": run.name,
            "source": dataclasses.asdict(run.data.source),
            "gts": dataclasses.asdict(run.section),
            "train": dataclasses.asdict(run.train),
            "baskets": found.baskets,
            "users": found.users,
            "quick": self.quick,
        }
        for figure, gain in found.gain.items():
            value, reference = found.value[figure], found.base[figure]
            emit(
                f"{self.named}/{self.dataset}/{found.ablation}/{found.arm}/{figure}_gain",
                gain.value,
                FIGURES[figure].title,
                peer=f"{base}, {reference:.4f}",
                low=gain.low,
                high=gain.high,
                run={**shown, figure: value, f"base_{figure}": reference, "verdict": verdict(gain)},
                machine=hardware("GPU" if torch.cuda.is_available() else None),
                packages=("torch", "transformers", "numpy", "pyarrow"),
            )


def together(base: Rankings, arm: Rankings) -> Rankings:
    """The lists of both, as those of the models `base` and `arm`; what a model without P hands over is R's list.

    Raises UserError where the two have other targets: their difference would not be paired.
    """
    ours, theirs = (dataclasses.asdict(one.baskets) for one in (base, arm))
    if wrong := [name for name in ours if not np.array_equal(ours[name], theirs[name])]:
        raise UserError(f"rankings of an arm and of its base: expected the same targets, {', '.join(wrong)} differ")
    ranks, depths = {}, {}
    for model, lists in (("base", base), ("arm", arm)):
        reranked = any(key.reading == "rerank" for key in lists.ranks)
        for key, found in lists.ranks.items():
            shown = [key._replace(model=model)]
            if key.reading == "retrieve" and not key.seen_filter and not reranked:
                shown.append(shown[0]._replace(reading="rerank"))
            for one in shown if key.reading in ("retrieve", "rerank") else []:
                ranks[one], depths[one] = found, lists.depths[key]
    return Rankings(base.baskets, ranks, depths)


def compare(ablation: str, arm: str, base: Rankings, shown: Rankings) -> Found:
    """The figures of an arm's lists and of its base's, and their difference, paired over users."""
    lists = together(base, shown)
    values: dict[str, dict[str, float]] = {"base": {}, "arm": {}}
    gains: dict[str, Interval] = {}
    for reading in dict.fromkeys(figure.reading for figure in FIGURES.values()):
        table = evaluate_rankings(lists, ours=("base", reading)).to_pylist()
        rows = {(row["model"], row["reading"], row["subset"], row["metric"]): row for row in table}
        for name, figure in FIGURES.items():
            at = (figure.reading, figure.subset, figure.metric)
            if figure.reading != reading or ("arm", *at) not in rows:  # where all had all they took, nothing is new
                continue
            row = rows["arm", *at]
            values["base"][name], values["arm"][name] = rows["base", *at]["value"], row["value"]
            # the table's gain is that of the base over the arm
            gains[name] = Interval(0.0 - row["gain"], 0.0 - row["gain_high"], 0.0 - row["gain_low"])
    users = len(np.unique(lists.baskets.user_B))
    return Found(ablation, arm, values["arm"], values["base"], gains, len(lists.baskets), users)


def tell(found: Sequence[Found]) -> None:
    """The table of all arms, and what they say of the paper's statements, on stderr."""
    tell_arms(found)
    note("\n| the paper says | here | figure | gain of the arms against it |\n|---|---|---|---|")
    for statement in STATEMENTS:
        of = {one.arm: one.gain[statement.figure] for one in found if one.ablation == statement.ablation}
        if set(statement.arms) <= set(of):
            gains = {arm: of[arm] for arm in statement.arms}
            said = judge([verdict(gain) for gain in gains.values()])
            figures = "; ".join(f"{words(arm)} {cell(gain)}" for arm, gain in gains.items())
            note(f"| {statement.text} | {said} | {FIGURES[statement.figure].title} | {figures} |")


def tell_arms(found: Sequence[Found], bases: Mapping[str, Mapping[str, Fields]] = ABLATIONS) -> None:
    """The table of all arms, on stderr; `bases`: the arms of each ablation, its base first."""
    note("\n| what | arm | " + " | ".join(figure.title for figure in FIGURES.values()) + " |")
    note("|---|---|" + "---|" * len(FIGURES))
    for name in dict.fromkeys(one.ablation for one in found):
        arms = [one for one in found if one.ablation == name]
        base = [number(arms[0].base[figure]) if figure in arms[0].base else "" for figure in FIGURES]
        note(f"| {words(name)} | {words(next(iter(bases[name])))} | {' | '.join(base)} |")
        for one in arms:
            cells = [cell(one.gain[figure]) if figure in one.gain else "" for figure in FIGURES]
            note(f"| {words(name)} | {words(one.arm)} | {' | '.join(cells)} |")


def words(name: str) -> str:
    """A name as a cell of a table."""
    return name.replace("_", " ")


def number(value: float, sign: str = "") -> str:
    """Four digits, without the zero in front."""
    return f"{value:{sign}.4f}".replace("0.", ".", 1)


def cell(gain: Interval) -> str:
    """A gain with its interval, and `no effect` where it is none."""
    text = f"{number(gain.value, '+')} [{number(gain.low, '+')}, {number(gain.high, '+')}]"
    return text + (", no effect" if verdict(gain) == "no effect" else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench.ablations_gts", description="What each choice of GTS-LUM is worth."
    )
    parser.add_argument("--dataset", choices=DATASETS, default="complete_journey")
    parser.add_argument("--only", default=",".join(ABLATIONS), help="ablations, with commas between (default: all)")
    parser.add_argument("--steps", type=int, help="of Phase II (default: the preset's)")
    parser.add_argument("--small", action="store_true", help="for a small machine: see ablation_arms_gts.SMALL")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny models, two steps")
    parser.add_argument("--root", default="runs/bench", help="where the artifacts are")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop after this long (0: never)")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in ABLATIONS]:
        parser.error(f"--only: expected some of {', '.join(ABLATIONS)}, got {', '.join(unknown)}")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    bench = Bench(options.dataset, options.root, options.steps, options.quick, options.small)
    left = [(name, arm) for name in wanted for arm in tuple(ABLATIONS[name])[1:]]
    found: list[Found] = []
    with time_limit(options.max_minutes) as over:
        while left:
            found.append(bench.measure(*left[0]))
            left.pop(0)
    for line in over:
        note(f"{line}; left out: {', '.join('/'.join(one) for one in left)}")
    if found:
        tell(found)
    if options.quick:
        note("\n--quick: models of two steps; none of this says anything")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
