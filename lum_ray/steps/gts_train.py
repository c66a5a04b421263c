"""train for GTS-LUM: Phase I aligns the Q-Former with the texts, Phase II trains it in front of the LLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lum_ray import catalog, config, weights
from lum_ray.artifacts import UserError, digest, find, join, open_artifact, remove, write_json
from lum_ray.config import Run
from lum_ray.data.loader import Loader, evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.evaluation.ranking import basket_metrics, ranks_of
from lum_ray.gts.align_stage import AlignStage
from lum_ray.gts.behaviours import Behaviours
from lum_ray.gts.collate import next_items
from lum_ray.gts.llm import digest as llm_digest
from lum_ray.gts.llm import load
from lum_ray.gts.stage import GtsStage
from lum_ray.stage import Arrays, to_device
from lum_ray.steps.gts_prepare import GtsPrepared, prepare_gts
from lum_ray.steps.prepare import Log, cut_plan, fit_until, select_until, silent
from lum_ray.steps.session import training_session
from lum_ray.steps.train import check_reported, commit_checkpoint, shaping
from lum_ray.training.collectives import gather_columns
from lum_ray.training.fit import fit
from lum_ray.training.loop import Watch, Worker, train_loop

ALIGN_VERSION, MODEL_VERSION = 10, 13
"""Part of the digests of Phase I's and Phase II's checkpoints: raised whenever the same settings train otherwise."""
BATCH = 128
CUTOFFS = (5, 10)
METRICS = ("eval/recall_5", "eval/recall_10", "eval/ndcg_10", "eval/mrr")
OF_PHASE_2 = ("project", "norm")
"""Parts of the behaviours that Phase I does not train."""
ALIGN_FIELDS = ("modalities", "fusion", "width", "heads", "layers", "queries", "dropout", "branching", "output_width",
                "align_steps", "align_tasks", "align_group", "window", "text_tokens", "slot_minutes")  # fmt: skip


def checkpoint_uri(run: Run, prepared: GtsPrepared) -> str:
    """Where the run's checkpoint is: named by what shapes it."""
    name = digest(MODEL_VERSION, prepared.fitted.manifest["digest"], run.split, run.section, shaping(run), run.seed)
    return join(run.root, "checkpoints", f"{run.name}-{name}")


def align_uri(run: Run, prepared: GtsPrepared) -> str:
    """Where Phase I's checkpoint is; what Phase II alone reads does not rename it."""
    train = {name: value for name, value in shaping(run).items() if name != "steps"}
    section = {name: getattr(run.section, name) for name in ALIGN_FIELDS}
    name = digest("align", ALIGN_VERSION, prepared.fitted.manifest["digest"], run.split, section, train, run.seed)
    return join(run.root, "checkpoints", f"{run.name}-align-{name}")


def train_gts(run: Run, log: Log = silent, fresh: bool = False, watch: Watch | None = None) -> str:
    """Train both phases, or go on where it was stopped, and return the checkpoint's URI.

    `watch` may stop either phase, and hears of Phase II's validations alone.
    """
    check_reported(run, "train.keep_best", run.train.keep_best, METRICS)
    prepared = prepare_gts(run, log)
    uri = checkpoint_uri(run, prepared)
    aligned = align_uri(run, prepared) if run.section.align_steps and run.section.fusion == "qformer" else None
    if not fresh and find(uri) is not None:
        log("already trained")
        return uri
    llm = {"name": run.section.llm, "revision": run.section.revision, "digest": llm_digest(load(run.section).decoder)}
    gpus = training_session(run.train)
    if fresh:
        for stale in [uri, *([aligned] if aligned else [])]:
            remove(stale)
    plain = config.dump(run)
    uris = tuple(item.uri for item in (prepared.sequences, prepared.items, prepared.tree, prepared.fitted))
    if aligned and find(aligned) is None:
        log(f"Phase I: {run.section.align_steps} steps of {len(run.section.align_tasks)} alignment tasks")
        _record(run, prepared, aligned, None, llm)
        outcome = fit(
            lambda worker: _align_loop(plain, uris, aligned, worker), run.train.workers, gpus, None,
            f"{run.name}-align", run.train.max_failures, run.train.min_workers,
            watch=watch.unheard() if watch else None,
        )  # fmt: skip
        commit_checkpoint(aligned, outcome)
    log(f"Phase II: {run.train.steps} steps of {run.train.batch} histories, {run.train.workers} worker(s)")
    _record(run, prepared, uri, aligned, llm)
    outcome = fit(
        lambda worker: _loop(plain, uris, uri, aligned, worker), run.train.workers, gpus, None, run.name,
        run.train.max_failures, run.train.min_workers, watch=watch,
    )  # fmt: skip
    commit_checkpoint(uri, outcome)
    return uri


def _record(run: Run, prepared: GtsPrepared, uri: str, aligned: str | None, llm: Mapping[str, Any]) -> None:
    """run.json: everything that a predictor needs beside the weights, by name and digest."""
    parts = {"sequences": prepared.sequences, "items": prepared.items, "tree": prepared.tree, "fitted": prepared.fitted}
    write_json(
        join(uri, "run.json"),
        {
            "model": run.model,
            "run": config.dump(run),
            **{name: artifact.manifest["digest"] for name, artifact in parts.items()},
            "aligned": aligned.rsplit("/", 1)[-1] if aligned else None,
            "llm": llm,
            "start_day": prepared.sequences.manifest["first_day"],
            "end_day": prepared.sequences.manifest["end_day"],
        },
    )


def opened(uris: tuple[str, ...]) -> GtsPrepared:
    """The four artifacts at `uris`, on whatever machine this runs."""
    return GtsPrepared(*(open_artifact(uri) for uri in uris))


def make_stage(run: Run, prepared: GtsPrepared, until_day: int) -> GtsStage:
    """The run's Phase II stage over its artifacts, with a fresh model."""
    torch.manual_seed(run.seed + run.train.seed)
    return GtsStage(run.section, prepared.inputs, until_day, run.train.seed)


def _align_loop(plain: Mapping[str, Any], uris: tuple[str, ...], uri: str, worker: Worker) -> dict[str, Any]:
    run = catalog.read_run(dict(plain))
    prepared = opened(uris)
    timelines = Timelines.open(prepared.sequences.uri)
    torch.manual_seed(run.seed + run.train.seed)
    behaviours = Behaviours(run.section, prepared.inputs, 1)
    stage = AlignStage(run.section, prepared.inputs, behaviours, run.train.seed)
    steps = run.section.align_steps
    settings = replace(
        run.train,
        steps=steps,
        keep_best="eval/loss",
        validate_every=max(1, steps // 4),
        checkpoint_every=max(1, steps // 4),
    )
    loader = _loader(run, timelines, stage.collate, worker)
    plan = cut_plan(run, "validate", timelines.end_day)

    def validate(module: torch.nn.Module) -> Mapping[str, float]:
        sums, counts = np.zeros(len(stage.terms)), np.zeros(len(stage.terms))
        batches = evaluation_batches(
            timelines, plan, stage.collate, BATCH, worker.rank, worker.world, min(run.train.validate_users, 256),
            run.train.seed,
        )  # fmt: skip
        module.eval()
        with torch.no_grad():
            for _, _, arrays in batches:
                term_sums, term_counts = stage.loss(to_device(arrays, worker.device))
                sums += term_sums.double().cpu().numpy()
                counts += term_counts.double().cpu().numpy()
        gathered = gather_columns({"sums": sums, "counts": counts}) or []
        if not gathered:
            return {}
        means = sum(part["sums"] for part in gathered) / np.maximum(sum(part["counts"] for part in gathered), 1)
        each = {f"eval/{name}_loss": float(value) for name, value in zip(stage.terms, means, strict=True)}
        return {"eval/loss": float(means.sum()), **each}

    try:
        return train_loop(stage, loader, validate, settings, uri, worker)
    finally:
        loader.close()


def _loop(
    plain: Mapping[str, Any], uris: tuple[str, ...], uri: str, aligned: str | None, worker: Worker
) -> dict[str, Any]:
    """What every worker runs in Phase II. It is handed plain values, since it may live on another machine."""
    run = catalog.read_run(dict(plain))
    prepared = opened(uris)
    timelines = Timelines.open(prepared.sequences.uri)
    stage = make_stage(run, prepared, fit_until(run, timelines.end_day))
    if aligned is not None:
        take_aligned(stage, aligned)
    loader = _loader(run, timelines, stage.collate, worker)
    try:
        return train_loop(stage, loader, _validation(run, timelines, stage, worker), run.train, uri, worker)
    finally:
        loader.close()


def take_aligned(stage: GtsStage, aligned: str) -> None:
    """Phase II's Q-Former, modality projections and ID embeddings start from those of Phase I."""
    prefix = "behaviours."
    own = stage.module.behaviours
    found = {
        name.removeprefix(prefix): value
        for name, value in weights.load(aligned).tensors.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(OF_PHASE_2)
    }
    missing, unexpected = own.load_state_dict(found, strict=False)
    wrong = [name for name in missing if not name.startswith(OF_PHASE_2)] + list(unexpected)
    if wrong:
        raise UserError(f"{aligned}: Phase I of another shape, it lacks or adds {', '.join(wrong[:5])}; use --fresh")


def _loader(run: Run, timelines: Timelines, collate: Callable[[Rows, Samples], Arrays], worker: Worker) -> Loader:
    return Loader(
        timelines, cut_plan(run, "train", timelines.end_day), collate, batch=run.train.batch,
        micro_batch=run.train.micro_batch, draws=1, seed=run.train.seed, rank=worker.rank, world=worker.world,
    )  # fmt: skip


def _validation(
    run: Run, timelines: Timelines, stage: GtsStage, worker: Worker
) -> Callable[[torch.nn.Module], Mapping[str, float]]:
    """Reading R on the validation cuts: recall, NDCG and MRR over the whole catalogue."""
    plan, until = cut_plan(run, "validate", timelines.end_day), select_until(run, timelines.end_day)

    def validate(module: torch.nn.Module) -> Mapping[str, float]:
        module.eval()
        parts: list[dict[str, Any]] = []
        with torch.no_grad():
            for rows, samples, arrays in evaluation_batches(
                timelines, plan, stage.questions, BATCH, worker.rank, worker.world, run.train.validate_users,
                run.train.seed,
            ):  # fmt: skip
                target = next_items(rows, samples, stage.inputs.index_of, until)
                scores = stage.scores(to_device(arrays, worker.device)).float().cpu().numpy()
                depth = max(scores.shape[1], *CUTOFFS)
                found = basket_metrics(ranks_of(scores, target), target[0], len(samples), depth, CUTOFFS)
                parts.append({name: found[name][np.isin(np.arange(len(samples)), target[0])] for name in METRICS})
        mine = {name: np.concatenate([part[name] for part in parts]) if parts else np.zeros(0) for name in METRICS}
        gathered = gather_columns(mine)
        if gathered is None:
            return {}
        whole = {name: np.concatenate([part[name] for part in gathered]) for name in METRICS}
        if not len(whole[METRICS[0]]):
            raise UserError("split.validate: no user has an event after a cut there; check its days against the data")
        return {name: float(value.mean()) for name, value in whole.items()}

    return validate
