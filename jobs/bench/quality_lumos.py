"""LUMOS against LightGBM with hand-made features, on data whose test days neither has seen.

    python -m jobs.bench.quality_lumos --dataset complete_journey|oulad|simulator
        [--path FOLDER] [--seeds N] [--max-minutes M] [--root DIR] [--quick]

Rows: `quality_lumos/<dataset>/<task>/auc_gain` (ours - LightGBM's mean daily AUC) and `.../mape_gain` (the share of
LightGBM's MAPE that ours saves, each fed its least-MAPE forecast), with paired 95 % intervals over users; the same for
the average of our seeds' forecasts as `.../average_auc_gain`; `.../floor/<figure>` for each floor that LightGBM must
reach to count as a peer (FIELD.md, section 3); `.../calendar/<task>/auc_gain` for what the calendar is worth to each;
on OULAD `.../<seen|unseen>_<past|future>/<task>/auc_gain`; on the simulator `.../<task>/gap_share`, the share of the gap
between LightGBM and the Bayes oracle that ours closes.

Every model's predictions are an artifact under --root: a call goes on where an earlier one stopped, and computes only
what is missing, seed by seed, within --max-minutes. Exit code 1: LightGBM missed a floor (it is no peer then), a bar
was missed, or a seed was left out for want of time.
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

from jobs.bench.rows import emit, hardware, note
from lum_ray import presets, steps
from lum_ray.config import Horizon, Run, Source
from lum_ray.evaluation import bootstrap, protocol
from lum_ray.evaluation.bootstrap import Interval
from lum_ray.evaluation.predictions import Predictions, Task
from lum_ray.steps import contest
from lum_ray.steps.contest import Contest

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
AIMS = {"complete_journey": 0.0, "oulad": 0.010}


def contest_run(dataset: str, root: str, path: str | None, quick: bool) -> Run:
    """The preset of the contest, with its horizons of 7 and 28 days."""
    preset = {
        "complete_journey": presets.lumos_complete_journey,
        "oulad": presets.lumos_oulad,
        "simulator": presets.lumos_simulator,
    }[dataset]
    run = preset()
    source = run.data.source
    assert source is not None
    if path is not None:
        source = dataclasses.replace(source, path=path)
    section, train = run.section, run.train
    if quick:
        dataset_options = {"users": 150, "shards": 1, "activity": 0.3} if dataset == "simulator" else {}
        source = dataclasses.replace(source, options={**source.options, **dataset_options})
        section = dataclasses.replace(section, history_days=56, width=16, heads=2, swiglu_width=16, embed_width=16,
                                      cuts_per_window=2, cut_stride_days=14)  # fmt: skip
        train = dataclasses.replace(train, steps=3, batch=8, micro_batch=8, validate_users=50)
    data = dataclasses.replace(run.data, source=source, engine="local")
    return dataclasses.replace(run, root=root, data=data, section=section, train=train)
