"""The data plane's benchmarks compare like with like: the peers' tables and windows are ours."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from jobs.bench import bytes as bench_bytes
from jobs.bench.events import DATA, Log
from jobs.bench.loader import DAYS, NAMES, Artifact
from jobs.bench.loader_peers import Windows
from jobs.bench.memory import PeakMemory
from jobs.bench.prepare import TOKENIZER
from jobs.bench.prepare_peers import differences, duckdb_daily, polars_daily
from lum_ray.data.prepare import prepare_timelines
from lum_ray.data.raw import RawTables

MIB = 1 << 20


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Log(20_000, files=3).folder(str(tmp_path_factory.mktemp("bench")))


@pytest.fixture(scope="module")
def built(log: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("timelines") / "t")
    return prepare_timelines(DATA, RawTables(log), uri, TOKENIZER, "local").uri


def test_polars_and_duckdb_make_our_table(log: str, built: str, tmp_path: Path) -> None:
    paths = {name: str(tmp_path / f"{name}.parquet") for name in ("polars", "duckdb", "changed")}
    polars_daily(log, paths["polars"])
    duckdb_daily(log, paths["duckdb"])
    table = pl.read_parquet(paths["polars"])
    table.with_columns(shops=pl.when(pl.int_range(pl.len()) == 7).then(99).otherwise("shops")).write_parquet(
        paths["changed"]
    )
    assert differences(f"{built}/part-*/*.parquet", paths) == {"polars": 0, "duckdb": 0, "changed": 2}


def test_a_log_is_what_its_options_say(log: str) -> None:
    files = sorted(Path(log).glob("*.parquet"))
    table = pl.scan_parquet(files).collect()
    assert len(files) == 3 and abs(len(table) - 20_000) < 1_000 and table["user"].n_unique() == 100
    days = table.select("user", pl.col("time").dt.date()).unique()
    assert len(days) / (100 * 360) == pytest.approx(0.08, abs=0.01)
    # files by time, users mixed
    assert pq.read_table(files[0])["time"].to_numpy().max() < pq.read_table(files[1])["time"].to_numpy().min()


def test_the_data_loader_gives_our_windows(built: str) -> None:
    ours = Artifact(built, 50)
    found = np.concatenate([dense for dense, _ in ours.dense()])
    (part,) = ours.timelines.manifest["parts"]
    paths = [f"{built}/{part['path']}/{file['name']}" for file in part["files"]]
    peers = np.stack(list(Windows(paths, NAMES, ours.timelines.end_day - 1, DAYS)))
    assert found.shape == peers.shape == (100, DAYS, len(NAMES)) and found.any(axis=(1, 2)).all()
    assert sorted(window.tobytes() for window in found) == sorted(window.tobytes() for window in peers)


def test_memory_is_that_of_the_whole_tree() -> None:
    with PeakMemory(every_s=0.05) as before:
        pass
    child = subprocess.Popen([sys.executable, "-c", f"held = bytearray({256 * MIB}); input()"], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 30
    with PeakMemory(every_s=0.05) as memory:
        while memory.bytes < before.bytes + 240 * MIB and time.monotonic() < deadline:
            time.sleep(0.05)
    with PeakMemory(every_s=0.05, without=[child.pid]) as without:
        pass
    child.kill()
    child.wait()
    assert 240 * MIB < memory.bytes - before.bytes < 400 * MIB
    assert without.bytes < memory.bytes - 240 * MIB


def test_bytes_prints_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_bytes.main(["--quick", "--root", str(tmp_path)]) == 0
    rows = {row["what"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) == {
        f"bytes/simulator/{name}" for name in ("bytes_per_token", "bytes_per_active_day", "tokens_per_s")
    }
    row = rows["bytes/simulator/bytes_per_token"]
    assert row["run"]["rows_that_differ"] == 0 and row["run"]["behaviours"] == 13
    assert sum(row["run"]["bytes"].values()) == pytest.approx(row["value"] * row["run"]["tokens"])
