"""The loop: what it logs, keeps and stops for; and that a killed run goes on as if it had not been killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lum_ray.artifacts import UserError
from lum_ray.config import Train
from lum_ray.training.loop import DivergedError, Worker, lower_is_better, train_loop
from lum_ray.training.telemetry import is_wall_clock, read_metrics
from lum_ray.weights import load, steps
from tests.training import command
from tests.training.toy import ToyLoader, ToyStage, ToyStep

SETTINGS = Train(
    steps=12, learning_rate=1e-2, precision="fp32", validate_every=4, checkpoint_every=5, keep_best="eval/score"
)
ROOT = Path(__file__).parents[2]


def curve(place: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the fields that read a clock."""
    lines = read_metrics(str(place))
    return [{name: value for name, value in line.items() if not is_wall_clock(name)} for line in lines]


class Scores:
    """A validation that gives the next of `values` each time."""

    def __init__(self, *values: float, name: str = "eval/score") -> None:
        self.values, self.name = list(values), name

    def __call__(self, module: torch.nn.Module) -> dict[str, float]:
        assert not module.training
        assert not torch.is_grad_enabled()
        return {self.name: self.values.pop(0)}


@dataclass
class SignalledLoader(ToyLoader):
    """Sends this process a signal while the fourth step is read."""

    number: int = signal.SIGINT

    def seek(self, step: int) -> Iterator[ToyStep]:
        for item in super().seek(step):
            if item.index == 3:
                os.kill(os.getpid(), self.number)
            yield item


@pytest.mark.timeout(240)
def test_killed_at_a_random_step_it_follows_the_uninterrupted_run(tmp_path: Path) -> None:
    command.train(str(tmp_path / "whole"))
    kill_after = random.randint(9, 50)
    place = tmp_path / "killed"
    arguments = [sys.executable, "-m", "tests.training.command", str(place)]
    process = subprocess.Popen([*arguments, "0.05"], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not any(line["step"] >= kill_after for line in read_metrics(str(place))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert all(step.step < 60 for step in steps(str(place / "last")))
    (place / "metrics.jsonl").open("a").write('{"step": 59, "train/lo')  # a line that the kill cut off
    subprocess.run([*arguments, "0"], check=True, timeout=120, cwd=ROOT)
    assert curve(place) == curve(tmp_path / "whole"), f"killed after step {kill_after}"
    assert len(curve(place)) == 30
    expected = load(str(tmp_path / "whole" / "last")).tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(str(place / "last")).tensors.items())


def test_metrics_of_a_run(tmp_path: Path) -> None:
    reports: list[Any] = []
    worker = Worker(report=reports.append)
    result = train_loop(ToyStage(), ToyLoader(), Scores(0.5, 0.7, 0.6), SETTINGS, str(tmp_path), worker, log_every=3)
    lines = read_metrics(str(tmp_path))
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12]
    last = lines[-1]
    assert last["eval/score"] == 0.6
    assert "eval/score" not in lines[0]
    terms = [last[f"train/loss_{name}"] for name in ("square", "logistic", "rare")]
    assert last["train/loss"] == pytest.approx(sum(terms), rel=0.2)
    assert min(terms) > 0
    assert last["train/tokens_per_s"] > 0
    assert last["data/wait_s"] >= 0
    assert last["time/step_s"] > 0
    assert 0 < last["train/learning_rate"] < lines[0]["train/learning_rate"]
    assert last["train/grad_norm"] > 0
    assert result == {
        "uri": str(tmp_path),
        "step": 12,
        "best_step": 8,
        "best_value": 0.7,
        "metrics": {"eval/score": 0.6},
        "stopped_early": False,
        "resumed_from": 0,
    }
    assert [report["step"] for report in reports] == [4, 8, 12]
    assert load(str(tmp_path / "best")).loop["step"] == 8
    assert load(str(tmp_path / "last")).loop["step"] == 12
    assert list((tmp_path / "tensorboard").iterdir())
    assert not (tmp_path / ".writing").exists()


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    train_loop(ToyStage(), ToyLoader(), None, SETTINGS, str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    loader = ToyLoader()
    result = train_loop(ToyStage(), loader, None, SETTINGS, str(tmp_path))
    assert result["resumed_from"] == 12
    assert loader.sought == []
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_without_a_validation_the_best_are_the_last(tmp_path: Path) -> None:
    train_loop(ToyStage(), ToyLoader(), None, SETTINGS, str(tmp_path))
    last = load(str(tmp_path / "last")).tensors
    assert all(torch.equal(tensor, last[name]) for name, tensor in load(str(tmp_path)).tensors.items())


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=100, validate_every=2, patience=3)
    scores = Scores(0.1, 0.5, float("nan"), 0.4, 0.5, 0.9)
    result = train_loop(ToyStage(), ToyLoader(), scores, settings, str(tmp_path))
    assert result["stopped_early"]
    assert result["step"] == 10
    assert (result["best_step"], result["best_value"]) == (4, 0.5)
    assert load(str(tmp_path / "best")).loop["step"] == 4
    assert train_loop(ToyStage(), ToyLoader(), scores, settings, str(tmp_path))["resumed_from"] == 10


def test_what_is_stored_claims_no_best_weights_that_are_not(tmp_path: Path) -> None:
    """The best weights cannot be stored (their folder's place is taken), so the process ends within the checkpoint."""
    settings = replace(SETTINGS, checkpoint_every=4)
    (tmp_path / "best").write_text("")
    with pytest.raises(OSError, match="best"):
        train_loop(ToyStage(), ToyLoader(), Scores(0.9, 0.5), settings, str(tmp_path))
    assert steps(str(tmp_path / "last")) == []
    (tmp_path / "best").unlink()
    result = train_loop(ToyStage(), ToyLoader(), Scores(0.9, 0.5, 0.4), settings, str(tmp_path))
    assert (result["best_step"], result["best_value"]) == (4, 0.9)
    assert load(str(tmp_path / "best")).loop["step"] == 4


def test_best_weights_newer_than_the_last_are_found_again(tmp_path: Path) -> None:
    """Killed after the best weights of step 8 were stored and before the last of it: what is trained again is equal."""
    settings = replace(SETTINGS, checkpoint_every=4, patience=2)
    train_loop(ToyStage(), ToyLoader(), Scores(0.5, 0.9, 0.4), settings, str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train_loop(ToyStage(), SignalledLoader(), Scores(0.5), settings, str(tmp_path / "cut"))
    shutil.copytree(tmp_path / "whole" / "best", tmp_path / "cut" / "best", dirs_exist_ok=True)
    assert (steps(str(tmp_path / "cut" / "last"))[0].step, load(str(tmp_path / "cut")).loop["step"]) == (4, 8)
    result = train_loop(ToyStage(), ToyLoader(), Scores(0.9, 0.4), settings, str(tmp_path / "cut"))
    assert (result["resumed_from"], result["best_step"], result["step"]) == (4, 8, 12)
    one, other = (load(str(tmp_path / name)).tensors for name in ("whole", "cut"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_of_an_error_the_lowest_is_the_best(tmp_path: Path) -> None:
    settings = replace(SETTINGS, keep_best="eval/wmape_spend")
    scores = Scores(0.5, 0.3, 0.4, name="eval/wmape_spend")
    assert train_loop(ToyStage(), ToyLoader(), scores, settings, str(tmp_path))["best_step"] == 8
    assert lower_is_better("eval/loss")
    for name in ("eval/roc_auc", "eval/roc_auc_loss", "eval/ndcg_10", "eval/recall_5", "eval/mrr"):
        assert not lower_is_better(name)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_stop_signal_saves_the_step(tmp_path: Path, number: int, error: type[BaseException]) -> None:
    train_loop(ToyStage(0.2), ToyLoader(), None, SETTINGS, str(tmp_path / "whole"), log_every=3)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        train_loop(ToyStage(0.2), SignalledLoader(number=number), None, SETTINGS, str(tmp_path / "cut"), log_every=3)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert load(str(tmp_path / "cut" / "last")).loop["step"] == 4
    result = train_loop(ToyStage(0.2), ToyLoader(), None, SETTINGS, str(tmp_path / "cut"), log_every=3)
    assert result["resumed_from"] == 4
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    settings = replace(SETTINGS, checkpoint_every=2)
    with pytest.raises(DivergedError, match=r"step 6: the loss is nan.*not finite: logistic.*first users: user-5-0"):
        train_loop(ToyStage(nan_at=5), ToyLoader(), None, settings, str(tmp_path))
    assert load(str(tmp_path / "last")).loop["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in load(str(tmp_path / "last")).tensors.values())


def test_a_term_without_counts_is_not_logged(tmp_path: Path) -> None:
    train_loop(ToyStage(), ToyLoader(rare=False), None, SETTINGS, str(tmp_path))
    assert all("train/loss_rare" not in line and line["train/loss"] > 0 for line in read_metrics(str(tmp_path)))


def test_an_unknown_best_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keep_best: expected one of eval/auc, got 'eval/score'"):
        train_loop(ToyStage(), ToyLoader(), Scores(0.5, name="eval/auc"), SETTINGS, str(tmp_path))


def test_a_checkpoint_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_loop(ToyStage(), SignalledLoader(), None, SETTINGS, str(tmp_path))
    manifest = tmp_path / "last" / "manifest.json"
    found = json.loads(manifest.read_text())
    del found["steps"][0]["files"]["engine/state.safetensors"]
    manifest.write_text(json.dumps(found))
    (tmp_path / "last" / found["steps"][0]["folder"] / "engine" / "state.safetensors").unlink()
    with pytest.raises(UserError, match="a checkpoint of an earlier version"):
        train_loop(ToyStage(), ToyLoader(), None, SETTINGS, str(tmp_path))


def test_progress_is_on_stderr_and_engine_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_loop(ToyStage(), ToyLoader(), None, SETTINGS, str(tmp_path))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 10
