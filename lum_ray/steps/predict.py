"""predict: a checkpoint and the timelines to a prediction file; publish: histories behind user ids, for serving."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lum_ray import catalog, config, weights
from lum_ray.artifacts import Artifact, UserError, checkpoint_record, commit, digest, find, join, write_table
from lum_ray.config import Run
from lum_ray.data.loader import evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.data.state import State, point, pointer, write_state
from lum_ray.data.windows import CutPlan
from lum_ray.evaluation.predictions import FUNCTIONALS, SCHEMA
from lum_ray.lumos.config import Inputs
from lum_ray.lumos.predictor import FAR_FUTURE, Predictor
from lum_ray.lumos.stage import LumosStage
from lum_ray.stage import Arrays, to_device
from lum_ray.steps.prepare import Log, Prepared, prepare, silent
from lum_ray.steps.session import start_ray
from lum_ray.steps.train import train

BATCH = 512


def publish(run: Run, log: Log = silent, checkpoint: str | None = None) -> str:
    """Write the snapshot of histories that a server looks users up in, and return its URI.

    Servers of the run take it from then on, and with it `checkpoint`, if one is given (see `data.state.pointer`).
    """
    uri = published(run, prepare(run, log).timelines, log)
    point(pointer(run.root, run.name), state=uri, checkpoint=checkpoint)
    return uri


def published(run: Run, histories: Artifact, log: Log) -> str:
    """The snapshot of `histories` (timelines or sequences), written where it is not there yet; no server is told."""
    manifest = histories.manifest
    uri = join(run.root, "state", str(manifest["digest"]))
    if find(uri) is None:
        log("publishing histories")
        timelines = Timelines.open(histories.uri)
        buckets = np.flatnonzero(timelines.bucket_users).tolist()
        write_state(
            uri,
            ((bucket, timelines.read([bucket])) for bucket in buckets),
            int(manifest["log2_buckets"]),
            int(manifest["end_day"]),
        )
    return uri


def open_predictor(run: Run, log: Log = silent, checkpoint: str | None = None) -> Predictor:
    """The run's predictor with its published histories behind user ids; trains and publishes what is missing.

    `checkpoint` takes an earlier one instead of training: yesterday's model on today's histories.
    """
    state = State.open(published(run, prepare(run, log).timelines, log))
    return Predictor.load(checkpoint or train(run, log), state.rows, end_day=state.end_day)


def predict(
    run: Run,
    log: Log = silent,
    cut_day: int | str | None = None,
    cohorts: Mapping[str, float] | None = None,
    salt: str = "lum_ray",
    checkpoint: str | None = None,
) -> str:
    """Predict every user's coming days from `cut_day` (default: the day after the data) on, and return the URI.

    The folder holds `predictions/*.parquet` (the schema of prediction files) and, with `cohorts` (name -> share),
    `cohorts.parquet` (user, cohort), a stable assignment by hash of (salt, user). With `engine: ray` the buckets are
    spread with Ray Data. `checkpoint` takes an earlier one instead of training: yesterday's model on today's events.
    """
    prepared = prepare(run, log)
    checkpoint = (checkpoint or train(run, log)).rstrip("/")
    manifest = prepared.timelines.manifest
    cut = config.day_number(cut_day) if cut_day is not None else int(manifest["end_day"])
    if not int(manifest["first_day"]) < cut <= int(manifest["end_day"]):
        raise UserError(
            f"--cut {cut_day}: expected a day after the data's first ({manifest['first_day']}) up to the day after "
            f"their last ({manifest['end_day']})"
        )
    assignment = dict(cohorts or {})
    check_cohorts(assignment)
    read = [manifest["digest"], prepared.calendar.manifest["digest"], weights.fingerprint(checkpoint)]
    name = digest("predictions", read, checkpoint.rsplit("/", 1)[-1], cut, list(assignment.items()), salt)
    uri = join(run.root, "predictions", f"{run.name}-{name}")
    if find(uri) is not None:
        log("already predicted")
        return uri
    timelines = Timelines.open(prepared.timelines.uri)
    lanes = [lane for lane in range(64) if timelines.bucket_users[lane::64].any()]
    log(f"predicting {manifest['users']:,} users from day {cut}")
    work = _Work(config.dump(run), prepared, checkpoint, uri, cut)
    if run.data.engine == "ray":
        import ray.data

        start_ray()
        ray.data.DataContext.get_current().enable_progress_bars = False
        files = [row["rows"] for row in ray.data.from_items(lanes).map(work).take_all()]
    else:
        files = [work({"item": lane})["rows"] for lane in lanes]
    if assignment:
        users = [user for lane in range(64) for user in _users(timelines, lane)]
        table = pa.table({"user": pa.array(users, pa.string()), "cohort": assign(users, assignment, salt)})
        write_table(join(uri, "cohorts.parquet"), table)
    commit(uri, {"kind": "predictions", "digest": name, "checkpoint": checkpoint.rsplit("/", 1)[-1], "cut_day": cut,
                 "rows": int(sum(files)), "cohorts": assignment, "salt": salt})  # fmt: skip
    return uri


class _Work:
    """Predicts one lane of users and writes its file; it travels to Ray's workers."""

    def __init__(self, plain: Mapping[str, Any], prepared: Prepared, checkpoint: str, uri: str, cut: int) -> None:
        self.plain, self.prepared, self.checkpoint, self.uri, self.cut = plain, prepared, checkpoint, uri, cut

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        run, lane = catalog.read_run(dict(self.plain)), int(row["item"])
        stage = trained_stage(run, self.prepared, self.checkpoint, FAR_FUTURE)
        plan = CutPlan(self.cut, self.cut, 1, 0)
        table = pa.concat_tables(
            prediction_tables(
                stage, Timelines.open(self.prepared.timelines.uri), plan, run.name, run.train.seed, lane, 64, self.cut
            )
        )
        write_table(join(self.uri, "predictions", f"{lane:04d}.parquet"), table)
        return {"rows": table.num_rows}


def trained_stage(run: Run, prepared: Prepared, checkpoint: str, until_day: int) -> LumosStage:
    """The stage of `checkpoint` (its best weights, its own scales and vocabularies) over the run's artifacts, on the
    device that there is.

    Raises UserError where the run's behaviours are not those that the checkpoint was trained on.
    """
    record = checkpoint_record(checkpoint, ("lumos",), ("run", "inputs"))
    trained = catalog.read_run(record["run"])
    if trained.data.behaviours != run.data.behaviours:
        raise UserError(
            f"{checkpoint}: trained on other behaviours than the run's; use the run file that it was trained with"
        )
    stage = LumosStage(
        trained.section,
        Inputs.from_json(record["inputs"]),
        prepared.calendar_table if run.data.calendar else None,
        until_day,
        run.split.min_history_days,
    )
    stage.module.load_state_dict(weights.load(checkpoint).tensors)
    stage.module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return stage


def prediction_tables(
    stage: LumosStage,
    timelines: Timelines,
    plan: CutPlan,
    model: str,
    seed: int,
    rank: int = 0,
    world: int = 1,
    cut: int | None = None,
    max_users: int | None = None,
) -> Iterator[pa.Table]:
    """Prediction-file tables of every (user, cut) of the plan, at most a batch at a time.

    `cut`: predict all users that existed before it, at it, whether or not any later day was observed.
    """
    device = next(stage.module.parameters()).device
    batches = (
        evaluation_batches(timelines, plan, stage.collate, BATCH, rank, world, max_users, seed)
        if cut is None
        else _at(timelines, stage, cut, rank, world)
    )
    yield SCHEMA.empty_table()
    for rows, samples, arrays in batches:
        yield prediction_table(stage.predict(to_device(arrays, device)), rows, samples, stage.terms, model, seed)


def _at(
    timelines: Timelines, stage: LumosStage, cut: int, rank: int, world: int
) -> Iterator[tuple[Rows, Samples, Arrays]]:
    for bucket in np.flatnonzero(timelines.bucket_users).tolist():
        if bucket % 64 % world != rank:
            continue
        rows = timelines.read([bucket])
        there = np.flatnonzero(rows.first_day < cut)
        for start in range(0, len(there), BATCH):
            some = rows.take(there[start : start + BATCH])
            samples = Samples(np.arange(len(some)), np.full(len(some), cut, np.int32), np.zeros(len(some), np.int32))
            yield some, samples, stage.collate(some, samples)


def prediction_table(
    columns: Arrays, rows: Rows, samples: Samples, terms: Sequence[str], model: str, seed: int
) -> pa.Table:
    """The rows of a prediction file from what a stage predicted of `samples`."""
    sample = columns["sample"]
    count = len(sample)
    cut = samples.cut[sample]
    names = pa.array(rows.user[samples.row], pa.string())
    return pa.table(
        {
            "user": names.take(pa.array(sample)),
            "cut_day": cut,
            "day": (cut + columns["offset"]).astype(np.int32),
            "behaviour": pa.array(list(terms), pa.string()).take(pa.array(columns["term"])),
            **{name: columns[name] for name in FUNCTIONALS},
            "y": columns["y"],
            "model": pa.repeat(model, count),
            "seed": np.full(count, seed, np.int32),
        },
        schema=SCHEMA,
    )


def check_cohorts(cohorts: Mapping[str, float]) -> None:
    """Raise UserError unless the shares are positive and sum to 1."""
    if cohorts and (min(cohorts.values()) <= 0 or abs(sum(cohorts.values()) - 1) > 1e-9):
        shown = ",".join(f"{name}:{value}" for name, value in cohorts.items())
        raise UserError(f"--cohorts {shown}: expected shares above 0 that sum to 1, such as treatment:0.5,control:0.5")


def assign(users: Sequence[str], cohorts: Mapping[str, float], salt: str) -> list[str]:
    """A cohort for each user, stable under anything but her id, the salt and the shares.

    u = the first 8 bytes of SHA-256("<salt>:<user>"), big-endian, over 2^64; the first cohort, in the given order,
    whose cumulative share exceeds u. The simulator plants its treatment by the same rule.
    """
    names, edges = list(cohorts), np.cumsum(list(cohorts.values()))
    u = [int.from_bytes(hashlib.sha256(f"{salt}:{user}".encode()).digest()[:8], "big") / 2**64 for user in users]
    return [names[min(int(place), len(names) - 1)] for place in np.searchsorted(edges, u, side="right")]


def _users(timelines: Timelines, lane: int) -> list[str]:
    buckets = [bucket for bucket in range(lane, len(timelines.bucket_users), 64) if timelines.bucket_users[bucket]]
    return [str(user) for user in timelines.read(buckets, behaviours=()).user] if buckets else []
