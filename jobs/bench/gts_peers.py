"""GTS-LUM's peers: what is written for them, and their lists as ranking artifacts. For `quality_gts`.

A peer runs in an environment of its own (`make peers`), as a process of its own: see rectools_peer.py. Files are CSV.
Shapes: N users, A events of rows, B baskets, K places of a list.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import tempfile
import time
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from jobs.bench import rectools_peer
from jobs.bench.rows import note
from lum_ray.artifacts import UserError, commit, digest, find, join
from lum_ray.config import Run
from lum_ray.data.items import Catalogue
from lum_ray.data.loader import evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Int64, Rows
from lum_ray.data.times import NO_TIME
from lum_ray.data.windows import CutPlan, visible
from lum_ray.evaluation.ranking_baselines import Popularity, baseline_rankings, targets_facts
from lum_ray.evaluation.ranking_files import ranking_table, targets_table, write_rankings, write_targets
from lum_ray.gts.collate import next_items
from lum_ray.steps.gts_prepare import GtsPrepared, prepare_gts
from lum_ray.steps.prepare import cut_plan, fit_until

LISTS_VERSION = 1
"""Of what this file makes of a peer's CSV."""
BATCH = 256
DAY_S = 86_400
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Contest:
    """What all models of a run share: its artifacts, the test's one cut, and what popularity puts first there."""

    run: Run
    prepared: GtsPrepared
    timelines: Timelines
    test: CutPlan
    train: CutPlan
    cut_day: int
    until_day: int
    """The first day that nobody may train on."""

    @classmethod
    def of(cls, run: Run) -> Contest:
        """Prepares the run. Raises UserError where its test has other than one cut: a peer makes one list a user."""
        prepared = prepare_gts(run, note)
        timelines = Timelines.open(prepared.sequences.uri)
        test, train = (cut_plan(run, part, timelines.end_day) for part in ("test", "train"))
        if test.from_day != test.until_day:
            raise UserError(
                f"split.test: expected one cut, since a peer makes one list a user; got days {test.from_day} to "
                f"{test.until_day}"
            )
        return cls(run, prepared, timelines, test, train, test.from_day, fit_until(run, timelines.end_day))

    @property
    def catalogue(self) -> Catalogue:
        return self.prepared.catalogue

    @property
    def cut_s(self) -> int:
        """The cut's first second, since 1970."""
        day = datetime.date(1970, 1, 1) + datetime.timedelta(days=self.cut_day)
        zone = zoneinfo.ZoneInfo(self.run.data.time_zone)
        return int(datetime.datetime.combine(day, datetime.time(), zone).timestamp())

    def buckets(self) -> list[int]:
        found: list[int] = np.flatnonzero(self.timelines.bucket_users).tolist()
        return found


@dataclass(frozen=True)
class Exported:
    """The files that a peer reads: see rectools_peer.py."""

    train: str
    history: str
    users: str


def export(contest: Contest, folder: str) -> Exported:
    """Write what may be trained on, what is known at the test cut, and whose lists are asked for, into `folder`.

    Events keep their order, which within an instant is that of our own sequences; those of items that the catalogue
    does not have, and that no model reads, are left out.
    """
    files = Exported(*(os.path.join(folder, name) for name in ("train.csv", "history.csv", "users.txt")))
    schema = pa.schema([("user", pa.string()), ("item", pa.string()), ("time", pa.int64())])
    with (
        pa.csv.CSVWriter(files.train, schema) as train,
        pa.csv.CSVWriter(files.history, schema) as history,
        open(files.users, "w", encoding="utf-8") as users,
    ):
        for bucket in contest.buckets():
            rows = contest.timelines.read([bucket])
            asked = np.zeros(len(rows), np.bool_)
            asked[contest.test.every(rows).row] = True
            trained = contest.train.users(rows)
            train.write_table(_events(contest, rows, visible(rows.days, contest.until_day), trained))
            history.write_table(_events(contest, rows, visible(rows.days, contest.cut_day), asked))
            users.writelines(f"{user}\n" for user in rows.user[asked])
    return files


def _events(contest: Contest, rows: Rows, day_A: npt.NDArray[np.bool_], user_N: npt.NDArray[np.bool_]) -> pa.Table:
    """The known events of some days (A,) of some users (N,), in order."""
    row = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
    item = contest.catalogue.index_of(rows.values[:, 0])
    kept = day_A & user_N[row] & (item >= 0)
    # an event of which only the day is known comes after the day's others
    time_s = rows.values[:, 1] // 1_000_000 + np.where(rows.values[:, 2] == NO_TIME, DAY_S - 1, 0)
    return pa.table(
        {
            "user": pa.array(rows.user[row[kept]], pa.string()),
            "item": pa.array(contest.catalogue.ids, pa.string()).take(pa.array(item[kept])),
            "time": pa.array(time_s[kept], pa.int64()),
        }
    )


Lists = dict[str, tuple[Int64, Floats]]
"""User -> (items of the catalogue, scores), best first."""


def read_lists(path: str, catalogue: Catalogue) -> Lists:
    """A peer's CSV of user, rank, item, score. Raises UserError for items that the catalogue does not have."""
    kinds = {"user": pa.string(), "rank": pa.int32(), "item": pa.string(), "score": pa.float32()}
    table = pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=kinds, include_columns=[*kinds]))
    table = table.sort_by([("user", "ascending"), ("rank", "ascending")]).combine_chunks()
    place = pc.index_in(table["item"], value_set=pa.array(catalogue.ids, pa.string()))
    if place.null_count:
        strange = table["item"].filter(pc.is_null(place)).unique().to_pylist()
        raise UserError(f"{path}: expected items of the catalogue, got {strange[:5]}")
    item, score = place.to_numpy().astype(np.int64), table["score"].to_numpy()
    user = table["user"].to_pylist()
    begin = [at for at in range(len(user)) if at == 0 or user[at] != user[at - 1]]
    return {user[a]: (item[a:b], score[a:b]) for a, b in zip(begin, [*begin[1:], len(user)], strict=True)}


def filled_up(found: Lists, users: Sequence[str], popular_BN: Int64, depth: int) -> tuple[Int64, Floats]:
    """Items and scores (B, depth) of the users' lists, filled up by `popular_BN` (-1: none) with what they lack.

    What is filled in scores below the rest, falling; a place that stays empty is -1, with NaN.
    """
    items = np.full((len(users), depth), -1, np.int64)
    scores = np.full((len(users), depth), np.nan, np.float32)
    nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for b, user in enumerate(users):
        own, score = (part[:depth] for part in found.get(user, nothing))
        rest = popular_BN[b][(popular_BN[b] >= 0) & ~np.isin(popular_BN[b], own)][: depth - len(own)]
        items[b, : len(own) + len(rest)] = np.concatenate([own, rest])
        lowest = float(score[-1]) if len(own) else 0.0
        scores[b, : len(own) + len(rest)] = np.concatenate([score, lowest - 1 - np.arange(len(rest))])
    return items, scores


def write_lists(contest: Contest, uri: str, model: str, seed: int, found: dict[bool, Lists]) -> int:
    """Write a peer's lists (by whether seen items were filtered) with the test's targets; how many were filled up."""
    catalogue, depth, lacking = contest.catalogue, contest.run.section.retrieve, 0
    popularity = Popularity.count((contest.timelines.read([bucket]) for bucket in contest.buckets()), catalogue)
    batches = evaluation_batches(contest.timelines, contest.test, lambda rows, samples: {}, BATCH, 0, 1)
    for number, (rows, samples, _) in enumerate(batches):
        users = rows.user[samples.row].tolist()
        tables = []
        for seen, lists in found.items():
            everything = len(catalogue)
            popular, _ = baseline_rankings(rows, samples, catalogue, popularity, "popularity", everything, seen)
            ranked = filled_up(lists, users, popular, min(depth, everything))
            tables.append(
                ranking_table(users, samples.cut, *ranked, catalogue.ids, model, "baseline", seed, seen_filter=seen)
            )
        lacking += sum(user not in found[False] for user in users)
        write_rankings(uri, f"{number:05d}", pa.concat_tables(tables))
        target = next_items(rows, samples, catalogue.index_of, contest.timelines.end_day)
        repeat, history = targets_facts(rows, samples, catalogue, target)
        trained = contest.train.ranges(rows)[1] > 0
        facts = users, samples.cut, history, trained[samples.row]
        write_targets(uri, f"{number:05d}", targets_table(*facts, *target, repeat, catalogue.ids))
    return lacking


def peer_lists(contest: Contest, python: str, model: str, epochs: int, minutes: float, seed: int = 0) -> str | None:
    """The artifact with a peer's lists, made where it is not there; None where the peer's time was over.

    Raises UserError where the peer fails: what it says goes to stderr.
    """
    read = [contest.prepared.sequences.manifest["digest"], contest.prepared.items.manifest["digest"]]
    asked = [contest.test, contest.train, contest.until_day, contest.run.section.retrieve]
    name = digest("peer", LISTS_VERSION, rectools_peer.VERSION, read, asked, model, epochs, seed)
    uri = join(contest.run.root, "predictions", f"{model}-{name}")
    if find(uri) is not None:
        return uri
    place = os.path.join(contest.run.root, "peers")
    os.makedirs(place, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        files = export(contest, folder)
        out = {seen: os.path.join(folder, f"{'un' * seen}seen.csv") for seen in (False, True)}
        settings = {
            "model": model, "train": files.train, "history": files.history, "users": files.users, "out": out[False],
            "out-unseen": out[True], "k": contest.run.section.retrieve, "epochs": epochs, "seed": seed, "threads": 1,
            "cut": contest.cut_s,
        }  # fmt: skip
        # -P: the other benchmarks of this folder are no modules of the peer's
        command = [python, "-P", rectools_peer.__file__]
        command += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        note(f"training {model} in the peers' environment ({epochs} epochs, at most {minutes:g} minutes)")
        begin = time.monotonic()
        try:
            # its stdout is our stderr: on stdout stand our rows alone
            done = subprocess.run(command, stdout=2, timeout=60 * minutes, env={**os.environ, "OMP_NUM_THREADS": "1"})
        except subprocess.TimeoutExpired:
            note(f"{model}: left out, it was not done after {minutes:g} minutes; give it more by --peer-minutes")
            return None
        if done.returncode:
            raise UserError(f"{model}: the peer ended with code {done.returncode}; what it said is above")
        seconds = time.monotonic() - begin
        lists = {seen: read_lists(path, contest.catalogue) for seen, path in out.items()}
    lacking = write_lists(contest, uri, model, seed, lists)
    note(f"{model}: {seconds:.0f} s; {lacking} users have popularity's list")
    commit(uri, {"kind": "rankings", "digest": name, "models": [model], "seconds": round(seconds), "epochs": epochs,
                 "filled_up": lacking})  # fmt: skip
    return uri


def recbole_folder(python: str) -> str:
    """Where the package recbole of the peers' environment has ml-100k. Raises UserError where there is none."""
    script = "import importlib.util as u; print(u.find_spec('recbole').submodule_search_locations[0])"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise UserError(f"ml-100k: {python} has no package recbole; run `make peers`, or give the folder by --path")
    return os.path.join(done.stdout.strip(), "dataset_example", "ml-100k")
