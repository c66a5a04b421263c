"""Broken raw tables end in a correct artifact or in a clear error: never in a crash, a hang or a wrong number.

The work is done by `mutations.py`, in a process that is fed with seeds: Arrow may crash on what it reads. To see one
seed: `echo SEED | python tests/data/mutations.py [local|ray] [folder|delta]`.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lum_ray.data import schema

SCRIPT = Path(__file__).with_name("mutations.py")
SEED_TIMEOUT_S, START_TIMEOUT_S = 60.0, 180.0
HAS_DELTA = (Path(schema.__file__).parent / "delta.py").exists()
NEEDS_DELTA = pytest.mark.skipif(not HAS_DELTA, reason="there is no reader of Delta tables yet")


class Worker:
    """A process that answers seeds; None is a process that ended, or that took too long and was ended."""

    def __init__(self, engine: str, table: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), engine, table],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.lines: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        for stream, keep in ((self.process.stdout, self.lines.put), (self.process.stderr, self.errors.append)):
            threading.Thread(target=lambda s=stream, k=keep: [k(line) for line in s], daemon=True).start()

    def ask(self, seed: int, timeout_s: float) -> dict[str, Any] | None:
        assert self.process.stdin is not None
        try:
            print(seed, file=self.process.stdin, flush=True)
            found: dict[str, Any] = json.loads(self.lines.get(timeout=timeout_s))
            return found
        except (queue.Empty, BrokenPipeError):
            return None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def run(seeds: Iterable[int], engine: str = "local", table: str = "folder") -> Counter[str]:
    """How the seeds ended. Fails with the first five that ended wrongly."""
    ends, wrong = Counter[str](), list[str]()
    worker, fresh = Worker(engine, table), True
    try:
        for seed in seeds:
            found = worker.ask(seed, START_TIMEOUT_S if fresh else SEED_TIMEOUT_S)
            fresh = False
            if found is None:
                worker.close()
                wrong.append(f"seed {seed}: exit code {worker.process.returncode}\n{''.join(worker.errors)[-2000:]}")
                worker, fresh = Worker(engine, table), True
            elif "wrong" in found:
                wrong.append(f"seed {seed}: {found['wrong']}\n{found['trace']}")
            else:
                ends[found["end"]] += 1
    finally:
        worker.close()
    assert not wrong, f"{len(wrong)} of {len(wrong) + ends.total()} seeds:\n" + "\n".join(wrong[:5])
    return ends


def test_broken_tables() -> None:
    ends = run(range(60))
    assert min(ends["artifact"], ends["error"]) > 15, ends


@pytest.mark.faults
@pytest.mark.timeout(2700)
def test_a_thousand_broken_tables() -> None:
    ends = run(range(1000, 1700 if HAS_DELTA else 2000))
    assert min(ends["artifact"], ends["error"]) > 250, ends


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_broken_tables_through_ray() -> None:
    ends = run(range(3000, 3014 if HAS_DELTA else 3020), "ray")
    assert min(ends["artifact"], ends["error"]) > 2, ends


@NEEDS_DELTA
def test_broken_delta_tables() -> None:
    ends = run(range(30), table="delta")
    assert min(ends["artifact"], ends["error"]) > 5, ends


@pytest.mark.faults
@pytest.mark.timeout(2700)
@NEEDS_DELTA
def test_three_hundred_broken_delta_tables() -> None:
    ends = run(range(1000, 1300), table="delta")
    assert min(ends["artifact"], ends["error"]) > 70, ends


@pytest.mark.faults
@pytest.mark.timeout(1200)
@NEEDS_DELTA
def test_broken_delta_tables_through_ray() -> None:
    run(range(3000, 3006), "ray", "delta")
