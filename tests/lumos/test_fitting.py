"""Statistics are of what lies before the train cut, and of nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lum_ray.artifacts import UserError
from lum_ray.config import Behaviour
from lum_ray.data.rows import Rows, Samples, hash_strings
from lum_ray.data.windows import HorizonTarget
from lum_ray.lumos.config import Inputs, LumosConfig
from lum_ray.lumos.fitting import fit_inputs, with_starts

BEHAVIOURS = (
    Behaviour("active", "binary", "count()"),
    Behaviour("spend", "continuous", "sum(x)", 0.01, "active", "identity"),
)
CONFIG = LumosConfig(history_days=8, future_days=2, width=8, heads=2, encoder_layers=1, swiglu_width=8)


def rows() -> Rows:
    return Rows(
        user=np.array(["a", "b"], object),
        user_hash=hash_strings(["a", "b"]),
        offsets=np.array([0, 2, 4]),
        days=np.array([0, 5, 5, 30], np.int32),
        values=np.array([[1, 300], [1, 400], [1, 0], [1, 10**6]]),
        first_day=np.array([0, 5], np.int32),
        end_day=np.array([40, 40], np.int32),
        segment=np.array(["", ""], object),
        profile={"age": np.array([20.0, np.nan]), "town": np.array(["x", "y"], object)},
    )


def calendar(**last: Any) -> pa.Table:
    base = {
        "scope": "global",
        "key": None,
        "start_day": 3,
        "end_day": 4,
        "event_type": "sale",
        "value": -8.0,
        "known_at": None,
    }
    late = {
        **base,
        "scope": "user",
        "key": "a",
        "start_day": 20,
        "end_day": 21,
        "event_type": "mail",
        "value": None,
        **last,
    }
    return pa.Table.from_pylist([base, late])


def fit(table: pa.Table | None, until: int = 10, data: Rows | None = None) -> Inputs:
    horizon = HorizonTarget("active_any_2", "any", 0, 2)
    rows_ = [data or rows()]
    return fit_inputs(rows_, table, BEHAVIOURS, (), (horizon,), ["age"], ["town"], until, CONFIG)


def test_scales_are_root_mean_squares_over_all_days_before_the_cut() -> None:
    inputs = fit(calendar())
    assert inputs.behaviours[0].scale == pytest.approx(np.sqrt(3 / 15))  # 3 active days in 10 + 5 user days
    assert inputs.behaviours[1].scale == pytest.approx(np.sqrt((3**2 + 4**2) / 15))
    assert inputs.behaviours[1].gate == 0
    changed = rows()
    changed.values[3] = 7
    assert fit(calendar(), data=changed) == inputs


def test_vocabularies_know_nothing_that_came_later() -> None:
    inputs = fit(calendar())
    assert inputs.event_types == ("sale",)
    assert inputs.event_scales == (8.0,)
    assert fit(calendar(known_at=9)).event_types == ("mail", "sale")
    late = dataclasses.replace(rows(), first_day=np.array([0, 12], np.int32))
    assert fit(None, data=late).categories[0].values == ("x",)
    assert fit(None).categories[0].values == ("x", "y")
    assert (fit(None).numbers[0].mean, fit(None).numbers[0].std) == (20.0, 1.0)


def test_starts_are_base_rates() -> None:
    samples = Samples(np.array([0, 1]), np.array([5, 6], np.int32), np.zeros(2, np.int32))
    inputs = with_starts(fit(None), CONFIG, [(rows(), samples)], 10)
    assert inputs.starts[0] == pytest.approx(np.log(0.25 / 0.75))  # one active day of four
    assert inputs.starts[2] == pytest.approx(0.0)  # one of two users in two days
    with pytest.raises(UserError, match=r"split\.train: no user has a cut there"):
        with_starts(fit(None), CONFIG, [], 10)


def test_what_cannot_be_fitted_is_said() -> None:
    with pytest.raises(UserError, match="no event lies before day -5"):
        fit(None, until=-5)
    many = dataclasses.replace(
        rows(), profile={"age": np.zeros(2), "town": np.array([f"t{i}" for i in range(2)], object)}
    )
    assert len(fit(None, data=many).categories[0].values) == 2
