"""The ranking report: each section says its sentence or why it is missing; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import datetime as dt
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lum_ray.evaluation import ranking, ranking_pictures
from lum_ray.evaluation.ranking_report import (
    Neighbours,
    NextBasket,
    RankingFacts,
    Slot,
    TimeLine,
    TreeFacts,
    render,
    tables,
    tree_nodes,
    write_ranking_report,
)

IDS = [f"item {n:02d}" for n in range(40)]
OURS = ("gts_demo", "retrieve")
USERS = 160


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """One target a user, at place 1 to 12 of ours, two places lower with the baseline; reranking puts it in front."""
    folder = str(tmp_path_factory.mktemp("rankings"))
    random = np.random.default_rng(0)
    users, cut = [f"u{n:03d}" for n in range(USERS)], np.full(USERS, 9)
    target, place = random.integers(0, 40, USERS), random.integers(0, 12, USERS)
    history = np.where(np.arange(USERS) < 60, 10, 30)
    everyone, repeat = np.arange(USERS), np.arange(USERS) % 2 == 0
    ranking.write_targets(
        folder, "0", ranking.targets_table(users, cut, history, repeat, everyone, target, repeat, IDS)
    )

    def write(name: str, model: str, reading: str, places: np.ndarray, depth: int = 12, seen: bool = False) -> None:
        order = np.stack([random.permutation(np.delete(np.arange(40), item)) for item in target])
        items = np.stack(
            [np.insert(row, at, item)[:depth] for row, at, item in zip(order, places, target, strict=True)]
        )
        if seen:
            items = np.where(repeat[:, None], np.where(items == target[:, None], order[:, -1:], items), items)
        scores = -np.arange(items.shape[1]) * np.ones((USERS, 1))
        table = ranking.ranking_table(users, cut, items, scores, IDS, model, reading, 0, seen)
        ranking.write_rankings(folder, name, table)

    write("a", "gts_demo", "retrieve", place, 10)
    write("b", "gts_demo", "retrieve", place, 10, seen=True)
    write("c", "gts_demo", "rerank", np.where(place < 10, 0, 30), 10)
    write("d", "most_frequent", "baseline", place + 2)
    write("e", "most_frequent", "baseline", place + 2, seen=True)
    return ranking.evaluate_rankings(ranking.read_rankings(folder), OURS, resamples=50)


@pytest.fixture(scope="module")
def facts(metrics: pa.Table) -> RankingFacts:
    place = np.arange(40)
    paths = np.stack([place // 20, place % 20 // 5, place % 2], axis=1)
    slots = (
        Slot(dt.datetime(2017, 11, 3, 8, 15), "Friday morning rush hour", ("item 01", "item 02")),
        Slot(dt.date(2017, 11, 4), "Saturday", ("item 03",)),
        *(Slot(dt.datetime(2017, 11, 5 + n % 20, 18), "Sunday early evening", ("item 04",)) for n in range(40)),
    )
    near = Neighbours("item 07", (("item 08", 0.9), ("item 09", 0.8)), (("item 08", 0.95), ("item 30", 0.7)))
    return RankingFacts(
        title="A run <on> test data",
        ours=OURS,
        summary=(("model", "tiny & quick"),),
        metrics=metrics,
        tree=TreeFacts(paths, IDS, place),
        neighbours=(near,),
        time_line=TimeLine("ann", slots, NextBasket(("item 01", "item 05"), ("item 05", "item 06", "item 01"))),
        data=(("users", "160"),),
    )


def test_each_section_has_its_sentence(facts: RankingFacts, tmp_path: Path) -> None:
    path = tmp_path / "reports" / "rankings.html"
    assert write_ranking_report(str(path), facts) == str(path)
    text = re.sub(r"\s+", " ", unescape(path.read_text()))
    for sentence in (
        "gts demo: retrieve reaches a recall at 10 of .",
        "the best baseline, most frequent, .",
        "clearly above it",
        "the best of its other readings, gts demo: rerank, .",
        "The list that gts_demo retrieves holds ",
        "gts demo: ceiling of a reranked list",
        "Best in recall at 10: ",
        "40 items lie in 16 leaves, 3 levels deep; the first level has 2 nodes, the second 8; the largest node of the "
        "first level holds 50 % of the items.",
        "Of 2 nearest neighbours of 1 items in the fused embedding, 1 are neighbours by text alone, too",
        "<b>item 09</b>",
        "ann: 43 items in 42 slots from 3 November 2017 to 24 November 2017; the most frequent descriptor is "
        "“Sunday early evening” (40 slots).",
        "2 of the 3 items in front are among the 2 that came next.",
        "and 12 earlier slots",
        "tiny & quick",
    ):
        assert sentence in text, sentence
    assert "<h1>A run &lt;on&gt; test data</h1>" in path.read_text()
    assert "Not shown" not in text


def test_nothing_comes_from_outside(facts: RankingFacts) -> None:
    text = render(facts)
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert not re.search(r"https?://|<script|@import|url\(", text)
    assert set(re.findall(r"href=\"#(.*?)\"", text)) <= set(re.findall(r"id=\"(.*?)\"", text))
    images = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)
    assert len(images) == 4  # all models, by history, the tree, one user
    for image in images:
        ET.fromstring(base64.b64decode(image).decode())


def test_an_empty_run_announces_what_is_missing() -> None:
    text = unescape(render(RankingFacts("Nothing", OURS, no_tree="the IDs are random")))
    for reason in (
        "no summary was given",
        "no rankings were evaluated",
        "the IDs are random",
        "no embeddings were given",
        "no user was chosen",
        "no data facts were given",
    ):
        assert reason in text, reason
    assert "<img" not in text


def test_tables_show_the_metrics(metrics: pa.Table) -> None:
    rows = {(r["subset"], r["metric"], r["model"], r["reading"]): r["value"] for r in metrics.to_pylist()}
    shown = {table.name: table for table in tables(metrics, OURS)}
    assert list(shown) == ["models", "retrieval", "repeat", "history", "users"]
    names = [name for name, _, _ in shown["models"].rows]
    assert names == ["gts demo: retrieve", "gts demo: rerank", "most frequent", "ceiling"]
    assert [column.split("|")[0] for column in shown["models"].columns[:3]] == ["R@5", "R@10", "NDCG@5"]  # lists of 12
    for (name, is_ours, cells), reading in zip(shown["models"].rows, ("retrieve", "rerank"), strict=False):
        value = rows["all", "eval/recall_5", "gts_demo", reading]
        assert cells[0].value == ranking_pictures.short(value), name
        assert is_ours == (reading == "retrieve") and cells[0].best == (reading == "rerank")
    retrieved, ceiling, reranked = (cells for _, _, cells in shown["retrieval"].rows)
    assert reranked[0].value == ceiling[0].value > retrieved[0].value  # a perfect reranker reaches the ceiling
    repeat = {column.split("|")[0]: n for n, column in enumerate(shown["repeat"].columns)}
    by_name = {name: cells for name, _, cells in shown["repeat"].rows}
    assert by_name["gts demo: rerank"][repeat["new R@10"]].value == "–"  # it wrote no lists with the seen-filter
    assert by_name["gts demo: retrieve"][repeat["new R@10"]].value == ranking_pictures.short(
        rows["explore", "eval/recall_10", "gts_demo", "retrieve"]
    )
    assert [column.split("|") for column in shown["history"].columns] == [["6 to 20", "60"], ["21 to 100", "100"]]


def test_groups_with_few_baskets_are_not_drawn(metrics: pa.Table) -> None:
    few = [row | {"n": 49 if row["subset"] == "history 6 to 20" else row["n"]} for row in metrics.to_pylist()]
    table = pa.Table.from_pylist(few, schema=ranking.TABLE)
    picture = ranking_pictures.by_history(table, OURS, ["history 6 to 20", "history 21 to 100"])
    assert picture is not None and "Not drawn, with fewer than 50 baskets: 6 to 20 events." in picture.sentence
    assert ranking_pictures.by_history(table, OURS, ["history 6 to 20"]) is None


def test_the_tree_is_listed_down_to_its_leaves(facts: RankingFacts) -> None:
    assert facts.tree is not None
    root = tree_nodes(facts.tree)
    assert [(node.path, node.items, node.share) for node in root.children] == [("0", 20, 0.5), ("1", 20, 0.5)]
    first = root.children[0].children[0]
    assert (first.path, first.items, first.examples) == ("0.0", 5, "item 04 · item 03 · item 02 · item 01")
    assert [(leaf.path, leaf.items, leaf.examples) for leaf in first.children] == [
        ("0.0.0", 3, "item 04 · item 02 · item 00"),
        ("0.0.1", 2, "item 03 · item 01"),
    ]
    deep = replace(facts.tree, paths_ND=np.stack([*facts.tree.paths_ND.T, np.arange(40) % 3], axis=1))
    leaves = tree_nodes(deep).children[0].children[0].children
    assert sorted(leaf.path for leaf in leaves) == ["0.0.0.0", "0.0.0.1", "0.0.0.2", "0.0.1.0", "0.0.1.1"]
    flat = TreeFacts(np.arange(40)[:, None] % 2, IDS)
    assert [(node.path, node.leaf, node.examples) for node in tree_nodes(flat).children] == [
        ("0", True, "item 00 · item 02 · item 04 · item 06 and 16 more"),
        ("1", True, "item 01 · item 03 · item 05 · item 07 and 16 more"),
    ]
    assert "and 16 more" in unescape(render(replace(facts, tree=flat)))
