"""From a file to dense torch batches: our loader beside Ray Data, MosaicML streaming and torch's DataLoader.

    python -m jobs.bench.loader [--users 20_000] [--quick] [--repeats 5] [--peers PYTHON] [--max-minutes 6]

Everybody gives the same product: a window of 360 days of every user once, 13 behaviours, float32 (batch, 360, 13). A
token is a calendar day in the window since the user's first; pads before it are not counted. 8 % of days are active.
Ours reads the timelines artifact in the loader's one thread, with torch on one thread; a repeat is a whole epoch of a
new loader, so that every byte comes from the file. Rows (bars in BARS):
- loader/ray_data/tokens_per_s: beside iter_torch_batches over dense rows (a row per user and day).
- loader/mosaic/tokens_per_s: beside MosaicML streaming, two workers, a sample a user: her active days, made dense by
  sample (see `make peers`). loader/mosaic_dense/tokens_per_s: its samples are the windows themselves, dense on disk, 6
  times the bytes for one cut only; no bar.
- loader/dataloader/tokens_per_s: beside torch's DataLoader over the same artifact, two workers, collated by sample.
- loader/thread/tokens_per_s: ours by the processor's time, which other work on the machine does not change.
- loader/s3/tokens_per_s: ours from a local S3 server, beside Ray Data from it.
- loader/lumos/tokens_per_s: ours with all that a LUMOS batch holds (calendar, targets, static attributes).

Of .34 CPU seconds for 20,000 windows (.45 before a step was one selection of rows kept in memory): parquet .10, lists
to arrays .10, the dense windows .05, selecting .03, draws and order .05. An epoch of 375 MB of dense windows cannot be
written much under .04, so what would help most is fewer columns to decode, which the layout (a list a behaviour) sets.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from jobs.bench.events import BEHAVIOURS, DATA, Log
from jobs.bench.loader_peers import Floats, Windows, data_loader, loader_epoch, ray_epoch, write_dense_rows
from jobs.bench.rows import emit, hardware, note, spread
from jobs.bench.s3_server import s3_server
from jobs.bench.time_limit import time_limit
from lum_ray.artifacts import storage
from lum_ray.data.loader import Arrays, Loader
from lum_ray.data.prepare import Tokenizer, prepare_timelines
from lum_ray.data.raw import RawTables
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.data.windows import CutPlan, history
from lum_ray.lumos import timelines
from lum_ray.lumos.config import BehaviourInput, Inputs, LumosConfig
from lum_ray.lumos.stage import LumosStage
from lum_ray.steps.session import start_ray

DAYS = 360
NAMES = [item.name for item in BEHAVIOURS]
BARS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "loader/ray_data/tokens_per_s": ("a ratio of at least 20", lambda found: found >= 20),
    "loader/mosaic/tokens_per_s": ("a ratio of at least 5", lambda found: found >= 5),
    "loader/dataloader/tokens_per_s": ("a ratio of at least 5", lambda found: found >= 5),
    "loader/thread/tokens_per_s": ("at least 10 M tokens/s", lambda found: found >= 10e6),
}


def densified(rows: Rows, samples: Samples) -> Arrays:
    """The window of each sample, dense."""
    sample, place, index = history(rows, samples, DAYS)
    dense = np.zeros((len(samples) * DAYS, rows.values.shape[1]), np.float32)
    dense[sample * DAYS + place] = rows.values[index]
    pads = np.clip(rows.first_day[samples.row].astype(np.int64) - (samples.cut - DAYS), 0, DAYS)
    return {"x_BTU": dense.reshape(len(samples), DAYS, -1), "pads_B": pads}


class Artifact:
    """A timelines artifact, and epochs of it by our loader."""

    def __init__(self, uri: str, batch: int) -> None:
        self.uri, self.batch = uri, batch
        self.timelines = Timelines.open(uri)
        self.steps = int(self.timelines.manifest["users"]) // batch
        self.windows = self.steps * batch
        last = self.timelines.end_day - 1
        self.plan = CutPlan(last, last, 1, 0)

    def _steps(self, collate: Callable[[Rows, Samples], Arrays]) -> Iterator[Arrays]:
        loader = Loader(
            Timelines.open(self.uri), self.plan, collate,
            batch=self.batch, micro_batch=self.batch, draws=1, seed=0, rank=0, world=1,
        )  # fmt: skip
        for _ in range(self.steps):
            yield from next(loader).micro_batches
        loader.close()

    def epoch(self, collate: Callable[[Rows, Samples], Arrays] = densified) -> int:
        """Windows given."""
        count = 0
        for arrays in self._steps(collate):
            batch = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype != np.object_}
            count += len(batch["pads_B"])
        return count

    def dense(self) -> Iterator[tuple[Floats, int]]:
        """The windows of a step and how many of their days are pads."""
        for arrays in self._steps(densified):
            yield arrays["x_BTU"], int(arrays["pads_B"].sum())


def lumos_collate() -> Callable[[Rows, Samples], Arrays]:
    """The whole batch of a LUMOS with weekdays and seasons; the model behind it does not matter here."""
    config = LumosConfig(history_days=DAYS, width=16, heads=2, encoder_layers=1, swiglu_width=16)
    inputs = Inputs(tuple(BehaviourInput(b.name, b.kind, b.resolution) for b in BEHAVIOURS), event_width=9)
    return LumosStage(config, inputs, None, until_day=1 << 20, min_history_days=0).collate


class Bench:
    """What a call shares: the artifact, the peers' data, what a window holds, and the bars that were missed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.missed: list[str] = []
        self.machine = hardware()
        self.work = os.path.abspath(os.path.join(options.root, "loader", f"work-{os.getpid()}"))
        os.makedirs(self.work)
        tokenizer = Tokenizer(timelines.partial, timelines.merge, timelines.TOKENIZER_VERSION)
        log = Log(options.users * 200)
        self.tables = RawTables(log.folder(options.root))
        self.tokenizer = tokenizer
        self.ours = self.artifact(self.work)
        self.windows: list[Floats] = []
        pads = 0
        for dense, padded in self.ours.dense():
            self.windows.append(dense)
            pads += padded
        self.tokens_each = DAYS - pads / sum(len(dense) for dense in self.windows)

    def artifact(self, root: str) -> Artifact:
        made = prepare_timelines(DATA, self.tables, f"{root}/timelines/bench", self.tokenizer, "local")
        return Artifact(made.uri, self.options.batch)

    def beside(
        self, what: str, ours: Callable[[], int], peer: Callable[[], int] | None, named: str, by_cpu: bool = False
    ) -> None:
        """Interleaved epochs of ours and of the peer, after one of each outside the clock, and the row of them."""
        rates: list[list[float]] = [[], []]
        forms = [ours] if peer is None else [ours, peer]
        for turn in range(self.options.repeats + 1):
            for form, found in zip(forms, rates):
                clock = time.process_time if by_cpu else time.perf_counter
                start = clock()
                windows = form()
                if turn:
                    found.append(windows * self.tokens_each / (clock() - start))
        ratio = spread([mine / theirs for mine, theirs in zip(*rates)])[0] if peer is not None else None
        value, low, high = spread(rates[0])
        bar = BARS.get(what)
        shown = {
            "users": self.options.users, "batch": self.options.batch, "days": DAYS, "behaviours": len(NAMES),
            "pads_share": 1 - self.tokens_each / DAYS, "repeats": self.options.repeats, "quick": self.options.quick,
            "peer_tokens_per_s": spread(rates[1])[0] if peer is not None else None, "bar": bar and bar[0],
        }  # fmt: skip
        emit(
            what, value, "tokens/s", peer=named or None, ratio=ratio, low=low, high=high, run=shown,
            machine=self.machine, packages=("torch", "pyarrow", "numpy", "ray"),
        )  # fmt: skip
        judged = value if peer is None else ratio
        if bar and judged is not None and not self.options.quick and not bar[1](judged):
            self.missed.append(f"{what}: expected {bar[0]}, got {judged:.3g}")


def beside_ray(bench: Bench) -> None:
    start_ray()
    place = storage(os.path.join(bench.work, "dense"))
    place.filesystem.create_dir(place.path)
    write_dense_rows(place.path, iter(bench.windows), NAMES, place.filesystem)
    bench.beside(
        "loader/ray_data/tokens_per_s",
        bench.ours.epoch,
        lambda: ray_epoch(place.path, NAMES, DAYS, bench.options.batch, place.filesystem),
        "Ray Data iter_torch_batches over dense rows",
    )


def beside_mosaic(bench: Bench) -> None:
    if not os.path.isfile(bench.options.peers):
        note(f"MosaicML streaming is left out: no {bench.options.peers}; `make peers`")
        if not bench.options.quick:
            bench.missed.append(f"loader/mosaic/tokens_per_s: expected its Python at {bench.options.peers}")
        return
    path = os.path.join(bench.work, "windows.npz")
    windows = np.concatenate(bench.windows)
    user, place = np.nonzero(windows.any(axis=2))
    offsets = np.searchsorted(user, np.arange(len(windows) + 1))
    np.savez(
        path, offsets=offsets, place=place.astype(np.int32), values=windows[user, place].astype(np.int64), days=DAYS
    )
    for what, dense in (("mosaic", False), ("mosaic_dense", True)):
        _beside_mosaic(bench, f"loader/{what}/tokens_per_s", path, dense)


def _beside_mosaic(bench: Bench, what: str, path: str, dense: bool) -> None:
    script = os.path.join(os.path.dirname(__file__), "streaming_peer.py")
    shards = os.path.join(bench.work, f"mds-{dense}")
    batch = str(bench.options.batch)
    command = [bench.options.peers, "-P", script, "--windows", path, "--work", shards, "--batch", batch]
    command += ["--dense"] if dense else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        asks, answers = process.stdin, process.stdout
        assert answers.readline() == "ready\n"

        def epoch() -> int:
            print(file=asks, flush=True)
            return int(answers.readline().split()[1])

        bench.beside(what, bench.ours.epoch, epoch, "MosaicML streaming, two workers" + ", dense shards" * dense)
        asks.close()


def beside_dataloader(bench: Bench) -> None:
    (part,) = bench.ours.timelines.manifest["parts"]
    paths = sorted(glob.glob(os.path.join(bench.ours.uri, part["path"], "*.parquet")))
    peer = data_loader(Windows(paths, NAMES, bench.ours.timelines.end_day - 1, DAYS), bench.options.batch)
    named = "torch DataLoader, two workers, by sample"
    bench.beside("loader/dataloader/tokens_per_s", bench.ours.epoch, lambda: loader_epoch(peer), named)


def alone(bench: Bench) -> None:
    bench.beside("loader/thread/tokens_per_s", bench.ours.epoch, None, "", by_cpu=True)
    collate = lumos_collate()
    bench.beside("loader/lumos/tokens_per_s", lambda: bench.ours.epoch(collate), None, "")


def from_s3(bench: Bench) -> None:
    with s3_server(os.path.join(bench.work, "s3")) as root:
        ours = bench.artifact(root)
        place = storage(f"{root}/dense")
        write_dense_rows(place.path, iter(bench.windows), NAMES, place.filesystem)
        bench.beside(
            "loader/s3/tokens_per_s",
            ours.epoch,
            lambda: ray_epoch(place.path, NAMES, DAYS, bench.options.batch, place.filesystem),
            "Ray Data iter_torch_batches over dense rows, from S3",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.loader", description="From a file to dense batches.")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="a smoke test: 600 users, one run of each, no bars")
    parser.add_argument("--repeats", type=int, default=5, help="timed epochs of each")
    parser.add_argument("--peers", default=".venv-streaming/bin/python", help="the Python with mosaicml-streaming")
    parser.add_argument("--root", default="runs/bench", help="where logs and artifacts are")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop after this long (0: never)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.users, options.batch, options.repeats = 600, 64, 1
    torch.set_num_threads(1)
    bench = Bench(options)
    try:
        with time_limit(options.max_minutes) as over:
            for part in (alone, beside_dataloader, beside_mosaic, beside_ray, from_s3):
                part(bench)
    finally:
        shutil.rmtree(bench.work, ignore_errors=True)
    for line in [*over, *bench.missed]:
        note(line)
    return int(bool(bench.missed or over))


if __name__ == "__main__":
    sys.exit(main())
