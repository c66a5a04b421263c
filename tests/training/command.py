"""`python -m tests.training.command PLACE PAUSE_S`: a toy run as a process of its own, to be killed."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lum_ray.config import Train
from lum_ray.training.loop import train_loop
from tests.training.toy import ToyLoader, ToyStage, windows

SETTINGS = Train(
    steps=60,
    learning_rate=1e-2,
    ema=0.9,
    precision="fp32",
    validate_every=6,
    checkpoint_every=7,
    keep_best="eval/loss",
    seed=3,
)


def validation(module: Any) -> dict[str, float]:
    arrays = windows(10_000, 64)
    error_B = module.outputs(torch.from_numpy(arrays["x_BF"]))[:, 0] - torch.from_numpy(arrays["y_B"])
    torch.rand(3)  # a validation that draws must not change the training
    return {"eval/loss": float(error_B.square().mean())}


def train(place: str, pause_s: float = 0.0) -> dict[str, Any]:
    return train_loop(ToyStage(dropout=0.3), ToyLoader(pause_s=pause_s), validation, SETTINGS, place, log_every=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], float(sys.argv[2]))
