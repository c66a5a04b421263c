"""Raw tables -> the `timelines` (or `sequences`) and `calendar` artifacts, on one machine or on a Ray cluster.

Two stages. *map*: a task reads some row groups, cleans them, aggregates them to mergeable daily states and writes one
Arrow file with a record batch for each final file. *merge*: a task takes its record batch of every map file, merges the
states, and writes its final file, one bucket a row group. Ray Data's own shuffle (`groupby().map_groups`) is about 100
times slower, and cannot restart; here every task leaves its result behind under `_work/`, atomically, so that a killed
job goes on where it was. `_work/` is removed after the commit.

Both engines run the same tasks, within the same memory. `auto` is local unless this process is in a Ray cluster of
several machines: on one machine threads do the same work without sending it to processes. The bytes do not depend on
the engine, the workers, the blocks, or the order in which files come. With `events.id` the events are not aggregated
before the shuffle, since a repeated row may be in another block; a repeat is a row with the same user and id, and the
first by (file, row) stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from lum_ray import artifacts
from lum_ray.artifacts import Artifact, UserError, join, storage
from lum_ray.config import Data, day_number
from lum_ray.data import buckets
from lum_ray.data.context import check_profiles, repeated_users_error
from lum_ray.data.forgotten import forgotten_users
from lum_ray.data.increments import Base, as_fingerprinted, find_base
from lum_ray.data.raw import RawFile, RawTables
from lum_ray.data.reader import Timelines
from lum_ray.data.rejects import REJECTS, too_many
from lum_ray.data.schema import check_events
from lum_ray.data.tasks import Job, Task, Tokenizer, map_tasks, merge_tasks, run_task

__all__ = ["Engine", "Progress", "Tokenizer", "prepare_timelines", "silent"]

Engine = Literal["auto", "local", "ray"]
Progress = Callable[[str, int, int], None]
"""Called with ("read" or "merge", tasks done, tasks in all)."""

BLOCK_ROWS = 1 << 21
AGGREGATED_BLOCK_ROWS = 1 << 22
"""Where a map task leaves a row per user and day: of the events themselves only a batch is in memory."""
MIN_BLOCK_ROWS = 1 << 18
BLOCKS = 16
"""A small table is read in so many blocks: a map task more or less than the others is then no matter."""
LOCAL_THREADS = 8
KEPT_REJECTS = 1_000_000
"""The rejects file of a job that stopped because there were too many holds at most about this many."""


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that says nothing."""


def prepare_timelines(
    data: Data,
    tables: RawTables,
    uri: str,
    tokenizer: Tokenizer,
    engine: Engine = "auto",
    fingerprint: Any = None,
    progress: Progress = silent,
    log2_buckets: int | None = None,
    block_rows: int | None = None,
    lineage: str | None = None,
    log: Callable[[str], None] = lambda text: None,
    events: Sequence[RawFile] | None = None,
    root: str | None = None,
) -> Artifact:
    """Build the timelines artifact at `uri` (its last part is the digest), or return it where it is committed already.

    `fingerprint` (of the inputs) is kept in the manifest; with `lineage` it says by table what was read, and the
    artifact continues the nearest one of its lineage beside it (see `increments`), whose `log2_buckets` it inherits.
    `log` hears which, or why there is none. `events` are the event files where they are checked already, `block_rows`
    is about what a map task reads (at least a row group). Profiles are prepared where `data.profiles` is set. The users
    who are forgotten under `root` are left out. Raises UserError for tables that cannot be read, break the schema, or
    hold more than `max_reject_share` bad rows.

    A tokenizer that keeps events one by one makes the same layout with a row an event, of the kind `sequences`: its
    days may come again within a user, `active_days` counts the events kept, and the behaviours of `data` are not read.
    """
    found = artifacts.find(uri)
    if found is not None:
        _clean(uri)
        return found
    if tokenizer.columns:
        data = replace(data, behaviours=(), derived=(), horizons=())
    try:
        return _build(
            data, tables, uri, tokenizer, engine, fingerprint, progress, log2_buckets, block_rows, lineage, log,
            events, root,
        )  # fmt: skip
    except FileNotFoundError as error:
        # another driver built the same artifact and removed `_work/` under us: its result is ours
        found = artifacts.find(uri)
        if found is None and lineage is not None:
            raise UserError(
                f"{error}: this file was removed while {uri} was being prepared; if `lum-ray compact` ran meanwhile, "
                "or somebody removed an earlier artifact, prepare again"
            ) from error
        if found is None:
            raise
        _clean(uri)
        return found


def _clean(uri: str) -> None:
    """Remove what killed or slower drivers left of a committed artifact: `_work/`, and half-written files."""
    place = storage(uri)
    work = join(uri, "_work")
    if place.filesystem.get_file_info(storage(work).path).type != fs.FileType.NotFound:
        artifacts.remove(work)
        if place.is_local:
            for parent, _, names in os.walk(place.path):
                for name in names:
                    if name.endswith(".tmp"):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(os.path.join(parent, name))


def _build(
    data: Data,
    tables: RawTables,
    uri: str,
    tokenizer: Tokenizer,
    engine: Engine,
    fingerprint: Any,
    progress: Progress,
    log2_buckets: int | None,
    block_rows: int | None,
    lineage: str | None,
    log: Callable[[str], None],
    events: Sequence[RawFile] | None,
    root: str | None,
) -> Artifact:
    events = check_events(tables.events, data) if events is None else events
    profiles: Sequence[RawFile] = []
    if data.profiles is not None:
        if tables.profiles is None:
            raise UserError(
                "data.profiles: set, but there is no profiles table; give data.profiles.path or remove data.profiles"
            )
        profiles = check_profiles(tables.profiles, data)
    if lineage is not None:
        events = as_fingerprinted(events, fingerprint)
    base = _base(data, tables, uri, lineage, fingerprint, events, log)
    earlier: Mapping[str, Any] = base.manifest if base else {}
    if base is not None:
        log2_buckets = int(earlier["log2_buckets"])
        events, profiles = base.fresh, [] if base.same_profiles else profiles
    event_rows, profile_rows = (sum(file.rows for file in files) for files in (events, profiles))
    if log2_buckets is None:
        log2_buckets = buckets.choose_log2_buckets(event_rows, profile_rows)
    behind = event_rows + (earlier["states"]["rows"] if base else 0)
    files = buckets.choose_files(max(behind, profile_rows), log2_buckets)
    if block_rows is None:
        most = BLOCK_ROWS if tokenizer.columns or data.events.id is not None else AGGREGATED_BLOCK_ROWS
        block_rows = min(most, max(MIN_BLOCK_ROWS, max(event_rows, profile_rows) // BLOCKS))
    maps = [*map_tasks("events", events, block_rows), *map_tasks("profiles", profiles, block_rows)]
    sizes = [file.bytes for file in (*events, *profiles)]
    shape = [log2_buckets, files, tokenizer.version, *([base.digest] if base else [])]
    # results of an interrupted attempt are taken up only if it had the same files and cut the work in the same way
    forgotten = forgotten_users(root) if root else ()
    work = join(uri, "_work", artifacts.digest(maps, sizes, fingerprint, shape, forgotten))
    job = Job(data, tokenizer, uri, work, log2_buckets, files, base.since if base else None, forgotten)
    run = _engine(engine)

    mapped = _run_all(run, job, maps, "read", progress)
    before = base.rejects() if base else REJECTS.empty_table()
    _check_rejects(job, mapped, {"events": event_rows, "profiles": profile_rows}, before)
    days = [day for result in mapped for day in result.get("days", ())]
    if not days and base is None:
        raise UserError(f"{tables.events}: none of the {event_rows} rows is a valid event; see {join(uri, 'rejects')}")
    known_end_day = max([*(day + 1 for day in days), *([earlier["known_end_day"]] if base else [])])
    keep_from = None if lineage is None else known_end_day - data.late_days
    first_day = min([*days, *([earlier["first_day"]] if base else [])])
    first_day = first_day if data.start is None else day_number(data.start)
    end_day = known_end_day if data.end is None else day_number(data.end)
    from_day = first_day if base is None else max(base.since, first_day)
    part = f"part-{from_day}-{end_day}"
    continued = (base.states(files), base.known(files)) if base else ()
    merges = [
        *merge_tasks("events", part, maps, files, keep_from, *continued),
        *merge_tasks("profiles", "profiles", maps, files),
    ]
    merged = _run_all(run, job, merges, "merge", progress)
    twice = sorted({user for result in merged for user in result.get("twice", ())})[:5]
    if twice:
        raise repeated_users_error(tables.profiles or "", twice)
    rejected = _check_rejects(job, mapped + merged, {"events": event_rows, "profiles": profile_rows}, before)

    forgotten_rows = {
        table: sum(result["forgotten"] for result in mapped if result["table"] == table) for table in rejected
    }
    made = [result for result in merged if result["table"] == "events"]
    if base is not None:
        # it may have been compacted meanwhile: its rows are the same, its files are not
        base = replace(base, artifact=artifacts.open_artifact(base.artifact.uri))
        earlier = base.manifest
    parts = base.parts() if base else []
    if any(result["row_groups"] for result in made):
        parts.append({"path": part, "from_day": from_day, "to_day": end_day, "files": _files(made)})
    stored = [{"name": b.name, "kind": b.kind, "resolution": b.resolution} for b in data.behaviours]
    manifest = {
        "kind": "sequences" if tokenizer.columns else "timelines",
        "digest": uri.rstrip("/").rsplit("/", 1)[-1],
        "tokenizer_version": tokenizer.version,
        "inputs": fingerprint,
        "log2_buckets": log2_buckets,
        "parts": parts,
        "profiles": _files([r for r in merged if r["table"] == "profiles"]) if profiles else earlier.get("profiles"),
        "behaviours": [*stored, *({"name": name, "kind": "event", "resolution": 1} for name in tokenizer.columns)],
        "first_day": first_day,
        "end_day": end_day,
        **_counts(base, made, {"events": event_rows, "profiles": profile_rows}, rejected, forgotten_rows),
    }
    if base is not None and base.same_profiles and earlier["profiles"] is not None:
        manifest["profiles_of"] = earlier.get("profiles_of", base.digest)
    if lineage is not None:
        manifest |= {
            "lineage": lineage,
            "known_end_day": known_end_day,
            "states": {
                "files": [f"{result['file'].partition('.')[0]}.arrow" for result in made if result["state_rows"]],
                "of_files": files,
                "rows": sum(result["state_rows"] for result in made),
                "active_days": sum(result["state_days"] for result in made),
            },
        }
    if root and forgotten_users(root) != forgotten:
        raise UserError(f"{uri}: users were forgotten while this was prepared; start it again, to leave them out")
    artifact = artifacts.commit(uri, manifest)
    _clean(uri)
    return artifact


def _base(
    data: Data,
    tables: RawTables,
    uri: str,
    lineage: str | None,
    fingerprint: Any,
    events: Sequence[RawFile],
    log: Callable[[str], None],
) -> Base | None:
    if lineage is None:
        return None
    base, refused = find_base(data, tables, uri, lineage, fingerprint, events)
    if base is not None:
        rows = sum(file.rows for file in base.fresh)
        log(f"continuing {base.digest}: {len(base.fresh)} new files of events, {rows:,} rows")
    elif refused is not None:
        log(f"full rebuild: {refused}")
    return base


def _counts(
    base: Base | None,
    made: Sequence[Task],
    rows: Mapping[str, int],
    rejected: Mapping[str, int],
    forgotten: Mapping[str, int],
) -> dict[str, Any]:
    """What the manifest counts, over the base's parts and the new one; `read`: by table, rows, rejects and rows of
    forgotten users."""
    users, active_days, size = (sum(result[key] for result in made) for key in ("rows", "active_days", "bytes"))
    read = {table: [count, rejected[table], forgotten[table]] for table, count in rows.items()}
    counts: dict[str, Any] = {}
    if base is not None:
        earlier = base.manifest
        read["events"] = [ours + theirs for ours, theirs in zip(read["events"], earlier["read"]["events"], strict=True)]
        read["profiles"] = earlier["read"]["profiles"] if base.same_profiles else read["profiles"]
        per_bucket = Timelines(base.artifact).bucket_users.copy()
        for result in made:
            for bucket, count in result["new_users"]:
                per_bucket[bucket] += count
        users, counts["bucket_users"] = int(per_bucket.sum()), per_bucket.tolist()
        # the base's active days from `since` on are in the new part
        active_days += earlier["active_days"] - earlier["states"]["active_days"]
        size += earlier["bytes"]
    return counts | {
        "users": users,
        "active_days": active_days,
        "events": read["events"][0] - read["events"][1] - read["events"][2],
        "rows_in": sum(each[0] for each in read.values()),
        "rows_rejected": sum(each[1] for each in read.values()),
        "rows_forgotten": sum(each[2] for each in read.values()),
        "bytes": size,
        "bytes_per_active_day": round(size / max(1, active_days), 3),
        "read": read,
    }


def _files(results: Iterable[Task]) -> list[dict[str, Any]]:
    made = sorted((r for r in results if r["row_groups"]), key=lambda result: str(result["file"]))
    return [{"name": result["file"], "row_groups": result["row_groups"]} for result in made]


Run = Callable[[Job, Sequence[Task]], Iterator[Task]]


def _engine(engine: Engine) -> Run:
    if engine == "auto":
        # not imported: if Ray has been started in this process, it is loaded
        ray = sys.modules.get("ray")
        several = ray is not None and ray.is_initialized() and sum(node["Alive"] for node in ray.nodes()) > 1
        engine = "ray" if several else "local"
    return _with_ray if engine == "ray" else _with_threads


def _with_threads(job: Job, tasks: Sequence[Task]) -> Iterator[Task]:
    # threads, not processes: nearly all the time is spent in Arrow and numpy, which release the GIL
    with ThreadPoolExecutor(min(LOCAL_THREADS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(run_task, job, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _with_ray(job: Job, tasks: Sequence[Task]) -> Iterator[Task]:
    import ray.data

    items = [json.dumps(task) for task in tasks]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.enable_progress_bars = False
    for row in dataset.map(lambda item: {"result": json.dumps(run_task(job, json.loads(item["item"])))}).iter_rows():
        yield json.loads(row["result"])


def _run_all(run: Run, job: Job, tasks: Sequence[Task], stage: str, progress: Progress) -> list[Task]:
    """The results by task name. Raises UserError with what the first failing tasks said."""
    results: list[Task] = []
    progress(stage, 0, len(tasks))
    for result in run(job, tasks):
        if "error" in result:
            raise UserError(result["error"])
        if "gone" in result:
            raise FileNotFoundError(result["gone"])
        results.append(result)
        progress(stage, len(results), len(tasks))
    return sorted(results, key=lambda result: str(result["name"]))


def _check_rejects(job: Job, results: Sequence[Task], rows_in: dict[str, int], before: pa.Table) -> dict[str, int]:
    """Write the rejects so far as `rejects/0000.parquet`, sorted, with those that were `before`. Returns the number of
    the new ones by table.

    Raises UserError with the first five of a table of which more than `max_reject_share` was rejected.
    """
    counts = {table: sum(r["rejected"] for r in results if r["table"] == table) for table in rows_in}
    tables = [REJECTS.empty_table()]
    for result in results:
        if result["rejected"] and sum(table.num_rows for table in tables) < KEPT_REJECTS:
            place = storage(join(job.work, f"{result['name']}.rejects.parquet"))
            tables.append(pq.read_table(place.path, filesystem=place.filesystem))
    if len(tables) == 1 and before.num_rows == 0:
        return counts
    by_row = [(name, "ascending") for name in REJECTS.names]
    rejects = pa.concat_tables([*tables, before]).sort_by(by_row).combine_chunks()
    artifacts.write_table(join(job.uri, "rejects", "0000.parquet"), rejects)
    new = pa.concat_tables(tables).sort_by(by_row)
    for table, count in counts.items():
        if count > job.data.max_reject_share * rows_in[table]:
            some = new.filter(pc.starts_with(new["file"], f"{table}/"))
            raise too_many(job.data, table, count, rows_in[table], some, job.uri)
    return counts
