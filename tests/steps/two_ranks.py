"""Both models' own training loops on two gloo ranks, in processes of their own; started once for all settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lum_ray.training.loop import Worker

WORLD = 2
Leg = tuple[str, Mapping[str, Any], tuple[str, ...], str, str | None]
"""(model, plain run, URIs of its artifacts, where the checkpoint goes, Phase I's checkpoint)."""


def train(leg: Leg, worker: Worker) -> None:
    model, plain, uris, place, aligned = leg
    if model == "lumos":
        from lum_ray.steps.train import _loop as lumos_loop

        lumos_loop(plain, uris, place, worker)  # type: ignore[arg-type]
    else:
        from lum_ray.steps.gts_train import _loop as gts_loop

        gts_loop(plain, uris, place, aligned, worker)


def _main(rank: int, folder: str, legs: Sequence[Leg]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    for leg in legs:
        train(leg, Worker(rank, WORLD))
    dist.barrier()
    dist.destroy_process_group()


def run(folder: str, legs: Sequence[Leg]) -> None:
    mp.spawn(_main, args=(folder, legs), nprocs=WORLD)  # type: ignore[no-untyped-call]
