"""Phase I: six tasks align what the Q-Former says of a behaviour, and of a window of behaviours, with their texts.

Contrastive, matching and generation, each for a behaviour and its text and for K behaviours and a narrative of their
window. A group holds what is told apart; groups never mix, so a loss depends on its own sample alone.
Source: GTS-LUM, Phase I; BLIP-2, section 3.2 (label smoothing .1, similarity = the best of the queries, hard negatives
from the contrastive softmax, a two-class head averaged over queries, causal text behind the queries).

Arrays of a batch, for each of the two levels X = `behaviour`, `window` (B samples, G in a group, K behaviours in a
window, T words): `X_items_BGK` (K is 1 for behaviours),
`X_hidden_BGKM` (modalities that the step hides), `X_words_BGT` (0 pads; starts with BOS), `X_there_BG`,
`X_same_BGG` (pairs with the same text, no negatives of each other), `X_draw_BG` (uniform, picks the hard negative).

Legend: R rows (B * G), Q queries, W width, O output width, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lum_ray.gts.behaviours import Behaviours
from lum_ray.gts.config import AlignTask, GtsConfig, GtsInputs
from lum_ray.gts.qformer import NEVER, Sight

Batch = Mapping[str, Tensor]
SMOOTHING = 0.1
MAX_WORDS = 256


class Aligner(nn.Module):
    """The behaviours' Q-Former with what only Phase I needs: words, and three heads."""

    def __init__(self, config: GtsConfig, inputs: GtsInputs, behaviours: Behaviours) -> None:
        super().__init__()
        width = config.width
        self.config, self.behaviours = config, behaviours
        self.words = nn.Embedding(len(inputs.vocabulary), width)
        self.order = nn.Embedding(MAX_WORDS, width)
        self.place = nn.Embedding(config.window, width)  # of a behaviour in its window
        for table in (self.words, self.order, self.place):
            nn.init.normal_(table.weight, std=0.3)
        self.query_out, self.text_out = (nn.Linear(width, config.output_width) for _ in range(2))
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # DeepSpeed has no scalars
        self.matches = nn.Linear(width, 2)
        self.word_out = nn.Linear(width, len(inputs.vocabulary))

    def encode(self, items_RK: Tensor, hidden_RKM: Tensor, words_RT: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
        """(query outputs (R, Q, W), text outputs (R, T, W)) of rows of K behaviours (-1: none) with a text."""
        rows, window = items_RK.shape
        there_RK = items_RK >= 0
        memory, known = self.behaviours.memory(items_RK.clamp(min=0).flatten(), hidden_RKM.flatten(0, 1))
        ids = self.behaviours.ids(items_RK.clamp(min=0).flatten())
        ids = ids.view(rows, window, ids.shape[1])
        memory = memory.view(rows, window, *memory.shape[1:])
        known = known.view(rows, window, known.shape[1]) & there_RK[..., None]
        if window > 1:
            memory, ids = memory + self.place.weight[:window, None], ids + self.place.weight[:window]
        ids = ids * there_RK[..., None]
        assert self.behaviours.qformer is not None
        text = self.words(words_RT) + self.order.weight[: words_RT.shape[1]]
        flat = memory.flatten(1, 2), known.flatten(1), ids
        return self.behaviours.qformer(*flat, text, words_RT > 0, sight)  # type: ignore[no-any-return]


@dataclass
class Group:
    """One level of a batch, as rows: items (R, K), words (R, T), and what belongs to which group. Its similarities are
    computed once: two tasks read them."""

    items: Tensor
    hidden: Tensor  # (R, K, M)
    words: Tensor
    there: Tensor  # (B, G)
    same: Tensor  # (B, G, G)
    draw: Tensor  # (B, G)
    found: Tensor | None = None

    @staticmethod
    def of(batch: Batch, level: str) -> Group:
        return Group(
            batch[f"{level}_items_BGK"].flatten(0, 1),
            batch[f"{level}_hidden_BGKM"].flatten(0, 1),
            batch[f"{level}_words_BGT"].flatten(0, 1),
            batch[f"{level}_there_BG"],
            batch[f"{level}_same_BGG"],
            batch[f"{level}_draw_BG"],
        )

    def similarity(self, aligner: Aligner) -> Tensor:
        """(B, G, G): the best of a row's queries against each text of its group, times the learned scale."""
        if self.found is not None:
            return self.found
        queries, texts = aligner.encode(self.items, self.hidden, self.words, "apart")
        batch, size = self.there.shape
        q = F.normalize(aligner.query_out(queries).float(), dim=-1)
        t = F.normalize(aligner.text_out(texts[:, 0]).float(), dim=-1)
        q, t = q.view(batch, size, *q.shape[1:]), t.view(batch, size, t.shape[1])
        scale = aligner.log_scale.float().clamp(0.0, math.log(100.0)).exp()
        self.found = scale * torch.einsum("bgqo,bho->bghq", q, t).amax(dim=-1)
        return self.found


Groups = Mapping[str, Group]


def groups_of(batch: Batch) -> Groups:
    """Both levels of a batch."""
    return {level: Group.of(batch, level) for level in ("behaviour", "window")}


def contrastive(similarity_BGG: Tensor, there_BG: Tensor, same_BGG: Tensor) -> Tensor:
    """The sum over the group's members of the mean cross-entropy of finding one's text, and a text its behaviour.

    A member with the same text is no negative; with nobody to be told apart from, a member gives 0.
    """
    size = similarity_BGG.shape[1]
    own = torch.eye(size, dtype=torch.bool, device=similarity_BGG.device)
    out = (same_BGG & ~own) | ~there_BG[:, None, :] | ~there_BG[:, :, None]
    total = similarity_BGG.new_zeros(())
    for scores in (similarity_BGG, similarity_BGG.transpose(1, 2)):
        scores = scores.masked_fill(out & ~own, NEVER)
        others = (~out & ~own).sum(dim=-1)
        log_p = scores.log_softmax(dim=-1)
        true = log_p.diagonal(dim1=1, dim2=2)
        rest = log_p.masked_fill(out | own, 0.0).sum(dim=-1) / others.clamp(min=1)
        loss = -(1 - SMOOTHING) * true - SMOOTHING * torch.where(others > 0, rest, true)
        total = total + (loss * there_BG).sum() / 2
    return total


def hard_negatives(similarity_BGG: Tensor, there_BG: Tensor, same_BGG: Tensor, draw_BG: Tensor) -> Tensor:
    """For each member the index in its group of another one, drawn from the softmax of its similarities (B, G); its
    own where there is no other."""
    size = similarity_BGG.shape[1]
    own = torch.eye(size, dtype=torch.bool, device=similarity_BGG.device)
    out = same_BGG | own | ~there_BG[:, None, :]
    chance = similarity_BGG.detach().masked_fill(out, NEVER).softmax(dim=-1)
    picked = (chance.cumsum(dim=-1) < draw_BG[..., None]).sum(dim=-1).clamp(max=size - 1)
    lonely = out.all(dim=-1)
    return torch.where(lonely, torch.arange(size, device=picked.device), picked)


def matching(logits_N2: Tensor, is_true_N: Tensor, weight_N: Tensor) -> Tensor:
    """The weighted sum of the two-class cross-entropy of pairs (behaviour, text)."""
    loss = F.cross_entropy(logits_N2.float(), is_true_N.long(), reduction="none")
    return (loss * weight_N).sum()


def generation(logits_RTV: Tensor, words_RT: Tensor, there_R: Tensor) -> Tensor:
    """The sum over texts of the mean negative log-likelihood of each next word."""
    following, seen = words_RT[:, 1:], words_RT[:, 1:] > 0
    loss = F.cross_entropy(logits_RTV[:, :-1].float().transpose(1, 2), following, reduction="none")
    each = (loss * seen).sum(dim=1) / seen.sum(dim=1).clamp(min=1)
    return (each * there_R).sum()


def _contrast(aligner: Aligner, group: Group) -> Tensor:
    return contrastive(group.similarity(aligner), group.there, group.same)


def _match(aligner: Aligner, group: Group) -> Tensor:
    """True pairs, behaviours with a hard negative text, and texts with a hard negative behaviour."""
    similarity = group.similarity(aligner).detach()
    batch, size = group.there.shape
    start = torch.arange(batch, device=similarity.device)[:, None] * size
    other_text = hard_negatives(similarity, group.there, group.same, group.draw)
    other_item = hard_negatives(similarity.transpose(1, 2), group.there, group.same, group.draw)
    own = torch.arange(size, device=similarity.device)
    usable = [(other != own).flatten() & group.there.flatten() for other in (other_text, other_item)]
    swapped = (start + other_item).flatten()
    items = torch.cat([group.items, group.items, group.items[swapped]])
    hidden = torch.cat([group.hidden, group.hidden, group.hidden[swapped]])
    words = torch.cat([group.words, group.words[(start + other_text).flatten()], group.words])
    queries, _ = aligner.encode(items, hidden, words, "both")
    logits = aligner.matches(queries).mean(dim=1)
    true = torch.arange(len(items), device=logits.device) < len(group.items)
    weight = torch.cat([group.there.flatten(), *usable]).float() / 3
    return matching(logits, true, weight)


def _generate(aligner: Aligner, group: Group) -> Tensor:
    _, texts = aligner.encode(group.items, group.hidden, group.words, "causal")
    return generation(aligner.word_out(texts), group.words, group.there.flatten())


def behaviour_contrastive(aligner: Aligner, groups: Groups) -> Tensor:
    """A behaviour finds its text among those of its group. Source: GTS-LUM, behaviour-text contrastive learning."""
    return _contrast(aligner, groups["behaviour"])


def behaviour_matching(aligner: Aligner, groups: Groups) -> Tensor:
    """Whether a text is the behaviour's. Source: GTS-LUM, behaviour-text matching."""
    return _match(aligner, groups["behaviour"])


def behaviour_generation(aligner: Aligner, groups: Groups) -> Tensor:
    """The behaviour's text, word by word. Source: GTS-LUM, behaviour-grounded text generation."""
    return _generate(aligner, groups["behaviour"])


def sequence_contrastive(aligner: Aligner, groups: Groups) -> Tensor:
    """K behaviours find the narrative of their window. Source: GTS-LUM, sequence-level contrastive learning."""
    return _contrast(aligner, groups["window"])


def sequence_matching(aligner: Aligner, groups: Groups) -> Tensor:
    """Whether a narrative is the window's. Source: GTS-LUM, sequence-level matching."""
    return _match(aligner, groups["window"])


def sequence_generation(aligner: Aligner, groups: Groups) -> Tensor:
    """The window's narrative, word by word. Source: GTS-LUM, sequence-level generation."""
    return _generate(aligner, groups["window"])


TASKS: dict[AlignTask, Callable[[Aligner, Groups], Tensor]] = {
    "behaviour_contrastive": behaviour_contrastive,
    "behaviour_matching": behaviour_matching,
    "behaviour_generation": behaviour_generation,
    "sequence_contrastive": sequence_contrastive,
    "sequence_matching": sequence_matching,
    "sequence_generation": sequence_generation,
}
