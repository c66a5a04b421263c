"""LUMOS's section of a run file, and what the model must know of the data.

Defaults are the paper's `lumos_paper` (Source: LUMOS, sections 3.2, 3.3 and 3.5); what goes beyond it says `Departs:`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lum_ray.data.windows import DerivedTarget, HorizonTarget


@dataclass(frozen=True)
class LumosConfig:
    """`lumos:` of a run file. Raises ValueError that names the field for an impossible value."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    history_days: int = 360
    future_days: int = 7
    width: int = 512
    heads: int = 8
    encoder_heads: int | None = None
    """Heads of the encoder; None: `heads`. With `lag_logits` the decoder's heads are windows of different lengths and
    want to be many, while on a CPU the encoder's cost most of a step."""
    encoder_layers: int = 6
    decoder_layers: int = 1
    swiglu_width: int = 512
    """The paper does not give it: 512 leads to its 20.8 M parameters; 1365 is the usual 8/3 of the width."""
    embed_width: int | None = None
    """Width of the modality embeddings; None: `width`."""
    embed_layers: int = 1
    """Hidden ReLU layers of each modality's MLP. Its linear output layer is not built: the projection's first layer,
    which is linear too, follows at once."""
    dropout: float = 0.0
    """On what each block adds to the residual stream. Not on attention weights: on a CPU drawing B * heads * T * T
    random numbers costs more than the attention itself."""
    input_dropout: float = 0.0
    """On the daily tokens."""
    positions: Literal["learned", "sinusoidal", "rope", "time2vec", "lags"] = "learned"
    """Departs: `lags` learns positions of future days only. With several cuts in a window a past day has no one
    position; `lag_logits` tell how long before each cut it was."""
    pad: Literal["learned", "zero", "unread", "masked"] = "learned"
    """Days before the user existed: a learned vector u_pad (the paper), the zero day, or, Departs: `unread`, u_pad
    but hidden from the decoder (as cheap as the paper's), or `masked`, not attended to at all (a bias for each window,
    which costs B * heads * T * T numbers)."""
    past_events: bool = True
    """Whether calendar events reach the history (weekday and season do in any case)."""
    future_events: bool | Literal["shuffled"] = True
    """Whether calendar events reach the queries of future days (weekday and season do in any case). Departs:
    `shuffled` shows them those of other weeks (see `collate.shuffled`), an ablation only."""
    weekday: bool = True
    season: bool = True
    static: bool = True
    loss_weighting: Literal["uncertainty", "sum", "geometric"] = "uncertainty"
    """How the terms' losses become one: the paper's eq. 7, their plain sum, or, Departs: `geometric`, each over the
    loss of its best constant (see `losses.Objective` for why that stands for the geometric loss)."""
    continuous: Literal["point", "lognormal"] = "point"
    """Departs: `lognormal` predicts (mu, log sigma) of a number's logarithm instead of one number."""
    learned_mape: bool = False
    """Departs: with `lognormal`, one more output corrects the forecast with the least percentage error, which a
    log-normal implies and real amounts miss; trained on that error itself, it moves neither mu nor sigma."""
    decoder_self_attention: bool = False
    """Departs: future days see each other; an ablation only."""
    causal: bool = False
    """Departs: a day's state sees no later day, so that one pass over a history serves several cuts."""
    cuts_per_window: int = 1
    """Departs: cuts supervised by one encoder pass over one window; the last one is the window's end."""
    cut_stride_days: int = 7
    """Days between the cuts of one window."""
    lag_logits: bool = False
    """Departs: a learned bias per (head, query, days before the cut) on the decoder's attention scores, started as
    exponential decays of several lengths; with `causal` the encoder's scores get fixed decays (as ALiBi)."""

    day_match: bool = False
    """Departs: a learned bias on the decoder's scores for past days that are like the future day: for each head and
    number of an event row, weight * future day's number * past day's. Some heads start by reading days of the same
    weekday, some days with the same events; without it who is active on which days stays unlearned for long."""
    raw_values: bool = False
    """Departs: the decoder's attention averages the scaled behaviours of the days too, beside their encoded states, so
    that a behaviour that is rare need not first be learned through the encoder to be counted."""
    recent_days: int = 0
    """Departs: the behaviours of so many days before the cut join the queries of future days as they are, day by day:
    decaying averages blur yesterday with the day before."""
    calendar_days: int = 0
    """Departs: with more than 0, the events of so many days before the cut and of all days ahead join every query as
    they are, day by day. A horizon's query alone averages its days, in which one deadline of 28 fades, and none knows
    how long ago the last was. A future day is then no longer told of its own events alone."""
    raw_logs: bool = False
    """Departs: these averages are read on logarithmic scales too (see `nn.CrossAttention`); needs `raw_values`."""

    def __post_init__(self) -> None:
        for name in (
            "history_days",
            "future_days",
            "width",
            "heads",
            "encoder_layers",
            "decoder_layers",
            "swiglu_width",
            "embed_layers",
            "cuts_per_window",
            "cut_stride_days",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.embed_width is not None and self.embed_width < 1:
            raise ValueError(f"embed_width: expected at least 1, or null for `width`, got {self.embed_width}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads ({self.heads}), got {self.width}")
        if self.encoder_heads is not None and (self.encoder_heads < 1 or self.width % self.encoder_heads):
            raise ValueError(f"encoder_heads: expected a divisor of width ({self.width}), got {self.encoder_heads}")
        if self.positions == "rope" and self.encoder_heads not in (None, self.heads):
            raise ValueError(f"encoder_heads: rope turns all heads alike; leave it out, or {self.heads}")
        if self.positions == "rope" and (self.width // self.heads) % 2:
            raise ValueError(f"positions: rope needs an even width per head, got {self.width} / {self.heads}")
        if self.positions == "lags" and not self.lag_logits:
            raise ValueError("positions: `lags` needs lag_logits: true, else nothing tells past days apart")
        for name in ("recent_days", "calendar_days"):
            if not 0 <= getattr(self, name) <= self.history_days:
                raise ValueError(f"{name}: expected 0 to history_days ({self.history_days}), got {getattr(self, name)}")
        if self.learned_mape and self.continuous != "lognormal":
            raise ValueError("learned_mape: needs continuous: lognormal, whose forecast it corrects")
        if self.raw_logs and not self.raw_values:
            raise ValueError("raw_logs: needs raw_values: true, there is nothing else to read")
        for name in ("dropout", "input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share in [0, 1), got {getattr(self, name)}")
        if self.cuts_per_window > 1 and not self.causal:
            raise ValueError(
                f"cuts_per_window: {self.cuts_per_window} cuts of one window need causal: true, "
                "else the states before a cut have seen the days after it"
            )
        if (self.cuts_per_window - 1) * self.cut_stride_days >= self.history_days:
            raise ValueError(
                f"cut_stride_days: {self.cuts_per_window} cuts every {self.cut_stride_days} days do not "
                f"fit into {self.history_days} days of history; take fewer cuts or a shorter stride"
            )

    @property
    def embedding(self) -> int:
        """Width of a modality's embedding."""
        return self.embed_width if self.embed_width is not None else self.width


@dataclass(frozen=True)
class BehaviourInput:
    """One daily behaviour: a stored integer v means v * resolution; the model reads transform(v * resolution) / scale.

    `gate` is the index of the binary behaviour without which its value is not counted. `scale` (> 0) is a typical size
    after the transform: the deviation over all user-days, of binary ones too, trains best.
    """

    name: str
    kind: Literal["binary", "continuous", "count"]
    resolution: float = 1.0
    gate: int | None = None
    transform: Literal["identity", "log1p"] = "identity"
    scale: float = 1.0


@dataclass(frozen=True)
class NumberInput:
    """A number of the profile; the model reads (x - mean) / std and whether it is missing."""

    name: str
    mean: float
    std: float


@dataclass(frozen=True)
class CategoryInput:
    """A category of the profile: code i + 1 is values[i], code 0 is missing or unknown."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """What the model must know of the data, fitted before the train cut; written into `fitted` and the checkpoint.

    An event row (S = `event_width` numbers) is [the day's rhythm: weekday, season | how many events of each type |
    their values by type]: the event switches of LumosConfig blank all but the first `rhythm_width`.
    """

    behaviours: tuple[BehaviourInput, ...]
    event_width: int
    derived: tuple[DerivedTarget, ...] = ()
    horizons: tuple[HorizonTarget, ...] = ()
    event_types: tuple[str, ...] = ()
    event_scales: tuple[float, ...] = ()
    """What each event type's value was divided by, beside `event_types`."""
    numbers: tuple[NumberInput, ...] = ()
    categories: tuple[CategoryInput, ...] = ()
    starts: tuple[float, ...] = ()
    """What each head gives before training, one a term (see `losses.starts`); empty: small random numbers."""
    uncertainties: tuple[float, ...] = ()
    """Each term's log sigma^2 before training (see `losses.starts`); empty: 0."""

    def __post_init__(self) -> None:
        if not self.behaviours:
            raise ValueError("behaviours: expected at least one")
        least = max(1, 2 * len(self.event_types))
        if self.event_width < least:
            raise ValueError(f"event_width: expected at least {least}, got {self.event_width}")
        bad = [
            f"{b.name} (scale {b.scale}, resolution {b.resolution})"
            for b in self.behaviours
            if not (b.scale > 0 and b.resolution > 0)
        ]
        bad += [f"{n.name} (std {n.std})" for n in self.numbers if not n.std > 0]
        if bad:
            raise ValueError(f"expected positive scales, resolutions and deviations, got {', '.join(bad[:5])}")
        for behaviour in self.behaviours:
            if behaviour.gate is not None and not 0 <= behaviour.gate < len(self.behaviours):
                raise ValueError(f"{behaviour.name}: gate: expected the index of a behaviour, got {behaviour.gate}")
        for name in ("starts", "uncertainties"):
            count = len(getattr(self, name))
            if count not in (0, len(self.terms)):
                raise ValueError(f"{name}: expected one number for each of the {len(self.terms)} terms, got {count}")

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the K = V + H terms: behaviours, derived targets, horizon targets."""
        daily = (*(b.name for b in self.behaviours), *(d.name for d in self.derived))
        return (*daily, *(h.name for h in self.horizons))

    @property
    def daily(self) -> int:
        """V: columns of the daily targets, U behaviours + D derived ones."""
        return len(self.behaviours) + len(self.derived)

    @property
    def binary(self) -> tuple[bool, ...]:
        """For each term, whether it is a yes or no (else a number)."""
        return (
            *(b.kind == "binary" for b in self.behaviours),
            *(True for _ in self.derived),
            *(h.over == "any" for h in self.horizons),
        )

    @property
    def sources(self) -> tuple[int, ...]:
        """For each term, the behaviour that it is about."""
        daily = (*range(len(self.behaviours)), *(d.behaviour for d in self.derived))
        return (*daily, *(h.behaviour for h in self.horizons))

    @property
    def rhythm_width(self) -> int:
        """How many leading numbers of an event row say nothing of calendar events (weekday, season)."""
        return self.event_width - 2 * len(self.event_types)

    def days_ahead(self, future_days: int) -> int:
        """X: how many future days the queries look at."""
        return max([future_days, *(h.days for h in self.horizons)])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1)

    @staticmethod
    def from_json(text: str) -> Inputs:
        """The inverse of `to_json`. Raises TypeError on unknown or missing keys."""
        raw = json.loads(text)
        raw["behaviours"] = tuple(BehaviourInput(**item) for item in raw["behaviours"])
        raw["derived"] = tuple(DerivedTarget(**item) for item in raw["derived"])
        raw["horizons"] = tuple(HorizonTarget(**item) for item in raw["horizons"])
        raw["numbers"] = tuple(NumberInput(**item) for item in raw["numbers"])
        raw["categories"] = tuple(CategoryInput(item["name"], tuple(item["values"])) for item in raw["categories"])
        for name in ("event_types", "event_scales", "starts", "uncertainties"):
            raw[name] = tuple(raw[name])
        return Inputs(**raw)
