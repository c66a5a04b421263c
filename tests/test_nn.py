"""Legend: B batch, T positions, Q queries, D width, N heads of a bank."""

from __future__ import annotations

import pytest
import torch

from lum_ray.nn import (
    MLP,
    Constants,
    CrossAttention,
    EncoderLayer,
    HeadBank,
    SwiGLU,
    decays,
    rotation,
    sinusoidal,
    split_heads,
    turn,
    weigh,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_an_encoder_layer_equals_its_plain_form(causal: bool, rope: bool) -> None:
    layer, x_BTD = EncoderLayer(16, 4, 24), torch.randn(3, 7, 16)
    turned = rotation(torch.arange(7), 4) if rope else None
    torch.testing.assert_close(layer(x_BTD, None, causal, turned), layer(x_BTD, None, causal, turned, True))


def test_causal_attention_does_not_look_ahead() -> None:
    layer, x_BTD = EncoderLayer(16, 4, 24), torch.randn(1, 7, 16)
    changed = x_BTD.clone()
    changed[:, 4:] += 1
    before, after = layer(x_BTD, None, True, None), layer(changed, None, True, None)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 0.01


def test_cross_attention_equals_its_plain_form_and_its_weights() -> None:
    layer, x_BQD, memory_BTD, bias = (
        CrossAttention(16, 4),
        torch.randn(2, 3, 16),
        torch.randn(2, 5, 16),
        torch.randn(3, 5),
    )
    memory = layer.keys_values(memory_BTD)
    out = layer(x_BQD, memory, bias)
    torch.testing.assert_close(out, layer(x_BQD, layer.keys_values(memory_BTD, plain=True), bias, plain=True))
    weights = layer.weights(x_BQD, memory, bias, None)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3))
    torch.testing.assert_close(out, layer.out((weights @ memory[1]).transpose(1, 2).flatten(2)))


def test_swiglu_equals_its_plain_form_and_formula() -> None:
    layer, x = SwiGLU(6, 10), torch.randn(4, 6)
    gate, value = layer.gate_value.weight.chunk(2)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ value.T)) @ layer.out.weight.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x, plain=True), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_a_bank_of_heads_equals_one_head_after_the_other(shared: bool) -> None:
    bank = HeadBank(5, 8, 2, starts=(0.0, 1.0, 2.0, 3.0, 4.0))
    x = torch.randn(6, 8) if shared else torch.randn(3, 6, 8)
    out = bank(x, 1, 4)
    assert out.shape == (3, 6, 2)
    torch.testing.assert_close(out, bank(x, 1, 4, plain=True))
    one = x if shared else x[2]
    for weight, bias, last in zip(bank.weights, bank.biases, (False, False, True), strict=True):
        one = one @ weight[3] + bias[3]
        one = one if last else one.relu()
    torch.testing.assert_close(out[2], one)
    assert bank(torch.zeros(1, 8), 0, 5)[4, 0, 0] > bank(torch.zeros(1, 8), 0, 5)[0, 0, 0] + 3


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    scores = [
        (turn(q, rotation(torch.tensor([a]), 8)) * turn(k, rotation(torch.tensor([b]), 8))).sum()
        for a, b in ((9, 4), (25, 20), (9, 5))
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)
    assert (scores[0] - scores[2]).abs() > 1e-3


def test_sinusoidal_positions_differ_and_have_the_width() -> None:
    table = sinusoidal(torch.arange(50), 10)
    assert table.shape == (50, 10)
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.01


def test_decays_grow_from_a_day_to_the_longest() -> None:
    assert decays(8).tolist() == sorted(decays(8).tolist())
    torch.testing.assert_close(decays(8)[[0, 7]], torch.tensor([1.0, 400.0]))
    assert decays(1).shape == (1,)


def test_weights_of_later_days_are_zero_if_causal() -> None:
    x = split_heads(torch.randn(2, 5, 8), 2)
    assert weigh(x, x, None, True).triu(1).abs().max() == 0


def test_constants_keep_their_dtype_when_weights_are_cast() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), Constants({"scale": torch.tensor([0.01])}, persistent=True))
    module.to(torch.bfloat16)
    assert module[0].weight.dtype == torch.bfloat16
    assert module[1]["scale"].dtype == torch.float32
    assert "1.scale" in module.state_dict()


def test_an_mlp_without_output_layer_ends_with_relu() -> None:
    x = torch.randn(20, 3)
    assert MLP(3, 4, 2)(x).min() == 0
    assert MLP(3, 4, 1, 5)(x).shape == (20, 5)
    assert MLP(3, 4, 1, 5)(x).min() < 0
