"""From a trained stage to lists of items: retrieve, rerank, and the beam over the ID tree.

Legend: B samples, N items, K places of a list, D width, L levels, W beam width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lum_ray.gts.behaviours import node_numbers
from lum_ray.gts.stage import GtsStage
from lum_ray.stage import Batch

Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Method = Literal["retrieve", "generate"]
BEAM: Final = 64
"""Nodes that `generate` keeps of each level, unless it is told otherwise."""


@torch.no_grad()
def scores_by(
    stage: GtsStage, batch: Batch, method: Method = "retrieve", state_BD: Tensor | None = None, beam: int = BEAM
) -> Tensor:
    """Scores (B, N) of reading R, or of what is generated; `state_BD`: `GtsStage.user_states`, if it is there already.

    Departs: a user without an event of a known item gets the log of each item's share of the training events instead
    of the model's scores. Training has no such history (its cuts come after a first event, unless the users have a
    day of registration), so the state at the end of the prefix alone would be noise on top of the prior; and that log
    share is where the prior starts from.
    """
    state_BD = stage.user_states(batch) if state_BD is None else state_BD
    scores_BN = (
        stage.scores(batch, state_BD=state_BD) if method == "retrieve" else generate(stage, state_BD, beam)
    ).float()
    return torch.where(_cold(batch)[:, None], _popularity(stage, scores_BN), scores_BN)


def asked_logits(stage: GtsStage, batch: Batch, items: Sequence[int]) -> npt.NDArray[np.float64]:
    """Logits (B, K) of reading P for the same K catalogue items in front of each history.

    Departs: without an event of a known item, the log-odds of the item's share of the training events: see `scores_by`.
    """
    items_K = torch.tensor(list(items), device=batch["length_B"].device)
    logits_BK = stage.propensities(batch, items_K.expand(len(batch["length_B"]), -1)).double()
    log_share_K = _popularity(stage, logits_BK)[items_K]
    odds_K = log_share_K - torch.log1p(-log_share_K.exp().clamp(max=1 - 1e-12))
    return torch.where(_cold(batch)[:, None], odds_K, logits_BK).cpu().numpy()


def _cold(batch: Batch) -> Tensor:
    """Whether a sample has no event of a known item (B,)."""
    return batch["events_B"] == 0


def _popularity(stage: GtsStage, like: Tensor) -> Tensor:
    """The log of each item's smoothed share of the training events (N,)."""
    return torch.from_numpy(stage.inputs.arrays["log_q_N"]).to(like)


def best(scores_BN: Tensor, depth: int) -> tuple[Int64, Floats]:
    """The `depth` best items of each sample and their scores, falling (B, K); scores of -inf are left out as -1, NaN.

    Ties go by catalogue index (`topk` alone leaves open which of them it takes, so that a longer list could begin with
    other items); whoever scores a list must count them against it.
    """
    scores_BN = scores_BN.detach().float()
    count, depth = len(scores_BN), min(depth, scores_BN.shape[1])
    least_B1 = torch.topk(scores_BN, depth, dim=1).values[:, -1:]
    among = (scores_BN >= least_B1) & ~torch.isneginf(scores_BN)
    sample, item = (index.cpu().numpy() for index in among.nonzero(as_tuple=True))
    score = scores_BN[among].cpu().numpy()
    order = np.lexsort((item, -score, sample))
    sample, item, score = sample[order], item[order], score[order]
    place = np.arange(len(sample)) - np.searchsorted(sample, sample)
    kept = place < depth
    items_BK, values_BK = np.full((count, depth), -1, np.int64), np.full((count, depth), np.nan, np.float32)
    items_BK[sample[kept], place[kept]] = item[kept]
    values_BK[sample[kept], place[kept]] = score[kept]
    return items_BK, values_BK


def without_seen(scores_BN: Tensor, batch: Batch) -> Tensor:
    """The scores with every item that its user had before at -inf: the seen-filter."""
    at = (batch["had_sample_S"], batch["had_item_S"])
    return scores_BN.index_put(at, scores_BN.new_tensor(-torch.inf))


def rerank(stage: GtsStage, batch: Batch, items_BK: Int64, scores_BK: Floats, count: int) -> tuple[Int64, Floats]:
    """The list with its first `count` items in the order of reading P; the others stay behind them, as R has them.

    Scores: 1 + P's share of each among those asked, R's squashed below 1 for the rest, so that they fall with rank.
    A list of a user without an event of a known item stays as it is: see `scores_by`.
    """
    count = min(count, items_BK.shape[1])
    head = items_BK[:, :count]
    asked = torch.from_numpy(np.maximum(head, 0)).to(batch["length_B"].device)
    logit = stage.propensities(batch, asked).cpu().numpy()
    logit = np.where(head >= 0, logit, -np.inf)
    order = np.argsort(-logit, axis=1, kind="stable")
    chance = np.exp(logit - logit.max(axis=1, keepdims=True))
    top = 1 + np.take_along_axis(chance / chance.sum(axis=1, keepdims=True), order, axis=1)
    rest = 1 / (1 + np.exp(-scores_BK[:, count:]))
    first = np.take_along_axis(head, order, axis=1)
    scores = np.concatenate([np.where(first >= 0, top, np.nan), rest], axis=1).astype(np.float32)
    items = np.concatenate([first, items_BK[:, count:]], axis=1)
    cold_B1 = _cold(batch)[:, None].cpu().numpy()
    return np.where(cold_B1, items_BK, items), np.where(cold_B1, scores_BK, scores)


@torch.no_grad()
def generate(stage: GtsStage, state_BD: Tensor, beam: int = BEAM) -> Tensor:
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


def user_embeddings(stage: GtsStage, batch: Batch, state_BD: Tensor | None = None) -> Floats:
    """(B, O): what reading R matches with items; `state_BD`: `GtsStage.user_states`, if it is there already."""
    with torch.no_grad():
        states_BD = stage.user_states(batch) if state_BD is None else state_BD
        return np.asarray(stage.module.user(states_BD).cpu().numpy())
