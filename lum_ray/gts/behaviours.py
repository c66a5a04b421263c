"""A behaviour: its modalities and its semantic ID, and the one token that they become.

Choices that are not obvious:
- Each node of the ID tree has an embedding of its own, and an item's ID is the sum along its path: siblings share what
  their parents know, and an item that is assigned to the tree later has all of it.
- An item that was never seen before the train cut has its text and its table row, but no place in the graph: a modality
  that is not known is hidden from the queries, and in training modalities are hidden at random, so that text alone
  must do.

Legend: I items, M modalities, Q queries, E modality width, W width of the Q-Former, D width of the LLM, L levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lum_ray.data.rows import mix, share
from lum_ray.gts.config import GtsConfig, GtsInputs
from lum_ray.gts.qformer import QFormer
from lum_ray.nn import MLP, Constants

COLLISIONS = 16
"""Collision digits that have an embedding; later ones share the last."""


class Behaviours(nn.Module):
    """`gathered` says what there is to say of items, `forward` makes b^F of it. Source: GTS-LUM, fused embedding."""

    def __init__(self, config: GtsConfig, inputs: GtsInputs, out_width: int) -> None:
        super().__init__()
        self.config = config
        arrays, width = inputs.arrays, config.width
        known = {
            "text": np.ones(inputs.count, np.bool_),
            "graph": arrays["graph_known_N"],
            "table": np.full(inputs.count, arrays["table_NH"].shape[1] > 0),
        }
        self.modalities = [name for name in config.modalities if arrays[COLUMNS[name]].shape[1] > 0]
        self.constants = Constants(
            {name: torch.from_numpy(_scaled(arrays[COLUMNS[name]])) for name in self.modalities}
            | {"known_NM": torch.from_numpy(np.stack([known[name] for name in self.modalities], axis=1))}
            | {"nodes_NL": torch.from_numpy(node_numbers(arrays["paths_ND"], config.branching))}
            | {"digits_NL": torch.from_numpy(arrays["paths_ND"].astype(np.int64))}
            | {"collision_N": torch.from_numpy(np.minimum(arrays["collision_N"], COLLISIONS - 1))},
            persistent=False,
        )
        self.into = nn.ModuleDict({name: nn.Linear(self.constants[name].shape[1], width) for name in self.modalities})
        self.kind_MW = nn.Parameter(torch.randn(len(self.modalities), width) * 0.1)
        levels = arrays["paths_ND"].shape[1]
        self.nodes = nn.Embedding(sum(config.branching**level for level in range(1, levels + 1)), width)
        self.collisions = nn.Embedding(COLLISIONS, width)
        nn.init.normal_(self.nodes.weight, std=0.3)
        nn.init.normal_(self.collisions.weight, std=0.3)
        self.qformer, self.mlp = None, None
        if config.fusion == "qformer":
            self.qformer = QFormer(width, config.heads, config.layers, config.queries, config.dropout)
            fused = config.queries * width
        elif config.fusion == "mlp":
            fused = width
            self.mlp = MLP((len(self.modalities) + 1) * width, 2 * width, 1, width)
        else:
            fused = self.constants["text"].shape[1]
        self.project = nn.Linear(fused, out_width)
        # without a bias: a trained one outgrows the differences between items within a few steps
        self.norm = nn.LayerNorm(out_width, bias=False)

    def memory(self, items_I: Tensor, hidden_IM: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The modality vectors (I, M, W) and which of them can be seen (I, M) bool: known, and not hidden."""
        vectors = [self.into[name](F.embedding(items_I, self.constants[name])) for name in self.modalities]
        seen_IM = self.constants["known_NM"][items_I]
        if hidden_IM is not None:
            seen_IM = seen_IM & ~hidden_IM
        return torch.stack(vectors, dim=1) + self.kind_MW, seen_IM

    def ids(self, items_I: Tensor) -> Tensor:
        """The embedding of the semantic ID (I, W): the sum over its nodes and its collision digit."""
        on_path: Tensor = self.nodes(self.constants["nodes_NL"][items_I]).sum(dim=1)
        return on_path + self.collisions(self.constants["collision_N"][items_I])  # type: ignore[no-any-return]

    def gathered(self, items_I: Tensor, hidden_IM: Tensor | None = None) -> Tensor:
        """What is said of items before the projection (I, F): the query outputs, the MLP's, or the text."""
        if self.config.fusion == "text":
            return F.embedding(items_I, self.constants["text"])
        memory_IMW, known_IM = self.memory(items_I, hidden_IM)
        ids_IW = self.ids(items_I)
        if self.qformer is not None:
            queries_IQW: Tensor = self.qformer(memory_IMW, known_IM, ids_IW[:, None])[0]
            return queries_IQW.flatten(1)
        assert self.mlp is not None
        parts = torch.cat([(memory_IMW * known_IM[..., None]).flatten(1), ids_IW], dim=1)
        return self.mlp(parts)  # type: ignore[no-any-return]

    def forward(self, gathered_IF: Tensor, reference_RF: Tensor, weight_R: Tensor | None = None) -> Tensor:
        """b^F (I, D) of what `gathered` gave, centred and scaled by the (weighted) mean and deviation of a reference.

        Departs: what queries say of two items is nearly the same vector, since the queries themselves are most of it; a
        frozen LLM could hardly tell one behaviour from another. The reference is drawn by (seed, step), so that a step
        does not depend on the number of workers.
        """
        weight = torch.ones_like(reference_RF[:, 0]) if weight_R is None else weight_R
        share = (weight / weight.sum())[:, None]
        center_F = (share * reference_RF).sum(dim=0)
        variance_F = (share * (reference_RF - center_F).square()).sum(dim=0)
        spread_F = (variance_F + 1e-6).sqrt()  # of one item alone it is 0, and a root has no slope there
        centred = ((gathered_IF - center_F) / spread_F).to(self.project.weight.dtype)
        return self.norm(self.project(centred))  # type: ignore[no-any-return]


COLUMNS = {"text": "text_NE", "graph": "graph_NG", "table": "table_NH"}
HIDE = 0.1
"""Share of modality vectors that training hides."""
HIDE_SALT = 19


def hidden_modalities(items: npt.NDArray[np.int64], modalities: int, seed: int, step: int) -> npt.NDArray[np.bool_]:
    """(..., M): which modality vectors of items (...) a step hides, the same wherever in it an item comes up."""
    if modalities < 2:
        return np.zeros((*items.shape, modalities), np.bool_)
    return share(mix(seed, HIDE_SALT, step, items[..., None], np.arange(modalities))) < HIDE


def _scaled(values_NE: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Rows with a mean square of about 1 per number, whatever the encoder's scale."""
    size = float(np.sqrt(np.square(values_NE, dtype=np.float64).mean())) or 1.0
    return np.asarray(values_NE / size, np.float32)


def node_numbers(paths_ND: npt.NDArray[Any], branching: int) -> npt.NDArray[np.int64]:
    """The number of each node on each path (N, D) int64: level by level, a node by its digits from the root."""
    numbers = np.zeros(paths_ND.shape, np.int64)
    prefix, offset = np.zeros(len(paths_ND), np.int64), 0
    for level in range(paths_ND.shape[1]):
        prefix = prefix * branching + paths_ND[:, level]
        numbers[:, level] = offset + prefix
        offset += branching ** (level + 1)
    return numbers
