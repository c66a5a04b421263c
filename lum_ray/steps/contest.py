"""contest: a run's model, one or several seeds of it, beside LightGBM with hand-made features.

Every model's predictions of the test cuts are an artifact of their own, so that a contest that was stopped goes on, and
a second one with more seeds predicts only what is new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lum_ray import weights
from lum_ray.artifacts import UserError, commit, digest, find, join, read_bytes, write_table
from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.data.windows import CutPlan
from lum_ray.evaluation import boosted, features, protocol, strata
from lum_ray.evaluation.boosted import Boosted, Part
from lum_ray.evaluation.features import Ahead
from lum_ray.evaluation.history import Cuts
from lum_ray.evaluation.predictions import FUNCTIONALS, Predictions, Task, check, read_predictions
from lum_ray.evaluation.report import write_report
from lum_ray.lumos.collate import Calendar
from lum_ray.lumos.config import Inputs
from lum_ray.lumos.stage import layout_of
from lum_ray.steps.evaluate import facts_of, setting_of, test_cuts, with_targets
from lum_ray.steps.predict import prediction_tables, trained_stage
from lum_ray.steps.prepare import Log, Prepared, cut_plan, fit_until, prepare, select_until, silent
from lum_ray.steps.train import tasks_of, train

MOST_PEER_ROWS = 70_000
"""Training rows of a LightGBM model: its days are thinned out until they fit."""
VERSION = 1
"""Of the peer's features and settings: part of its artifact's name."""
AVERAGE = "average"
NO_CALENDAR = f"{boosted.MODEL}_no_calendar"


def contest_tasks(run: Run, names: Sequence[str] = ()) -> dict[str, Task]:
    """The tasks of a contest: yes-or-no behaviours and horizons, or those of `names` and the gates that they need.

    Raises UserError for a name that is not among them.
    """
    known = {name: task for name, task in tasks_of(run).items() if task.horizon or task.kind == "binary"}
    derived = {item.name for item in run.data.derived}
    known = {name: task for name, task in known.items() if name not in derived}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"tasks: expected some of {', '.join(known)}; got {', '.join(unknown[:5])}")
    wanted = set(names or known)
    wanted |= {gate for name in wanted if (gate := known[name].gate)}
    return {name: task for name, task in known.items() if name in wanted}


@dataclass(frozen=True)
class Contest:
    """Where the report and the prediction files are; checked predictions of a run's model (`ours`) and its peers for
    `tasks` at the test `cuts`; and what was computed of them: metrics (schema `protocol.TABLE`), groups
    (`strata.STRATA`) and the worth of the calendar (`strata.WORTH`, None where no model without it took part)."""

    uri: str
    files: tuple[str, ...]
    ours: str
    tasks: dict[str, Task]
    predictions: Predictions
    table: pa.Table
    cuts: Cuts
    strata: pa.Table
    worth: pa.Table | None


def contest(
    run: Run,
    log: Log = silent,
    names: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    calendar: Sequence[str] = (),
    threads: int = 0,
) -> Contest:
    """Train the run for each of `seeds`, fit LightGBM, and compare them on the test cuts.

    `names`: the tasks (default: all that the peer can predict); several seeds also take part as the average of their
    forecasts; `calendar` names tasks for which both models are also made without the calendar. Raises UserError as
    `prepare`, `train` and `contest_tasks` do.
    """
    tasks = contest_tasks(run, names)
    uris = peer(run, tasks, log, threads=threads)
    uris += (own := [uri for seed in seeds for uri in ours(with_seed(run, seed), tasks, log)])
    averages = (f"{run.name}_{AVERAGE}",) if len(own) > 1 else ()
    uris += [average(own, run.root, name) for name in averages]
    log(f"comparing {len(uris)} prediction files")
    predictions = read_predictions(uris, tasks)
    worth = None
    if calendar and run.data.calendar:
        some = contest_tasks(run, calendar)
        both = [*uris[:2], *blind(with_seed(run, seeds[0]), some, log, threads)]
        pairs = {run.name: without_calendar(run).name, boosted.MODEL: NO_CALENDAR}
        worth = strata.calendar_worth(_some(both, some), some, pairs)
    prepared = prepare(run)
    cuts = asked_cuts(run, prepared)
    first = next(i for i, item in enumerate(run.data.behaviours) if item.kind == "binary")
    groups = (strata.everybody(cuts), strata.by_history(cuts), strata.by_activity(cuts, first), strata.by_segment(cuts))
    table = protocol.evaluate(predictions, tasks, ours=run.name)
    groups_table = strata.compare(predictions, tasks, groups, run.name, boosted.MODEL)
    name = digest("contest", calendar, [uri.rsplit("/", 1)[-1] for uri in uris])
    uri = join(run.root, "reports", f"{run.name}-contest-{name}")
    if find(uri) is None:
        log("drawing the report")
        facts = facts_of(with_seed(run, seeds[0]), prepared, train(with_seed(run, seeds[0])), predictions, table, tasks)
        facts = dataclasses.replace(
            facts, averages=averages, strata=groups_table, peer=boosted.MODEL, calendar_worth=worth
        )
        write_table(join(uri, "metrics.parquet"), table)
        write_table(join(uri, "groups.parquet"), groups_table)
        write_report(join(uri, "report.html"), facts)
        files = ["report.html", "metrics.parquet", "groups.parquet"]
        commit(uri, {"kind": "report", "digest": name, "files": files})
    return Contest(uri, tuple(map(_file, uris)), run.name, tasks, predictions, table, cuts, groups_table, worth)


def with_seed(run: Run, seed: int) -> Run:
    """The run with another seed of its training."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, seed=seed))


def without_calendar(run: Run) -> Run:
    """The run whose model is told nothing of events, of the past or to come."""
    section = dataclasses.replace(run.section, past_events=False, future_events=False)
    return dataclasses.replace(run, name=f"{run.name}_no_calendar", section=section)


def blind(run: Run, tasks: Mapping[str, Task], log: Log = silent, threads: int = 0) -> list[str]:
    """The predictions of LightGBM and of the run's model, both without the calendar."""
    return peer(run, tasks, log, calendar=False, threads=threads) + ours(without_calendar(run), tasks, log)


def everybody(prepared: Prepared) -> Rows:
    """All users of the timelines, in memory."""
    timelines = Timelines.open(prepared.timelines.uri)
    return timelines.read(np.flatnonzero(timelines.bucket_users).tolist())


def ours(
    run: Run,
    tasks: Mapping[str, Task],
    log: Log = silent,
    plans: Sequence[CutPlan] = (),
    model: str | None = None,
) -> list[str]:
    """Train the run (or find it) and predict the cuts of each of `plans` (default: the test cuts) for `tasks`; returns
    the predictions' URIs."""
    prepared = prepare(run, log)
    checkpoint = train(run, log)
    model, end_day = model or run.name, _end(prepared)
    uris = []
    for plan in plans or (cut_plan(run, "test", end_day),):
        shape = digest(sorted(tasks), model, plan, weights.fingerprint(checkpoint))[:6]
        uris.append(uri := join(run.root, "predictions", f"{checkpoint.rsplit('/', 1)[-1]}-{shape}"))
        if find(uri) is None:
            log(f"predicting: {model}, seed {run.train.seed}")
            stage = trained_stage(run, prepared, checkpoint, end_day)
            timelines, wanted = Timelines.open(prepared.timelines.uri), pa.array(list(tasks), pa.string())
            tables = prediction_tables(stage, timelines, plan, model, run.train.seed)
            _write(uri, model, pa.concat_tables(part.filter(pc.is_in(part["behaviour"], wanted)) for part in tables))
    return uris


def peer(
    run: Run,
    tasks: Mapping[str, Task],
    log: Log = silent,
    calendar: bool = True,
    plans: Sequence[CutPlan] = (),
    model: str | None = None,
    threads: int = 0,
) -> list[str]:
    """Fit LightGBM on the run's training cuts, once, and predict the cuts of each of `plans` (default: the test cuts)
    for `tasks`; returns the predictions' URIs.

    Without `calendar` its features know nothing of events. `threads` 0: all.
    """
    prepared = prepare(run, log)
    model = model or (boosted.MODEL if calendar else NO_CALENDAR)
    end_day = _end(prepared)
    plans = plans or (cut_plan(run, "test", end_day),)
    read = [prepared.timelines.manifest["digest"], prepared.calendar.manifest["digest"], prepared.inputs.to_json()]
    read += [VERSION, cut_plan(run, "validate", end_day), _peer_plan(run, end_day), sorted(tasks.items()), calendar]
    uris = [join(run.root, "predictions", f"{model}-{digest('peer', read, plan)}") for plan in plans]
    fitted: Boosted | None = None
    for uri, plan in zip(uris, plans, strict=True):
        if find(uri) is None:
            log(f"fitting {model}" if fitted is None else f"predicting other cuts: {model}")
            fitted = fitted or boosted_of(run, prepared, calendar, threads)
            asked = asked_cuts(run, prepared, plan)
            _write(uri, model, fitted.table(_part(run, prepared, asked), tasks, model, log))
    return uris


def average(uris: Sequence[str], root: str, model: str) -> str:
    """One prediction file out of several: the mean of each column over the files, row by row, as the model `model`."""
    name = f"{model}-{digest('average', [uri.rsplit('/', 1)[-1] for uri in uris])}"
    uri = join(root, "predictions", name)
    if find(uri) is None:
        tables = [pq.read_table(pa.BufferReader(read_bytes(_file(part)))) for part in uris]
        table = tables[0]
        for column in FUNCTIONALS:
            place = table.schema.get_field_index(column)
            mean = np.mean([part[column].to_numpy() for part in tables], axis=0, dtype=np.float64)
            table = table.set_column(place, table.schema.field(column), pa.array(mean.astype(np.float32)))
        for column, value in (("model", model), ("seed", 0)):
            place = table.schema.get_field_index(column)
            field = table.schema.field(column)
            table = table.set_column(place, field, pa.repeat(pa.scalar(value, field.type), len(table)))
        _write(uri, model, table)
    return uri


def boosted_of(run: Run, prepared: Prepared, calendar: bool = True, threads: int = 0) -> Boosted:
    """LightGBM over the run's training and validation cuts, not yet fitted."""
    end_day, inputs = _end(prepared), prepared.inputs
    rows = everybody(prepared)
    known = _cuts(run, inputs, rows, _peer_plan(run, end_day), fit_until(run, end_day))
    held = _cuts(run, inputs, rows, cut_plan(run, "validate", end_day), select_until(run, end_day))
    profiles = run.data.profiles
    return Boosted(
        setting_of(run, inputs),
        _part(run, prepared, known),
        _part(run, prepared, held),
        profile=(*profiles.numbers, *profiles.categories) if profiles else (),
        calendar=calendar and bool(inputs.event_types),
        seed=run.train.seed,
        threads=threads,
    )


def asked_cuts(run: Run, prepared: Prepared, plan: CutPlan | None = None) -> Cuts:
    """The cuts of a plan (default: the test's) with their outcomes, in the order of the model's own predictions."""
    timelines, end_day = Timelines.open(prepared.timelines.uri), _end(prepared)
    return test_cuts(run, timelines, prepared.inputs, end_day, None, plan)


def _peer_plan(run: Run, end_day: int) -> CutPlan:
    """The days on which LUMOS is supervised: those of its plan, and before them the earlier cuts of its windows."""
    plan, section = cut_plan(run, "train", end_day), run.section
    return dataclasses.replace(plan, from_day=plan.from_day - (section.cuts_per_window - 1) * section.cut_stride_days)


def _cuts(run: Run, inputs: Inputs, rows: Rows, plan: CutPlan, until_day: int) -> Cuts:
    """Every cut of a plan, its days thinned out to at most `MOST_PEER_ROWS` by a stride that meets all weekdays."""
    samples = plan.every(rows)
    stride = 1
    while len(samples) > stride * MOST_PEER_ROWS or (stride > 1 and stride % 7 == 0):
        stride += 1
    kept = samples.cut % stride == 0
    return with_targets(rows, Samples(samples.row[kept], samples.cut[kept], samples.draw[kept]), run, inputs, until_day)


def _part(run: Run, prepared: Prepared, cuts: Cuts) -> Part:
    """Cuts with the calendar as it was known at each of them."""
    layout = layout_of(run.section, prepared.inputs)
    calendar = Calendar(prepared.calendar_table if run.data.calendar else None, layout)
    length, days = features.LENGTH, max(prepared.inputs.days_ahead(run.section.future_days), 28) + 2
    size, pieces, base = len(cuts.samples), [], 0
    past_SL, future_SX = np.empty((size, length), np.int32), np.empty((size, days), np.int32)
    for index, some in features.chunks(cuts.samples):
        cut = some.cut.astype(np.int64)
        as_of = np.repeat(cut[:, None], length + days, axis=1)
        found, at = calendar.look_up(cuts.rows.user_hash[some.row], cuts.rows.segment[some.row], cut - length, as_of)
        past_SL[index], future_SX[index] = at[:, :length][:, ::-1] + base, at[:, length:] + base
        pieces.append(found[:, layout.rhythm_width :])
        base += len(found)
    rows_ET = np.concatenate(pieces)
    types = len(layout.types)
    ahead = Ahead(layout.types, rows_ET[:, :types], rows_ET[:, types : 2 * types], past_SL, future_SX)
    return Part(cuts, ahead)


def _some(uris: Sequence[str], tasks: Mapping[str, Task]) -> Predictions:
    """Checked predictions of `tasks` out of files that hold more."""
    wanted = pa.array(list(tasks), pa.string())
    tables = [pq.read_table(pa.BufferReader(read_bytes(_file(uri)))) for uri in uris]
    return check(pa.concat_tables(table.filter(pc.is_in(table["behaviour"], wanted)) for table in tables), tasks)


def _end(prepared: Prepared) -> int:
    return int(prepared.timelines.manifest["end_day"])


def _file(uri: str) -> str:
    return join(uri, "predictions", "0000.parquet")


def _write(uri: str, model: str, table: pa.Table) -> None:
    write_table(_file(uri), table)
    name = uri.rsplit("/", 1)[-1]
    commit(uri, {"kind": "predictions", "digest": name, "model": model, "rows": table.num_rows})
