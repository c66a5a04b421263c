"""The report of rankings: what the models put in front of users, how good it is, and what the model looks at.

One file that works offline and on a phone, in the style of `report`. Every section is announced: where its input is
missing, the report says what is missing.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment

from lum_ray.artifacts import write_bytes
from lum_ray.evaluation import ranking_pictures as pictures
from lum_ray.evaluation.pictures import Picture, short
from lum_ray.evaluation.ranking_pictures import Slot, TreeFacts, Who, cells, name_of, ordered
from lum_ray.evaluation.ranking_report_template import TEMPLATE
from lum_ray.evaluation.report import Cell

__all__ = [
    "Neighbours",
    "NextBasket",
    "RankingFacts",
    "Slot",
    "TimeLine",
    "TreeFacts",
    "render",
    "write_ranking_report",
]

CUTOFFS = (5, 10, 50, 200)
MOST_NODES, MOST_LEAVES, MOST_ITEMS = 32, 12, 4  # of the tree's listing: children of a node, leaves, items of a leaf
MOST_SLOTS = 30
Near = tuple[tuple[str, float], ...]  # (text, cosine), nearest first
Column = tuple[str, str, str]  # heading, subset, metric


@dataclass(frozen=True)
class Neighbours:
    """The nearest items of one item, in the fused embedding and in the text's alone."""

    item: str
    fused: Near
    text: Near


@dataclass(frozen=True)
class NextBasket:
    """What a user took next and what the model had put in front, best first."""

    taken: tuple[str, ...]
    ranked: tuple[str, ...]


@dataclass(frozen=True)
class TimeLine:
    """One user's slots in time order, and what came after them."""

    user: str
    slots: tuple[Slot, ...]
    next: NextBasket | None = None


@dataclass(frozen=True)
class RankingFacts:
    """Everything that the report shows; None or () for what a run does not have.

    ours: the headline's (model, reading). metrics: `ranking.evaluate_rankings(..., ours=ours)`. summary, data: (label,
    value) lines. no_*: why there is none.
    """

    title: str
    ours: Who
    summary: tuple[tuple[str, str], ...] = ()
    metrics: pa.Table | None = None
    tree: TreeFacts | None = None
    no_tree: str = "no ID tree was given"
    neighbours: tuple[Neighbours, ...] = ()
    no_neighbours: str = "no embeddings were given"
    time_line: TimeLine | None = None
    no_time_line: str = "no user was chosen"
    data: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """A table ready to print, a row a model."""

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, bool, tuple[Cell, ...]], ...]  # name, ours, cells
    sentence: str = ""
    picture: Picture | None = None


@dataclass(frozen=True)
class Node:
    """A node of the ID tree: its digits, its share of the items, examples, and what lies below."""

    path: str
    items: int
    share: float
    examples: str
    children: tuple[Node, ...] = ()
    hidden: int = 0  # children or leaves that are not listed
    leaf: bool = False


def write_ranking_report(uri: str, facts: RankingFacts) -> str:
    """Write the report to `uri` (a file, local or in an object store) and return it."""
    write_bytes(uri, render(facts).encode())
    return uri


def render(facts: RankingFacts) -> str:
    """The report as one HTML text."""
    line = facts.time_line
    shown = line.slots[-MOST_SLOTS:] if line else ()
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(TEMPLATE)
        .render(
            facts=facts,
            ours=name_of(facts.ours),
            tables=tables(facts.metrics, facts.ours) if facts.metrics is not None else (),
            tree=pictures.tree(facts.tree) if facts.tree is not None else None,
            nodes=tree_nodes(facts.tree) if facts.tree is not None else None,
            near=[(item.item, _near(item)) for item in facts.neighbours],
            near_sentence=_near_sentence(facts.neighbours),
            line_picture=pictures.time_line(line.user, line.slots) if line else None,
            slots=[(_when(slot), slot.descriptor, ", ".join(slot.items)) for slot in reversed(shown)],
            earlier=len(line.slots) - len(shown) if line else 0,
            next_sentence=_next_sentence(line.next) if line and line.next else "",
        )
    )


def tables(metrics: pa.Table, ours: Who) -> tuple[Table, ...]:
    """All tables of the report from the table of metrics; a table without a value is left out."""
    recalls: list[Column] = [(f"R@{k}", "all", f"eval/recall_{k}") for k in CUTOFFS]
    main: list[Column] = [
        *recalls,
        ("NDCG@5", "all", "eval/ndcg_5"),
        ("NDCG@10", "all", "eval/ndcg_10"),
        ("hit@10", "all", "eval/hit_rate_10"),
        ("MRR", "all", "eval/mrr"),
    ]
    kinds: list[Column] = []
    for title, subset in (("repeat", "repeat"), ("new", "explore")):
        kinds += [(f"{title} R@{k}", subset, f"eval/recall_{k}") for k in (5, 10)]
        kinds.append((f"{title} NDCG@10", subset, "eval/ndcg_10"))
    kinds.append(("new R@10, unfiltered", "explore, seen items listed", "eval/recall_10"))
    subsets = list(dict.fromkeys(metrics["subset"].to_pylist()))
    history = [subset for subset in subsets if subset.startswith("history ")]
    lengths: list[Column] = [(subset.removeprefix("history "), subset, "eval/recall_10") for subset in history]
    groups: list[Column] = [
        (f"{who} {name}", f"{who} users", metric)
        for who in ("seen", "unseen")
        for name, metric in (("R@10", "eval/recall_10"), ("NDCG@10", "eval/ndcg_10"))
    ]
    made = (
        _table("models", "All models", metrics, ours, main, ceiling=True, picture=pictures.models(metrics, ours),
               note="Recall: the mean over baskets of hits / targets. The last row: what a perfect list would reach."),
        _retrieval(metrics, ours),
        _table("repeat", "Repeats and new items", metrics, ours, kinds,
               note="Repeat: targets that the user had before, in a ranking of the whole catalogue. New: targets that "
               "the user never had, in a ranking of the items that she never had (seen-filter on); unfiltered: in "
               "the ranking of the whole catalogue. A dash: the model wrote no such lists."),
        _table("history", "By length of the history", metrics, ours, lengths, note="Recall at 10.",
               picture=pictures.by_history(metrics, ours, history)),
        _table("users", "Users seen and not seen in training", metrics, ours, groups, note=""),
    )  # fmt: skip
    return tuple(table for table in made if table is not None)


def _table(
    name: str,
    title: str,
    metrics: pa.Table,
    ours: Who,
    columns: Sequence[Column],
    note: str,
    ceiling: bool = False,
    picture: Picture | None = None,
) -> Table | None:
    found = {column: cells(metrics, column[1], column[2]) for column in columns}
    columns = [column for column in columns if found[column]]
    if not columns:
        return None
    best = {column: max(float(row["value"]) for row in found[column].values()) for column in columns}
    rows: list[tuple[str, bool, tuple[Cell, ...]]] = []
    for who in ordered(metrics, ours):
        if any(who in found[column] for column in columns):
            line = tuple(_cell(found[column].get(who), best[column], who == ours) for column in columns)
            rows.append((name_of(who), who == ours, line))
    if ceiling:
        line = tuple(Cell(_ceiling(metrics, column[2]), "", False, False) for column in columns)
        rows.append(("ceiling", False, line))
    headings = tuple(f"{heading}|{_baskets(found[column])}" for column in columns for heading in [column[0]])
    sentence = "" if picture is None else picture.sentence
    return Table(name, title, note, headings, tuple(rows), sentence, picture)


def _baskets(rows: Mapping[Who, Mapping[str, Any]]) -> str:
    return f"{next(iter(rows.values()))['n']:,}"


def _cell(row: Mapping[str, Any] | None, best: float, ours: bool) -> Cell:
    if row is None or np.isnan(row["value"]):
        return Cell("–", "", False, ours)
    known = not np.isnan(row["low"])
    return Cell(
        short(row["value"]), f"{short(row['low'])} to {short(row['high'])}" if known else "", row["value"] == best, ours
    )


def _ceiling(metrics: pa.Table, metric: str) -> str:
    if not metric.startswith("eval/recall_"):
        return "1"
    found = cells(metrics, "all", metric.replace("recall_", "recall_ceiling_"))
    return short(next(iter(found.values()))["value"])


def _retrieval(metrics: pa.Table, ours: Who) -> Table | None:
    """For each model that retrieves: its list alone, the ceiling of that list, and what its other readings reach."""
    names = [f"eval/recall_{k}" for k in CUTOFFS[:3]]
    models = [who[0] for who in ordered(metrics, ours) if who[1] == "retrieve"]
    rows: list[tuple[str, bool, tuple[Cell, ...]]] = []
    sentences = []
    for model in models:
        share = cells(metrics, "all", "eval/retrieved")[model, "retrieve"]
        lines = {
            "retrieved alone": ("retrieve", "recall_"),
            "ceiling of a reranked list": ("retrieve", "reranked_ceiling_"),
            "reranked": ("rerank", "recall_"),
            "generated": ("generate", "recall_"),
        }
        for label, (reading, prefix) in lines.items():
            found = [cells(metrics, "all", name.replace("recall_", prefix)).get((model, reading)) for name in names]
            if any(row is not None for row in found):
                line = tuple(_cell(row, float("inf"), (model, reading) == ours) for row in found)
                rows.append((f"{model.replace('_', ' ')}: {label}", (model, reading) == ours, line))
        sentences.append(f"the list that {model} retrieves holds {share['value'] * 100:.1f} % of the targets "
                         f"(95 % {share['low'] * 100:.1f} to {share['high'] * 100:.1f})")  # fmt: skip
    if not rows:
        return None
    sentence = "; ".join(sentences) + "."
    return Table(
        "retrieval", "Retrieval, its ceiling, and what follows", "The ceiling of a reranked list is the recall with "
        "all of its targets in front. Whatever is not retrieved, no reranking brings back.",
        tuple(f"R@{k}|" for k in CUTOFFS[:3]), tuple(rows), sentence[0].upper() + sentence[1:],
    )  # fmt: skip


def tree_nodes(facts: TreeFacts) -> Node:
    """The root of the listing: two levels of nodes, largest first, and their leaves."""
    size, levels = facts.paths_ND.shape

    def node(items: np.ndarray[Any, Any], depth: int) -> Node:
        prefix = facts.paths_ND[items[0], :depth].tolist() if len(items) else []
        path = ".".join(map(str, prefix))
        leaf = depth == levels or depth > 2
        if leaf:
            whole = ".".join(map(str, facts.paths_ND[items[0]].tolist()))
            texts = pictures.examples(facts, items, MOST_ITEMS)
            more = f" and {len(items) - MOST_ITEMS:,} more" if len(items) > MOST_ITEMS else ""
            return Node(whole, len(items), len(items) / size, " · ".join(texts) + more, leaf=True)
        # below the second level a leaf is a whole path, whatever its depth
        below = facts.paths_ND[items][:, depth : depth + 1 if depth < 2 else levels]
        _, group, count = np.unique(below, axis=0, return_inverse=True, return_counts=True)
        ranked = np.argsort(-count, kind="stable")
        most = MOST_NODES if depth < 2 else MOST_LEAVES
        group = group.reshape(-1)
        children = tuple(node(items[group == g], depth + 1) for g in ranked[:most].tolist())
        texts = pictures.examples(facts, items, MOST_ITEMS)
        return Node(path, len(items), len(items) / max(size, 1), " · ".join(texts), children, max(0, len(count) - most))

    return node(np.arange(size), 0) if size and levels else Node("", 0, 0.0, "")


def _near(item: Neighbours) -> list[tuple[str, str, bool, str, str, bool]]:
    """Lines (fused text, cosine, is it a neighbour by text, too; the same of the text's neighbours)."""
    by_text, by_fusion = {text for text, _ in item.text}, {text for text, _ in item.fused}
    lines = []
    for place in range(max(len(item.fused), len(item.text))):
        left = item.fused[place] if place < len(item.fused) else None
        right = item.text[place] if place < len(item.text) else None
        lines.append((*_one(left, by_text), *_one(right, by_fusion)))
    return lines


def _one(entry: tuple[str, float] | None, other: set[str]) -> tuple[str, str, bool]:
    return ("", "", True) if entry is None else (entry[0], short(entry[1]), entry[0] in other)


def _near_sentence(items: Sequence[Neighbours]) -> str:
    if not items:
        return ""
    shared = [len({text for text, _ in item.fused} & {text for text, _ in item.text}) for item in items]
    listed = [len(item.fused) for item in items]
    return (
        f"Of {sum(listed):,} nearest neighbours of {len(items):,} items in the fused embedding, {sum(shared):,} are "
        "neighbours by text alone, too; the others are in bold."
    )


def _when(slot: Slot) -> str:
    return f"{slot.time:%Y-%m-%d %H:%M}" if isinstance(slot.time, dt.datetime) else f"{slot.time:%Y-%m-%d}"


def _next_sentence(basket: NextBasket) -> str:
    hits = [item for item in basket.ranked if item in basket.taken]
    return f"{len(hits)} of the {len(basket.ranked)} items in front are among the {len(basket.taken)} that came next."
