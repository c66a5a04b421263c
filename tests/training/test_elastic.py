"""A real cluster on this machine: a node dies, training goes on with one worker; a node comes, and it has two again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from lum_ray.training import fit as module
from lum_ray.training.fit import fit
from lum_ray.training.loop import Worker
from lum_ray.training.telemetry import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 160


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head for the driver, without room for a worker, and two nodes of one CPU."""
    if ray.is_initialized():
        ray.shutdown()
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_health_check_period_ms": "1000"}
    made = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()
    os.environ.clear()
    os.environ.update(before)


def loop_of(place: str) -> Any:
    def loop(worker: Worker) -> dict[str, Any]:
        from lum_ray.config import Train
        from lum_ray.training.loop import train_loop
        from tests.training.toy import ToyLoader, ToyStage

        Path(place, "worlds").mkdir(parents=True, exist_ok=True)
        Path(place, "worlds", f"{time.time():.3f}-{worker.rank}-of-{worker.world}").touch()
        settings = Train(steps=STEPS, checkpoint_every=5, zero_stage=2, precision="fp32")
        loader = ToyLoader(rank=worker.rank, world=worker.world, pause_s=0.8)
        return {**train_loop(ToyStage(), loader, None, settings, place, worker, 1), "world": worker.world}

    return loop


def worlds(place: Path) -> list[int]:
    """The numbers of workers of the groups so far, in time; consecutive equal ones once."""
    found = [int(path.name.rsplit("-", 1)[1]) for path in sorted(place.glob("worlds/*-0-of-*"))]
    return [world for index, world in enumerate(found) if index == 0 or world != found[index - 1]]


def wait_for(condition: Any, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_lost_node_and_a_new_one(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loss costs the steps since the last checkpoint only, and the log is that of the uninterrupted run."""
    monkeypatch.setattr(module, "RESIZE_S", 10.0)
    place, whole = tmp_path / "run", tmp_path / "whole"
    outcome: dict[str, Any] = {}

    def drive() -> None:
        outcome.update(fit(loop_of(str(place)), workers=2, min_workers=1, storage_path=str(tmp_path / "ray")))

    thread = threading.Thread(target=drive)
    thread.start()
    wait_for(lambda: len(read_metrics(str(place))) >= 12, 120, "the group of two did not start")
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    wait_for(lambda: worlds(place) == [2, 1], 120, f"no group of one: {worlds(place)}")
    at = len(read_metrics(str(place)))
    wait_for(lambda: len(read_metrics(str(place))) >= at + 8, 120, "the group of one makes no steps")
    cluster.add_node(num_cpus=1)
    thread.join(400)
    assert not thread.is_alive()
    assert worlds(place) == [2, 1, 2]
    assert outcome["step"] == STEPS
    assert outcome["world"] == 2

    from lum_ray.config import Train
    from lum_ray.training.loop import train_loop
    from tests.training.toy import ToyLoader, ToyStage

    settings = Train(steps=STEPS, checkpoint_every=5, precision="fp32")
    train_loop(ToyStage(), ToyLoader(), None, settings, str(whole), None, 1)
    losses = [[line["train/loss"] for line in read_metrics(str(one))] for one in (place, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
