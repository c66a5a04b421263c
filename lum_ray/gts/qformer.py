"""The Q-Former: learned queries gather what the modalities say of a behaviour, and become its one token.

Queries and semantic-ID tokens attend to each other and, in every second layer, to the modality embeddings. A text can
run beside them through the same self-attention (as in BLIP-2), seen by the queries or not as the task asks. Four
layers of width 256 with eight queries are enough: a behaviour is a few vectors, not an image.

Legend: B behaviours or windows, Q queries, J semantic-ID tokens, M modality vectors, T text tokens, D width, S = Q + J.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lum_ray.nn import CrossAttention, SelfAttention, SwiGLU

Sight = Literal["apart", "both", "causal"]
"""Who sees whom: neither queries nor text the other; each the other; the text the queries and its own past."""


class Layer(nn.Module):
    """Pre-norm self-attention over queries and text, cross-attention of the queries (every second layer), SwiGLU, one
    for the queries and one for the text."""

    def __init__(self, width: int, heads: int, crosses: bool, dropout: float) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), SelfAttention(width, heads)
        self.cross_norm = nn.LayerNorm(width) if crosses else None
        self.cross = CrossAttention(width, heads) if crosses else None
        self.query_norm, self.query_mlp = nn.LayerNorm(width), SwiGLU(width, 2 * width)
        self.text_norm, self.text_mlp = nn.LayerNorm(width), SwiGLU(width, 2 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor, queries: int, bias: Tensor | None, memory: Tensor, unknown: Tensor) -> Tensor:
        x_BSD = x_BSD + self.dropout(self.attention(self.norm(x_BSD), bias))
        query: Tensor = x_BSD[:, :queries]
        text = x_BSD[:, queries:]
        if self.cross is not None and self.cross_norm is not None:
            keys = self.cross.keys_values(memory)
            query = query + self.dropout(self.cross(self.cross_norm(query), keys, unknown))
        query = query + self.dropout(self.query_mlp(self.query_norm(query)))
        if not text.shape[1]:
            return query
        return torch.cat([query, text + self.dropout(self.text_mlp(self.text_norm(text)))], dim=1)


class QFormer(nn.Module):
    """Source: GTS-LUM, multi-modal alignment; BLIP-2, section 3.1."""

    def __init__(self, width: int, heads: int, layers: int, queries: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.queries_QD = nn.Parameter(torch.randn(queries, width) * 0.5)
        self.layers = nn.ModuleList(Layer(width, heads, index % 2 == 0, dropout) for index in range(layers))
        self.norm = nn.LayerNorm(width)

    @property
    def queries(self) -> int:
        return self.queries_QD.shape[0]

    def forward(
        self,
        memory_BMD: Tensor,
        known_BM: Tensor,
        ids_BJD: Tensor,
        text_BTD: Tensor | None = None,
        words_BT: Tensor | None = None,
        sight: Sight = "apart",
    ) -> tuple[Tensor, Tensor | None]:
        """(query outputs (B, Q, D), text outputs (B, T, D) or None).

        `known_BM`: which modality vectors are there (a row of none reads zeros). `words_BT`: which text tokens are no
        pads (bool).
        """
        batch, ids = ids_BJD.shape[:2]
        head = self.queries + ids
        x = torch.cat([self.queries_QD.to(ids_BJD.dtype).expand(batch, -1, -1), ids_BJD], dim=1)
        bias = None
        if text_BTD is not None and words_BT is not None:
            x = torch.cat([x, text_BTD], dim=1)
            bias = hidden(words_BT, head, sight).to(x.dtype)[:, None]
        # a sentinel of zeros keeps the softmax defined where no modality is known
        memory = torch.cat([memory_BMD.new_zeros(batch, 1, memory_BMD.shape[2]), memory_BMD], dim=1)
        unknown = torch.zeros(batch, 1, 1, memory.shape[1], dtype=x.dtype, device=x.device)
        unknown[:, 0, 0, 1:] = torch.where(known_BM, 0.0, NEVER).to(x.dtype)
        for layer in self.layers:
            x = layer(x, head, bias, memory, unknown)
        x = self.norm(x)
        return x[:, : self.queries], x[:, head:] if text_BTD is not None else None


NEVER = -1e4
"""A score that no softmax passes; finite, so that a row of nothing stays finite in bfloat16."""


def hidden(words_BT: Tensor, head: int, sight: Sight) -> Tensor:
    """The bias (B, S + T, S + T) that hides pads and, by `sight`, queries and text from each other."""
    batch, length = words_BT.shape
    total = head + length
    bias = torch.zeros(batch, total, total, device=words_BT.device)
    bias[:, :, head:] = torch.where(words_BT, 0.0, NEVER)[:, None, :]
    if sight != "both":
        bias[:, :head, head:] = NEVER
    if sight == "apart":
        bias[:, head:, :head] = NEVER
    if sight == "causal":
        later = torch.ones(length, length, dtype=torch.bool, device=words_BT.device).triu(1)
        bias[:, head:, head:] = bias[:, head:, head:].masked_fill(later, NEVER)
    return bias
