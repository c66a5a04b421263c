"""The leak battery on trained runs: it passes what is honest, and fails what was made to leak."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from jobs.cli import app
from lum_ray import catalog, config
from lum_ray.config import Run
from lum_ray.data.loader import Loader
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples, hash_strings
from lum_ray.evaluation.audit import Check
from lum_ray.evaluation.ranking_baselines import Popularity
from lum_ray.gts.stage import GtsStage
from lum_ray.lumos.stage import LumosStage
from lum_ray.stage import to_device
from lum_ray.steps import gts_audit
from lum_ray.steps.audit import audit
from lum_ray.steps.audit_rows import Cases, cases_of, with_future
from lum_ray.steps.gts_audit import (
    candidate_check,
    constant_rankings,
    shuffle_checks,
    unchanged_checks,
)
from lum_ray.steps.gts_audit_fitted import fitted_checks
from lum_ray.steps.gts_prepare import GtsPrepared, prepare_gts
from lum_ray.steps.gts_train import make_stage
from lum_ray.steps.lumos_audit import unchanged_checks as unchanged_lumos
from lum_ray.steps.predict import trained_stage as trained_lumos
from lum_ray.steps.prepare import cut_plan, fit_until, prepare
from lum_ray.steps.train import train

Honest = tuple[Run, GtsPrepared, GtsStage, Cases, dict[str, Any]]


def changed(run: Run, *assignments: str) -> Run:
    return catalog.read_run(config.override(config.dump(run), list(assignments)))


def verdicts(checks: list[Check] | tuple[Check, ...]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


@pytest.fixture(scope="module")
def honest(tiny_gts: Run) -> Honest:
    """A trained stage over the tiny run's data, its test users, and popularity on their baskets."""
    prepared = prepare_gts(tiny_gts)
    stage = trained_for(tiny_gts, prepared, 100)
    timelines = Timelines.open(prepared.sequences.uri)
    cases = cases_of(timelines, cut_plan(tiny_gts, "test", timelines.end_day), 200, 0)
    return tiny_gts, prepared, stage, cases, constants_of(prepared, stage, cases)


def constants_of(prepared: GtsPrepared, stage: GtsStage, cases: Cases) -> dict[str, Any]:
    popularity = Popularity.count([rows_of(prepared)], prepared.catalogue)
    return constant_rankings(stage, cases, prepared.catalogue, popularity)


def rows_of(prepared: GtsPrepared) -> Rows:
    timelines = Timelines.open(prepared.sequences.uri)
    return timelines.read(range(timelines.buckets))


def small_rows() -> Rows:
    """Three users with events on days (1, 5, 5, 8), (2, 6), (7,); the values are 10, 11, ..."""
    names = np.array(["a", "b", "c"], object)
    return Rows(
        user=names,
        user_hash=hash_strings(names),
        offsets=np.array([0, 4, 6, 7]),
        days=np.array([1, 5, 5, 8, 2, 6, 7], np.int32),
        values=np.arange(10, 17)[:, None],
        first_day=np.array([1, 2, 7], np.int32),
        end_day=np.array([9, 9, 9], np.int32),
        segment=np.array(["", "", ""], object),
        profile={},
    )


def test_another_future_by_hand() -> None:
    rows, cut = small_rows(), np.array([5, 5, 8])
    swapped = with_future(rows, cut, np.array([1, 0, -1]), lambda values: values + 100)
    assert swapped.offsets.tolist() == [0, 2, 6, 7]
    assert swapped.days.tolist() == [1, 6, 2, 5, 5, 8, 7]
    assert swapped.values[:, 0].tolist() == [10, 115, 14, 111, 112, 113, 16]
    assert swapped.end_day.tolist() == [9, 9, 9] and rows.values[:, 0].tolist() == list(range(10, 17))
    gone = with_future(rows, cut, None)
    assert gone.days.tolist() == [1, 2, 7] and gone.offsets.tolist() == [0, 1, 2, 3]
    assert gone.end_day.tolist() == [5, 5, 8]


def test_strangers_are_other_users_of_the_same_cut() -> None:
    samples = Samples(np.array([0, 0, 1, 2, 1]), np.array([5, 6, 5, 5, 7], np.int32), np.zeros(5, np.int32))
    cases = Cases.of(small_rows(), samples)
    found = cases.strangers()
    assert found[1] == found[4] == -1
    assert sorted(found[[0, 2, 3]].tolist()) == [0, 2, 3] and (found != np.arange(5)).all()


def test_the_honest_reading_passes_and_the_command_says_so(tiny_gts: Run, run_file: Callable[[Run], str]) -> None:
    done = CliRunner().invoke(app, ["audit", run_file(tiny_gts), "--max-users", "40"])
    assert done.exit_code == 0, done.output
    uri = done.stdout.strip().splitlines()[-1]
    assert Path(uri).parent == Path(tiny_gts.root) / "reports" and "gts_tiny-audit-" in uri
    found = json.loads((Path(uri) / "audit.json").read_text())
    assert found["leaky"] == [] and found["users"] == 40
    said = {check["name"]: check["verdict"] for check in found["checks"]}
    assert {name for name, verdict in said.items() if verdict != "ok"} == {
        "every candidate as prefix", "null world", "calendar",
    }  # fmt: skip
    assert {"swap labels (P)", "truncate (R)", "shuffle histories (P)", "kept negatives", "fitted before the cut"} <= {
        *said
    }
    again = audit(tiny_gts, max_users=40)
    assert again.uri == uri and not again.leaky and len(again.checks) == len(said)


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[[Run], str]:
    from jobs.run_file import commented

    def write(run: Run) -> str:
        (tmp_path / "run.yaml").write_text(commented(run))
        return str(tmp_path / "run.yaml")

    return write


def test_the_literal_reading_is_leaky_and_exit_code_one(tiny_gts: Run, run_file: Callable[[Run], str]) -> None:
    """Even after two steps, when it does not copy yet: its scores read the labels."""
    few = ["--set", "gts.reading=literal", "--set", "gts.align_steps=0", "--set", "train.steps=2"]
    done = CliRunner().invoke(app, ["audit", run_file(tiny_gts), *few])
    assert done.exit_code == 1
    assert "LEAKY swap labels (R), truncate (R)" in done.stderr
    assert done.stdout.strip().startswith(f"{tiny_gts.root}/reports/gts_tiny-audit-")


def test_a_literal_model_that_was_trained_copies_the_target_whatever_the_history(honest: Honest) -> None:
    """The three rows of FIELD: in front 1.00, histories shuffled 1.00, every candidate as prefix about chance.

    The target stands at the end here, where a tiny Llama with random weights learns to copy it within some steps.
    """
    run, prepared, _, cases, _ = honest
    stage = trained_for(
        changed(run, "gts.reading=literal", "gts.target_position=end", "gts.generation=false"), prepared, 160
    )
    shuffled = shuffle_checks(stage, cases, constants_of(prepared, stage, cases))
    assert verdicts(shuffled) == {"shuffle histories (R)": "LEAKY"}
    assert shuffled[0].values["value"] > 0.9
    each = candidate_check(stage, cases, lambda text: None)
    assert each.verdict == "LEAKY" and each.values["value"] > 0.8 > 0.3 > each.values["reference"]
    assert set(verdicts(unchanged_checks(stage, cases)).values()) == {"LEAKY"}


def trained_for(run: Run, prepared: GtsPrepared, steps: int) -> GtsStage:
    """A stage after some plain steps of Adam, without the machinery of training."""
    timelines = Timelines.open(prepared.sequences.uri)
    stage = make_stage(run, prepared, fit_until(run, timelines.end_day))
    plan = cut_plan(run, "train", timelines.end_day)
    loader = Loader(timelines, plan, stage.collate, batch=32, micro_batch=32, draws=1, seed=0, rank=0, world=1)
    optimizer = torch.optim.Adam([p for p in stage.module.parameters() if p.requires_grad], lr=0.01)
    stage.module.train()
    for _ in range(steps):
        for arrays in next(loader).micro_batches:
            sums, counts = stage.loss(to_device(arrays, torch.device("cpu")))
            optimizer.zero_grad()
            (sums / counts.clamp(min=1)).sum().backward()
            torch.nn.utils.clip_grad_norm_(stage.module.parameters(), 1.0)
            optimizer.step()
    loader.close()
    stage.module.eval()
    return stage


def test_a_collate_that_reads_after_the_cut_is_caught(honest: Honest, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, stage, cases, _ = honest
    honest_sequences = GtsStage.sequences

    def leaking(self: GtsStage, rows: Rows, samples: Samples) -> Any:
        return honest_sequences(self, rows, replace(samples, cut=samples.cut + 7))

    monkeypatch.setattr(GtsStage, "sequences", leaking)
    found = verdicts(unchanged_checks(stage, cases))
    assert sorted(found) == ["swap labels (P)", "swap labels (R)", "truncate (P)", "truncate (R)"]
    assert set(found.values()) == {"LEAKY"}


def test_what_p_gains_is_gone_with_strangers_histories_unless_it_knows_the_label(
    honest: Honest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R is made to know popularity alone, so that P, which knows what the user had before, gains on it."""
    _, _, stage, cases, constants = honest
    popular = torch.from_numpy(stage.inputs.arrays["log_q_N"])
    monkeypatch.setattr(GtsStage, "scores", lambda self, batch, literal=None: popular.repeat(len(batch["length_B"]), 1))
    wide = GtsStage(replace(stage.config, rerank=60), stage.inputs, stage.until_day, 0, stage.module)
    found = shuffle_checks(wide, cases, constants)[1]
    assert found.verdict == "ok"
    assert found.values["own_gain_low"] > 0 >= found.values["shuffled_gain_low"]

    # a P that is told the labels of whoever the history is given to
    labels, strangers = gts_audit.Labels.of(stage, cases), cases.strangers()
    told = np.full((len(cases), int(np.diff(labels.offsets).max())), -1, np.int64)
    for row in range(len(cases)):
        own = labels.item[labels.offsets[row] : labels.offsets[row + 1]]
        told[strangers[row], : len(own)] = own

    def knowing(self: GtsStage, batch: Any, items_BK: torch.Tensor, at_once: int = 256) -> torch.Tensor:
        wanted = torch.from_numpy(told)[batch["row"]]
        return (items_BK[:, :, None] == wanted[:, None]).any(-1).float()

    number = {name: row for row, name in enumerate(cases.rows.user.tolist())}
    plain = gts_audit.batch_of

    def numbered(stage: GtsStage, some: Cases) -> Any:
        return {**plain(stage, some), "row": torch.tensor([number[name] for name in some.rows.user.tolist()])}

    monkeypatch.setattr(gts_audit, "batch_of", numbered)
    monkeypatch.setattr(GtsStage, "propensities", knowing)
    assert shuffle_checks(wide, cases, constants)[1].verdict == "LEAKY"


def test_statistics_of_later_events_are_caught(honest: Honest) -> None:
    run, prepared, stage, _, _ = honest
    timelines = Timelines.open(prepared.sequences.uri)
    rows = rows_of(prepared)
    everything = np.bincount(stage.inputs.index_of(rows.values[:, 0]), minlength=stage.inputs.count)
    inputs = replace(stage.inputs, arrays={**stage.inputs.arrays, "count_N": everything})
    found = fitted_checks(run, prepared, GtsStage(stage.config, inputs, 2**31 - 1, 0, stage.module), timelines)
    assert verdicts(found)["fitted before the cut"] == "LEAKY"
    assert "1 of" in found[1].figure and "count_N" in found[1].figure


def test_nothing_beats_popularity_in_the_null_world(tiny_gts: Run) -> None:
    raw = config.dump(tiny_gts)
    raw["data"]["source"]["options"] |= {"world": "null", "users": 100}
    run = changed(catalog.read_run(raw), "gts.align_steps=0", "train.steps=20", "train.learning_rate=0.003")
    found = verdicts(audit(run).checks)
    assert {name: verdict for name, verdict in found.items() if name.startswith("null world")} == {
        "null world (R)": "ok", "null world (P)": "ok", "null world (generated)": "ok",
    }  # fmt: skip
    assert "LEAKY" not in found.values()


def test_lumos_passes_and_a_collate_that_reads_after_the_cut_does_not(
    tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = audit(tiny, max_users=30)
    assert {name: verdict for name, verdict in verdicts(found.checks).items() if verdict != "ok"} == {
        "null world": "not applicable"
    }
    assert len(found.checks) == 8
    prepared, honest_collate = prepare(tiny), LumosStage.collate
    stage = trained_lumos(tiny, prepared, train(tiny), 2**31 - 1)
    timelines = Timelines.open(prepared.timelines.uri)
    cases = cases_of(timelines, cut_plan(tiny, "test", timelines.end_day), 30, 0)

    def leaking(self: LumosStage, rows: Rows, samples: Samples, scenarios: Any = ()) -> Any:
        return honest_collate(self, rows, replace(samples, cut=samples.cut + 1), scenarios)

    monkeypatch.setattr(LumosStage, "collate", leaking)
    assert verdicts(unchanged_lumos(stage, cases)) == {"swap labels": "LEAKY", "truncate": "LEAKY"}
