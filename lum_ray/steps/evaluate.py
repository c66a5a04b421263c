"""evaluate: prediction files of the model and the baselines on the test cuts, the metrics table, and the report."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lum_ray import weights
from lum_ray.artifacts import UserError, commit, find, join, open_artifact, read_bytes, storage, write_table
from lum_ray.config import Run
from lum_ray.data.loader import evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.data.windows import CutPlan, targets
from lum_ray.evaluation import baselines, metrics, protocol
from lum_ray.evaluation.attention import Attention
from lum_ray.evaluation.history import Cuts
from lum_ray.evaluation.pictures import WhatIf
from lum_ray.evaluation.predictions import Predictions, Task, read_predictions
from lum_ray.evaluation.report import ReportFacts, write_report
from lum_ray.lumos.collate import Calendar
from lum_ray.lumos.config import Inputs
from lum_ray.lumos.stage import LumosStage, functionals, layout_of
from lum_ray.stage import to_device
from lum_ray.steps.predict import prediction_tables, trained_stage
from lum_ray.steps.prepare import Log, Prepared, cut_plan, describe, fit_until, prepare, silent
from lum_ray.steps.train import tasks_of, train

BASELINE_USERS = 20_000
BASELINE_DRAWS = 8
PICTURE_USERS = 256
COMMON_EVENT_SHARE = 0.2
"""An event type that is there on more days than this is a background, not an occasion: it is not marked in pictures."""


@dataclass(frozen=True)
class Evaluation:
    """Where the report is, and the table of metrics (schema `protocol.TABLE`)."""

    uri: str
    table: pa.Table


def evaluate(run: Run, log: Log = silent, max_users: int | None = None) -> Evaluation:
    """Predict the test cuts, score them beside the baselines, and write `report.html` and `metrics.parquet`.

    `max_users` takes a stable sample of the test users. Builds what is missing.
    """
    prepared = prepare(run, log)
    checkpoint = train(run, log)
    # the weights are part of the name: after `train --fresh` an old report is not the answer
    name = f"{checkpoint.rsplit('/', 1)[-1]}-{weights.fingerprint(checkpoint)[:6]}" + (
        f"-{max_users}" if max_users else ""
    )
    uri = join(run.root, "reports", name)
    if find(uri) is not None:
        return Evaluation(uri, pq.read_table(pa.BufferReader(read_bytes(join(uri, "metrics.parquet")))))
    end_day = int(prepared.timelines.manifest["end_day"])
    stage = trained_stage(run, prepared, checkpoint, end_day)
    folder = join(run.root, "predictions", f"{name}-test")
    if find(folder) is None:
        log("predicting the test cuts")
        _predict_test(run, prepared, stage, folder, max_users)
    predictions = read_predictions(join(folder, "predictions"), tasks_of(run))
    log(f"scoring {len(predictions.models)} models on {len(predictions.users):,} users")
    table = protocol.evaluate(predictions, tasks_of(run), ours=run.name)
    blind = sorted(
        name for name, outcome in predictions.outcomes.items() if len(np.unique(outcome.y[~np.isnan(outcome.y)])) < 2
    )
    if blind:
        log(
            f"no two different outcomes are known on the test days of {', '.join(blind)}: "
            "no metric can tell models apart there"
        )
    write_table(join(uri, "metrics.parquet"), table)
    log("drawing the report")
    write_report(join(uri, "report.html"), facts_of(run, prepared, checkpoint, predictions, table, tasks_of(run)))
    commit(
        uri,
        {
            "kind": "report",
            "digest": name,
            "checkpoint": checkpoint.rsplit("/", 1)[-1],
            "files": ["report.html", "metrics.parquet"],
        },
    )
    return Evaluation(uri, table)


def by_cohort(run: Run, predictions_uri: str, log: Log = silent) -> pa.Table:
    """The difference between the cohorts of an earlier `predict --cohorts`, now that their days are known.

    Reads what was predicted then and what the timelines say now. Raises UserError where no cohorts were assigned or the
    days have not come yet.
    """
    artifact = open_artifact(predictions_uri)
    if not artifact.manifest.get("cohorts"):
        raise UserError(
            f"{predictions_uri}: expected predictions with cohorts; make them with `lum-ray predict --cohorts ...`"
        )
    prepared = prepare(run, log)
    cut, end_day = int(artifact.manifest["cut_day"]), int(prepared.timelines.manifest["end_day"])
    if cut >= end_day:
        raise UserError(
            f"{predictions_uri}: predicts day {cut} and later, but the data end before it; prepare newer events first"
        )
    checkpoint = join(run.root, "checkpoints", str(artifact.manifest["checkpoint"]))
    stage = trained_stage(run, prepared, checkpoint, end_day)
    log("joining outcomes")
    now = pa.concat_tables(
        prediction_tables(
            stage,
            Timelines.open(prepared.timelines.uri),
            cut_plan(run, "test", end_day),
            run.name,
            run.train.seed,
            cut=cut,
        )
    )
    made = pq.read_table(
        storage(join(predictions_uri, "predictions")).path, filesystem=storage(predictions_uri).filesystem
    )
    keys = ["user", "cut_day", "day", "behaviour"]
    joined = made.drop_columns(["y"]).join(now.select([*keys, "y"]), keys, join_type="inner")
    place = join(predictions_uri, "outcomes", "0000.parquet")
    write_table(place, joined.select(made.column_names))
    cohorts = pq.read_table(pa.BufferReader(read_bytes(join(predictions_uri, "cohorts.parquet"))))
    return protocol.by_cohort(read_predictions(place, tasks_of(run)), cohorts, tasks_of(run))


def _predict_test(run: Run, prepared: Prepared, stage: LumosStage, folder: str, max_users: int | None) -> None:
    timelines = Timelines.open(prepared.timelines.uri)
    end_day = int(prepared.timelines.manifest["end_day"])
    plan = cut_plan(run, "test", end_day)
    seed = run.train.seed
    table = pa.concat_tables(prediction_tables(stage, timelines, plan, run.name, seed, max_users=max_users))
    if table.num_rows == 0:
        raise UserError(
            "split.test: no user has a cut there; check its days, segments and `min_history_days` against the data, "
            f"which go from day {prepared.timelines.manifest['first_day']} to {end_day}"
        )
    write_table(join(folder, "predictions", f"{run.name}.parquet"), table)
    setting = setting_of(run, stage.inputs)
    known = _train_cuts(run, timelines, stage, end_day)
    asked = test_cuts(run, timelines, stage.inputs, end_day, max_users)
    for name, other in baselines.predict_baselines(setting, known, asked, seed).items():
        write_table(join(folder, "predictions", f"{name}.parquet"), other)
    commit(folder, {"kind": "predictions", "digest": folder.rsplit("/", 1)[-1], "rows": table.num_rows})


def setting_of(run: Run, inputs: Inputs) -> baselines.Setting:
    """What is predicted, as models other than ours must know it."""
    return baselines.Setting(
        names=tuple(item.name for item in run.data.behaviours),
        kinds=tuple(item.kind for item in run.data.behaviours),
        gates=tuple(item.gate for item in run.data.behaviours),
        resolutions=tuple(item.resolution if item.kind != "binary" else 1.0 for item in run.data.behaviours),
        future_days=run.section.future_days,
        derived=inputs.derived,
        horizons=inputs.horizons,
    )


def with_targets(rows: Rows, samples: Samples, run: Run, inputs: Inputs, until_day: int) -> Cuts:
    """Samples with the outcomes that are known before `until_day`."""
    daily, over = targets(rows, samples, run.section.future_days, until_day, inputs.derived, inputs.horizons)
    return Cuts(rows, samples, daily, over)


def _train_cuts(run: Run, timelines: Timelines, stage: LumosStage, end_day: int) -> Cuts:
    """Training cuts for the baselines: a stable sample of users, several cuts each."""
    plan, pieces, users = cut_plan(run, "train", end_day), [], 0
    for bucket in np.flatnonzero(timelines.bucket_users).tolist():
        rows = timelines.read([bucket])
        pieces.append(rows.take(np.flatnonzero(plan.ranges(rows)[1])))
        users += len(pieces[-1])
        if users >= BASELINE_USERS:
            break
    rows = Rows.concat(pieces)
    return with_targets(rows, plan.draw(rows, run.seed, 0, BASELINE_DRAWS), run, stage.inputs, fit_until(run, end_day))


def test_cuts(
    run: Run, timelines: Timelines, inputs: Inputs, end_day: int, max_users: int | None, plan: CutPlan | None = None
) -> Cuts:
    """The cuts of a plan (default: the test's), in the order of the model's own predictions."""
    plan = plan or cut_plan(run, "test", end_day)
    pieces, row, cut, base = [], [], [], 0
    for rows, samples, _ in evaluation_batches(
        timelines, plan, lambda rows, samples: {}, 1 << 16, 0, 1, max_users, run.train.seed
    ):
        pieces.append(rows)
        row.append(samples.row + base)
        cut.append(samples.cut)
        base += len(rows)
    if not pieces:
        raise UserError(
            f"no user has a cut on days {plan.from_day} to {plan.until_day}; check `split`, its segments and "
            "`min_history_days` against the data"
        )
    whole = Samples(np.concatenate(row), np.concatenate(cut), np.zeros(sum(map(len, cut)), np.int32))
    return with_targets(Rows.concat(pieces), whole, run, inputs, end_day)


def facts_of(
    run: Run,
    prepared: Prepared,
    checkpoint: str,
    predictions: Predictions,
    table: pa.Table,
    tasks: Mapping[str, Task],
) -> ReportFacts:
    """What the report shows of a run, its predictions of `tasks` and their metrics."""
    facts = describe(run, prepared)
    stage = trained_stage(run, prepared, checkpoint, int(prepared.timelines.manifest["end_day"]))
    record = open_artifact(checkpoint).manifest
    curves = tuple(json.loads(line) for line in read_bytes(join(checkpoint, "metrics.jsonl")).splitlines())
    reliabilities: list[metrics.Reliability] = []
    for name, task in tasks.items():
        if task.kind == "binary" and len(reliabilities) < 8:
            outcomes = predictions.outcomes[name]
            p = predictions.forecasts[name, run.name, run.train.seed]["p"]
            known = ~np.isnan(outcomes.y)
            if known.any():
                reliabilities.append(metrics.reliability(name, outcomes.y[known], p[known]))
    attention, no_attention = _attention(run, prepared, stage)
    what_if, no_what_if = _what_if(run, prepared, stage)
    parameters = sum(p.numel() for p in stage.module.parameters())
    return ReportFacts(
        title=f"{run.name}: LUMOS on {facts['users']:,} users",
        ours=run.name,
        summary=(
            ("checkpoint", checkpoint.rsplit("/", 1)[-1]),
            ("best step", f"{record['best_step']} of {record['step']}"),
            ("parameters", f"{parameters:,}"),
            ("test users", f"{len(predictions.users):,}"),
        ),
        metrics=table,
        curves=curves,
        calibration=tuple(reliabilities),
        attention=attention,
        no_attention=no_attention,
        what_if=what_if,
        no_what_if=no_what_if,
        pad_share=facts["pad_share"],
        data=tuple((name.replace("_", " "), _shown(value)) for name, value in facts.items() if name != "pad_share"),
    )


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)


def _occasions(prepared: Prepared, stage: LumosStage, first: int, last: int) -> list[tuple[str, int, int]]:
    """(type, start, end) of the global and segment rows in [first, last) whose type is not there on most days."""
    rows = [
        row
        for row in prepared.calendar_table.to_pylist()
        if row["scope"] != "user" and row["event_type"] in stage.inputs.event_types
    ]
    days: dict[str, set[int]] = {}
    for row in rows:
        days.setdefault(row["event_type"], set()).update(
            range(max(first, row["start_day"]), min(last, row["end_day"] + 1))
        )
    rare = {name for name, found in days.items() if 0 < len(found) <= COMMON_EVENT_SHARE * (last - first)}
    return [(row["event_type"], row["start_day"], row["end_day"]) for row in rows if row["event_type"] in rare]


def _sample(run: Run, prepared: Prepared, stage: LumosStage, cut: int) -> tuple[Rows, Samples] | None:
    """Up to PICTURE_USERS test users who have a cut on that day."""
    timelines = Timelines.open(prepared.timelines.uri)
    plan, pieces, users = cut_plan(run, "test", int(prepared.timelines.manifest["end_day"])), [], 0
    for bucket in np.flatnonzero(timelines.bucket_users).tolist():
        rows = timelines.read([bucket])
        samples = plan.every(rows)
        pieces.append(rows.take(np.unique(samples.row[samples.cut == cut])))
        users += len(pieces[-1])
        if users >= PICTURE_USERS:
            break
    rows = Rows.concat(pieces)
    if not len(rows):
        return None
    rows = rows.take(np.arange(min(len(rows), PICTURE_USERS)))
    return rows, Samples(np.arange(len(rows)), np.full(len(rows), cut, np.int32), np.zeros(len(rows), np.int32))


def _picture_cut(run: Run, prepared: Prepared, occasions: list[tuple[str, int, int]]) -> int:
    """The test cut with the most occasions on its future days whose kind was there in the history too."""
    plan = cut_plan(run, "test", int(prepared.timelines.manifest["end_day"]))
    first = max(plan.from_day, int(prepared.timelines.manifest["first_day"]) + plan.min_history_days + 1)
    cuts = range(first, max(first, plan.until_day) + 1, plan.every_days)

    def score(cut: int) -> int:
        ahead = {name for name, start, end in occasions if start < cut + run.section.future_days and end >= cut}
        before = {name for name, start, end in occasions if end < cut - 14 and start >= cut - run.section.history_days}
        return len(ahead & before)

    return max(cuts, key=score)


def _attention(run: Run, prepared: Prepared, stage: LumosStage) -> tuple[Attention | None, str]:
    """The mean attention of the future days over the history, with its occasions (Source: LUMOS, figure 4)."""
    manifest = prepared.timelines.manifest
    length, future = run.section.history_days, run.section.future_days
    occasions = _occasions(prepared, stage, int(manifest["first_day"]), int(manifest["end_day"]))
    cut = _picture_cut(run, prepared, occasions)
    found = _sample(run, prepared, stage, cut)
    if found is None:
        return None, f"no test user has a cut on day {cut}"
    batch = to_device(stage.collate(*found), next(stage.module.parameters()).device)
    weights = stage.module.attention(batch)[:, :, :future].float().mean(dim=(0, 1)).detach().cpu().numpy()
    marks = [
        (day - cut + length, name)
        for name, start, end in occasions
        for day in range(max(start, cut - length), min(end, cut - 1) + 1)
    ]
    ahead = tuple(tuple(name for name, start, end in occasions if start <= cut + j <= end) for j in range(future))
    return Attention(weights / weights.sum(axis=1, keepdims=True), tuple(marks), ahead if any(ahead) else ()), ""


def _what_if(run: Run, prepared: Prepared, stage: LumosStage) -> tuple[WhatIf | None, str]:
    """The mean prediction of the first binary behaviour with and without the event type that moves it most."""
    if not stage.inputs.event_types:
        return None, "the run has no calendar"
    occasions = _occasions(
        prepared, stage, int(prepared.timelines.manifest["first_day"]), int(prepared.timelines.manifest["end_day"])
    )
    cut = _picture_cut(run, prepared, occasions)
    found = _sample(run, prepared, stage, cut)
    if found is None:
        return None, f"no test user has a cut on day {cut}"
    layout, future = layout_of(run.section, stage.inputs), run.section.future_days
    table, middle = prepared.calendar_table, cut + future // 2
    with_event = [
        Calendar(pa.concat_tables([table, pa.Table.from_pylist([{
            "scope": "global", "key": None, "start_day": middle, "end_day": middle, "event_type": name,
            "value": float(scale), "known_at": None}], schema=table.schema)]), layout)
        for name, scale in zip(stage.inputs.event_types, stage.inputs.event_scales, strict=True)
    ]  # fmt: skip
    batch = to_device(stage.collate(*found, [stage.calendar, *with_event]), next(stage.module.parameters()).device)
    days, _ = functionals(stage.module, stage.module(batch))
    term = stage.inputs.binary.index(True)
    mean = days["p"][:, :, :, term].mean(axis=0)
    moved = 1 + int(np.abs(mean[1:, future // 2] - mean[0, future // 2]).argmax())
    name = stage.inputs.event_types[moved - 1]
    dated = isinstance(run.split.test.from_day, str) or isinstance(run.split.validate_from, str)
    dates = tuple(
        (datetime.date(1970, 1, 1) + datetime.timedelta(days=cut + j)).strftime("%a %d %b") if dated else str(cut + j)
        for j in range(future)
    )
    return WhatIf(
        behaviour=stage.terms[term],
        unit="probability",
        scenario_name=f"one more `{name}` on {dates[future // 2]}",
        dates=dates,
        baseline=tuple(float(value) for value in mean[0]),
        scenario=tuple(float(value) for value in mean[moved]),
    ), ""
