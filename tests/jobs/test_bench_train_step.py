from __future__ import annotations

import json

import pytest
import torch

from jobs.bench import train_step
from jobs.bench.rows import KEYS, emit, spread


def test_quick_prints_both_rows_and_nothing_else_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(["--quick"]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["what"] for row in rows] == ["train_step/heads_tokenizer/ratio", "train_step/lumos_paper/tokens_per_s"]
    assert all(tuple(row) == KEYS for row in rows)
    assert rows[1]["run"]["loss_difference"] < 1e-4
    assert "largest loss difference" in err


def test_forms_that_differ_end_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = train_step.mean_losses

    def wrong(model: train_step.Lumos, batch: train_step.Batch, plain: bool) -> torch.Tensor:
        return honest(model, batch, plain) + 0.001 * plain

    monkeypatch.setattr(train_step, "mean_losses", wrong)
    assert train_step.main(["--quick"]) == 1
    assert "expected differences under 0.0001" in capsys.readouterr().err


def test_forms_are_timed_in_turn() -> None:
    calls: list[str] = []
    seconds = train_step.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == ["a", "b"] * 4
    assert [len(samples) for samples in seconds] == [3, 3]


def test_a_row_holds_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    row = emit(
        "x/y/z", 2.0, "s", run={"n": 1}, machine="here", packages=("torch", "no-such-package"), low=1.0, high=3.0
    )
    assert json.loads(capsys.readouterr().out) == row
    assert tuple(row) == KEYS
    assert set(row["versions"]) == {"python", "torch"}
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
