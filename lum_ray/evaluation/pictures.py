"""The pictures of the report: each is an SVG with one sentence computed from the data that it shows.

An SVG is embedded as a data URI (glyphs as paths), so that pictures cannot disturb each other and need no font.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lum_ray.evaluation.attention import RECENT_DAYS, Attention, Mass
from lum_ray.evaluation.metrics import Reliability

WIDTH_INCHES = 7.2
OURS = "#0b5cad"
# Colour-blind safe (Okabe and Ito) in an order that leaves neighbours apart; ours is always the strong blue.
OTHERS = ("#d55e00", "#009e73", "#cc79a7", "#8c6d1f", "#56b4e9", "#555555", "#a0522d")
MARKERS = "osD^vPX*"
MOST_PANELS = 8
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e7ec",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#8a94a0",
    "axes.axisbelow": True,
    "svg.hashsalt": "lum_ray",
    "svg.fonttype": "path",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """An SVG as a data URI, and what it shows in one sentence."""

    source: str
    sentence: str


@dataclass(frozen=True)
class WhatIf:
    """Predictions of one behaviour for the same users under two calendars; entries by date, in `unit`."""

    behaviour: str
    unit: str
    scenario_name: str
    dates: tuple[str, ...]
    baseline: tuple[float, ...]
    scenario: tuple[float, ...]


def learning_curves(rows: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Loss and AUC over steps, from the rows of metrics.jsonl (keys step, train/loss, eval/loss, eval/roc_auc)."""
    series = {key: _series(rows, key) for key in ("train/loss", "eval/loss", "eval/roc_auc")}
    if not len(series["train/loss"][0]):
        return None
    has_score = len(series["eval/roc_auc"][0]) > 0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 2.9), layout="constrained")
        panels = figure.subplots(1, 2 if has_score else 1, squeeze=False)[0]
        steps, loss = series["train/loss"]
        stride = max(1, len(steps) // 800)
        panels[0].plot(steps[::stride], loss[::stride], color="#9db8d6", linewidth=1, label="training")
        if len(loss) >= 50:
            width = max(5, len(loss) // 50)
            smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
            panels[0].plot(steps[width - 1 :][::stride], smooth[::stride], color=OURS, label=f"mean of {width} steps")
        if len(series["eval/loss"][0]):
            panels[0].plot(*series["eval/loss"], color=OTHERS[0], marker="o", markersize=4, label="validation")
        # The first steps would otherwise squeeze all that follows into a line.
        bulk = loss[len(loss) // 50 :]
        spread = float(np.ptp(bulk)) or 1.0
        both = np.concatenate([bulk, series["eval/loss"][1]])
        panels[0].set_ylim(float(both.min()) - 0.05 * spread, float(both.max()) + 0.08 * spread)
        panels[0].set(title="Loss", xlabel="step")
        panels[0].legend(loc="upper right")
        if has_score:
            panels[1].plot(*series["eval/roc_auc"], color=OURS, marker="o", markersize=4)
            panels[1].set(title="Validation AUC", xlabel="step")
        for panel in panels:
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        source = embed(figure)
    tenth = max(1, len(loss) // 10)
    first, last = float(loss[:tenth].mean()), float(loss[-tenth:].mean())
    sentence = (
        f"Over {int(steps[-1]):,} steps the training loss went from {first:.3f} (first tenth) to {last:.3f} (last)"
    )
    if has_score:
        at, score = series["eval/roc_auc"]
        best = int(np.nanargmax(score)) if not np.isnan(score).all() else 0
        sentence += f"; the validation AUC was best at step {int(at[best]):,}, with {short(score[best])}"
    return Picture(source, sentence + ".")


def auc_by_day(table: pa.Table, ours: str) -> Picture | None:
    """AUC by predicted day with intervals, a panel a daily binary task, from the rows roc_auc_day_k of the metrics
    table.
    """
    found: dict[str, dict[str, list[tuple[int, float, float, float]]]] = {}
    for row in table.to_pylist():
        match = re.fullmatch(r"eval/roc_auc_day_(\d+)", row["metric"])
        if match and not np.isnan(row["value"]):
            entry = (int(match[1]), row["value"], row["low"], row["high"])
            found.setdefault(row["task"], {}).setdefault(row["model"], []).append(entry)
    if not found:
        return None
    tasks = list(found)[:MOST_PANELS]
    # A line at exactly .5 says nothing and would squeeze all others.
    flat = {model for rows in found.values() for model in rows} - {
        model
        for rows in found.values()
        for model, days in rows.items()
        if any(abs(day[1] - 0.5) > 1e-9 for day in days)
    }
    for rows in found.values():
        for model in flat - {ours} if len(rows) > len(flat) else ():
            rows.pop(model, None)
    models = _ordered({model for by_model in found.values() for model in by_model}, ours)
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(len(tasks))
        for panel, task in zip(panels, tasks, strict=True):
            for place, model in enumerate(models):
                if model not in found[task]:
                    continue
                day, value, low, high = (np.array(column) for column in zip(*sorted(found[task][model]), strict=True))
                shifted = day + (place - (len(models) - 1) / 2) * 0.1
                style = {"color": _colour(model, models, ours), "marker": MARKERS[place % len(MARKERS)]}
                panel.plot(shifted, value, markersize=4.5, linewidth=2 if model == ours else 1.2, label=model, **style)
                panel.vlines(shifted, low, high, color=style["color"], linewidth=1, alpha=0.6)
            panel.set(title=task, xlabel="predicted day", ylabel="AUC")
            panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        source = embed(figure)
    task = tasks[0]
    sentences = []
    own = sorted(found[task].get(ours, []))
    if own:
        sentences.append(_trend(f"the AUC of {task} with {ours}", own))
    rest = {model: sorted(rows) for model, rows in found[task].items() if model != ours}
    if rest:
        best = max(rest, key=lambda model: float(np.mean([row[1] for row in rest[model]])))
        sentences.append(_trend(f"{'that' if own else 'the AUC of ' + task} of the best other, {best},", rest[best]))
    days = [row[0] for row in next(iter(found[task].values()))]
    left_out = f" Shown are {len(tasks)} of {len(found)} tasks." if len(found) > len(tasks) else ""
    hidden = sorted(flat - set(models))
    left_out += f" Not drawn, at .5 by construction: {', '.join(hidden)}." if hidden else ""
    return Picture(source, f"Between days {min(days)} and {max(days)} {'; '.join(sentences)}.{left_out}")


def calibration(tasks: Sequence[Reliability]) -> Picture | None:
    """Reliability diagrams, a panel a binary task: observed share against predicted probability, bins of equal mass."""
    drawn = [task for task in tasks if task.rows]
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(min(len(drawn), MOST_PANELS))
        for panel, task in zip(panels, drawn, strict=False):
            top = min(1.02, max(0.02, *task.predicted, *task.observed) * 1.08)
            panel.plot([0, top], [0, top], color="#8a94a0", linestyle="--", linewidth=1, label="perfect")
            panel.plot(
                task.predicted, task.observed, color=OURS, marker="o", markersize=4.5, label="bins of equal mass"
            )
            panel.set(
                title=task.task, xlabel="predicted probability", ylabel="observed share", xlim=(0, top), ylim=(0, top)
            )
            panel.locator_params(nbins=6)
        panels[0].legend(loc="upper left")
        source = embed(figure)
    worst: tuple[float, float, float, str] = (-1.0, 0.0, 0.0, "")
    for task in drawn:
        for predicted, observed in zip(task.predicted, task.observed, strict=True):
            worst = max(worst, (abs(predicted - observed), predicted, observed, task.task))
    counted = sum(task.rows[-1] for task in drawn)
    left_out = f" Shown are {MOST_PANELS} of {len(drawn)} tasks." if len(drawn) > MOST_PANELS else ""
    return Picture(
        source,
        f"The largest gap of any bin is {short(worst[0])}, in {worst[3]}: predicted {short(worst[1])}, observed "
        f"{short(worst[2])} (the bins of highest probability hold {counted:,} rows in all tasks together).{left_out}",
    )


def attention_map(attention: Attention) -> Picture:
    """Attention of each future day over the history (days before the cut on the x axis), past events marked above."""
    weights = attention.weights
    days, length = weights.shape
    kinds = list(dict.fromkeys(kind for _, kind in attention.marks))
    before = np.arange(-length, 0)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH_INCHES, 3.9 + 0.24 * min(len(kinds), 6)), layout="constrained")
        ratios = [0.3 + 0.24 * min(max(len(kinds), 1), 6), 1.3, 1.6]
        marks, line, heat = figure.subplots(3, 1, sharex=True, height_ratios=ratios)
        shown = kinds[:6]
        for place, kind in enumerate(shown):
            at = [before[t] + 0.5 for t, k in attention.marks if k == kind]
            marks.plot(at, [place] * len(at), "v", color=OTHERS[place], markersize=5)
        marks.set(yticks=range(len(shown)), yticklabels=shown, ylim=(len(shown) - 0.4, -0.6))
        marks.set_title("Past events" if kinds else "Past events: none in the history", loc="left")
        for place, kind in enumerate(shown):
            for t, k in attention.marks:
                if k == kind and len(attention.marks) <= 60:
                    line.axvline(before[t] + 0.5, color=OTHERS[place], linewidth=0.7, alpha=0.45)
        line.plot(before + 0.5, weights.mean(axis=0) * 100, color=OURS, linewidth=1.2)
        line.axhline(100 / length, color="#555555", linestyle="--", linewidth=1, label="uniform share")
        line.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12))
        line.set(ylabel="%", ylim=(0, 130 * float(weights.mean(axis=0).max())))
        line.set_title("Mean attention over the future days, % per history day", loc="left")
        high = float(np.quantile(weights, 0.995)) * 100
        image = heat.imshow(
            weights * 100,
            aspect="auto",
            interpolation="nearest",
            cmap="Blues",
            vmin=0,
            vmax=high or None,
            extent=(-length, 0, days + 0.5, 0.5),
        )
        heat.set(xlabel="day relative to the cut", ylabel="future day")
        heat.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure.colorbar(
            image, ax=heat, orientation="horizontal", label="% of a future day's attention", aspect=50, pad=0.02
        )
        source = embed(figure)
    mean, recent = weights.mean(axis=0), min(RECENT_DAYS, length - 1)
    # Peaks only: without an event the largest old value is just the edge of the recent days.
    padded = np.concatenate([[-1.0], mean, [np.inf]])
    peaks = np.flatnonzero((mean > padded[:-2]) & (mean > padded[2:]) & (np.arange(length) < length - recent))
    if len(peaks):
        peak = int(peaks[np.argmax(mean[peaks])])
        here = sorted({kind for t, kind in attention.marks if t == peak})
        event = f", a day of {' and '.join(here)}," if here else ","
        sentence = (
            f"Outside the last {recent} days attention peaks {length - peak} days before the cut{event} at "
            f"{float(mean[peak]) * length:.1f} times the uniform share."
        )
    else:
        sentence = f"Outside the last {recent} days attention has no peak."
    if not attention.marks:
        sentence += " The history holds no event."
    return Picture(source, sentence)


def attention_mass(masses: Sequence[Mass]) -> Picture:
    """Bars: the share of attention on three kinds of days, each with its share of the days as a mark."""
    present = [mass for mass in masses if not mass.absent]
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH_INCHES, 0.95 + 0.5 * len(present)), layout="constrained")
        axis = figure.subplots()
        places = np.arange(len(present))
        axis.barh(places, [mass.share * 100 for mass in present], height=0.55, color=OURS, label="attention")
        uniform = [mass.uniform * 100 for mass in present]
        axis.vlines(uniform, places - 0.36, places + 0.36, color=OTHERS[0], linewidth=2.5, label="uniform share")
        top = max([mass.share * 100 for mass in present] + uniform)
        for place, mass in zip(places, present, strict=True):
            end = max(mass.share, mass.uniform) * 100
            text = f"{mass.share * 100:.1f} % ({_times(mass)})"
            axis.text(end + 0.015 * top, float(place), text, va="center", fontsize=9)
        axis.set(
            yticks=places,
            yticklabels=[mass.name for mass in present],
            xlabel="% of the attention",
            xlim=(0, top * 1.36),
        )
        axis.set_ylim(len(present) - 0.4, -0.6)
        figure.legend(loc="outside upper right", ncols=2)
        source = embed(figure)
    parts = [f"{mass.share * 100:.1f} % on the {mass.name} ({_times(mass)} the uniform share)" for mass in present]
    missing = [f"{mass.name}: {mass.absent}" for mass in masses if mass.absent]
    tail = f" Not measured: {'; '.join(missing)}." if missing else ""
    return Picture(source, f"Of the attention lie {', '.join(parts)}.{tail}")


def what_if(example: WhatIf) -> Picture:
    """Baseline and scenario of one behaviour by date."""
    baseline, scenario = np.array(example.baseline), np.array(example.scenario)
    places = np.arange(len(example.dates))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.0), layout="constrained")
        axis = figure.subplots()
        axis.fill_between(places, baseline, scenario, color=OTHERS[0], alpha=0.15, linewidth=0)
        axis.plot(
            places, baseline, color="#555555", marker="o", markersize=4.5, linestyle="--", label="calendar as known"
        )
        axis.plot(places, scenario, color=OTHERS[0], marker="s", markersize=4.5, label=example.scenario_name)
        tilt = 30 if len(places) > 8 else 0
        axis.set_xticks(places, example.dates, rotation=tilt, ha="right" if tilt else "center")
        axis.set(ylabel=f"{example.behaviour} ({example.unit})")
        axis.margins(y=0.15)
        figure.legend(loc="outside upper center", ncols=2)
        source = embed(figure)
    change, total = scenario - baseline, float(baseline.sum())
    most = int(np.argmax(np.abs(change)))
    relative = f" ({float(change.sum()) / total * 100:+.1f} %)" if total else ""
    return Picture(
        source,
        f"With {example.scenario_name} the sum of {example.behaviour} over {len(places)} days changes by "
        f"{float(change.sum()):+.3g} {example.unit}{relative}, most on {example.dates[most]} ({change[most]:+.3g}).",
    )


def short(value: float) -> str:
    """Three decimals without a leading zero: .812."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def _times(mass: Mass) -> str:
    return f"{mass.share / mass.uniform:.1f} times"


def _trend(what: str, rows: Sequence[tuple[int, float, float, float]]) -> str:
    first, last = rows[0][1], rows[-1][1]
    if abs(last - first) < 0.0005:
        return f"{what} stays at {short(first)}"
    return f"{what} {'falls' if last < first else 'rises'} from {short(first)} to {short(last)}"


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Any, Any]:
    pairs = sorted(
        {float(row["step"]): float(row[key]) for row in rows if row.get(key) is not None and "step" in row}.items()
    )
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])


def _ordered(models: set[str], ours: str) -> list[str]:
    return sorted(models, key=lambda model: (model != ours, model))


def _colour(model: str, models: Sequence[str], ours: str) -> str:
    others = [name for name in models if name != ours]
    return OURS if model == ours else OTHERS[others.index(model) % len(OTHERS)]


def _panels(count: int) -> tuple[Figure, list[Any]]:
    columns = 1 if count == 1 else 2
    lines = -(-count // columns)
    figure = Figure(figsize=(WIDTH_INCHES, 0.7 + 2.55 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def embed(figure: Figure) -> str:
    """The figure as a data URI of an SVG that names no address."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    # The metadata and the document type only name web addresses.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()
