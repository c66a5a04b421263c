"""Ray Train around a training loop: where its processes run, and that they start again after a failure.

One worker runs in this process, without a cluster or its start-up. Several become a worker group of Ray Train (V2); our
own checkpoint is the truth: a restarted group enters the same loop, which goes on from `last/`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.metrics import Gauge
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lum_ray.artifacts import MachineError, UserError, storage
from lum_ray.training.loop import DivergedError, StoppedError, Watch, Worker

RESIZE_S = 60.0
"""A resize restarts the workers from the last checkpoint, so it should not come too often."""
MakeLoop = Callable[[Worker], dict[str, Any]]
PEERS_TIMEOUT_S = 600
"""Long enough for the slowest wait that is none's fault: rank 0 scores a validation while the others wait for it."""
STOP_POLL_S = 1.0
"""How often a worker of several asks whether the driver was told to stop."""
PLACEMENT_WAIT_S = 1800.0
"""How long a cluster's autoscaler may take to bring the machines that the workers need."""


def fit(
    make_loop: MakeLoop,
    workers: int = 1,
    gpus: bool = False,
    storage_path: str | None = None,
    name: str = "train",
    max_failures: int = 3,
    min_workers: int | None = None,
    peers_timeout_s: int = PEERS_TIMEOUT_S,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Run `make_loop(worker)` on `workers` processes and return what it returned on rank 0.

    `make_loop` builds stage and loader and calls `train_loop`; it is pickled where there are several workers. `gpus`
    gives each worker one GPU. `storage_path` (a URI) keeps Ray's own records, of no use later. A crashed worker
    restarts the group, `max_failures` times at most; so does one that hangs, once the others have waited
    `peers_timeout_s` for it. With `min_workers` it starts again with as many workers as there is room for, at least
    these, and is resized when machines come. `watch` sees and may stop the training. Raises UserError where the session
    has too few CPUs or GPUs (a cluster may take PLACEMENT_WAIT_S to add them), and whatever user error stopped the
    loop, `StoppedError` where `watch` did; else `ray.train.TrainingFailedError`.

    Ctrl-C, and a SIGTERM whose handler raises SystemExit (steps.session), are raised once all workers have saved their
    step; a second one at once.
    """
    check_room(workers, gpus, min_workers)
    if workers == 1:
        return _alone(make_loop, gpus, name, watch)
    watched = watch.stop if watch else None
    # Signals come to the main thread alone; a trial of a search has another, and is stopped by its `watch`.
    stopping = _beside_the_controller() if threading.current_thread() is threading.main_thread() else None

    def loop_per_worker() -> dict[str, Any]:
        _quiet()
        context = ray.train.get_context()
        device = ray.train.torch.get_device() if gpus else torch.device("cpu")
        stop = watched if stopping is None else _told(stopping, watched)
        worker = Worker(context.get_world_rank(), context.get_world_size(), device, _report, gauges(name), stop)
        try:
            return {"result": make_loop(worker)}
        except DivergedError as error:
            # Raised on all ranks alike, and again after each restart: no failure to recover from.
            return {"user_error": str(error)}
        except StoppedError as error:
            return {"stopped": str(error)}

    place = storage(storage_path) if storage_path else None
    trainer = TorchTrainer(
        loop_per_worker,
        torch_config=TorchConfig("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=peers_timeout_s),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers if min_workers is None else (min_workers, workers),
            use_gpu=gpus,
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
        run_config=ray.train.RunConfig(
            # A new name each time: Ray takes up a finished run of the same name.
            name=f"{name}-{uuid.uuid4().hex[:8]}",
            storage_path=place.path if place else None,
            storage_filesystem=place.filesystem if place else None,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            callbacks=list(watch.callbacks) if watch else [],
        ),
    )
    try:
        with _beside_the_driver() if min_workers is not None and not gpus else contextlib.nullcontext():
            outcome = (trainer.fit() if stopping is None else _saved_first(trainer.fit, stopping)).return_value
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            # Ray hands the worker's exception on inside one of its own, in an attribute.
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, UserError):
                raise type(cause)(str(cause)) from error
        raise
    if "user_error" in outcome:
        raise UserError(outcome["user_error"])
    if "stopped" in outcome:
        raise StoppedError(outcome["stopped"])
    result: dict[str, Any] = outcome["result"]
    return result


def _alone(make_loop: MakeLoop, gpus: bool, name: str, watch: Watch | None) -> dict[str, Any]:
    _quiet()
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    report = watch.report if watch and watch.report else _report
    worker = Worker(device=device, report=report, log=gauges(name), stop=watch.stop if watch else None)
    trainer = TorchTrainer(
        lambda: make_loop(worker),
        scaling_config=ray.train.ScalingConfig(num_workers=0, use_gpu=gpus),
    )
    result: dict[str, Any] = trainer.fit().return_value
    return result


def _beside_the_controller() -> Queue:
    """A queue for the word to stop. It is on the driver's machine, as Ray Train's controller is: no other loss of a
    machine can take it from the workers."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


def _told(stopping: Queue, watched: Callable[[], bool] | None) -> Callable[[], bool]:
    """The `stop` of a worker: whether something is in the queue, or `watched` says so."""
    asked_at, told = -math.inf, False

    def stop() -> bool:
        nonlocal asked_at, told
        if not told and time.monotonic() - asked_at > STOP_POLL_S:
            asked_at, told = time.monotonic(), not stopping.empty()
        return told or (watched is not None and watched())

    return stop


def _saved_first(train: Callable[[], Any], stopping: Queue) -> Any:
    """What `train` returns; Ctrl-C and SIGTERM are raised only after the workers have saved their step and returned.

    `train` has a thread of its own: in the main thread Ray Train would take Ctrl-C to abort the workers.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(train())
        except BaseException as error:  # handed to the main thread
            outcome.set_exception(error)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    try:
        return outcome.result()
    except (KeyboardInterrupt, SystemExit):
        stopping.put(None)
        outcome.result()
        raise


def _beside_the_driver() -> contextlib.AbstractContextManager[None]:
    """Within the block Ray Train knows that the CPUs of a submitted job's driver are no room for workers.

    Of machines it counts all CPUs, whoever holds them, and without this would ask again and again for one worker too
    many after a loss. GPUs are left alone: a driver beside several workers holds none.
    """
    cpus = int(os.environ.get("LUM_RAY_DRIVER_CPUS", "0"))  # `lum-ray submit` sets it
    if not cpus:
        return contextlib.nullcontext()
    # not public: only a run that needs it depends on it
    from ray.train._internal.autoscaling_coordinator_client import TrainV1ResourceReservation

    scaling = ray.train.ScalingConfig(num_workers=cpus, resources_per_worker={"CPU": 1})
    reservation: contextlib.AbstractContextManager[None] = TrainV1ResourceReservation(
        f"driver-{uuid.uuid4().hex[:8]}", scaling, cpus
    )
    return reservation


def _quiet() -> None:
    """Ray says each report and each start on stderr; the loop has its own progress line."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)


def _report(metrics: Mapping[str, float]) -> None:
    ray.train.report(dict(metrics))


def gauges(run: str) -> Callable[[Mapping[str, float]], None]:
    """What takes the newest figures to Ray's Prometheus gauges: `train/loss` is `ray_lum_train_loss{run="..."}`."""
    made: dict[str, Gauge] = {}

    def watch(metrics: Mapping[str, float]) -> None:
        if not ray.is_initialized():
            return
        for name, value in metrics.items():
            if name not in made:
                made[name] = Gauge("lum_" + re.sub(r"\W", "_", name), f"{name} of the run", tag_keys=("run",))
            made[name].set(value, {"run": run})

    return watch


def check_room(workers: int, gpus: bool, min_workers: int | None = None) -> None:
    """Raises MachineError where there are fewer CPUs or GPUs than the workers that there must be, on a cluster
    after it had time to grow."""
    if workers == 1:
        if gpus and not torch.cuda.is_available():
            raise MachineError(
                "train: one GPU asked for (train.device), but torch sees none on this machine; on a cluster submit "
                "`train`, which gets one, before what reads the checkpoint"
            )
        return
    if not ray.is_initialized():
        raise MachineError(f"train.workers: {workers} workers need a Ray session, but none runs; start one, or set 1")
    least = workers if min_workers is None else min_workers
    cpus, cards = _resources()
    if least <= cpus and (not gpus or least <= cards):
        return
    if os.environ.get("RAY_ADDRESS") and _grows([{"CPU": 1, **({"GPU": 1} if gpus else {})}] * least):
        return
    cpus, cards = _resources()
    setting = "workers" if min_workers is None else "min_workers"
    most = min(cpus, cards) if gpus else cpus
    raise MachineError(
        f"train.{setting}: {least} asked for, each with one CPU{' and one GPU' if gpus else ''}, but this Ray "
        f"session has {cpus} CPUs and {cards} GPUs; set it to at most {most}, or add machines"
    )


def _resources() -> tuple[int, int]:
    found = ray.cluster_resources()
    return int(found.get("CPU", 0)), int(found.get("GPU", 0))


def _grows(bundles: list[dict[str, float]]) -> bool:
    """Ask the autoscaler for room and wait for it: Ray Train itself would ask again without end."""
    group = placement_group(bundles)
    try:
        return bool(group.wait(PLACEMENT_WAIT_S))
    finally:
        remove_placement_group(group)
