"""What every benchmark prints: one JSON row a figure on stdout; everything else goes to stderr."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

KEYS = ("what", "value", "unit", "peer", "ratio", "low", "high", "hardware", "versions", "run")


def hardware(accelerator: str | None = None) -> str:
    """The processor, how many cores this process may use, and the accelerator if one was used."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([f"{name}, {cores} cores", *([accelerator] if accelerator else [])])


def versions(*packages: str) -> dict[str, str]:
    """Python's version and that of each installed one of `packages`."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def emit(
    what: str,
    value: float | None,
    unit: str,
    *,
    run: Mapping[str, Any],
    machine: str,
    packages: Sequence[str] = (),
    peer: str | None = None,
    ratio: float | None = None,
    low: float | None = None,
    high: float | None = None,
) -> dict[str, Any]:
    """Print a row and return it. `ratio` is ours / peer in `unit`; `low` and `high` bound `value` over the repeats;
    `run` are the settings that shaped it."""
    values = (what, value, unit, peer, ratio, low, high, machine, versions(*packages), dict(run))
    row = dict(zip(KEYS, values, strict=True))
    print(json.dumps(row), flush=True)
    return row


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """(median, smallest, largest)."""
    return statistics.median(samples), min(samples), max(samples)


def note(message: str) -> None:
    """Tell whoever watches, on stderr."""
    print(message, file=sys.stderr, flush=True)
