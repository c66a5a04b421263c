"""Ray Train around the loop: one worker in this process, several in a group that survives a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from lum_ray.artifacts import UserError
from lum_ray.training.fit import check_room, fit, gauges
from lum_ray.training.loop import Worker
from lum_ray.training.telemetry import read_metrics
from lum_ray.weights import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(address="local", num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


def test_one_worker_runs_here_without_a_session(capfd: pytest.CaptureFixture[str]) -> None:
    heard = []

    def loop(worker: Worker) -> dict[str, Any]:
        worker.report({"step": 1})
        heard.append(os.getpid())
        return {"rank": worker.rank, "world": worker.world}

    before = ray.is_initialized()
    assert fit(loop) == {"rank": 0, "world": 1}
    assert heard == [os.getpid()]
    assert ray.is_initialized() == before
    assert "Reported metrics" not in capfd.readouterr().err


def test_what_is_watched_becomes_gauges_by_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, list[Any]] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.values = found.setdefault(name, [])

        def set(self, value: float, tags: dict[str, str]) -> None:
            self.values.append((value, tags))

    monkeypatch.setattr("lum_ray.training.fit.Gauge", Gauge)
    watch = gauges("mine")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    watch({"train/loss": 1.0})
    assert found == {}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for loss in (2.0, 3.0):
        watch({"train/loss": loss, "eval/roc-auc": 0.5})
    assert found["lum_train_loss"] == [(2.0, {"run": "mine"}), (3.0, {"run": "mine"})]
    assert set(found) == {"lum_train_loss", "lum_eval_roc_auc"}


def test_an_error_of_one_worker_comes_as_it_is() -> None:
    def loop(worker: Worker) -> dict[str, Any]:
        raise UserError("data.events: no rows")

    with pytest.raises(UserError, match=r"^data.events: no rows$"):
        fit(loop)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="one GPU asked for"):
        fit(lambda worker: {}, gpus=True)


@pytest.mark.ray
def test_more_workers_than_the_session_has_are_refused(session: None) -> None:
    with pytest.raises(UserError, match=r"workers: 65 asked for, each with one CPU, but this Ray session has \d+"):
        fit(lambda worker: {}, workers=65)
    with pytest.raises(UserError, match=r"and one GPU, but this Ray session has \d+ CPUs and 0 GPUs; set"):
        fit(lambda worker: {}, workers=2, gpus=True)
    # An elastic group needs no GPU in the driver's process, also where one worker is enough.
    with pytest.raises(UserError, match=r"train.min_workers: 1 asked for, .* has \d+ CPUs and 0 GPUs; set"):
        fit(lambda worker: {}, workers=2, gpus=True, min_workers=1)
    check_room(2, False, min_workers=1)


@pytest.mark.ray
def test_a_cluster_that_does_not_grow_is_waited_for_and_then_refused(
    session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "here")
    monkeypatch.setattr("lum_ray.training.fit.PLACEMENT_WAIT_S", 0.5)
    with pytest.raises(UserError, match="workers: 65 asked for"):
        fit(lambda worker: {}, workers=65)
    assert ray.util.placement_group_table() == {} or all(
        group["state"] == "REMOVED" for group in ray.util.placement_group_table().values()
    )


GROWING = """
import os, threading, ray
from ray.cluster_utils import Cluster
from lum_ray.training import fit
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
ray.init(address=cluster.address, log_to_driver=False)
os.environ["RAY_ADDRESS"] = cluster.address
waiting = threading.Thread(target=fit.check_room, args=(3, False))
waiting.start()
cluster.add_node(num_cpus=2)
waiting.join(60)
assert not waiting.is_alive()
print("placed on", int(ray.cluster_resources()["CPU"]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.faults
def test_a_cluster_that_grows_is_waited_for() -> None:
    done = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert done.stdout.strip() == "placed on 3", done.stderr


@pytest.mark.ray
@pytest.mark.faults
def test_an_error_of_one_of_two_workers_comes_as_it_is(session: None) -> None:
    def loop(worker: Worker) -> dict[str, Any]:
        from lum_ray.artifacts import UserError

        if worker.rank == 1:
            raise UserError("data.events: no rows in shard 7")
        return {}

    with pytest.raises(UserError, match=r"^data.events: no rows in shard 7$"):
        fit(loop, workers=2, max_failures=0)


@pytest.mark.ray
def test_two_workers_survive_a_crash(session: None, tmp_path: Path) -> None:
    """Rank 1 dies after a checkpoint; the group starts again and follows the uninterrupted run."""
    place = tmp_path / "run"

    def loop(worker: Worker) -> dict[str, Any]:
        from lum_ray.config import Train
        from lum_ray.training.checkpoint import steps
        from lum_ray.training.loop import train_loop
        from tests.training.toy import ToyLoader, ToyStage

        class Crashing(ToyLoader):
            def seek(self, step: int) -> Any:
                for item in super().seek(step):
                    if worker.rank == 1 and step == 0 and item.index >= 5 and steps(str(place / "last")):
                        os._exit(1)
                    yield item

        settings = Train(steps=9, checkpoint_every=3, validate_every=3, keep_best="eval/one", zero_stage=2)
        loader = Crashing(rank=worker.rank, world=worker.world, pause_s=0.2)
        result = train_loop(ToyStage(0.2), loader, lambda module: {"eval/one": 1.0}, settings, str(place), worker, 1)
        return {**result, "world": worker.world}

    result = fit(loop, workers=2, storage_path=str(tmp_path / "ray"), max_failures=1)
    assert result["world"] == 2
    assert result["step"] == 9
    assert result["resumed_from"] in (3, 6)
    assert [line["step"] for line in read_metrics(str(place))] == list(range(1, 10))


STOPPED = """
import sys
from lum_ray.steps.session import start_ray
from lum_ray.training.fit import fit

place = sys.argv[1]

def loop(worker):
    from lum_ray.config import Train
    from lum_ray.training.loop import train_loop
    from tests.training.toy import ToyLoader, ToyStage
    loader = ToyLoader(rank=worker.rank, world=worker.world, pause_s=0.05)
    settings = Train(steps=5000, checkpoint_every=5000)
    return train_loop(ToyStage(), loader, None, settings, place, worker, 1)

start_ray()
try:
    fit(loop, workers=2, storage_path=place + "-ray")
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.faults)]
)
def test_several_workers_save_their_step_before_a_signal_ends_the_command(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    place = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(place)], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = place / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does, to Ray's processes too
    else:
        process.send_signal(number)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, said
    assert load(str(place / "last")).loop["step"] == len(read_metrics(str(place))) < 5000


@pytest.mark.ray
@pytest.mark.faults
def test_a_worker_that_hangs_is_given_up(session: None, tmp_path: Path) -> None:
    """Rank 1 stops without a word, as on a machine that froze: rank 0 does not wait for it for ever."""
    place = tmp_path / "run"

    def loop(worker: Worker) -> dict[str, Any]:
        import signal

        from lum_ray.config import Train
        from lum_ray.training.checkpoint import steps
        from lum_ray.training.loop import train_loop
        from tests.training.toy import ToyLoader, ToyStage

        class Freezing(ToyLoader):
            def seek(self, step: int) -> Any:
                for item in super().seek(step):
                    if worker.rank == 1 and step == 0 and item.index >= 5 and steps(str(place / "last")):
                        os.kill(os.getpid(), signal.SIGSTOP)
                    yield item

        settings = Train(steps=9, checkpoint_every=3, validate_every=9, keep_best="eval/one")
        loader = Freezing(rank=worker.rank, world=worker.world, pause_s=0.2)
        return train_loop(ToyStage(0.2), loader, lambda module: {"eval/one": 1.0}, settings, str(place), worker, 1)

    started_at = time.monotonic()
    result = fit(loop, workers=2, storage_path=str(tmp_path / "ray"), max_failures=1, peers_timeout_s=8)
    assert result["step"] == 9
    assert result["resumed_from"] in (3, 6)
    assert time.monotonic() - started_at < 600  # not the 1,800 s of torch
