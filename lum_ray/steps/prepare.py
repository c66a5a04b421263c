"""prepare: raw tables to timelines, calendar and fitted statistics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lum_ray.artifacts import (
    Artifact,
    Storage,
    UserError,
    commit,
    commit_folder,
    digest,
    find,
    fingerprint,
    join,
    read_bytes,
    write_bytes,
)
from lum_ray.config import Run, Subset, day_number
from lum_ray.data import delta
from lum_ray.data import prepare as data_prepare
from lum_ray.data.adapters import VERSIONS, write_source
from lum_ray.data.calendar import prepare_calendar
from lum_ray.data.raw import RawFile, RawTables
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.data.schema import check_events
from lum_ray.data.windows import CutPlan, DerivedTarget, HorizonTarget, came_before
from lum_ray.lumos import timelines as tokenizer
from lum_ray.lumos.config import Inputs
from lum_ray.lumos.fitting import fit_inputs, with_starts
from lum_ray.run_data import LATE_DAYS, Table
from lum_ray.steps.session import start_ray

Log = Callable[[str], None]
STARTS_BUCKETS = 16
"""Buckets whose windows give the heads their starting values."""


def silent(text: str) -> None:
    """A log that says nothing."""


def now_and_then(log: Log, every_s: float = 15.0) -> data_prepare.Progress:
    """A progress of `prepare_timelines` that logs a line at most every `every_s`: a small table says nothing."""
    told_at = time.monotonic()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal told_at
        if done and time.monotonic() - told_at >= every_s:
            told_at = time.monotonic()
            log(f"{stage}: {done} of {total} blocks")

    return progress


@dataclass(frozen=True)
class Prepared:
    """What a model reads: three artifacts, and the raw columns that the behaviours use with their types."""

    timelines: Artifact
    calendar: Artifact
    fitted: Artifact
    event_columns: dict[str, str]

    @property
    def uri(self) -> str:
        """That of the timelines."""
        return self.timelines.uri

    @property
    def inputs(self) -> Inputs:
        return Inputs.from_json(read_bytes(join(self.fitted.uri, "inputs.json")).decode())

    @property
    def calendar_table(self) -> pa.Table:
        name = self.calendar.manifest["files"][0]["name"]
        return pq.read_table(pa.BufferReader(read_bytes(join(self.calendar.uri, name))))


@dataclass(frozen=True)
class Prints:
    """What says that each raw table is the same as before."""

    events: Any
    profiles: Any
    calendar: Any


TABLES = ("events", "profiles", "calendar", "items")


def pinned(run: Run, log: Log = silent) -> Run:
    """The run with the version of every Delta table that it reads written down: what all its steps read."""
    found: dict[str, Any] = {}
    for name in TABLES:
        table = getattr(run.data, name)
        if table is None or table.path is None:
            continue
        version = delta.pin(table.path, table.version, table.timestamp, f"data.{name}")
        if version is not None and (table.version, table.timestamp) != (version, None):
            log(f"{name}: version {version} of {table.path}")
            path, _ = delta.split(table.path)
            found[name] = replace(table, path=path, version=version, timestamp=None)
    return replace(run, data=replace(run.data, **found)) if found else run


def _place(table: Table | None) -> str | None:
    """Where a table's rows are, its version with it."""
    if table is None or table.path is None or table.version is None:
        return table.path if table else None
    return f"{table.path}@v{table.version}"


def _print_of(uri: str) -> Any:
    return delta.table_print(uri) if delta.is_table(uri) else fingerprint(uri)


def raw_tables(run: Run, log: Log = silent) -> tuple[RawTables, Prints]:
    """Where the raw tables are, and their fingerprints. A run with a `source` gets them from its adapter, once."""
    run = pinned(run, log)
    data, source = run.data, run.data.source
    own = [_place(table) for table in (data.events, data.profiles, data.calendar)]
    made: list[str | None] = [None, None, None]
    print_of: list[Any] = [_print_of(path) if path else None for path in own]
    if source is None:
        if own[0] is None:
            raise UserError("data.events.path: missing; give the folder of the event files, or a `data.source`")
        if data.profiles and own[1] is None:
            raise UserError("data.profiles.path: missing; give the folder of the profiles, or remove `data.profiles`")
    else:
        uri, name = _written(run, log)
        made = [join(uri, table) for table in ("events", "profiles", "calendar")]
        print_of = [given or ["source", name] for given in print_of]
    events, profiles, calendar = (given or default for given, default in zip(own, made, strict=True))
    assert events is not None
    tables = RawTables(events, profiles if data.profiles else None, calendar if data.calendar else None)
    # a table that the run does not read shapes nothing, even where its source has it
    read = (True, data.profiles is not None, data.calendar is not None)
    return tables, Prints(*(one if wanted else None for one, wanted in zip(print_of, read, strict=True)))


def source_uri(run: Run) -> tuple[str, str]:
    """Where the run's adapter writes its raw tables, and the digest of what shapes them."""
    source = run.data.source
    assert source is not None
    name = digest("raw", VERSIONS[source.adapter], source, fingerprint(source.path) if source.path else None)
    return join(run.root, "raw", f"{source.adapter}-{name}"), name


def _written(run: Run, log: Log) -> tuple[str, str]:
    """As `source_uri`, with the tables written if they are not there yet."""
    source, (uri, name) = run.data.source, source_uri(run)
    assert source is not None
    if find(uri) is None:
        log(f"writing raw tables of {source.adapter}")
        manifest = {"kind": "raw", "digest": name, "source": asdict(source)}

        def fill(place: Storage) -> None:
            write_source(source.adapter, place.path, place.filesystem, source.path, source.options)

        commit_folder(uri, manifest, fill)
    return uri, name


def raw_items(run: Run, log: Log = silent) -> tuple[str, Any]:
    """Where the items table is, and its fingerprint."""
    run = pinned(run, log)
    place = _place(run.data.items)
    if place is not None:
        return place, _print_of(place)
    if run.data.source is None:
        raise UserError("data.items.path: missing; give the folder of the items table, or a `data.source`")
    uri, name = _written(run, log)
    return join(uri, "items"), ["source", name]


def prepare(run: Run, log: Log = silent) -> Prepared:
    """Find or build the timelines, the calendar and the fitted statistics of a run.

    Raises UserError for whatever is wrong with the run or its tables, before work starts where it can be known.
    """
    data, section = run.data, run.section
    tables, prints = raw_tables(run, log)
    timelines, files = _timelines(run, tables, prints, log)
    columns = {name: str(files[0].schema.field(name).type) for name in tokenizer.columns_used(data.behaviours)}
    first_day, end_day = int(timelines.manifest["first_day"]), int(timelines.manifest["end_day"])

    holidays = data.calendar.holidays if data.calendar else None
    name = digest("calendar", holidays, data.time_zone, prints.calendar, first_day, end_day)
    calendar = prepare_calendar(
        data, tables, join(run.root, "calendar", name), first_day, end_day, prints.calendar, run.root
    )
    until = fit_until(run, end_day)
    rhythm = [section.weekday, section.season, section.continuous, section.future_days]
    plan = cut_plan(run, "train", end_day)
    targets = [data.derived, data.horizons, plan, run.seed, [(item.gate, item.transform) for item in data.behaviours]]
    name = digest("fitted", timelines.manifest["digest"], calendar.manifest["digest"], until, rhythm, targets)
    uri = join(run.root, "fitted", name)
    prepared = Prepared(timelines, calendar, Artifact(uri, {}), columns)
    if (fitted := find(uri)) is None:
        log("fitting scales and vocabularies")
        inputs = _fit(run, prepared, until)
        write_bytes(join(uri, "inputs.json"), inputs.to_json().encode())
        fitted = commit(uri, {"kind": "fitted", "digest": name, "until_day": until, "file": "inputs.json"})
    return Prepared(timelines, calendar, fitted, columns)


def prepare_timelines(run: Run, log: Log = silent) -> Artifact:
    """Find or build the timelines of a run alone. What is there already of an earlier state of the tables is continued
    (see `data.increments`). Raises UserError for whatever is wrong with the run or its tables.
    """
    return _timelines(run, *raw_tables(run, log), log)[0]


def _timelines(run: Run, tables: RawTables, prints: Prints, log: Log) -> tuple[Artifact, list[RawFile]]:
    data = run.data
    files = check_events(tables.events, data, log)
    values = [(item.name, item.kind, item.aggregate, item.resolution) for item in data.behaviours]
    shape = [values, data.events.user, data.events.time, data.events.id, data.time_zone, data.start, data.end]
    made_by = data_prepare.Tokenizer(
        tokenizer.partial, tokenizer.merge, tokenizer.TOKENIZER_VERSION, combine=tokenizer.combine
    )
    return find_or_build(run, "timelines", made_by, shape, tables, prints, files, log), files


def find_or_build(
    run: Run,
    kind: str,
    made_by: data_prepare.Tokenizer,
    shape: list[Any],
    tables: RawTables,
    prints: Prints,
    files: Sequence[RawFile],
    log: Log,
    before: Callable[[], None] = lambda: None,
) -> Artifact:
    """The timelines or sequences of the tables, by what shapes them. `before` is called before they are built."""
    data = run.data
    profiles = columns_of(data.profiles) if data.profiles else None
    # the default is left out, so that what was made before there was a window keeps its name
    late = [] if data.late_days == LATE_DAYS else [data.late_days]
    name = digest(kind, made_by.version, shape, profiles, prints.events, prints.profiles, *late)
    uri = join(run.root, kind, name)
    if find(uri) is None:
        log(f"preparing {kind} ({sum(file.rows for file in files):,} events, engine {data.engine})")
        before()
        if data.engine == "ray":
            start_ray()
    lineage = digest("lineage", kind, made_by.version, shape, profiles, data.late_days)
    return data_prepare.prepare_timelines(
        data, tables, uri, made_by, data.engine, asdict(prints), now_and_then(log), lineage=lineage, log=log,
        events=files, root=run.root,
    )  # fmt: skip


def columns_of(table: Any) -> dict[str, Any]:
    """A table's section of the run file without where its rows are, which its fingerprint says."""
    return {name: value for name, value in asdict(table).items() if name not in ("version", "timestamp")} | {
        "path": None
    }


def _fit(run: Run, prepared: Prepared, until: int) -> Inputs:
    data = run.data
    position = {item.name: index for index, item in enumerate(data.behaviours)}
    derived = [DerivedTarget(d.name, d.parsed()[0], position[d.parsed()[1]], d.parsed()[2]) for d in data.derived]
    horizons = [HorizonTarget(h.name, h.over, position[h.behaviour], h.days) for h in data.horizons]
    profiles = data.profiles
    timelines = Timelines.open(prepared.timelines.uri)
    plan = cut_plan(run, "train", int(prepared.timelines.manifest["end_day"]))
    full = np.flatnonzero(timelines.bucket_users).tolist()

    def read(bucket: int) -> Rows:
        rows = timelines.read([bucket])
        return rows.take(came_before(rows, until))

    inputs = fit_inputs(
        (_of_plan(plan, read(bucket)) for bucket in full),
        prepared.calendar_table if data.calendar else None,
        data.behaviours,
        derived,
        horizons,
        profiles.numbers if profiles else (),
        profiles.categories if profiles else (),
        until,
        run.section,
    )

    def windows(bucket: int) -> tuple[Rows, Samples]:
        rows = read(bucket)
        return rows, plan.draw(rows, run.seed, 0, 4)

    return with_starts(inputs, run.section, map(windows, islice(full, STARTS_BUCKETS)), until)


def _of_plan(plan: CutPlan, rows: Rows) -> Rows:
    return rows.take(np.flatnonzero(plan.users(rows)))


def fit_until(run: Run, end_day: int) -> int:
    """The day before which everything that is fitted must lie, and no training target reaches."""
    return day_number(run.split.validate_from) if run.split.validate_from is not None else end_day


def select_until(run: Run, end_day: int) -> int:
    """The day before which everything must lie that chooses among weights: the first test day of a split in time."""
    first = run.split.test.from_day
    return day_number(first) if run.split.validate_from is not None and first is not None else end_day


def cut_plan(run: Run, part: str, end_day: int) -> CutPlan:
    """The cuts of `train`, `validate` or `test`. Training cuts leave room for their targets before `validate_from`;
    without it (a split by users or segments alone) the users of the other two parts are left out of training.
    """
    split = run.split
    subset: Subset = getattr(split, part)
    last = fit_until(run, end_day) if part == "train" else end_day
    until = last - run.section.future_days
    if subset.until_day is not None:
        until = min(until, day_number(subset.until_day))
    excluded: tuple[CutPlan, ...] = ()
    if part == "train" and split.validate_from is None:
        excluded = tuple(cut_plan(run, other, end_day) for other in ("validate", "test"))
    first = day_number(subset.from_day) if subset.from_day is not None else -(2**30)
    if part != "train" and split.validate_from is not None:
        first = max(first, day_number(split.validate_from))
    if part == "validate":
        until = min(until, select_until(run, end_day) - run.section.future_days)
    return CutPlan(
        from_day=first,
        until_day=until,
        every_days=subset.every_days,
        min_history_days=split.min_history_days,
        segment_column=split.segment_column,
        segments=subset.segments,
        low=subset.users[0],
        high=subset.users[1],
        excluded=excluded,
    )


def describe(run: Run, prepared: Prepared) -> dict[str, Any]:
    """What prepare found, in a few figures: users, days, rejects, bytes, share of pads in training windows."""
    manifest = prepared.timelines.manifest
    timelines = Timelines.open(prepared.timelines.uri)
    plan = cut_plan(run, "train", int(manifest["end_day"]))
    tokens = pads = 0
    for bucket in islice(np.flatnonzero(timelines.bucket_users).tolist(), STARTS_BUCKETS):
        rows = timelines.read([bucket])
        samples = plan.draw(rows, run.seed, 0, 4)
        length = run.section.history_days
        missing = np.clip(rows.first_day[samples.row] - (samples.cut - length), 0, length)
        tokens, pads = tokens + length * len(samples), pads + int(missing.sum())
    days = int(manifest["end_day"]) - int(manifest["first_day"])
    return {
        "users": manifest["users"],
        "days": days,
        "active_days": manifest["active_days"],
        "rows_in": manifest["rows_in"],
        "rows_rejected": manifest["rows_rejected"],
        "rows_forgotten": manifest.get("rows_forgotten", 0),
        "bytes": manifest["bytes"],
        "bytes_per_token": round(manifest["bytes"] / max(1, manifest["users"] * days), 3),
        "bytes_per_active_day": round(manifest["bytes"] / max(1, manifest["active_days"]), 2),
        "pad_share": round(pads / max(1, tokens), 4),
        "event_types": json.loads(prepared.inputs.to_json())["event_types"],
    }
