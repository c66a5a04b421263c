"""`report.html`: what a run learned and how good it is, in one file that works offline and on a phone.

Every section is always announced: where its input is missing, the report says what is missing and why it matters little
or how to get it, instead of leaving a hole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment

from lum_ray.artifacts import write_bytes
from lum_ray.evaluation import pictures, strata_pictures
from lum_ray.evaluation.attention import Attention, attention_masses
from lum_ray.evaluation.metrics import Reliability
from lum_ray.evaluation.pictures import Picture, WhatIf, short
from lum_ray.evaluation.report_template import TEMPLATE

# metric -> (heading, which value is best, shown open). The order is that of the report; other metrics are not tabled.
METRICS: dict[str, tuple[str, str, bool]] = {
    "eval/roc_auc": ("AUC of each day, averaged over the days", "highest", True),
    "eval/wmape": ("wMAPE over all days, fed the mean", "lowest", True),
    "eval/value_if_active_mape": ("MAPE of the value given active, fed the median", "lowest", False),
    "eval/value_if_active_mape_least": ("MAPE of the value given active, fed the least-MAPE forecast", "lowest", False),
    "eval/value_if_active_mae": ("MAE of the value given active, fed the median", "lowest", False),
    "eval/mape": ("MAPE, fed the median", "lowest", False),
    "eval/mape_least": ("MAPE, fed the least-MAPE forecast", "lowest", False),
    "eval/mae": ("MAE, fed the median", "lowest", False),
    "eval/roc_auc_pooled": ("AUC, all days pooled", "highest", False),
    "eval/roc_auc_per_cut": ("AUC of each day of each cut, averaged", "highest", False),
    "eval/brier": ("Brier score", "lowest", False),
    "eval/ece": ("Expected calibration error, 10 bins of equal mass", "lowest", False),
    "eval/bias": ("Total bias: sum of predictions / sum of outcomes - 1", "nearest to 0", False),
    "eval/value_if_active_interval_coverage": ("Share of values given active inside the interval", "", False),
    "eval/interval_coverage": ("Share of values inside the interval", "", False),
}


@dataclass(frozen=True)
class ReportFacts:
    """Everything that the report shows; None or () for what a run does not have.

    averages: models made of several seeds of `ours`. metrics: `protocol.evaluate(..., ours=ours)`. curves: the rows of
    metrics.jsonl. calibration: one a binary task of `ours`. pad_share: share of input tokens that are pads. data,
    summary: (label, value) lines. cohorts: `protocol.by_cohort`. no_attention, no_what_if: why there is none, such as
    "no yearly event in the data".
    strata: `strata.compare` of `ours` and `peer`. calendar_worth: `strata.calendar_worth`.
    """

    title: str
    ours: str
    averages: tuple[str, ...] = ()
    summary: tuple[tuple[str, str], ...] = ()
    metrics: pa.Table | None = None
    curves: tuple[Mapping[str, Any], ...] = ()
    calibration: tuple[Reliability, ...] = ()
    attention: Attention | None = None
    no_attention: str = "the model's attention was not exported"
    what_if: WhatIf | None = None
    no_what_if: str = "no scenario was asked for"
    pad_share: float | None = None
    data: tuple[tuple[str, str], ...] = ()
    cohorts: pa.Table | None = None
    strata: pa.Table | None = None
    peer: str = ""
    calendar_worth: pa.Table | None = None


@dataclass(frozen=True)
class Cell:
    """A value with its interval, ready to print."""

    value: str
    interval: str
    best: bool
    ours: bool


@dataclass(frozen=True)
class MetricTable:
    """One metric: a row a task, a column a model."""

    heading: str
    best: str
    open: bool
    models: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]  # task, number of rows, cells
    sentence: str


@dataclass(frozen=True)
class Section:
    """A heading with a picture, or with the reason why there is none."""

    name: str
    title: str
    picture: Picture | None
    absent: str


def write_report(uri: str, facts: ReportFacts) -> str:
    """Write the report to `uri` (a file, local or in an object store) and return it."""
    write_bytes(uri, render(facts).encode())
    return uri


def render(facts: ReportFacts) -> str:
    """The report as one HTML text."""
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(TEMPLATE)
        .render(
            facts=facts,
            tables=metric_tables(facts.metrics, facts.ours, facts.averages) if facts.metrics is not None else (),
            sections=_sections(facts),
            pads=_pads(facts.pad_share),
            cohorts=_cohorts(facts.cohorts),
            strata=strata_pictures.comparison(facts.strata, facts.ours, facts.peer)
            if facts.strata is not None
            else None,
            worth=strata_pictures.worth(facts.calendar_worth) if facts.calendar_worth is not None else None,
        )
    )


def metric_tables(table: pa.Table, ours: str, averages: Sequence[str] = ()) -> tuple[MetricTable, ...]:
    """The metrics table, one per metric, models as columns (ours first), the best value of a task marked.

    `averages` are models made of ours: they have a column, but are no rivals of it.
    """
    rows = table.to_pylist()
    models = sorted({row["model"] for row in rows}, key=lambda model: (model != ours, model))
    result = []
    for metric, (heading, best, is_open) in METRICS.items():
        found = {(row["task"], row["model"]): row for row in rows if row["metric"] == metric}
        tasks = list(dict.fromkeys(task for task, _ in found))
        lines = []
        for task in tasks:
            at = {model: found[task, model] for model in models if (task, model) in found}
            winner = _winner(at, best)
            cells = tuple(_cell(at.get(model), model == winner, model == ours) for model in models)
            lines.append((task, f"{max(row['n'] for row in at.values()):,}", cells))
        if lines:
            rivals = [model for model in models if model not in averages]
            sentence = _table_sentence(found, tasks, rivals, ours, best)
            result.append(MetricTable(heading, best, is_open, tuple(models), tuple(lines), sentence))
    return tuple(result)


def _winner(rows: Mapping[str, Mapping[str, Any]], best: str) -> str | None:
    values = {model: float(row["value"]) for model, row in rows.items() if not np.isnan(row["value"])}
    if not values or not best:
        return None
    if best == "highest":
        return max(values, key=values.__getitem__)
    return min(values, key=lambda model: abs(values[model]) if best == "nearest to 0" else values[model])


def _cell(row: Mapping[str, Any] | None, best: bool, ours: bool) -> Cell:
    if row is None or np.isnan(row["value"]):
        return Cell("not given" if row is None else "undefined", "", False, ours)
    known = not np.isnan(row["low"])
    return Cell(short(row["value"]), f"{short(row['low'])} to {short(row['high'])}" if known else "", best, ours)


def _table_sentence(
    found: Mapping[tuple[str, str], Mapping[str, Any]],
    tasks: Sequence[str],
    models: Sequence[str],
    ours: str,
    best: str,
) -> str:
    """How often ours is best, and how often the paired difference from the best other lies beyond its interval."""
    if not best or len(models) < 2 or ours not in models:
        return ""
    wins = clear = worse = compared = 0
    for task in tasks:
        at = {model: found[task, model] for model in models if (task, model) in found}
        rival = _winner({model: row for model, row in at.items() if model != ours}, best)
        if ours not in at or rival is None or np.isnan(at[ours]["value"]):
            continue
        compared += 1
        wins += _winner(at, best) == ours
        if best != "nearest to 0" and at[rival]["gain_low"] is not None:
            sign = 1 if best == "highest" else -1
            low, high = sorted((sign * at[rival]["gain_low"], sign * at[rival]["gain_high"]))
            clear += low > 0
            worse += high < 0
    text = f"{ours} is best in {wins} of {compared} tasks"
    if best == "nearest to 0":
        return text + "."
    return (
        text
        + f"; against the best other the paired 95 % interval speaks for {ours} in {clear}, for the other in {worse}."
    )


def _sections(facts: ReportFacts) -> tuple[Section, ...]:
    days = pictures.auc_by_day(facts.metrics, facts.ours) if facts.metrics is not None else None
    attention = mass = None
    if facts.attention is not None:
        attention = pictures.attention_map(facts.attention)
        mass = pictures.attention_mass(attention_masses(facts.attention))
    no_days = "no binary task with a prediction for each day was evaluated"
    return (
        Section("curves", "Learning curves", pictures.learning_curves(facts.curves), "no training log was given"),
        Section("days", "AUC by predicted day", days, no_days),
        Section("calibration", "Calibration", pictures.calibration(facts.calibration), "no binary task was evaluated"),
        Section("attention", "Where the future days look", attention, facts.no_attention),
        Section("mass", "How much lies where", mass, facts.no_attention),
        Section(
            "what-if",
            "What if",
            pictures.what_if(facts.what_if) if facts.what_if is not None else None,
            facts.no_what_if,
        ),
    )


def _pads(share: float | None) -> str:
    if share is None:
        return "The share of pads was not measured."
    return f"{share * 100:.1f} % of the input tokens are pads (days before the user's first day)."


def _cohorts(table: pa.Table | None) -> tuple[tuple[str, str, str, str, str], ...]:
    if table is None:
        return ()
    names = {"eval/cohort_difference": "as observed", "eval/cohort_difference_adjusted": "minus the prediction"}
    return tuple(
        (
            row["task"],
            names.get(row["estimate"], row["estimate"]),
            f"{row['value']:+.4g}",
            f"{row['low']:+.4g} to {row['high']:+.4g}",
            f"{row['n_treatment']:,} / {row['n_control']:,}",
        )
        for row in table.to_pylist()
    )
