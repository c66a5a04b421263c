"""`prepare` on a large event log beside polars, DuckDB and Ray Data, in a Ray session that has started.

    python -m jobs.bench.prepare [--events 50_000_000] [--quick] [--repeats 5] [--max-minutes 12]

200 events a user, 13 daily behaviours, 16 files; everything runs on the same cores. Rows (bars in BARS):
- prepare/polars/events_per_s: `engine: auto` beside polars' streaming engine, which writes a row per user and day; ours
  also checks every row, sorts by bucket and lays out a row per user.
- prepare/polars_forced_ray/events_per_s: the same with `engine: ray`.
- prepare/map_groups/events_per_s: at 2 million events beside Ray Data's groupby().map_groups, which is given at most
  --map-groups-s (then the ratio is a lower bound).
- prepare/memory/gib: the largest PSS of our processes and the Ray session while either engine prepared --events.
- prepare/growth/ratio: the time of twice --events over that of a fifth of it: ten times the work.

What was tried for the first two rows, on 2 cores at 20 and 50 million events. CPU nanoseconds an event on one thread:
polars about 200; ours 540 at first, now 330: reading 62, checks 36, states 120, shuffle 39, merge 35, layout, file 40.
- polars' group_by in place of ours, over the same integers: 44 ms against 32 ms for a batch of 245,000 events;
- polars' reader in place of Arrow's: 16 ms against 15 ms; other Arrow memory pools, larger malloc thresholds: 0 to 4 %;
- kept: a table of places in place of a sort (the keys began at day 0, so it was never used), days of UTC by division, a
  radix sort of the merge's keys, reducing only rows whose (user, day) comes twice, states in the fewest bytes that hold
  them, map tasks of four million events.
What is left: the work is some thirty passes over a batch, each fast, where polars has one in compiled code.

Before the clock starts, the tables of lum_ray, polars and DuckDB are compared at --events. The exit code is 1 where
they differ in any row, or a bar is missed.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as Late
from multiprocessing import get_context
from typing import Any

import ray

from jobs.bench.events import BEHAVIOURS, DATA, Log
from jobs.bench.memory import GIB, PeakMemory
from jobs.bench.prepare_peers import differences, duckdb_daily, map_groups_daily, polars_daily
from jobs.bench.rows import emit, hardware, note, spread
from jobs.bench.time_limit import time_limit
from lum_ray.artifacts import Artifact
from lum_ray.data.prepare import Engine, Tokenizer, prepare_timelines
from lum_ray.data.raw import RawTables
from lum_ray.lumos import timelines
from lum_ray.steps.session import start_ray

BARS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "prepare/polars/events_per_s": ("a ratio of at least 0.7", lambda found: found >= 0.7),
    "prepare/polars_forced_ray/events_per_s": ("a ratio of at least 0.35", lambda found: found >= 0.35),
    "prepare/map_groups/events_per_s": ("a ratio of at least 50", lambda found: found >= 50),
    "prepare/memory/gib": ("at most 4 GiB", lambda found: found <= 4),
    "prepare/growth/ratio": ("at most 11", lambda found: found <= 11),
}
MAP_GROUPS_EVENTS = 2_000_000
PACKAGES = ("lum-ray", "ray", "pyarrow", "numpy", "polars", "duckdb")
TOKENIZER = Tokenizer(timelines.partial, timelines.merge, timelines.TOKENIZER_VERSION)


class Bench:
    """What a call shares: options, the peers' process, and the bars that were missed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.missed: list[str] = []
        self.machine = hardware()
        self.work = os.path.join(options.root, "prepare", f"work-{os.getpid()}")
        os.makedirs(self.work)
        # a process of its own: the memory that a peer keeps is not ours
        self.peers = ProcessPoolExecutor(1, get_context("spawn"))
        self.peer_pid = self.peers.submit(os.getpid).result()
        self.session = str(ray.get_runtime_context().get_session_name())

    def close(self) -> None:
        self.peers.shutdown()
        shutil.rmtree(self.work, ignore_errors=True)

    def prepare(self, folder: str, engine: Engine, keep: bool = False) -> tuple[float, Artifact]:
        """(seconds, artifact), which is removed unless it is kept."""
        uri = os.path.join(self.work, engine)
        shutil.rmtree(uri, ignore_errors=True)
        start = time.perf_counter()
        made = prepare_timelines(DATA, RawTables(folder), uri, TOKENIZER, engine)
        seconds = time.perf_counter() - start
        if not keep:
            shutil.rmtree(uri)
        return seconds, made

    def peak_gib(self, folder: str, engine: Engine) -> float:
        """Outside the clock: the kernel sums up the pages of a process while its threads wait."""
        with PeakMemory(self.session, without={self.peer_pid}) as memory:
            self.prepare(folder, engine)
        return memory.bytes / GIB

    def row(
        self, what: str, samples: Sequence[float], unit: str, judged: float, shown: dict[str, Any], **more: Any
    ) -> None:
        value, low, high = spread(samples)
        shown = {"behaviours": len(BEHAVIOURS), "quick": self.options.quick, "bar": BARS[what][0], **shown}
        emit(what, value, unit, low=low, high=high, run=shown, machine=self.machine, packages=PACKAGES, **more)
        if not self.options.quick and not BARS[what][1](judged):
            self.missed.append(f"{what}: expected {BARS[what][0]}, got {judged:.3g}")


def compare(bench: Bench, folder: str) -> None:
    """The three tables of the whole log must be the same. This also brings its files into the page cache."""
    paths = {name: os.path.join(bench.work, f"{name}.parquet") for name in ("polars", "duckdb")}
    for name, peer in (("polars", polars_daily), ("duckdb", duckdb_daily)):
        note(f"{name}: {bench.peers.submit(peer, folder, paths[name]).result():.1f} s")
    seconds, made = bench.prepare(folder, "auto", keep=True)
    note(f"lum_ray: {seconds:.1f} s")
    (part,) = made.manifest["parts"]
    found = bench.peers.submit(differences, os.path.join(made.uri, part["path"], "*.parquet"), paths).result()
    note(f"rows that differ: {found}")
    for name, rows in found.items():
        if rows:
            bench.missed.append(f"{name}: expected the same table, got {rows} rows that only one side has")
        os.unlink(paths[name])


def beside_polars(bench: Bench, log: Log, folder: str, events: int) -> None:
    out = os.path.join(bench.work, "peer.parquet")
    bench.prepare(log_folder(bench, MAP_GROUPS_EVENTS), "ray")  # its workers have then started
    seconds: dict[str, list[float]] = {"auto": [], "polars": [], "ray": []}
    for _ in range(bench.options.repeats):
        seconds["auto"].append(bench.prepare(folder, "auto")[0])
        seconds["polars"].append(bench.peers.submit(polars_daily, folder, out).result())
        seconds["ray"].append(bench.prepare(folder, "ray")[0])
        note(", ".join(f"{name} {taken[-1]:.1f} s" for name, taken in seconds.items()))
    shown = {
        "events": events,
        "users": log.users,
        "files": log.files,
        "repeats": bench.options.repeats,
        "seconds": seconds,
    }
    for what, engine in (("polars", "auto"), ("polars_forced_ray", "ray")):
        ratio = spread([theirs / ours for ours, theirs in zip(seconds[engine], seconds["polars"], strict=True)])[0]
        rates = [events / taken for taken in seconds[engine]]
        bench.row(
            f"prepare/{what}/events_per_s",
            rates,
            "events/s",
            ratio,
            shown | {"engine": engine},
            peer="polars streaming",
            ratio=ratio,
        )
    peak = {"auto": bench.peak_gib(folder, "auto"), "ray": bench.peak_gib(folder, "ray")}
    largest = max(peak.values())
    bench.row("prepare/memory/gib", [largest], "GiB", largest, shown | {"by_engine": peak})


def beside_map_groups(bench: Bench) -> None:
    folder = log_folder(bench, MAP_GROUPS_EVENTS)
    seconds = [bench.prepare(folder, "auto")[0] for _ in range(bench.options.repeats)]
    address, limit_s = ray.get_runtime_context().gcs_address, bench.options.map_groups_s
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    pid, finished = pool.submit(os.getpid).result(), True
    try:
        theirs = pool.submit(map_groups_daily, folder, address).result(limit_s)
    except Late:
        theirs, finished = limit_s, False
        os.kill(pid, 9)
    pool.shutdown(wait=finished, cancel_futures=True)
    note(f"map_groups: {theirs:.1f} s" + ("" if finished else ", stopped"))
    events = rows_of(folder)
    ratio = theirs / spread(seconds)[0]
    shown = {
        "events": events,
        "map_groups_s": theirs,
        "map_groups_finished": finished,
        "repeats": bench.options.repeats,
    }
    rates = [events / taken for taken in seconds]
    bench.row(
        "prepare/map_groups/events_per_s", rates, "events/s", ratio, shown, peer="Ray Data map_groups", ratio=ratio
    )


def growth(bench: Bench) -> None:
    small, large = (log_folder(bench, int(bench.options.events * factor)) for factor in (0.2, 2))
    taken = [bench.prepare(small, "auto")[0] for _ in range(1 if bench.options.quick else 3)]
    note(f"{rows_of(small):,} events: {taken}")
    whole, _ = bench.prepare(large, "auto")
    note(f"{rows_of(large):,} events: {whole:.1f} s")
    found = [whole / one for one in taken]
    shown = {"events": [rows_of(small), rows_of(large)], "seconds": [taken, whole]}
    bench.row("prepare/growth/ratio", found, "x", spread(found)[0], shown)


def log_folder(bench: Bench, events: int) -> str:
    start = time.perf_counter()
    folder = Log(events).folder(bench.options.root)
    note(f"{folder}: {time.perf_counter() - start:.0f} s")
    return folder


def rows_of(folder: str) -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in glob.glob(f"{folder}/*.parquet"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.prepare", description="prepare on a large event log.")
    parser.add_argument("--events", type=int, default=50_000_000)
    parser.add_argument("--quick", action="store_true", help="a smoke test: 200,000 events, one run of each, no bars")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    parser.add_argument("--map-groups-s", type=float, default=120.0, help="what Ray Data's map_groups is given")
    parser.add_argument("--root", default="runs/bench", help="where the logs are kept")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop after this long (0: never)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.events, options.repeats, options.map_groups_s = 200_000, 1, 10.0
    log = Log(options.events)
    folder = log.folder(options.root)
    start = time.perf_counter()
    start_ray()
    note(f"Ray's start: {time.perf_counter() - start:.1f} s")
    bench = Bench(options)
    try:
        with time_limit(options.max_minutes) as over:
            compare(bench, folder)
            beside_polars(bench, log, folder, rows_of(folder))
            beside_map_groups(bench)
            growth(bench)
    finally:
        bench.close()
    for line in [*over, *bench.missed]:
        note(line)
    return int(bool(bench.missed or over))


if __name__ == "__main__":
    sys.exit(main())
