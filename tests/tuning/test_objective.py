"""What trials are compared by: a metric of their prediction files."""

from __future__ import annotations

import numpy as np
import pytest

from lum_ray import catalog, config
from lum_ray.artifacts import UserError
from lum_ray.config import Run
from lum_ray.steps import train
from lum_ray.steps.forecasts import forecasts
from tuning.objective import resamples


def test_a_task_that_no_validation_day_can_answer_is_left_out(tiny: Run) -> None:
    raw = config.override(config.dump(tiny), ["name=far", "train.steps=2", "train.validate_every=2"])
    raw["data"]["derived"] = [{"name": "churned", "when": "no active in the next 300 days"}]
    run = catalog.read_run(raw)
    folder = forecasts(run, train(run), "validate", run)
    found, users = resamples(run, {"trial": folder}, "eval/roc_auc")
    assert users > 0
    assert np.isfinite(found["trial"]).all()
    with pytest.raises(UserError, match=r"roc_auc_churned: none of the cuts asked has a known outcome"):
        resamples(run, {"trial": folder}, "eval/roc_auc_churned")
