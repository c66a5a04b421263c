"""What a day of new events costs, against preparing everything anew: CPU seconds of all threads, less a no-op's.

    python -m jobs.bench.increment --root R [--events 100000000] [--days 365] [--repeats 3] [--quick]

The events are made day by day (a file a day, lines of baskets) and kept below --root. The timelines of all days but the
last are the base; the increment reads the last day's file, of which one line in fifty is up to six days late, and is
compared, bucket by bucket, with a rebuild of all files. Every prepare is a process of its own, with the local engine.

Rows: increment/rebuild/cpu_s, (increment - no-op) / (rebuild - no-op), and the seconds of each. Exit code 1 if the
increment differs from the rebuild in any row, or costs more than 0.03 of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.bench.rows import emit, hardware, note, spread
from lum_ray.data.reader import Timelines

MOST = 0.03
LINES = 8
"""Lines of a basket on average; The Complete Journey has nine."""
BASKETS = 42
"""Baskets of a user in a year: every ninth day is active."""
LATE_SHARE, LATE_DAYS = 0.02, 6
DAY_US = 86_400_000_000
FIRST_DAY = 19_000
NUMBERS = ("user", "user_hash", "offsets", "days", "values", "first_day", "end_day")


def run_file(events: str, root: str) -> dict[str, Any]:
    """The plain values of the run that is prepared."""
    behaviours = [
        {"name": "active", "kind": "binary", "aggregate": "count()"},
        {"name": "spend", "kind": "continuous", "aggregate": "sum(price)", "resolution": 0.01, "gate": "active"},
        {"name": "lines", "kind": "count", "aggregate": "count()"},
        {"name": "products", "kind": "count", "aggregate": "n_unique(product)"},
        {"name": "coupon", "kind": "binary", "aggregate": "any(coupon > 0)"},
    ]
    users = {"validate": {"users": [0.8, 0.9]}, "test": {"users": [0.9, 1.0]}, "train": {"users": [0.0, 0.8]}}
    data = {"events": {"path": events}, "behaviours": behaviours, "engine": "local"}
    return {"name": "increment", "root": root, "data": data, "split": users, "lumos": {}}


def make_day(day: int, rows: int, names: pa.Array, late: bool) -> pa.Table:
    """About `rows` lines of baskets of one day; the same for the same arguments."""
    draw = np.random.default_rng([day, rows])
    # few users buy often: a user's rate falls with her number
    basket_user = (len(names) * draw.random(max(1, rows // LINES)) ** 1.5).astype(np.int64)
    lines = draw.poisson(LINES - 1, len(basket_user)) + 1
    instant = np.repeat(draw.integers(0, DAY_US, len(basket_user)), lines) + day * DAY_US
    count = len(instant)
    if late:
        instant -= DAY_US * np.where(draw.random(count) < LATE_SHARE, draw.integers(1, LATE_DAYS + 1, count), 0)
    return pa.table(
        {
            "user": names.take(pa.array(np.repeat(basket_user, lines))),
            "time": pa.array(instant, pa.timestamp("us", "UTC")),
            "price": draw.integers(50, 3000, count) / 100,
            "product": draw.integers(0, 50_000, count),
            "coupon": (draw.random(count) < 0.03).astype(np.int8),
        }
    )


def make_events(folder: Path, events: int, days: int) -> list[Path]:
    """A file a day, oldest first; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    users = max(100, round(events / LINES / BASKETS * 365 / days))
    names = pc.binary_join_element_wise("user-", pa.array(np.arange(users)).cast(pa.string()), "")
    files = [folder / f"{day:04d}.parquet" for day in range(days)]
    for day, file in enumerate(files):
        if not file.exists():
            table = make_day(FIRST_DAY + day, events // days, names, late=day == days - 1)
            pq.write_table(table, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
            if day % 50 == 0:
                note(f"made day {day} of {days}")
    return files


def linked(folder: Path, files: Sequence[Path]) -> str:
    """`folder` with exactly these files, without copying."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in set(os.listdir(folder)) - {file.name for file in files}:
        (folder / old).unlink()
    for file in files:
        if not (folder / file.name).exists():
            os.link(file, folder / file.name)
    return str(folder)


def prepared(events: str, root: Path) -> tuple[float, str]:
    """CPU seconds (all threads, imports left out) of preparing the timelines in a new process, and their URI."""
    command = [sys.executable, "-m", "jobs.bench.increment", "--root", str(root), "--prepare", events]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    cpu_s, uri = json.loads(found.stdout.strip().splitlines()[-1])
    return cpu_s, uri


def prepare(events: str, root: str) -> int:
    """What such a process does."""
    from lum_ray import catalog
    from lum_ray.steps.prepare import prepare_timelines

    run = catalog.read_run(run_file(events, root))
    begin = time.process_time()
    uri = prepare_timelines(run, note).uri
    print(json.dumps([time.process_time() - begin, uri]))
    return 0


def differences(one: str, other: str) -> int:
    """Buckets whose users differ in anything that a model reads."""
    a, b = Timelines.open(one), Timelines.open(other)
    if a.buckets != b.buckets:
        raise SystemExit(f"the two have {a.buckets} and {b.buckets} buckets: choose another --events")
    wrong = 0
    for bucket in range(a.buckets):
        rows = [timelines.read([bucket]) for timelines in (a, b)]
        same = all(np.array_equal(*(getattr(found, name) for found in rows)) for name in NUMBERS)
        wrong += not same
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.increment", description="A day of new events.")
    parser.add_argument("--root", required=True, help="where events and artifacts go: a local folder")
    parser.add_argument("--events", type=int, default=100_000_000)
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 200,000 events of 40 days, once")
    parser.add_argument("--prepare", metavar="EVENTS", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.prepare:
        return prepare(options.prepare, options.root)
    events, days, repeats = (200_000, 40, 1) if options.quick else (options.events, options.days, options.repeats)
    root = Path(options.root) / f"increment-{events}-{days}"
    files = make_events(root / "all", events, days)
    total = sum(pq.read_metadata(file).num_rows for file in files)
    watched, base = root / "events", root / "base"
    note(f"{total:,} events; preparing the base")
    _, kept = prepared(linked(watched, files[:-1]), base)

    seconds: dict[str, list[float]] = {"no_op": [], "increment": [], "rebuild": []}
    for repeat in range(repeats):
        for old in (base / "timelines").absolute().iterdir():
            if str(old) != os.path.abspath(kept):
                shutil.rmtree(old)
        shutil.rmtree(root / "rebuilt", ignore_errors=True)
        cpu_s, increment = prepared(linked(watched, files), base)
        seconds["increment"].append(cpu_s)
        seconds["no_op"].append(prepared(str(watched), base)[0])
        cpu_s, rebuilt = prepared(str(watched), root / "rebuilt")
        seconds["rebuild"].append(cpu_s)
        linked(watched, files[:-1])
        note(f"{repeat + 1} of {repeats}: " + ", ".join(f"{key} {values[-1]:.2f} s" for key, values in seconds.items()))
    wrong = differences(increment, rebuilt)
    run = {"events": total, "days": days, "repeats": repeats, "late_share": LATE_SHARE, "buckets_that_differ": wrong}
    shared: dict[str, Any] = {"run": run, "machine": hardware(), "packages": ("pyarrow", "numpy")}
    for key, values in seconds.items():
        middle, low, high = spread(values)
        emit(f"increment/{key}_cpu_s", round(middle, 2), "s", low=round(low, 2), high=round(high, 2), **shared)
    no_op = statistics.median(seconds["no_op"])
    shares = [
        (one - no_op) / (other - no_op) for one, other in zip(seconds["increment"], seconds["rebuild"], strict=True)
    ]
    share, low, high = spread(shares)
    bounds = {"low": round(low, 4), "high": round(high, 4)}
    emit("increment/rebuild/cpu_s", round(share, 4), "1", peer="rebuild", ratio=round(share, 4), **bounds, **shared)
    if wrong:
        note(f"{wrong} buckets of the increment differ from the rebuild's")
    return int(bool(wrong) or (share > MOST and not options.quick))


if __name__ == "__main__":
    sys.exit(main())
