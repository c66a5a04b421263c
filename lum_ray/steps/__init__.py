"""One function per arrow of the data flow: prepare, train, evaluate, predict, publish.

Each finds what is there already and builds what is missing, so that any of them can be called first. Where the models
differ, the run's `model` says whose step it is: `steps/<verb>.py` are LUMOS's, `steps/gts_<verb>.py` GTS-LUM's.
"""

from __future__ import annotations

from typing import Any

from lum_ray.config import Run
from lum_ray.steps import evaluate as _evaluate
from lum_ray.steps import gts_evaluate as _gts_evaluate
from lum_ray.steps import gts_predict as _gts_predict
from lum_ray.steps import gts_prepare as _gts_prepare
from lum_ray.steps import gts_train as _gts_train
from lum_ray.steps import predict as _predict
from lum_ray.steps import prepare as _prepare
from lum_ray.steps import train as _train
from lum_ray.steps.prepare import Log, silent

__all__ = ["describe", "evaluate", "open_predictor", "predict", "prepare", "publish", "train"]


def prepare(run: Run, log: Log = silent) -> Any:
    """Find or build what the run's model reads: `Prepared` of LUMOS, `GtsPrepared` of GTS-LUM."""
    return _gts_prepare.prepare_gts(run, log) if run.model == "gts" else _prepare.prepare(run, log)


def describe(run: Run, prepared: Any) -> dict[str, Any]:
    """What prepare found, in a few figures."""
    return _gts_prepare.describe_gts(prepared) if run.model == "gts" else _prepare.describe(run, prepared)


def train(run: Run, log: Log = silent, fresh: bool = False) -> str:
    """Train a run, or go on where it was stopped, and return the checkpoint's URI."""
    return (_gts_train.train_gts if run.model == "gts" else _train.train)(run, log, fresh)


def evaluate(run: Run, log: Log = silent, max_users: int | None = None) -> Any:
    """Score the model beside the baselines on the test cuts; has `uri` (the report's folder) and `table`."""
    if run.model == "gts":
        return _gts_evaluate.evaluate_gts(run, log, max_users)
    return _evaluate.evaluate(run, log, max_users)


def predict(run: Run, *args: Any, **keywords: Any) -> str:
    """Predict for every user into files: coming days (see `steps.predict`), or lists of items (`steps.gts_predict`)."""
    return (_gts_predict.predict_gts if run.model == "gts" else _predict.predict)(run, *args, **keywords)


def publish(run: Run, log: Log = silent, checkpoint: str | None = None) -> str:
    """Write the snapshot of histories that a server looks users up in; see `steps.predict`."""
    return (_gts_predict.publish_gts if run.model == "gts" else _predict.publish)(run, log, checkpoint)


def open_predictor(run: Run, *args: Any, **keywords: Any) -> Any:
    """The run's predictor with its published histories: `lumos.predictor.Predictor` or `gts.predictor.Predictor`."""
    return (_gts_predict.open_predictor_gts if run.model == "gts" else _predict.open_predictor)(run, *args, **keywords)
