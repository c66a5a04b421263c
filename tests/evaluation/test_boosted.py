"""LightGBM as the peer: better than the constant, a checked prediction file, the same bytes from the same seed."""

from __future__ import annotations

import builtins
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lum_ray.artifacts import UserError
from lum_ray.data.windows import HorizonTarget
from lum_ray.evaluation import baselines, boosted, protocol
from lum_ray.evaluation.boosted import Boosted, Part
from lum_ray.evaluation.features import LENGTH, Ahead
from lum_ray.evaluation.history import Cuts
from lum_ray.evaluation.predictions import SCHEMA, Task, check
from tests.evaluation.small_world import SETTING, cuts, world

TASKS = {"active_any_7": Task("binary", horizon=True), "spend_sum_7": Task("continuous", "active_any_7", horizon=True)}


def without_calendar(part: Cuts) -> Part:
    """The calendar of a world without events: one distinct day, of no type."""
    size, empty = len(part.samples), np.zeros((1, 0), np.float32)
    return Part(part, Ahead((), empty, empty, np.zeros((size, LENGTH), np.int32), np.zeros((size, 14), np.int32)))


@functools.cache
def parts() -> tuple[Cuts, Cuts, Cuts]:
    rows = world(200)
    return cuts(rows, [120, 134, 148, 162], until_day=176), cuts(rows, [176], until_day=190), cuts(rows, [190, 204])


def peer(**changes: Any) -> Boosted:
    train, validate = map(without_calendar, parts()[:2])
    return replace(Boosted(SETTING, train, validate, threads=1), **changes)


def predicted(*names: str, test: Part | None = None, **changes: Any) -> pa.Table:
    """The peer's prediction file of the test cuts."""
    tasks = {name: TASKS.get(name, Task("binary")) for name in names}
    return peer(**changes).table(test or without_calendar(parts()[2]), tasks)


def written(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


@pytest.fixture(autouse=True)
def few_trees(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seconds instead of minutes; two settings of the grid, which differ in `min_data_in_leaf`."""
    pytest.importorskip("lightgbm")
    monkeypatch.setattr(boosted, "MOST_TREES", 60)
    monkeypatch.setattr(boosted, "GRID", (boosted.GRID[1], boosted.GRID[0] | {"min_data_in_leaf": 20}))
    yield


def test_it_beats_the_constant_and_passes_the_check() -> None:
    train, _, test = parts()
    peers = predicted(*TASKS)
    assert peers.schema == SCHEMA
    constant = baselines.predict_baselines(SETTING, train, test)["constant"]
    kept = pl.from_arrow(constant).filter(pl.col("behaviour").is_in(list(TASKS)))
    checked = check(pa.concat_tables([peers, kept.to_arrow().cast(SCHEMA)]), TASKS)
    found = pl.from_arrow(protocol.evaluate(checked, TASKS, ours=boosted.MODEL, resamples=100))

    def value(task: str, metric: str, column: str = "value", model: str = boosted.MODEL) -> float:
        return found.filter(task=task, metric=f"eval/{metric}", model=model)[column].item()

    assert value("active_any_7", "roc_auc") > 0.75
    assert value("active_any_7", "roc_auc", "gain_low", "constant") > 0.15
    # each functional is best for its own metric: the forecast made for MAPE lies below the median
    assert value("spend_sum_7", "value_if_active_mape_least") < value("spend_sum_7", "value_if_active_mape")
    assert abs(value("spend_sum_7", "bias")) < 0.2
    assert 0.7 < value("spend_sum_7", "value_if_active_interval_coverage") <= 1
    # the gate of the sum is the task `any`, fitted once
    p = pl.from_arrow(peers).select("behaviour", "p").partition_by("behaviour", as_dict=True)
    assert p["active_any_7",]["p"].equals(p["spend_sum_7",]["p"])


def test_the_same_seed_gives_the_same_bytes_and_daily_tasks_a_row_a_day() -> None:
    one, again, other = (predicted("coupon", seed=seed) for seed in (1, 1, 2))
    assert written(one) == written(again)
    assert not one["p"].equals(other["p"])
    assert one.num_rows == len(parts()[2].samples) * SETTING.future_days
    check(one, {"coupon": Task("binary")})


def test_it_reads_the_profile_where_it_is_named() -> None:
    def with_profile(part: Cuts) -> Part:
        kind = np.array(["often" if n > 40 else None for n in np.diff(part.rows.offsets)], dtype=object)
        rows = replace(part.rows, profile={"kind": kind, "age": np.where(kind == "often", 30.0, np.nan)})
        return without_calendar(replace(part, rows=rows))

    train, validate, test = map(with_profile, parts())
    plain, known = (
        predicted("coupon", train=train, validate=validate, test=test, profile=names)["p"]
        for names in ((), ("kind", "age"))
    )
    assert plain.equals(predicted("coupon")["p"])
    assert not plain.equals(known)


def test_what_is_not_known_of_the_test_changes_nothing() -> None:
    plain = predicted("active_any_7")
    test = parts()[2]
    blind = replace(test, daily=np.full_like(test.daily, np.nan), over=np.full_like(test.over, np.nan))
    assert plain["p"].equals(predicted("active_any_7", test=without_calendar(blind))["p"])


def test_it_refuses_before_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Boosted, "_fitted", lambda *_: pytest.fail("a model was fitted"))
    with pytest.raises(UserError, match="spend: the peer predicts numbers over horizons only"):
        predicted("active", "spend")
    with pytest.raises(UserError, match="churned: the peer predicts behaviours and horizons; expected one of active"):
        predicted("active", "churned")
    alone = replace(SETTING, horizons=(HorizonTarget("spend_sum_7", "sum", 2, 7),))
    with pytest.raises(UserError, match="needs `any` of its gate"):
        predicted("spend_sum_7", setting=alone)


def test_no_known_row_to_learn_from() -> None:
    train, validate, _ = parts()
    unknown = without_calendar(replace(train, over=np.full_like(train.over, np.nan)))
    with pytest.raises(UserError, match="no training or no validation row"):
        predicted("active_any_7", train=unknown)
    # where validation cannot know a long horizon yet, the newest training days stop the trees
    blind = without_calendar(replace(validate, over=np.full_like(validate.over, np.nan)))
    p = predicted("active_any_7", validate=blind)["p"].to_numpy()
    y = parts()[2].over[:, 0]
    assert p[y > 0].mean() > p[y == 0].mean() + 0.1


def test_lightgbm_is_imported_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, lum_ray.evaluation.boosted; assert 'lightgbm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    plain = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "lightgbm":
            raise ModuleNotFoundError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'lum_ray\[bench\]'"):
        predicted("active_any_7")


def test_a_number_without_a_gate_is_predicted_over_all_rows() -> None:
    table = peer().table(without_calendar(parts()[2]), {"spend_sum_7": Task("continuous", horizon=True)})
    found = pl.from_arrow(table)
    assert found["p"].is_nan().all() and found["median"].is_not_nan().all()
    given = pl.from_arrow(predicted("spend_sum_7"))
    assert found["median"].mean() < given["median"].mean()  # weeks without any spend count here
