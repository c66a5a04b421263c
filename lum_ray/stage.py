"""Stage: all that the training loop knows of a model.

Shapes: K objective terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lum_ray.data.rows import Rows, Samples

Arrays = dict[str, npt.NDArray[Any]]
Batch = Mapping[str, torch.Tensor]


class Stage(Protocol):
    """What a model gives to the loop.

    The objective of a step is sum over k of (sums_k over the global batch) / (counts_k over the global batch), terms
    with a count of 0 left out. `collate` writes the counts as `counts_K` (float64), so that the loop knows the step's
    denominators before the first forward pass.
    """

    @property
    def module(self) -> torch.nn.Module:
        """What is trained."""
        ...

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the K terms, for the log."""
        ...

    def collate(self, rows: Rows, samples: Samples) -> Arrays:
        """Arrays of a micro-batch, in the loader's thread; `samples` may be empty (then counts_K is all 0)."""
        ...

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sums_K with gradient, counts_K); an empty batch gives zeros that still carry a gradient path."""
        ...

    def trainable(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser (`params`, `weight_decay` as a multiplier of the run's)."""
        ...


def to_device(arrays: Mapping[str, npt.NDArray[Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """Numeric arrays as tensors on `device`."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
        for name, array in arrays.items()
        if array.dtype != np.object_
    }
