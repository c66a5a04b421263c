"""evaluate for GTS-LUM: rankings of the test cuts, the baselines on the same baskets, metrics and the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from lum_ray import weights
from lum_ray.artifacts import UserError, commit, digest, find, join, open_artifact
from lum_ray.config import Run
from lum_ray.data.loader import evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Int64, Rows, Samples
from lum_ray.evaluation.ranking import evaluate_rankings, read_rankings
from lum_ray.evaluation.ranking_baselines import BASELINES, Popularity, baseline_rankings, targets_facts
from lum_ray.evaluation.ranking_files import ranking_table, targets_table, write_rankings, write_targets
from lum_ray.gts.collate import next_items
from lum_ray.gts.inference import best, rerank, scores_by, without_seen
from lum_ray.gts.predictor import load_stage, record_of
from lum_ray.gts.stage import GtsStage
from lum_ray.stage import Arrays, to_device
from lum_ray.steps.gts_prepare import GtsPrepared, prepare_gts
from lum_ray.steps.gts_report import report
from lum_ray.steps.gts_train import train_gts
from lum_ray.steps.prepare import Log, cut_plan, silent

BATCH = 128
RANKING_VERSION = 2


@dataclass(frozen=True)
class Ranked:
    """The report's folder, and the table of metrics (schema `evaluation.ranking.TABLE`)."""

    uri: str
    table: pa.Table


def evaluate_gts(run: Run, log: Log = silent, max_users: int | None = None) -> Ranked:
    """Score the model's readings beside the baselines on the test cuts, and write the report.

    `max_users`: a stable sample of the test's users. Raises UserError where no test user has anything to predict.
    """
    prepared = prepare_gts(run, log)
    checkpoint = train_gts(run, log)
    stage = trained_stage(run, prepared, checkpoint)
    parts = [_ours(run, prepared, checkpoint, stage, max_users, log), _baselines(run, prepared, max_users, log)]
    log("scoring")
    table = evaluate_rankings(read_rankings(parts), ours=(run.name, "retrieve"))
    baskets = int(open_artifact(parts[0]).manifest["baskets"])
    summary = {
        "test": f"{baskets:,} baskets: what a user takes at her first moment from the cut on, its time unknown",
        "catalogue": f"{stage.inputs.count:,} items, all of them ranked; ties count against the model",
        "model": f"{run.section.llm}, {run.section.keep_layers or 'all'} layers, {run.section.tune}; "
        f"{run.section.max_tokens} tokens; target {run.section.target_position}",
    }
    if run.section.reading == "literal":
        summary["LEAKY"] = "the true target stands in the prefix: an ablation that copies, no forecast"
    return Ranked(report(run, prepared, stage, table, parts, summary, log), table)


def rank_gts(run: Run, log: Log = silent, max_users: int | None = None) -> str:
    """The artifact with the model's own lists of the test cuts, without the baselines beside them and the report."""
    prepared, checkpoint = prepare_gts(run, log), train_gts(run, log)
    return _ours(run, prepared, checkpoint, trained_stage(run, prepared, checkpoint), max_users, log)


def trained_stage(run: Run, prepared: GtsPrepared, checkpoint: str) -> GtsStage:
    """The stage of `checkpoint` (its best weights) on the device that there is.

    Raises UserError where it was trained on other artifacts than the run's, or its LLM is another than it was.
    """
    record, _ = record_of(checkpoint)
    if record["fitted"] != prepared.fitted.manifest["digest"]:
        raise UserError(f"{checkpoint}: trained with fitted statistics {record['fitted']}, the run has others")
    return load_stage(checkpoint, prepared.inputs)[0]


def _batches(
    run: Run, timelines: Timelines, stage: GtsStage, max_users: int | None
) -> Iterator[tuple[Rows, Samples, dict[str, torch.Tensor]]]:
    plan = cut_plan(run, "test", timelines.end_day)
    device = next(stage.module.parameters()).device
    for rows, samples, arrays in evaluation_batches(
        timelines, plan, stage.questions, BATCH, 0, 1, max_users, run.train.seed
    ):
        yield rows, samples, to_device(arrays, device)


def _ours(run: Run, prepared: GtsPrepared, checkpoint: str, stage: GtsStage, max_users: int | None, log: Log) -> str:
    """The artifact with the model's lists: retrieved, with and without seen items, reranked, generated."""
    plan = cut_plan(run, "test", int(prepared.sequences.manifest["end_day"]))
    read = [prepared.sequences.manifest["digest"], weights.fingerprint(checkpoint)]
    name = digest("rankings", RANKING_VERSION, read, plan, max_users, run.section.retrieve, run.section.rerank)
    uri = join(run.root, "predictions", f"{run.name}-{name}")
    if find(uri) is not None:
        return uri
    log("ranking the catalogue for the test users")
    catalogue = prepared.catalogue
    timelines = Timelines.open(prepared.sequences.uri)
    depth, baskets = run.section.retrieve, 0
    for number, (rows, samples, batch) in enumerate(_batches(run, timelines, stage, max_users)):
        target = next_items(rows, samples, stage.inputs.index_of, timelines.end_day)
        users, cuts = rows.user[samples.row], samples.cut
        lists = {}
        with torch.no_grad():
            state = stage.user_states(batch)
            scores = scores_by(stage, batch, "retrieve", state)
            items, values = best(scores, depth)
            lists["retrieve", False] = items, values
            lists["retrieve", True] = best(without_seen(scores, batch), depth)
            if run.section.reads_targets and run.section.rerank:
                lists["rerank", False] = rerank(stage, batch, items, values, run.section.rerank)
            if run.section.generation:
                written = scores_by(stage, batch, "generate", state)
                lists["generate", False] = best(written, depth)
                lists["generate", True] = best(without_seen(written, batch), depth)
        tables = [
            ranking_table(users, cuts, *found, catalogue.ids, run.name, reading, run.train.seed, seen)
            for (reading, seen), found in lists.items()
        ]
        write_rankings(uri, f"{number:05d}", pa.concat_tables(tables))
        baskets += _targets(run, uri, number, rows, samples, prepared, timelines, target)
    if not baskets:
        raise UserError("split.test: no user has an event after a cut there; check its days against the data")
    commit(uri, {"kind": "rankings", "digest": name, "checkpoint": checkpoint.rsplit("/", 1)[-1], "baskets": baskets})
    return uri


def _targets(
    run: Run,
    uri: str,
    number: int,
    rows: Rows,
    samples: Samples,
    prepared: GtsPrepared,
    timelines: Timelines,
    target: tuple[Int64, Int64],
) -> int:
    """Write the targets of a batch, and return how many baskets have any."""
    repeat, history = targets_facts(rows, samples, prepared.catalogue, target)
    trained = cut_plan(run, "train", timelines.end_day).ranges(rows)[1] > 0
    table = targets_table(
        rows.user[samples.row], samples.cut, history, trained[samples.row], *target, repeat, prepared.catalogue.ids
    )
    write_targets(uri, f"{number:05d}", table)
    return len(np.unique(target[0]))


def _baselines(run: Run, prepared: GtsPrepared, max_users: int | None, log: Log) -> str:
    """The artifact with the baselines' lists on the same baskets; another model's are the same."""
    timelines, catalogue = Timelines.open(prepared.sequences.uri), prepared.catalogue
    plan = cut_plan(run, "test", timelines.end_day)
    read = [prepared.sequences.manifest["digest"], prepared.items.manifest["digest"]]
    trained = cut_plan(run, "train", timelines.end_day)
    name = digest("baselines", RANKING_VERSION, read, plan, trained, max_users, run.section.retrieve, run.train.seed)
    uri = join(run.root, "predictions", f"baselines-{name}")
    if find(uri) is not None:
        return uri
    log(f"ranking with the baselines {', '.join(BASELINES)}")
    full = np.flatnonzero(timelines.bucket_users).tolist()
    popularity = Popularity.count((timelines.read([bucket]) for bucket in full), catalogue)
    text_NE = prepared.texts()
    batches = evaluation_batches(timelines, plan, _nothing, BATCH, 0, 1, max_users, run.train.seed)
    for number, (rows, samples, _) in enumerate(batches):
        tables = [
            ranking_table(
                rows.user[samples.row], samples.cut,
                *baseline_rankings(rows, samples, catalogue, popularity, peer, run.section.retrieve, seen, text_NE),
                catalogue.ids, peer, "baseline", 0, seen,
            )
            for peer in BASELINES for seen in (False, True)
        ]  # fmt: skip
        write_rankings(uri, f"{number:05d}", pa.concat_tables(tables))
        target = next_items(rows, samples, catalogue.index_of, timelines.end_day)
        _targets(run, uri, number, rows, samples, prepared, timelines, target)
    commit(uri, {"kind": "rankings", "digest": name, "models": list(BASELINES)})
    return uri


def _nothing(rows: Rows, samples: Samples) -> Arrays:
    return {}
