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
import torch

from jobs.bench.rows import emit, hardware, note
from jobs.bench.time_limit import time_limit
from lum_ray import presets
from lum_ray.config import Run
from lum_ray.evaluation import bootstrap, strata
from lum_ray.evaluation.boosted import MODEL
from lum_ray.evaluation.bootstrap import Interval
from lum_ray.evaluation.predictions import Predictions
from lum_ray.steps.contest import AVERAGE, Contest, contest, with_seed

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
# task, metric -> (figure, whether more is better). Source: FIELD.md, section 3; held at its three digits.
FLOORS: dict[str, dict[tuple[str, str], tuple[float, bool]]] = {
    "complete_journey": {
        ("active_any_7", "eval/roc_auc"): (0.830, True),
        ("active", "eval/roc_auc_pooled"): (0.763, True),
        ("coupon_used_any_7", "eval/roc_auc"): (0.842, True),
        ("spend_sum_7", "eval/value_if_active_mape_least"): (0.851, False),
        ("spend_sum_7", "eval/value_if_active_mae"): (36.5, False),
    },
    "oulad": {
        ("active", "eval/roc_auc_day_1"): (0.864, True),
        ("active", "eval/roc_auc_day_4"): (0.849, True),
        ("active", "eval/roc_auc_day_7"): (0.830, True),
        ("active_any_7", "eval/roc_auc"): (0.912, True),
    },
    "simulator": {},
}
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
        section = dataclasses.replace(section, history_days=56, width=16, heads=2, swiglu_width=16, embed_width=16,
                                      cuts_per_window=2, cut_stride_days=14)  # fmt: skip
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
        for (task, metric), (floor, more) in FLOORS[self.dataset].items():
            row = figures[task, metric]
            reached = round(row["value"], FLOOR_DIGITS[metric]) >= floor if more else row["value"] <= floor
            at = Interval(row["value"], row["low"], row["high"])
            self.row(f"floor/{task}/{metric.removeprefix('eval/')}", at, "", {"reached": bool(reached)}, f"{floor}")
            if not reached:
                self.miss(f"LightGBM is no peer: {task} {metric} {row['value']:.4f}, its floor is {floor}")

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
