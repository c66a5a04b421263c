"""How many bytes the tokens take, without loss: Complete Journey, OULAD and the simulator at 8 % activity.

    python -m jobs.bench.bytes [--dataset simulator,oulad,complete_journey] [--quick] [--path FOLDER] [--max-minutes 6]

A token is a day of a user between her first one (registration, else first event) and the end of her data. Rows:
- bytes/<dataset>/bytes_per_token: all that the loader reads (timelines, profiles, calendar) over the tokens, beside the
  same numbers as dense rows (parquet, zstd, a row per token). The bar of the simulator is 1.82, a hundredth of the
  182 bytes that a token took where every user's rows carried the calendar.
- bytes/<dataset>/bytes_per_active_day: the timelines alone over the days that they hold.
- bytes/<dataset>/tokens_per_s: one thread from the files to `Rows`.

Lossless: what is read back must be what `lumos.timelines.tokenize` makes of all events at once, else the exit code is
1.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import os
import shutil
import sys
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench.rows import emit, hardware, note, spread
from jobs.bench.time_limit import time_limit
from lum_ray import presets
from lum_ray.config import Behaviour, Source
from lum_ray.data.calendar import prepare_calendar
from lum_ray.data.prepare import Tokenizer, prepare_timelines
from lum_ray.data.raw import raw_files
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows
from lum_ray.data.schema import read_events
from lum_ray.lumos import timelines
from lum_ray.run import Run
from lum_ray.steps.prepare import raw_tables

DATASETS = ("simulator", "oulad", "complete_journey")
BAR = 1.82
DENSE_USERS = 500
KINDS = ("browse", "search", "message", "play")
SIMULATOR = (
    Behaviour("active", "binary", "count()"),
    Behaviour("events", "count", "count()"),
    *(Behaviour(kind, "count", f"count(kind == '{kind}')") for kind in KINDS),
    *(Behaviour(f"any_{kind}", "binary", f"any(kind == '{kind}')") for kind in KINDS),
    Behaviour("purchase", "binary", "any(kind == 'purchase')"),
    Behaviour("amount", "continuous", "sum(amount)", resolution=0.01, gate="purchase"),
    Behaviour("kinds", "count", "n_unique(kind)"),
)


def run_of(dataset: str, options: argparse.Namespace) -> Run:
    run = {
        "simulator": presets.lumos_simulator,
        "oulad": presets.lumos_oulad,
        "complete_journey": presets.lumos_demo,
    }[dataset]()
    data = dataclasses.replace(run.data, engine="local")
    if dataset == "oulad":
        data = dataclasses.replace(data, source=Source("oulad", path=options.path))
    if dataset == "simulator":
        users = 200 if options.quick else options.users
        chosen = {"users": users, "shards": 4, "seed": 7, "world": "signal", "activity": 0.08}
        data = dataclasses.replace(data, source=Source("simulator", options=chosen), behaviours=SIMULATOR)
    return dataclasses.replace(run, root=options.root, data=data)


def measure(dataset: str, options: argparse.Namespace) -> list[str]:
    """Print the rows of a dataset. Returns what was missed."""
    run = run_of(dataset, options)
    tables = raw_tables(run, note)[0]
    work = os.path.join(options.root, "bytes", f"work-{os.getpid()}")
    try:
        tokenizer = Tokenizer(timelines.partial, timelines.merge, timelines.TOKENIZER_VERSION)
        made = prepare_timelines(run.data, tables, os.path.join(work, "timelines"), tokenizer, "local")
        days = (int(made.manifest["first_day"]), int(made.manifest["end_day"]))
        calendar = prepare_calendar(run.data, tables, os.path.join(work, "calendar"), *days)
        seconds: list[float] = []
        rows: Rows | None = None
        stored = Timelines.open(made.uri)
        for _ in range(1 if options.quick else 5):
            start = time.perf_counter()
            rows = stored.read(range(stored.buckets))
            seconds.append(time.perf_counter() - start)
        assert rows is not None
        sizes = {
            "timelines": int(made.manifest["bytes"]),
            "profiles": size_of(os.path.join(made.uri, "profiles")),
            "calendar": size_of(calendar.uri),
        }
        tokens = int((rows.end_day - rows.first_day).sum())
        active = int(made.manifest["active_days"])
        dense = dense_bytes(rows, [item.name for item in stored.behaviours], os.path.join(work, "dense.parquet"))
        lost = differences(rows, run, tables.events)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    per_token = sum(sizes.values()) / tokens
    shown = {
        "users": len(rows), "tokens": tokens, "active_days": active, "active_share": active / tokens,
        "behaviours": len(stored.behaviours), "bytes": sizes, "rows_that_differ": lost, "quick": options.quick,
    }  # fmt: skip
    machine, packages = hardware(), ("pyarrow", "numpy")
    emit(
        f"bytes/{dataset}/bytes_per_token", per_token, "bytes/token", peer="dense rows, parquet and zstd",
        ratio=per_token / dense, run=shown | {"peer_bytes_per_token": dense}, machine=machine, packages=packages,
    )  # fmt: skip
    emit(
        f"bytes/{dataset}/bytes_per_active_day", sizes["timelines"] / active, "bytes/active day",
        run=shown, machine=machine, packages=packages,
    )  # fmt: skip
    value, low, high = spread([tokens / taken for taken in seconds])
    emit(
        f"bytes/{dataset}/tokens_per_s",
        value,
        "tokens/s",
        low=low,
        high=high,
        run=shown,
        machine=machine,
        packages=packages,
    )
    missed = [f"{dataset}: expected every number back, {lost} rows differ"] if lost else []
    if dataset == "simulator" and not options.quick and per_token > BAR:
        missed.append(f"simulator: expected at most {BAR} bytes/token, got {per_token:.3f}")
    return missed


def size_of(folder: str) -> int:
    return sum(os.path.getsize(path) for path in glob.glob(os.path.join(folder, "*.parquet")))


def dense_bytes(rows: Rows, names: Sequence[str], path: str) -> float:
    """Bytes per token of some users' days as dense rows: user, day and every behaviour."""
    some = rows.slice(0, min(len(rows), DENSE_USERS))
    lengths = (some.end_day - some.first_day).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    user = np.repeat(np.arange(len(some)), lengths)
    values = np.zeros((len(user), len(names)), np.int64)
    of_day = np.repeat(np.arange(len(some)), np.diff(some.offsets))
    inside = (some.days >= some.first_day[of_day]) & (some.days < some.end_day[of_day])
    values[(starts[of_day] + some.days - some.first_day[of_day])[inside]] = some.values[inside]
    day = np.arange(len(user)) - starts[user] + some.first_day[user]
    table = pa.table({"user": pa.array(some.user).take(pa.array(user)), "day": day.astype(np.int32)})
    for column, name in enumerate(names):
        table = table.append_column(name, pa.array(values[:, column]))
    pq.write_table(table, path, compression="zstd")
    return os.path.getsize(path) / len(user)


def differences(rows: Rows, run: Run, events: str) -> int:
    """Rows of (user, day, numbers) that are not what the tokenizer makes of all events in one piece."""
    cleaned = [table for file in raw_files(events, "events") for table in read_events(file.uri, run.data, file.name)[0]]
    daily = timelines.tokenize(pa.concat_tables(cleaned), run.data.behaviours)
    if daily.num_rows != len(rows.days):
        return abs(daily.num_rows - len(rows.days)) or 1
    users = np.repeat(rows.user.astype(str), np.diff(rows.offsets))
    order = np.lexsort((rows.days, users))
    wrong = users[order] != daily["user"].to_numpy(zero_copy_only=False).astype(str)
    wrong |= rows.days[order] != daily["day"].to_numpy()
    for column, item in enumerate(run.data.behaviours):
        wrong |= rows.values[order, column] != daily[item.name].to_numpy()
    return int(wrong.sum())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.bytes", description="The size of the tokens.")
    parser.add_argument("--dataset", default=",".join(DATASETS), help="with commas between (default: all)")
    parser.add_argument("--users", type=int, default=10_000, help="users of the simulator")
    parser.add_argument("--path", default="../shared/data/oulad", help="the folder of OULAD's tables")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a small simulator alone, no bar")
    parser.add_argument("--root", default="runs/bench", help="where raw tables are kept")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop after this long (0: never)")
    options = parser.parse_args(arguments)
    wanted = ["simulator"] if options.quick else options.dataset.split(",")
    if unknown := [name for name in wanted if name not in DATASETS]:
        parser.error(f"--dataset: expected some of {', '.join(DATASETS)}, got {', '.join(unknown[:5])}")
    missed: list[str] = []
    with time_limit(options.max_minutes) as over:
        for dataset in wanted:
            missed += measure(dataset, options)
    for line in [*over, *missed]:
        note(line)
    return int(bool(missed or over))


if __name__ == "__main__":
    sys.exit(main())
