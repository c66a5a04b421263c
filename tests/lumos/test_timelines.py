from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lum_ray.lumos.timelines import columns_used, merge, partial, tokenize


@dataclass(frozen=True)
class Behaviour:
    name: str
    kind: Literal["binary", "continuous", "count"]
    aggregate: str
    resolution: float = 1.0
    gate: str | None = None


EVENTS = pa.table(
    {
        "user": ["b", "a", "a", "a", "a"],
        "day": pa.array([1, 2, 1, 1, -3], pa.int32()),
        "price": [1.0, 2.5, None, 0.29, None],
        "shop": ["x", "y", "y", None, None],
        "basket": pa.array([1, 2, 3, 3, None], pa.int64()),
    }
)
# groups in order: (a, -3) one row of nulls; (a, 1) rows 2, 3; (a, 2) row 1; (b, 1) row 0
CASES: list[tuple[str, Literal["binary", "continuous", "count"], float, list[int]]] = [
    ("count()", "binary", 1.0, [1, 1, 1, 1]),
    ("count()", "count", 1.0, [1, 2, 1, 1]),
    ("count(price)", "count", 1.0, [0, 1, 1, 1]),
    ("count(shop == 'y')", "count", 1.0, [0, 1, 1, 0]),
    ("sum(price)", "continuous", 0.01, [0, 29, 250, 100]),
    ("sum(shop == 'y')", "count", 1.0, [0, 1, 1, 0]),
    ("sum(price - 2)", "binary", 0.01, [0, 0, 1, 0]),
    ("min(price)", "continuous", 0.01, [0, 29, 250, 100]),
    ("min(-basket)", "continuous", 1.0, [0, -3, -2, -1]),
    ("max(price)", "continuous", 0.01, [0, 29, 250, 100]),
    ("max(-basket)", "continuous", 1.0, [0, -3, -2, -1]),
    ("any(shop == 'y')", "binary", 1.0, [0, 1, 1, 0]),
    ("any(price > 0.5)", "count", 1.0, [0, 0, 1, 1]),
    ("mean(price)", "continuous", 0.01, [0, 29, 250, 100]),
    ("mean(basket + price)", "continuous", 0.01, [0, 329, 450, 200]),
    ("n_unique(basket)", "count", 1.0, [0, 1, 1, 1]),
    ("n_unique(shop)", "count", 1.0, [0, 1, 1, 1]),
    ("n_unique(price)", "count", 1.0, [0, 1, 1, 1]),
]


@pytest.mark.parametrize(("aggregate", "kind", "resolution", "expected"), CASES)
def test_each_aggregate(aggregate: str, kind: Any, resolution: float, expected: list[int]) -> None:
    daily = tokenize(EVENTS, [Behaviour("x", kind, aggregate, resolution)])
    assert daily["user"].to_pylist() == ["a", "a", "a", "b"] and daily["day"].to_pylist() == [-3, 1, 2, 1]
    assert daily["x"].to_pylist() == expected
    assert [field.type for field in daily.schema] == [pa.string(), pa.int32(), pa.int64()]


def test_a_mean_is_rounded_half_to_even() -> None:
    values = [[1, 2], [3, 2], [5, 4, 4], [-1, -2], [-3, -2], [1, 1, 3]]
    rows = [(f"u{index}", value) for index, group in enumerate(values) for value in group]
    events = pa.table(
        {"user": [row[0] for row in rows], "day": pa.array([0] * len(rows), pa.int32()), "v": [r[1] for r in rows]}
    )
    expected = [round(Fraction(sum(group), len(group))) for group in values]
    assert tokenize(events, [Behaviour("v", "continuous", "mean(v)")])["v"].to_pylist() == expected


def test_distinct_values_are_told_apart_across_blocks_and_types() -> None:
    behaviour = [Behaviour("n", "count", "n_unique(v)")]

    def block(values: pa.Array) -> pa.Table:
        return partial(
            pa.table({"user": ["a"] * len(values), "day": pa.array([0] * len(values), pa.int32()), "v": values}),
            behaviour,
        )

    whole, fractional = block(pa.array([1, 2, 2])), block(pa.array([2.0, 2.5, -0.0, 0.0]))
    assert merge([whole, fractional], behaviour)["n"].to_pylist() == [4]
    assert merge([block(pa.array(["1", "2"])), block(pa.array(["2", ""]))], behaviour)["n"].to_pylist() == [3]


EVERYTHING = [
    Behaviour("active", "binary", "count()"),
    Behaviour("spend", "continuous", "sum(price)", 0.01),
    Behaviour("cheapest", "continuous", "min(price)", 0.01),
    Behaviour("dearest", "continuous", "max(price)", 0.01),
    Behaviour("average", "continuous", "mean(price)", 0.01),
    Behaviour("cheap", "binary", "any(price < 0.5)"),
    Behaviour("shops", "count", "n_unique(shop)"),
]
ROW = st.tuples(
    st.sampled_from(["a", "b", "é", ""]),
    st.integers(-2, 2),
    st.none() | st.integers(-500, 500).map(lambda cents: cents / 100),
    st.none() | st.sampled_from(["x", "y", "z"]),
)


def _events(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) if rows else [()] * 4
    types = [pa.string(), pa.int32(), pa.float64(), pa.string()]
    names = ["user", "day", "price", "shop"]
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, types, strict=True)], names)


@settings(deadline=None)
@given(st.lists(ROW, max_size=30), st.integers(0, 2**32), st.integers(1, 5))
def test_order_and_blocks_change_nothing(rows: list[tuple[Any, ...]], seed: int, blocks: int) -> None:
    whole = tokenize(_events(rows), EVERYTHING)
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    partials = [partial(_events(shuffled[index::blocks]), EVERYTHING) for index in range(blocks)]
    assert merge(partials, EVERYTHING).equals(whole)
    assert merge([partial(_events(shuffled), EVERYTHING)], EVERYTHING).equals(whole)


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=30))
def test_equals_a_plain_loop(rows: list[tuple[Any, ...]]) -> None:
    days: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    for row in rows:
        days.setdefault((row[0], row[1]), []).append(row)
    expected = []
    for user, day in sorted(days, key=lambda key: (key[0].encode(), key[1])):
        group = days[user, day]
        cents = [round(row[2] * 100) for row in group if row[2] is not None]
        shops = {row[3] for row in group if row[3] is not None}
        mean = round(Fraction(sum(cents), len(cents))) if cents else 0
        numbers = [sum(cents), min(cents, default=0), max(cents, default=0), mean]
        expected.append([user, day, 1, *numbers, int(any(cent < 50 for cent in cents)), len(shops)])
    found = tokenize(_events(rows), EVERYTHING)
    assert [list(row.values()) for row in found.to_pylist()] == expected


@pytest.mark.parametrize("value", [0.005, float("nan"), float("inf"), 1e18])
def test_what_the_schema_should_have_rejected_is_an_error(value: float) -> None:
    events = _events([("a", 1, value, "x")])
    with pytest.raises(ValueError, match=r"spend: sum\(price\): expected finite multiples of 0.01"):
        tokenize(events, EVERYTHING)


def test_columns_used_and_no_events() -> None:
    assert columns_used(EVERYTHING) == ("price", "shop")
    none = tokenize(_events([]), EVERYTHING)
    assert none.num_rows == 0 and none.column_names == ["user", "day", *(item.name for item in EVERYTHING)]
    with pytest.raises(ValueError, match="at least one"):
        merge([], EVERYTHING)


def test_sums_are_exact_beyond_float_precision() -> None:
    value = 2**47 + 1
    count = 1000
    events = pa.table({"user": ["a"] * count, "day": pa.array(np.zeros(count), pa.int32()), "v": [value] * count})
    found = tokenize(events, [Behaviour("v", "count", "sum(v)")])
    assert found["v"].to_pylist() == [value * count]
