"""Two gloo ranks in processes of their own: scenarios run one after the other, so that the start-up is paid once."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lum_ray.artifacts import UserError
from lum_ray.config import Train
from lum_ray.training.collectives import broadcast, gather_columns
from lum_ray.training.engine import Engine
from lum_ray.training.loop import Worker, train_loop
from lum_ray.training.settings import EngineSettings
from lum_ray.training.telemetry import read_metrics
from lum_ray.weights import load
from tests.training.toy import ToyLoader, ToyStage, split, windows

WORLD = 2
CPU = torch.device("cpu")


def steps(rank: int, folder: str, zero_stage: int, precision: str = "fp32", ema: float = 0.0) -> dict[str, Any]:
    """Eight steps; rank 0 has 5 windows of 16 in two micro-batches, rank 1 the other 11 in one and an empty one."""
    stage = ToyStage()
    settings = EngineSettings(8, 1e-2, 0.1, ema=ema, zero_stage=zero_stage, precision=precision)  # type: ignore[arg-type]
    engine = Engine.start(stage.module, stage.trainable(), stage.loss, settings, CPU, rank, WORLD)
    edges = [0, 2, 5] if rank == 0 else [5, 16, 16]
    outcomes = [engine.step(n, split(windows(n, 16, rare=False), edges)) for n in range(8)]
    loss = [float(engine.reduce(outcome.objective.clone())) for outcome in outcomes]
    with engine.evaluation() as module:
        # Unequal numbers of forward passes: none of them may be a collective.
        scores = [module.outputs(torch.ones(1, 6)).tolist() for _ in range(1 + 2 * rank)][-1]  # type: ignore[operator]
    weights = engine.weights()
    after = float(engine.reduce(engine.step(7, split(windows(8, 16, rare=False), edges)).objective.clone()))
    engine.close()
    norms = [float(outcome.gradient_norm) for outcome in outcomes]
    return {"loss": loss, "norm": norms, "weights": weights, "scores": scores, "after": after}


def resume(rank: int, folder: str, zero_stage: int) -> dict[str, Any]:
    """A run of 12 steps in one go, and the same with an interruption after 8, under `folder`."""
    lines = []
    for name, parts in (("whole", (12,)), ("parts", (8, 12))):
        place = f"{folder}/{name}-{zero_stage}"
        for until in parts:
            settings = Train(steps=12, checkpoint_every=4, ema=0.9, precision="fp32", zero_stage=zero_stage)  # type: ignore[arg-type]
            loader = ToyLoader(rank=rank, world=WORLD)
            if until < 12:
                loader = Interrupted(rank=rank, world=WORLD)
            try:
                train_loop(ToyStage(0.2), loader, None, settings, place, Worker(rank, WORLD), log_every=3)
            except ConnectionError:
                dist.barrier()
        if rank == 0:
            lines.append((read_metrics(place), load(place).tensors))
    return {"runs": lines}


@dataclass
class Interrupted(ToyLoader):
    """Fails before the given step, on all ranks."""

    fails_at: int = 9

    def seek(self, step: int) -> Any:
        for item in super().seek(step):
            if item.index == self.fails_at:
                raise ConnectionError("the object store went away")
            yield item


ELASTIC_STEPS = 30


def until(world: int, rank: int, place: str, zero_stage: int, step: int) -> None:
    """The run of 30 steps at `place`, in `world` ranks, up to the given step; it is broken off there."""
    settings = Train(steps=ELASTIC_STEPS, checkpoint_every=5, ema=0.9, precision="fp32", zero_stage=zero_stage)  # type: ignore[arg-type]
    loader = Interrupted(rank=rank, world=world, fails_at=step)
    try:
        train_loop(ToyStage(), loader, None, settings, place, Worker(rank, world), log_every=1)
    except ConnectionError:
        assert step < ELASTIC_STEPS


def leg(rank: int, folder: str, place: str, zero_stage: int, step: int) -> dict[str, Any]:
    until(WORLD, rank, place, zero_stage, step)
    dist.barrier()
    return {}


def collectives(rank: int, folder: str) -> dict[str, Any]:
    return {"gathered": gather_columns({"rank": rank}), "broadcast": broadcast(f"from {rank}")}


def diverge(rank: int, folder: str) -> dict[str, Any]:
    """A NaN in one rank's windows stops all ranks."""
    settings = Train(steps=6, keep_best="x", precision="fp32")
    stage = ToyStage(nan_at=3 if rank == 1 else None)
    try:
        train_loop(stage, ToyLoader(rank=rank, world=WORLD), None, settings, f"{folder}/nan", Worker(rank, WORLD))
    except UserError as error:
        return {"error": str(error)}
    return {"error": ""}


def validate(rank: int, folder: str) -> dict[str, Any]:
    """Rank 0's metrics count, and the reports are the same everywhere."""
    reports = []
    settings = Train(steps=4, validate_every=2, keep_best="eval/loss", zero_stage=2, precision="fp32")
    worker = Worker(rank, WORLD, report=lambda metrics: reports.append((metrics["step"], metrics["eval/loss"])))
    loader = ToyLoader(rank=rank, world=WORLD)
    result = train_loop(ToyStage(), loader, lambda module: {"eval/loss": rank}, settings, f"{folder}/val", worker)
    return {"reports": reports, "result": result}


Scenarios = dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]]
SCENARIOS: Scenarios = {
    **{f"stage-{stage}": (steps, (stage,)) for stage in (0, 2, 3)},
    **{f"ema-{stage}": (steps, (stage, "fp32", 0.9)) for stage in (0, 3)},
    "bf16-0": (steps, (0, "bf16")),
    "bf16-2": (steps, (2, "bf16")),
    **{f"resume-{stage}": (resume, (stage,)) for stage in (2, 3)},
    "collectives": (collectives, ()),
    "diverge": (diverge, ()),
    "validate": (validate, ()),
}


def _main(rank: int, folder: str, scenarios: Scenarios) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results: dict[str, Any] = {}
    try:
        for name, (function, arguments) in scenarios.items():
            results[name] = function(rank, folder, *arguments)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        Path(folder, f"rank-{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def run(folder: Path, scenarios: Scenarios | None = None) -> list[dict[str, Any]]:
    """Results by scenario, one dictionary a rank."""
    Path(folder, "store").unlink(missing_ok=True)
    mp.spawn(_main, args=(str(folder), scenarios or SCENARIOS), nprocs=WORLD)  # type: ignore[no-untyped-call]
    return [pickle.loads((folder / f"rank-{rank}.pickle").read_bytes()) for rank in range(WORLD)]
