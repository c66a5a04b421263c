"""GTS-LUM: behaviours and their times as tokens, read by a (frozen) LLM, in two readings of the prefix.

R, retrieve: the prefix says the task and the profile; the state at the end of the history is the user embedding, and
is matched with each item's own embedding, without another pass. P, propensity: a candidate stands in front of the same
history, and a scalar head says how likely it follows; K candidates cost K passes. The true target is never in R's
prefix: see `GtsConfig.reading` for the literal reading, which leaks.

The arrays of a batch (`GtsStage.collate` makes them):
- `unique_U` catalogue indices of all items of the batch, `hidden_UM` which of their modalities this step hides;
  `place_*` below index them.
- `kind_BL`, `place_BL`, `descriptor_BL`, `slot_BL`, `gap_BL`, `group_BL`: the tokens, left-aligned; `length_B`.
- `profile_BP`: the row of the user's table, encoded.
- R: `query_sample_R`, `query_token_R` (position of the token that ends the history, -1: there is none), `positive_R`,
  `candidate_C` (places), `log_chance_U` (of being among the negatives), `masked_query_X`, `masked_column_X`, and the
  repeats as triplets `seen_query_S`,
  `seen_column_S` (0 the positive, 1 + c the candidate c), `seen_SF`.
- P: `asked_sample_P`, `asked_PK` (places, the true one first), `asked_log_chance_PK` (of being asked),
  `asked_seen_PKF`, `asked_known_PK`.

Legend: B samples, L tokens, D width of the LLM, O output width, U unique items, R queries of reading R, C candidates,
P samples of reading P, K candidates in front, F repeat features, S triplets, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lum_ray.gts.behaviours import Behaviours
from lum_ray.gts.collate import BEHAVIOUR, DESCRIPTOR, PAD, SEP
from lum_ray.gts.config import PREFIX, GtsConfig, GtsInputs
from lum_ray.gts.intervals import DESCRIPTORS, GAPS, descriptor_text
from lum_ray.gts.llm import Llm, load, state_scale, states
from lum_ray.gts.prior import Prior, negative_chance
from lum_ray.nn import MLP, Constants

Batch = Mapping[str, Tensor]
TERMS = ("retrieve", "propensity", "generate")
MAX_GROUPS = 256
SMALL = 0.1
"""Size at the start of what is added to a token, whose own numbers are of size 1."""


class Gts(nn.Module):
    """The whole network. `llm` may be handed in, so that it is loaded once."""

    def __init__(self, config: GtsConfig, inputs: GtsInputs, llm: Llm | None = None) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        self._catalogue: tuple[Tensor, Tensor] | None = None
        llm = llm or load(config)
        self.decoder, self.width = llm.decoder, llm.width
        self.word_size = llm.rms  # tokens are made of numbers of size 1, and scaled to the LLM's words as it reads them
        self.behaviours = Behaviours(config, inputs, llm.width)
        words = llm.mean_of_words([descriptor_text(code) for code in range(DESCRIPTORS)])
        self.descriptors = _started(words / llm.rms, frozen=config.timestamps == "text")
        self.moods = nn.Linear(llm.width, llm.width) if config.timestamps == "full" else None
        if self.moods is not None:
            nn.init.normal_(self.moods.weight, std=llm.width**-0.5)  # numbers of size 1 in and out
        self.slots, self.gaps = _table(config.slots, llm.width), _table(GAPS, llm.width)
        self.groups = _table(MAX_GROUPS, llm.width) if config.timestamps == "position" else None
        named = llm.mean_of_words(["recommend what comes next", "will this come next", "end of the moment", "nothing"])
        self.tasks = _started(named / llm.rms)  # retrieve, propensity, [SEP], no target
        self.target = nn.Parameter(torch.randn(llm.width) * SMALL)
        self.profile = nn.Linear(max(inputs.profile_width, 1), llm.width)
        self.user_out = nn.Linear(2 * llm.width, config.output_width)
        nn.init.zeros_(self.user_out.weight)  # so that the scores start as the prior's, without noise on top
        nn.init.zeros_(self.user_out.bias)
        # without a bias: it would be a part of every item's direction
        self.item_out = nn.Linear(llm.width, config.output_width, bias=False)
        self.own_norm = nn.LayerNorm(llm.width)
        center, spread = state_scale(llm.decoder, llm.width, llm.rms)
        self.usual = Constants({"center_D": center, "spread_D": spread}, persistent=True)
        self.log_scale = nn.Parameter(torch.zeros(1))  # DeepSpeed has no scalars
        self.prior = Prior(config.repeats)
        chance = negative_chance(np.exp(inputs.arrays["log_q_N"].astype(np.float64)), config.negatives)
        had = inputs.arrays["count_N"] > 0
        self.constants = Constants(
            {
                "log_q_N": torch.from_numpy(inputs.arrays["log_q_N"]),
                "chance_N": torch.from_numpy((chance * had).astype(np.float32)),
                "words_ND": _told_apart(words),
            },
            persistent=False,
        )
        self.propensity = MLP(2 * llm.width, config.output_width, 1, 1)
        assert self.propensity.out is not None
        nn.init.zeros_(self.propensity.out.weight)
        nn.init.zeros_(self.propensity.out.bias)
        levels = inputs.arrays["paths_ND"].shape[1]
        heads = (MLP(2 * llm.width, config.output_width, 1, config.branching) for _ in range(levels))
        self.digits = nn.ModuleList(heads)
        self.prefixes = nn.Embedding(self.behaviours.nodes.num_embeddings, 2 * llm.width)
        nn.init.zeros_(self.prefixes.weight)

    # the sequence

    def tokens(self, batch: Batch, fused_UD: Tensor) -> Tensor:
        """The embedded tokens (B, L, D), without a prefix. Source: GTS-LUM, timestamp processing.

        Departs: [SEP] carries what its slot held (the mean of its behaviours, as it is and times a vector that the
        descriptor's words say), its descriptor and its time ID, because states are read off there, and a few frozen
        layers bring little of it along by attention alone. From words, so that what is learned of Monday evening
        holds on Tuesday evening.
        """
        kind, how = batch["kind_BL"], self.config.timestamps
        behaviour = (kind == BEHAVIOUR)[..., None]
        x = F.embedding(batch["place_BL"], fused_UD) * behaviour
        descriptor = self.descriptors(batch["descriptor_BL"]).to(x.dtype) * (kind == DESCRIPTOR)[..., None]
        if how in ("full", "text"):
            held = self._of_group(batch, x) / self._of_group(batch, behaviour.to(x.dtype)).clamp(min=1)
            closing = held + self._of_group(batch, descriptor) + self.tasks.weight[2]
            if self.moods is not None:
                moods_ND = self.moods(self.constants["words_ND"].to(self.moods.weight.dtype))
                code = self._of_group(batch, batch["descriptor_BL"][..., None])[..., 0]
                closing = closing + held * F.embedding(code, moods_ND)
            x = x + descriptor + closing * (kind == SEP)[..., None]
        if how in ("full", "component"):
            time = self.slots(batch["slot_BL"]) + self.gaps(batch["gap_BL"])
            x = x + time * (kind != DESCRIPTOR)[..., None]
        if self.groups is not None:
            x = x + self.groups(batch["group_BL"].clamp(0, MAX_GROUPS - 1))
        return x.masked_fill((kind == PAD)[..., None], 0.0)

    @staticmethod
    def _of_group(batch: Batch, x_BLD: Tensor) -> Tensor:
        """For each token the sum of `x_BLD` over its group (B, L, D)."""
        group = batch["group_BL"].clamp(min=0)[..., None].expand(-1, -1, x_BLD.shape[2])
        sums = x_BLD.new_zeros(len(x_BLD), x_BLD.shape[1], x_BLD.shape[2]).scatter_add(1, group, x_BLD)
        return sums.gather(1, group)

    def prefix(self, batch: Batch, rows: Tensor, task: int, target_D: Tensor | None) -> Tensor:
        """(B', 3, D): the task, the target or its absence, the profile, for the samples `rows`.

        Departs: the target comes second. Trained LLMs make the first place an attention sink, whose content hardly
        reaches the places after it.
        """
        count = len(rows)
        nothing = self.tasks.weight[3].expand(count, -1)
        front = nothing if target_D is None else target_D + self.target
        profile = self.profile(batch["profile_BP"][rows].to(self.profile.weight.dtype))
        return torch.stack([self.tasks.weight[task].expand(count, -1), front.to(profile.dtype), profile], dim=1)

    def read(
        self, batch: Batch, x_BLD: Tensor, rows: Tensor, task: int, target_D: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """States and tokens (B', 3 + L (+ 1), D) of the samples `rows`; `target_D` stands in front, or behind the last
        token."""
        at_end = target_D is not None and self.config.target_position == "end"
        x = torch.cat([self.prefix(batch, rows, task, None if at_end else target_D), x_BLD[rows]], dim=1)
        if at_end and target_D is not None:
            x = torch.cat([x, x.new_zeros(len(rows), 1, x.shape[2])], dim=1)
            place = (PREFIX + batch["length_B"][rows])[:, None, None].expand(-1, 1, x.shape[2])
            x = x.scatter(1, place, (target_D + self.target).to(x.dtype)[:, None])
        return states(self.decoder, self.word_size * x), x

    def ends(self, found: tuple[Tensor, Tensor], index: Tensor, place: Tensor) -> Tensor:
        """What is read off (X, 2 D) of what `read` found: the LLM's state at `place`, and the token that stood there.

        Departs: a frozen LLM's state says what came before far more softly than the token, which holds the last slot.
        """
        states_BTD, x_BTD = found
        scaled_XD = (states_BTD[index, place] - self.usual["center_D"]) / self.usual["spread_D"]
        state_XD = scaled_XD.to(states_BTD.dtype)
        return torch.cat([state_XD, self.own_norm(x_BTD[index, place]).to(state_XD.dtype)], dim=-1)

    def last(self, batch: Batch, rows: Tensor, found: tuple[Tensor, Tensor], with_target: bool) -> Tensor:
        """`ends` at the last token that is no pad (B', 2 D)."""
        behind = with_target and self.config.target_position == "end"
        place = PREFIX + batch["length_B"][rows] - int(not behind)
        return self.ends(found, torch.arange(len(rows), device=place.device), place)

    # what comes out

    def user(self, state_RD: Tensor) -> Tensor:
        """User embeddings (R, O). Departs: their length is free, it says how sure they are; with a cosine a user of
        whom little is known still must point somewhere, and what the temperature then learns is to keep still."""
        found: Tensor = self.user_out(state_RD).float()
        return found

    def item(self, fused_UD: Tensor) -> Tensor:
        """Item embeddings (U, O) of length 1, without the LLM."""
        return F.normalize(self.item_out(fused_UD).float(), dim=-1)

    def train(self, mode: bool = True) -> Gts:
        """Switching to training forgets what `catalogue` keeps."""
        self._catalogue = None if mode else getattr(self, "_catalogue", None)
        return super().train(mode)

    def catalogue(self, at_once: int = 4096) -> tuple[Tensor, Tensor]:
        """b^F (N, D) and the embeddings (N, O) of all items, without gradients; computed once in evaluation mode."""
        if self._catalogue is None or self.training:
            place = self.log_scale.device
            with torch.no_grad():
                parts = torch.split(torch.arange(self.inputs.count, device=place), at_once)
                gathered = torch.cat([self.behaviours.gathered(part) for part in parts])
                fused = self.behaviours(gathered, gathered, self.constants["chance_N"])
                self._catalogue = (fused, self.item(fused))
        return self._catalogue

    def scale(self) -> Tensor:
        """The learned inverse temperature, within [.01, 100]."""
        return self.log_scale.float().clamp(-math.log(100.0), math.log(100.0)).exp()

    def losses(self, batch: Batch) -> Tensor:
        """The sums (3,) of the terms over the batch: see TERMS."""
        gathered_UF = self.behaviours.gathered(batch["unique_U"], batch["hidden_UM"])
        fused_UD = self.behaviours(gathered_UF, gathered_UF[batch["candidate_C"]])
        x_BLD = self.tokens(batch, fused_UD)
        zero = x_BLD.float().sum() * 0.0 + self.propensity.out.weight.sum() * 0.0  # type: ignore[union-attr]
        retrieve, generate, asked = zero, zero, zero
        if len(batch["query_sample_R"]):
            retrieve, generate = self._retrieve(batch, fused_UD, x_BLD)
        if len(batch["asked_sample_P"]):
            logits = self.ask(batch, fused_UD, x_BLD) - batch["asked_log_chance_PK"]
            asked = F.cross_entropy(logits, torch.zeros_like(batch["asked_sample_P"]), reduction="sum")
        return torch.stack([retrieve + zero, asked + zero, generate + zero])

    def _retrieve(self, batch: Batch, fused_UD: Tensor, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        rows, index = torch.unique(batch["query_sample_R"], return_inverse=True)
        literal = fused_UD[batch["literal_B"][rows]] if self.config.reading == "literal" else None
        found = self.read(batch, x_BLD, rows, 0, literal)
        if literal is not None and self.config.target_position == "end":
            state_RD = self.last(batch, rows, found, True)[index]
        else:
            state_RD = self.ends(found, index, PREFIX + batch["query_token_R"])
        users_RO, items_UO = self.user(state_RD), self.item(fused_UD)
        chance_U, candidate_C = batch["log_chance_U"], batch["candidate_C"]
        positive_R = batch["positive_R"]
        popular_U = self.prior.popular(self.constants["log_q_N"][batch["unique_U"]]) - chance_U
        own = (users_RO * items_UO[positive_R]).sum(-1, keepdim=True) * self.scale() + popular_U[positive_R][:, None]
        others = self.scale() * users_RO @ items_UO[candidate_C].T + popular_U[candidate_C]
        logits = torch.cat([own, others], dim=1)
        if self.config.repeats and len(batch["seen_query_S"]):
            at = (batch["seen_query_S"], batch["seen_column_S"])
            logits = logits.index_put(at, self.prior.repeated(batch["seen_SF"]), accumulate=True)
        logits = logits.index_put((batch["masked_query_X"], batch["masked_column_X"]), logits.new_tensor(-1e9))
        retrieve = F.cross_entropy(logits, torch.zeros_like(positive_R), reduction="sum")
        if not self.config.generation:
            return retrieve, retrieve * 0.0
        levels = self.generate(state_RD, batch["unique_U"][positive_R])
        paths = self.behaviours.constants["digits_NL"][batch["unique_U"][positive_R]]
        parts = [F.cross_entropy(level, paths[:, i], reduction="sum") for i, level in enumerate(levels)]
        return retrieve, torch.stack(parts).mean()

    def ask(self, batch: Batch, fused_UD: Tensor, x_BLD: Tensor) -> Tensor:
        """Reading P: the logit (P, K) that each candidate in front of the sample's history follows it."""
        count, width = batch["asked_PK"].shape
        rows = batch["asked_sample_P"].repeat_interleave(width)
        candidates = fused_UD[batch["asked_PK"].flatten()]
        found = self.read(batch, x_BLD, rows, 1, candidates)
        logits = self.follows(self.last(batch, rows, found, True), candidates).view(count, width)
        logits = logits + self.prior.popular(self.constants["log_q_N"][batch["unique_U"][batch["asked_PK"]]])
        if not self.config.repeats:
            return logits
        return logits + self.prior.repeated(batch["asked_seen_PKF"]) * batch["asked_known_PK"]

    def follows(self, state_XD: Tensor, candidate_XD: Tensor) -> Tensor:
        """The logit (X,) of a candidate in front (its b^F) from the last state: a scalar head, and the match of that
        state with the candidate's embedding, as in reading R, so that P starts from what R knows. R alone trains the
        match: P's few candidates, each weighed by its chance of being asked, would drown R's many in noise."""
        match = (self.user(state_XD) * self.item(candidate_XD)).sum(-1) * self.scale()
        return self.propensity(state_XD).float()[..., 0] + match.detach()  # type: ignore[no-any-return]

    def generate(self, state_RD: Tensor, items_R: Tensor) -> list[Tensor]:
        """Logits (R, branching) of each level of the semantic ID, given the digits of the levels before.

        The path so far enters through an embedding of its node. Source: GTS-LUM, autoregressive head.
        """
        nodes_RL = self.behaviours.constants["nodes_NL"][items_R]
        hidden = state_RD
        logits = []
        for level, head in enumerate(self.digits):
            if level:
                hidden = hidden + self.prefixes(nodes_RL[:, level - 1]).to(hidden.dtype)
            logits.append(head(hidden).float())
        return logits


def _table(count: int, width: int) -> nn.Embedding:
    table = nn.Embedding(count, width)
    nn.init.normal_(table.weight, std=SMALL)
    return table


def _told_apart(words_ND: Tensor) -> Tensor:
    """Descriptors without what all their words share, each with numbers of size 1; the first, of no time, is 0."""
    apart = words_ND - words_ND[1:].mean(dim=0)
    apart = apart / apart.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
    apart[0] = 0.0
    return apart


def _started(words_ND: Tensor, frozen: bool = False) -> nn.Embedding:
    """A table that starts as `words_ND`."""
    count, width = words_ND.shape
    return nn.Embedding(count, width, _weight=words_ND, _freeze=frozen)
