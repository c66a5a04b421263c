"""Spaces: what is wrong with one is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lum_ray import presets
from lum_ray.artifacts import UserError
from lum_ray.config import Run, Tune
from tuning import spaces
from tuning.objective import metric_of
from tuning.sweep import seconds, tune


@pytest.mark.parametrize("preset", ["lumos_demo", "lumos_oulad", "lumos_tiny", "lumos_paper", "gts_demo", "gts_paper"])
def test_the_built_in_spaces_fit_the_presets(preset: str) -> None:
    run = presets.PRESETS[preset]()
    for name, (model, _) in spaces.BUILT_IN.items():
        if model in (None, run.model):
            space = spaces.load_space(name, run)
            assert space.distributions
            assert space.base(run).section is not None
        else:
            with pytest.raises(UserError, match=f"{name} is a space of {model}"):
                spaces.load_space(name, run)


def test_a_longer_history_takes_its_cuts_along() -> None:
    run = presets.lumos_demo()
    space = spaces.load_space("lumos_shape", run)
    shorter = space.apply(run, {"lumos.history_days": 84})
    assert (shorter.section.history_days, shorter.section.cut_stride_days) == (84, 8)
    assert space.apply(run, {}) == run


def test_a_file_is_a_space(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "gts.slot_minutes: {choice: [15, 60]}\ngts.depth: {int: [1, 3]}\ntrain.learning_rate: {log: [0.001, 0.01]}\n"
        "train.weight_decay: {float: [0, 0.1]}\ntrain.steps: 4\n"
    )
    run = presets.gts_tiny()
    space = spaces.load_space(str(file), run)
    assert space.name == "mine" and space.map_of == ("gts.slot_minutes", "gts.depth")
    assert space.base(run).train.steps == 4
    made = space.apply(run, {"gts.slot_minutes": 60, "train.learning_rate": 0.005})
    assert (made.section.slot_minutes, made.train.learning_rate, made.train.steps) == (60, 0.005, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gts.slot_minuts: {choice: [15]}", "gts.slot_minuts: a setting that is not in the run gts_tiny; did you mean"),
        ("gts.llm.name: {choice: [a]}", "gts.llm.name: a setting that is not in the run"),
        ("gts.slot_minutes: {choice: [15, 25]}", "gts.slot_minutes may not be 25: .* a divisor of 1440"),
        ("gts.slot_minutes: {int: [5, 1440]}", "gts.slot_minutes may not be 7, 11, 13 and [0-9]+ more"),
        ("gts.depth: {float: [1, 3]}", "gts.depth may not be 1.0, 2.0, 3.0: .*integer"),
        ("train.learning_rate: {choice: [fast]}", "train.learning_rate may not be fast"),
        ("train.learning_rate: {log: [0, 1]}", "low above 0"),
        ("gts.depth: {int: [3, 1]}", "expected low <= high"),
        ("gts.depth: {int: [1.5, 3]}", "expected two whole numbers"),
        ("gts.depth: {uniform: [1, 2]}", "expected one of choice, int, float, log"),
        ("gts.depth: {choice: [1, 1]}", "expected distinct plain values"),
        ("gts.width: {choice: [16, 17]}", "gts.width may not be 17: heads: expected a divisor"),
        ("split.min_history_days: {int: [1, 2]}", "changes what is asked of a trial"),
        ("data.time_zone: {choice: [UTC]}", "changes what is asked of a trial"),
        ("train.workers: {choice: [1, 2]}", "changes what is asked of a trial or how it is run"),
        ("train.steps: 5", "nothing to search"),
        ("gts.depth: {choice: [1, 2]}\ntrain.steps: ten", "train.steps: .*integer"),
        ("[1, 2]", "expected settings such as"),
    ],
)
def test_a_bad_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        spaces.load_space(str(file), presets.gts_tiny())


def test_values_that_only_go_together_are_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "together.yaml"
    file.write_text("gts.width: {choice: [16, 18]}\ngts.heads: {choice: [2, 3]}\n")
    space = spaces.load_space(str(file), presets.gts_tiny())
    with pytest.raises(UserError, match="divisor of width"):
        space.apply(presets.gts_tiny(), {"gts.width": 16, "gts.heads": 3})


def test_a_metric_that_is_never_reported_is_refused() -> None:
    def run(preset: str, metric: str | None) -> Run:
        from dataclasses import replace

        return replace(presets.PRESETS[preset](), tune=Tune(metric=metric))

    assert metric_of(run("lumos_tiny", None)) == ("eval/roc_auc", "max")
    assert metric_of(run("lumos_tiny", "eval/wmape_amount")) == ("eval/wmape_amount", "min")
    assert metric_of(run("gts_tiny", None)) == ("eval/ndcg_10", "max")
    for preset, metric in (("lumos_tiny", "eval/ndcg_10"), ("gts_tiny", "eval/roc_auc"), ("gts_tiny", "eval/hits")):
        with pytest.raises(UserError, match=f"no validation of {preset} reports '{metric}'"):
            metric_of(run(preset, metric))
    with pytest.raises(UserError, match="a loss has another unit for each data shape"):
        tune(run("lumos_tiny", "eval/loss"))


def test_no_trials_are_refused() -> None:
    for name in ("trials", "parallel"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            Tune(**{name: 0})


@pytest.mark.parametrize(("text", "value"), [("2h", 7200), ("1h30m", 5400), ("90m", 5400), ("45s", 45), ("1.5h", 5400)])
def test_budgets(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "2", "h", "-2h", "0s", "2h of them"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected a duration such as 2h"):
        seconds(text)
