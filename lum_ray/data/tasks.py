"""The tasks of prepare: read a block of raw rows into mergeable states, and merge the states into a final file.

A task is a plain dict (it travels as JSON), and so is its result. Every task writes its output and then its result
under `Job.work`, each atomically: a task whose result is there is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lum_ray import artifacts
from lum_ray.artifacts import UserError, join
from lum_ray.config import Data
from lum_ray.data import buckets
from lum_ray.data.context import clean_profiles, repeated_users
from lum_ray.data.forgotten import without
from lum_ray.data.schema import REJECTS, RawFile, batches, drop_repeats, read_events

Task = dict[str, Any]


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer: `partial(events, behaviours)` and `merge(partials, behaviours)`, see `lumos.timelines`.

    `columns`: what `merge` gives besides user and day where it keeps events one by one (`gts.sequences`); the artifact
    is then of the kind `sequences`.
    """

    partial: Callable[[pa.Table, Sequence[Any]], pa.Table]
    merge: Callable[[Sequence[pa.Table], Sequence[Any]], pa.Table]
    version: int
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What every task of an artifact needs; it travels to the workers."""

    data: Data
    tokenizer: Tokenizer
    uri: str
    work: str
    log2_buckets: int
    files: int
    forgotten: tuple[int, ...] = ()


def map_tasks(table: str, files: Sequence[RawFile], block_rows: int) -> list[Task]:
    """Blocks of row groups with about `block_rows` rows; a piece is [uri, name, row groups, row of the first]."""
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
                blocks[-1].append([file.uri, file.name, [group], row])
            filled += count
            row += count
    return [
        {"stage": "map", "table": table, "name": f"map-{table}-{index:05d}", "pieces": pieces}
        for index, pieces in enumerate(blocks)
    ]


def merge_tasks(table: str, folder: str, maps: Sequence[Task], files: int) -> list[Task]:
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
        }
        for index in range(files if sources else 0)
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
        made, rejects = (_map if task["stage"] == "map" else _merge)(job, task)
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

    for uri, name, groups, first_row in task["pieces"]:
        if task["table"] == "events":
            table, bad = read_events(uri, job.data, name, groups, first_row, each=each)
            cleaned.append(table)
            rejects.append(kept(bad))
        else:
            for batch, row in batches(uri, _profile_columns(job.data), groups, first_row, buckets.FILE_ROWS):
                table, bad = clean_profiles(batch, job.data, name, row)
                cleaned.append(kept(table))
                rejects.append(without(bad, job.forgotten))
    table = pa.concat_tables(cleaned, promote_options="permissive")
    buckets.scatter(join(job.work, f"{task['name']}.arrow"), table, job.log2_buckets, job.files)
    return made, pa.concat_tables(rejects)


def _aggregated(job: Job, events: pa.Table) -> pa.Table:
    return events if job.data.events.id is not None else job.tokenizer.partial(events, job.data.behaviours)


def _profile_columns(data: Data) -> list[str]:
    profiles = data.profiles
    assert profiles is not None
    roles = (profiles.registered, profiles.ends, profiles.segment, profiles.known_at)
    days = [name for name in roles if name is not None]
    return list(dict.fromkeys([profiles.user, *days, *profiles.numbers, *profiles.categories, *profiles.splits]))


def _merge(job: Job, task: Task) -> tuple[Task, pa.Table]:
    table = buckets.gather([join(job.work, name) for name in task["sources"]], task["index"])
    rejects = REJECTS.empty_table()
    made: Task = {"file": task["file"], "row_groups": [], "rows": 0, "active_days": 0, "bytes": 0}
    if table.num_rows == 0:
        return made, rejects
    if task["table"] == "profiles":
        twice = repeated_users(table)
        if twice:
            return made | {"twice": twice}, rejects
        laid_out = buckets.bucketed(table, job.log2_buckets)
    else:
        if job.data.events.id is not None:
            table, rejects = drop_repeats(table)
            table = job.tokenizer.partial(table, job.data.behaviours)
        daily = job.tokenizer.merge([table], job.data.behaviours)
        made["active_days"] = daily.num_rows
        laid_out = buckets.timelines_of(daily, job.log2_buckets)
    made["row_groups"], made["bytes"] = buckets.write_buckets(join(job.uri, task["folder"], task["file"]), laid_out)
    made["rows"] = laid_out.num_rows
    return made, rejects
