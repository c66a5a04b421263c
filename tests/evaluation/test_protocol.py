"""The metrics table, cohorts and validation scores, on tables small enough to compute by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from lum_ray.artifacts import UserError
from lum_ray.evaluation import baselines, metrics, protocol
from lum_ray.evaluation.predictions import SCHEMA, Task, check
from tests.evaluation.small_world import SETTING, TASKS, splits


def table(model: str, rows: list[dict[str, Any]], seed: int = 0) -> pa.Table:
    base = {"model": model, "seed": seed} | {name: float("nan") for name in ("p", "mean", "median", "low", "high")}
    return pa.Table.from_pylist([base | row for row in rows], schema=SCHEMA)


def active_rows(p: list[float], y: list[float]) -> list[dict[str, Any]]:
    keys = [(f"u{i}", 10, 10 + day) for i in range(4) for day in range(2)]
    return [
        {"user": u, "cut_day": c, "day": d, "behaviour": "active", "p": q, "mean": q, "y": v}
        for (u, c, d), q, v in zip(keys, p, y, strict=True)
    ]


def value(found: pa.Table, model: str, task: str, metric: str, column: str = "value") -> float:
    rows = pl.from_arrow(found).filter(model=model, task=task, metric=f"eval/{metric}")
    assert len(rows) == 1
    return rows[column][0]


Y = [0, 0, 1, 1, 0, 1, 1, np.nan]
P = [0.1, 0.6, 0.8, 0.4, 0.3, 0.7, 0.2, 0.9]


def test_binary_metrics_by_hand() -> None:
    tasks = {"active": Task("binary")}
    found = protocol.evaluate(check(table("ours", active_rows(P, Y)), tasks), tasks)
    # Day 1: scores .1 .8 .3 .2 of y 0 1 0 1: 3 of 4 pairs. Day 2: .6 .4 .7 of y 0 1 1: 1 of 2 pairs; one is unknown.
    assert value(found, "ours", "active", "roc_auc_day_1") == 0.75
    assert value(found, "ours", "active", "roc_auc_day_2") == 0.5
    assert value(found, "ours", "active", "roc_auc") == 0.625
    assert value(found, "ours", "active", "roc_auc_pooled") == pytest.approx(metrics.roc_auc(Y[:7], P[:7]))
    assert value(found, "ours", "active", "brier") == pytest.approx(metrics.brier(Y[:7], P[:7]))
    assert value(found, "ours", "active", "bias") == pytest.approx(sum(P[:7]) / 4 - 1)
    assert value(found, "ours", "active", "brier", "n") == 7


def test_per_cut_differs_from_offsets_pooled_over_cuts() -> None:
    rows = active_rows([0.1, 0.5, 0.2, 0.6, 0.1, 0.5, 0.2, 0.6], [0, 0, 1, 1, 0, 0, 1, 1])
    later = [row | {"cut_day": 20, "day": 20 + i % 2, "p": row["p"] + 0.3} for i, row in enumerate(rows)]
    tasks = {"active": Task("binary")}
    found = protocol.evaluate(check(table("ours", rows + later), tasks), tasks)
    assert value(found, "ours", "active", "roc_auc_per_cut") == 1
    assert value(found, "ours", "active", "roc_auc") == 0.75


def test_gated_number_uses_the_gates_outcome_and_masked_zeros() -> None:
    gate = active_rows([0.5] * 8, [1, 0, 1, 0, 1, 0, 1, np.nan])
    spend = [
        row | {"behaviour": "spend", "p": 0.5, "mean": 5.0, "median": 8.0, "low": 5.0, "high": 12.0, "y": y}
        for row, y in zip(gate, [10, 0, 20, np.nan, 4, 0, 8, np.nan], strict=True)
    ]
    tasks = {"active": Task("binary"), "spend": Task("continuous", gate="active")}
    found = protocol.evaluate(check(table("ours", gate + spend), tasks), tasks)
    assert value(found, "ours", "spend", "wmape") == pytest.approx((5 + 5 + 15 + 5 + 1 + 5 + 3) / 42)  # masked NaN is 0
    assert value(found, "ours", "spend", "value_if_active_mae") == pytest.approx((2 + 12 + 4 + 0) / 4)
    assert value(found, "ours", "spend", "value_if_active_mape") == pytest.approx((0.2 + 0.6 + 1 + 0) / 4)
    assert value(found, "ours", "spend", "value_if_active_interval_coverage") == 0.5
    assert value(found, "ours", "spend", "p_active_brier") == 0.25
    assert value(found, "ours", "spend", "value_if_active_mae", "n") == 4
    alone = {"spend": Task("continuous", gate="active")}
    ungated = check(table("ours", spend), alone)
    with pytest.raises(UserError, match="gate 'active' has no rows"):
        protocol.evaluate(ungated, alone)


def test_gain_is_paired_and_seeds_are_averaged() -> None:
    tasks = {"active": Task("binary")}
    better = [0.1, 0.2, 0.8, 0.9, 0.3, 0.7, 0.6, 0.9]
    tables = [table("ours", active_rows(better, Y), 0), table("ours", active_rows(P, Y), 1)]
    found = protocol.evaluate(
        check(pa.concat_tables([*tables, table("old", active_rows(P, Y))]), tasks), tasks, ours="ours"
    )
    assert value(found, "ours", "active", "roc_auc") == pytest.approx((1 + 0.625) / 2)
    assert value(found, "ours", "active", "roc_auc", "seeds") == 2
    assert value(found, "ours", "active", "roc_auc", "seed_sd") == pytest.approx(np.std([1, 0.625], ddof=1))
    assert value(found, "old", "active", "roc_auc", "gain") == pytest.approx((1 - 0.625) / 2)
    assert value(found, "ours", "active", "roc_auc", "gain") is None
    with pytest.raises(UserError, match="ours: expected one of the models"):
        protocol.evaluate(check(tables[0], tasks), tasks, ours="other")


def test_whole_table_of_the_baselines() -> None:
    predicted = pa.concat_tables(baselines.predict_baselines(SETTING, *splits()).values())
    found = protocol.evaluate(check(predicted, TASKS), TASKS, ours="active_share_84", resamples=50)
    assert set(found["task"].to_pylist()) == set(TASKS)
    assert value(found, "constant", "active", "roc_auc") == 0.5
    assert value(found, "constant", "active", "roc_auc", "gain_low") > 0.15
    assert value(found, "active_share_84", "active_any_7", "roc_auc") > 0.8
    for row in found.to_pylist():
        if row["metric"] != "eval/ece":
            assert row["low"] <= row["value"] <= row["high"], row


def cohort_world(effect: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """2,000 users; the treatment adds `effect`; the prediction knows each user's own rate, not the effect."""
    random = np.random.default_rng(seed)
    treated, rate = random.random(2000) < 0.5, random.gamma(2, 5, 2000)
    rows = [
        {
            "user": f"u{i}",
            "cut_day": 0,
            "day": 0,
            "behaviour": "spend",
            "mean": rate[i],
            "y": rate[i] + effect * treated[i] + noise,
        }
        for i, noise in enumerate(random.normal(0, 1, 2000))
    ]
    cohorts = pa.table(
        {"user": [f"u{i}" for i in range(2000)], "cohort": np.where(treated, "treatment", "control").tolist()}
    )
    return table("ours", rows), cohorts


def test_cohort_difference_finds_the_effect_and_adjustment_narrows_it() -> None:
    tasks = {"spend": Task("continuous", horizon=True)}
    predicted, cohorts = cohort_world(0.5, seed=0)
    plain, adjusted = protocol.by_cohort(check(predicted, tasks), cohorts, tasks).to_pylist()
    for row in (plain, adjusted):
        assert row["low"] <= 0.5 <= row["high"]
        assert row["n_treatment"] + row["n_control"] == 2000
    assert adjusted["high"] - adjusted["low"] < (plain["high"] - plain["low"]) / 4
    assert adjusted["low"] > 0


def test_cohorts_refuse_bad_assignments() -> None:
    tasks = {"spend": Task("continuous", horizon=True)}
    predicted, cohorts = cohort_world(0.0, seed=1)
    ready = check(predicted, tasks)
    with pytest.raises(UserError, match="missing: cohort"):
        protocol.by_cohort(ready, cohorts.drop_columns(["cohort"]), tasks)
    with pytest.raises(UserError, match="no predicted user in cohort 'holdout'"):
        protocol.by_cohort(ready, cohorts, tasks, control="holdout")
    twice = pa.table({"user": ["u1", "u1"], "cohort": ["treatment", "control"]})
    with pytest.raises(UserError, match="user u1 is in the cohorts treatment and control"):
        protocol.by_cohort(ready, twice, tasks)


def test_validation_scores_by_hand() -> None:
    tasks = {"active": Task("binary"), "spend": Task("continuous", gate="active")}
    columns = {
        "behaviour": np.array(["active"] * 4 + ["spend"] * 3),
        "cut_day": np.full(7, 10),
        "day": np.array([10, 10, 11, 11, 10, 11, 11]),
        "p": np.array([0.1, 0.9, 0.7, 0.2, 0.5, 0.5, 0.5]),
        "mean": np.array([0.1, 0.9, 0.7, 0.2, 4.0, 1.0, 9.0]),
        "y": np.array([0, 1, 0, 1, 5.0, 0.0, np.nan]),
    }
    found = protocol.validation_scores(columns, tasks)
    assert found == {"eval/roc_auc": 0.5, "eval/roc_auc_active": 0.5, "eval/wmape_spend": pytest.approx(2 / 5)}
    columns["p"][0] = np.nan
    assert np.isnan(protocol.validation_scores(columns, tasks)["eval/roc_auc"])
