"""The arrows, end to end on the simulator: each finds or builds, and says what is wrong before work starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lum_ray import catalog, config
from lum_ray.artifacts import UserError, open_artifact
from lum_ray.config import Run
from lum_ray.data.adapters.worlds import cohort_of
from lum_ray.data.reader import Timelines
from lum_ray.evaluation.protocol import validation_names
from lum_ray.steps import evaluate, predict, prepare, train
from lum_ray.steps.evaluate import by_cohort
from lum_ray.steps.predict import assign, check_cohorts
from lum_ray.steps.prepare import cut_plan, describe, now_and_then
from lum_ray.steps.train import _validation, make_stage, tasks_of
from lum_ray.training.loop import Worker


def changed(run: Run, *assignments: str) -> Run:
    return catalog.read_run(config.override(config.dump(run), list(assignments)))


def test_everything_is_found_again(tiny: Run) -> None:
    said: list[str] = []
    first, again = prepare(tiny), prepare(tiny, said.append)
    assert (first.timelines.uri, first.calendar.uri, first.fitted.uri) == (
        again.timelines.uri, again.calendar.uri, again.fitted.uri,
    )  # fmt: skip
    assert train(tiny, said.append) == train(tiny)
    assert said == ["already trained"]


@pytest.mark.parametrize("model", ["tiny", "tiny_gts"])
def test_fresh_removes_nothing_where_there_is_no_room_to_train(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Run = request.getfixturevalue(model)
    before = train(run)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="one GPU asked for"):
        train(changed(run, "train.device=cuda"), fresh=True)
    assert open_artifact(before).manifest["kind"] == "checkpoint"


def test_a_long_prepare_says_how_far_it_is() -> None:
    said: list[str] = []
    now_and_then(said.append)("read", 1, 3)
    assert said == [], "a short one says nothing"
    progress = now_and_then(said.append, every_s=0.0)
    for done in range(4):
        progress("read", done, 3)
    assert said == ["read: 1 of 3 blocks", "read: 2 of 3 blocks", "read: 3 of 3 blocks"]


def test_what_shapes_an_artifact_names_it(tiny: Run) -> None:
    base = prepare(tiny)
    wider = prepare(changed(tiny, "lumos.history_days=20", "train.workers=2", "serve.port=1"))
    assert wider.timelines.uri == base.timelines.uri
    assert wider.fitted.uri == base.fitted.uri
    fewer = prepare(changed(tiny, "split.validate_from=2024-05-05"))
    assert fewer.timelines.uri == base.timelines.uri
    assert fewer.fitted.uri != base.fitted.uri
    raw = config.dump(tiny)
    raw["data"]["behaviours"].append({"name": "late", "kind": "binary", "aggregate": "any(amount > 50)"})
    assert prepare(catalog.read_run(raw)).timelines.uri != base.timelines.uri


def test_a_run_without_calendar_does_not_share_the_calendar_of_one_with(tiny: Run) -> None:
    raw = config.dump(tiny)
    raw["data"]["calendar"] = None
    bare = prepare(catalog.read_run(raw))
    assert bare.calendar.uri != prepare(tiny).calendar.uri
    assert bare.calendar_table.num_rows == 0
    assert prepare(tiny).calendar_table.num_rows > 0
    assert bare.timelines.uri == prepare(tiny).timelines.uri


def test_the_run_in_a_checkpoint_can_be_run_again(tiny: Run) -> None:
    record = json.loads((Path(train(tiny)) / "run.json").read_text())
    assert catalog.read_run(record["run"]) == tiny


def test_describe_counts_what_is_there(tiny: Run) -> None:
    facts = describe(tiny, prepare(tiny))
    assert facts["users"] == 200
    assert facts["rows_rejected"] == 0
    assert 0 < facts["bytes_per_token"] < 10
    assert facts["event_types"] == ["festival", "match"]


def test_training_cuts_end_before_validation_and_users_can_be_kept_apart(tiny: Run) -> None:
    timelines = Timelines.open(prepare(tiny).timelines.uri)
    rows, end_day = timelines.read(range(timelines.buckets)), 20089
    plan = cut_plan(tiny, "train", end_day)
    assert plan.every(rows).cut.max() + tiny.section.future_days <= config.day_number(tiny.split.validate_from)
    validate = cut_plan(tiny, "validate", end_day)
    assert validate.until_day + tiny.section.future_days <= config.day_number(tiny.split.test.from_day)
    raw = config.dump(tiny)
    raw["split"] |= {"validate_from": None}
    raw["split"]["validate"] |= {"users": [0.5, 0.8]}
    raw["split"]["test"] |= {"users": [0.8, 1.0]}
    apart = catalog.read_run(raw)
    members = {part: cut_plan(apart, part, end_day).users(rows) for part in ("train", "validate", "test")}
    assert (sum(member.astype(int) for member in members.values()) == 1).all()
    assert {part: round(float(m.mean()), 1) for part, m in members.items()} == {
        "train": 0.5,
        "validate": 0.3,
        "test": 0.2,
    }


def test_evaluate_writes_prediction_files_metrics_and_report(tiny: Run) -> None:
    found = evaluate(tiny)
    rows = {(r["model"], r["task"], r["metric"]): r for r in found.table.to_pylist()}
    assert {model for model, _, _ in rows} == {
        "lumos_tiny", "constant", "same_weekday", "active_share_84", "recency_frequency_logistic",
    }  # fmt: skip
    assert rows["constant", "active", "eval/roc_auc"]["value"] == pytest.approx(0.5, abs=0.01)
    assert rows["active_share_84", "active_any_7", "eval/roc_auc"]["value"] > 0.65
    html = (Path(found.uri) / "report.html").read_text()
    for part in ("Calibration", "attention", "What if"):
        assert part.lower() in html.lower()
    folder = Path(tiny.root) / "predictions" / f"{Path(found.uri).name}-test" / "predictions"
    table = pq.read_table(folder / "lumos_tiny.parquet")
    keys = table.select(["user", "cut_day", "day", "behaviour"]).to_pandas()
    assert not keys.duplicated().any()
    assert evaluate(tiny).uri == found.uri
    few = evaluate(tiny, max_users=50)
    assert few.uri != found.uri


def test_predict_covers_every_user_and_assigns_cohorts_that_stay(tiny: Run) -> None:
    uri = predict(tiny, cut_day="2024-12-01", cohorts={"treatment": 0.5, "control": 0.5}, salt="s")
    table = pq.read_table(Path(uri) / "predictions")
    existed = prepare(tiny).timelines.manifest["users"]
    assert len(set(table["user"].to_pylist())) <= existed
    assert set(table["cut_day"].to_pylist()) == {config.day_number("2024-12-01")}
    cohorts = pq.read_table(Path(uri) / "cohorts.parquet").to_pydict()
    assert len(cohorts["user"]) == existed
    assert assign(cohorts["user"][::-1], {"treatment": 0.5, "control": 0.5}, "s") == cohorts["cohort"][::-1]
    compared = by_cohort(tiny, uri)
    assert {row["task"] for row in compared.to_pylist()} >= {"active", "active_any_7", "amount"}
    with pytest.raises(UserError, match="sum to 1"):
        check_cohorts({"a": 0.5, "b": 0.4})
    with pytest.raises(UserError, match=r"--cut 2030-01-01: expected a day after"):
        predict(tiny, cut_day="2030-01-01")
    coming = predict(tiny)
    assert open_artifact(coming).manifest["cut_day"] == 20089
    with pytest.raises(UserError, match="expected predictions with cohorts"):
        by_cohort(tiny, coming)


def test_an_earlier_checkpoint_predicts_newer_data(tiny: Run, tmp_path: Path) -> None:
    """Yesterday's model on today's tables: its own scales and vocabularies, no training."""
    folder = next((Path(tiny.root) / "raw").iterdir())
    events = pq.read_table(folder / "events")
    target = tmp_path / "events"
    target.mkdir()
    pq.write_table(events.slice(0, events.num_rows // 2), target / "0.parquet")
    pq.write_table(events.slice(events.num_rows // 2), target / "1.parquet")
    newer = changed(tiny, f"data.events.path={target}")
    assert prepare(newer).fitted.uri != prepare(tiny).fitted.uri
    said: list[str] = []
    uri = predict(newer, said.append, cut_day="2024-12-01", checkpoint=train(tiny))
    assert not any("training" in text for text in said)
    keys = [("user", "ascending"), ("day", "ascending"), ("behaviour", "ascending")]
    one, other = (
        pq.read_table(Path(place) / "predictions").sort_by(keys) for place in (uri, predict(tiny, cut_day="2024-12-01"))
    )
    np.testing.assert_allclose(one["mean"].to_numpy(), other["mean"].to_numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="expected a checkpoint"):
        predict(newer, cut_day="2024-12-01", checkpoint=str(tmp_path))
    raw = config.dump(newer)
    raw["data"]["behaviours"][0]["aggregate"] = "any(amount > 0)"
    with pytest.raises(UserError, match="trained on other behaviours"):
        predict(catalog.read_run(raw), cut_day="2024-12-02", checkpoint=train(tiny))


def test_the_simulator_plants_its_cohorts_by_the_same_rule() -> None:
    users = [f"u{i:09d}" for i in range(200)]
    shares = {"treatment": 0.3, "control": 0.7}
    assert assign(users, shares, "x") == [cohort_of(user, shares, "x") for user in users]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["data.source=null"], r"data\.events\.path: missing; give the folder"),
        (["data.source.options={usrs: 3}"], "usrs"),
        (["data.behaviours.0.aggregate=any(amnt > 0)"], r"active.*amnt.*amount"),
        (["data.profiles.categories=[cuntry]"], "cuntry"),
        (["split.validate_from=2019-01-01"], "no event lies before day 17897"),
        (["split.validate_from=2024-13-01"], r"split: validate_from: expected a day number or an ISO date"),
        (["split.test.from_day=2024-07-15"], r"split: expected validate_from <= validate\.from_day < test\.from_day"),
        (["split.test.from_day=null"], r"split: test\.from_day: missing"),
        (["split.train.from_day=2024-12-28"], r"split\.train: no user has a cut there"),
        (
            ["train.keep_best=eval/ndcg_10"],
            r"train\.keep_best: .* 'eval/ndcg_10'; .* eval/loss, eval/roc_auc, ",
        ),
    ],
)
def test_what_is_wrong_with_a_run_is_said_before_training(tiny: Run, assignments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(changed(tiny, *assignments))


def test_a_metric_of_the_other_model_is_refused_before_phase_one(tiny_gts: Run, tmp_path: Path) -> None:
    run = changed(tiny_gts, f"root={tmp_path}", f"train.keep_best={config.Train().keep_best}")
    with pytest.raises(UserError, match=r"train\.keep_best: .* reports 'eval/roc_auc'; expected one of eval/recall_5"):
        train(run)
    assert not list(tmp_path.iterdir())


def test_names_of_a_validation_are_those_it_reports(tiny: Run) -> None:
    reported = open_artifact(train(tiny)).manifest["metrics"]
    assert set(reported) == {"eval/loss", *validation_names(tasks_of(tiny))}


@pytest.mark.parametrize("world", [1, 2])
def test_a_validation_without_users_is_named(tiny: Run, world: int) -> None:
    """Also where several workers share nothing."""
    run, prepared = changed(tiny, "split.validate.users=[0.999999, 1.0]"), prepare(tiny)
    timelines = Timelines.open(prepared.timelines.uri)
    stage = make_stage(run, prepared, int(timelines.manifest["end_day"]), 1)
    with pytest.raises(UserError, match=r"split\.validate: no user has a cut there"):
        _validation(run, timelines, stage, Worker(world=world))(stage.module)


def test_events_after_the_cut_change_no_prediction(tiny: Run, tmp_path: Path) -> None:
    """The whole path on tables that are cut off at the prediction day: the same predictions as on the full ones."""
    full = predict(tiny, cut_day="2024-12-01")
    folder = next((Path(tiny.root) / "raw").iterdir())
    events = pq.read_table(folder / "events")
    day = events["time"].cast("date32").cast("int32").to_numpy()
    target = tmp_path / "events"
    target.mkdir()
    pq.write_table(events.filter(day < config.day_number("2024-12-01")), target / "0.parquet")
    cutoff = changed(tiny, f"data.events.path={target}", f"root={tmp_path}/root")
    from lum_ray.data.windows import CutPlan
    from lum_ray.steps.predict import prediction_tables, trained_stage

    short = prepare(dataclasses.replace(cutoff, root=str(tmp_path / "root")))
    stage = trained_stage(tiny, prepare(tiny), train(tiny), 2**31 - 1)
    cut = config.day_number("2024-12-01")
    plan = CutPlan(cut, cut, 1, 0)
    import pyarrow as pa

    again = pa.concat_tables(prediction_tables(stage, Timelines.open(short.timelines.uri), plan, "m", 0, cut=cut))
    order = [("user", "ascending"), ("behaviour", "ascending"), ("day", "ascending")]
    one, other = pq.read_table(Path(full) / "predictions").sort_by(order), again.sort_by(order)
    assert one["user"].to_pylist() == other["user"].to_pylist()
    np.testing.assert_allclose(one["mean"].to_numpy(), other["mean"].to_numpy(), rtol=1e-5, atol=1e-6)
