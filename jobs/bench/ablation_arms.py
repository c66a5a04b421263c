"""The arms of the ablations: what each changes, from which base, and what the paper says of it.

The base of an ablation is the paper's choice, in the form of the model in which that choice can matter:
- PAPER, as the paper writes it: bidirectional, one cut a window, no help to the decoder's attention. For positions and
  pads, which that help (lags; pads that are not read) replaces.
- DENSE, as in the presets: causal, several cuts a window, lags, day match and raw values. For what is asked of the data
  rather than of the attention (events, static attributes, history), because in an arm's budget it learns more of them
  (AUC of `active` on the simulator .760, PAPER .720, the Bayes oracle .79). For loss weighting, decoder self-attention
  and encoder layers too, so that what they add is added to a model that works.
Both have point heads (every term then has a weight to learn), and no season, from which a model without events could
still read a yearly one. All arms of an ablation see the same windows in the same order, as many steps, and keep the
weights with the best AUC on the validation cuts. Encoder layers start from one and history from 112 days, not from the
paper's 6 and 360: that is what an arm's budget of one or two minutes on one core allows. Pads on the simulator have
days of their own, early enough for pads in test windows.

What OULAD's calendar says on the days before a deadline is past context too, on the last days of a history: there
`past_only` is not blind to what is due.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lum_ray import presets
from lum_ray.config import Run, Source
from lum_ray.lumos.config import LumosConfig

Overrides = Mapping[str, Any]
"""Dotted fields of a run file and their values."""
DATASETS = ("oulad", "simulator")
DENSE: Overrides = {"train.steps": 1000, "train.batch": 32, "train.micro_batch": 16}
PAPER: Overrides = {
    "lumos.causal": False,
    "lumos.cuts_per_window": 1,
    "lumos.lag_logits": False,
    "lumos.day_match": False,
    "lumos.raw_values": False,
    "lumos.positions": "learned",
    "lumos.pad": "learned",
    "train.steps": 1500,
    "train.batch": 64,
    "train.micro_batch": 32,
}
NEW_USERS: Overrides = {
    "split.train.from_day": "2022-02-15",
    "split.validate_from": "2023-02-01",
    "split.validate.from_day": "2023-02-01",
    "split.validate.until_day": "2023-03-01",
    "split.test.from_day": "2023-03-15",
    "split.test.until_day": "2023-07-15",
}
"""Days on which users of the simulator still register."""


@dataclass(frozen=True)
class Ablation:
    """`arms` by name; `base` is the one that the others are compared with, `only_for` overrides of one dataset."""

    form: Overrides
    base: str
    arms: Mapping[str, Overrides]
    only_for: Mapping[str, Overrides] = field(default_factory=dict)


def _one(name: str, arms: Mapping[str, Any]) -> dict[str, Overrides]:
    """Arms that set one field."""
    return {arm: {name: value} for arm, value in arms.items()}


def _each(name: str, *values: Any) -> dict[str, Overrides]:
    """Arms named by the value that they set."""
    return _one(name, {str(value): value for value in values})


ABLATIONS: dict[str, Ablation] = {
    "positions": Ablation(PAPER, "learned", _each("lumos.positions", "learned", "sinusoidal", "rope", "time2vec")),
    "events": Ablation(
        DENSE,
        "both",
        {
            "both": {},
            "past_only": {"lumos.future_events": False},
            "future_only": {"lumos.past_events": False},
            "none": {"lumos.past_events": False, "lumos.future_events": False},
            "future_shuffled": {"lumos.future_events": "shuffled"},
        },
    ),
    "static": Ablation(DENSE, "with", _one("lumos.static", {"with": True, "without": False})),
    "pad": Ablation(PAPER, "learned", _each("lumos.pad", "learned", "zero"), {"simulator": NEW_USERS}),
    "loss_weighting": Ablation(DENSE, "uncertainty", _each("lumos.loss_weighting", "uncertainty", "sum", "geometric")),
    "decoder_self_attention": Ablation(
        DENSE, "without", _one("lumos.decoder_self_attention", {"without": False, "with": True})
    ),
    "encoder_layers": Ablation(DENSE, "1", _each("lumos.encoder_layers", 1, 2, 3)),
    "history_days": Ablation(DENSE, "112", _each("lumos.history_days", 28, 56, 112, 224)),
}


@dataclass(frozen=True)
class Statement:
    """What the paper says, as what the arms of an ablation should do to the base's figure."""

    text: str
    ablation: str
    arms: tuple[str, ...]
    figure: str = "auc"
    expected: tuple[str, ...] = ("hurts",)


STATEMENTS = (
    Statement("both past and future event context matter", "events", ("past_only", "future_only")),
    Statement("the future calendar helps because it is right", "events", ("future_shuffled",)),
    Statement("learned positions are best", "positions", ("sinusoidal", "rope", "time2vec")),
    Statement("a pad that is not zero helps", "pad", ("zero",)),
    Statement("uncertainty weighting balances tasks (mean AUC)", "loss_weighting", ("sum",), "binary_auc"),
    Statement(
        "no decoder self-attention is needed", "decoder_self_attention", ("with",), expected=("hurts", "no effect")
    ),
)
"""The second is ours: it tells the calendar's content from the mere presence of an input."""


def base_run(dataset: str, root: str, path: str, quick: bool) -> Run:
    """The small run that every arm starts from. Test users and days are the same in all arms and seeds."""
    run = presets.lumos_oulad() if dataset == "oulad" else presets.lumos_simulator()
    assert run.data.source is not None
    if dataset == "oulad":
        source = dataclasses.replace(run.data.source, path=path)
        test = dataclasses.replace(run.split.test, users=(0.0, 0.02 if quick else 0.5))
        split = dataclasses.replace(
            run.split, train=dataclasses.replace(run.split.train, from_day=run.split.test.from_day), test=test
        )
    else:
        options = {**run.data.source.options, "users": 4000, "treatment_odds": 1.0}
        options |= {"users": 60, "shards": 1, "activity": 0.3} if quick else {}
        source, split = Source("simulator", options=options), run.split
    size = 8 if quick else 32
    section = LumosConfig(
        history_days=28 if quick else 112,
        width=size,
        heads=2 if quick else 4,
        encoder_layers=1,
        swiglu_width=2 * size,
        embed_width=size,
        season=False,
        pad="unread",
        positions="lags",
        cuts_per_window=4,
        cut_stride_days=7,
        causal=True,
        lag_logits=True,
        day_match=True,
        raw_values=True,
    )
    train = dataclasses.replace(
        run.train, learning_rate=3e-3, warmup_share=0.05, ema=0.99, keep_best="eval/roc_auc", validate_every=250,
        checkpoint_every=250, validate_users=8 if quick else 300,
    )  # fmt: skip
    data = dataclasses.replace(run.data, source=source, engine="local")
    return dataclasses.replace(
        run, name=f"ablations_{dataset}", root=root, data=data, split=split, section=section, train=train
    )
