"""The whole search as the command runs it: shapes once, killed at any moment, and the winner's run file."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs.cli import load
from lum_ray.artifacts import UserError
from lum_ray.steps import train
from tuning.ledger import Ledger
from tuning.spaces import load_space
from tuning.sweep import machines, share

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900.0
SPACE = """
gts.slot_minutes: {choice: [60, 1440]}
gts.depth: {choice: [1, 2]}
gts.align_steps: 0
train.steps: 6
train.validate_every: 3
train.checkpoint_every: 3
"""
SLOW = """
lumos.history_days: {choice: [28, 42]}
train.learning_rate: {log: [0.0005, 0.005]}
train.steps: 240
train.validate_every: 60
train.checkpoint_every: 10
"""


def command(preset: str, root: Path, space: Path, trials: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", "tune", preset, "--root", str(root), "--space", str(space), "--trials",
            str(trials), "--set", "data.engine=local", "--set", "tune.prune=false", *options]  # fmt: skip


def start(arguments: list[str], place: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, cwd=place, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


def children(pid: int) -> Iterator[int]:
    """All processes below one."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(part) for part in file.read_text().split()]
    for child in found:
        yield child
        yield from children(child)


def trials_below(pid: int) -> list[int]:
    """The processes in which trials run."""
    found = []
    for child in children(pid):
        with contextlib.suppress(OSError):
            if b"ImplicitFunc" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def wait_for(process: subprocess.Popen[str], done: object) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if done():  # type: ignore[operator]
            return
        time.sleep(0.05)
    raise AssertionError(f"ended before it was killed: {process.communicate()[1][-2000:]}")


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.timeout(1000)
def test_a_killed_search_goes_on_and_prepares_each_shape_once(tmp_path: Path) -> None:
    space, root = tmp_path / "space.yaml", tmp_path / "runs"
    space.write_text(SPACE)
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "LOG.md").write_text("# Tuning log\n\nNewest first.\n\n## 2020-01-01: old\n\nx\n")
    small = ["data.source.options.users=60"]
    arguments = command("gts_tiny", root, space, 12, *(part for one in small for part in ("--set", one)))
    process = start(arguments, tmp_path)
    try:
        wait_for(process, lambda: list(root.glob("tune/*/trials/*/manifest.json")))
    finally:
        process.kill()
        process.communicate(timeout=60)
    (uri,) = root.glob("tune/*")
    before = {file: (file.stat().st_mtime_ns, file.read_text()) for file in uri.glob("trials/*/manifest.json")}
    assert 1 <= len(before) < 4
    again = start(arguments, tmp_path)
    out, errors = again.communicate(timeout=TIMEOUT_S)
    assert again.returncode == 0, errors
    assert out.strip() == str(uri)
    # a trial that outlived the driver for a moment may have ended after `before` was read
    assert any(f"{over} of 12 trials are over" in errors for over in range(len(before), 5))
    assert "all combinations of space are tried: 5 trials" in errors
    for file, state in before.items():
        assert (file.stat().st_mtime_ns, file.read_text()) == state, "a finished trial ran again"
    records = Ledger(str(uri)).records()
    assert [record.state for record in records] == ["finished"] * 5, "the run as it is, and four combinations"
    assert len({record.key for record in records}) == 5
    assert [len(list((root / name).iterdir())) for name in ("sequences", "tree")] == [1, 2]
    assert "the run as it is" in errors and "report: " in errors
    report = (uri / "report.html").read_text()
    assert (
        "slot minutes" in report and "data:image/svg+xml" in report and "http" not in report.replace("http-equiv", "")
    )

    log = (tmp_path / "tuning" / "LOG.md").read_text()
    assert log.index(uri.name) < log.index("## 2020-01-01: old")
    best = max(records, key=lambda record: record.value or 0.0)
    run = load(str(uri / "best_run.yaml"), None, None)
    given = load("gts_tiny", str(root), ["data.engine=local", "tune.prune=false", *small])
    space_read = load_space(str(space), given)
    assert run.section == space_read.apply(given, best.values).section
    # trained as it is: the winner's own checkpoint answers
    assert train(run) == f"{root}/checkpoints/{best.checkpoint}"
    assert yaml.safe_load((uri / "best_run.yaml").read_text())["root"] == str(root)


@pytest.mark.ray
def test_more_than_the_machine_has_is_refused(tmp_path: Path, ray_session: None) -> None:
    from tuning.sweep import tune

    for sets, message in (
        (["train.workers=3"], "train.workers: 1 trials at once of 3 workers need 3 CPUs"),
        (["tune.parallel=5"], "tune.parallel: 5 trials at once of 1 workers need 5 CPUs"),
    ):
        with pytest.raises(UserError, match=message):
            tune(load("lumos_tiny", str(tmp_path), sets))
    assert not list(tmp_path.iterdir()), "something was prepared"


@pytest.mark.parametrize(
    ("found", "sets", "parallel", "each"),
    [
        ([(4, 0)], [], 4, {"CPU": 1.0}),
        ([(4, 0)], ["tune.parallel=2"], 2, {"CPU": 2.0}),
        ([(4, 0), (3, 0)], ["tune.parallel=2"], 2, {"CPU": 3.0}),  # not 3.5 of any
        ([(8, 0), (16, 1)], ["tune.parallel=1"], 1, {"CPU": 16.0, "GPU": 1.0}),  # and not 24
        ([(8, 0), (16, 2)], [], 2, {"CPU": 8.0, "GPU": 1.0}),
        ([(4, 4), (4, 1)], [], 5, {"CPU": 1.0, "GPU": 1.0}),
        ([(4, 0), (4, 0)], ["train.workers=3"], 2, {"memory": 200e6}),
    ],
)
def test_what_a_trial_holds_fits_on_one_machine(
    found: list[tuple[int, int]], sets: list[str], parallel: int, each: dict[str, float]
) -> None:
    assert share(load("lumos_tiny", None, sets), found) == (parallel, each)


@pytest.mark.parametrize(
    ("found", "sets", "message"),
    [
        ([(1, 0), (1, 0)], ["tune.parallel=3"], "tune.parallel: 3 trials at once of 1 workers need 3 CPUs; beside"),
        ([(8, 0)], ["train.device=cuda"], "1 trials at once of 1 workers need 1 CPUs, each with a GPU on its machine"),
        ([(0, 2), (8, 1)], ["train.workers=2"], "train.workers: 1 trials at once of 2 workers need 2 CPUs, each with"),
        ([], [], "the session has 0 CPUs and 0 GPUs"),
    ],
)
def test_what_no_machine_holds_is_refused(found: list[tuple[int, int]], sets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        share(load("lumos_tiny", None, sets), found)


@pytest.mark.ray
def test_the_drivers_cpus_are_no_room_for_trials(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machines("auto") == machines("cpu") == [(2, 0)]
    monkeypatch.setenv("LUM_RAY_DRIVER_CPUS", "1")
    assert machines("cpu") == [(1, 0)]


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.timeout(2700)
def test_driver_and_worker_killed_five_times(tmp_path: Path) -> None:
    space, root, chance = tmp_path / "space.yaml", tmp_path / "runs", random.Random(0)
    space.write_text(SLOW)
    arguments = command("lumos_tiny", root, space, 6)
    ended: dict[Path, str] = {}
    trained: dict[Path, list[str]] = {}

    def steps_saved() -> int:
        manifests = root.glob("checkpoints/*/last/manifest.json")
        total = 0
        for file in manifests:
            with contextlib.suppress(OSError, ValueError):
                total += int(json.loads(file.read_text())["steps"][0]["step"])
        return total

    def note() -> None:
        ended.update({file: file.read_text() for file in root.glob("tune/*/trials/*/manifest.json")})
        for file in root.glob("checkpoints/*/last/manifest.json"):
            saved = json.loads(file.read_text())["steps"][-1]["step"]
            lines = (file.parents[1] / "metrics.jsonl").read_text().splitlines()
            trained[file.parents[1]] = [line for line in lines if json.loads(line)["step"] <= saved]

    for _ in range(5):
        process = start(arguments, tmp_path)
        try:
            for victim in ("worker", "driver"):
                seen = steps_saved()
                wait_for(process, lambda seen=seen, pid=process.pid: steps_saved() >= seen + 40 and trials_below(pid))
                time.sleep(chance.random())
                if victim == "worker":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(trials_below(process.pid)), signal.SIGKILL)
        finally:
            process.kill()
            process.communicate(timeout=60)
        note()
    last = start(arguments, tmp_path)
    _, errors = last.communicate(timeout=TIMEOUT_S)
    assert last.returncode == 0, errors
    (uri,) = root.glob("tune/*")
    records = Ledger(str(uri)).records()
    assert len(records) == 6 and all(record.state == "finished" for record in records)
    for file, text in ended.items():
        assert file.read_text() == text, "a finished trial ran again"
    for checkpoint, lines in trained.items():
        now = (checkpoint / "metrics.jsonl").read_text().splitlines()
        assert now[: len(lines)] == lines, "an unfinished trial began anew"
        assert [json.loads(line)["step"] for line in now] == sorted({json.loads(line)["step"] for line in now})
