from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lum_ray.lumos.config import BehaviourInput, Inputs, LumosConfig
from tests.lumos.batches import INPUTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 20, "heads": 8}, "width: expected a multiple of heads"),
        ({"history_days": 0}, "history_days: expected at least 1"),
        ({"dropout": 1.0}, "dropout: expected a share"),
        ({"cuts_per_window": 2}, "need causal: true"),
        ({"cuts_per_window": 60, "causal": True}, "cut_stride_days: 60 cuts every 7 days do not fit"),
        ({"positions": "rope", "width": 24, "heads": 8}, "positions: rope needs an even width"),
        ({"embed_width": 0}, "embed_width: expected at least 1"),
        ({"calendar_days": 400}, "calendar_days: expected 0 to history_days"),
    ],
)
def test_impossible_values_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LumosConfig(**changes)


def test_the_defaults_are_the_papers() -> None:
    config = LumosConfig()
    assert (config.history_days, config.future_days, config.width, config.heads) == (360, 7, 512, 8)
    assert (config.encoder_layers, config.decoder_layers, config.positions, config.pad) == (6, 1, "learned", "learned")
    assert not (config.causal or config.lag_logits or config.decoder_self_attention or config.cuts_per_window > 1)
    assert config.embedding == 512
    assert replace(config, embed_width=64).embedding == 64


def test_inputs_survive_json() -> None:
    inputs = replace(INPUTS, starts=(0.5,) * 7, uncertainties=(-0.5,) * 7)
    assert Inputs.from_json(inputs.to_json()) == inputs


def test_terms_name_their_kind_and_behaviour() -> None:
    assert INPUTS.terms == ("active", "spend", "baskets", "minutes", "churned", "active_any_7", "spend_sum_5")
    assert INPUTS.binary == (True, False, False, False, True, True, False)
    assert INPUTS.sources == (0, 1, 2, 3, 0, 0, 1)
    assert INPUTS.daily == 5
    assert INPUTS.days_ahead(4) == 7
    assert INPUTS.rhythm_width == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"behaviours": ()}, "behaviours: expected at least one"),
        ({"behaviours": (BehaviourInput("a", "binary", scale=0.0),)}, r"a \(scale 0.0"),
        ({"behaviours": (BehaviourInput("a", "count", gate=3),)}, "a: gate"),
        ({"event_width": 3}, "event_width: expected at least 4"),
        ({"starts": (0.0,)}, "starts: expected one number for each of the 7 terms, got 1"),
    ],
)
def test_impossible_inputs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(replace(INPUTS, derived=(), horizons=()) if "behaviours" in changes else INPUTS, **changes)
