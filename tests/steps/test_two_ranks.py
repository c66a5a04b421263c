"""Two ranks make the steps of one rank with the double batch: both models, every ZeRO stage; and BF16 runs on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lum_ray import catalog, config
from lum_ray.config import Run
from lum_ray.steps.gts_prepare import prepare_gts
from lum_ray.steps.gts_train import align_uri
from lum_ray.steps.prepare import prepare
from lum_ray.training.loop import Worker
from lum_ray.training.telemetry import read_metrics
from lum_ray.weights import load
from tests.steps import two_ranks

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]  # tests/training has the same on a small model

SETTINGS = [
    "train.steps=1", "train.batch=32", "train.micro_batch=8", "train.ema=0.0", "train.clip_norm=0.0",
    "train.validate_every=1", "train.validate_users=24",
]  # fmt: skip


def leg_of(run: Run, place: Path, *settings: str) -> two_ranks.Leg:
    same = catalog.read_run(config.override(config.dump(run), [*SETTINGS, *settings]))
    if run.model == "lumos":
        found = prepare(run)
        uris: tuple[str, ...] = (found.timelines.uri, found.calendar.uri, found.fitted.uri)
        return "lumos", config.dump(same), uris, str(place), None
    made = prepare_gts(run)
    uris = tuple(item.uri for item in (made.sequences, made.items, made.tree, made.fitted))
    return "gts", config.dump(same), uris, str(place), align_uri(run, made)


@pytest.fixture(scope="module")
def trained(tiny: Run, tiny_gts: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with <model>-one-<stage 0>, <model>-two-<stage> and <model>-bf16-two-<stage>."""
    folder = tmp_path_factory.mktemp("ranks")
    legs = []
    for model, run in (("lumos", tiny), ("gts", tiny_gts)):
        two_ranks.train(leg_of(run, folder / f"{model}-one", "train.precision=fp32"), Worker())
        for stage in range(4):
            settings = ["train.precision=fp32", f"train.zero_stage={stage}"]
            legs.append(leg_of(run, folder / f"{model}-two-{stage}", *settings))
        legs.append(leg_of(run, folder / f"{model}-bf16", "train.precision=bf16", "train.zero_stage=1"))
    two_ranks.run(str(folder), legs)
    return folder


def figures(place: Path) -> list[dict[str, Any]]:
    return read_metrics(str(place))


def moments(place: Path) -> dict[str, torch.Tensor]:
    (path,) = place.glob("last/*/engine/state.safetensors")
    return {name: tensor for name, tensor in load_file(path).items() if name.startswith("exp_avg/")}


@pytest.mark.parametrize("model", ["lumos", "gts"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_with_the_double_batch(trained: Path, model: str, stage: int) -> None:
    one, two = figures(trained / f"{model}-one"), figures(trained / f"{model}-two-{stage}")
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1]
    for name in ("train/loss", "train/grad_norm"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-5), name
    # AdamW's first moment after one step is a tenth of the gradient
    alone, apart = (moments(trained / name) for name in (f"{model}-one", f"{model}-two-{stage}"))
    assert alone.keys() == apart.keys()
    whole = sum(float(tensor.square().sum()) for tensor in alone.values()) ** 0.5
    assert whole > 0
    for name, tensor in alone.items():
        assert float((tensor - apart[name]).norm()) <= 1e-5 * float(tensor.norm()) + 1e-7 * whole, name


@pytest.mark.parametrize("model", ["lumos", "gts"])
def test_bf16_on_two_ranks_is_near_fp32(trained: Path, model: str) -> None:
    exact, rough = figures(trained / f"{model}-one")[0], figures(trained / f"{model}-bf16")[0]
    assert rough["train/loss"] == pytest.approx(exact["train/loss"], rel=0.05)
    assert rough["train/loss"] != exact["train/loss"]
    assert all(
        tensor.dtype != torch.bfloat16 for tensor in load(str(trained / f"{model}-bf16" / "last")).tensors.values()
    )
