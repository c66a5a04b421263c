"""Ranking files are refused with at most five offenders; ranks, metrics and intervals equal those by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lum_ray.artifacts import UserError
from lum_ray.evaluation import bootstrap, ranking
from lum_ray.evaluation.ranking import MISSED, RANKING_SCHEMA, TARGETS_SCHEMA

IDS = [f"i{n}" for n in range(12)]
NAN = float("nan")


def lists(
    users: list[str],
    items: list[list[int]],
    model: str = "m",
    scores: list[list[float]] | None = None,
    **options: object,
) -> pa.Table:
    """Rankings of the users at cut 7; items are places in IDS."""
    scored = scores or [[float(-n) for n in range(len(row))] for row in items]
    rows = [
        {"user": user, "cut_day": 7, "rank": n + 1, "item": IDS[item], "score": score, "reading": "retrieve"}
        | {"model": model, "seed": 0, "seen_filter": False}
        | options
        for user, row, values in zip(users, items, scored, strict=True)
        for n, (item, score) in enumerate(zip(row, values, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=RANKING_SCHEMA)


def taken(users: list[str], items: list[list[int]], repeats: tuple[int, ...] = (), history: int = 3) -> pa.Table:
    rows = [
        {
            "user": user,
            "cut_day": 7,
            "item": IDS[item],
            "repeat": item in repeats,
            "history": history,
            "seen_user": True,
        }
        for user, row in zip(users, items, strict=True)
        for item in row
    ]
    return pa.Table.from_pylist(rows, schema=TARGETS_SCHEMA)


def values(table: pa.Table, subset: str, model: str = "m") -> dict[str, float]:
    return {
        row["metric"].removeprefix("eval/"): row["value"]
        for row in table.to_pylist()
        if (row["subset"], row["model"]) == (subset, model)
    }


def test_metrics_by_hand(tmp_path: Path) -> None:
    ranking.write_targets(str(tmp_path), "0", taken(["a", "b"], [[0, 1, 2], [3]]))
    ranking.write_rankings(str(tmp_path), "0", lists(["a", "b"], [[0, 5, 1, 6, 7, 8, 2], [4, 5, 6, 7, 8, 9, 3]]))
    found = values(ranking.evaluate_rankings(ranking.read_rankings(str(tmp_path)), cutoffs=(2, 5, 7, 50)), "all")
    gain = [1 / math.log2(rank + 1) for rank in range(1, 8)]
    expected = {
        "recall_2": (1 / 3 + 0) / 2,
        "recall_5": (2 / 3 + 0) / 2,
        "recall_7": 1.0,
        "recall_ceiling_2": (2 / 3 + 1) / 2,
        "recall_ceiling_5": 1.0,
        "hit_rate_5": 0.5,
        "ndcg_2": (gain[0] / (gain[0] + gain[1]) + 0) / 2,
        "ndcg_7": ((gain[0] + gain[2] + gain[6]) / sum(gain[:3]) + gain[6]) / 2,
        "mrr": (1 + 1 / 7) / 2,
        "retrieved": 1.0,
        "reranked_ceiling_2": (2 / 3 + 1) / 2,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert "recall_50" not in found  # the lists hold 7 items: what would come after is not known


def test_a_retrieved_list_bounds_what_reranking_can_reach(tmp_path: Path) -> None:
    ranking.write_targets(str(tmp_path), "0", taken(["a"], [[0, 1, 2, 3]]))
    ranking.write_rankings(str(tmp_path), "0", lists(["a"], [[5, 6, 0, 1, 7]]))
    ranking.write_rankings(str(tmp_path), "1", lists(["a"], [[0, 1, 5, 6, 7]], reading="rerank"))
    table = ranking.evaluate_rankings(ranking.read_rankings(str(tmp_path)), ("m", "rerank"), cutoffs=(2, 5))
    rows = {(row["reading"], row["metric"]): row for row in table.to_pylist() if row["subset"] == "all"}
    assert rows["retrieve", "eval/recall_2"]["value"] == 0
    assert rows["rerank", "eval/recall_2"]["value"] == rows["retrieve", "eval/reranked_ceiling_2"]["value"] == 0.5
    assert rows["retrieve", "eval/retrieved"]["value"] == rows["rerank", "eval/retrieved"]["value"] == 0.5
    assert rows["retrieve", "eval/recall_2"]["gain"] == 0.5
    assert rows["rerank", "eval/recall_2"]["gain"] is None


def test_repeats_and_new_items_apart_and_the_seen_filter(tmp_path: Path) -> None:
    ranking.write_targets(str(tmp_path), "0", taken(["a", "b"], [[0, 1], [0, 2]], repeats=(0,)))
    ranking.write_rankings(str(tmp_path), "0", lists(["a", "b"], [[0, 5, 1], [0, 5, 6]]))
    ranking.write_rankings(str(tmp_path), "1", lists(["a", "b"], [[1, 5], [5, 2]], seen_filter=True))
    table = ranking.evaluate_rankings(ranking.read_rankings(str(tmp_path)), cutoffs=(1, 2))
    assert values(table, "repeat")["recall_1"] == 1
    assert values(table, "explore, seen items listed")["recall_2"] == 0
    assert values(table, "explore")["recall_1"] == 0.5
    assert values(table, "explore")["recall_2"] == 1
    assert values(table, "history 1 to 5")["recall_1"] == values(table, "all")["recall_1"] == 0.5
    assert not values(table, "unseen users") and not values(table, "history 6 to 20")
    ranking.write_rankings(str(tmp_path), "1", lists(["a", "b"], [[1, 0], [5, 2]], seen_filter=True))
    with pytest.raises(UserError, match=r"m \(retrieve, seed 0, seen-filter\): .* 1 targets are repeats: \(a, 7, i0\)"):
        ranking.read_rankings(str(tmp_path))


def test_ties_count_against_the_target_and_nan_never_hits(tmp_path: Path) -> None:
    users = ["a", "b", "c"]
    ranking.write_targets(str(tmp_path), "0", taken(users, [[0], [0, 1], [0]]))
    scores = [[1.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 1.0], [1.0, NAN, NAN, NAN]]
    ranking.write_rankings(str(tmp_path), "0", lists(users, [[0, 5, 6, 7], [0, 5, 1, 6], [5, 0, 6, 7]], scores=scores))
    read = ranking.read_rankings(str(tmp_path))
    assert read.ranks["m", "retrieve", 0, False].tolist() == [3, 2, 3, MISSED]  # b: one other item ties with both


def by_the_definition(scores: np.ndarray, baskets: list[int], items: list[int], pessimistic: bool) -> list[int]:
    result = []
    for place, (basket, item) in enumerate(zip(baskets, items, strict=True)):
        row = [-math.inf if math.isnan(value) else value for value in scores[basket].tolist()]
        mine = {i: n for n, (b, i) in enumerate(zip(baskets, items, strict=True)) if b == basket}
        rank = 1
        for other, value in enumerate(row):
            if value > row[item]:
                rank += 1
            elif value == row[item] and other != item:
                rank += mine[other] < place if other in mine else pessimistic
        result.append(rank)
    return result


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_ranks_equal_the_definition(data: st.DataObject) -> None:
    rows, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    score = st.sampled_from([0.0, 1.0, 2.0, NAN, -math.inf, math.inf])
    scores = np.array(data.draw(st.lists(st.lists(score, min_size=size, max_size=size), min_size=rows, max_size=rows)))
    every = [(b, i) for b in range(rows) for i in range(size)]
    chosen = data.draw(st.lists(st.sampled_from(every), unique=True, max_size=12))
    baskets, items = [b for b, _ in chosen], [i for _, i in chosen]
    targets = np.array(baskets, np.int64), np.array(items, np.int64)
    for pessimistic in (True, False):
        expected = by_the_definition(scores, baskets, items, pessimistic)
        assert ranking.ranks_of(scores.astype(np.float32), targets, pessimistic).tolist() == expected
    # a file's list of the whole catalogue, however it orders ties, gives the same ranks
    for basket in range(rows):
        row = np.where(np.isnan(scores[basket]), -np.inf, scores[basket])
        order = np.argsort(-row, kind="stable")
        if data.draw(st.booleans()):
            order = order[::-1][np.argsort(-row[order[::-1]], kind="stable")]
        own = [(n, i) for n, (b, i) in enumerate(chosen) if b == basket]
        start = np.arange(size) == 0
        got = ranking.tied_ranks(row[order], start, np.isin(order, [i for _, i in own]))
        known = [n for n, i in own if row[i] > -np.inf]
        all_ranks = by_the_definition(scores, baskets, items, True)
        assert sorted(got[got < MISSED].tolist()) == sorted(all_ranks[n] for n in known)
        assert (got == MISSED).sum() == len(own) - len(known)


def test_long_catalogues_are_ranked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    scores = random.integers(0, 9, (6, 40)).astype(np.float32)
    targets = np.repeat(np.arange(6), 5), np.concatenate([random.permutation(40)[:5] for _ in range(6)])
    whole = ranking.ranks_of(scores, targets)
    monkeypatch.setattr(ranking, "_BLOCK", 90)
    assert ranking.ranks_of(scores, targets).tolist() == whole.tolist()


def test_intervals_are_over_users_and_differences_paired(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    users = [f"u{n:03d}" for n in range(300)]
    hits = random.random(300) < 0.5
    better = hits | (random.random(300) < 0.1)
    for model, hit in (("ours", better), ("peer", hits)):
        ranking.write_rankings(str(tmp_path), model, lists(users, [[0, 1] if h else [1, 0] for h in hit], model))
    ranking.write_targets(str(tmp_path), "0", taken(users, [[0]] * 300))
    table = ranking.evaluate_rankings(ranking.read_rankings(str(tmp_path)), ("ours", "retrieve"), cutoffs=(1,))
    rows = {
        row["model"]: row for row in table.to_pylist() if (row["subset"], row["metric"]) == ("all", "eval/recall_1")
    }
    assert rows["peer"]["value"] == hits.mean() and rows["ours"]["value"] == better.mean()
    expected = bootstrap.interval(
        bootstrap.ratio_resamples((hits.astype(float), np.ones(300)), np.arange(300), bootstrap.user_weights(300))
    )
    assert rows["peer"]["low"] == pytest.approx(expected.low) and rows["peer"]["high"] == pytest.approx(expected.high)
    assert rows["peer"]["gain"] == pytest.approx((better & ~hits).mean())
    assert 0 < rows["peer"]["gain_low"] < rows["peer"]["gain"] < rows["peer"]["gain_high"]
    assert rows["peer"]["gain_high"] - rows["peer"]["gain_low"] < 0.8 * (rows["peer"]["high"] - rows["peer"]["low"])
    assert rows["ours"]["gain"] is None
    with pytest.raises(UserError, match=r"ours: expected one of .*'peer'.* got \('mine', 'retrieve'\)"):
        ranking.evaluate_rankings(ranking.read_rankings(str(tmp_path)), ("mine", "retrieve"))


def test_seeds_are_averaged(tmp_path: Path) -> None:
    ranking.write_targets(str(tmp_path), "0", taken(["a"], [[0]]))
    for seed, items in enumerate(([0, 1], [1, 0], [1, 2])):
        ranking.write_rankings(str(tmp_path), str(seed), lists(["a"], [items], seed=seed))
    table = ranking.evaluate_rankings(ranking.read_rankings(str(tmp_path)), cutoffs=(1, 2))
    row = next(row for row in table.to_pylist() if (row["subset"], row["metric"]) == ("all", "eval/recall_2"))
    assert row["value"] == pytest.approx(2 / 3) and row["seeds"] == 3
    assert row["seed_sd"] == pytest.approx(np.std([1, 1, 0], ddof=1))


def test_broken_lists_are_refused_before_they_are_written(tmp_path: Path) -> None:
    def refused(table: pa.Table, message: str) -> None:
        with pytest.raises(UserError, match=message):
            ranking.write_rankings(str(tmp_path), "0", table)
        assert not (tmp_path / "rankings").exists()

    def changed(column: str, content: list[object]) -> pa.Table:
        place = RANKING_SCHEMA.get_field_index(column)
        return good.set_column(place, column, pa.array(content, RANKING_SCHEMA.field(column).type))

    good = lists([f"u{n}" for n in range(7)], [[0, 1]] * 7)
    refused(
        changed("rank", [1, 1] * 7), r"each \(user, cut, rank\) once a list, 7 come again: \(u0, 7, 1, i1.*u4.*\.\.\.;"
    )
    refused(changed("rank", [1, 3] * 7), r"ranks 1, 2, 3, .* 7 rows follow a gap: \(u0, 7, 3, i1, -1\) of m")
    refused(changed("rank", [0, 1] * 7), "ranks from 1, 7 rows lie below")
    refused(changed("item", ["i0", "i0"] * 7), r"each \(user, cut, item\) once a list, 7 come again")
    refused(changed("score", [0.0, 1.0] * 7), "scores that do not rise with the rank, NaN last, 7 rows do")
    refused(changed("score", [NAN, 1.0] * 7), "NaN last, 7 rows do")
    refused(changed("reading", ["guess"] * 14), "expected one of retrieve, rerank, generate, baseline, got guess")
    refused(changed("user", [None] * 14), "column user: expected a value in each row, 14 are null")
    refused(good.append_column("note", good["user"]), "missing: none; unknown: note")
    refused(good.drop_columns(["score"]), "missing: score; unknown: none")
    ranking.write_rankings(str(tmp_path), "0", changed("score", [1.0, NAN] * 7).drop_columns(["seen_filter"]))


def test_broken_targets_are_refused(tmp_path: Path) -> None:
    def refused(table: pa.Table, message: str) -> None:
        with pytest.raises(UserError, match=message):
            ranking.write_targets(str(tmp_path), "0", table)

    good = taken(["a", "b"], [[0, 1], [2]])
    refused(pa.concat_tables([good, good.slice(1, 1)]), r"each target once, 1 come again: \(a, 7, i1\)")
    refused(pa.concat_tables([good, taken(["b"], [[3]], history=4)]), r"one history .* 1 rows differ: \(b, 7, i3\)")
    refused(taken(["a"], [[0]], repeats=(0,), history=0), r"above 0 for repeats, 1 rows do not fit: \(a, 7, i0\)")
    refused(good.drop_columns(["repeat"]), "missing: repeat")
    ranking.write_targets(str(tmp_path), "0", good.slice(0, 0))  # a bucket in which nobody came back
    with pytest.raises(UserError, match="its files hold no row"):
        ranking.read_targets(str(tmp_path))


def test_models_are_compared_on_the_same_baskets(tmp_path: Path) -> None:
    ours, peer = str(tmp_path / "ours"), str(tmp_path / "peer")
    for folder, model in ((ours, "ours"), (peer, "peer")):
        ranking.write_targets(folder, "0", taken(["a", "b"], [[0, 1], [2]]))
        ranking.write_rankings(folder, "0", lists(["a", "b", "nobody"], [[0, 3], [3, 2], [4]], model))
    read = ranking.read_rankings([ours, peer])
    assert [key.model for key in read.ranks] == ["ours", "peer"]
    assert read.ranks["ours", "retrieve", 0, False].tolist() == [1, MISSED, 2]
    ranking.write_rankings(peer, "1", lists(["b"], [[2]], "peer"))
    with pytest.raises(UserError, match=r"1\.parquet: peer .*each list in one file, 1 come again: \(b, 7\)"):
        ranking.read_rankings([ours, peer])
    ranking.write_rankings(peer, "0", lists(["nobody"], [[0]], "peer"))
    with pytest.raises(UserError, match=r"peer .*a list for each of 2 .* 1 have none: \(a, 7\)"):
        ranking.read_rankings([ours, peer])
    ranking.write_targets(peer, "0", taken(["a", "b"], [[0, 1], [4]]))
    with pytest.raises(UserError, match=r"the same in all folders, 2 rows differ: \('b', 7, 'i2'.*only in .*ours"):
        ranking.read_rankings([ours, peer])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    ranking.write_targets(str(tmp_path), "0", taken(["a"], [[0]]))
    path = Path(ranking.write_rankings(str(tmp_path), "0", lists(["a"], [[0, 1]])))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"0\.parquet: expected a whole parquet file"):
        ranking.read_rankings(str(tmp_path))
    pq.write_table(lists(["a"], [[0, 1]]).slice(0, 0), path)
    with pytest.raises(UserError, match="with rows, found none"):
        ranking.read_rankings(str(tmp_path))


def test_tables_from_arrays_leave_out_the_places_that_hold_no_item() -> None:
    items, scores = np.array([[2, 0], [1, -1]]), np.array([[0.5, 0.25], [1.0, NAN]])
    table = ranking.ranking_table(["a", "b"], np.array([7, 8]), items, scores, IDS, "m", "generate", 3, True)
    assert table.schema == RANKING_SCHEMA
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert rows == [
        ("a", 7, 1, "i2", 0.5, "generate", "m", 3, True),
        ("a", 7, 2, "i0", 0.25, "generate", "m", 3, True),
        ("b", 8, 1, "i1", 1.0, "generate", "m", 3, True),
    ]
    both = np.array([True, False])
    basket, item, repeat = np.array([1, 0]), np.array([2, 3]), np.array([False, True])
    found = ranking.targets_table(["a", "b"], np.array([7, 8]), np.array([4, 0]), both, basket, item, repeat, IDS)
    assert [tuple(row.values()) for row in found.to_pylist()] == [
        ("b", 8, "i2", False, 0, False),
        ("a", 7, "i3", True, 4, True),
    ]
