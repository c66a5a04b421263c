"""The leak battery on a trained run of LUMOS: what `evaluation/audit` judges is measured here.

Source: FIELD.md, section 3; DESIGN.md, section 4 (a future day depends on its own events and the history alone).

Legend: B samples, F future days, X days that the queries look at, C cuts (one here), E event rows, S their width.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.data.windows import UNKNOWN_AHEAD, visible
from lum_ray.evaluation import audit
from lum_ray.evaluation.audit import Check
from lum_ray.lumos.fitting import fit_inputs, with_starts
from lum_ray.lumos.stage import LumosStage
from lum_ray.stage import to_device
from lum_ray.steps.audit_rows import Cases, differing, training_cases, with_future
from lum_ray.steps.prepare import STARTS_BUCKETS, Log, Prepared, cut_plan, fit_until

BATCH = 128
FORECASTS = ("p", "mean", "median", "low", "high")
TOLERANCE = 1e-5
"""Of what moves with its place in a batch: sums there may be taken in another order."""
Numbers = npt.NDArray[np.float64]


def lumos_checks(run: Run, prepared: Prepared, stage: LumosStage, cases: Cases, log: Log) -> list[Check]:
    """The table of a trained run over `cases`, samples of its test plan. `stage` is in evaluation mode."""
    timelines = Timelines.open(prepared.timelines.uri)
    log(f"predicting {len(cases):,} cuts of {len(np.unique(cases.user)):,} users as they are and as must not matter")
    table = prepared.calendar_table if run.data.calendar else None
    checks = [*unchanged_checks(stage, cases), *future_checks(stage, cases), calendar_check(run, stage, cases, table)]
    checks.append(null_check(run, stage, cases))
    log("fitting again without what came from the train cut on")
    return [*checks, training_check(run, stage, timelines, table), fitted_check(run, stage, timelines, table)]


def forecasts(stage: LumosStage, cases: Cases) -> Numbers:
    """Every forecast of every sample, (rows of the prediction file, 5), without its outcome."""
    device = next(stage.module.parameters()).device
    found = []
    for part in cases.parts(BATCH):
        some = cases.take(part)
        columns = stage.predict(to_device(stage.collate(some.rows, some.samples), device))
        found.append(np.stack([columns[name] for name in FORECASTS], axis=1).astype(np.float64))
    return np.concatenate(found)


def unchanged_checks(stage: LumosStage, cases: Cases) -> list[Check]:
    """Swapped labels, and everything from the cut on removed: all forecasts stay to the bit."""
    others, cut = cases.strangers(), cases.samples.cut.astype(np.int64)
    before = forecasts(stage, cases)
    control = audit.largest_change(
        before, forecasts(stage, cases.take(np.where(others >= 0, others, np.arange(len(cases)))))
    )
    worlds = {
        "swap labels": (cases.with_rows(with_future(cases.rows, cut, others)),
                        "days from the cut on replaced by other users': forecasts"),
        "truncate": (cases.truncated(), "everything from the cut on removed: forecasts"),
    }  # fmt: skip
    return [
        audit.unchanged(name, compared, audit.largest_change(before, forecasts(stage, world)), control)
        for name, (world, compared) in worlds.items()
    ]


def future_checks(stage: LumosStage, cases: Cases) -> list[Check]:
    """Permuted future days permute the outputs; another event on day j changes no other day."""
    names = ("permute future days", "change one day's event")
    asked = ("future days turned round, with what marks their place: outputs turned back",
             "another event vector on one future day: the other days' outputs")  # fmt: skip
    config, future = stage.config, stage.config.future_days
    if config.decoder_self_attention:
        why = "decoder_self_attention: future days see each other"
        return [audit.not_applicable(name, one, why) for name, one in zip(names, asked, strict=True)]
    device = next(stage.module.parameters()).device
    turned = permuted_module(stage)
    order = np.arange(future)[::-1].copy()
    moved, moved_control, other, own = 0.0, 0.0, 0.0, 0.0
    for part in cases.parts(BATCH):
        some = cases.take(part)
        batch = to_device(stage.collate(some.rows, some.samples), device)
        events = batch["event_rows_ES"]
        # the changed vector is there in both batches, so that their sums are the same
        batch = {**batch, "event_rows_ES": torch.cat([events, 1.0 - events[:1]])}
        before = _daily(stage.module, batch)
        if turned is not None:
            days = batch["future_event_BCX"].clone()
            days[:, :, :future] = days[:, :, order]
            after = _daily(turned, {**batch, "future_event_BCX": days})
            moved = max(moved, relative_change(before, after[:, :, order]))
            moved_control = max(moved_control, relative_change(before, after))
        for day in range(future):
            days = batch["future_event_BCX"].clone()
            days[:, :, day] = len(events)
            after = _daily(stage.module, {**batch, "future_event_BCX": days})
            rest = np.arange(future) != day
            other = max(other, relative_change(before[:, :, rest], after[:, :, rest]))
            own = max(own, relative_change(before[:, :, ~rest], after[:, :, ~rest]))
    if turned is None:
        first = audit.not_applicable(names[0], asked[0], f"positions: {config.positions} cannot be moved with the days")
    else:
        first = audit.unchanged(names[0], asked[0], moved, moved_control, TOLERANCE)
    return [first, audit.unchanged(names[1], asked[1], other, own, TOLERANCE)]


def permuted_module(stage: LumosStage) -> Any:
    """A copy whose future days' own parameters stand in the opposite order; None where their places are computed."""
    if stage.config.positions not in ("learned", "lags"):
        return None
    module, future = copy.deepcopy(stage.module), stage.config.future_days
    with torch.no_grad():
        for name, axis in (("position_FD", 0), ("lag_MQT", 1)):
            parameter = getattr(module, name)
            if parameter is not None:
                own = parameter.narrow(axis, 0, future)
                own.copy_(own.flip(axis).clone())
    return module


@torch.no_grad()
def _daily(module: Any, batch: Mapping[str, torch.Tensor]) -> Numbers:
    return np.asarray(module(batch)["daily_BCFVP"].double().cpu().numpy())


def relative_change(before: Numbers, after: Numbers) -> float:
    """The largest difference, as a share of the number where that is above 1."""
    return audit.largest_change(before / np.maximum(1, np.abs(before)), after / np.maximum(1, np.abs(before)))


def calendar_check(run: Run, stage: LumosStage, cases: Cases, table: pa.Table | None) -> Check:
    """Rows that become known on the day of the cut change nothing; the same rows, known a day before, do."""
    name, compared = "calendar", "rows known from the cut's own day on added: forecasts"
    types = stage.inputs.event_types
    if table is None or not types:
        return audit.not_applicable(name, compared, "the run has no calendar events")
    if stage.config.future_events == "shuffled":
        return audit.not_applicable(name, compared, "future_events: shuffled moves all rows")
    change, control = 0.0, 0.0
    for cut in np.unique(cases.samples.cut).tolist():
        some = cases.take(np.flatnonzero(cases.samples.cut == cut))
        before = forecasts(stage, some)
        first, last = cut - stage.config.history_days, cut + 2 * stage.config.future_days
        everyone = [("global", None, first, last, kind) for kind in types]
        # a user's row without a `known_at` is known from its first day on
        own = [("user", str(user), cut, last, kind) for user in set(some.rows.user.tolist()) for kind in types]
        late = [(*row, cut) for row in everyone] + [(*row, None) for row in own]
        known = [(*row, cut - 1) for row in everyone]
        moved = [
            audit.largest_change(before, forecasts(_with_rows(stage, table, rows), some)) for rows in (late, known)
        ]
        change, control = max(change, moved[0]), max(control, moved[1])
    return audit.unchanged(name, compared, change, control)


def _with_rows(stage: LumosStage, table: pa.Table, rows: list[tuple[Any, ...]]) -> LumosStage:
    scope, key, start, end, kind, known = map(list, zip(*rows, strict=True))
    columns = {"scope": scope, "key": key, "start_day": start, "end_day": end, "event_type": kind,
               "value": [1.0] * len(rows), "known_at": known}  # fmt: skip
    arrays = [pa.array(columns[field.name], field.type) for field in table.schema]
    return _another(
        stage, pa.concat_tables([table, pa.table(arrays, schema=table.schema)]), stage.until_day, stage.cuts
    )


def _another(stage: LumosStage, table: pa.Table | None, until_day: int, cuts: int) -> LumosStage:
    """The same model seen through another calendar, or trained with other cuts."""
    return LumosStage(stage.config, stage.inputs, table, until_day, stage.min_history_days, cuts, stage.module)


def null_check(run: Run, stage: LumosStage, cases: Cases) -> Check:
    """In the null world nobody's days are likelier than another's."""
    name, compared = "null world", "days of a world in which all users and days are alike"
    source = run.data.source
    if source is None or source.options.get("world") != "null":
        return audit.not_applicable(name, compared, "data.source is no simulator with world: null")
    binary = [index for index, item in enumerate(run.data.behaviours) if item.kind == "binary"]
    if not binary:
        return audit.not_applicable(name, compared, "the run has no binary behaviour")
    device = next(stage.module.parameters()).device
    y, p, user = [], [], []
    for part in cases.parts(BATCH):
        some = cases.take(part)
        columns = stage.predict(to_device(stage.collate(some.rows, some.samples), device))
        chosen = columns["term"] == binary[0]
        y.append(columns["y"][chosen])
        p.append(columns["p"][chosen].astype(np.float64))
        user.append(some.user[columns["sample"][chosen]])
    compared = f"{run.data.behaviours[binary[0]].name} on {compared}"
    return audit.no_skill(name, compared, *map(np.concatenate, (y, p, user)))


def training_check(run: Run, stage: LumosStage, timelines: Timelines, table: pa.Table | None) -> Check:
    """A training batch reads nothing from the train cut on."""
    until = fit_until(run, timelines.end_day)
    cases = training_cases(timelines, cut_plan(run, "train", timelines.end_day), run.train.seed, run.train.batch)
    trained = _another(stage, table, until, stage.config.cuts_per_window)
    batch = trained.collate(cases.rows, cases.samples)
    without = cases.truncated(np.full(len(cases), until))
    same = differing(batch, trained.collate(without.rows, without.samples))
    return audit.identical("training batch", f"events from day {until} on removed: its arrays", same, len(batch))


def fitted_check(run: Run, stage: LumosStage, timelines: Timelines, table: pa.Table | None) -> Check:
    """Scales, vocabularies and starts, fitted again without later days and without what became known later."""
    until, inputs = fit_until(run, timelines.end_day), stage.inputs
    plan = cut_plan(run, "train", timelines.end_day)
    full = np.flatnonzero(timelines.bucket_users).tolist()

    def before(bucket: int) -> Rows:
        rows = timelines.read([bucket])
        return with_future(rows, np.full(len(rows), until), None)

    def buckets() -> Iterator[Rows]:
        for bucket in full:
            rows = before(bucket)
            yield rows.take(np.flatnonzero(plan.users(rows)))

    def windows(bucket: int) -> tuple[Rows, Samples]:
        rows = before(bucket)
        return rows, plan.draw(rows, run.seed, 0, 4)

    if table is not None:
        default = pc.if_else(pc.equal(table["scope"], "user"), table["start_day"], pa.scalar(UNKNOWN_AHEAD, pa.int32()))
        known = pc.coalesce(table["known_at"], default)
        table = table.filter(pa.array(visible(known.to_numpy(), until)))
    profiles = run.data.profiles
    again = fit_inputs(
        buckets(), table, run.data.behaviours, inputs.derived, inputs.horizons, profiles.numbers if profiles else (),
        profiles.categories if profiles else (), until, run.section,
    )  # fmt: skip
    again = with_starts(again, run.section, map(windows, islice(full, STARTS_BUCKETS)), until)
    one, other = (flat(json.loads(found.to_json())) for found in (inputs, again))
    wrong = sorted(key for key in {*one, *other} if not _close(one.get(key), other.get(key)))
    return audit.identical(
        "fitted before the cut", f"scales, vocabularies and starts fitted again without days from {until} on", wrong,
        len(one),
    )  # fmt: skip


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of plain values by dotted path."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in pairs for key, leaf in flat(part, f"{path}.{name}".strip(".")).items()}
    return {path: value}


def _close(one: Any, other: Any) -> bool:
    # another machine may sum in another order
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return bool(one == other)
