"""From a trained stage to lists of items: retrieve, rerank, and the beam over the ID tree.

Legend: B samples, N items, K places of a list, D width, L levels, W beam width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lum_ray.gts.behaviours import node_numbers
from lum_ray.gts.stage import GtsStage
from lum_ray.stage import Batch

Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def best(scores_BN: Tensor, depth: int) -> tuple[Int64, Floats]:
    """The `depth` best items of each sample and their scores, falling (B, K); scores of -inf are left out as -1, NaN.

    Ties go by catalogue index; whoever scores a list must count them against it.
    """
    score, item = torch.topk(scores_BN.detach(), min(depth, scores_BN.shape[1]), dim=1)
    out = torch.isneginf(score)
    return (
        item.masked_fill(out, -1).cpu().numpy(),
        score.float().masked_fill(out, float("nan")).cpu().numpy(),
    )


def without_seen(scores_BN: Tensor, batch: Batch) -> Tensor:
    """The scores with every item that its user had before at -inf: the seen-filter."""
    at = (batch["had_sample_S"], batch["had_item_S"])
    return scores_BN.index_put(at, scores_BN.new_tensor(-torch.inf))


def rerank(stage: GtsStage, batch: Batch, items_BK: Int64, scores_BK: Floats, count: int) -> tuple[Int64, Floats]:
    """The list with its first `count` items in the order of reading P; the others stay behind them, as R has them.

    Scores: 1 + P's probability for what was asked, R's squashed below 1 for the rest, so that they fall with rank.
    """
    count = min(count, items_BK.shape[1])
    head = items_BK[:, :count]
    asked = torch.from_numpy(np.maximum(head, 0)).to(batch["length_B"].device)
    logit = stage.propensities(batch, asked).cpu().numpy()
    logit = np.where(head >= 0, logit, -np.inf)
    order = np.argsort(-logit, axis=1, kind="stable")
    top = 1 + 1 / (1 + np.exp(-np.take_along_axis(logit, order, axis=1)))
    rest = 1 / (1 + np.exp(-scores_BK[:, count:]))
    first = np.take_along_axis(head, order, axis=1)
    scores = np.concatenate([np.where(first >= 0, top, np.nan), rest], axis=1).astype(np.float32)
    return np.concatenate([first, items_BK[:, count:]], axis=1), scores


@torch.no_grad()
def generate(stage: GtsStage, state_BD: Tensor, beam: int) -> Tensor:
    """Scores (B, N) of items by the semantic ID that the user embedding generates, level by level; -inf outside.

    Beam search over the nodes that have items; the items of a leaf share its probability by how often they were had.
    """
    arrays = stage.inputs.arrays
    paths, branching = arrays["paths_ND"], stage.config.branching
    device, batch = state_BD.device, len(state_BD)
    nodes_NL = node_numbers(paths, branching)
    exists = torch.zeros(stage.module.behaviours.nodes.num_embeddings, dtype=torch.bool, device=device)
    exists[torch.from_numpy(np.unique(nodes_NL)).to(device)] = True
    hidden = state_BD[:, None]
    score = torch.zeros(batch, 1, device=device)
    prefix = torch.zeros(batch, 1, dtype=torch.long, device=device)  # digits so far as one number
    offset = 0
    for level, head in enumerate(stage.module.digits):
        logits = head(hidden).float()  # (B, W, branching)
        child = prefix[..., None] * branching + torch.arange(branching, device=device)
        logits = logits.masked_fill(~exists[offset + child], -torch.inf)
        total = (score[..., None] + logits.log_softmax(dim=-1)).flatten(1).nan_to_num(nan=-torch.inf)
        width = min(beam, total.shape[1])
        score, place = total.topk(width, dim=1)
        prefix = child.flatten(1).gather(1, place)
        if level + 1 < len(stage.module.digits):
            parent = hidden.gather(1, (place // branching)[..., None].expand(-1, -1, hidden.shape[2]))
            hidden = parent + stage.module.prefixes(offset + prefix).to(hidden.dtype)
        offset += branching ** (level + 1)
    leaves = torch.full((batch, branching ** len(stage.module.digits)), -torch.inf, device=device)
    leaves.scatter_(1, prefix, score)
    leaf_N = nodes_NL[:, -1] - (offset - branching ** paths.shape[1])
    share = np.exp(arrays["log_q_N"].astype(np.float64))
    within = np.log(share / np.bincount(leaf_N, share, leaves.shape[1])[leaf_N])
    return leaves[:, torch.from_numpy(leaf_N).to(device)] + torch.from_numpy(within.astype(np.float32)).to(device)


def user_embeddings(stage: GtsStage, batch: Batch) -> dict[str, Any]:
    """(B, O): what reading R matches with items."""
    with torch.no_grad():
        return {"embedding_BO": stage.module.user(stage.user_states(batch)).cpu().numpy()}
