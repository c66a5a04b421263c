"""Prediction files are refused with what, where and at most five offenders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from lum_ray.artifacts import UserError
from lum_ray.evaluation.predictions import SCHEMA, Task, check, read_predictions

TASKS = {"active": Task("binary"), "spend": Task("continuous")}


def table(model: str = "ours", users: int = 8) -> pa.Table:
    rows = []
    for i in range(users):
        key = {"user": f"u{i}", "cut_day": 5, "day": 6, "model": model, "seed": 0}
        nothing = {name: float("nan") for name in ("median", "low", "high")}
        rows.append(key | nothing | {"behaviour": "active", "p": 0.5, "mean": 0.5, "y": float(i % 2)})
        number = {
            "behaviour": "spend",
            "p": float("nan"),
            "mean": 2.0,
            "median": 1.5,
            "low": 1.0,
            "high": 3.0,
            "y": 2.5,
        }
        rows.append(key | number)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def change(source: pa.Table, column: str, values: dict[int, object]) -> pa.Table:
    items = source[column].to_pylist()
    for place, value in values.items():
        items[place] = value
    return source.set_column(
        SCHEMA.get_field_index(column), SCHEMA.field(column), pa.array(items, SCHEMA.field(column).type)
    )


def test_reads_folders_and_files_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    shuffled = table().take(pa.array(np.random.default_rng(0).permutation(16)))
    pq.write_table(shuffled.slice(0, 7), tmp_path / "ours" / "0.parquet")
    pq.write_table(shuffled.slice(7), tmp_path / "ours" / "1.parquet")
    pq.write_table(table("other"), tmp_path / "other.parquet")
    found = read_predictions([str(tmp_path / "ours"), str(tmp_path / "other.parquet")], TASKS)
    assert found.models == ("other", "ours")
    assert found.users.tolist() == [f"u{i}" for i in range(8)]
    assert found.outcomes["active"].y.tolist() == [0, 1] * 4
    np.testing.assert_array_equal(found.forecasts["spend", "ours", 0]["median"], np.full(8, 1.5))


def test_refuses_broken_files_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none"):
        read_predictions(str(tmp_path), TASKS)
    pq.write_table(table(), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.parquet: expected a whole parquet file"):
        read_predictions(str(tmp_path), TASKS)
    pq.write_table(table().drop_columns(["low", "p"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: .*missing: p, low"):
        read_predictions(str(tmp_path), TASKS)
    text = table().set_column(2, "day", pc.cast(table()["user"], pa.string()))
    pq.write_table(text, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: a column has not the type"):
        read_predictions(str(tmp_path), TASKS)


def test_refuses_gaps_and_impossible_values() -> None:
    every = {place: float("nan") for place in range(0, 16, 2)}
    with pytest.raises(
        UserError, match=r"behaviour active: column p: expected finite numbers, 8 rows .*u4, 5, 6\), \.\.\.$"
    ):
        check(change(table(), "p", every), TASKS)
    with pytest.raises(UserError, match="behaviour spend: column mean: expected finite numbers, 1 rows"):
        check(change(table(), "mean", {3: float("inf")}), TASKS)
    with pytest.raises(UserError, match="behaviour spend: column median: expected finite"):
        check(change(table(), "median", {3: None}), TASKS)
    with pytest.raises(UserError, match="probabilities"):
        check(change(table(), "p", {2: 1.2}), TASKS)
    with pytest.raises(UserError, match="expected 0, 1 or NaN"):
        check(change(table(), "y", {2: 0.5}), TASKS)
    with pytest.raises(UserError, match="column user: expected a value"):
        check(change(table(), "user", {2: None}), TASKS)


def test_a_model_without_a_distribution_leaves_whole_columns_out() -> None:
    nothing = {place: float("nan") for place in range(16)}
    plain = table()
    for column in ("median", "low", "high"):
        plain = change(plain, column, nothing)
    assert np.isnan(check(plain, TASKS).forecasts["spend", "ours", 0]["low"]).all()


def test_refuses_rows_that_come_twice_or_differ_between_models() -> None:
    with pytest.raises(UserError, match=r"model ours, seed 0, behaviour active: expected one row .*u0, 5, 6"):
        check(pa.concat_tables([table(), table().slice(0, 1)]), TASKS)
    with pytest.raises(UserError, match=r"expected the same rows .* 7 differ: \(u1, 5, 6\) only in .*\.\.\."):
        check(pa.concat_tables([table(), table("b", users=1).slice(0, 1), table("b").slice(1, 1)]), TASKS)
    with pytest.raises(UserError, match=r"the same outcome y .* differ in 1 rows: \(u1, 5, 6\)"):
        check(pa.concat_tables([table(), change(table("b"), "y", {2: 0.0})]), TASKS)
    with pytest.raises(UserError, match="behaviour spend: expected rows of every model, none of b"):
        check(pa.concat_tables([table(), table("b").filter(pc.equal(table("b")["behaviour"], "active"))]), TASKS)
    with pytest.raises(UserError, match="unknown: spend; without a row: clicks"):
        check(table(), {"active": Task("binary"), "clicks": Task("count")})
