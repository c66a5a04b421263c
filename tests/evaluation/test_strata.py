"""Where each of two models is better: values by hand, the protocol's own pairing, and groups that say nothing."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lum_ray.artifacts import UserError
from lum_ray.evaluation import baselines, protocol, strata, strata_pictures
from lum_ray.evaluation.history import Cuts
from lum_ray.evaluation.predictions import SCHEMA, Predictions, Task, check
from lum_ray.evaluation.strata import DAY_AHEAD, Grouping
from tests.evaluation.small_world import SETTING, TASKS, cuts, rows_from_dense, splits

USERS, CUTS = 40, (10, 20)
ACTIVE = {"active": Task("binary")}
KEYS = [(user, cut, cut + day) for user in range(USERS) for cut in CUTS for day in range(2)]


def rows(model: str, behaviour: str, keys: list[tuple[int, int, int]], seed: int = 0, **columns: Any) -> pa.Table:
    """A row a key; a column is a function of (user, day ahead) or one value."""
    lines = []
    for user, cut, day in keys:
        values = {name: value(user, day - cut) if callable(value) else value for name, value in columns.items()}
        lines.append({"user": f"u{user:02d}", "cut_day": cut, "day": day, "behaviour": behaviour} | values)
    absent = {"model": model, "seed": seed} | {name: float("nan") for name in baselines.FUNCTIONALS}
    return pa.Table.from_pylist([absent | line for line in lines], schema=SCHEMA)


def active(model: str, p: Any, seed: int = 0) -> pa.Table:
    return rows(model, "active", KEYS, seed, p=p, mean=0.5, y=lambda user, _: float(user % 2))


def first_day_only(user: int, ahead: int) -> float:
    """Knows the first day and nothing of the second: an AUC of 1 and of .5."""
    return float(user % 2) if ahead == 0 else 0.5


def halves(most: int = 30, title: str = "half") -> Grouping:
    """The users below `most`, and the others."""
    user = np.repeat(np.arange(USERS), len(CUTS))
    names = np.array([f"u{number:02d}" for number in user], dtype=object)
    return Grouping(title, ("low", "high"), names, np.tile(np.array(CUTS), USERS), (user >= most).astype(np.int64))


def two(ours: Any = first_day_only, peer: Any = 0.5) -> Predictions:
    return check(pa.concat_tables([active("ours", ours), active("peer", peer)]), ACTIVE)


def found(table: pa.Table, **where: Any) -> dict[str, Any]:
    (row,) = (row for row in table.to_pylist() if all(row[name] == value for name, value in where.items()))
    return row


def test_auc_by_group_and_by_day_by_hand() -> None:
    table = strata.compare(two(), ACTIVE, [halves()], "ours", "peer", resamples=20)
    assert table.schema == strata.STRATA
    low = found(table, by="half", group="low")
    assert (low["n"], low["users"], low["metric"]) == (120, 30, "eval/roc_auc")
    assert (low["ours"], low["peer"], low["gain"]) == (0.75, 0.5, 0.25)
    assert (low["low"], low["high"]) == (0.25, 0.25)  # the same in every resample
    days = [found(table, by=DAY_AHEAD, group=f"day {day}") for day in (1, 2)]
    assert [(day["n"], day["ours"], day["gain"]) for day in days] == [(80, 1, 0.5), (80, 0.5, 0)]


def test_groups_that_say_nothing_stay_in_the_table() -> None:
    table = strata.compare(two(), ACTIVE, [halves()], "ours", "peer", resamples=20)
    few = found(table, by="half", group="high")
    assert (few["n"], few["users"]) == (40, 10)
    assert [few[name] for name in ("ours", "peer", "gain", "low", "high")] == [None] * 5
    entry = halves()
    odd = np.array([int(user[1:]) % 2 for user in entry.users])
    one_class = replace(entry, labels=("even", "odd"), code=odd)
    for group in ("even", "odd"):
        row = found(strata.compare(two(), ACTIVE, [one_class], "ours", "peer", 20), by="half", group=group)
        assert (row["n"], row["users"], row["gain"], row["ours"]) == (80, 20, None, None)
    # many rows of few users are not enough either
    nine = halves(9)
    crowd = replace(nine, labels=("few",), code=np.where(nine.code == 0, 0, -1))
    many = [(user, cut, cut + day) for user in range(USERS) for cut in CUTS for day in range(7)]
    tables = [rows(m, "active", many, p=0.5, mean=0.5, y=lambda u, _: float(u % 2)) for m in ("ours", "peer")]
    row = found(strata.compare(check(pa.concat_tables(tables), ACTIVE), ACTIVE, [crowd], "ours", "peer", 20), by="half")
    assert (row["n"], row["users"], row["gain"]) == (9 * 14, 9, None)


def test_all_rows_in_one_group_are_the_protocols_gain() -> None:
    predicted = check(pa.concat_tables(baselines.predict_baselines(SETTING, *splits()).values()), TASKS)
    ours, peer = "recency_frequency_logistic", "same_weekday"
    everyone = strata.by_history(splits()[1])
    everyone = replace(everyone, labels=("all",), code=np.zeros_like(everyone.code))
    table = strata.compare(predicted, TASKS, [everyone], ours, peer, resamples=40, seed=3)
    whole = protocol.evaluate(predicted, TASKS, ours=ours, resamples=40, seed=3)
    for name, task in TASKS.items():
        row = found(table, task=name, group="all")
        rival = found(whole, task=name, model=peer, metric=row["metric"])
        assert row["peer"] == rival["value"]
        assert row["ours"] == found(whole, task=name, model=ours, metric=row["metric"])["value"]
        if task.kind == "binary":
            assert [row[k] for k in ("gain", "low", "high")] == [rival[f"gain{k}"] for k in ("", "_low", "_high")]
            assert row["n"] == rival["n"]
        else:
            assert row["gain"] == pytest.approx(1 - row["ours"] / row["peer"])
            assert row["low"] < row["gain"] < row["high"]
    assert not [row for row in table.to_pylist() if row["task"] == "active_any_7" and row["by"] == DAY_AHEAD]


def test_a_model_beside_itself_gains_nothing_in_any_resample() -> None:
    random = np.random.default_rng(0).random((USERS, 2))
    noisy = two(*[lambda user, ahead: float(random[user, ahead])] * 2)
    table = strata.compare(noisy, ACTIVE, [halves()], "ours", "peer")
    drawn = [row for row in table.to_pylist() if row["gain"] is not None]
    assert len(drawn) == 3
    assert {row[name] for row in drawn for name in ("gain", "low", "high")} == {0.0}


def test_seeds_are_averaged() -> None:
    tables = [active("ours", first_day_only, 0), active("ours", lambda user, _: float(user % 2), 1)]
    predicted = check(pa.concat_tables([*tables, active("peer", 0.5)]), ACTIVE)
    row = found(strata.compare(predicted, ACTIVE, [halves()], "ours", "peer", resamples=20), by="half", group="low")
    assert (row["ours"], row["gain"], row["low"]) == (0.875, 0.375, 0.375)


def numbers() -> Predictions:
    """Spend of 100 where the gate is open, which it is not for each fourth user; ours says 90, the peer's log-normal
    has no width and says 80.
    """
    every = {"p": 0.5, "low": 1.0, "high": 200.0, "y": lambda user, _: 100.0 if user % 4 else 0.0}
    tables = [
        rows(model, "active", KEYS, p=0.5, mean=0.5, y=lambda user, _: float(user % 4 > 0))
        for model in ("ours", "peer")
    ]
    tables.append(rows("ours", "spend", KEYS, mean=50.0, median=100.0, least_mape=90.0, **every))
    tables.append(rows("peer", "spend", KEYS, mean=40.0, median=80.0, **every))
    return check(pa.concat_tables(tables), ACTIVE | {"spend": Task("continuous", gate="active")})


def test_a_number_is_compared_by_its_mape_where_the_gate_is_open() -> None:
    tasks = {"spend": Task("continuous", gate="active"), **ACTIVE}
    table = strata.compare(numbers(), tasks, [halves(40)], "ours", "peer", resamples=20)
    row = found(table, task="spend", group="low")
    assert (row["n"], row["users"], row["metric"]) == (120, 30, "eval/value_if_active_mape_least")
    assert row["ours"] == pytest.approx(0.1) and row["peer"] == pytest.approx(0.2)
    assert row["gain"] == pytest.approx(0.5) and row["low"] == pytest.approx(0.5)  # half of the peer's error is saved
    assert found(table, task="spend", by=DAY_AHEAD, group="day 2")["n"] == 60


def test_it_refuses_what_it_cannot_compare() -> None:
    lacking = halves()
    lacking = replace(lacking, users=lacking.users[:-3], cut=lacking.cut[:-3], code=lacking.code[:-3])
    with pytest.raises(UserError, match=r"grouping half: .*3 have none: \(u38, 20\), \(u39, 10\), \(u39, 20\); make"):
        strata.compare(two(), ACTIVE, [lacking], "ours", "peer")
    strangers = replace(halves(), users=np.array(["nobody"] * USERS * 2, dtype=object))
    with pytest.raises(UserError, match=r"80 have none: .*, \.\.\.; make it from the cuts"):
        strata.compare(two(), ACTIVE, [strangers], "ours", "peer")
    with pytest.raises(UserError, match="none of lightgbm; there are ours, peer"):
        strata.compare(two(), ACTIVE, [halves()], "ours", "lightgbm")
    with pytest.raises(UserError, match="none of blind"):
        strata.calendar_worth(two(), ACTIVE, {"ours": "blind"})


def test_what_a_calendar_is_worth_by_hand() -> None:
    tasks = {**ACTIVE, "spend": Task("continuous", gate="active")}
    table = strata.calendar_worth(numbers(), tasks, {"ours": "peer", "peer": "ours"}, resamples=20)
    assert table.schema == strata.WORTH and table.num_rows == 4
    row = found(table, model="ours", task="spend")
    assert (row["with_calendar"], row["without"]) == (pytest.approx(0.1), pytest.approx(0.2))
    assert row["gain"] == pytest.approx(0.5)
    assert found(table, model="peer", task="spend")["gain"] == pytest.approx(-1)
    assert found(table, model="peer", task="active")["gain"] == 0
    shown = strata_pictures.worth(table)
    assert shown.sentence == (
        "ours is better with the calendar in 1 of 2 tasks (the 95 % interval speaks for it in 1, against it in 0), "
        "most in active (+.000) and spend (+50.0\u00a0%); peer is better with the calendar in 0 of 2 tasks (the 95 % "
        "interval speaks for it in 0, against it in 1), most in active (+.000) and spend (-100.0\u00a0%)."
    )
    assert shown.table.lines[1] == (
        "ours",
        "spend",
        "MAPE",
        ".100",
        ".200",
        "+50.0\u00a0%",
        "+50.0\u00a0% to +50.0\u00a0%",
    )


def some_cuts() -> Cuts:
    """Users of segments a, a, b, c and none; user 0 active daily, user 1 every tenth day, the others never."""
    dense = np.zeros((5, 220, 3), dtype=np.int64)
    dense[0, :, 0] = 1
    dense[1, ::10, 0] = 1
    made = rows_from_dense(dense, np.array([0, 0, 80, 170, 172]), 220)
    return cuts(replace(made, segment=np.array(["a", "a", "b", "c", ""], dtype=object)), [190, 200])


def test_groupings_by_hand() -> None:
    at = some_cuts()
    history = strata.by_history(at)
    assert history.labels == ("up to 28", "29 to 84", "85 to 182", "more than 182")
    # days of history 190, 200; the same; 110, 120; 20, 30; 18, 28
    assert history.code.tolist() == [3, 3, 3, 3, 2, 2, 0, 1, 0, 0]
    assert history.users[2] == "u0001" and history.cut.tolist() == [190, 200] * 5
    activity = strata.by_activity(at, 0)
    assert activity.labels == ("none", "up to 5 %", "5 to 15 %", "15 to 30 %", "more than 30 %")
    assert activity.code.tolist() == [4, 4, 2, 2, 0, 0, 0, 0, 0, 0]
    assert strata.by_segment(at).labels == ("a", "b", "c")
    assert strata.by_segment(at).code.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, -1, -1]
    merged = strata.by_segment(at, most=1)
    assert merged.labels == ("a", "other") and merged.code.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, -1, -1]
    nowhere = replace(at, rows=replace(at.rows, segment=np.array([""] * 5, dtype=object)))
    assert strata.by_segment(nowhere).labels == () and set(strata.by_segment(nowhere).code.tolist()) == {-1}


def test_a_row_in_no_group_counts_in_none() -> None:
    entry = halves()
    entry = replace(entry, code=np.where(entry.code == 1, -1, entry.code))
    table = strata.compare(two(), ACTIVE, [entry], "ours", "peer", resamples=10)
    assert found(table, by="half", group="high")["n"] == 0
    none = replace(entry, title="segment", labels=(), code=np.full_like(entry.code, -1))
    table = strata.compare(two(), ACTIVE, [none], "ours", "peer", resamples=10)
    assert set(table["by"].to_pylist()) == {DAY_AHEAD}


def test_the_forest_says_what_it_shows() -> None:
    turning = two(lambda user, ahead: float(user % 2) if ahead == 0 else 1.0 - user % 2)
    table = strata.compare(turning, ACTIVE, [halves()], "ours", "peer", resamples=20)
    picture = strata_pictures.picture(table, "active", "ours", "peer")
    assert picture is not None
    assert picture.sentence == (
        "In active, ours is better than peer in 1 of 3 groups (the 95 % interval speaks for ours in 1, for peer in 1): "
        "most in “day ahead: day 1” (+.500), least in “day ahead: day 2” (-.500)."
    )
    ET.fromstring(base64.b64decode(picture.source.split(",")[1]))
    again = strata_pictures.picture(table, "active", "ours", "peer")
    assert again is not None and again.source == picture.source
    nothing = pa.Table.from_pylist([row for row in table.to_pylist() if row["gain"] is None], schema=strata.STRATA)
    assert strata_pictures.picture(nothing, "active", "ours", "peer") is None
    shown = strata_pictures.comparison(nothing, "ours", "peer")
    assert shown.pictures == () and shown.tables[0].lines == (("half", "high", "40", "10", "", "", "too few", ""),)
