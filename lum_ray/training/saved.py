"""What a run goes on from, as whole tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lum_ray.artifacts import UserError

Tensors = Mapping[str, torch.Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of torch's AdamW, by their names there."""


@dataclass(frozen=True)
class Saved:
    """What a run goes on from: the updates done, `Engine.weights` and `Engine.state` of that moment."""

    steps: int
    weights: Tensors
    state: Tensors


def take_up(module: torch.nn.Module, saved: Saved, averaged: bool) -> None:
    """Set the module's parameters and buffers to those of `saved`. Raises UserError for those of another model."""
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    keys = [f"{key}/{name}" for name in named for key in (*MOMENTS, *(("parameter",) if averaged else ()))]
    wrong = sorted(set(keys) ^ set(saved.state)) or sorted(set(named) - set(saved.weights))
    if wrong:
        raise UserError(
            f"a checkpoint of other parameters, or of another train.ema: {', '.join(wrong[:5])}; use the settings that "
            "it was trained with, or train anew with --fresh"
        )
    tensors = dict(saved.weights)
    if averaged:
        tensors |= {name: saved.state[f"parameter/{name}"] for name in named}
    module.load_state_dict(tensors, strict=False)
