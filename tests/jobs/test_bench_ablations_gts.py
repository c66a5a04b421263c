from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jobs.bench import ablations_gts
from jobs.bench.ablation_arms_gts import ABLATIONS, DATASETS, FIGURES, STATEMENTS
from jobs.bench.ablations_gts import Bench, Found, compare, judge, tell, verdict
from jobs.bench.rows import KEYS
from lum_ray import catalog, config
from lum_ray.artifacts import UserError
from lum_ray.evaluation.bootstrap import Interval
from lum_ray.evaluation.ranking import MISSED, Baskets, ListKey, Rankings
from lum_ray.gts.config import ALIGN_TASKS


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_table_of_arms_is_the_issues_and_each_differs_from_its_base(dataset: str) -> None:
    assert {name: list(arms) for name, arms in ABLATIONS.items()} == {
        "timestamps": ["full", "none", "text", "component", "position"],
        "target": ["front", "none", "end"],
        "modalities": ["all", "text", "text_graph", "text_table"],
        "fusion": ["qformer", "mlp", "text"],
        "ids": ["spectral", "random"],
        "tune": ["frozen", "lora", "full"],
        "phase_1": ["all", *(f"without_{task}" for task in ALIGN_TASKS), "240_steps", "none"],
    }
    bench = Bench(dataset, "nowhere")
    bases = []
    for name, arms in ABLATIONS.items():
        runs = {arm: bench.run_of(name, arm) for arm in arms}
        for run in runs.values():  # read strictly: a wrong field or value would be refused
            assert catalog.read_run(config.dump(run)) == run
            assert run.data.engine == "local"
        assert len({repr(run) for run in runs.values()}) == len(runs)
        assert all(run.train == runs[next(iter(arms))].train for run in runs.values())
        bases.append(runs[next(iter(arms))])
    assert all(base == bases[0] for base in bases)  # one checkpoint for all of them
    for task in ALIGN_TASKS:
        left = bench.run_of("phase_1", f"without_{task}").section.align_tasks
        assert set(ALIGN_TASKS) - set(left) == {task}
    assert bench.run_of("phase_1", "none").section.align_steps == 0
    assert Bench(dataset, "nowhere", steps=7).run_of("ids", "random").train.steps == 7


@pytest.mark.parametrize("dataset", DATASETS)
def test_small_runs_are_read_strictly_and_only_the_planted_world_leaves_p_out(dataset: str) -> None:
    bench = Bench(dataset, "nowhere", small=True)
    base, target = bench.run_of("ids", "spectral"), bench.run_of("target", "front")
    for run in (base, target):
        assert catalog.read_run(config.dump(run)) == run
        assert run.train.validate_every == run.train.steps == run.train.checkpoint_every
    assert target.section.reads_targets
    assert base.section.reads_targets == (dataset == "complete_journey")
    assert base.split.test.users[1] < 1


def test_statements_are_about_arms_and_figures_that_there_are() -> None:
    for statement in STATEMENTS:
        assert set(statement.arms) < set(ABLATIONS[statement.ablation])
        assert statement.figure in FIGURES
    assert {statement.ablation for statement in STATEMENTS} == set(ABLATIONS) - {"tune"}


def test_quick_trains_each_arm_once_and_prints_its_rows_alone_on_stdout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["--quick", "--dataset", "simulator", "--root", str(tmp_path), "--only", "target"]
    assert ablations_gts.main(command) == 0
    first = capsys.readouterr()
    rows = [json.loads(line) for line in first.out.splitlines()]
    assert [row["what"] for row in rows] == [
        f"ablations_gts/simulator/target/{arm}/{figure}_gain" for arm in ("none", "end") for figure in FIGURES
    ]
    for row in rows:
        assert tuple(row) == KEYS
        assert row["low"] <= row["value"] <= row["high"]
        figure, run = row["what"].split("/")[-1].removesuffix("_gain"), row["run"]
        assert row["value"] == pytest.approx(run[figure] - run[f"base_{figure}"])
        assert run["gts"]["target_position"] == row["what"].split("/")[3]
        assert 0 < run["users"] <= run["baskets"]
    # without reading P, the list that is handed over is R's
    none = {figure: row["run"][figure] for figure, row in zip(FIGURES, rows[: len(FIGURES)], strict=True)}
    assert (none["rerank_recall_10"], none["rerank_ndcg_5"]) == (none["recall_10"], none["ndcg_5"])
    assert first.err.count("Phase II: 2 steps") == 3
    assert first.err.count("Phase I: ") == 1  # the arms differ in Phase II alone
    assert "| target | front | ." in first.err
    assert "| the target in front is best |" in first.err
    # resumed: nothing is trained or ranked again
    assert ablations_gts.main(command) == 0
    again = capsys.readouterr()
    assert [json.loads(line) for line in again.out.splitlines()] == rows
    assert "Phase" not in again.err
    assert "ranking" not in again.err


def rankings(ranks: Sequence[int], rerank: bool = True, repeat: bool = False) -> Rankings:
    """One basket of one target a user; `ranks` are those of all readings' lists."""
    count = len(ranks)
    users, each = np.array([f"u{n:02d}" for n in range(count)], dtype=object), np.arange(count)
    baskets = Baskets(
        users, each, np.zeros(count, np.int64), np.full(count, 9), np.ones(count, np.bool_),
        np.array(["a"], dtype=object), each, np.zeros(count, np.int64), np.full(count, repeat),
    )  # fmt: skip
    keys = [("retrieve", False), ("retrieve", True), *([("rerank", False)] if rerank else [])]
    found = {ListKey("m", reading, 0, seen): np.array(ranks, np.int64) for reading, seen in keys}
    return Rankings(baskets, found, dict.fromkeys(found, 200))


def test_gains_are_the_arms_over_the_base() -> None:
    found = compare("target", "none", rankings([MISSED] * 20), rankings([1] * 20, rerank=False))
    assert set(found.gain) == set(FIGURES)
    assert all(gain == Interval(1.0, 1.0, 1.0) for gain in found.gain.values())
    assert (found.value["ndcg_5"], found.base["ndcg_5"], found.users) == (1.0, 0.0, 20)
    back = compare("target", "end", rankings([1] * 20), rankings([MISSED] * 20))
    assert back.gain["rerank_ndcg_5"] == Interval(-1.0, -1.0, -1.0)


def test_rows_within_noise_print_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    base, arm = [1, MISSED] * 10, [MISSED, 1] * 10  # as many hits of other users
    same = [
        compare("target", "none", rankings(base), rankings(base)),
        compare("target", "end", *map(rankings, (base, arm))),
    ]
    assert all(verdict(gain) == "no effect" for one in same for gain in one.gain.values())
    assert same[1].gain["recall_10"].low < 0 < same[1].gain["recall_10"].high
    tell(same)
    lines = capsys.readouterr().err.splitlines()
    (none,) = [line for line in lines if line.startswith("| target | none |")]
    assert none.count("+.0000 [+.0000, +.0000], no effect") == len(FIGURES)
    assert any(line.startswith("| the target in front is best | no effect |") for line in lines)


def test_a_figure_without_targets_is_an_empty_cell(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare("ids", "random", rankings([1, 2], repeat=True), rankings([2, 1], repeat=True))
    assert set(found.gain) == set(FIGURES) - {"explore_recall_10"}
    tell([found])
    assert "| ids | spectral | 1.0000 |" in capsys.readouterr().err


def test_other_targets_are_refused() -> None:
    with pytest.raises(UserError, match="same targets, users"):
        compare("ids", "random", rankings([1, 2]), rankings([1]))


def test_verdicts_need_an_interval_without_0() -> None:
    assert verdict(Interval(0.02, 0.01, 0.03)) == "helps"
    assert verdict(Interval(-0.02, -0.03, -0.01)) == "hurts"
    assert verdict(Interval(0.02, -0.01, 0.05)) == verdict(Interval(0.0, 0.0, 0.0)) == "no effect"


def test_a_statement_is_confirmed_by_all_of_its_arms_only() -> None:
    assert judge(["hurts", "hurts"]) == "confirmed"
    assert judge(["hurts", "no effect"]) == "in part"
    assert judge(["no effect", "no effect"]) == "no effect"
    assert judge(["hurts", "helps"]) == "refuted"


def test_out_of_time_is_exit_code_1_and_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(bench: Bench, ablation: str, arm: str) -> Found:
        import time

        if arm == "end":
            time.sleep(5)
        return compare(ablation, arm, rankings([1, 2]), rankings([2, 1]))

    monkeypatch.setattr(Bench, "measure", slow)
    assert ablations_gts.main(["--only", "target,ids", "--max-minutes", "0.01"]) == 1
    told = capsys.readouterr().err
    assert "left out: target/end, ids/random" in told
    assert "| target | none |" in told  # what is there is told
    assert "the target in front is best" not in told  # a statement needs all of its arms


@pytest.mark.parametrize("wrong", [["--only", "targets"], ["--steps", "0"]])
def test_what_there_is_not_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablations_gts.main(wrong)
    assert f"{wrong[0]}: expected" in capsys.readouterr().err
