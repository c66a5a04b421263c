"""predict for GTS-LUM: lists of items and embeddings of every user at a cut; publish: histories behind user ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lum_ray import config, weights
from lum_ray.artifacts import UserError, commit, digest, find, join, list_files, storage, write_table
from lum_ray.config import Run
from lum_ray.data.raw import open_parquet
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.data.state import State, point, pointer
from lum_ray.evaluation.ranking_files import RANKING_SCHEMA, ranking_table, write_rankings
from lum_ray.gts.inference import best, rerank, scores_by, user_embeddings, without_seen
from lum_ray.gts.predictor import BATCH, Predictor
from lum_ray.stage import to_device
from lum_ray.steps.gts_prepare import prepare_sequences
from lum_ray.steps.gts_train import train_gts
from lum_ray.steps.predict import assign, check_cohorts, published
from lum_ray.steps.prepare import Log, silent
from lum_ray.steps.session import start_ray

VERSION = 1
LANES = 64
READINGS = ("retrieve", "rerank", "generate")
USERS = pa.schema([("user", pa.string()), ("embedding", pa.list_(pa.float32()))])
ITEMS = pa.schema([("item", pa.string()), ("text", pa.string()), USERS.field("embedding"), ("prior", pa.float32())])


def publish_gts(run: Run, log: Log = silent, checkpoint: str | None = None) -> str:
    """Write the snapshot of sequences that a server looks users up in, and return its URI; see `steps.predict`."""
    uri = published(run, prepare_sequences(run, log)[1], log)
    point(pointer(run.root, run.name), state=uri, checkpoint=checkpoint)
    return uri


def open_predictor_gts(run: Run, log: Log = silent, checkpoint: str | None = None) -> Predictor:
    """The run's predictor with its published sequences behind user ids; trains and publishes what is missing.

    `checkpoint` takes an earlier one instead of training: yesterday's model on today's events.
    """
    state = State.open(published(run, prepare_sequences(run, log)[1], log))
    return Predictor.load(checkpoint or train_gts(run, log), state.rows, end_day=state.end_day)


def predict_gts(
    run: Run,
    log: Log = silent,
    cut_day: int | str | None = None,
    cohorts: Mapping[str, float] | None = None,
    salt: str = "lum_ray",
    checkpoint: str | None = None,
    readings: Sequence[str] = ("retrieve",),
    k: int | None = None,
    seen_filter: bool = False,
) -> str:
    """Rank the items for every user at `cut_day` (default: the day after the data), and return the folder's URI.

    It holds `rankings/*.parquet` (`RANKING_SCHEMA`; for each of `readings` a list of the `k` best items, default: the
    run's `retrieve`), `users.parquet/*.parquet` (user, embedding) and `items.parquet` (item, text, embedding, prior):
    the dot product of the embeddings, times the manifest's `scale`, plus the prior, is the score of reading R for items
    that the user never had. "rerank" costs as many passes of the LLM a user as the run's `rerank` says, the others one.
    `seen_filter` leaves out what a user had. With `cohorts` (name -> share) `cohorts.parquet` (user, cohort) is a
    stable assignment by hash of (salt, user). `checkpoint` takes an earlier one instead of training, with the items
    that it knows.

    A lane of users is a file; what is there already is not done again. With `engine: ray` the lanes are spread.
    Raises UserError for a cut outside the data and for readings that the model was not trained for.
    """
    _, sequences = prepare_sequences(run, log)
    manifest = sequences.manifest
    cut = config.day_number(cut_day) if cut_day is not None else int(manifest["end_day"])
    if not int(manifest["first_day"]) < cut <= int(manifest["end_day"]):
        raise UserError(
            f"--cut {cut_day}: expected a day after the data's first ({manifest['first_day']}) up to the day after "
            f"their last ({manifest['end_day']})"
        )
    depth = run.section.retrieve if k is None else k
    wrong = [reading for reading in readings if reading not in READINGS]
    if wrong or not readings or depth < 1:
        raise UserError(
            f"readings: expected of {', '.join(READINGS)} and k from 1, got {list(readings)} and {depth}; "
            "mend --reading or -k"
        )
    assignment = dict(cohorts or {})
    check_cohorts(assignment)
    checkpoint = (checkpoint or train_gts(run, log)).rstrip("/")
    print_of = weights.fingerprint(checkpoint)
    own = checkpoint.rsplit("/", 1)[-1]
    shape = [VERSION, manifest["digest"], print_of, own, cut, list(readings), depth, seen_filter, run.section.rerank]
    name = digest("gts predictions", shape, list(assignment.items()), salt)
    uri = join(run.root, "predictions", f"{run.name}-{name}")
    if find(uri) is not None:
        log("already predicted")
        return uri
    timelines = Timelines.open(sequences.uri)
    lanes = [lane for lane in range(LANES) if timelines.bucket_users[lane::LANES].any()]
    log(f"ranking the items for {manifest['users']:,} users at day {cut}: {', '.join(readings)}")
    work = _Work(
        run.name, run.train.seed, sequences.uri, checkpoint, print_of, uri, cut, tuple(readings), depth,
        run.section.rerank, seen_filter,
    )  # fmt: skip
    predictor = work.predictor()
    _check(predictor, readings)
    found = predictor.items()
    columns = [pa.array(found.ids), pa.array(found.text), _lists(found.embedding_NO), found.prior_N]
    write_table(join(uri, "items.parquet"), pa.table(columns, schema=ITEMS))
    if run.data.engine == "ray":
        import ray
        import ray.data

        start_ray()
        ray.data.DataContext.get_current().enable_progress_bars = False
        gpu = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {}
        done = [row["rows"] for row in ray.data.from_items(lanes).map(work, **gpu).take_all()]
    else:
        done = [work({"item": lane})["rows"] for lane in lanes]
    if assignment:
        users = [user for file in list_files(join(uri, "users.parquet")) for user in _users(file)]
        cohort = pa.array(assign(users, assignment, salt), pa.string())
        write_table(join(uri, "cohorts.parquet"), pa.table({"user": pa.array(users, pa.string()), "cohort": cohort}))
    _predictor.cache_clear()
    commit(uri, {"kind": "predictions", "model": "gts", "digest": name, "checkpoint": own, "cut_day": cut,
                 "readings": list(readings), "seen_filter": seen_filter, "rows": int(sum(done)),
                 "scale": predictor.assortment.stage.module.scale().item(), "cohorts": assignment,
                 "salt": salt})  # fmt: skip
    return uri


def _check(predictor: Predictor, readings: Sequence[str]) -> None:
    can = {"rerank": predictor.info["scores"], "generate": predictor.info["generates"]}
    lacking = [reading for reading in readings if not can.get(reading, True)]
    if lacking:
        raise UserError(
            f"readings: {', '.join(lacking)}: {predictor.info['checkpoint']} was trained without; leave out"
        )


@lru_cache(maxsize=1)
def _predictor(checkpoint: str, print_of: str) -> Predictor:
    """The checkpoint whose weights have this fingerprint, loaded once in a process."""
    return Predictor.load(checkpoint)


@dataclass(frozen=True)
class _Work:
    """Ranks for one lane of users and writes its files; it travels to Ray's workers."""

    model: str
    seed: int
    sequences: str
    checkpoint: str
    print_of: str
    uri: str
    cut: int
    readings: tuple[str, ...]
    depth: int
    rerank: int
    seen_filter: bool

    def predictor(self) -> Predictor:
        return _predictor(self.checkpoint, self.print_of)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        lane = int(row["item"])
        part = f"{lane:04d}"
        rankings = join(self.uri, "rankings", f"{part}.parquet")
        place = storage(rankings)
        # written last and at once, so a file that is there is whole, and its users' beside it
        if place.filesystem.get_file_info(place.path).is_file:
            return {"rows": open_parquet(rankings).metadata.num_rows}
        tables, users = [RANKING_SCHEMA.empty_table()], [USERS.empty_table()]
        for rows, samples in self._batches(lane):
            lists, embedding = self._batch(rows, samples)
            tables.append(lists)
            users.append(pa.table([pa.array(rows.user, pa.string()), _lists(embedding)], schema=USERS))
        write_table(join(self.uri, "users.parquet", f"{part}.parquet"), pa.concat_tables(users))
        table = pa.concat_tables(tables)
        write_rankings(self.uri, part, table)
        return {"rows": table.num_rows}

    def _batches(self, lane: int) -> Iterator[tuple[Rows, Samples]]:
        """The lane's users who were there before the cut, a batch at a time."""
        timelines = Timelines.open(self.sequences)
        for bucket in np.flatnonzero(timelines.bucket_users).tolist():
            if bucket % LANES != lane:
                continue
            rows = timelines.read([bucket])
            there = np.flatnonzero(rows.first_day < self.cut)
            for start in range(0, len(there), BATCH):
                some = rows.take(there[start : start + BATCH])
                count = len(some)
                yield some, Samples(np.arange(count), np.full(count, self.cut, np.int32), np.zeros(count, np.int32))

    def _batch(self, rows: Rows, samples: Samples) -> tuple[pa.Table, npt.NDArray[np.float32]]:
        """The lists of all readings, and the users' embeddings."""
        predictor = self.predictor()
        goods, stage = predictor.assortment, predictor.assortment.stage
        batch = to_device(stage.questions(rows, samples), predictor.device)
        lists = []
        with torch.no_grad():
            state = stage.user_states(batch)
            for reading in self.readings:
                scores = scores_by(stage, batch, "generate" if reading == "generate" else "retrieve", state)
                scores = without_seen(scores, batch) if self.seen_filter else scores
                count = self.rerank if reading == "rerank" else 0
                items, values = best(scores, max(self.depth, count))
                if count:
                    items, values = rerank(stage, batch, items, values, count)
                items, values = items[:, : self.depth], values[:, : self.depth]
                lists.append(
                    ranking_table(
                        rows.user, samples.cut, items, values, goods.ids, self.model, reading, self.seed,
                        self.seen_filter,
                    )
                )  # fmt: skip
            embedding = user_embeddings(stage, batch, state)
        return pa.concat_tables(lists), embedding


def _lists(values_NO: npt.NDArray[np.floating[Any]]) -> pa.ListArray:
    """Rows as lists of float32."""
    count, width = values_NO.shape
    offsets = np.arange(count + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_NO.astype(np.float32).ravel()))


def _users(uri: str) -> list[str]:
    place = storage(uri)
    with place.filesystem.open_input_file(place.path) as source:
        users: list[str] = pq.read_table(source, columns=["user"])["user"].to_pylist()
    return users
