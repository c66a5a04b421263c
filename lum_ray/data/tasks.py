"""The tasks of prepare: read a block of raw rows into mergeable states, and merge the states into a final file.

A task is a plain dict (it travels as JSON), and so is its result. Every task writes its output and then its result
under `Job.work`, each atomically: a task whose result is there is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lum_ray import artifacts
from lum_ray.artifacts import UserError, join, storage
from lum_ray.config import Data
from lum_ray.data import buckets
from lum_ray.data.context import clean_profiles, repeated_users
from lum_ray.data.forgotten import without
from lum_ray.data.raw import RawFile, batches, from_json, to_json
from lum_ray.data.rejects import REJECTS
from lum_ray.data.schema import PROVENANCE, drop_repeats, read_events

Task = dict[str, Any]


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer: `partial(events, behaviours)`, `merge(partials, behaviours)`, and `combine`, which makes one
    table of states of several; see `lumos.timelines`. Without `combine` an artifact is no base for increments.

    `columns`: what `merge` gives besides user and day where it keeps events one by one (`gts.sequences`); the artifact
    is then of the kind `sequences`.
    """

    partial: Callable[[pa.Table, Sequence[Any]], pa.Table]
    merge: Callable[[Sequence[pa.Table], Sequence[Any]], pa.Table]
    version: int
    columns: tuple[str, ...] = ()
    combine: Callable[[Sequence[pa.Table], Sequence[Any]], pa.Table] | None = None


@dataclass(frozen=True)
class Job:
    """What every task of an artifact needs; it travels to the workers.

    `since`: the first day that an increment takes events of; None: every day.
    """

    data: Data
    tokenizer: Tokenizer
    uri: str
    work: str
    log2_buckets: int
    files: int
    since: int | None = None
    forgotten: tuple[int, ...] = ()


def map_tasks(table: str, files: Sequence[RawFile], block_rows: int) -> list[Task]:
    """Blocks of about `block_rows` rows; a piece is [uri, name, row groups, row of the first, overlay]."""
    blocks: list[list[list[Any]]] = []
    filled = 0
    for file in files:
        row = 0
        for group, count in enumerate(file.row_groups):
            if not blocks or filled + count > block_rows:
                blocks.append([])
                filled = 0
            if blocks[-1] and blocks[-1][-1][0] == file.uri:
                blocks[-1][-1][2].append(group)
            else:
                blocks[-1].append([file.uri, file.name, [group], row, to_json(file.overlay)])
            filled += count
            row += count
    return [
        {"stage": "map", "table": table, "name": f"map-{table}-{index:05d}", "pieces": pieces}
        for index, pieces in enumerate(blocks)
    ]


def merge_tasks(
    table: str,
    folder: str,
    maps: Sequence[Task],
    files: int,
    keep_from: int | None = None,
    states: Sequence[Sequence[Any]] = (),
    known: Sequence[Sequence[Any]] | None = None,
) -> list[Task]:
    """One task a final file. `keep_from`: the first day whose states are kept for the next increment (None: none).

    Of an increment, for each final file: `states`, where its base's are, as [uri, whether all are of this file], and
    `known`, where the base has users of these buckets, as [uri, row groups].
    """
    sources = [f"{task['name']}.arrow" for task in maps if task["table"] == table]
    return [
        {
            "stage": "merge",
            "table": table,
            "name": f"merge-{folder}-{index:04d}",
            "index": index,
            "sources": sources,
            "folder": folder,
            "file": f"{index:04d}.parquet",
            "keep_from": keep_from,
            "states": states[index] if states else [],
            "known": None if known is None else known[index],
        }
        for index in range(files if sources or states else 0)
    ]


def run_task(job: Job, task: Task) -> Task:
    """Run a task unless its result is there; what the driver must say to the user comes back as `error` or `gone`."""
    done = join(job.work, f"{task['name']}.json")
    try:
        result: Task = artifacts.read_json(done)
        return result
    except FileNotFoundError:
        pass
    try:
        act = _map if task["stage"] == "map" else _merge
        made, rejects = artifacts.reach(job.uri, lambda: act(job, task))
    except UserError as error:
        return {"error": str(error)}
    except FileNotFoundError as error:
        return {"gone": str(error)}
    if rejects.num_rows:
        artifacts.write_table(join(job.work, f"{task['name']}.rejects.parquet"), rejects)
    result = {"name": task["name"], "table": task["table"], "rejected": rejects.num_rows, **made}
    artifacts.write_json(done, result)
    return result


def _map(job: Job, task: Task) -> tuple[Task, pa.Table]:
    cleaned, rejects = [], []
    made: Task = {"days": [], "forgotten": 0}

    def each(events: pa.Table) -> pa.Table:
        if events.num_rows:  # forgotten users too: see `forgotten`
            made["days"] += pc.min_max(events["day"]).as_py().values()
        return _aggregated(job, kept(events))

    def kept(table: pa.Table) -> pa.Table:
        left = without(table, job.forgotten)
        made["forgotten"] += table.num_rows - left.num_rows
        return left

    for uri, name, groups, first_row, plain in task["pieces"]:
        overlay = from_json(plain)
        if task["table"] == "events":
            tables, bad = read_events(
                uri, job.data, name, groups, first_row, each=each, overlay=overlay, since=job.since
            )
            cleaned += tables
            rejects.append(kept(bad))
        else:
            for batch, row in batches(uri, _profile_columns(job.data), groups, first_row, buckets.FILE_ROWS, overlay):
                table, bad = clean_profiles(batch, job.data, name, row)
                cleaned.append(kept(table))
                rejects.append(without(bad, job.forgotten))
    buckets.scatter(join(job.work, f"{task['name']}.arrow"), cleaned, job.log2_buckets, job.files)
    return made, pa.concat_tables(rejects)


def _aggregated(job: Job, events: pa.Table) -> pa.Table:
    if job.data.events.id is not None:
        return events
    user = events["user"]
    if events.num_rows and pa.types.is_dictionary(user.type):
        events = events.set_column(0, "user", buckets.by_file(user, job.log2_buckets, job.files))
    return buckets.narrowed(job.tokenizer.partial(events, job.data.behaviours))


def _profile_columns(data: Data) -> list[str]:
    profiles = data.profiles
    assert profiles is not None
    roles = (profiles.registered, profiles.ends, profiles.segment, profiles.known_at)
    days = [name for name in roles if name is not None]
    return list(dict.fromkeys([profiles.user, *days, *profiles.numbers, *profiles.categories, *profiles.splits]))


def _merge(job: Job, task: Task) -> tuple[Task, pa.Table]:
    table = buckets.gather_states(task["states"], task["index"], job.log2_buckets, job.files)
    if task["sources"]:
        fresh = buckets.gather([join(job.work, name) for name in task["sources"]], task["index"])
        if table.num_columns and pa.types.is_dictionary(fresh["user"].type):
            table = table.set_column(0, "user", table["user"].dictionary_encode())
        table = pa.concat_tables([table, fresh], promote_options="permissive")
    table = table.combine_chunks()
    rejects = REJECTS.empty_table()
    made: Task = {"file": task["file"], "row_groups": [], "rows": 0, "active_days": 0, "bytes": 0}
    made |= {"state_rows": 0, "state_days": 0, "new_users": []}
    if table.num_rows == 0:
        return made, rejects
    if task["table"] == "profiles":
        twice = repeated_users(table)
        if twice:
            return made | {"twice": twice}, rejects
        laid_out = buckets.bucketed(table, job.log2_buckets)
    else:
        kept = table
        if job.data.events.id is not None:
            kept, rejects = drop_repeats(table)
            table = job.tokenizer.partial(kept.drop_columns(list(PROVENANCE)), job.data.behaviours)
        daily = job.tokenizer.merge([table], job.data.behaviours)
        made["active_days"] = daily.num_rows
        if task["keep_from"] is not None:
            made |= _keep_states(job, task, kept, daily)
        laid_out = buckets.timelines_of(daily, job.log2_buckets)
        made["new_users"] = [] if task["known"] is None else _new_users(laid_out, task["known"])
    made["row_groups"], made["bytes"] = buckets.write_buckets(join(job.uri, task["folder"], task["file"]), laid_out)
    made["rows"] = laid_out.num_rows
    return made, rejects


def _keep_states(job: Job, task: Task, kept: pa.Table, daily: pa.Table) -> Task:
    """Write what the next increment merges with late events: the states, or with `events.id` the events, of the days
    from `keep_from` on."""
    assert job.tokenizer.combine is not None
    states = kept.filter(pc.greater_equal(kept["day"], task["keep_from"]))
    if states.num_rows and job.data.events.id is None:
        states = job.tokenizer.combine([states], job.data.behaviours)
    if states.num_rows:
        buckets.write_states(join(job.uri, "states", f"{task['index']:04d}.arrow"), states)
    days = pc.sum(pc.greater_equal(daily["day"], task["keep_from"])).as_py()
    return {"state_rows": states.num_rows, "state_days": int(days or 0)}


def _new_users(laid_out: pa.Table, known: Sequence[Any]) -> list[list[int]]:
    """[bucket, how many of its users the base does not have] of a final file."""
    names = [pa.chunked_array([], pa.string())]
    for uri, groups in known:
        place = storage(uri)
        with place.filesystem.open_input_file(place.path) as stream:
            names.append(pq.ParquetFile(stream, pre_buffer=True).read_row_groups(groups, columns=["user"])["user"])
    chunks = [chunk for name in names for chunk in name.chunks]
    there = pc.is_in(laid_out["user"], value_set=pa.chunked_array(chunks, pa.string()))
    found, counts = np.unique(laid_out["bucket"].filter(pc.invert(there)).to_numpy(), return_counts=True)
    return [[bucket, count] for bucket, count in zip(found.tolist(), counts.tolist(), strict=True)]
