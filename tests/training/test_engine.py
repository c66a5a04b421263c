"""The step is that of the global objective: whatever the ZeRO stage, the world size and the cut into micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lum_ray.artifacts import UserError
from lum_ray.stage import to_device
from lum_ray.training.collectives import broadcast, gather_columns
from lum_ray.training.engine import Engine
from lum_ray.training.saved import Saved
from lum_ray.training.settings import EngineSettings, learning_rate, uses_bf16
from lum_ray.training.telemetry import read_metrics
from lum_ray.weights import load
from tests.training import ranks
from tests.training.toy import ToyStage, split, windows, with_counts

CPU = torch.device("cpu")
SETTINGS = EngineSettings(8, 1e-2, 0.1, precision="fp32")


def plain(settings: EngineSettings, steps: int = 8, rare: bool = False) -> tuple[list[float], list[float], ToyStage]:
    """The same steps in plain torch, the whole batch at once."""
    stage = ToyStage()
    groups = [{**group, "weight_decay": group["weight_decay"] * settings.weight_decay} for group in stage.trainable()]
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    losses, norms = [], []
    for step in range(steps):
        batch = to_device(with_counts(windows(step, 16, rare)), CPU)
        sums_K, counts_K = stage.loss(batch)
        loss = torch.stack([sums_K[k] / counts_K[k] for k in range(3) if counts_K[k] > 0]).sum()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()  # type: ignore[no-untyped-call]
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, stage


def assert_same_weights(found: dict[str, torch.Tensor], expected: ToyStage, tolerance: float = 1e-6) -> None:
    state = expected.module.state_dict()
    assert set(found) == set(state) - {"frozen"}
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert (tensor - state[name]).norm() <= tolerance * state[name].norm(), name


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.run(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("edges", [[0, 16], [0, 3, 3, 16]], ids=["whole", "unequal"])
def test_a_step_equals_the_plain_loop(zero_stage: Any, edges: list[int]) -> None:
    losses, norms, expected = plain(SETTINGS)
    stage = ToyStage()
    settings = EngineSettings(8, 1e-2, 0.1, zero_stage=zero_stage, precision="fp32")
    engine = Engine.start(stage.module, stage.trainable(), stage.loss, settings, CPU)
    outcomes = [engine.step(step, split(windows(step, 16, rare=False), edges)) for step in range(8)]
    assert [float(outcome.objective) for outcome in outcomes] == pytest.approx(losses, rel=1e-6)
    assert [float(outcome.gradient_norm) for outcome in outcomes] == pytest.approx(norms, rel=1e-6)
    assert max(norms) > settings.clip_norm  # else clipping was not compared
    assert_same_weights(engine.weights(), expected)
    engine.close()


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_equal_the_plain_loop(two_ranks: list[dict[str, Any]], zero_stage: int) -> None:
    losses, norms, expected = plain(SETTINGS)
    for rank in two_ranks:
        assert rank[f"stage-{zero_stage}"]["loss"] == pytest.approx(losses, rel=1e-6)
        assert rank[f"stage-{zero_stage}"]["norm"] == pytest.approx(norms, rel=1e-6)
    assert_same_weights(two_ranks[0][f"stage-{zero_stage}"]["weights"], expected)
    assert two_ranks[1][f"stage-{zero_stage}"]["weights"] == {}


@pytest.mark.parametrize("name", ["bf16-0", "bf16-2"])
def test_bf16_on_two_ranks_is_within_two_percent_of_fp32(two_ranks: list[dict[str, Any]], name: str) -> None:
    losses = two_ranks[0]["stage-0"]["loss"]
    found = two_ranks[0][name]["loss"]
    assert found == pytest.approx(losses, rel=0.02)
    assert found != losses  # bf16 was in force
    assert all(tensor.dtype == torch.float32 for tensor in two_ranks[0][name]["weights"].values())


def test_evaluation_uses_the_average_and_leaves_no_trace(two_ranks: list[dict[str, Any]]) -> None:
    off, on, parted = (two_ranks[0][name] for name in ("stage-0", "ema-0", "ema-3"))
    assert on["scores"] != off["scores"]
    assert torch.tensor(on["scores"]).allclose(torch.tensor(parted["scores"]), atol=1e-6)
    assert on["after"] == off["after"]
    assert parted["after"] == pytest.approx(off["after"], rel=1e-6)
    for name, tensor in on["weights"].items():
        assert torch.allclose(tensor, parted["weights"][name], atol=1e-6)
    assert torch.tensor(two_ranks[1]["ema-3"]["scores"]).equal(torch.tensor(parted["scores"]))


def test_average_is_the_recursion_over_the_steps() -> None:
    settings = EngineSettings(8, 1e-2, 0.1, ema=0.5, precision="fp32")
    stage = ToyStage()
    engine = Engine.start(stage.module, stage.trainable(), stage.loss, settings, CPU)
    expected = stage.module.state_dict()["first.weight"].clone()
    for step in range(8):
        engine.step(step, split(windows(step, 16), [0, 16]))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * stage.module.state_dict()["first.weight"]
    assert torch.allclose(engine.weights()["first.weight"], expected, atol=1e-6)
    assert not torch.allclose(stage.module.state_dict()["first.weight"], expected, atol=1e-6)
    engine.close()


def test_a_term_that_counts_nothing_has_no_part_in_the_step() -> None:
    """Its head gets a zero gradient (no decay on its bias): a step leaves it where it was."""
    stage = ToyStage()
    engine = Engine.start(stage.module, stage.trainable(), stage.loss, SETTINGS, CPU)
    before = stage.module.state_dict()["second.bias"].clone()
    outcome = engine.step(0, split(windows(0, 16, rare=False), [0, 8, 16]))
    after = stage.module.state_dict()["second.bias"]
    assert after[2] == before[2]
    assert after[0] != before[0]
    assert outcome.counts_K[2] == 0
    assert torch.isfinite(outcome.objective)
    engine.close()


def test_frozen_parameters_stay() -> None:
    stage = ToyStage()
    engine = Engine.start(stage.module, stage.trainable(), stage.loss, SETTINGS, CPU)
    engine.step(0, split(windows(0, 16), [0, 16]))
    assert torch.equal(stage.module.state_dict()["frozen"], torch.ones(6))
    engine.close()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_saved_and_restored_it_continues_exactly(zero_stage: Any) -> None:
    results = []
    for interrupted in (False, True):
        settings = EngineSettings(8, 1e-2, 0.1, ema=0.9, zero_stage=zero_stage, precision="fp32")
        stage = ToyStage()
        engine = Engine.start(stage.module, stage.trainable(), stage.loss, settings, CPU)
        for step in range(8):
            if interrupted and step == 5:
                saved = Saved(5, engine.weights(), engine.state())
                engine.close()
                stage = ToyStage(seed=1)
                engine = Engine.start(stage.module, stage.trainable(), stage.loss, settings, CPU, saved=saved)
            engine.step(step, split(windows(step, 16), [0, 16]))
        results.append({**engine.weights(), **engine.state()})
        engine.close()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_state_of_another_model_is_refused() -> None:
    stage = ToyStage()
    engine = Engine.start(stage.module, stage.trainable(), stage.loss, SETTINGS, CPU)
    engine.step(0, split(windows(0, 16), [0, 16]))
    state = engine.state()
    del state["exp_avg/second.bias"]
    saved = Saved(1, engine.weights(), state)
    engine.close()
    with pytest.raises(UserError, match=r"other parameters, or of another train.ema: exp_avg/second.bias"):
        Engine.start(stage.module, stage.trainable(), stage.loss, SETTINGS, CPU, saved=saved)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    settings = EngineSettings(steps=100, learning_rate=2.0, warmup_share=0.1)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == 2.0 == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.01
    assert learning_rate(settings, 100) == pytest.approx(0.0, abs=1e-12)


def test_precision() -> None:
    assert uses_bf16("bf16", CPU)
    assert not uses_bf16("fp32", CPU)
    assert uses_bf16("auto", CPU) == torch.cpu._is_amx_tile_supported()


def test_collectives(two_ranks: list[dict[str, Any]]) -> None:
    assert two_ranks[0]["collectives"] == {"gathered": [{"rank": 0}, {"rank": 1}], "broadcast": "from 0"}
    assert two_ranks[1]["collectives"] == {"gathered": None, "broadcast": "from 0"}
    assert gather_columns({"a": 1}) == [{"a": 1}]
    assert broadcast(3) == 3


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_resume_exactly(two_ranks: list[dict[str, Any]], zero_stage: int) -> None:
    (whole, weights), (parts, resumed) = two_ranks[0][f"resume-{zero_stage}"]["runs"]
    assert [line["train/loss"] for line in whole] == [line["train/loss"] for line in parts]
    assert len(whole) == 4
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_two_workers_then_one_then_two_follow_the_uninterrupted_run(tmp_path: Path) -> None:
    """Another ZeRO stage after each change too."""
    changes = {"0-1-2": (0, 1, 2), "2-0-3": (2, 0, 3), "3-2-0": (3, 2, 0), "1-3-1": (1, 3, 1)}
    ranks.until(1, 0, str(tmp_path / "whole"), 0, ranks.ELASTIC_STEPS)
    expected = [line["train/loss"] for line in read_metrics(str(tmp_path / "whole"))]
    assert len(expected) == ranks.ELASTIC_STEPS
    for part, until in enumerate((10, 20, ranks.ELASTIC_STEPS)):
        legs = {name: (str(tmp_path / name), stages[part], until) for name, stages in changes.items()}
        if part == 1:
            for leg in legs.values():
                ranks.until(1, 0, *leg)
        else:
            ranks.run(tmp_path, {name: (ranks.leg, leg) for name, leg in legs.items()})
    for name in changes:
        found = [line["train/loss"] for line in read_metrics(str(tmp_path / name))]
        assert found == pytest.approx(expected, rel=1e-5), name
        whole, parts = load(str(tmp_path / "whole" / "last")).tensors, load(str(tmp_path / name / "last")).tensors
        assert all(torch.allclose(whole[key], parts[key], rtol=1e-5, atol=1e-6) for key in whole), name


def test_a_nan_on_one_rank_stops_all(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert rank["diverge"]["error"].startswith("step 4: the loss is nan")
        assert "not finite: logistic" in rank["diverge"]["error"]
        assert "user-3-8" in rank["diverge"]["error"]


def test_validation_is_that_of_rank_zero(two_ranks: list[dict[str, Any]]) -> None:
    assert two_ranks[0]["validate"] == two_ranks[1]["validate"]
    assert two_ranks[0]["validate"]["reports"] == [(2, 0.0), (4, 0.0)]


def test_ranks_without_a_process_group_are_refused() -> None:
    stage = ToyStage()
    with pytest.raises(UserError, match="2 ranks need a process group"):
        Engine.start(stage.module, stage.trainable(), stage.loss, SETTINGS, CPU, rank=0, world=2)
