from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lum_ray.artifacts import UserError
from lum_ray.data.expressions import FUNCTIONS, MAX_UNITS, parse, to_units

TABLE = pa.table(
    {
        "a": pa.array([1, 2, None, 4], pa.int32()),
        "b": pa.array([0.5, None, 2.0, -1.0]),
        "brand": pa.array(["Private", "National", None, "Private"]).dictionary_encode(),
        "flag": pa.array([True, False, None, True]),
        "nothing": pa.nulls(4),
    }
)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a * b - 1", [-0.5, None, None, -5.0]),
        ("a / 2", [0.5, 1.0, None, 2.0]),
        ("-a + 1", [0, -1, None, -3]),
        ("a", [1, 2, None, 4]),
        ("b > 0", [True, None, True, False]),
        ("brand == 'Private'", [True, False, None, True]),
        ("'Private' == brand", [True, False, None, True]),
        ("brand == brand", [True, True, None, True]),
        ("brand == nothing", [None] * 4),
        ("brand in ('Private', 'Own')", [True, False, None, True]),
        ("brand not in ('Private', 'Own')", [False, True, None, False]),
        ("a in (1, 4.0)", [True, False, None, True]),
        ("brand is None", [False, False, True, False]),
        ("b is not None and a >= 1", [True, False, None, True]),
        ("not flag or b > 0", [True, True, True, False]),
        ("1 <= a < 4", [True, True, None, False]),
        ("flag == 1", [True, False, None, True]),
        ("flag + a", [2, 2, None, 5]),
        ("3", [3, 3, 3, 3]),
        ("nothing + 1", [None] * 4),
        ("nothing == 'x'", [None] * 4),
        ("nothing > 1", [None] * 4),
    ],
)
def test_expressions_follow_python_and_null_stays_unknown(expression: str, expected: list[object]) -> None:
    assert parse(f"max({expression})").evaluate(TABLE).to_pylist() == expected


def test_parse_names_the_parts() -> None:
    found = parse(" sum(sales_value * quantity - discount) ")
    assert (found.function, found.expression) == ("sum", "sales_value * quantity - discount")
    assert found.columns == ("discount", "quantity", "sales_value")
    assert parse("count()").expression is None and parse("count()").columns == ()
    assert all(parse(f"{name}(x)").function == name for name in FUNCTIONS)


@pytest.mark.parametrize(
    ("aggregate", "said"),
    [
        ("sum(a + )", "at character 9"),
        ("total(a)", "unknown function `total`"),
        ("summ(a)", "did you mean `sum`"),
        ("a + 1", "expected function(expression)"),
        ("sum()", "takes one expression"),
        ("sum(a, b)", "takes one expression"),
        ("sum(open('x'))", "at character 5: `open('x')`: Call is not allowed"),
        ("sum(a.real)", "Attribute is not allowed"),
        ("sum(a ** 2)", "BinOp is not allowed"),
        ("any(a in b)", "takes one list of constants"),
        ("any(a in (1, 'x'))", "strings only or numbers only"),
        ("any(a is b)", "compares with None only"),
        ("sum(a for a in b)", "not allowed"),
        ("any(a > 9223372036854775808)", "does not fit in 64 bits"),
    ],
)
def test_what_is_not_allowed_is_named(aggregate: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(aggregate)
    assert said in str(error.value) and aggregate in str(error.value)


@pytest.mark.parametrize(
    ("aggregate", "said"),
    [
        ("sum(bb)", "unknown column `bb`; did you mean `b`?"),
        ("sum(brand)", "takes numbers, got a string"),
        ("any(a)", "takes a condition"),
        ("any(brand > 1)", "cannot compare `brand` (a string) with `1` (a number)"),
        ("any(a in ('x', 'y'))", "cannot compare"),
        ("sum(brand + 1)", "`brand` is a string, expected a number"),
        ("any(a and flag)", "expected a condition"),
    ],
)
def test_types_are_checked_without_rows(aggregate: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(aggregate).check(TABLE.schema)
    assert said in str(error.value)


def test_a_column_of_another_type_is_refused() -> None:
    with pytest.raises(UserError, match="holds list<"):
        parse("count(x)").evaluate(pa.table({"x": pa.array([[1]])}))


def test_an_overflow_is_an_error() -> None:
    with pytest.raises(UserError, match="64 bits"):
        parse("sum(x * x)").evaluate(pa.table({"x": pa.array([2**62])}))


@given(st.lists(st.integers(-(10**9), 10**9), min_size=1), st.sampled_from([0.01, 0.1, 0.25, 0.001, 5.0]))
def test_multiples_of_a_resolution_are_exact(units: list[int], resolution: float) -> None:
    found = to_units(pa.chunked_array([[unit * resolution for unit in units]]), resolution)
    assert found.whole.tolist() == units
    assert not (found.finer | found.infinite | found.large).any()


def test_float32_money_is_read_as_written() -> None:
    cents = np.arange(0, 5_000_000, 997)
    column = pa.table({"x": pa.array((cents / 100).astype(np.float32))})
    found = to_units(parse("sum(x)").evaluate(column), 0.01)
    assert found.whole.tolist() == cents.tolist() and not found.finer.any()
    # eight digits that float32 holds exactly must not be shortened to seven
    assert parse("sum(x)").evaluate(pa.table({"x": pa.array([16777215.0], pa.float32())})).to_pylist() == [16777215.0]


def test_what_is_not_a_multiple_is_marked() -> None:
    values = pa.chunked_array([[1.005, 5000.005, float("nan"), float("inf"), None, 1e18, 0.29]])
    found = to_units(values, 0.01)
    assert found.finer.tolist() == [True, True, False, False, False, False, False]
    assert found.infinite.tolist() == [False, False, True, True, False, False, False]
    assert found.large.tolist() == [False] * 5 + [True, False]
    assert found.present.tolist() == [True] * 4 + [False] + [True] * 2
    assert found.whole[6] == 29
    assert to_units(pa.chunked_array([[MAX_UNITS + 1, -3]]), 1.0).large.tolist() == [True, False]
    assert to_units(pa.chunked_array([[7, 10]]), 5.0).finer.tolist() == [True, False]
