"""The contest's benchmark: its rows, its bars, and how it counts lines and students."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.bench import new_task, quality_lumos
from jobs.bench.quality_lumos import FLOORS, Bench, contest_run, student
from jobs.bench.rows import KEYS
from lum_ray.evaluation import boosted
from lum_ray.steps.contest import contest_tasks


def test_quick_prints_its_rows_and_computes_nothing_twice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lightgbm")
    monkeypatch.setattr(boosted, "MOST_TREES", 20)
    command = ["--dataset", "simulator", "--quick", "--root", str(tmp_path)]
    assert quality_lumos.main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["what"] for row in rows] == [
        "quality_lumos/simulator/active/auc_gain",
        "quality_lumos/simulator/active_any_7/auc_gain",
        "quality_lumos/simulator/mean/auc_gain",
        "quality_lumos/simulator/active/gap_share",
        "quality_lumos/simulator/active_any_7/gap_share",
    ]
    assert all(tuple(row) == KEYS and row["low"] <= row["value"] <= row["high"] for row in rows)
    assert rows[0]["value"] == pytest.approx(rows[0]["run"]["ours"] - rows[0]["run"]["peer"])
    oracle = rows[3]["run"]
    assert oracle["oracle"] > oracle["lightgbm"] > 0.5
    assert quality_lumos.main(command) == 0
    again = capsys.readouterr()
    assert [json.loads(line)["value"] for line in again.out.splitlines()] == [row["value"] for row in rows]
    assert "fitting lightgbm" not in again.err and "training" not in again.err


@pytest.mark.parametrize(("better", "missed"), [(0.001, 0), (-0.002, 5)])
def test_a_peer_under_a_floor_is_a_miss(better: float, missed: int, capsys: pytest.CaptureFixture[str]) -> None:
    def row(task: str, metric: str, text: str, more: bool) -> dict[str, Any]:
        floor = float(text)
        value = floor + better * (1 if more else -1) * (100 if floor > 1 else 1)
        figures = {"value": value, "low": value, "high": value}
        return {"model": boosted.MODEL, "task": task, "metric": metric, **figures}

    table = [row(*key, *floor) for key, floor in FLOORS["complete_journey"].items()]
    bench = Bench("complete_journey", contest_run("complete_journey", "runs", None, False), False)
    bench.floors(SimpleNamespace(table=SimpleNamespace(to_pylist=lambda: table)))  # type: ignore[arg-type]
    assert len(bench.missed) == missed
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize("dataset", quality_lumos.DATASETS)
def test_every_task_of_the_contest_is_one_of_its_run(dataset: str) -> None:
    run = contest_run(dataset, "runs", None, False)
    assert set(contest_tasks(run, quality_lumos.TASKS[dataset])) == set(quality_lumos.TASKS[dataset])
    assert {task for task, _ in FLOORS[dataset]} <= set(quality_lumos.TASKS[dataset])


def test_a_student_is_the_same_in_two_presentations() -> None:
    assert student("AAA_2013J_11391") == student("BBB_2014B_11391") == "11391"


def test_one_line_of_the_run_file_is_a_new_task() -> None:
    before = contest_run("complete_journey", "runs", None, False)
    added = set(new_task.commented(new_task.with_new_task(before)).splitlines()) - set(
        new_task.commented(before).splitlines()
    )
    assert sum("pastry" in line for line in added) == 1
    assert 100 < new_task.lines_of_code(boosted) < 300
