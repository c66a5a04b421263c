"""The contest on a small simulated world, as `lum-ray evaluate --lightgbm` runs it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lum_ray import presets
from lum_ray.artifacts import UserError, read_bytes
from lum_ray.config import Run
from lum_ray.data.rows import Samples
from lum_ray.evaluation import boosted, strata
from lum_ray.lumos.collate import Calendar
from lum_ray.lumos.stage import layout_of
from lum_ray.steps import contest as step
from lum_ray.steps.prepare import prepare

TASKS = ("active_any_7",)


@pytest.fixture(autouse=True)
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightgbm")
    monkeypatch.setattr(boosted, "MOST_TREES", 30)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    tiny = presets.lumos_tiny()
    return dataclasses.replace(
        tiny,
        root=str(tmp_path_factory.mktemp("contest")),
        data=dataclasses.replace(tiny.data, engine="local"),
        train=dataclasses.replace(tiny.train, steps=2, validate_every=2, checkpoint_every=2),
    )


def test_seeds_their_average_and_the_peer_on_the_same_rows(run: Run) -> None:
    found = step.contest(run, names=TASKS, seeds=(0, 1), calendar=TASKS, threads=1)
    average = f"{run.name}_{step.AVERAGE}"
    assert found.predictions.models == (boosted.MODEL, run.name, average)
    forecasts = found.predictions.forecasts
    mean = np.mean([forecasts["active_any_7", run.name, seed]["p"] for seed in (0, 1)], axis=0)
    assert forecasts["active_any_7", average, 0]["p"] == pytest.approx(mean, abs=1e-6)
    assert found.worth is not None and {row["model"] for row in found.worth.to_pylist()} == {run.name, boosted.MODEL}
    (every,) = [row for row in found.strata.to_pylist() if row["by"] == strata.EVERY]
    rows = {(row["model"], row["metric"]): row["value"] for row in found.table.to_pylist()}
    assert every["ours"] == pytest.approx(rows[run.name, strata.AUC])
    assert every["peer"] == pytest.approx(rows[boosted.MODEL, strata.AUC])
    assert rows[boosted.MODEL, strata.AUC] > 0.6  # a world with a signal
    report = read_bytes(f"{found.uri}/report.html").decode()
    assert "Where each is better" in report and "What the calendar is worth" in report


def test_a_second_contest_fits_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = step.peer(run, step.contest_tasks(run, TASKS), threads=1)
    monkeypatch.setattr(step, "boosted_of", lambda *_: pytest.fail("fitted again"))
    assert step.peer(run, step.contest_tasks(run, TASKS), threads=1) == first


def test_the_peer_learns_from_training_days_alone(run: Run) -> None:
    prepared = prepare(run)
    fitted = step.boosted_of(run, prepared)
    until = step.fit_until(run, int(prepared.timelines.manifest["end_day"]))
    known = ~np.isnan(fitted.train.cuts.over[:, 0])
    assert known.any()
    assert (fitted.train.cuts.samples.cut[known] + 7 <= until).all()


def test_the_calendar_is_that_known_at_the_cut(run: Run) -> None:
    prepared = prepare(run)
    cuts = step.asked_cuts(run, prepared)
    part = step._part(run, prepared, cuts)
    layout = layout_of(run.section, prepared.inputs)
    calendar = Calendar(prepared.calendar_table, layout)
    some = np.arange(0, len(cuts.samples), 97)
    samples = Samples(cuts.samples.row[some], cuts.samples.cut[some], cuts.samples.draw[some])
    cut = samples.cut.astype(np.int64)
    at, start = (cuts.rows.user_hash[samples.row], cuts.rows.segment[samples.row]), cut - 3
    rows, index = calendar.look_up(*at, start, np.repeat(cut[:, None], 10, axis=1))
    counts = rows[index][:, :, layout.rhythm_width : layout.rhythm_width + len(layout.types)]
    assert np.array_equal(part.ahead.counts_ET[part.ahead.past_SL[some, :3]], counts[:, 2::-1])
    assert np.array_equal(part.ahead.counts_ET[part.ahead.future_SX[some, :7]], counts[:, 3:])


def test_tasks_bring_their_gates_and_others_are_refused(run: Run) -> None:
    grocery = presets.lumos_demo()
    assert set(step.contest_tasks(grocery, ("spend_sum_7",))) == {"spend_sum_7", "active_any_7"}
    assert "churned" not in step.contest_tasks(grocery)
    with pytest.raises(UserError, match=r"tasks: expected some of .*; got spend, nothing"):
        step.contest_tasks(grocery, ("spend", "nothing"))


def test_a_split_without_test_users_is_named(run: Run) -> None:
    nobody = dataclasses.replace(run.split.test, users=(0.0, 1e-9))
    empty = dataclasses.replace(run, split=dataclasses.replace(run.split, test=nobody))
    with pytest.raises(UserError, match=r"no user has a cut on days .* check `split`"):
        step.asked_cuts(empty, prepare(empty))
