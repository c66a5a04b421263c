from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from lum_ray.artifacts import UserError, commit, join, storage, write_table
from lum_ray.evaluation.predictions import SCHEMA
from lum_ray.evaluation.ranking_files import RANKING_SCHEMA
from lum_ray.steps.deliver import deliver


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path)


def predictions(root: str, name: str, cut_day: int, checkpoint: str, users: int, p: float = 0.5) -> str:
    """A folder as `predict` leaves it: two files, a row a user."""
    uri, half = join(root, "predictions", name), users // 2
    plain: dict[str, Any] = {field.name: np.zeros(users, np.float32) for field in SCHEMA}
    plain |= {"user": [f"u{n}" for n in range(users)], "behaviour": ["active"] * users, "model": ["m"] * users}
    plain |= {"cut_day": [cut_day] * users, "day": [cut_day] * users, "seed": [0] * users, "p": [p] * users}
    table = pa.table([pa.array(plain[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
    write_table(join(uri, "predictions", "0000.parquet"), table.slice(0, half))
    write_table(join(uri, "predictions", "0001.parquet"), table.slice(half))
    commit(uri, {"digest": name, "checkpoint": checkpoint, "cut_day": cut_day, "rows": users})
    return uri


def rows(uri: str) -> list[dict[str, Any]]:
    table = pa.table(DeltaTable(uri, storage_options=dict(storage(uri).options)).to_pyarrow_table())
    return table.sort_by([(name, "ascending") for name in ("cut_day", "checkpoint", "user")]).to_pylist()


def test_a_batch_is_there_once_with_where_it_comes_from(root: str) -> None:
    table = join(root, "table")
    one = predictions(root, "aaa", 100, "run-1", 7)
    assert [deliver(one, table), deliver(one, table)] == [0, 1]
    found = rows(table)
    assert len(found) == 7 and {(row["checkpoint"], row["prediction"]) for row in found} == {("run-1", "aaa")}
    assert set(found[0]) == {*SCHEMA.names, "checkpoint", "prediction"}
    assert DeltaTable(table).metadata().partition_columns == ["cut_day"]
    # another day and another checkpoint stand beside it
    deliver(predictions(root, "bbb", 101, "run-1", 6), table)
    deliver(predictions(root, "ccc", 100, "run-2's", 5), table)
    assert len(rows(table)) == 7 + 6 + 5
    # the same checkpoint on newer data takes the place of its earlier answer
    said: list[str] = []
    deliver(predictions(root, "ddd", 100, "run-2's", 4, p=0.9), table, said.append)
    found = rows(table)
    assert [(row["cut_day"], row["prediction"]) for row in found] == [(100, "aaa")] * 7 + [(100, "ddd")] * 4 + [
        (101, "bbb")
    ] * 6
    assert {row["p"] for row in found if row["prediction"] == "ddd"} == {np.float32(0.9)}
    assert said == [f"version 4 of {table} holds 4 rows of run-2's"]


def test_rankings_are_delivered_too(root: str) -> None:
    uri = join(root, "predictions", "r")
    values = {"user": ["u"], "cut_day": [5], "rank": [1], "item": ["i"], "score": [0.5], "reading": ["retrieve"],
              "model": ["m"], "seed": [0], "seen_filter": [False]}  # fmt: skip
    write_table(join(uri, "rankings", "0000.parquet"), pa.table(values, schema=RANKING_SCHEMA))
    commit(uri, {"model": "gts", "digest": "r", "checkpoint": "c", "cut_day": 5, "rows": 1})
    deliver(uri, join(root, "lists"))
    (row,) = rows(join(root, "lists"))
    assert (row["item"], row["cut_day"], row["checkpoint"]) == ("i", 5, "c")


def test_a_table_of_other_columns_is_refused(root: str) -> None:
    table = join(root, "table")
    write_deltalake(table, pa.table({"cut_day": [1], "checkpoint": ["x"]}), partition_by=["cut_day"])
    with pytest.raises(UserError, match=r"expected a Delta table with the columns user, cut_day, .* give another URI"):
        deliver(predictions(root, "aaa", 100, "run-1", 3), table)
    assert DeltaTable(table).version() == 0
