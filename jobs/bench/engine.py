"""What the training engine costs beside a bare torch loop, the loader beside batches in memory, Ray Train beside both.

    python -m jobs.bench.engine [--quick] [--blocks 7] [--steps 8] [--root DIR]

Rows, on the CPU in fp32, one thread, LUMOS on the planted world:
- engine/deepspeed/tokens_per_s: steps of our engine (DeepSpeed, stage 0) on batches in memory; peer: a plain torch loop
  (same model, batches, clipping and fused AdamW). Blocks in turn; low and high are the spread over the blocks.
- engine/ray_loader/tokens_per_s: the same engine fed by the loader, which reads and collates in its own thread; peer:
  the batches in memory.
- engine/data_wait/share: the share of that time in which the step waited for its batch.
- engine/fit_waste/s: two workers of Ray Train (Ray started before), from the call to the return, less the training
  itself; the median of three.

Exit code 1 if a bar is missed: .97, .95, .02, 15 s.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from jobs.bench.rows import emit, hardware, note, spread
from lum_ray import catalog, config, presets
from lum_ray.data.loader import Loader
from lum_ray.data.reader import Timelines
from lum_ray.stage import Arrays, to_device
from lum_ray.steps.prepare import cut_plan, fit_until, prepare
from lum_ray.steps.train import make_stage
from lum_ray.training.engine import Engine
from lum_ray.training.settings import EngineSettings

CPU = torch.device("cpu")
CLIP = 1.0
BARS = {"deepspeed": 0.97, "ray_loader": 0.95, "data_wait": 0.02, "fit_waste": 15.0}
PACKAGES = ("torch", "deepspeed", "ray")


class Contest:
    """One run's stage, twice (its weights drift apart, its work does not), and batches of its loader."""

    def __init__(self, root: str, quick: bool, batches: int) -> None:
        plain = config.dump(presets.lumos_simulator())
        plain["data"]["source"]["options"] |= {"users": 300 if quick else 3000}
        small = ["lumos.history_days=56", "lumos.width=16", "lumos.heads=2", "lumos.cuts_per_window=2"] if quick else []
        self.run = catalog.read_run(config.override(plain, [f"root={root}", "data.engine=local", *small]))
        self.prepared = prepare(self.run, note)
        self.timelines = Timelines.open(self.prepared.timelines.uri)
        loader = self.loader()
        self.batches = [micro for step in self._take(loader, batches) for micro in step.micro_batches]
        loader.close()

    def stage(self) -> Any:
        until = fit_until(self.run, self.timelines.end_day)
        return make_stage(self.run, self.prepared, until, self.run.section.cuts_per_window)

    def loader(self) -> Loader:
        train = self.run.train
        return Loader(
            self.timelines, cut_plan(self.run, "train", self.timelines.end_day), self.stage().collate,
            batch=train.batch, micro_batch=train.batch, draws=1, seed=train.seed, rank=0, world=1,
        )  # fmt: skip

    @staticmethod
    def _take(loader: Loader, count: int) -> Iterator[Any]:
        steps = iter(loader.seek(0))
        for _ in range(count):
            yield next(steps)


def torch_loop(stage: Any) -> Callable[[Arrays], None]:
    groups = [{**group, "weight_decay": 0.01 * group["weight_decay"]} for group in stage.trainable()]
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)

    def step(arrays: Arrays) -> None:
        sums_K, counts_K = stage.loss(to_device(arrays, CPU))
        (sums_K / counts_K.clamp(min=1)).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def own_step(engine: Engine, index: int, arrays: Arrays) -> None:
    engine.step(index, [arrays])


def tokens_of(batches: Sequence[Arrays]) -> float:
    return float(sum(int(batch["tokens"]) for batch in batches))


def compare_engines(contest: Contest, engine: Engine, blocks: int) -> tuple[list[float], list[float]]:
    """Tokens per second of the engine and of the torch loop, block by block in turn."""
    bare = torch_loop(contest.stage())
    tokens = tokens_of(contest.batches)
    ours: list[float] = []
    theirs: list[float] = []
    for block in range(blocks + 1):
        for made, step in ((ours, functools.partial(own_step, engine, block)), (theirs, bare)):
            begin = time.perf_counter()
            for batch in contest.batches:
                step(batch)
            if block:  # the first is the warm-up
                made.append(tokens / (time.perf_counter() - begin))
    return ours, theirs


def compare_loader(contest: Contest, engine: Engine, blocks: int) -> tuple[list[float], list[float], list[float]]:
    """Tokens per second with the loader and from memory, block by block in turn, and the share of waiting."""
    loader = contest.loader()
    steps = iter(loader.seek(0))
    streamed: list[float] = []
    held: list[float] = []
    waits: list[float] = []
    for block in range(blocks + 1):
        begin, waited, seen = time.perf_counter(), 0.0, []
        for _ in contest.batches:
            asked = time.perf_counter()
            step = next(steps)
            waited += time.perf_counter() - asked
            engine.step(block, step.micro_batches)
            seen += step.micro_batches
        took = time.perf_counter() - begin
        begin = time.perf_counter()
        for batch in seen:
            engine.step(block, [batch])
        if block:
            streamed.append(tokens_of(seen) / took)
            waits.append(waited / took)
            held.append(tokens_of(seen) / (time.perf_counter() - begin))
    loader.close()
    return streamed, held, waits


def fit_waste(times: int) -> list[float]:
    """Seconds of `fit` with two workers beside the loop itself, on a Ray that runs already."""
    import ray

    from lum_ray.steps.session import start_ray
    from lum_ray.training.fit import fit

    def loop(worker: Any) -> dict[str, Any]:
        begin = time.monotonic()
        time.sleep(2.0)
        return {"trained_s": time.monotonic() - begin}

    start_ray()
    wasted = []
    for _ in range(times):
        begin = time.monotonic()
        trained_s = fit(loop, workers=2)["trained_s"]
        wasted.append(time.monotonic() - begin - trained_s)
    ray.shutdown()
    return wasted


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.engine", description="The cost of the engine")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a small model, no Ray, no bar")
    parser.add_argument("--blocks", type=int, default=7, help="timed blocks of each form")
    parser.add_argument("--steps", type=int, default=8, help="steps a block")
    parser.add_argument("--root", help="where the artifacts are (default: a temporary folder)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    blocks = 2 if options.quick else options.blocks
    about: dict[str, Any] = {"blocks": blocks, "steps": options.steps, "threads": 1, "quick": options.quick}
    missed = []

    def row(
        name: str, unit: str, values: Sequence[float], peer: str | None, ratios: Sequence[float], met: bool
    ) -> None:
        value, low, high = spread(values)
        spread_of = {"ratio_low": min(ratios), "ratio_high": max(ratios)} if ratios else {}
        emit(f"engine/{name}/{unit}", value, unit, peer=peer, ratio=spread(ratios)[0] if ratios else None, low=low,
             high=high, run=about | spread_of, machine=hardware(), packages=PACKAGES)  # fmt: skip
        if not met:
            missed.append(name)

    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(options.root or folder, options.quick, options.steps)
        about |= {"lumos": contest.run.name, "windows": contest.run.train.batch}
        stage = contest.stage()
        settings = EngineSettings(steps=10**6, clip_norm=CLIP, precision="fp32")
        engine = Engine.start(stage.module, stage.trainable(), stage.loss, settings, CPU)
        ours, theirs = compare_engines(contest, engine, blocks)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        met = spread(ratios)[0] >= BARS["deepspeed"]
        row("deepspeed", "tokens_per_s", ours, "torch loop", ratios, met)
        streamed, held, waits = compare_loader(contest, engine, blocks)
        ratios = [a / b for a, b in zip(streamed, held, strict=True)]
        row(
            "ray_loader", "tokens_per_s", streamed, "batches in memory", ratios, spread(ratios)[0] >= BARS["ray_loader"]
        )
        row("data_wait", "share", waits, None, (), spread(waits)[0] < BARS["data_wait"])
        engine.close()
    if not options.quick:
        wasted = fit_waste(3)
        row("fit_waste", "s", wasted, None, (), spread(wasted)[0] <= BARS["fit_waste"])
    if missed:
        note(f"missed: {', '.join(f'{name} (bar {BARS[name]:g})' for name in missed)}")
    return 0 if options.quick else int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
