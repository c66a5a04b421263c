"""The pictures of the ranking report: each is an SVG with one sentence computed from the data that it shows."""

from __future__ import annotations

import datetime as dt
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyarrow as pa
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from lum_ray.evaluation.metrics import Ints
from lum_ray.evaluation.pictures import MARKERS, OTHERS, OURS, STYLE, WIDTH_INCHES, Picture, embed, short
from lum_ray.evaluation.strata import FEWEST_ROWS

Who = tuple[str, str]  # model, reading
MOST_LINES = 8
_SHADES = ("#cfe0f2", "#e7eff8")  # neighbours in the tree's picture


@dataclass(frozen=True)
class Slot:
    """What a user did in one time slot: its local start (a date alone where the time of day is not known), its
    descriptor in words, and the items.
    """

    time: dt.datetime | dt.date
    descriptor: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class TreeFacts:
    """The ID tree: paths_ND (N items, D levels) without the collision digit, each item's text, and what weighs it for
    the choice of examples (such as its events; None: the catalogue's order).
    """

    paths_ND: Ints
    texts: Sequence[str]
    weight_N: NDArray[np.number] | None = None


def name_of(who: Who) -> str:
    """How a model's reading is called in tables and pictures."""
    model, reading = who
    return model.replace("_", " ") if reading == "baseline" else f"{model.replace('_', ' ')}: {reading}"


def ordered(table: pa.Table, ours: Who) -> list[Who]:
    """All (model, reading): ours, its other readings, then the rest by recall at 10, best first."""
    rows = table.to_pylist()
    best = {(row["model"], row["reading"]): -1.0 for row in rows}
    for row in rows:
        if (row["subset"], row["metric"]) == ("all", "eval/recall_10") and not np.isnan(row["value"]):
            best[row["model"], row["reading"]] = row["value"]
    return sorted(best, key=lambda who: (who != ours, who[0] != ours[0], -best[who], who))


def cells(table: pa.Table, subset: str, metric: str) -> dict[Who, Mapping[str, Any]]:
    """The row of each (model, reading) that has the metric."""
    return {
        (row["model"], row["reading"]): row
        for row in table.to_pylist()
        if (row["subset"], row["metric"]) == (subset, metric)
    }


def models(table: pa.Table, ours: Who) -> Picture | None:
    """Recall and NDCG at 10 of all models with their intervals, a panel each, a line a model."""
    panels = {
        name: found
        for name, metric in (("Recall@10", "eval/recall_10"), ("NDCG@10", "eval/ndcg_10"))
        if (found := cells(table, "all", metric))
    }
    if not panels:
        return None
    names = [who for who in ordered(table, ours) if any(who in found for found in panels.values())]
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH_INCHES, 0.9 + 0.3 * len(names)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (name, found) in zip(axes, panels.items(), strict=True):
            for place, who in enumerate(names):
                if who not in found:
                    continue
                row = found[who]
                colour = OURS if who[0] == ours[0] else OTHERS[0]
                axis.hlines(place, row["low"], row["high"], color=colour, linewidth=2, alpha=0.55)
                axis.plot(row["value"], place, "o" if who[1] != "baseline" else "D", color=colour, markersize=5)
            axis.set(title=name, ylim=(len(names) - 0.4, -0.6))
            axis.set_xlim(left=0)
        axes[0].set_yticks(range(len(names)), [name_of(who) for who in names])
        source = embed(figure)
    return Picture(source, comparison(table, ours))


def comparison(table: pa.Table, ours: Who) -> str:
    """The best baseline and the best other reading against ours at recall 10, by the paired difference."""
    found = cells(table, "all", "eval/recall_10")
    if ours not in found:
        return f"{name_of(ours)} has no recall at 10."
    parts = [f"{name_of(ours)} reaches a recall at 10 of {short(found[ours]['value'])}"]
    kinds = {
        "best baseline": [who for who in found if who[1] == "baseline" and who != ours],
        "best of its other readings": [who for who in found if who[0] == ours[0] and who != ours],
        "best other model": [who for who in found if who[0] != ours[0] and who[1] != "baseline"],
    }
    for kind, candidates in kinds.items():
        if not candidates:
            continue
        row = found[max(candidates, key=lambda who: float(found[who]["value"]))]
        text = f"the {kind}, {name_of((row['model'], row['reading']))}, {short(row['value'])}"
        if row["gain"] is not None:
            low, high = row["gain_low"], row["gain_high"]
            verdict = "clearly above it" if low > 0 else "clearly below it" if high < 0 else "not clearly apart"
            text += f" (paired difference {row['gain']:+.3f}, 95 % {low:+.3f} to {high:+.3f}: {verdict})"
        parts.append(text)
    return "; ".join(parts) + "."


def by_history(table: pa.Table, ours: Who, subsets: Sequence[str]) -> Picture | None:
    """Recall at 10 by the events before the cut, a line a model, with intervals; none for groups of few baskets."""
    found = {subset: cells(table, subset, "eval/recall_10") for subset in subsets}
    few = [subset for subset, rows in found.items() if rows and next(iter(rows.values()))["n"] < FEWEST_ROWS]
    found = {subset: rows for subset, rows in found.items() if rows and subset not in few}
    if not found:
        return None
    names = [who for who in ordered(table, ours) if any(who in rows for rows in found.values())][:MOST_LINES]
    left_out = len({who for rows in found.values() for who in rows}) - len(names)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.4), layout="constrained")
        axis = figure.subplots()
        others = [who for who in names if who != ours]
        for place, who in enumerate(names):
            at = [i for i, rows in enumerate(found.values()) if who in rows]
            rows = [list(found.values())[i][who] for i in at]
            x = np.array(at) + (place - (len(names) - 1) / 2) * 0.07
            colour = OURS if who == ours else OTHERS[others.index(who) % len(OTHERS)]
            style = "-" if who[0] == ours[0] else "--"
            axis.plot(x, [row["value"] for row in rows], style, color=colour, marker=MARKERS[place % len(MARKERS)],
                      markersize=4.5, linewidth=2 if who == ours else 1.1, label=name_of(who))  # fmt: skip
            axis.vlines(x, [row["low"] for row in rows], [row["high"] for row in rows], color=colour, alpha=0.55)
        sizes = [f"{next(iter(rows.values()))['n']:,}" for rows in found.values()]
        labels = [subset.removeprefix("history ") for subset in found]
        axis.set_xticks(range(len(found)), [f"{a}\n{b} baskets" for a, b in zip(labels, sizes, strict=True)])
        axis.set(xlabel="events before the cut", ylabel="Recall@10")
        axis.set_ylim(bottom=0)
        figure.legend(loc="outside upper center", ncols=3)
        source = embed(figure)
    wins = []
    for subset, by_model in found.items():
        best = max(by_model, key=lambda who: float(by_model[who]["value"]))
        events = subset.removeprefix("history ")
        wins.append(f"{name_of(best)} ({short(by_model[best]['value'])}) with {events} events")
    tail = f" {left_out} more models are in the table." if left_out > 0 else ""
    if few:
        groups = " and ".join(subset.removeprefix("history ") for subset in few)
        tail += f" Not drawn, with fewer than {FEWEST_ROWS} baskets: {groups} events."
    return Picture(source, f"Best in recall at 10: {'; '.join(wins)}.{tail}")


def tree(facts: TreeFacts) -> Picture | None:
    """The top two levels as two rows of blocks, as wide as their share of the items, with an example where it fits."""
    size, levels = facts.paths_ND.shape
    if not size or not levels:
        return None
    order = np.lexsort(facts.paths_ND.T[::-1])
    paths = facts.paths_ND[order]
    rows = min(levels, 2)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH_INCHES, 1.5 + 0.9 * rows), layout="constrained")
        axis = figure.subplots()
        counts: list[Ints] = []
        for level in range(rows):
            new = np.concatenate([[True], (paths[1:, : level + 1] != paths[:-1, : level + 1]).any(axis=1)])
            start = np.flatnonzero(new)
            counts.append(np.diff(np.append(start, size)).astype(np.int64))
            for begin, count in zip(start.tolist(), counts[-1].tolist(), strict=True):
                shade = _SHADES[int(paths[begin, level]) % 2]
                box = (begin / size, rows - 1 - level)
                axis.add_patch(Rectangle(box, count / size, 0.94, facecolor=shade, edgecolor="white", linewidth=0.8))
                letters = int(count / size * 95)
                path = ".".join(map(str, paths[begin, : level + 1].tolist()))
                lines = [text for text in (f"{path}: {count:,}", path) if len(text) < letters][:1]
                if lines:
                    if letters >= 9:
                        text = facts.texts[_heaviest(facts, order[begin : begin + count], 1)[0]]
                        lines += textwrap.wrap(text, letters, max_lines=3, placeholder=" …")
                    axis.text(begin / size + count / size / 2, rows - 1 - level + 0.47, "\n".join(lines), ha="center",
                              va="center", fontsize=7.5, clip_on=True)  # fmt: skip
        axis.set(xlim=(0, 1), ylim=(-0.05, rows), xticks=[], xlabel="share of the items")
        axis.set_yticks([rows - 1 - level + 0.47 for level in range(rows)], [f"level {n + 1}" for n in range(rows)])
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)
        axis.tick_params(length=0)
        source = embed(figure)
    leaves = len(np.unique(paths, axis=0))
    below = f", the second {len(counts[1]):,}" if rows > 1 else ""
    return Picture(
        source,
        f"{size:,} items lie in {leaves:,} leaves, {levels} levels deep; the first level has {len(counts[0]):,} "
        f"nodes{below}; the largest node of the first level holds {counts[0].max() / size * 100:.0f} % of the items.",
    )


def _heaviest(facts: TreeFacts, items: Ints, most: int) -> list[int]:
    """At most `most` of the items, heaviest first."""
    if facts.weight_N is not None:
        items = items[np.argsort(-facts.weight_N[items].astype(np.float64), kind="stable")]
    return [int(item) for item in items[:most]]


def examples(facts: TreeFacts, items: Ints, most: int) -> tuple[str, ...]:
    """The texts of at most `most` of the items, heaviest first, each once."""
    return tuple(dict.fromkeys(facts.texts[item] for item in _heaviest(facts, items, most)))


def time_line(user: str, slots: Sequence[Slot]) -> Picture | None:
    """Slots by day and hour, larger with more items; those without a time of day lie on a line of their own."""
    if not slots:
        return None
    timed = [slot for slot in slots if isinstance(slot.time, dt.datetime)]
    untimed = [slot for slot in slots if not isinstance(slot.time, dt.datetime)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.2), layout="constrained")
        axis = figure.subplots()
        for chosen, colour, marker in ((timed, OURS, "o"), (untimed, OTHERS[0], "D")):
            day = [date2num(dt.datetime.combine(_day(slot), dt.time(12))) for slot in chosen]
            hour = [
                slot.time.hour + slot.time.minute / 60 if isinstance(slot.time, dt.datetime) else 26 for slot in chosen
            ]
            area = [14 + 9 * len(slot.items) for slot in chosen]
            axis.scatter(day, hour, s=area, color=colour, alpha=0.6, linewidths=0, marker=marker)
        ticks = [*range(0, 25, 4), *([26] if untimed else [])]
        axis.set_yticks(ticks, [f"{hour:02d}:00" if hour <= 24 else "no time" for hour in ticks])
        axis.set(ylim=(27 if untimed else 24.5, -0.5), ylabel="local time")
        days = sorted({_day(slot) for slot in slots})
        axis.set_xlim(date2num(days[0]) - 0.7, date2num(days[-1]) + 1.7)
        locator = AutoDateLocator(minticks=3, maxticks=9)
        axis.xaxis.set_major_locator(locator)
        axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        source = embed(figure)
    kinds = [slot.descriptor for slot in slots]
    most = max(dict.fromkeys(kinds), key=kinds.count)
    total = sum(len(slot.items) for slot in slots)
    return Picture(
        source,
        f"{user}: {total:,} items in {len(slots):,} slots from {days[0]:%-d %B %Y} to {days[-1]:%-d %B %Y}; "
        f"the most frequent descriptor is “{most}” ({kinds.count(most)} slots).",
    )


def _day(slot: Slot) -> dt.date:
    return slot.time.date() if isinstance(slot.time, dt.datetime) else slot.time
