"""Metrics files: cut at the step that a run resumes from, and the same on an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lum_ray import artifacts
from lum_ray.training import telemetry
from lum_ray.training.loop import train_loop
from lum_ray.training.telemetry import ProgressLine, Telemetry, is_wall_clock, read_metrics
from lum_ray.weights import load, steps
from tests.training import command
from tests.training.toy import ToyLoader, ToyStage


def test_lines_after_the_resumed_step_are_cut_away(tmp_path: Path) -> None:
    first = Telemetry(str(tmp_path), 0)
    for step in (2, 4, 6):
        first.write(step, {"train/loss": step / 2})
    first.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 8, "tra')
    second = Telemetry(str(tmp_path), 4)
    second.write(6, {"train/loss": 9.0})
    second.close()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(str(tmp_path))] == [(2, 1), (4, 2), (6, 9)]
    Telemetry(str(tmp_path), 0).close()
    assert read_metrics(str(tmp_path)) == []


def test_a_run_on_s3_resumes(s3_root: str, tmp_path: Path) -> None:
    store = f"{s3_root}/run"

    class Failing(ToyLoader):
        def seek(self, step: int) -> Any:
            for item in super().seek(step):
                if item.index == 20:
                    raise ConnectionError("gone")
                yield item

    arguments = (command.validation, command.SETTINGS)
    with pytest.raises(ConnectionError):
        train_loop(ToyStage(0.3), Failing(), *arguments, store, log_every=2)
    assert [step.step for step in steps(store + "/last")] == [14, 7]
    result = train_loop(ToyStage(0.3), ToyLoader(), *arguments, store, log_every=2)
    assert result["resumed_from"] == 14
    command.train(str(tmp_path))
    for stored, local in zip(read_metrics(store), read_metrics(str(tmp_path)), strict=True):
        assert {k: v for k, v in stored.items() if not is_wall_clock(k)} == {
            k: v for k, v in local.items() if not is_wall_clock(k)
        }
    boards = [file for file in artifacts.list_files(store) if "/tensorboard/" in file]
    assert len(boards) == 2 and all(len(artifacts.read_bytes(file)) > 500 for file in boards)
    assert load(store).tensors["first.weight"].equal(load(str(tmp_path)).tensors["first.weight"])


def test_wall_clock_fields() -> None:
    assert all(is_wall_clock(name) for name in ("time/step_s", "data/wait_s", "train/tokens_per_s"))
    assert not any(is_wall_clock(name) for name in ("train/loss", "train/loss_visits", "eval/roc_auc", "step"))


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ProgressLine(10, 0, shown=True) as line, ProgressLine(10, 0, shown=False) as other:
        line.show(1, {"train/loss": 0.5})
        monkeypatch.setattr(telemetry, "LINE_EVERY_S", -1.0)
        line.show(2, {"train/loss": 0.25, "train/loss_a": 1.0})
        other.show(2, {"train/loss": 0.25})
        line.note("resumed")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == "train: step 2 of 10  train/loss 0.25\nresumed\n"
