"""Ten workers of one run are killed: it ends as the undisturbed one, and the loader's log shows every sample once."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from lum_ray import catalog, config
from lum_ray.config import Run
from lum_ray.steps.prepare import prepare
from lum_ray.training.fit import fit
from lum_ray.training.loop import Worker
from lum_ray.training.telemetry import read_metrics

ROOT = Path(__file__).parents[2]
STEPS, KILLS = 60, 10
SETTINGS = [
    "name=killed", f"train.steps={STEPS}", "train.batch=32", "train.micro_batch=16", "train.checkpoint_every=2",
    "train.validate_every=60", "train.validate_users=24", "train.precision=fp32",
]  # fmt: skip


@pytest.fixture
def session() -> Iterator[None]:
    if ray.is_initialized():
        ray.shutdown()
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment}
    )
    yield
    ray.shutdown()


def loop_of(plain: dict[str, Any], uris: tuple[str, str, str], place: str, log: str) -> Any:
    """The loop of `train`, whose loader writes down what it gives: a line a step with its users."""

    def loop(worker: Worker) -> dict[str, Any]:
        from lum_ray.data import loader

        train: Any = importlib.import_module("lum_ray.steps.train")  # the package names the function so
        born = time.time()

        class Logged(loader.Loader):
            def __next__(self) -> loader.Step:
                step = super().__next__()
                users = [str(user) for batch in step.micro_batches for user in batch.get("user", ())]
                line = {"born": born, "pid": os.getpid(), "rank": worker.rank, "step": step.index, "users": users}
                with open(f"{log}-{worker.rank}", "a") as stream:
                    stream.write(json.dumps(line) + "\n")
                time.sleep(0.1)
                return step

        train.Loader = Logged
        result: dict[str, Any] = train._loop(plain, uris, place, worker)
        return result

    return loop


def lines(log: str, rank: int) -> list[dict[str, Any]]:
    """What a rank's loader gave, in time; a line that a kill cut off is left out."""
    path = Path(f"{log}-{rank}")
    found = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("}")]


def survived(log: str, rank: int) -> list[dict[str, Any]]:
    """The steps that were not taken back: of each life those before the first step of the next one."""
    lives: list[list[dict[str, Any]]] = []
    for line in lines(log, rank):
        if not lives or lives[-1][0]["born"] != line["born"]:
            lives.append([])
        lives[-1].append(line)
    ends = [life[0]["step"] for life in lives[1:]] + [STEPS]
    return [line for life, end in zip(lives, ends, strict=True) for line in life if line["step"] < end]


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_ten_killed_workers(session: None, tiny: Run, tmp_path: Path) -> None:
    run = catalog.read_run(config.override(config.dump(tiny), SETTINGS))
    prepared = prepare(run)
    uris = (prepared.timelines.uri, prepared.calendar.uri, prepared.fitted.uri)
    plain = config.dump(run)
    undisturbed = loop_of(plain, uris, str(tmp_path / "whole"), str(tmp_path / "whole.log"))
    fit(undisturbed, workers=2, storage_path=str(tmp_path / "ray"))

    log, outcome, seed = str(tmp_path / "killed.log"), {}, time.time_ns()
    chance = random.Random(seed)

    def drive() -> None:
        killed = loop_of(plain, uris, str(tmp_path / "killed"), log)
        outcome.update(fit(killed, workers=2, storage_path=str(tmp_path / "ray"), max_failures=KILLS))

    thread = threading.Thread(target=drive)
    thread.start()
    kills: list[int] = []
    born = 0.0
    while len(kills) < KILLS:
        rank, steps = chance.randrange(2), chance.randint(2, 5)
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline and thread.is_alive(), f"kills at {kills} (seed {seed})"
            life = [line for line in lines(log, rank) if line["born"] > born]
            if len(life) >= steps:
                break
            time.sleep(0.02)
        time.sleep(chance.random() * 0.2)
        # both ranks start again with a new life: the later births of the next group are after this moment
        born = time.time()
        os.kill(life[-1]["pid"], signal.SIGKILL)
        kills.append(life[-1]["step"])
    thread.join(300)
    assert not thread.is_alive()
    assert outcome["step"] == STEPS, f"kills at {kills} (seed {seed})"

    curves = [read_metrics(str(tmp_path / name)) for name in ("killed", "whole")]
    losses = [[(line["step"], line["train/loss"]) for line in curve] for curve in curves]
    assert losses[0] == losses[1], f"kills at {kills} (seed {seed})"
    for rank in range(2):
        expected = [(line["step"], line["users"]) for line in lines(str(tmp_path / "whole.log"), rank)]
        assert [step for step, _ in expected] == list(range(STEPS))
        assert [(line["step"], line["users"]) for line in survived(log, rank)] == expected
    # epochs of 200 users, a step of 32: whoever is in the first 192 places is there once
    first = [user for rank in range(2) for line in survived(log, rank) if line["step"] < 6 for user in line["users"]]
    assert len(first) == len(set(first)) > 0
