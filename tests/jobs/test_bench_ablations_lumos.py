from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.bench import ablations_lumos
from jobs.bench.ablation_arms import ABLATIONS, DATASETS, STATEMENTS
from jobs.bench.ablations_lumos import Bench, judge, verdict
from jobs.bench.rows import KEYS
from lum_ray.evaluation.bootstrap import Interval


def test_quick_trains_each_arm_once_and_prints_its_rows_alone_on_stdout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["--quick", "--dataset", "simulator", "--root", str(tmp_path), "--only", "static"]
    assert ablations_lumos.main(command) == 0
    first = capsys.readouterr()
    (row,) = [json.loads(line) for line in first.out.splitlines()]
    assert tuple(row) == KEYS
    assert row["what"] == "ablations_lumos/simulator/static/without/auc_gain"
    assert row["low"] <= row["value"] <= row["high"]
    run = row["run"]
    assert run["verdict"] in ("helps", "hurts", "no effect")
    assert row["value"] == pytest.approx(run["auc"] - run["base_auc"])
    assert row["value"] == pytest.approx(run["by_seed"][0] - run["base_by_seed"][0])
    assert 0 < run["active_any_7_auc"] < 1
    assert run["log_loss"] > 0
    assert not run["lumos"]["static"]
    assert first.err.count("training 2 steps") == 2
    assert "verdict" in first.err
    # resumed: nothing is trained again, a second seed alone is, and a checkpoint is shared with another ablation
    assert ablations_lumos.main(command) == 0
    again = capsys.readouterr()
    assert json.loads(again.out) == row
    assert "training" not in again.err
    assert ablations_lumos.main([*command, "--seeds", "2"]) == 0
    more = capsys.readouterr()
    assert more.err.count("training") == 2
    run = json.loads(more.out)["run"]
    assert run["auc"] == pytest.approx(np.mean(run["by_seed"]))
    assert len(set(run["by_seed"])) == 2
    assert ablations_lumos.main([*command[:-1], "decoder_self_attention"]) == 0
    other = capsys.readouterr()
    assert other.err.count("training") == 1
    assert "no decoder self-attention is needed" in other.err


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_table_of_arms_is_the_issues_and_each_differs_from_its_base(dataset: str) -> None:
    assert {name: set(ablation.arms) for name, ablation in ABLATIONS.items()} == {
        "positions": {"learned", "sinusoidal", "rope", "time2vec"},
        "events": {"none", "past_only", "future_only", "both", "future_shuffled"},
        "static": {"with", "without"},
        "pad": {"learned", "zero"},
        "loss_weighting": {"uncertainty", "sum", "geometric"},
        "decoder_self_attention": {"without", "with"},
        "encoder_layers": {"1", "2", "3"},
        "history_days": {"28", "56", "112", "224"},
    }
    bench = Bench(dataset, "nowhere", "nowhere", 1, False)
    for name, ablation in ABLATIONS.items():
        runs = [bench.run_of(name, arm, 0) for arm in ablation.arms]  # read strictly: a wrong field would be refused
        assert len({repr(run) for run in runs}) == len(runs)
        assert all(run.split == runs[0].split and run.train == runs[0].train for run in runs)
    said = {statement.ablation: statement.arms for statement in STATEMENTS}
    assert all(set(arms) < set(ABLATIONS[name].arms) for name, arms in said.items())
    for name in ("static", "loss_weighting", "encoder_layers", "history_days"):  # one checkpoint for all of them
        assert bench.run_of(name, ABLATIONS[name].base, 0) == bench.run_of("events", "both", 0)
    assert bench.run_of("positions", "learned", 0).section.causal is False


def test_paper_form_is_the_papers() -> None:
    section = Bench("oulad", "nowhere", "nowhere", 1, False).run_of("positions", "learned", 0).section
    departs = (section.causal, section.lag_logits, section.day_match, section.raw_values)
    assert departs == (False, False, False, False)
    assert (section.cuts_per_window, section.continuous, section.pad) == (1, "point", "learned")
    assert (section.loss_weighting, section.positions) == ("uncertainty", "learned")


def test_verdicts_need_an_interval_without_0_and_seeds_that_agree() -> None:
    assert verdict(Interval(0.02, 0.01, 0.03), (0.01, 0.03)) == "helps"
    assert verdict(Interval(-0.02, -0.03, -0.01), (-0.02,)) == "hurts"
    assert verdict(Interval(0.02, -0.01, 0.05), (0.02,)) == "no effect"
    assert verdict(Interval(0.02, 0.01, 0.03), (-0.01, 0.05)) == "no effect"


def test_a_statement_is_confirmed_by_all_of_its_arms_only() -> None:
    assert judge(["hurts", "hurts"], ("hurts",)) == "confirmed"
    assert judge(["hurts", "no effect"], ("hurts",)) == "in part"
    assert judge(["no effect", "no effect"], ("hurts",)) == "not shown"
    assert judge(["hurts", "helps"], ("hurts",)) == "refuted"
    assert judge(["no effect"], ("hurts", "no effect")) == "confirmed"


def test_out_of_time_is_exit_code_1_and_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(bench: Bench, name: str) -> list[ablations_lumos.Found]:
        import time

        time.sleep(5)
        return []

    monkeypatch.setattr(Bench, "measure", slow)
    assert ablations_lumos.main(["--only", "pad,static", "--max-minutes", "0.002"]) == 1
    assert "left out: pad, static" in capsys.readouterr().err


def test_an_unknown_ablation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablations_lumos.main(["--only", "positons"])
    assert "positons" in capsys.readouterr().err
