"""A small stage and loader for the tests of training: deterministic batches, dropout, an unused head, an optional NaN.

Shapes: B windows, F features, H hidden, K terms.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

FEATURES, HIDDEN = 6, 16


class ToyModule(torch.nn.Module):
    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = torch.nn.Linear(FEATURES, HIDDEN)
            self.second = torch.nn.Linear(HIDDEN, 3)
            self.offset_F = torch.nn.Parameter(torch.randn(FEATURES) * 0.1)
            self.frozen = torch.nn.Parameter(torch.ones(FEATURES), requires_grad=False)
            self.register_buffer("mean_F", torch.linspace(0, 0.123456789, FEATURES))
        self.dropout = torch.nn.Dropout(dropout)

    def outputs(self, x_BF: torch.Tensor) -> torch.Tensor:
        """A method beside `forward` that uses a parameter of the module itself, as models do."""
        hidden_BH = torch.relu(self.first((x_BF - self.mean_F) * self.frozen + self.offset_F))
        result: torch.Tensor = self.second(self.dropout(hidden_BH))
        return result


class ToyStage:
    """Terms: a squared error on all windows, a logistic loss on the marked ones, and one that may count nothing."""

    terms = ("square", "logistic", "rare")

    def __init__(self, dropout: float = 0.0, nan_at: int | None = None, seed: int = 0) -> None:
        self.module: torch.nn.Module = ToyModule(dropout, seed)
        self.nan_at = nan_at

    def loss(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        out_BK = self.module.outputs(batch["x_BF"]).float()  # type: ignore[operator]
        square = (out_BK[:, 0] - batch["y_B"]).square().sum()
        marked_B = batch["marked_B"]
        error_B = torch.nn.functional.binary_cross_entropy_with_logits(out_BK[:, 1], batch["z_B"], reduction="none")
        rare = (out_BK[:, 2].square() * batch["rare_B"]).sum()
        sums_K = torch.stack([square, (error_B * marked_B).sum(), rare])
        if self.nan_at is not None and bool((batch["step"] == self.nan_at).any()):
            sums_K = sums_K * torch.tensor([1.0, float("nan"), 1.0])
        return sums_K, batch["counts_K"]

    def predict(self, batch: Mapping[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
        return {"mean": self.module.outputs(batch["x_BF"])[:, 0].float().numpy()}  # type: ignore[operator]

    def trainable(self) -> list[dict[str, Any]]:
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in named if name.endswith("weight")], "weight_decay": 1.0},
            {"params": [p for name, p in named if not name.endswith("weight")], "weight_decay": 0.0},
        ]


def windows(step: int, batch: int, rare: bool = True) -> dict[str, npt.NDArray[Any]]:
    """The global batch of a step."""
    rng = np.random.default_rng([7, step])
    x_BF = rng.normal(size=(batch, FEATURES)).astype(np.float32)
    return {
        "x_BF": x_BF,
        "y_B": (x_BF[:, 0] * 2 - x_BF[:, 1]).astype(np.float32),
        "z_B": (x_BF[:, 2] + rng.normal(size=batch) > 0).astype(np.float32),
        "marked_B": (rng.random(batch) < 0.3).astype(np.float32),
        "rare_B": (rng.random(batch) < 0.3).astype(np.float32) * float(rare),
        "step": np.full(batch, step),
        "user": np.array([f"user-{step}-{index}" for index in range(batch)], dtype=object),
    }


def with_counts(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    counts = [len(arrays["y_B"]), arrays["marked_B"].sum(), arrays["rare_B"].sum()]
    return {**arrays, "counts_K": np.array(counts, np.float64), "tokens": np.array(len(arrays["y_B"]) * 10)}


def split(arrays: dict[str, npt.NDArray[Any]], edges: list[int]) -> list[dict[str, npt.NDArray[Any]]]:
    """Micro-batches between `edges` (unequal, possibly empty)."""
    return [
        with_counts({name: column[start:stop] for name, column in arrays.items()})
        for start, stop in itertools.pairwise(edges)
    ]


@dataclass(frozen=True)
class ToyStep:
    index: int
    epoch: int
    micro_batches: list[dict[str, npt.NDArray[Any]]]


@dataclass
class ToyLoader:
    """Rank r of w takes the r-th part of every global batch, in two micro-batches."""

    batch: int = 16
    rank: int = 0
    world: int = 1
    pause_s: float = 0.0
    rare: bool = True
    sought: list[int] = field(default_factory=list)

    def seek(self, step: int) -> Iterator[ToyStep]:
        self.sought.append(step)
        share = self.batch // self.world
        start = self.rank * share
        while True:
            time.sleep(self.pause_s)
            edges = [start, start + share // 3, start + share]
            yield ToyStep(step, step // 5, split(windows(step, self.batch, self.rare), edges))
            step += 1
