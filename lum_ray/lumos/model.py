"""LUMOS: a transformer over the past days whose queries are the known future days.

A batch is a mapping of tensors (numpy arrays of these names and dtypes made by collate). Legend:
B windows, T history_days, A active days of the batch, U behaviours, E distinct event rows, S event_width,
C cuts per window (or what-if scenarios), X = inputs.days_ahead(F) future days, F future_days, H horizon targets,
V = U + D daily targets, N numbers, G categories, K = V + H terms, D width, Q = F + H queries of a cut.

  values_AU          int64    stored integers of the active days
  slot_A             int64    where each belongs: b * T + t, each slot at most once
  pads_B             int64    how many leading days of the window lie before the user existed
  numbers_BN         float32  NaN: missing
  categories_BG      int64    0: missing or unknown, 1.. : position in the vocabulary + 1
  event_rows_ES      float32  distinct days of the calendar, weekday and season first
  history_event_BT   int64    the event row of each day of the window
  future_event_BCX   int64    the event row of each future day of each cut
  visible_BC         int64    a cut sees positions < visible (the paper: C = 1 and visible = T). Other values than T
                              need `causal`; without it several entries of C are scenarios of the same cut
and for the loss
  daily_BCFV         float32  targets in stored units, NaN where unknown
  horizon_BCH        float32  likewise
  valid_BC           bool     whether the sample is there at all
  counts_K           float64  losses.counts of the batch, for the loop
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lum_ray.lumos.config import Inputs, LumosConfig
from lum_ray.lumos.losses import Objective
from lum_ray.lumos.tokens import Tokenizer
from lum_ray.nn import (
    MLP,
    Constants,
    CrossAttention,
    EncoderLayer,
    HeadBank,
    KeysValues,
    Rotation,
    SelfAttention,
    SwiGLU,
    decays,
    rotation,
    sinusoidal,
)

Batch = Mapping[str, Tensor]
HIDDEN_PAD = -1e4
"""Score of a pad that is not to be attended to: finite, so that a window of pads alone still has weights."""


WEEKDAYS, WEEKDAY_START, EVENT_START = 7, 4.0, 5.0


def match_starts(heads: int, inputs: Inputs) -> Tensor:
    """Where `day_match` starts (M, S): of the heads with the longest decays, one reads days with the same events and
    the others days of the same weekday; the shorter half starts without. See tuning/LOG.md for what was tried."""
    start_MS = torch.zeros(heads, inputs.event_width)
    rhythm = inputs.rhythm_width
    for rank, head in enumerate(range(heads - 1, (heads - 1) // 2, -1)):
        if rank == 1 and inputs.event_types:
            start_MS[head, rhythm : rhythm + len(inputs.event_types)] = EVENT_START
        elif rhythm >= WEEKDAYS:
            start_MS[head, :WEEKDAYS] = WEEKDAY_START
    return start_MS


class Memory(NamedTuple):
    """An encoded history, to be decoded as often as wanted (what-if)."""

    states_BTD: Tensor
    keys_values: tuple[KeysValues, ...]
    """Of each decoder layer."""
    pad_BT: Tensor
    days_BTS: Tensor | None
    """Event rows of the past days, where `day_match` compares them with the future's."""
    raw_BTU: Tensor | None
    """The scaled behaviours of the past days, where `recent_days` reads some of them."""
    events_BTS: Tensor | None
    """Events of the past days, without the rhythm, where `calendar_days` reads some of them."""


class DecoderLayer(nn.Module):
    """Pre-norm cross-attention and SwiGLU; no self-attention, so that each future day stands alone (unless
    `self_attention`, an ablation). Source: LUMOS, eqs. 2 to 6."""

    def __init__(self, config: LumosConfig, gain: float, behaviours: int) -> None:
        super().__init__()
        self.cross_norm, self.swiglu_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        raw_width = behaviours * config.raw_values
        self.cross = CrossAttention(
            config.width, config.heads, gain=gain, raw_width=raw_width, raw_logs=config.raw_logs
        )
        self.swiglu = SwiGLU(config.width, config.swiglu_width)
        among = config.decoder_self_attention
        self.among_norm = nn.LayerNorm(config.width) if among else None
        self.among = SelfAttention(config.width, config.heads) if among else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BCQD: Tensor, memory: KeysValues, bias: Tensor | None, turned: Rotation | None, plain: bool
    ) -> Tensor:
        shape = x_BCQD.shape
        if self.among is not None and self.among_norm is not None:
            x_BCQD = x_BCQD + self.dropout(self.among(self.among_norm(x_BCQD), plain=plain))
        x = x_BCQD.flatten(1, 2)
        x = x + self.dropout(self.cross(self.cross_norm(x), memory, bias, turned, plain))
        x = x + self.dropout(self.swiglu(self.swiglu_norm(x), plain))
        result: Tensor = x.view(shape)
        return result


class Lumos(nn.Module):
    """The model. `forward(batch)` gives daily_BCFVP and horizon_BCHP (see `losses.Objective` for what the P outputs
    mean), `loss(batch)` the objective's sums and counts."""

    def __init__(self, config: LumosConfig, inputs: Inputs) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        width, queries = config.width, config.future_days + len(inputs.horizons)
        # with learned lags, scores start small, so that the decays decide at first
        gain = 0.1 if config.lag_logits else 1.0
        self.tokenizer = Tokenizer(config, inputs)
        self.future = MLP(inputs.event_width, config.embedding, config.embed_layers, width)
        self.horizon_HD = nn.Parameter(torch.zeros(len(inputs.horizons), width)) if inputs.horizons else None
        past, future = config.positions == "learned", config.positions in ("learned", "lags")
        self.position_TD = nn.Parameter(torch.zeros(config.history_days, width)) if past else None
        self.position_FD = nn.Parameter(torch.zeros(config.future_days, width)) if future else None
        recent = config.recent_days * len(inputs.behaviours)
        self.recent = nn.Linear(recent, width) if recent else None
        calendar = config.calendar_days + inputs.days_ahead(config.future_days)
        calendar *= (inputs.event_width - inputs.rhythm_width) * (config.calendar_days > 0)
        self.calendar = MLP(calendar, config.embedding, 1, queries * width) if calendar else None
        self.time2vec = nn.Linear(1, width) if config.positions == "time2vec" else None
        self.input_dropout = nn.Dropout(config.input_dropout)
        own_heads = config.encoder_heads or config.heads
        self.encoder = nn.ModuleList(
            EncoderLayer(width, own_heads, config.swiglu_width, config.dropout, gain if config.causal else 1.0)
            for _ in range(config.encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(
            DecoderLayer(config, gain, len(inputs.behaviours)) for _ in range(config.decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(width)
        self.lag_MQT: nn.Parameter | None = None
        if config.lag_logits:
            start = -torch.arange(1, config.history_days + 1) / decays(config.heads)[:, None]
            self.lag_MQT = nn.Parameter(start[:, None].repeat(1, queries, 1))
        self.match_MS = nn.Parameter(match_starts(config.heads, inputs)) if config.day_match else None
        self.objective = Objective(config, inputs)
        self.heads = HeadBank(len(inputs.terms), width, self.objective.outputs, inputs.starts)
        events = torch.arange(inputs.event_width) >= inputs.rhythm_width
        self.constants = Constants({"event_S": events, "decay_M": decays(own_heads)}, persistent=False)

    def forward(self, batch: Batch, plain: bool = False) -> dict[str, Tensor]:
        """Both ways compute the same from the same weights; `plain` is dense, as the paper writes it."""
        memory = self.encode(batch, plain)
        return self.decode(memory, batch["event_rows_ES"], batch["future_event_BCX"], batch["visible_BC"], plain)

    def loss(self, batch: Batch, plain: bool = False) -> tuple[Tensor, Tensor]:
        """(sums_K with gradient, counts_K), see `losses.Objective`."""
        return self.objective(self.forward(batch, plain), batch)  # type: ignore[no-any-return]

    def encode(self, batch: Batch, plain: bool = False) -> Memory:
        """The history, encoded; independent of anything in the future."""
        config = self.config
        index_BT = batch["history_event_BT"]
        position_T = torch.arange(config.history_days, device=index_BT.device)
        if index_BT.shape[1] != config.history_days:
            raise ValueError(
                f"history_event_BT: expected {config.history_days} days a window, got {index_BT.shape[1]}; "
                "collate and model must use the same lumos.history_days"
            )
        pad_BT = position_T < batch["pads_B"][:, None]
        rows_ES = self._event_rows(batch["event_rows_ES"], config.past_events)
        x_BTD = self.tokenizer(batch, rows_ES, pad_BT, plain)
        added = self.position_TD if self.position_TD is not None else self._positions(position_T)
        if added is not None:
            x_BTD = x_BTD + added.to(x_BTD.dtype)
        x_BTD = self.input_dropout(x_BTD)
        bias, causal = self._encoder_bias(pad_BT)
        turned = self._rotation(position_T)
        for layer in self.encoder:
            x_BTD = layer(x_BTD, bias, causal, turned, plain)
        states_BTD = self.encoder_norm(x_BTD)
        raw = self.tokenizer.activity(batch, pad_BT) if config.raw_values or config.recent_days else None
        averaged = raw if config.raw_values else None
        kept = tuple(layer.cross.keys_values(states_BTD, turned, plain, averaged) for layer in self._decoder_layers())
        days_BTS = F.embedding(index_BT, rows_ES.clamp(-1, 1)) if config.day_match else None
        events_BTS = F.embedding(index_BT, rows_ES[:, self.inputs.rhythm_width :]) if self.calendar else None
        return Memory(states_BTD, kept, pad_BT, days_BTS, raw if config.recent_days else None, events_BTS)

    def decode(
        self,
        memory: Memory,
        event_rows_ES: Tensor,
        future_event_BCX: Tensor,
        visible_BC: Tensor,
        plain: bool = False,
        attention: bool = False,
    ) -> dict[str, Tensor]:
        """Predictions for C cuts, or C scenarios of one cut, of each encoded window.

        With `attention` also attention_BCFT: how much of each past day each future day reads, the mean over heads.
        """
        states, weights = self._decoded(memory, event_rows_ES, future_event_BCX, visible_BC, plain, weights=attention)
        future, daily, terms = self.config.future_days, self.inputs.daily, len(self.inputs.terms)
        windows, cuts = states.shape[:2]
        days = self.heads(states[:, :, :future].flatten(0, 2), 0, daily, plain)
        over = self.heads(states[:, :, future:].flatten(0, 1).transpose(0, 1), daily, terms, plain)
        found = {
            "daily_BCFVP": days.transpose(0, 1).reshape(windows, cuts, future, *days.shape[::2]),
            "horizon_BCHP": over.transpose(0, 1).reshape(windows, cuts, *over.shape[::2]),
        }
        if attention:
            mean_BQT = weights.float().mean(1)
            found["attention_BCFT"] = mean_BQT.view(windows, cuts, -1, mean_BQT.shape[-1])[:, :, :future]
        return found

    def attention(self, batch: Batch) -> Tensor:
        """Weights (B, M, C * Q, T) of the last decoder layer: for each head M and query (the F future days, then the H
        horizons, cut by cut) how much of each past day it reads (Source: LUMOS, figure 4)."""
        events, future, visible = batch["event_rows_ES"], batch["future_event_BCX"], batch["visible_BC"]
        _, weights = self._decoded(self.encode(batch), events, future, visible, False, weights=True)
        return weights

    def embed(self, batch: Batch) -> Tensor:
        """User embeddings (B, D) float32: the mean of the encoder's states over the days on which the user existed
        (all days if there is none). A mean, since with bidirectional attention no single day stands for the rest."""
        memory = self.encode(batch)
        there = (~memory.pad_BT).float()
        there = torch.where(there.sum(1, keepdim=True) > 0, there, torch.ones_like(there))
        return (memory.states_BTD.float() * there[..., None]).sum(1) / there.sum(1, keepdim=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For the optimiser: matrices decay (`weight_decay` 1); vectors, positions, lags, uncertainties do not (0)."""
        still = ("position_", "lag_", "match_", "horizon_", "u_pad", "categories", "objective", "biases")
        decayed: list[Tensor] = []
        kept: list[Tensor] = []
        for name, parameter in self.named_parameters():
            free = parameter.dim() < 2 or any(part.startswith(still) for part in name.split("."))
            (kept if free else decayed).append(parameter)
        return [{"params": decayed, "weight_decay": 1.0}, {"params": kept, "weight_decay": 0.0}]

    def _decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.decoder if isinstance(layer, DecoderLayer)]

    def _decoded(
        self,
        memory: Memory,
        event_rows_ES: Tensor,
        future_event_BCX: Tensor,
        visible_BC: Tensor,
        plain: bool,
        weights: bool,
    ) -> tuple[Tensor, Tensor]:
        """States (B, C, Q, D) of the queries; with `weights` also the last layer's attention (else an empty tensor)."""
        future = self.config.future_days
        rows_ES = self._event_rows(event_rows_ES, bool(self.config.future_events))
        if plain:
            known_BCXD = self.future(rows_ES[future_event_BCX])
        else:
            known_BCXD = F.embedding(future_event_BCX, self.future(rows_ES))
        queries = [known_BCXD[:, :, :future]]
        queries += [known_BCXD[:, :, : horizon.days].mean(2, keepdim=True) for horizon in self.inputs.horizons]
        visible_BC = visible_BC.clamp(min=1)
        step_Q = torch.arange(future + len(self.inputs.horizons), device=visible_BC.device)
        place_BCQ = visible_BC[..., None] + torch.where(step_Q < future, step_Q, 0)
        x = torch.cat(queries, dim=2)
        days_FD = self.position_FD if self.position_FD is not None else x.new_zeros(future, self.config.width)
        x = x + (torch.cat([days_FD, self.horizon_HD]) if self.horizon_HD is not None else days_FD).to(x.dtype)
        if self.recent is not None and memory.raw_BTU is not None:
            recent = self._recent_days(memory.raw_BTU, visible_BC, self.config.recent_days)
            x = x + self.recent(recent.to(x.dtype))[:, :, None]
        if self.calendar is not None and memory.events_BTS is not None:
            before = self._recent_days(memory.events_BTS, visible_BC, self.config.calendar_days)
            ahead = F.embedding(future_event_BCX, rows_ES[:, self.inputs.rhythm_width :]).flatten(2)
            x = x + self.calendar(torch.cat([before.expand(-1, ahead.shape[1], -1), ahead], dim=-1)).view(x.shape)
        added = self._positions(place_BCQ)
        x = x + added.to(x.dtype) if added is not None else x
        bias = self._cross_bias(memory, visible_BC)
        if self.match_MS is not None and memory.days_BTS is not None:
            ahead_BCXS = F.embedding(future_event_BCX, rows_ES)
            days = [ahead_BCXS[:, :, :future]]
            days += [ahead_BCXS[:, :, : horizon.days].mean(2, keepdim=True) for horizon in self.inputs.horizons]
            sought = torch.cat(days, dim=2).clamp(-1, 1).flatten(1, 2)[:, None] * self.match_MS[:, None].to(x.dtype)
            # counts and values are held to [-1, 1] here: three campaigns on a day must not take the whole attention
            alike = sought @ memory.days_BTS[:, None].transpose(-1, -2)
            bias = alike if bias is None else bias + alike
        turned = self._rotation(place_BCQ.flatten(1)[:, None])
        seen = x.new_zeros(0)
        for index, (layer, keys_values) in enumerate(zip(self._decoder_layers(), memory.keys_values, strict=True)):
            if weights and index == len(self.decoder) - 1:
                seen = layer.cross.weights(layer.cross_norm(x.flatten(1, 2)), keys_values, bias, turned)
            x = layer(x, keys_values, bias, turned, plain)
        return self.decoder_norm(x), seen

    def _recent_days(self, past_BTU: Tensor, visible_BC: Tensor, days: int) -> Tensor:
        """What is known of the `days` days before each cut, oldest first, 0 before the window: (B, C, days * U).

        Without `causal` every cut sees the whole window.
        """
        cuts = visible_BC.shape[1]
        last_BC = visible_BC if self.config.causal else torch.full_like(visible_BC, self.config.history_days)
        padded = F.pad(past_BTU, (0, 0, days, 0))
        day_BCR = last_BC[..., None] + torch.arange(days, device=last_BC.device)
        index = day_BCR.flatten(1)[..., None].expand(-1, -1, past_BTU.shape[2])
        return padded.gather(1, index).view(len(past_BTU), cuts, -1)

    def _event_rows(self, event_rows_ES: Tensor, events: bool) -> Tensor:
        rows = event_rows_ES if events else event_rows_ES.masked_fill(self.constants["event_S"], 0.0)
        return rows.to(self.tokenizer.project_in.weight.dtype)

    def _positions(self, position: Tensor) -> Tensor | None:
        """What is added to tokens at positions (...), 0 being the window's first day: (..., D)."""
        if self.config.positions == "sinusoidal":
            return sinusoidal(position, self.config.width)
        if self.time2vec is not None:  # Source: Time2Vec, eq. 1: the first number is linear, the others periodic
            line = self.time2vec(position[..., None].to(self.time2vec.weight.dtype))
            return torch.cat([line[..., :1] / self.config.history_days, line[..., 1:].sin()], dim=-1)
        return None

    def _rotation(self, position: Tensor) -> Rotation | None:
        return rotation(position, self.config.width // self.config.heads) if self.config.positions == "rope" else None

    def _encoder_bias(self, pad_BT: Tensor) -> tuple[Tensor | None, bool]:
        """(what is added to the scores, whether later days are hidden by the attention itself)."""
        config = self.config
        bias: Tensor | None = None
        if config.causal and config.lag_logits:
            day = torch.arange(config.history_days, device=pad_BT.device)
            lag = (day[:, None] - day).float()
            bias = -lag / self.constants["decay_M"][:, None, None]
            bias = bias.masked_fill(lag < 0, -torch.inf)[None]
        if config.pad == "masked":
            hidden = (pad_BT * HIDDEN_PAD)[:, None, None]
            if bias is None and config.causal:
                bias = hidden.new_full((config.history_days, config.history_days), -torch.inf).triu(1)
            bias = hidden if bias is None else bias + hidden
        return bias, config.causal and bias is None

    def _cross_bias(self, memory: Memory, visible_BC: Tensor) -> Tensor | None:
        """What is added to the decoder's scores, broadcastable to (B, M, C * Q, T); None: nothing."""
        history, cuts = self.config.history_days, visible_BC.shape[1]
        queries = self.config.future_days + len(self.inputs.horizons)
        bias: Tensor | None = None
        # without `causal` every cut sees the whole window (see the legend), so all rows share one set of lags
        last = visible_BC if self.config.causal else visible_BC.new_full((1, 1), history)
        lag_bct = last[..., None] - 1 - torch.arange(history, device=visible_BC.device)
        if self.lag_MQT is not None:
            known = self.lag_MQT.flatten(0, 1).t()
            table = torch.cat([torch.full_like(known, -torch.inf), known])  # the first half: days after the cut
            bias = F.embedding(lag_bct + history, table)
            bias = bias.view(*lag_bct.shape, self.config.heads, queries)
            bias = bias.permute(0, 3, 1, 4, 2).expand(-1, -1, cuts, -1, -1).flatten(2, 3)
        elif self.config.causal:
            bias = torch.where(lag_bct < 0, -torch.inf, 0.0)[:, None, :, None]
            bias = bias.expand(-1, -1, -1, queries, -1).flatten(2, 3)
        if self.config.pad in ("masked", "unread"):
            hidden = (memory.pad_BT * HIDDEN_PAD)[:, None, None]
            bias = hidden if bias is None else bias + hidden
        return bias
