"""Encoded histories, kept: what-if asks for the same users again and again, and their past does not change.

Legend: as in `lumos.model`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from lum_ray.lumos.model import Memory


class Memories:
    """Memories of one user each by key; beyond `most_bytes` the least recently used are dropped. For one thread."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[Hashable, tuple[Memory, int]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Memory | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, memory: Memory) -> None:
        size = sum(part.numel() * part.element_size() for part in _tensors(memory))
        if size > self._most_bytes or key in self._kept:
            return
        self._kept[key] = (memory, size)
        self.bytes += size
        while self.bytes > self._most_bytes:
            self.bytes -= self._kept.popitem(last=False)[1][1]


def single(memory: Memory, place: int) -> Memory:
    """What decoding reads of the window at `place`, as a copy, so that nothing of the others stays with it."""
    # the states themselves are not read by any decoder: its keys and values are there
    bare = memory._replace(states_BTD=memory.states_BTD[:, :, :0])
    return _each([bare], lambda parts: parts[0][place : place + 1].clone())


def stacked(memories: Sequence[Memory]) -> Memory:
    """The windows of all memories, in order."""
    return _each(memories, torch.cat)


def _each(memories: Sequence[Memory], how: Callable[[list[Tensor]], Tensor]) -> Memory:
    def optional(parts: list[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        return how(there) if there else None

    layers = range(len(memories[0].keys_values))
    return Memory(
        how([memory.states_BTD for memory in memories]),
        tuple(
            (
                how([memory.keys_values[layer][0] for memory in memories]),
                how([memory.keys_values[layer][1] for memory in memories]),
            )
            for layer in layers
        ),
        how([memory.pad_BT for memory in memories]),
        optional([memory.days_BTS for memory in memories]),
        optional([memory.raw_BTU for memory in memories]),
        optional([memory.events_BTS for memory in memories]),
    )


def _tensors(memory: Memory) -> list[Tensor]:
    pairs = [part for pair in memory.keys_values for part in pair]
    rest = (memory.states_BTD, memory.pad_BT, memory.days_BTS, memory.raw_BTU, memory.events_BTS)
    return pairs + [part for part in rest if part is not None]
