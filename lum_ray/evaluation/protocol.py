"""The protocol: from checked predictions to the table of metrics, to cohorts, and to the scores of a validation round.

Rows without a known outcome (y is NaN) count nowhere. Days: offset 0 is the cut day, shown as day 1. Intervals are 95
%, by bootstrap over users (see `bootstrap`); differences between models are paired. Several seeds of a model: each
metric is computed per seed and averaged, resample by resample. Source: FIELD.md, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lum_ray.artifacts import UserError
from lum_ray.evaluation import bootstrap, metrics
from lum_ray.evaluation.bootstrap import Weights
from lum_ray.evaluation.metrics import Floats, Ints, Terms
from lum_ray.evaluation.predictions import Outcomes, Predictions, Task

TABLE = pa.schema(
    [
        ("model", pa.string()),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),
        ("seeds", pa.int32()),
        ("seed_sd", pa.float64()),
        ("gain", pa.float64()),
        ("gain_low", pa.float64()),
        ("gain_high", pa.float64()),
    ]
)
"""One row a (model, task, metric). `n` rows counted; `gain` = value of `ours` minus this model's value, paired over
users (null for `ours` itself and where no `ours` was named); `seed_sd` is null for a single seed.
"""

COHORTS = pa.schema(
    [
        ("task", pa.string()),
        ("estimate", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n_treatment", pa.int64()),
        ("n_control", pa.int64()),
    ]
)

REFLECTED = ("eval/ece",)
Resamples = dict[str, tuple[Floats, int]]  # metric -> ((R + 1,) estimate and resamples, rows counted)


@dataclass(frozen=True)
class GateAuc:
    """AUC of P(gate open), computed once for all numbers of a gate whose files hold the same p."""

    weights: Weights
    known: dict[tuple[str, str, int], tuple[Floats, tuple[Floats, int]]]

    def __call__(
        self, gate: str, model: str, run: int, p: Floats, opened: Floats, outcomes: Outcomes
    ) -> tuple[Floats, int]:
        before = self.known.get((gate, model, run))
        if before is not None and np.array_equal(before[0], p):
            return before[1]
        every = ~np.isnan(opened)
        offset, user = (outcomes.day - outcomes.cut)[every], outcomes.user[every]
        by_day = bootstrap.grouped_auc_resamples(opened[every], p[every], offset, user, self.weights)
        values = bootstrap.mean_defined(list(by_day.values())) if by_day else np.full(len(self.weights), np.nan)
        self.known[gate, model, run] = (p, (values, int(every.sum())))
        return self.known[gate, model, run][1]


def evaluate(
    predictions: Predictions, tasks: Mapping[str, Task], ours: str | None = None, resamples: int = 200, seed: int = 0
) -> pa.Table:
    """The table of metrics of all models (schema `TABLE`).

    Metrics (`eval/...`). Binary: roc_auc (the AUC of each day offset, averaged), roc_auc_day_1.., roc_auc_per_cut (of
    each offset of each cut, averaged), roc_auc_pooled (all days at once), brier, ece (10 bins of equal mass), bias.
    Numbers: wmape and bias of the mean; mae and mape of the median; mape_least; interval_coverage, interval_width;
    for a number with a gate p_active_roc_auc and p_active_brier, and the median's metrics over rows with an open gate
    only, named value_if_active_*. A metric whose functional a model does not give is left out for it.

    Raises UserError where `ours` is not among the models or a gate has no outcome for a row.
    """
    if ours is not None and ours not in predictions.models:
        raise UserError(f"ours: expected one of the models {', '.join(predictions.models)}, got {ours!r}")
    weights = bootstrap.user_weights(len(predictions.users), resamples, seed)
    gate_auc = GateAuc(weights, {})
    rows: list[dict[str, object]] = []
    for name, task in tasks.items():
        scored = {
            model: _over_seeds(predictions, name, task, tasks, model, weights, gate_auc) for model in predictions.models
        }
        for model, (mean_resamples, per_seed) in scored.items():
            for metric, (values, n) in mean_resamples.items():
                at = bootstrap.interval(values, reflected=metric in REFLECTED)
                row: dict[str, object] = {"model": model, "task": name, "metric": metric, "n": n}
                row |= {"value": at.value, "low": at.low, "high": at.high, "seeds": len(per_seed[metric])}
                row["seed_sd"] = float(np.std(per_seed[metric], ddof=1)) if len(per_seed[metric]) > 1 else None
                reference = None if ours is None or ours == model else scored[ours][0].get(metric)
                if reference is not None:
                    gain = bootstrap.interval(reference[0] - values)
                    row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
                rows.append(row)
    return pa.Table.from_pylist(rows, schema=TABLE)


def _over_seeds(
    predictions: Predictions,
    name: str,
    task: Task,
    tasks: Mapping[str, Task],
    model: str,
    weights: Weights,
    gate_auc: GateAuc,
) -> tuple[Resamples, dict[str, list[float]]]:
    outcomes = predictions.outcomes[name]
    gate = gate_outcomes(predictions, name, task, tasks) if task.gate else None
    found: dict[str, list[tuple[Floats, int]]] = {}
    for run in predictions.seeds(name, model):
        forecast = predictions.forecasts[name, model, run]
        if task.kind == "binary":
            result = _binary(outcomes, forecast, task.horizon, weights)
        else:
            result = _numbers(outcomes, forecast, gate, weights)
            if task.gate is not None and gate is not None:
                result["eval/p_active_roc_auc"] = gate_auc(task.gate, model, run, forecast["p"], gate, outcomes)
        for metric, entry in result.items():
            found.setdefault(metric, []).append(entry)
    means: Resamples = {m: (np.mean([values for values, _ in runs], axis=0), runs[0][1]) for m, runs in found.items()}
    return means, {m: [float(values[0]) for values, _ in runs] for m, runs in found.items()}


def gate_outcomes(predictions: Predictions, name: str, task: Task, tasks: Mapping[str, Task]) -> Floats:
    """For each row of a gated behaviour the outcome of its gate, NaN where unknown. Raises UserError without such
    rows.
    """
    if task.gate is None or task.gate not in predictions.outcomes or task.gate not in tasks:
        raise UserError(f"behaviour {name}: its gate {task.gate!r} has no rows; predict the gate with the behaviour")
    rows, gate = predictions.outcomes[name], predictions.outcomes[task.gate]
    keys, gate_keys = (np.stack([r.user, r.cut, r.day], axis=1) for r in (rows, gate))
    if len(keys) != len(gate_keys) or not np.array_equal(keys, gate_keys):
        raise UserError(
            f"behaviour {name}: expected the same (user, cut_day, day) as its gate {task.gate}: "
            f"{len(keys)} rows against {len(gate_keys)}"
        )
    return gate.y


def _binary(outcomes: Outcomes, forecast: Mapping[str, Floats], horizon: bool, weights: Weights) -> Resamples:
    known = ~np.isnan(outcomes.y)
    y, p, user = outcomes.y[known], forecast["p"][known], outcomes.user[known]
    cut, offset, n = outcomes.cut[known], (outcomes.day - outcomes.cut)[known], int(known.sum())
    by_day = bootstrap.grouped_auc_resamples(y, p, offset, user, weights)
    by_cut = bootstrap.grouped_auc_resamples(y, p, cut * 4096 + offset, user, weights)
    nothing = np.full(len(weights), np.nan)
    result: Resamples = {"eval/roc_auc": (bootstrap.mean_defined(list(by_day.values())) if by_day else nothing, n)}
    result["eval/roc_auc_per_cut"] = (bootstrap.mean_defined(list(by_cut.values())) if by_cut else nothing, n)
    if not horizon:
        result["eval/roc_auc_pooled"] = (bootstrap.auc_resamples(y, p, user, weights) if n else nothing, n)
        for day, values in by_day.items():
            result[f"eval/roc_auc_day_{day + 1}"] = (values, int((offset == day).sum()))
    result["eval/brier"] = (bootstrap.ratio_resamples(metrics.brier_terms(y, p), user, weights), n)
    result["eval/ece"] = (bootstrap.ece_resamples(y, p, user, weights) if n else nothing, n)
    result["eval/bias"] = (bootstrap.ratio_resamples(metrics.bias_terms(y, p), user, weights), n)
    return result


def _numbers(outcomes: Outcomes, forecast: Mapping[str, Floats], gate: Floats | None, weights: Weights) -> Resamples:
    result: Resamples = {}

    def add(metric: str, rows: NDArray[np.bool_], terms: Terms) -> None:
        result[f"eval/{metric}"] = (bootstrap.ratio_resamples(terms, outcomes.user[rows], weights), int(rows.sum()))

    y, every, counted = known_values(outcomes, gate)
    prefix = "" if gate is None else "value_if_active_"
    if gate is not None:
        add("p_active_brier", every, metrics.brier_terms(gate[every], forecast["p"][every]))
    add("wmape", every, metrics.wmape_terms(y[every], forecast["mean"][every]))
    add("bias", every, metrics.bias_terms(y[every], forecast["mean"][every]))
    median, low, high = (forecast[column][counted] for column in ("median", "low", "high"))
    if not np.isnan(median).any():
        point = least_mape(forecast, gate is not None)[counted]
        add(f"{prefix}mae", counted, metrics.mae_terms(y[counted], median))
        add(f"{prefix}mape", counted, metrics.mape_terms(y[counted], median))
        add(f"{prefix}mape_least", counted, metrics.mape_terms(y[counted], point))
    if not (np.isnan(low).any() or np.isnan(high).any()):
        add(f"{prefix}interval_coverage", counted, metrics.coverage_terms(y[counted], low, high))
        add(f"{prefix}interval_width", counted, metrics.width_terms(low, high))
    return result


def known_values(outcomes: Outcomes, gate: Floats | None) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
    """Of a number, (n,) each: the values, which are known, and which of those the metrics of its size count.

    A closed gate means a value of 0, whether the file says 0 or (masked) NaN; the size counts where it is open.
    """
    if gate is None:
        known = ~np.isnan(outcomes.y)
        return outcomes.y, known, known
    y = np.where(gate == 0, 0.0, outcomes.y)
    known = ~np.isnan(gate) & ~np.isnan(y)
    return y, known, known & (gate == 1)


def least_mape(forecast: Mapping[str, Floats], gated: bool) -> Floats:
    """(n,) the model's own forecast with the least percentage error, else that of a log-normal of its mean and median;
    NaN where it gives neither.
    """
    if not np.isnan(forecast["least_mape"]).any():
        return forecast["least_mape"]
    mean, p = forecast["mean"], forecast["p"]
    conditional_mean = np.divide(mean, p, out=np.zeros_like(p), where=p > 0) if gated else mean
    return metrics.lognormal_point(conditional_mean, forecast["median"])


def by_cohort(
    predictions: Predictions,
    assignments: pa.Table,
    tasks: Mapping[str, Task],
    model: str | None = None,
    treatment: str = "treatment",
    control: str = "control",
    resamples: int = 1000,
    seed: int = 0,
) -> pa.Table:
    """Difference treatment - control of the mean outcome per behaviour (schema `COHORTS`), as it is and adjusted.

    `assignments` has the columns user and cohort. The second row of a behaviour subtracts from each outcome its
    prediction, made before the treatment (as in CUPED with a coefficient of 1): the same expectation where users were
    assigned by chance, with less variance the better the model is. Users are resampled in both groups. n counts users.

    Raises UserError for missing columns, an empty cohort, a user in two cohorts, or where `model` must be named.
    """
    missing = [name for name in ("user", "cohort") if name not in assignments.column_names]
    if missing:
        raise UserError(f"assignments: expected the columns user and cohort; missing: {', '.join(missing)}")
    if model is None and len(predictions.models) > 1:
        raise UserError(f"model: name the one whose prediction adjusts the outcome: {', '.join(predictions.models)}")
    model = model or predictions.models[0]
    if model not in predictions.models:
        raise UserError(f"model: expected one of {', '.join(predictions.models)}, got {model!r}")
    columns = [assignments[name].cast(pa.string()).to_pylist() for name in ("user", "cohort")]
    cohort_of: dict[str, str] = {}
    for who, cohort in zip(*columns, strict=True):
        if cohort_of.setdefault(who, cohort) != cohort:
            raise UserError(f"assignments: user {who} is in the cohorts {cohort_of[who]} and {cohort}; expected one")
    group = np.array([{treatment: 1, control: 0}.get(cohort_of.get(user, ""), -1) for user in predictions.users])
    for number, cohort in ((1, treatment), (0, control)):
        if not (group == number).any():
            known = ", ".join(sorted(set(cohort_of.values())))
            raise UserError(f"assignments: no predicted user in cohort {cohort!r}; cohorts: {known}")
    weights = bootstrap.user_weights(len(predictions.users), resamples, seed)
    rows: list[dict[str, object]] = []
    for name, task in tasks.items():
        outcomes = predictions.outcomes[name]
        column = "p" if task.kind == "binary" else "mean"
        runs = [predictions.forecasts[name, model, run][column] for run in predictions.seeds(name, model)]
        expected = np.mean(runs, axis=0)
        y = outcomes.y
        if task.gate:
            y = np.where(gate_outcomes(predictions, name, task, tasks) == 0, 0.0, y)
        for estimate, value in (("eval/cohort_difference", y), ("eval/cohort_difference_adjusted", y - expected)):
            means, sizes = [], []
            for number in (1, 0):
                chosen = ~np.isnan(y) & (group[outcomes.user] == number)
                terms = (value[chosen], np.ones(int(chosen.sum())))
                means.append(bootstrap.ratio_resamples(terms, outcomes.user[chosen], weights))
                sizes.append(len(np.unique(outcomes.user[chosen])))
            at = bootstrap.interval(means[0] - means[1])
            row: dict[str, object] = {"task": name, "estimate": estimate, "value": at.value}
            rows.append(row | {"low": at.low, "high": at.high, "n_treatment": sizes[0], "n_control": sizes[1]})
    return pa.Table.from_pylist(rows, schema=COHORTS)


def validation_names(tasks: Mapping[str, Task]) -> list[str]:
    """The names of `validation_scores`."""
    each = [f"eval/{'roc_auc' if task.kind == 'binary' else 'wmape'}_{name}" for name, task in tasks.items()]
    return ["eval/roc_auc", *each]


def validation_scores(columns: Mapping[str, NDArray[np.generic]], tasks: Mapping[str, Task]) -> dict[str, float]:
    """Scores of a validation round, without intervals.

    columns: arrays (n,) named as in a prediction file: behaviour, cut_day, day, p, mean, y. Per binary behaviour
    `eval/roc_auc_<name>`, the AUC of each day averaged over days; per number `eval/wmape_<name>` over all known rows;
    and `eval/roc_auc`, the mean over binary behaviours (NaN where none has both classes, or a prediction is NaN).
    """
    behaviour = columns["behaviour"]
    cut, day = (columns[name].astype(np.int64) for name in ("cut_day", "day"))
    y, p, mean = (columns[name].astype(np.float64) for name in ("y", "p", "mean"))
    result: dict[str, float] = {}
    aucs: list[float] = []
    for name, task in tasks.items():
        rows: Ints = np.flatnonzero((behaviour == name) & ~np.isnan(y))
        if task.kind == "binary":
            broken = bool(np.isnan(p[rows]).any())
            score = float("nan") if broken else metrics.mean_daily_auc(y[rows], p[rows], (day - cut)[rows])
            result[f"eval/roc_auc_{name}"] = score
            if len(np.unique(y[rows])) == 2:
                aucs.append(score)
        else:
            result[f"eval/wmape_{name}"] = metrics.wmape(y[rows], mean[rows])
    return {"eval/roc_auc": float(np.mean(aucs)) if aucs else float("nan")} | result
