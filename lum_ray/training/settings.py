"""How to optimise: the engine's settings, the learning rate's schedule, the precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class EngineSettings:
    """How to optimise. `steps` is the length of the schedule; `ema` is a decay (0: off); `clip_norm` 0: no clipping."""

    steps: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    clip_norm: float = 1.0
    ema: float = 0.0
    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"


def learning_rate(settings: EngineSettings, step: int) -> float:
    """The rate of step `step` (0-based): linear warm-up, then a cosine that would be 0 at step `settings.steps`."""
    warmup = max(1, round(settings.warmup_share * settings.steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: asked for, or `auto` on a GPU that has it or a CPU with AMX (else it is emulated)."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
