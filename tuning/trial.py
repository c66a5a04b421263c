"""What one trial does, in a process of its own: wait for its data shape, train, answer the validation cuts."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.integration.ray_train import TuneReportCallback

from lum_ray import catalog, steps
from lum_ray.artifacts import MachineError, UserError, find
from lum_ray.config import Run
from lum_ray.steps.forecasts import forecasts
from lum_ray.steps.gts_train import align_uri
from lum_ray.steps.gts_train import checkpoint_uri as gts_checkpoint_uri
from lum_ray.steps.prepare import silent
from lum_ray.steps.train import checkpoint_uri
from lum_ray.training.loop import StoppedError, Watch
from lum_ray.training.telemetry import read_metrics
from lum_ray.weights import load
from tuning.ledger import Ledger
from tuning.objective import resamples

RENEW_S = 10.0


@dataclass(frozen=True)
class Job:
    """What all trials of a search share. `asked`: the run (JSON) whose validation cuts all answer; `deadline`: of
    time.time(); `folder`: where relative paths start."""

    asked: str
    ledger: str
    metric: str
    deadline: float
    folder: str


def run_trial(config: Mapping[str, Any], job: Job, shapes: Any) -> dict[str, Any]:
    """Run or finish the trial {key, run, steps} and say how it ended; its figures go into the ledger.

    Validations are reported as they come. Whatever stops it, the same trial goes on from its checkpoint; it has failed
    only by what its settings make wrong, and not by what the machines lack, which is raised.
    """
    if os.path.isdir(job.folder):
        os.chdir(job.folder)  # Ray Tune moves into a folder of the trial's
    # a pruned trial closes its loader and its checkpoint before this process takes the next one
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "120"
    ledger, key = Ledger(job.ledger), config["key"]
    asked, run = (catalog.read_run(json.loads(text)) for text in (job.asked, config["run"]))
    run = replace(run, data=replace(run.data, engine="local"))
    if find(ledger.place(key)) is None:
        try:
            ray.get(shapes.prepare.remote(config["run"]))
            _train(run, asked, job, shapes, ledger, key)
        except StoppedError:
            return _said("stopped", job.metric, config["steps"])
        except MachineError:
            raise
        except UserError as error:
            ledger.end(key, "failed", message=str(plain(error)))
    record = ledger.read(key)
    return _said(record.state, job.metric, config["steps"], record.value)


def plain(error: BaseException) -> BaseException:
    """The error itself, where Ray hands it on with the trace of another process as its message."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def _said(state: str, metric: str, steps_done: int, value: float | None = None) -> dict[str, Any]:
    return {"state": state, "step": steps_done, metric: math.nan if value is None else value}


def _train(run: Run, asked: Run, job: Job, shapes: Any, ledger: Ledger, key: str) -> None:
    prepared = steps.prepare(run)
    checkpoint = checkpoint_of(run, prepared)
    ledger.trains(key, checkpoint.rsplit("/", 1)[-1])
    shared = None
    if run.model == "gts" and run.section.align_steps and run.section.fusion == "qformer":
        shared = align_uri(run, prepared)
        while find(shared) is None and not ray.get(shapes.lease.remote(shared, key)):
            if time.time() > job.deadline:
                raise StoppedError(f"{shared}: another trial trains it")
            time.sleep(1.0)
    deadline = job.deadline  # what is told of stopping travels to workers

    def stop() -> bool:
        return time.time() > deadline

    def report(metrics: Mapping[str, float]) -> None:
        if job.metric in metrics:
            tune.report({"step": metrics["step"], job.metric: metrics[job.metric]})

    alone = run.train.workers == 1
    watch = Watch(report, stop) if alone else Watch(None, stop, (TuneReportCallback(),))
    with _renewed(shapes, shared, key) if shared else contextlib.nullcontext():
        steps.train(run, silent, watch=watch)
    folder = forecasts(run, checkpoint, "validate", asked)
    found, _ = resamples(asked, {key: folder}, job.metric)
    value = float(found[key][0])
    if math.isnan(value):
        raise UserError(f"{job.metric}: not known on the validation cuts, or the model predicts no number")
    curve = [(line["step"], line[job.metric]) for line in read_metrics(checkpoint) if job.metric in line]
    size = sum(tensor.numel() for tensor in load(checkpoint).tensors.values())
    ledger.end(key, "finished", value=value, forecasts=folder.rsplit("/", 1)[-1], curve=curve, parameters=size,
               train_s=train_seconds(checkpoint) + (train_seconds(shared) if shared else 0.0))  # fmt: skip


@contextlib.contextmanager
def _renewed(shapes: Any, what: str, who: str) -> Iterator[None]:
    """Within the block a lease does not run out, in whatever processes the training is."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(RENEW_S):
            shapes.lease.remote(what, who)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def checkpoint_of(run: Run, prepared: Any) -> str:
    """Where the run's checkpoint is."""
    return gts_checkpoint_uri(run, prepared) if run.model == "gts" else checkpoint_uri(run, prepared)


def train_seconds(checkpoint: str) -> float:
    """Seconds of training and validation that the checkpoint has cost, over all processes that trained it."""
    seconds, step = 0.0, 0
    lines = read_metrics(checkpoint)
    for line in lines:
        if "time/step_s" in line:
            # a window of the log begins where the last ended, so it holds the validation in between
            seconds += line["time/step_s"] * (line["step"] - step)
            step = line["step"]
    return seconds + (lines[-1].get("time/validate_s", 0.0) if lines else 0.0)
