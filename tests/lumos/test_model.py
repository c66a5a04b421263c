"""Legend as in lum_ray/lumos/model.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lum_ray.lumos.config import BehaviourInput, CategoryInput, Inputs, LumosConfig, NumberInput
from lum_ray.lumos.model import Lumos
from tests.lumos.batches import INPUTS, TINY, arrays, busy, take, tensors

CONFIGS = {
    "paper": TINY,
    "dense": busy(TINY),
    "masked pads": replace(TINY, pad="masked"),
    "dense, unread pads, lags": replace(busy(TINY), pad="unread", positions="lags", raw_values=True, day_match=True),
    "dense, logs, recent days": replace(
        busy(TINY),
        positions="lags",
        raw_values=True,
        raw_logs=True,
        recent_days=5,
        learned_mape=True,
        encoder_heads=1,
        calendar_days=4,
    ),
    "dense, masked pads, rope": replace(busy(TINY), pad="masked", positions="rope"),
    "lags without causality": replace(TINY, lag_logits=True),
    "causality without lags": replace(TINY, causal=True, cuts_per_window=2, cut_stride_days=3),
    "sinusoidal, self-attention": replace(TINY, positions="sinusoidal", decoder_self_attention=True),
    "time2vec, two decoder layers": replace(TINY, positions="time2vec", decoder_layers=2),
    "no static, zero pads, no events": replace(TINY, static=False, pad="zero", past_events=False, future_events=False),
}


def build(config: LumosConfig, inputs: Inputs = INPUTS) -> Lumos:
    torch.manual_seed(0)
    model = Lumos(config, inputs)
    with torch.no_grad():  # positions start at 0, where they could not betray a mistake
        for name, parameter in model.named_parameters():
            if name.startswith(("position_", "horizon_")):
                parameter.normal_(0, 0.3)
    return model


def objective(model: Lumos, batch: dict[str, torch.Tensor], plain: bool = False) -> torch.Tensor:
    sums_K, counts_K = model.loss(batch, plain)
    return (sums_K / counts_K.clamp(min=1)).sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_fast_equals_plain_in_outputs_and_gradients(name: str) -> None:
    model, batch = build(CONFIGS[name]), tensors(arrays(CONFIGS[name]))
    outputs, plain = model(batch), model(batch, plain=True)
    for key in outputs:
        torch.testing.assert_close(outputs[key], plain[key], atol=1e-5, rtol=1e-5)
    gradients = []
    for form in (False, True):
        model.zero_grad()
        objective(model, batch, form).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][parameter], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = build(CONFIGS[name])
    objective(model, tensors(arrays(CONFIGS[name], windows=6))).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_papers_model_has_the_papers_size() -> None:
    active = BehaviourInput("b0", "binary")
    numbers = tuple(BehaviourInput(f"b{i}", "continuous", 0.01, 0) for i in range(1, 13))
    inputs = Inputs(
        (active, *numbers),
        event_width=29,
        event_types=tuple("abcdefghij"),
        event_scales=(1.0,) * 10,
        numbers=(NumberInput("age", 30.0, 10.0),),
        categories=(CategoryInput("country", ("in", "de")),),
    )
    for swiglu_width, millions in ((512, 20.8), (1365, 29.6), (2048, 37.0)):
        size = sum(p.numel() for p in Lumos(LumosConfig(swiglu_width=swiglu_width), inputs).parameters())
        assert abs(size / 1e6 - millions) < 0.03 * millions


def test_positions_start_at_zero() -> None:
    model = Lumos(TINY, INPUTS)
    assert model.position_TD is not None
    assert model.position_FD is not None
    assert model.position_TD.abs().sum() + model.position_FD.abs().sum() == 0


@torch.no_grad()
def test_a_changed_future_event_changes_its_own_day_and_no_other() -> None:
    model, data = build(replace(TINY, decoder_layers=2)), arrays(TINY)
    before = model(tensors(data))
    rows = np.concatenate([data["event_rows_ES"], 5 * np.ones((1, 13), np.float32)])
    for day in range(TINY.future_days):
        future = data["future_event_BCX"].copy()
        future[:, :, day] = len(rows) - 1
        after = model(tensors({**data, "event_rows_ES": rows, "future_event_BCX": future}))
        moved = (after["daily_BCFVP"] - before["daily_BCFVP"]).abs().amax(dim=(0, 1, 3, 4))
        assert moved[day] > 1e-3
        others = [d for d in range(TINY.future_days) if d != day]
        assert moved[others].max() < 1e-6
        assert (after["horizon_BCHP"] - before["horizon_BCHP"]).abs().max() > 1e-4


@torch.no_grad()
def test_self_attention_among_future_days_is_seen_by_that_test() -> None:
    model, data = build(replace(TINY, decoder_self_attention=True)), arrays(TINY)
    future = data["future_event_BCX"].copy()
    future[:, :, 0] = 0
    moved = model(tensors({**data, "future_event_BCX": future}))["daily_BCFVP"] - model(tensors(data))["daily_BCFVP"]
    assert moved[:, :, 1:].abs().max() > 1e-4


@torch.no_grad()
def test_permuted_future_days_permute_the_outputs() -> None:
    model, data = build(TINY), arrays(TINY)
    assert model.position_FD is not None
    before, order = model(tensors(data))["daily_BCFVP"], [2, 0, 3, 1]
    positions = model.position_FD.clone()
    for shared in (positions[order], torch.zeros_like(positions)):  # moved along with the days, or none
        future = data["future_event_BCX"].copy()
        future[:, :, : TINY.future_days] = future[:, :, order]
        if not shared.any():
            model.position_FD.zero_()
            before = model(tensors(data))["daily_BCFVP"]
        else:
            model.position_FD.copy_(shared)
        after = model(tensors({**data, "future_event_BCX": future}))["daily_BCFVP"]
        torch.testing.assert_close(after, before[:, :, order], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_other_windows_of_the_batch_do_not_change_a_prediction(name: str) -> None:
    config = CONFIGS[name]
    model, data = build(config), arrays(config, windows=5)
    whole = model(tensors(data))
    for windows in ([1], [4, 2], [3, 0, 1]):
        part = model(tensors(take(data, windows, config)))
        for key in whole:
            torch.testing.assert_close(part[key], whole[key][windows], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_zero_day_is_not_a_pad() -> None:
    data = arrays(TINY)
    data["values_AU"], data["slot_A"] = data["values_AU"][:0], data["slot_A"][:0]
    padded = {**data, "pads_B": data["pads_B"] + 2}
    for pad, differs in (("learned", True), ("masked", True), ("zero", False)):
        model = build(replace(TINY, pad=pad))  # type: ignore[arg-type]
        moved = (model(tensors(data))["daily_BCFVP"] - model(tensors(padded))["daily_BCFVP"]).abs().max()
        assert (moved > 1e-4) == differs


@torch.no_grad()
def test_masked_pads_do_not_matter() -> None:
    data = arrays(TINY)
    model = build(replace(TINY, pad="masked"))
    before = model(tensors(data))["daily_BCFVP"]
    history = data["history_event_BT"].copy()
    history[0, : data["pads_B"][0]] = 11
    torch.testing.assert_close(model(tensors({**data, "history_event_BT": history}))["daily_BCFVP"], before)


@torch.no_grad()
def test_activity_on_a_pad_day_is_ignored_in_both_forms() -> None:
    data = arrays(TINY)
    data["pads_B"] = np.full_like(data["pads_B"], 9)
    model = build(TINY)
    fast, plain = model(tensors(data))["daily_BCFVP"], model(tensors(data), plain=True)["daily_BCFVP"]
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    kept = data["slot_A"] % TINY.history_days >= 9
    without = {**data, "values_AU": data["values_AU"][kept], "slot_A": data["slot_A"][kept]}
    torch.testing.assert_close(model(tensors(without))["daily_BCFVP"], fast, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "causality without lags",
        "dense, masked pads, rope",
        "dense, unread pads, lags",
        "dense, logs, recent days",
    ],
)
@torch.no_grad()
def test_cuts_of_one_pass_equal_passes_of_one_cut(name: str) -> None:
    config = CONFIGS[name]
    model, data = build(config), arrays(config)
    dense = model(tensors(data))
    for cut in range(config.cuts_per_window):
        one = {
            **data,
            "visible_BC": data["visible_BC"][:, cut : cut + 1],
            "future_event_BCX": data["future_event_BCX"][:, cut : cut + 1],
        }
        # nothing after the cut may matter: blank it
        after = data["slot_A"] % config.history_days >= data["visible_BC"][0, cut]
        history = np.where(np.arange(config.history_days) < one["visible_BC"], data["history_event_BT"], 0)
        one |= {"values_AU": data["values_AU"][~after], "slot_A": data["slot_A"][~after], "history_event_BT": history}
        single = model(tensors(one))
        for key in dense:
            torch.testing.assert_close(single[key][:, 0], dense[key][:, cut], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_scenarios_of_an_encoded_history_equal_passes_of_their_own() -> None:
    model, data = build(TINY), arrays(TINY)
    batch = tensors(data)
    memory = model.encode(batch)
    futures = torch.cat([batch["future_event_BCX"], batch["future_event_BCX"] - 4], dim=1)
    both = model.decode(memory, batch["event_rows_ES"], futures, batch["visible_BC"].expand(-1, 2))
    for scenario in range(2):
        alone = model({**batch, "future_event_BCX": futures[:, scenario : scenario + 1]})
        for key in both:
            torch.testing.assert_close(both[key][:, scenario], alone[key][:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_event_switches_blank_events_and_leave_the_rhythm() -> None:
    for past, future in ((False, True), (True, False)):
        model, data = build(replace(TINY, past_events=past, future_events=future)), arrays(TINY)
        before = model(tensors(data))["daily_BCFVP"]
        used = data["history_event_BT"] if not past else data["future_event_BCX"]
        for part, moves in ((slice(9, None), False), (slice(0, 9), True)):
            rows = data["event_rows_ES"].copy()
            rows[np.unique(used), part] += 1
            assert (
                (model(tensors({**data, "event_rows_ES": rows}))["daily_BCFVP"] - before).abs().max() > 1e-5
            ) == moves


@torch.no_grad()
def test_with_the_calendar_day_by_day_a_horizon_knows_on_which_day_an_event_is() -> None:
    for days, knows in ((0, False), (4, True)):
        config = replace(CONFIGS["dense, logs, recent days"], calendar_days=days)
        model, data = build(config), arrays(config)
        future = data["future_event_BCX"].copy()
        future[:, :, [0, 4]] = future[:, :, [4, 0]]  # both horizons hold both days
        moved = (
            model(tensors({**data, "future_event_BCX": future}))["horizon_BCHP"] - model(tensors(data))["horizon_BCHP"]
        )
        assert (moved.abs().max() > 1e-4) == knows


@torch.no_grad()
def test_the_calendar_day_by_day_starts_so_many_days_before_the_cut() -> None:
    config = replace(CONFIGS["dense, logs, recent days"], calendar_days=2, cuts_per_window=1, past_events=True)
    model, data = build(config), arrays(config)
    model.tokenizer.event.hidden[0].weight.zero_()  # the tokens of the past know their events too
    before = model(tensors(data))["daily_BCFVP"]
    for lag, moves in ((1, True), (2, True), (3, False)):
        rows = data["event_rows_ES"].copy()
        rows[data["history_event_BT"][0, -lag], INPUTS.rhythm_width :] += 1
        after = model(tensors({**data, "event_rows_ES": rows}))["daily_BCFVP"]
        assert ((after - before).abs().max() > 1e-5) == moves


@torch.no_grad()
def test_missing_numbers_and_unknown_categories_have_vectors_of_their_own() -> None:
    model, data = build(TINY), arrays(TINY)
    data["numbers_BN"][:] = 30.0  # the mean: standardised to 0, as a missing one is
    before = model(tensors(data))["daily_BCFVP"]
    assert (
        model(tensors({**data, "numbers_BN": data["numbers_BN"] * np.nan}))["daily_BCFVP"] - before
    ).abs().max() > 1e-4
    data["categories_BG"][:] = 1
    before = model(tensors(data))["daily_BCFVP"]
    assert (
        model(tensors({**data, "categories_BG": data["categories_BG"] * 0}))["daily_BCFVP"] - before
    ).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["paper", "dense"])
def test_one_batch_can_be_learned_by_heart(name: str) -> None:
    config = replace(CONFIGS[name], width=32)
    model, batch = build(config), tensors(arrays(config, windows=4))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        optimiser.zero_grad()
        loss = objective(model, batch)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 4
    days, _ = model.objective.read(model(batch))
    known = batch["valid_BC"][:, :, None] & ~batch["daily_BCFV"][..., 0].isnan()
    right = (days["p"][..., 0] > 0.5) == (batch["daily_BCFV"][..., 0] > 0)
    assert right[known].float().mean() > 0.95


def test_attention_rows_add_up_to_one_and_hide_what_a_cut_cannot_see() -> None:
    config = CONFIGS["dense"]
    weights = build(config).attention(tensors(arrays(config)))
    queries = config.future_days + len(INPUTS.horizons)
    assert weights.shape == (3, config.heads, 3 * queries, config.history_days)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert weights[:, :, :queries, 8:].abs().max() == 0  # the first of three cuts lies 4 days before the window's end


def test_lags_start_as_decays() -> None:
    model = Lumos(CONFIGS["dense"], INPUTS)
    weights = model.attention(tensors(arrays(CONFIGS["dense"])))[:, 0, -1]  # the shortest decay
    assert weights[:, -1].min() > 0.5
    assert model.lag_MQT is not None
    torch.testing.assert_close(model.lag_MQT[0, 0, :3], torch.tensor([-1.0, -2.0, -3.0]))


@torch.no_grad()
def test_embeddings_depend_on_the_history_alone() -> None:
    model, data = build(TINY), arrays(TINY)
    before = model.embed(tensors(data))
    assert before.shape == (3, TINY.width)
    torch.testing.assert_close(model.embed(tensors({**data, "future_event_BCX": data["future_event_BCX"] * 0})), before)
    data["values_AU"] = data["values_AU"] * 3
    assert (model.embed(tensors(data)) - before).abs().max() > 1e-4


def test_an_empty_batch_keeps_a_gradient_path() -> None:
    data = arrays(TINY)
    model = build(TINY)
    sums_K, counts_K = model.loss(tensors(take(data, [], TINY)))
    assert counts_K.sum() == 0
    assert sums_K.abs().sum() == 0
    sums_K.sum().backward()
    assert model.tokenizer.project_out.weight.grad is not None


def test_autocast_keeps_the_loss_in_float32_and_near() -> None:
    model, batch = build(TINY), tensors(arrays(TINY))
    exact = objective(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = objective(model, batch)
    assert rough.dtype in (torch.float32, torch.float64)
    assert abs((rough - exact).item()) < 0.02 * abs(exact.item())


def test_weights_in_bfloat16_leave_the_scales_alone() -> None:
    model = build(TINY).to(torch.bfloat16)
    assert model.tokenizer.measured.constants["scale_U"].dtype == torch.float32
    assert torch.isfinite(objective(model, tensors(arrays(TINY))))
    x = model.tokenizer.measured.activity(torch.tensor([[1, 12345, 3, 7]]))
    torch.testing.assert_close(x[0, 1], torch.tensor(np.log1p(123.45) / 1.5, dtype=torch.float32))


def test_parameter_groups_hold_every_parameter_once() -> None:
    model = build(CONFIGS["dense"])
    groups = model.parameter_groups()
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    kept = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert id(model.lag_MQT) in kept
    assert id(model.heads.biases[0]) in kept
    assert id(model.heads.weights[0]) not in kept


def test_a_wrong_history_length_is_named() -> None:
    model, data = build(TINY), arrays(replace(TINY, history_days=10))
    with pytest.raises(ValueError, match="expected 12 days a window, got 10"):
        model(tensors(data))
