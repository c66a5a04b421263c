"""train: timelines to a checkpoint, with Ray Train and DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_arrays

from lum_ray import catalog, config
from lum_ray.artifacts import UserError, commit, digest, find, join, open_artifact, remove, write_bytes, write_json
from lum_ray.config import Run
from lum_ray.data.loader import Loader, evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.evaluation.predictions import Task
from lum_ray.evaluation.protocol import validation_names, validation_scores
from lum_ray.lumos.reference import reference_rows
from lum_ray.lumos.stage import LumosStage
from lum_ray.stage import to_device
from lum_ray.steps.prepare import Log, Prepared, cut_plan, fit_until, prepare, select_until, silent
from lum_ray.steps.session import training_session
from lum_ray.training.collectives import gather_columns
from lum_ray.training.fit import fit
from lum_ray.training.loop import Watch, Worker, train_loop

REFERENCE_CUTS = 2000


def tasks_of(run: Run) -> dict[str, Task]:
    """What evaluation must know of each behaviour of the prediction files."""
    kinds = {item.name: item for item in run.data.behaviours}
    tasks = {item.name: Task(item.kind, item.gate) for item in run.data.behaviours}
    tasks |= {item.name: Task("binary") for item in run.data.derived}
    for horizon in run.data.horizons:
        source = kinds[horizon.behaviour]
        gate = f"{source.gate}_any_{horizon.days}" if source.gate else None
        known = {item.name for item in run.data.horizons}
        tasks[horizon.name] = Task(source.kind, gate if gate in known else None, horizon=True)
    return tasks


def check_reported(run: Run, setting: str, name: str, reported: Sequence[str], why: str = "") -> None:
    """Raises UserError unless the metric `name`, asked for by `setting`, is one that the run's validation reports."""
    if name not in reported:
        shown = ", ".join(reported[:8]) + (", ..." if len(reported) > 8 else "")
        raise UserError(f"{setting}: no validation of {run.name} reports {name!r}{why}; expected one of {shown}")


def shaping(run: Run) -> dict[str, Any]:
    """What of `train` shapes the weights; how they are computed does not."""
    how = ("workers", "min_workers", "device", "micro_batch", "checkpoint_every", "max_failures", "zero_stage")
    return {name: value for name, value in asdict(run.train).items() if name not in how}


def commit_checkpoint(uri: str, outcome: Mapping[str, Any]) -> None:
    """Commit a finished checkpoint with what `train_loop` returned."""
    kept = ("step", "best_step", "best_value", "metrics", "stopped_early")
    commit(uri, {"kind": "checkpoint", "digest": uri.rsplit("-", 1)[-1], **{name: outcome[name] for name in kept}})


def checkpoint_uri(run: Run, prepared: Prepared) -> str:
    """Where the run's checkpoint is: named by what shapes it, not by where or on how many workers it is trained."""
    name = digest(prepared.fitted.manifest["digest"], run.split, run.section, shaping(run), run.seed)
    return join(run.root, "checkpoints", f"{run.name}-{name}")


def train(run: Run, log: Log = silent, fresh: bool = False, watch: Watch | None = None) -> str:
    """Train a run, or go on where it was stopped, and return the checkpoint's URI. A finished one is returned as it is.

    `fresh` trains anew; `watch` looks on, and may stop it. Raises UserError before workers start where the run or the
    data are at fault.
    """
    reported = ["eval/loss", *validation_names(tasks_of(run))]
    check_reported(run, "train.keep_best", run.train.keep_best, reported)
    prepared = prepare(run, log)
    uri = checkpoint_uri(run, prepared)
    if not fresh and find(uri) is not None:
        log("already trained")
        return uri
    gpus = training_session(run.train)
    if fresh:
        remove(uri)
    _write_record(run, prepared, uri)
    plain, uris = config.dump(run), (prepared.timelines.uri, prepared.calendar.uri, prepared.fitted.uri)

    def make_loop(worker: Worker) -> dict[str, Any]:
        return _loop(plain, uris, uri, worker)

    log(f"training {run.train.steps} steps of {run.train.batch} windows, {run.train.workers} worker(s)")
    outcome = fit(
        make_loop, run.train.workers, gpus, None, run.name, run.train.max_failures, run.train.min_workers, watch=watch
    )
    commit_checkpoint(uri, outcome)
    return uri


def _write_record(run: Run, prepared: Prepared, uri: str) -> None:
    """run.json (everything that a predictor needs beside the weights) and the reference of what training saw."""
    manifest = prepared.timelines.manifest
    write_json(
        join(uri, "run.json"),
        {
            "model": run.model,
            "run": config.dump(run),
            "inputs": prepared.inputs.to_json(),
            "timelines": manifest["digest"],
            "calendar": prepared.calendar.manifest["digest"] if run.data.calendar else None,
            "fitted": prepared.fitted.manifest["digest"],
            "start_day": manifest["first_day"],
            "end_day": manifest["end_day"],
            "event_columns": prepared.event_columns,
        },
    )
    end_day = int(manifest["end_day"])
    stage = make_stage(run, prepared, fit_until(run, end_day), run.section.cuts_per_window)
    timelines, plan = Timelines.open(prepared.timelines.uri), cut_plan(run, "train", end_day)

    def batches() -> Any:
        left = REFERENCE_CUTS
        for bucket in np.flatnonzero(timelines.bucket_users).tolist():
            rows = timelines.read([bucket])
            samples = plan.draw(rows, run.seed, 0, 1)
            if len(samples):
                yield stage.collate(rows, samples)
            left -= len(samples)
            if left <= 0:
                return

    found = reference_rows(batches(), stage.inputs.rhythm_width, run.section.future_days)
    write_bytes(join(uri, "reference.safetensors"), save_arrays(found))


def make_stage(run: Run, prepared: Prepared, until_day: int, cuts: int = 1) -> LumosStage:
    """The run's stage over its artifacts, with a fresh model."""
    calendar = prepared.calendar_table if run.data.calendar else None
    torch.manual_seed(run.seed + run.train.seed)
    return LumosStage(run.section, prepared.inputs, calendar, until_day, run.split.min_history_days, cuts)


def _loop(plain: Mapping[str, Any], uris: tuple[str, str, str], uri: str, worker: Worker) -> dict[str, Any]:
    """What every worker runs. It is handed plain values, since it may live on another machine."""
    run = catalog.read_run(dict(plain))
    timelines_uri, calendar_uri, fitted_uri = uris
    prepared = Prepared(open_artifact(timelines_uri), open_artifact(calendar_uri), open_artifact(fitted_uri), {})
    timelines = Timelines.open(timelines_uri)
    end_day = int(timelines.manifest["end_day"])
    stage = make_stage(run, prepared, fit_until(run, end_day), run.section.cuts_per_window)
    watching = LumosStage(
        run.section,
        stage.inputs,
        prepared.calendar_table if run.data.calendar else None,
        select_until(run, end_day),
        run.split.min_history_days,
        module=stage.module,
    )
    loader = Loader(
        timelines,
        cut_plan(run, "train", end_day),
        stage.collate,
        batch=run.train.batch,
        micro_batch=run.train.micro_batch,
        draws=1,
        seed=run.train.seed,
        rank=worker.rank,
        world=worker.world,
    )
    validation = _validation(run, timelines, watching, worker)
    try:
        return train_loop(stage, loader, validation, run.train, uri, worker)
    finally:
        loader.close()


def _validation(
    run: Run, timelines: Timelines, stage: LumosStage, worker: Worker
) -> Callable[[torch.nn.Module], Mapping[str, float]]:
    """Scores of every task on the validation cuts: each rank predicts its own users, rank 0 scores them all."""
    plan = cut_plan(run, "validate", int(timelines.manifest["end_day"]))
    names, tasks = np.array(stage.terms), tasks_of(run)

    def validate(module: torch.nn.Module) -> Mapping[str, float]:
        parts: dict[str, list[Any]] = {name: [] for name in ("behaviour", "cut_day", "day", "p", "mean", "y")}
        sums, counts = np.zeros(len(names)), np.zeros(len(names))
        batches = evaluation_batches(
            timelines, plan, stage.collate, 512, worker.rank, worker.world, run.train.validate_users, run.train.seed
        )
        module.eval()
        with torch.no_grad():
            for _, samples, arrays in batches:
                batch = to_device(arrays, worker.device)
                term_sums, term_counts = stage.loss(batch)
                sums += term_sums.double().cpu().numpy()
                counts += term_counts.double().cpu().numpy()
                columns = stage.predict(batch)
                cut = samples.cut[columns["sample"]]
                parts["behaviour"].append(names[columns["term"]])
                parts["cut_day"].append(cut)
                parts["day"].append(cut + columns["offset"])
                for name in ("p", "mean", "y"):
                    parts[name].append(columns[name])
        mine = {name: np.concatenate(part) if part else np.array([]) for name, part in parts.items()}
        gathered = gather_columns({**mine, "_sums": sums, "_counts": counts})
        if gathered is None:
            return {}
        found = [one for one in gathered if len(one["y"])]
        if not found:
            raise UserError("split.validate: no user has a cut there; check its days and users against the data")
        whole = {name: np.concatenate([one[name] for one in found]) for name in parts}
        total = sum(one["_sums"] for one in gathered) / np.maximum(sum(one["_counts"] for one in gathered), 1)
        return {"eval/loss": float(total.sum()), **validation_scores(whole, tasks)}

    return validate
