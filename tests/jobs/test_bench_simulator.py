from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from jobs.bench import simulator
from jobs.bench.rows import KEYS
from jobs.bench.simulator import Bench
from lum_ray.artifacts import write_bytes
from lum_ray.data.adapters.worlds import START_DAY, Options, World, world_of
from lum_ray.evaluation.bootstrap import Interval, user_weights

evaluate = importlib.import_module("lum_ray.steps.evaluate")  # the package has a function of that name


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own, and drawing it takes longer than all the rest."""
    monkeypatch.setattr(evaluate, "write_report", lambda uri, facts: write_bytes(uri, b"drawn elsewhere"))


def test_quick_trains_once_and_prints_its_rows_alone_on_stdout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["--quick", "--root", str(tmp_path), "--what"]
    assert simulator.main([*command, "oracle,treatment"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["what"] for row in rows] == [
        "simulator/oracle/active_auc_gap",
        "simulator/oracle/active_any_7_auc_gap",
        "simulator/treatment/effect",
        "simulator/treatment/effect_active_days",
    ]
    assert all(tuple(row) == KEYS and row["low"] <= row["value"] <= row["high"] for row in rows)
    assert rows[0]["run"]["oracle_auc"] > 0.7
    assert rows[0]["value"] == pytest.approx(rows[0]["run"]["oracle_auc"] - rows[0]["run"]["auc"])
    assert rows[0]["run"]["users"] == 40
    assert rows[0]["run"]["rows"] == 7 * rows[1]["run"]["rows"]
    assert simulator.main([*command, "treatment"]) == 0
    again = capsys.readouterr()
    assert [json.loads(line)["value"] for line in again.out.splitlines()] == [row["value"] for row in rows[2:]]
    assert "training" not in again.err


def test_quick_null(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert simulator.main(["--quick", "--root", str(tmp_path), "--what", "null"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["what"].rsplit("/", 1)[-1] for row in rows] == [
        "tasks_above_constant",
        "brier_excess",
        "log_loss_excess",
    ]
    assert rows[0]["run"]["tests"] == 3 * 7 + 1


def test_auc_gap_is_averaged_over_days() -> None:
    y = np.array([0.0, 1.0, 0.0, 1.0])
    p = np.array([0.1, 0.9, 0.9, 0.1])  # right on day 0, wrong on day 1
    offset, user = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert simulator.daily_auc(y, p, offset, user, user_weights(2, 5))[0] == 0.5


def test_an_auc_must_be_higher_the_more_are_looked_at() -> None:
    drawn = np.random.default_rng(0).normal(0.52, 0.01, 400)
    resamples = np.concatenate([[0.525], drawn])
    assert simulator.above_half(resamples, 1)
    assert not simulator.above_half(resamples, 22)
    assert simulator.above_half(resamples + 0.02, 22)
    assert not simulator.above_half(1 - resamples, 1)  # below chance is not above it


def test_excess_is_ours_minus_the_constants() -> None:
    user, weights = np.arange(200), user_weights(200, 50)
    noise = np.random.default_rng(0).normal(0, 0.1, 200)
    at = simulator.excess((0.3 + noise, np.full(200, 0.2)), user, weights, 4)
    assert at.low < at.value < at.high
    assert at.value == pytest.approx(0.1 + noise.mean())
    assert at.low > 0
    assert np.allclose(simulator.log_losses(np.array([1.0, 0.0]), np.array([0.25, 0.25])), -np.log([0.25, 0.75]))


@pytest.fixture
def yearly() -> World:
    return world_of(Options(users=1, shards=1, world="yearly"))


def test_attention_is_compared_between_last_years_event_and_days_nearby(yearly: World) -> None:
    festivals = [row for row in yearly.calendar if row.event_type == "winter_festival"]
    before, now = festivals[1:3]
    cut, history = now.start - 2, 406
    pairs = list(simulator.attention_pairs(yearly, cut, 7, history))
    assert [ahead for ahead, _, _ in pairs] == [2, 3, 4, 5, 6]
    _, same, quiet = pairs[0]
    assert (same + cut - history).tolist() == list(range(before.start, before.end + 1))
    distance = np.minimum(np.abs(quiet + cut - history - before.start), np.abs(quiet + cut - history - before.end))
    assert set(distance.tolist()) == set(range(3, 11))
    assert len(quiet) == 16


def test_no_pair_without_an_event_ahead_or_a_year_of_history(yearly: World) -> None:
    first = min(row.start for row in yearly.calendar)
    assert not list(simulator.attention_pairs(yearly, START_DAY + 380 + 5, 7, 406))  # no festival in that week
    assert not list(simulator.attention_pairs(yearly, first + 365, 7, 200))


@pytest.mark.parametrize(
    ("what", "value", "peer", "good"),
    [
        ("simulator/oracle/active_auc_gap", 0.009, None, True),
        ("simulator/oracle/active_auc_gap", 0.011, None, False),
        ("simulator/null/tasks_above_constant", 1.0, None, False),
        ("simulator/null/brier_excess", -0.2, None, False),
        ("simulator/yearly/attention_ratio", 0.99, None, False),
        ("simulator/treatment/effect", 0.05, 0.06, True),
        ("simulator/treatment/effect", 0.05, 0.2, False),
    ],
)
def test_a_missed_bar_is_kept(
    what: str, value: float, peer: float | None, good: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench("nowhere", False, [])
    bench.row(what, Interval(value, value - 0.1, value + 0.1), "x", {}, peer=peer)
    assert json.loads(capsys.readouterr().out)["run"]["bar"] == simulator.BARS[what][0]
    assert bench.missed == [] if good else bench.missed[0].startswith(f"{what}: expected")


def test_exit_code_is_1_for_a_missed_bar_and_for_too_little_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(simulator.PARTS, "oracle", lambda bench: bench.missed.append("too far"))
    assert simulator.main(["--what", "oracle"]) == 1
    assert "too far" in capsys.readouterr().err

    def slow(bench: Bench) -> None:
        import time

        time.sleep(5)

    monkeypatch.setitem(simulator.PARTS, "null", slow)
    assert simulator.main(["--what", "null", "--max-minutes", "0.002"]) == 1
    assert "left out: null" in capsys.readouterr().err


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simulator.main(["--what", "orakle"])
    assert "orakle" in capsys.readouterr().err
