"""How the report shows the comparisons of `strata`: forest plots, tables, and a sentence computed from each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from lum_ray.evaluation.pictures import OTHERS, OURS, STYLE, WIDTH_INCHES, Picture, embed, short
from lum_ray.evaluation.strata import AUC, FEWEST_ROWS, FEWEST_USERS

UNCLEAR = "#6b7682"
MOST_TASKS = 3
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Lines:
    """A table ready to print: `name` of what its lines are about, the cells of each."""

    name: str
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Comparison:
    """Where each is better: a picture for each headline task, and every group of every task."""

    pictures: tuple[tuple[str, Picture], ...]  # (task, picture)
    tables: tuple[Lines, ...]  # by, group, rows, users, ours, peer, gain, interval


@dataclass(frozen=True)
class Worth:
    """What the calendar is worth: the table and its sentence."""

    table: Lines  # model, task, metric, with, without, gain, interval
    sentence: str


def comparison(table: pa.Table, ours: str, peer: str) -> Comparison:
    """From a table of `strata.compare`: the first tasks of which there is something to draw are its headline."""
    tasks = list(dict.fromkeys(table["task"].to_pylist()))
    drawn = ((task, picture(table, task, ours, peer)) for task in tasks)
    found = itertools.islice(((task, made) for task, made in drawn if made is not None), MOST_TASKS)
    groups = {task: [row for row in _of(table, task) if row["n"]] for task in tasks}
    tables = (
        Lines(f"{task}: {_short_name(rows[0]['metric'])} in all groups", tuple(_line(row) for row in rows))
        for task, rows in groups.items()
        if rows
    )
    return Comparison(tuple(found), tuple(tables))


def _of(table: pa.Table, task: str) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if row["task"] == task]


def _short_name(metric: str) -> str:
    return "AUC" if metric == AUC else "MAPE"


def _line(row: Row) -> tuple[str, ...]:
    head = (row["by"], row["group"], f"{row['n']:,}", f"{row['users']:,}")
    if row["gain"] is not None:
        return (*head, *_values(row, "ours", "peer"))
    few = row["n"] < FEWEST_ROWS or row["users"] < FEWEST_USERS
    return (*head, "", "", "too few" if few else "undefined", "")


def _values(row: Row, one: str, other: str) -> tuple[str, str, str, str]:
    gain, low, high = (_gain(row[name], row["metric"]) for name in ("gain", "low", "high"))
    return short(row[one]), short(row[other]), gain, f"{low} to {high}"


def _gain(value: float, metric: str) -> str:
    """A difference of two AUC, or the share of a MAPE, with its sign."""
    if metric != AUC:
        return f"{value * 100:+.1f}\u00a0%"
    return f"{'-' if value < 0 else '+'}{short(abs(value))}"


def picture(table: pa.Table, task: str, ours: str, peer: str) -> Picture | None:
    """A forest plot of a task: the gain of `ours` over `peer` with its interval in each group, a block for each `by`.

    None where no group has a figure.
    """
    rows = [row for row in _of(table, task) if row["gain"] is not None and row["low"] == row["low"]]
    if not rows:
        return None
    metric = rows[0]["metric"]
    scale = 1.0 if metric == AUC else 100.0
    titles = list(dict.fromkeys(row["by"] for row in rows))
    # From the top: a line for the title of a block, one for each of its groups, half a line between blocks.
    places: list[float] = []
    heads: list[tuple[float, str]] = []
    at = 0.0
    for title in titles:
        heads.append((at, title))
        size = sum(row["by"] == title for row in rows)
        places += [at + 1 + k for k in range(size)]
        at += size + 1.5
    start, stop = (end * scale for end in _range(rows))
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH_INCHES, 1.25 + 0.23 * at), layout="constrained")
        axis = figure.subplots()
        axis.axvline(0, color="#1d2733", linewidth=1)
        for verdict, colour, marker, label in (
            (1, OURS, "o", f"{ours} is better"),
            (-1, OTHERS[0], "s", f"{peer} is better"),
            (0, UNCLEAR, "D", "the interval holds 0"),
        ):
            chosen = [(place, row) for place, row in zip(places, rows, strict=True) if _verdict(row) == verdict]
            for place, row in chosen:
                low, high = row["low"] * scale, row["high"] * scale
                axis.hlines(place, max(low, start), min(high, stop), color=colour, linewidth=1.8)
                for end, beyond, arrow in ((start, low < start, "<"), (stop, high > stop, ">")):
                    if beyond:
                        axis.plot(end, place, arrow, color=colour, markersize=5, clip_on=False)
            axis.plot(
                [row["gain"] * scale for _, row in chosen],
                [place for place, _ in chosen],
                marker,
                color=colour,
                markersize=5.5,
                markerfacecolor=colour if verdict else "white",
                label=label,
            )
        labels = [f"{row['group']}  ({row['users']:,})" for row in rows]
        heads[0] = (heads[0][0], f"{heads[0][1]}  (users)")
        axis.set_yticks([*places, *(place for place, _ in heads)], [*labels, *(title for _, title in heads)])
        for text, bold in zip(axis.get_yticklabels(), [False] * len(rows) + [True] * len(heads), strict=True):
            text.set_fontweight("bold" if bold else "normal")
        for place, row in zip(places, rows, strict=True):
            axis.annotate(
                _gain(row["gain"], metric),
                (1.02, place),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9,
                annotation_clip=False,
            )
        axis.tick_params(axis="y", length=0)
        name = f"AUC of {ours} minus that of {peer}" if metric == AUC else f"% of {peer}'s MAPE that {ours} saves"
        margin = 0.03 * (stop - start)
        axis.set(xlabel=name, xlim=(start - margin, stop + margin), ylim=(at - 0.5, -0.8))
        axis.spines["left"].set_visible(False)
        figure.legend(loc="outside upper center", ncols=3)
        source = embed(figure)
    best, worst = (pick(rows, key=lambda row: float(row["gain"])) for pick in (max, min))
    verdicts = [_verdict(row) for row in rows]
    return Picture(
        source,
        f"In {task}, {ours} is better than {peer} in {sum(row['gain'] > 0 for row in rows)} of {len(rows)} groups "
        f"(the 95 % interval speaks for {ours} in {verdicts.count(1)}, for {peer} in {verdicts.count(-1)}): most in "
        f"“{best['by']}: {best['group']}” ({_gain(best['gain'], metric)}), least in “{worst['by']}: {worst['group']}” "
        f"({_gain(worst['gain'], metric)}).",
    )


def _verdict(row: Row) -> int:
    return 1 if row["low"] > 0 else -1 if row["high"] < 0 else 0


def _range(rows: Sequence[Row]) -> tuple[float, float]:
    """The ends of the axis: 0 and every gain are on it, but not every interval, else the widest few hide the rest."""
    low, high, gain = (np.array([row[name] for row in rows]) for name in ("low", "high", "gain"))
    reach = max(2.5 * float(np.median(np.maximum(-low, high))), 1.1 * float(np.abs(gain).max())) or 1.0
    return max(-reach, min(float(low.min()), 0.0)), min(reach, max(float(high.max()), 0.0))


def worth(table: pa.Table) -> Worth:
    """From a table of `strata.calendar_worth`: its lines, and for each model how often the calendar helps it."""
    rows = table.to_pylist()
    lines = []
    for row in rows:
        values = ("undefined", "", "", "") if row["gain"] is None else _values(row, "with_calendar", "without")
        lines.append((row["model"], row["task"], _short_name(row["metric"]), *values))
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model and row["gain"] is not None]
        if not own:
            continue
        # A difference of AUC and a share of a MAPE are not on one scale: the best of each.
        by_metric = [[row for row in own if (row["metric"] == AUC) == auc] for auc in (True, False)]
        best = [max(found, key=lambda row: float(row["gain"])) for found in by_metric if found]
        most = " and ".join(f"{row['task']} ({_gain(row['gain'], row['metric'])})" for row in best)
        verdicts = [_verdict(row) for row in own]
        parts.append(
            f"{model} is better with the calendar in {sum(row['gain'] > 0 for row in own)} of {len(own)} tasks "
            f"(the 95 % interval speaks for it in {verdicts.count(1)}, against it in {verdicts.count(-1)}), "
            f"most in {most}"
        )
    sentence = "; ".join(parts) + "." if parts else "No task has enough rows."
    return Worth(Lines("calendar", tuple(lines)), sentence)
