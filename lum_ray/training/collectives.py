"""What ranks tell each other beside gradients; without a process group, or alone, the value is as it was."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather_columns(columns: T) -> list[T] | None:
    """What every rank brought, in rank order, on rank 0; None on the others. Every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [columns]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(columns, gathered, dst=0)
    return gathered


def broadcast(value: T) -> T:
    """Rank 0's `value` on every rank. Every rank must call it; what the others bring is ignored."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    holder: list[Any] = [value]
    dist.broadcast_object_list(holder, src=0)
    result: T = holder[0]
    return result
