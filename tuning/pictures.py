"""The pictures of a search: each is an SVG with one sentence computed from the data that it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lum_ray.evaluation.bootstrap import Interval, interval
from lum_ray.evaluation.pictures import OTHERS, OURS, STYLE, WIDTH_INCHES, Picture, embed
from tuning.ledger import Record

Floats = NDArray[np.float64]
MOST_VALUES = 12
"""A setting with more values than this is no axis of a map."""


@dataclass(frozen=True)
class Trials:
    """What the pictures show. `params`: all searched settings of each trial by key; `found`: (R + 1,) resamples of the
    metric of each finished one; `sign`: 1 where more is better, else -1; `default`: the key of the run as it is."""

    metric: str
    sign: int
    records: Sequence[Record]
    params: Mapping[str, Mapping[str, Any]]
    found: Mapping[str, Floats]
    default: str

    @property
    def finished(self) -> list[Record]:
        return [record for record in self.records if record.key in self.found]

    def best_of(self, records: Sequence[Record]) -> Record:
        """The best by its value on the validation cuts."""
        return max(records, key=lambda record: (self.sign * float(self.found[record.key][0]), -record.number))

    def gain(self, key: str) -> Interval | None:
        """By how much a trial is above the run as it is, paired over users; None where that has not finished."""
        if self.default not in self.found or key == self.default:
            return None
        return interval(self.found[key] - self.found[self.default])


def name_of(path: str) -> str:
    return path.rpartition(".")[2].replace("_", " ")


def _title(metric: str) -> str:
    return metric.removeprefix("eval/").replace("_", " ")


def _values(trials: Trials, path: str) -> list[Any]:
    """The setting's values among the finished trials, in order: null, numbers, words."""
    seen = {trials.params[record.key][path] for record in trials.finished}
    return sorted(seen, key=lambda value: (value is not None, isinstance(value, str), value or 0))


def heat_map(trials: Trials, across: str, down: str) -> Picture | None:
    """The best finished trial of each pair of values, with its interval over users and how many finished there."""
    columns, rows = _values(trials, across), _values(trials, down)
    if len(columns) * len(rows) < 2 or max(len(columns), len(rows)) > MOST_VALUES:
        return None
    cell: dict[tuple[int, int], list[Record]] = {}
    for record in trials.finished:
        place = rows.index(trials.params[record.key][down]), columns.index(trials.params[record.key][across])
        cell.setdefault(place, []).append(record)
    value = np.full((len(rows), len(columns)), np.nan)
    at = {place: interval(trials.found[trials.best_of(found).key]) for place, found in cell.items()}
    for place, found in at.items():
        value[place] = found.value
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH_INCHES, 1.5 + 0.62 * len(rows)), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(value, cmap="Blues" if trials.sign > 0 else "Blues_r", aspect="auto")
        low, high = image.get_clim()
        middle = (low + high) / 2
        for (row, column), found in at.items():
            dark = (found.value > middle) == (trials.sign > 0) and high > low
            text = f"{found.value:.4f}\n{found.low:.3f} to {found.high:.3f}"
            count = len(cell[row, column])
            axis.text(column, row, text + (f"\nof {count}" if count > 1 else ""), ha="center", va="center",
                      fontsize=8, color="white" if dark else "#1d2733")  # fmt: skip
        axis.set_xticks(range(len(columns)), [_short(v) for v in columns])
        axis.set_yticks(range(len(rows)), [_short(v) for v in rows])
        axis.set(xlabel=name_of(across), ylabel=name_of(down))
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        figure.colorbar(image, ax=axis, label=_title(trials.metric), fraction=0.05)
        source = embed(figure)
    best = max(at, key=lambda place: trials.sign * at[place].value)
    inside = sum(1 for found in at.values() if found.low <= at[best].value <= found.high) - 1
    empty = len(rows) * len(columns) - len(at)
    return Picture(
        source,
        f"Best at {name_of(across)} {_short(columns[best[1]])} and {name_of(down)} {_short(rows[best[0]])}: "
        f"{at[best].value:.4f} (95 % {at[best].low:.4f} to {at[best].high:.4f}); of the other {len(at) - 1} pairs, "
        f"{inside} have an interval that holds it." + (f" {empty} pairs have no finished trial." if empty else ""),
    )


def sensitivity(trials: Trials, paths: Sequence[str]) -> Picture | None:
    """How much each value of a setting is worth against the run as it is: every finished trial, paired over users, and
    the mean of a value's trials with its interval."""
    paths = [path for path in paths if 1 < len(_values(trials, path)) <= MOST_VALUES]
    if not paths or trials.default not in trials.found:
        return None
    reference, spread = trials.found[trials.default], []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.0), layout="constrained")
        axes = figure.subplots(1, len(paths), sharey=True, squeeze=False)[0]
        for axis, path in zip(axes, paths, strict=True):
            values, means = _values(trials, path), []
            for place, value in enumerate(values):
                own = [r.key for r in trials.finished if trials.params[r.key][path] == value]
                jitter = np.linspace(-0.18, 0.18, len(own)) if len(own) > 1 else np.zeros(1)
                axis.plot(place + jitter, [trials.found[key][0] - reference[0] for key in own], "o", markersize=3.5,
                          color=OTHERS[4], alpha=0.8)  # fmt: skip
                means.append(interval(np.mean([trials.found[key] for key in own], axis=0) - reference))
            x = np.arange(len(values))
            axis.plot(x, [mean.value for mean in means], "-o", color=OURS, markersize=5)
            axis.vlines(x, [mean.low for mean in means], [mean.high for mean in means], color=OURS, alpha=0.6)
            axis.axhline(0, color="#8a94a0", linewidth=0.9, linestyle="--")
            axis.set_xticks(x, [_short(value) for value in values])
            axis.set_xlabel(name_of(path))
            best, worst = (pick(range(len(values)), key=lambda i: trials.sign * means[i].value) for pick in (max, min))
            spread.append(
                f"{name_of(path)} from {_short(values[worst])} ({means[worst].value:+.4f}, 95 % {means[worst].low:+.4f}"
                f" to {means[worst].high:+.4f}) to {_short(values[best])} ({means[best].value:+.4f}, "
                f"{means[best].low:+.4f} to {means[best].high:+.4f})"
            )
        axes[0].set_ylabel(f"{_title(trials.metric)}, difference\nfrom the run as it is")
        source = embed(figure)
    return Picture(source, f"Mean of the finished trials against the run as it is: {'; '.join(spread)}.")


def importance(shares: Mapping[str, float]) -> Picture | None:
    """Each setting's share of the variance of the metric over the trials (fANOVA)."""
    if not shares:
        return None
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH_INCHES, 0.8 + 0.32 * len(ranked)), layout="constrained")
        axis = figure.subplots()
        axis.barh(range(len(ranked)), [share for _, share in ranked], color=OURS, height=0.6)
        axis.set_yticks(range(len(ranked)), [name_of(path) for path, _ in ranked])
        axis.set(ylim=(len(ranked) - 0.5, -0.5), xlim=(0, 1), xlabel="share of the variance between trials")
        source = embed(figure)
    return Picture(source, f"{name_of(ranked[0][0]).capitalize()} explains most: {ranked[0][1]:.0%} of the variance.")


def cost(trials: Trials) -> Picture | None:
    """Seconds of training against the metric; hollow: pruned, with the metric when it was stopped."""
    finished = trials.finished
    if not finished:
        return None
    pruned = [record for record in trials.records if record.state == "pruned" and record.value is not None]
    front: list[Record] = []
    for record in sorted(finished, key=lambda record: record.train_s):
        value = trials.sign * float(trials.found[record.key][0])
        if not front or value > trials.sign * float(trials.found[front[-1].key][0]):
            front.append(record)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.2), layout="constrained")
        axis = figure.subplots()
        for record in finished:
            at = interval(trials.found[record.key])
            ours = record.key == trials.default
            axis.vlines(record.train_s, at.low, at.high, color=OTHERS[0] if ours else OURS, alpha=0.3)
            axis.plot(record.train_s, at.value, "D" if ours else "o", color=OTHERS[0] if ours else OURS, markersize=5,
                      label="the run as it is" if ours else None)  # fmt: skip
        axis.plot([r.train_s for r in pruned], [r.value for r in pruned], "o", markerfacecolor="none", color=OURS,
                  markersize=5, alpha=0.6, label="pruned" if pruned else None)  # fmt: skip
        axis.step([r.train_s for r in front], [float(trials.found[r.key][0]) for r in front], where="post",
                  color=OURS, linewidth=1, label="best for its cost")  # fmt: skip
        axis.set(xlabel="seconds of training", ylabel=_title(trials.metric))
        axis.set_xlim(left=0)
        axis.legend(loc="best")
        source = embed(figure)
    best, cheapest = front[-1], front[0]
    return Picture(
        source,
        f"The best of {len(finished)} finished trials took {best.train_s:.0f} s of training "
        f"({float(trials.found[best.key][0]):.4f}), the cheapest {cheapest.train_s:.0f} s "
        f"({float(trials.found[cheapest.key][0]):.4f}); {len(pruned)} were stopped early.",
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
