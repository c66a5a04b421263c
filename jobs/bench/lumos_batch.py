"""Synthetic batches of LUMOS for the benchmarks: 13 behaviours, a shared calendar, sparse activity.

Legend as in lum_ray/lumos/model.py.
"""

from __future__ import annotations

import numpy as np

from lum_ray.lumos import losses
from lum_ray.lumos.config import BehaviourInput, CategoryInput, Inputs, LumosConfig, NumberInput
from lum_ray.stage import Arrays

INPUTS = Inputs(
    behaviours=(
        *(BehaviourInput(f"binary_{i}", "binary") for i in range(5)),
        *(BehaviourInput(f"amount_{i}", "continuous", 0.01, 0, "log1p", 1.5) for i in range(4)),
        *(BehaviourInput(f"count_{i}", "count", 1.0, 0, "log1p", 0.8) for i in range(4)),
    ),
    event_width=29,
    event_types=tuple(f"event_{i}" for i in range(10)),
    event_scales=(1.0,) * 10,
    numbers=(NumberInput("age", 35.0, 12.0), NumberInput("income", 50.0, 20.0)),
    categories=(CategoryInput("country", ("in", "us", "de")),),
)


def lumos_batch(config: LumosConfig, windows: int, seed: int, active: float = 0.08, inputs: Inputs = INPUTS) -> Arrays:
    """`windows` windows of one calendar (each with the same number of active days, so that shapes do not vary with
    `seed`), a quarter of them with pads; one cut at the end."""
    rng = np.random.default_rng(seed)
    days, future, ahead = config.history_days, config.future_days, inputs.days_ahead(config.future_days)
    each = max(1, round(active * days))
    slot = np.sort(rng.random((windows, days)).argsort(axis=1)[:, :each], axis=1) + days * np.arange(windows)[:, None]
    values = rng.integers(1, 5_000, (windows * each, len(inputs.behaviours)))
    values[:, [b.kind == "binary" for b in inputs.behaviours]] = 1
    pads = np.where(rng.random(windows) < 0.25, rng.integers(0, days // 2, windows), 0)
    gate = rng.random((windows, 1, future)) < 0.3
    daily = np.stack(
        [gate if b.gate is None else gate * rng.integers(1, 5_000, gate.shape) for b in inputs.behaviours], axis=-1
    ).astype(np.float32)
    horizon = np.zeros((windows, 1, len(inputs.horizons)), np.float32)
    valid = np.ones((windows, 1), bool)
    return {
        "values_AU": values.astype(np.int64),
        "slot_A": slot.ravel().astype(np.int64),
        "pads_B": pads.astype(np.int64),
        "numbers_BN": rng.normal(30, 10, (windows, len(inputs.numbers))).astype(np.float32),
        "categories_BG": rng.integers(0, 3, (windows, len(inputs.categories))).astype(np.int64),
        "event_rows_ES": rng.normal(size=(days + ahead, inputs.event_width)).astype(np.float32),
        "history_event_BT": np.tile(np.arange(days), (windows, 1)).astype(np.int64),
        "future_event_BCX": np.tile(days + np.arange(ahead), (windows, 1, 1)).astype(np.int64),
        "visible_BC": np.full((windows, 1), days, np.int64),
        "daily_BCFV": daily,
        "horizon_BCH": horizon,
        "valid_BC": valid,
        "counts_K": losses.counts(inputs, daily, horizon, valid),
    }
