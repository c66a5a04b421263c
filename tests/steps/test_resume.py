"""Killed or interrupted at any step, the same command goes on: the log equals the uninterrupted one, line by line."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lum_ray.config import Run
from lum_ray.training.telemetry import is_wall_clock

STEPS = 40
TIMEOUT_S = 150.0


def command(tiny: Run) -> list[str]:
    options = {"name": "resumed", "train.steps": STEPS, "train.checkpoint_every": 7, "train.validate_every": 20,
               "train.validate_users": 40, "lumos.dropout": 0.2, "train.ema": 0.9, "data.engine": "local"}  # fmt: skip
    sets = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "jobs.cli", "train", "lumos_tiny", "--root", tiny.root, *sets]


def log_of(uri: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (uri / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_wall_clock(name)} for line in lines]


def run_until(tiny: Run, step: int, how: signal.Signals) -> int:
    """Start the command, send the signal once `last/` holds `step` or more, and return its exit code."""
    process = subprocess.Popen(command(tiny), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while process.poll() is None and time.monotonic() < deadline:
            manifests = list(Path(tiny.root).glob("checkpoints/resumed-*/last/manifest.json"))
            if manifests and json.loads(manifests[0].read_text())["steps"][0]["step"] >= step:
                break
            time.sleep(0.02)
        time.sleep(random.Random(step).random() * 0.2)
        process.send_signal(how)
        return process.wait(timeout=60)
    finally:
        process.kill()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def whole(tiny: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(where the command puts the run, where the uninterrupted one lies)."""
    done = subprocess.run(command(tiny), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    uri, kept = Path(done.stdout.strip()), tmp_path_factory.mktemp("whole") / "run"
    uri.rename(kept)
    return uri, kept


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.faults)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    tiny: Run, whole: tuple[Path, Path], tmp_path: Path, how: signal.Signals
) -> None:
    uri, kept = whole
    expected = log_of(kept)
    assert expected[-1]["step"] == STEPS
    code = run_until(tiny, 7 if how is signal.SIGKILL else 14, how)
    assert code == (-9 if how is signal.SIGKILL else 130)
    assert not (uri / "manifest.json").exists()
    again = subprocess.run(command(tiny), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert again.returncode == 0, again.stderr
    assert "resumed at step" in again.stderr
    assert log_of(uri) == expected
    for name in ("best", "last"):
        one, other = (sorted((folder / name).glob("*/model.safetensors"))[-1] for folder in (uri, kept))
        assert one.read_bytes() == other.read_bytes()
    uri.rename(tmp_path / "again")
