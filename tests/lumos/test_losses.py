"""Legend as in lum_ray/lumos/losses.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lum_ray.lumos import losses
from lum_ray.lumos.config import BehaviourInput, Inputs, LumosConfig
from lum_ray.lumos.losses import Amounts, Objective
from tests.lumos.batches import INPUTS, TINY, arrays, busy, tensors

TWO = Inputs(
    behaviours=(BehaviourInput("active", "binary"), BehaviourInput("spend", "continuous", 0.5, 0)), event_width=1
)


def two(active: list[float], spend: list[float]) -> dict[str, torch.Tensor]:
    """Targets of one window and one cut, `active` and `spend` a day."""
    return {
        "daily_BCFV": torch.tensor([active, spend]).T[None, None],
        "horizon_BCH": torch.zeros(1, 1, 0),
        "valid_BC": torch.ones(1, 1, dtype=torch.bool),
    }


def given(active: list[float], spend: list[float]) -> dict[str, torch.Tensor]:
    return {
        "daily_BCFVP": torch.tensor([active, spend]).T[None, None, ..., None],
        "horizon_BCHP": torch.zeros(1, 1, 0, 1),
    }


def test_it_is_equation_7_by_hand() -> None:
    objective = Objective(LumosConfig(), replace(TWO, uncertainties=(0.3, -0.7)))
    sums, counts = objective(given([1.0, -2.0, 0.5], [3.0, 9.0, 1.0]), two([1, 0, 1], [4, 0, 6]))
    cross_entropy = np.log1p(np.exp(-1.0)) + np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-0.5))
    error = (3.0 - 2.0) ** 2 + (1.0 - 3.0) ** 2  # 4 and 6 units of 0.5; the inactive day is masked
    assert counts.tolist() == [3, 2]
    expected = [np.exp(-0.3) / 2 * cross_entropy + 0.3 * 3, np.exp(0.7) / 2 * error - 0.7 * 2]
    np.testing.assert_allclose(sums.detach().numpy(), expected, rtol=1e-6)


def test_a_term_that_nothing_counts_for_adds_nothing_not_even_its_regulariser() -> None:
    objective = Objective(LumosConfig(), replace(TWO, uncertainties=(0.3, -0.7)))
    sums, counts = objective(given([1.0, -2.0], [3.0, 9.0]), two([0, 0], [0, 0]))
    assert counts.tolist() == [2, 0]
    assert sums[1] == 0
    sums.sum().backward()
    assert objective.log_variance is not None
    assert objective.log_variance.grad is not None
    assert objective.log_variance.grad[0] != 0
    assert objective.log_variance.grad[1] == 0


def test_unknown_targets_and_invalid_samples_give_neither_loss_nor_nan_gradients() -> None:
    objective = Objective(LumosConfig(), TWO)
    outputs = given([1.0, -2.0, 1.0], [3.0, 9.0, 1.0])
    outputs["daily_BCFVP"].requires_grad_()
    sums, counts = objective(outputs, two([1, np.nan, 1], [2, 2, np.nan]))
    assert counts.tolist() == [2, 1]
    sums.sum().backward()
    gradient = outputs["daily_BCFVP"].grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert (gradient[0, 0, 1] == 0).all()
    sums, counts = objective(outputs, two([1, 1, 1], [2, 2, 2]) | {"valid_BC": torch.zeros(1, 1, dtype=torch.bool)})
    assert counts.sum() == 0
    assert sums.abs().sum() == 0


@pytest.mark.parametrize("config", [TINY, busy(TINY)])
def test_counts_in_numpy_are_those_of_the_loss(config: LumosConfig) -> None:
    data = arrays(config, windows=5)
    data["valid_BC"][2] = False
    batch = tensors(data)
    objective = Objective(config, INPUTS)
    shape = batch["daily_BCFV"].shape
    outputs = {
        "daily_BCFVP": torch.randn(*shape, objective.outputs),
        "horizon_BCHP": torch.randn(*batch["horizon_BCH"].shape, objective.outputs),
    }
    counts = losses.counts(INPUTS, data["daily_BCFV"], data["horizon_BCH"], data["valid_BC"])
    assert counts.dtype == np.float64
    assert objective(outputs, batch)[1].tolist() == counts.tolist()
    assert counts.min() > 0
    assert counts[0] > counts[1]


def test_sums_add_up_over_micro_batches() -> None:
    objective = Objective(LumosConfig(), TWO)
    whole = objective(given([1.0, -2.0], [3.0, 9.0]), two([1, 1], [2, 4]))
    parts = [objective(given([a], [b]), two([1], [c])) for a, b, c in ((1.0, 3.0, 2), (-2.0, 9.0, 4))]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0])
    torch.testing.assert_close(whole[1], parts[0][1] + parts[1][1])


def test_starts_are_the_best_constants() -> None:
    rng = np.random.default_rng(0)
    active = (rng.random((400, 1, 4)) < 0.2).astype(np.float32)
    daily = np.stack([active, active * rng.integers(1, 9, active.shape)], axis=-1)
    data = (daily, np.zeros((400, 1, 0), np.float32), np.ones((400, 1), bool))
    start, uncertainty = losses.starts(LumosConfig(), TWO, *data)
    np.testing.assert_allclose(1 / (1 + np.exp(-start[0])), active.mean(), rtol=1e-4)
    np.testing.assert_allclose(start[1], 0.5 * daily[..., 1][active > 0].mean(), rtol=1e-4)
    objective = Objective(LumosConfig(), replace(TWO, uncertainties=uncertainty))
    outputs = {
        "daily_BCFVP": torch.tensor(start).expand(400, 1, 4, 2)[..., None],
        "horizon_BCHP": torch.zeros(400, 1, 0, 1),
    }
    batch = {
        "daily_BCFV": torch.from_numpy(daily),
        "horizon_BCH": torch.zeros(400, 1, 0),
        "valid_BC": torch.ones(400, 1) > 0,
    }
    objective(outputs, batch)[0].sum().backward()
    assert objective.log_variance is not None
    assert objective.log_variance.grad is not None
    assert objective.log_variance.grad.abs().max() < 0.1  # of sums over 1600 targets: at the optimum


def test_sum_weighting_is_the_plain_sum_of_losses() -> None:
    objective = Objective(LumosConfig(loss_weighting="sum"), TWO)
    sums, _ = objective(given([0.0], [3.0]), two([1], [4]))
    np.testing.assert_allclose(sums.numpy(), [np.log(2), 1.0], rtol=1e-6)
    assert not list(objective.parameters())


def test_geometric_weighting_divides_each_loss_by_that_of_its_best_constant() -> None:
    # half of the days are active: L0 = log 2; the amounts 2 and 4 (of 4 and 8 units) have the variance L0 = 1
    active, spend = [1.0, 0.0, 1.0, 0.0], [4.0, 0.0, 8.0, 0.0]
    data = two(active, spend)
    config = LumosConfig(loss_weighting="geometric")
    _, uncertainty = losses.starts(config, TWO, *(value.numpy() for value in data.values()))
    objective = Objective(config, replace(TWO, uncertainties=uncertainty))
    sums, counts = objective(given([0.0, 0.0, 0.0, 0.0], [3.0, 9.0, 3.0, 9.0]), data)
    np.testing.assert_allclose((sums / counts).numpy(), [1.0, 1.0], rtol=1e-6)  # the best constants themselves
    sums, _ = objective(given([1.0, 0.0, 1.0, 0.0], [3.0, 9.0, 6.0, 9.0]), data)
    cross_entropy = 2 * np.log1p(np.exp(-1.0)) + 2 * np.log(2)
    np.testing.assert_allclose(sums.numpy(), [cross_entropy / np.log(2), (1 + 4) / 1.0], rtol=1e-6)
    assert not list(objective.parameters())


def test_geometric_weighting_starts_in_the_direction_of_equation_7_and_of_the_product() -> None:
    data, uncertainties = two([1, 0, 1], [4, 0, 6]), (0.3, -0.7)
    gradients = {}
    for weighting in ("geometric", "uncertainty"):
        outputs = given([1.0, -2.0, 0.5], [3.0, 9.0, 1.0])
        outputs["daily_BCFVP"].requires_grad_()
        config = LumosConfig(loss_weighting=weighting)  # type: ignore[arg-type]
        sums, counts = Objective(config, replace(TWO, uncertainties=uncertainties))(outputs, data)
        (sums / counts).sum().backward()
        gradients[weighting] = outputs["daily_BCFVP"].grad
    torch.testing.assert_close(gradients["geometric"], gradients["uncertainty"])
    # where a term's loss is that of its constant, the weight is the product's: d log L = dL / L
    outputs = given([1.0, -2.0, 0.5], [3.0, 9.0, 1.0])
    outputs["daily_BCFVP"].requires_grad_()
    plain, counts = Objective(LumosConfig(loss_weighting="sum"), TWO)(outputs, data)
    means = plain / counts
    means.log().sum().backward()
    product, outputs["daily_BCFVP"].grad = outputs["daily_BCFVP"].grad, None
    at_losses = tuple((means.detach() / 2).log().tolist())
    sums, _ = Objective(LumosConfig(loss_weighting="geometric"), replace(TWO, uncertainties=at_losses))(outputs, data)
    (sums / counts).sum().backward()
    torch.testing.assert_close(outputs["daily_BCFVP"].grad, product)


def test_a_lognormal_head_has_the_weight_1_under_every_weighting_without_parameters() -> None:
    inputs = replace(TWO, uncertainties=(-1.0, -2.0))
    outputs = {"daily_BCFVP": torch.tensor([[[[[0.0, 0.0], [1.0, -0.5]]]]]), "horizon_BCHP": torch.zeros(1, 1, 0, 2)}
    found = {
        weighting: Objective(LumosConfig(continuous="lognormal", loss_weighting=weighting), inputs)(  # type: ignore[arg-type]
            outputs, two([1], [8])
        )[0]
        for weighting in ("sum", "geometric")
    }
    assert found["geometric"][1] == found["sum"][1]
    torch.testing.assert_close(found["geometric"][0], found["sum"][0] * np.exp(1.0) / 2)


def test_lognormal_loss_is_twice_the_negative_log_likelihood() -> None:
    objective = Objective(LumosConfig(continuous="lognormal"), TWO)
    outputs = {"daily_BCFVP": torch.tensor([[[[[0.0, 0.0], [1.0, -0.5]]]]]), "horizon_BCHP": torch.zeros(1, 1, 0, 2)}
    sums, _ = objective(outputs, two([1], [8]))
    log_value = torch.log(torch.tensor(8 * 0.5 + 0.5))
    nll = -torch.distributions.Normal(1.0, np.exp(-0.5)).log_prob(log_value)
    torch.testing.assert_close(sums[1], 2 * nll - np.log(2 * np.pi), rtol=1e-5, atol=1e-5)


def test_a_surprise_under_the_smallest_sigma_has_a_bounded_gradient() -> None:
    objective = Objective(LumosConfig(continuous="lognormal"), TWO)
    outputs = torch.tensor([[0.0, 0.0], [0.0, -9.0]])[None, None, None].requires_grad_()
    sums, _ = objective({"daily_BCFVP": outputs, "horizon_BCHP": torch.zeros(1, 1, 0, 2)}, two([1], [60]))
    (gradient,) = torch.autograd.grad(sums[1], outputs)
    # else a count that is nearly always 0 drowns every other task: sigma goes to its bound, and a 30 comes now and then
    assert gradient[0, 0, 0, 1, 0].abs() < 2 * np.exp(3.0) * (np.log(30.5) - np.log(0.5))


def test_the_learned_least_mape_forecast_by_hand_and_alone() -> None:
    inputs = Inputs(
        behaviours=(BehaviourInput("active", "binary"), BehaviourInput("spend", "continuous", 1.0, 0)), event_width=1
    )
    outputs = torch.tensor([[0.0, 0.0, 0.0], [1.0, np.log(0.5), 0.2]])[None, None, None].requires_grad_()
    batch = two([1.0], [4.0])
    sums, gradients = [], []
    for learned in (False, True):
        objective = Objective(LumosConfig(continuous="lognormal", learned_mape=learned), inputs)
        given = {"daily_BCFVP": outputs[..., : objective.outputs], "horizon_BCHP": torch.zeros(1, 1, 0, 3)}
        total, _ = objective(given, batch)
        sums.append(total[1].item())
        gradients.append(torch.autograd.grad(total[1], outputs)[0][0, 0, 0, 1])
    point = 1.0 - 0.25 + 0.2  # mu - sigma^2 and the correction, on the scale of log(value + 1)
    assert sums[1] - sums[0] == pytest.approx(abs(1 - np.exp(point) / 5), rel=1e-5)
    torch.testing.assert_close(gradients[1][:2], gradients[0][:2])  # neither mu nor sigma is moved
    assert gradients[1][2] < 0  # below the value: up
    days, _ = objective.read({"daily_BCFVP": outputs.detach(), "horizon_BCHP": torch.zeros(1, 1, 0, 3)})
    assert days["least_mape_given"][0, 0, 0, 1].item() == pytest.approx(np.exp(point) - 1, rel=1e-5)


def test_functionals_agree_with_a_large_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    sample = torch.exp(0.7 + 0.6 * torch.randn(400_000, generator=generator))
    amounts = Amounts(torch.tensor(0.7), torch.tensor(0.6), torch.tensor(0.0), torch.tensor(True))
    torch.testing.assert_close(amounts.mean(), sample.mean(), rtol=0.01, atol=0)
    torch.testing.assert_close(amounts.median(), sample.median(), rtol=0.01, atol=0)
    torch.testing.assert_close(amounts.quantile(0.9), sample[:100_000].quantile(0.9), rtol=0.02, atol=0)
    forecasts = torch.linspace(0.5, 4.0, 71)
    mape = torch.stack([((sample[:50_000] - f).abs() / sample[:50_000]).mean() for f in forecasts])
    assert abs(float(forecasts[mape.argmin()] - amounts.least_mape())) < 0.1
    mixed = sample * (torch.rand(len(sample), generator=generator) < 0.4)
    for q in (0.5, 0.7, 0.95):
        expected = mixed[:100_000].quantile(q)
        torch.testing.assert_close(amounts.hurdle_quantile(torch.tensor(0.4), q), expected, rtol=0.03, atol=1e-6)


@pytest.mark.parametrize("config", [TINY, busy(TINY), *(replace(TINY, loss_weighting=x) for x in ("sum", "geometric"))])
def test_reading_gives_a_whole_set_of_columns(config: LumosConfig) -> None:
    objective = Objective(config, INPUTS)
    torch.manual_seed(0)
    outputs = {
        "daily_BCFVP": torch.randn(3, 1, 4, 5, objective.outputs),
        "horizon_BCHP": torch.randn(3, 1, 2, objective.outputs),
    }
    days, over = objective.read(outputs)
    assert days["p"].shape == (3, 1, 4, 5)
    assert over["mean"].shape == (3, 1, 2)
    torch.testing.assert_close(days["mean"][..., 0], outputs["daily_BCFVP"][..., 0, 0].sigmoid())
    torch.testing.assert_close(days["p"][..., 1], days["p"][..., 0])  # the gate of spend is active
    torch.testing.assert_close(days["mean"][..., 1], days["p"][..., 0] * days["mean_given"][..., 1])
    assert days["median"][..., 0].isnan().all()
    if config.loss_weighting == "uncertainty":
        for columns in (days, over):
            ordered = (columns["low"] <= columns["median"]) & (columns["median"] <= columns["high"])
            assert (ordered | columns["low"].isnan()).all()
        assert not days["high"][..., 1:4].isnan().any()
    # five days are more than the four future days, so no chance of the sum's gate is known
    assert over["mean"][..., 1].isnan().all()
    assert not over["mean_given"][..., 1].isnan().any()


def test_the_interval_of_a_point_head_holds_the_share_it_says() -> None:
    inputs = replace(TWO, uncertainties=(0.0, float(np.log(4.0 / 2))))  # residual variance 4
    objective = Objective(LumosConfig(), inputs)
    days, _ = objective.read(given([30.0], [10.0]))
    value = 10 + 2 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    inside = ((value > days["low"][0, 0, 0, 1]) & (value < days["high"][0, 0, 0, 1])).float().mean()
    assert abs(float(inside) - 0.9) < 0.01
