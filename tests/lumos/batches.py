"""Small random batches of the model's inputs, for its tests and benchmarks' tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lum_ray.data.windows import DerivedTarget, HorizonTarget
from lum_ray.lumos import losses
from lum_ray.lumos.config import BehaviourInput, CategoryInput, Inputs, LumosConfig, NumberInput
from lum_ray.stage import Arrays

INPUTS = Inputs(
    behaviours=(
        BehaviourInput("active", "binary"),
        BehaviourInput("spend", "continuous", 0.01, 0, "log1p", 1.5),
        BehaviourInput("baskets", "count", 1.0, 0, "log1p", 0.7),
        BehaviourInput("minutes", "continuous", 0.5, 0, "identity", 20.0),
    ),
    event_width=13,
    derived=(DerivedTarget("churned", "churned", 0, 5),),
    horizons=(HorizonTarget("active_any_7", "any", 0, 7), HorizonTarget("spend_sum_5", "sum", 1, 5)),
    event_types=("match", "sale"),
    event_scales=(1.0, 1.0),
    numbers=(NumberInput("age", 30.0, 10.0),),
    categories=(CategoryInput("country", ("de", "in")), CategoryInput("plan", ("free",))),
)
TINY = LumosConfig(history_days=12, future_days=4, width=16, heads=2, encoder_layers=2, swiglu_width=24)


def arrays(
    config: LumosConfig, inputs: Inputs = INPUTS, windows: int = 3, seed: int = 0, active: float = 0.3
) -> Arrays:
    """A batch of `windows` random windows, as collate makes it; counted targets of every term where windows >= 3."""
    rng = np.random.default_rng(seed)
    days, cuts, ahead = config.history_days, config.cuts_per_window, inputs.days_ahead(config.future_days)
    pads = rng.integers(0, days // 2, windows)
    pads[0] = 3
    there = (rng.random((windows, days)) < active) & (np.arange(days) >= pads[:, None])
    there[:, -1] = True
    slot = np.flatnonzero(there.ravel())
    values = rng.integers(1, 300, (len(slot), len(inputs.behaviours)))
    values[:, [b.kind == "binary" for b in inputs.behaviours]] = 1
    events = rng.normal(size=(days + ahead, inputs.event_width)).astype(np.float32)
    visible = days - config.cut_stride_days * np.arange(cuts)[::-1]
    future = visible[:, None] + np.arange(ahead)
    daily = np.zeros((windows, cuts, config.future_days, inputs.daily), np.float32)
    gate = rng.random(daily.shape[:3]) < 0.5
    gate[:, :, 0] = True
    for column, binary in enumerate(inputs.binary[: inputs.daily]):
        daily[..., column] = (
            gate if column == 0 else rng.random(gate.shape) < 0.5 if binary else gate * rng.integers(1, 300, gate.shape)
        )
    daily[-1, :, -1] = np.nan
    horizon = np.zeros((windows, cuts, len(inputs.horizons)), np.float32)
    for column, item in enumerate(inputs.horizons):
        horizon[..., column] = (
            rng.random((windows, cuts)) < 0.5 if item.over == "any" else rng.integers(1, 900, (windows, cuts))
        )
    valid = np.ones((windows, cuts), bool)
    numbers = rng.normal(30, 10, (windows, len(inputs.numbers))).astype(np.float32)
    if numbers.size:
        numbers[-1, 0] = np.nan
    codes = [rng.integers(0, len(c.values) + 1, windows) for c in inputs.categories]
    return {
        "values_AU": values.astype(np.int64),
        "slot_A": slot.astype(np.int64),
        "pads_B": pads.astype(np.int64),
        "numbers_BN": numbers,
        "categories_BG": np.array(codes, np.int64).reshape(len(codes), windows).T,
        "event_rows_ES": events,
        "history_event_BT": np.tile(np.arange(days), (windows, 1)).astype(np.int64),
        "future_event_BCX": np.tile(future, (windows, 1, 1)).astype(np.int64),
        "visible_BC": np.tile(visible, (windows, 1)).astype(np.int64),
        "daily_BCFV": daily,
        "horizon_BCH": horizon,
        "valid_BC": valid,
        "counts_K": losses.counts(inputs, daily, horizon, valid),
    }


def tensors(data: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in data.items()}


def take(data: Arrays, windows: list[int], config: LumosConfig) -> Arrays:
    """The batch of some of its windows."""
    days = config.history_days
    window = data["slot_A"] // days
    place = {old: new for new, old in enumerate(windows)}
    kept = np.isin(window, windows)
    slot = np.array([place[w] * days for w in window[kept]], np.int64) + data["slot_A"][kept] % days
    by_window = {name: array[windows] for name, array in data.items() if name.split("_")[-1].startswith("B")}
    return {**data, **by_window, "values_AU": data["values_AU"][kept], "slot_A": slot}


def busy(config: LumosConfig) -> LumosConfig:
    """`config` with every extension that can be on together."""
    return replace(config, causal=True, lag_logits=True, cuts_per_window=3, cut_stride_days=2, continuous="lognormal")
