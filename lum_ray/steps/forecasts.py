"""Prediction files of a trained run for the cuts and users of another: so runs of any data shape answer the same.

What is asked (`split`, users, seed of their sample) is the asking run's; how it is answered (histories, tokens, tree)
is the answering run's. The files are what `evaluate` writes, without baselines.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from lum_ray import weights
from lum_ray.artifacts import UserError, commit, digest, find, join, write_table
from lum_ray.config import Run
from lum_ray.data.loader import evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.evaluation.ranking_baselines import targets_facts
from lum_ray.evaluation.ranking_files import ranking_table, targets_table, write_rankings, write_targets
from lum_ray.gts.collate import next_items
from lum_ray.gts.inference import best, scores_by
from lum_ray.stage import to_device
from lum_ray.steps import gts_evaluate
from lum_ray.steps.gts_prepare import prepare_gts
from lum_ray.steps.predict import prediction_tables, trained_stage
from lum_ray.steps.prepare import cut_plan, prepare, select_until

Part = Literal["validate", "test"]
VERSION = 1
BATCH = 128
DEPTH = 200
"""Places of a list: the longest cut-off of a metric."""


def forecasts(run: Run, checkpoint: str, part: Part, asked: Run) -> str:
    """The folder with the answers of `run`, trained at `checkpoint`, to the `part` of `asked`.

    LUMOS: `predictions/*.parquet`; GTS-LUM: `rankings/` and `targets/`, of reading R. Of the validation
    `asked.train.validate_users` users are taken, of the test all. No outcome of a validation cut is read from the test
    days. Raises UserError where nobody has a cut there.
    """
    users = asked.train.validate_users if part == "validate" else None
    read = [weights.fingerprint(checkpoint), asked.split, asked.section.future_days, users, asked.train.seed]
    name = digest("forecasts", VERSION, checkpoint.rsplit("/", 1)[-1], part, read)
    uri = join(run.root, "predictions", f"{run.name}-{part}-{name}")
    if find(uri) is not None:
        return uri
    write = _gts if run.model == "gts" else _lumos
    if not write(run, checkpoint, part, asked, users, uri):
        raise UserError(f"split.{part}: no user has anything to predict there; check its days against the data")
    commit(uri, {"kind": "forecasts", "digest": name, "checkpoint": checkpoint.rsplit("/", 1)[-1], "part": part})
    return uri


def _lumos(run: Run, checkpoint: str, part: Part, asked: Run, users: int | None, uri: str) -> int:
    prepared = prepare(run)
    end_day = int(prepared.timelines.manifest["end_day"])
    until = select_until(asked, end_day) if part == "validate" else end_day
    stage, timelines = trained_stage(run, prepared, checkpoint, until), Timelines.open(prepared.timelines.uri)
    plan, seed = cut_plan(asked, part, end_day), asked.train.seed
    table = pa.concat_tables(prediction_tables(stage, timelines, plan, run.name, seed, max_users=users))
    write_table(join(uri, "predictions", "0000.parquet"), table)
    return int(table.num_rows)


def _gts(run: Run, checkpoint: str, part: Part, asked: Run, users: int | None, uri: str) -> int:
    prepared = prepare_gts(run)
    stage, timelines = gts_evaluate.trained_stage(run, prepared, checkpoint), Timelines.open(prepared.sequences.uri)
    until = select_until(asked, timelines.end_day) if part == "validate" else timelines.end_day
    plan, trained = cut_plan(asked, part, timelines.end_day), cut_plan(asked, "train", timelines.end_day)
    device, catalogue, found = next(stage.module.parameters()).device, prepared.catalogue, 0
    batches: Any = evaluation_batches(timelines, plan, stage.questions, BATCH, 0, 1, users, asked.train.seed)
    for number, (rows, samples, arrays) in enumerate(batches):
        with torch.no_grad():
            items, scores = best(scores_by(stage, to_device(arrays, device)), DEPTH)
        who = rows.user[samples.row]
        table = ranking_table(who, samples.cut, items, scores, catalogue.ids, run.name, "retrieve", asked.train.seed)
        write_rankings(uri, f"{number:05d}", table)
        target = next_items(rows, samples, stage.inputs.index_of, until)
        repeat, history = targets_facts(rows, samples, catalogue, target)
        seen = (trained.ranges(rows)[1] > 0)[samples.row]
        write_targets(
            uri, f"{number:05d}",
            targets_table(who, samples.cut, history, seen, *target, repeat, catalogue.ids),
        )  # fmt: skip
        found += len(np.unique(target[0]))
    return found
