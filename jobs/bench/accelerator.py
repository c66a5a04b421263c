"""The clock of the accelerator benchmarks, and what a chip can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from jobs.bench.rows import note

PEAK_BF16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 operations per second of a chip (its data sheet), by words of its name."""


def peak(device: torch.device) -> float | None:
    """Operations per second of the chip at bf16; None if it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((value for part, value in PEAK_BF16.items() if all(word in name for word in part.split())), None)


def timed(step: Callable[[int], object], steps: int, blocks: int, warmup: int, device: torch.device) -> list[float]:
    """Seconds a step in each of `blocks` blocks of `steps`, after `warmup` steps outside the clock."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for index in range(warmup):
        step(index)
    wait()
    seconds = []
    for _ in range(blocks):
        begin = time.perf_counter()
        for index in range(steps):
            step(index)
        wait()
        seconds.append((time.perf_counter() - begin) / steps)
    return seconds


def fitting(windows: int, attempt: Callable[[int], list[float]]) -> tuple[int, list[float]]:
    """`attempt(windows)`, with half as many windows as often as the memory of the device asks for it."""
    while True:
        try:
            return windows, attempt(windows)
        except torch.cuda.OutOfMemoryError:
            if windows <= 8:
                raise
            note(f"{windows} windows do not fit into the device's memory; trying {windows // 2}")
            windows //= 2
        torch.cuda.empty_cache()
