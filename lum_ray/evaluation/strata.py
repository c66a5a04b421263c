"""Where each of two models is better: the headline metric in groups of rows, and what a model's calendar is worth.

A mean over all users hides who gains. So the rows of a task are put into groups by what is known at the cut (days of
history, activity, segment) and by the day ahead, and two models are compared in each, by bootstrap over users with the
same weights for both, as in `protocol`. The metric is the AUC of each day offset, averaged, for a yes or no, and for a
number the MAPE of the forecast made for it; a gain is positive where the first model is better.

Legend: S (user, cut) pairs, R resamples, n rows of a task.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lum_ray.artifacts import UserError
from lum_ray.evaluation import bootstrap, metrics, protocol
from lum_ray.evaluation.bootstrap import Weights
from lum_ray.evaluation.history import Cuts, observed_days, window_sums
from lum_ray.evaluation.metrics import Floats, Ints
from lum_ray.evaluation.predictions import Outcomes, Predictions, Task

STRATA = pa.schema(
    [
        ("task", pa.string()),
        ("metric", pa.string()),
        ("by", pa.string()),
        ("group", pa.string()),
        ("n", pa.int64()),
        ("users", pa.int64()),
        ("ours", pa.float64()),
        ("peer", pa.float64()),
        ("gain", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
"""One row a (task, by, group). `n` rows that the metric counts. `gain`: the difference of two AUC, or the share of the
peer's MAPE that ours saves. The figures are null in a group with one class, with a forecast that a model does not give,
or with fewer than FEWEST_ROWS rows or FEWEST_USERS users.
"""

WORTH = pa.schema(
    [
        ("model", pa.string()),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("with_calendar", pa.float64()),
        ("without", pa.float64()),
        ("gain", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
"""One row a (model, task); `gain` as in `STRATA`, positive where the calendar helps."""

AUC, EVERY, DAY_AHEAD = "eval/roc_auc", "all users", "day ahead"
FEWEST_ROWS, FEWEST_USERS = 50, 20
"""Below these an interval over resampled users says more than it knows."""
HISTORY_EDGES = (28, 84, 182)
SHARE_DAYS, SHARE_EDGES = 84, (0.0, 0.05, 0.15, 0.30)


@dataclass(frozen=True)
class Grouping:
    """Which group each (user, cut) belongs to, one entry a pair."""

    title: str
    labels: tuple[str, ...]  # in the order of the report
    users: NDArray[np.object_]  # (S,)
    cut: Ints  # (S,)
    code: Ints  # (S,) index into labels, -1 where it is in none


def everybody(cuts: Cuts) -> Grouping:
    """One group of all."""
    return _grouping(EVERY, ("all",), cuts, np.zeros(len(cuts.samples), np.int64))


def by_history(cuts: Cuts) -> Grouping:
    """Groups by the days from the user's first day to the cut."""
    edges = HISTORY_EDGES
    between = (f"{a + 1} to {b}" for a, b in itertools.pairwise(edges))
    labels = (f"up to {edges[0]}", *between, f"more than {edges[-1]}")
    return _grouping("days of history", labels, cuts, np.searchsorted(edges, observed_days(cuts, edges[-1] + 1)))


def by_activity(cuts: Cuts, column: int) -> Grouping:
    """Groups by the share of days in the last 84 on which the behaviour `column`, a yes or no, was a yes."""
    share = window_sums(cuts, SHARE_DAYS)[:, column] / np.maximum(observed_days(cuts, SHARE_DAYS), 1)
    percent = [f"{edge * 100:.0f}" for edge in SHARE_EDGES]
    between = (f"{a} to {b} %" for a, b in itertools.pairwise(percent[1:]))
    labels = ("none", f"up to {percent[1]} %", *between, f"more than {percent[-1]} %")
    return _grouping(
        f"share of active days in the last {SHARE_DAYS}", labels, cuts, np.searchsorted(SHARE_EDGES, share)
    )


def by_segment(cuts: Cuts, most: int = 8) -> Grouping:
    """The segments with the most cuts, and the rest as "other"; a user without a segment is in no group."""
    names, which = np.unique(cuts.rows.segment[cuts.samples.row].astype(str), return_inverse=True)
    sizes = np.bincount(which, minlength=len(names))
    ranked = [place for place in np.argsort(-sizes, kind="stable").tolist() if names[place]]
    code = np.full(len(names), -1)
    code[ranked] = np.minimum(np.arange(len(ranked)), most)
    labels = (*(str(names[place]) for place in ranked[:most]), *(["other"] if len(ranked) > most else []))
    return _grouping("segment", labels, cuts, code[which])


def _grouping(title: str, labels: tuple[str, ...], cuts: Cuts, code: NDArray[np.integer]) -> Grouping:
    users, cut = cuts.rows.user[cuts.samples.row], cuts.samples.cut.astype(np.int64)
    return Grouping(title, labels, users, cut, code.astype(np.int64))


def compare(
    predictions: Predictions,
    tasks: Mapping[str, Task],
    groupings: Sequence[Grouping],
    ours: str,
    peer: str,
    resamples: int = 200,
    seed: int = 0,
) -> pa.Table:
    """Both models in each group of each grouping, and on each day ahead of a daily task (schema `STRATA`).

    Several seeds of a model are averaged, resample by resample. Raises UserError where a model has no predictions, a
    grouping lacks a predicted (user, cut), or a gate has no rows.
    """
    _known(predictions, [ours, peer])
    weights = bootstrap.user_weights(len(predictions.users), resamples, seed)
    rows: list[dict[str, object]] = []
    for name, task in tasks.items():
        part = _counted(predictions, tasks, name)
        groups = {grouping.title: (grouping.labels, _codes(predictions, part, grouping)) for grouping in groupings}
        if not task.horizon:
            offset = part.rows.day - part.rows.cut
            last = int(offset.max(initial=-1))
            groups[DAY_AHEAD] = (tuple(f"day {day + 1}" for day in range(last + 1)), offset)
        for title, (labels, code) in groups.items():
            for place, label in enumerate(labels):
                inside = part.counted & (code == place)
                users = len(np.unique(part.rows.user[inside]))
                row: dict[str, object] = {"task": name, "metric": part.metric, "by": title, "group": label}
                row |= {"n": int(inside.sum()), "users": users}
                rows.append(row | _paired(predictions, part, (ours, peer), inside, weights, ("ours", "peer")))
    return pa.Table.from_pylist(rows, schema=STRATA)


def calendar_worth(
    predictions: Predictions,
    tasks: Mapping[str, Task],
    pairs: Mapping[str, str],
    resamples: int = 200,
    seed: int = 0,
) -> pa.Table:
    """What each model of `pairs` gains over the same model without the calendar, its value (schema `WORTH`).

    Raises UserError where a model of a pair has no predictions or a gate has no rows.
    """
    _known(predictions, [*pairs, *pairs.values()])
    weights = bootstrap.user_weights(len(predictions.users), resamples, seed)
    parts = {name: _counted(predictions, tasks, name) for name in tasks}
    rows = [
        {"model": model, "task": name, "metric": part.metric}
        | _paired(predictions, part, (model, without), part.counted, weights, ("with_calendar", "without"))
        for model, without in pairs.items()
        for name, part in parts.items()
    ]
    return pa.Table.from_pylist(rows, schema=WORTH)


@dataclass(frozen=True)
class _Part:
    """A task with the outcomes that its metric compares, (n,) each."""

    name: str
    metric: str
    rows: Outcomes
    y: Floats
    counted: NDArray[np.bool_]
    gated: bool


def _counted(predictions: Predictions, tasks: Mapping[str, Task], name: str) -> _Part:
    task, outcomes = tasks[name], predictions.outcomes[name]
    if task.kind == "binary":
        return _Part(name, AUC, outcomes, outcomes.y, ~np.isnan(outcomes.y), False)
    gate = protocol.gate_outcomes(predictions, name, task, tasks) if task.gate else None
    y, _, counted = protocol.known_values(outcomes, gate)
    metric = "eval/mape_least" if gate is None else "eval/value_if_active_mape_least"
    # A percentage of 0 is not defined, so such a row must not help a group over the fewest rows either.
    return _Part(name, metric, outcomes, y, counted & (y != 0), gate is not None)


def _codes(predictions: Predictions, part: _Part, grouping: Grouping) -> Ints:
    """(n,) the group of each row. Raises UserError for rows that the grouping lacks."""
    users = predictions.users.tolist()
    place_of = {user: place for place, user in enumerate(users)}
    place = np.array([place_of.get(user, -1) for user in grouping.users.tolist()], dtype=np.int64)
    known = place >= 0
    have, first = np.unique((place[known] << 32) + grouping.cut[known], return_index=True)
    asked = (part.rows.user << 32) + part.rows.cut
    at = np.searchsorted(have, asked)
    found = at < len(have)
    found[found] = have[at[found]] == asked[found]
    if not found.all():
        lost = np.unique(np.stack([part.rows.user[~found], part.rows.cut[~found]], axis=1), axis=0)
        shown = ", ".join(f"({users[user]}, {cut})" for user, cut in lost[:5].tolist())
        raise UserError(
            f"grouping {grouping.title}: expected a group for each predicted (user, cut), {len(lost)} have none: "
            f"{shown}{', ...' if len(lost) > 5 else ''}; make it from the cuts that were predicted"
        )
    return np.asarray(grouping.code[known][first][at])


def _paired(
    predictions: Predictions,
    part: _Part,
    models: tuple[str, str],
    inside: NDArray[np.bool_],
    weights: Weights,
    names: tuple[str, str],
) -> dict[str, float | None]:
    """The metric of two models over the rows `inside`, and the gain of the first with its interval."""
    if inside.sum() < FEWEST_ROWS or len(np.unique(part.rows.user[inside])) < FEWEST_USERS:
        return {}
    one, other = (_resamples(predictions, part, model, np.flatnonzero(inside), weights) for model in models)
    if part.metric == AUC:
        gain = one - other
    else:
        gain = np.divide(other - one, other, out=np.full(len(other), np.nan), where=other != 0)
    at = bootstrap.interval(gain)
    if np.isnan(at.value):
        return {}
    return {names[0]: float(one[0]), names[1]: float(other[0]), "gain": at.value, "low": at.low, "high": at.high}


def _resamples(predictions: Predictions, part: _Part, model: str, rows: Ints, weights: Weights) -> Floats:
    """(R + 1,) the metric over `rows`, averaged over the seeds of a model."""
    user, offset = part.rows.user[rows], (part.rows.day - part.rows.cut)[rows]
    runs = []
    for run in predictions.seeds(part.name, model):
        forecast = predictions.forecasts[part.name, model, run]
        if part.metric == AUC:
            by_day = bootstrap.grouped_auc_resamples(part.y[rows], forecast["p"][rows], offset, user, weights)
            runs.append(bootstrap.mean_defined(list(by_day.values())))
        else:
            point = protocol.least_mape(forecast, part.gated)[rows]
            runs.append(bootstrap.ratio_resamples(metrics.mape_terms(part.y[rows], point), user, weights))
    return np.asarray(np.mean(runs, axis=0), dtype=np.float64)


def _known(predictions: Predictions, models: Sequence[str]) -> None:
    unknown = [model for model in models if model not in predictions.models]
    if unknown:
        raise UserError(
            f"expected predictions of the models {', '.join(models)}, none of {', '.join(unknown[:5])}; "
            f"there are {', '.join(predictions.models)}"
        )
