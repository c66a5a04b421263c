"""The figure by which trials are compared: a metric of prediction files of the same users and cuts, never a loss.

Losses of two shapes have different units: another slot size asks another number of questions of a history, other
windows other days. Files hold the same questions whatever answered them, which is checked.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lum_ray.artifacts import UserError, join, list_files, storage
from lum_ray.config import Run
from lum_ray.evaluation import bootstrap, metrics, predictions
from lum_ray.evaluation.protocol import validation_names
from lum_ray.evaluation.ranking import basket_metrics, read_rankings
from lum_ray.steps.gts_train import CUTOFFS, METRICS
from lum_ray.steps.train import check_reported, tasks_of
from lum_ray.training.loop import lower_is_better

Floats = NDArray[np.float64]
RESAMPLES = 400


def metric_of(run: Run) -> tuple[str, str]:
    """(the metric of the run's search, `min` or `max`). Raises UserError for one that no validation reports."""
    name = run.tune.metric or ("eval/ndcg_10" if run.model == "gts" else "eval/roc_auc")
    known = list(METRICS)
    if run.model == "lumos":
        known = validation_names(tasks_of(run))
    why = " (a loss has another unit for each data shape)" if name.endswith("loss") else ""
    check_reported(run, "tune.metric", name, known, why)
    return name, "min" if lower_is_better(name) else "max"


def resamples(run: Run, folders: Mapping[str, str], metric: str) -> tuple[dict[str, Floats], int]:
    """The metric of each folder of `steps.forecasts`, (R + 1,): entry 0 is the value, the others are resamples of the
    users, the same for all folders, so that differences are paired; and the number of users.

    Raises UserError where two folders answer different questions.
    """
    return (_gts if run.model == "gts" else _lumos)(run, folders, metric)


def _lumos(run: Run, folders: Mapping[str, str], metric: str) -> tuple[dict[str, Floats], int]:
    tables = []
    for name, folder in folders.items():
        for file in list_files(join(folder, "predictions"), ".parquet"):
            place = storage(file)
            table = pq.read_table(place.path, filesystem=place.filesystem)
            column = table.column_names.index("model")
            tables.append(table.set_column(column, "model", pa.repeat(pa.scalar(name, pa.string()), len(table))))
    tasks = tasks_of(run)
    found = predictions.check(pa.concat_tables(tables), tasks)
    weights = bootstrap.user_weights(len(found.users), RESAMPLES)
    kind, _, only = metric.removeprefix("eval/").removeprefix("roc_").partition("_")
    result = {}
    for name in folders:
        parts = []
        for task, outcomes in found.outcomes.items():
            if (only and task != only) or (kind == "auc") != (tasks[task].kind == "binary"):
                continue
            forecast = found.forecasts[task, name, found.seeds(task, name)[0]]
            known = ~np.isnan(outcomes.y)
            if not known.any():
                continue  # it looks further ahead than the validation's days are known
            y, user = outcomes.y[known], outcomes.user[known]
            if kind == "auc":
                offset = (outcomes.day - outcomes.cut)[known]
                by_day = bootstrap.grouped_auc_resamples(y, forecast["p"][known], offset, user, weights)
                parts.append(bootstrap.mean_defined(list(by_day.values())))
            else:
                terms = metrics.wmape_terms(y, forecast["mean"][known])
                parts.append(bootstrap.ratio_resamples(terms, user, weights))
        if not parts:
            raise UserError(
                f"tune.metric: {metric}: none of the cuts asked has a known outcome of it; choose another metric, or "
                "earlier days in split.validate"
            )
        result[name] = bootstrap.mean_defined(parts)
    return result, len(found.users)


def _gts(run: Run, folders: Mapping[str, str], metric: str) -> tuple[dict[str, Floats], int]:
    result: dict[str, Floats] = {}
    first = None
    for name, folder in folders.items():
        rankings = read_rankings(folder)
        baskets = rankings.baskets
        asked = (baskets.users, baskets.user_B, baskets.cut_B, baskets.items[baskets.item_T], baskets.basket_T)
        if first is None:
            first = asked
            weights = bootstrap.user_weights(len(baskets.users), RESAMPLES)
        elif not all(np.array_equal(one, other) for one, other in zip(first, asked)):
            raise UserError(f"{folder}: asks other users, cuts or targets than the other trials; use --fresh data")
        (key,) = rankings.ranks
        values = basket_metrics(rankings.ranks[key], baskets.basket_T, len(baskets), rankings.depths[key], CUTOFFS)
        terms = (values[metric], np.ones(len(baskets)))
        result[name] = bootstrap.ratio_resamples(terms, baskets.user_B, weights)
    assert first is not None
    return result, len(first[0])
