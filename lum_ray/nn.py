"""Blocks of both models: attention, SwiGLU, pre-norm layers, stacked heads, rotary and sinusoidal positions.

Projections that read the same input are stored as one matrix (q, k, v; k, v; SwiGLU's gate and value). With
`plain=True` a block computes the same from the same weights piece by piece, as papers write it: that form is the
yardstick of the tests. Legend: B batch, T positions, Q queries, D width, M heads, K width per head, N heads of a bank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rotation = tuple[Tensor, Tensor]
"""(cos, sin), each (..., K / 2), broadcastable to the positions that are turned."""
KeysValues = tuple[Tensor, Tensor]
"""k_BMTK and v_BMTK."""


class Constants(nn.Module):
    """Named tensors that move with the model but keep their dtype when its weights are cast, to bfloat16 say."""

    def __init__(self, values: Mapping[str, Tensor], persistent: bool) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, value, persistent=persistent)

    def __getitem__(self, name: str) -> Tensor:
        value = self._buffers[name]
        assert value is not None
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        for name in self._buffers:
            self._buffers[name] = self[name].to(fn(self[name]).device)
        return self


def sinusoidal(position: Tensor, width: int) -> Tensor:
    """Sines and cosines (..., width) of positions (...). Source: Vaswani et al. 2017, section 3.5."""
    frequency = torch.exp(torch.arange(0, width, 2, device=position.device) * (-math.log(10_000.0) / width))
    angle = position[..., None].float() * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :width]


def rotation(position: Tensor, width: int) -> Rotation:
    """How rotary embeddings turn a head of `width` at each position. Source: RoFormer, section 3.4."""
    frequency = torch.exp(torch.arange(0, width, 2, device=position.device) * (-math.log(10_000.0) / width))
    angle = position[..., None].float() * frequency
    return angle.cos(), angle.sin()


def turn(x_BMTK: Tensor, by: Rotation | None) -> Tensor:
    """`x_BMTK` turned pairwise; None leaves it alone."""
    if by is None:
        return x_BMTK
    cos, sin = by
    a, b = x_BMTK.float().view(*x_BMTK.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x_BMTK.dtype)


def decays(heads: int, longest: float = 400.0) -> Tensor:
    """Time constants (heads,) of exponential decays, from 1 to `longest` in equal ratios."""
    return torch.logspace(0, math.log10(longest), heads) if heads > 1 else torch.tensor([math.sqrt(longest)])


def weigh(q_BMQK: Tensor, k_BMTK: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """Attention weights (B, M, Q, T), written out; `bias` is added to the scores."""
    scores = q_BMQK @ k_BMTK.transpose(-1, -2) / math.sqrt(q_BMQK.shape[-1])
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if bias is not None:
        scores = scores + bias
    return scores.float().softmax(-1).to(q_BMQK.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, dropout: float, plain: bool) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v, all (B, M, ., K)."""
    if plain:
        return F.dropout(weigh(q, k, bias, causal), dropout, dropout > 0) @ v
    mask = bias.to(q.dtype) if bias is not None else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    return x_BTD.view(*x_BTD.shape[:-1], heads, x_BTD.shape[-1] // heads).transpose(-3, -2)


def join_heads(x_BMTK: Tensor) -> Tensor:
    return x_BMTK.transpose(-3, -2).flatten(-2)


def matrices_decay(module: nn.Module) -> list[dict[str, Any]]:
    """Everything of `module` that trains, as parameter groups of the optimiser: matrices decay, vectors do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 1.0},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix for q, k and v. `gain` scales the start of q and k."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.qkv.weight[: 2 * width].mul_(gain)

    def forward(
        self,
        x_BTD: Tensor,
        bias: Tensor | None = None,
        causal: bool = False,
        turned: Rotation | None = None,
        plain: bool = False,
    ) -> Tensor:
        if plain:
            q, k, v = (split_heads(F.linear(x_BTD, weight), self.heads) for weight in self.qkv.weight.chunk(3))
        else:
            q, k, v = (split_heads(part, self.heads) for part in self.qkv(x_BTD).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        mixed = attend(turn(q, turned), turn(k, turned), v, bias, causal, dropout, plain)
        return self.out(join_heads(mixed))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a memory; the memory's keys and values are computed apart, so that they can
    be kept. Source: LUMOS, eqs. 3 to 6.

    With `raw_width` U every head also averages U given numbers of each memory position, as they are, with the same
    weights; a matrix of their own brings the M * U averages into the output. With `raw_logs` it reads each average a
    in three ways, as a, asinh(a * (1 + decay of the head)), which is about log(1 + how many days), and as
    asinh(1000 a), which falls with the days since the last one: chances go with the logarithm of a rate.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        gain: float = 1.0,
        raw_width: int = 0,
        raw_logs: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        inputs = heads * raw_width * (3 if raw_logs else 1)
        self.raw_out = nn.Linear(inputs, width, bias=False) if raw_width else None
        self.span = Constants({"days_M11": 1 + decays(heads)[:, None, None]}, persistent=False) if raw_logs else None
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.q.weight.mul_(gain)

    def keys_values(
        self, memory_BTD: Tensor, turned: Rotation | None = None, plain: bool = False, raw_BTU: Tensor | None = None
    ) -> KeysValues:
        if plain:
            k, v = (split_heads(F.linear(memory_BTD, weight), self.heads) for weight in self.kv.weight.chunk(2))
        else:
            k, v = (split_heads(part, self.heads) for part in self.kv(memory_BTD).chunk(2, dim=-1))
        if self.raw_out is not None and raw_BTU is not None:
            v = torch.cat([v, raw_BTU.to(v.dtype)[:, None].expand(-1, self.heads, -1, -1)], dim=-1)
        return turn(k, turned), v

    def forward(
        self,
        x_BQD: Tensor,
        memory: KeysValues,
        bias: Tensor | None = None,
        turned: Rotation | None = None,
        plain: bool = False,
    ) -> Tensor:
        q = turn(split_heads(self.q(x_BQD), self.heads), turned)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(q, *memory, bias, False, dropout, plain)
        result: Tensor = self.out(join_heads(mixed[..., : q.shape[-1]]))
        if self.raw_out is not None:
            raw = mixed[..., q.shape[-1] :]
            if self.span is not None:
                days = self.span["days_M11"].to(raw.dtype)
                raw = torch.cat([raw, torch.asinh(raw * days), 0.3 * torch.asinh(1000 * raw)], dim=-1)
            result = result + self.raw_out(join_heads(raw))
        return result

    def weights(self, x_BQD: Tensor, memory: KeysValues, bias: Tensor | None, turned: Rotation | None) -> Tensor:
        """What `forward` mixes with: (B, M, Q, T), each row adds up to 1."""
        return weigh(turn(split_heads(self.q(x_BQD), self.heads), turned), memory[0], bias, False)


class SwiGLU(nn.Module):
    """silu(x G) * (x V), then back to the width, without biases. Source: Shazeer 2020."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_value = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        if plain:
            gate, value = (F.linear(x, weight) for weight in self.gate_value.weight.chunk(2))
        else:
            gate, value = self.gate_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and SwiGLU."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.attention_norm, self.swiglu_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, gain=gain)
        self.swiglu = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BTD: Tensor, bias: Tensor | None, causal: bool, turned: Rotation | None, plain: bool = False
    ) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), bias, causal, turned, plain))
        return x_BTD + self.dropout(self.swiglu(self.swiglu_norm(x_BTD), plain))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """`layers` hidden layers of ReLU and, if `out_width` is given, a linear output layer."""

    def __init__(self, in_width: int, hidden: int, layers: int, out_width: int | None = None) -> None:
        super().__init__()
        widths = [in_width] + [hidden] * layers
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(hidden, out_width) if out_width is not None else None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = F.relu(layer(x))
        return x if self.out is None else self.out(x)


class HeadBank(nn.Module):
    """N heads with weights of their own: two hidden ReLU layers of `width`, then `outputs` numbers each.

    Source: LUMOS, section 3.3 (user behaviour token prediction). `starts` (N,): the first output of each head before
    training.
    """

    def __init__(self, count: int, width: int, outputs: int, starts: tuple[float, ...] = ()) -> None:
        super().__init__()
        shapes = ((width, width), (width, width), (width, outputs))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(count, *shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(count, 1, shape[1])) for shape in shapes)
        with torch.no_grad():
            for values in (*self.weights, *self.biases):
                values.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width))  # as nn.Linear
            if starts:
                self.biases[2][:, 0, 0] = torch.tensor(starts)

    def forward(self, x: Tensor, begin: int, end: int, plain: bool = False) -> Tensor:
        """Heads [begin, end) of rows: x (R, D) that all of them read, or (end - begin, R, D) for each its own; gives
        (end - begin, R, outputs)."""
        if plain:
            one = [x if x.dim() == 2 else x[index] for index in range(end - begin)]
            for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                one = [row @ weight[begin + index] + bias[begin + index] for index, row in enumerate(one)]
                one = [F.relu(row) for row in one] if layer < 2 else one
            return torch.stack(one) if one else x.new_zeros(0, x.shape[-2], self.weights[2].shape[2])
        x = x.expand(end - begin, *x.shape[-2:])
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias[begin:end], x, weight[begin:end])
            x = F.relu(x) if layer < 2 else x
        return x
