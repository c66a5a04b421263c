"""One function per arrow of the data flow: prepare, train, evaluate, predict, publish.

Each finds what is there already and builds what is missing, so that any of them can be called first. Each pins the
versions of Delta tables at once, so that all that it does reads the same rows, and the checkpoint names them. Where the
models differ, the run's `model` says whose step it is: `steps/<verb>.py` are LUMOS's, `steps/gts_<verb>.py` GTS-LUM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lum_ray.config import Run
from lum_ray.data import compact as _compact
from lum_ray.steps import evaluate as _evaluate
from lum_ray.steps import forget as _forget
from lum_ray.steps import gts_evaluate as _gts_evaluate
from lum_ray.steps import gts_predict as _gts_predict
from lum_ray.steps import gts_prepare as _gts_prepare
from lum_ray.steps import gts_train as _gts_train
from lum_ray.steps import predict as _predict
from lum_ray.steps import prepare as _prepare
from lum_ray.steps import train as _train
from lum_ray.steps.prepare import Log, pinned, prepare_timelines, silent
from lum_ray.training.loop import Watch

__all__ = ["compact", "describe", "evaluate", "forget", "open_predictor", "predict", "prepare", "publish", "train"]


def prepare(run: Run, log: Log = silent) -> Any:
    """Find or build what the run's model reads: `Prepared` of LUMOS, `GtsPrepared` of GTS-LUM."""
    run = pinned(run, log)
    return _gts_prepare.prepare_gts(run, log) if run.model == "gts" else _prepare.prepare(run, log)


def compact(run: Run, log: Log = silent) -> str:
    """Merge all parts of the run's newest timelines or sequences into one (they are prepared first), and return their
    URI; see `data.compact`."""
    run = pinned(run, log)
    artifact = _gts_prepare.prepare_sequences(run, log)[1] if run.model == "gts" else prepare_timelines(run, log)
    return _compact.compact(artifact.uri, log).uri


def describe(run: Run, prepared: Any) -> dict[str, Any]:
    """What prepare found, in a few figures."""
    return _gts_prepare.describe_gts(prepared) if run.model == "gts" else _prepare.describe(run, prepared)


def train(run: Run, log: Log = silent, fresh: bool = False, watch: Watch | None = None) -> str:
    """Train a run, or go on where it was stopped, and return the checkpoint's URI; `watch` may stop it."""
    return (_gts_train.train_gts if run.model == "gts" else _train.train)(pinned(run, log), log, fresh, watch)


def evaluate(run: Run, log: Log = silent, max_users: int | None = None) -> Any:
    """Score the model beside the baselines on the test cuts; has `uri` (the report's folder) and `table`."""
    run = pinned(run, log)
    if run.model == "gts":
        return _gts_evaluate.evaluate_gts(run, log, max_users)
    return _evaluate.evaluate(run, log, max_users)


def predict(run: Run, *args: Any, **keywords: Any) -> str:
    """Predict for every user into files: coming days (see `steps.predict`), or lists of items (`steps.gts_predict`)."""
    return (_gts_predict.predict_gts if run.model == "gts" else _predict.predict)(pinned(run), *args, **keywords)


def publish(run: Run, log: Log = silent, checkpoint: str | None = None) -> str:
    """Write the snapshot of histories that a server looks users up in; see `steps.predict`."""
    pinned_run = pinned(run, log)
    return (_gts_predict.publish_gts if run.model == "gts" else _predict.publish)(pinned_run, log, checkpoint)


def forget(run: Run, users: Sequence[str], log: Log = silent) -> _forget.Forgotten:
    """Take users out of every file under the run's root, keep them out, and prove it; the same for both models."""
    return _forget.forget(run, users, log)


def open_predictor(run: Run, *args: Any, **keywords: Any) -> Any:
    """The run's predictor with its published histories: `lumos.predictor.Predictor` or `gts.predictor.Predictor`."""
    run = pinned(run)
    return (_gts_predict.open_predictor_gts if run.model == "gts" else _predict.open_predictor)(run, *args, **keywords)
