"""Rows of a table to vectors: the same cells the same, like rows near; nulls, unknown values, poor and empty tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lum_ray.artifacts import UserError
from lum_ray.gts.tables import FittedTable, Layout, fit_table, serialise_rows

Columns = tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]
FEW = 12


def objects(*values: Any) -> np.ndarray[Any, Any]:
    column = np.empty(len(values), object)
    column[:] = values
    return column


def world(count: int = 240, seed: int = 0) -> tuple[Columns, np.ndarray[Any, Any]]:
    """Rows of 4 hidden kinds that every column tells of, with nulls: (columns, kind)."""
    random = np.random.default_rng(seed)
    kind = np.arange(count) % 4
    price = 10.0 ** (2 * kind) * np.exp(random.normal(0, 0.2, count))
    stock = np.where(random.random(count) < 0.2, np.nan, 5.0 * (kind % 2) + random.normal(0, 0.3, count))
    shelf = objects(*(None if random.random() < 0.2 else "abcd"[k] + str(random.integers(3)) for k in kind))
    brand = objects(*("xy"[k // 2] + str(random.integers(4)) for k in kind))
    return ({"price": price, "stock": stock}, {"shelf": shelf, "brand": brand}), kind


def test_rows_of_a_kind_come_to_lie_together_more_than_before_training() -> None:
    columns, kind = world()

    def purity(steps: int) -> float:
        rows = fit_table(*columns, width=16, steps=steps).rows(*columns)
        likeness = rows @ rows.T - 9 * np.eye(len(rows))
        return float((kind[np.argsort(-likeness, axis=1)[:, :10]] == kind[:, None]).mean())

    before, after = purity(0), purity(60)
    assert after > 0.97 and after > before + 0.02, (before, after)


def test_a_row_depends_on_its_own_cells_alone_and_a_stored_table_gives_the_same_bytes() -> None:
    (numbers, categories), _ = world(60)
    fitted = fit_table(numbers, categories, width=10, steps=FEW)
    rows = fitted.rows(numbers, categories)
    assert rows.shape == (60, 10) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    one = fitted.rows({k: v[7:8] for k, v in numbers.items()}, {k: v[7:8] for k, v in categories.items()})
    np.testing.assert_allclose(one, rows[7:8], atol=1e-5)
    arrays = fitted.to_arrays()
    assert all(array.dtype.kind in "fiu" for array in arrays.values())
    assert FittedTable.from_arrays(arrays).rows(numbers, categories).tobytes() == rows.tobytes()
    assert fit_table(numbers, categories, width=10, steps=FEW).rows(numbers, categories).tobytes() == rows.tobytes()


def test_nulls_and_unknown_values_are_values_of_their_own() -> None:
    (numbers, categories), _ = world(60)
    fitted = fit_table(numbers, categories, width=8, steps=FEW)
    new = (
        {"price": np.array([5.0, 5.0, 5.0, np.nan, np.inf, 1e300]), "stock": np.full(6, np.nan)},
        {"shelf": objects("a0", "never seen", "neither this", None, None, None),
         "brand": objects("x0", "x0", "x0", None, np.nan, None)},
    )  # fmt: skip
    rows = fitted.rows(*new)
    assert np.isfinite(rows).all()
    assert (rows[1] == rows[2]).all() and not np.allclose(rows[0], rows[1], atol=1e-3)
    assert not np.allclose(rows[3], rows[4], atol=1e-3)  # an unknown price is no high one
    np.testing.assert_allclose(rows[4], rows[5], atol=1e-5)  # beyond the last quantile all is the same


@pytest.mark.parametrize(
    "columns",
    [
        ({"n": np.full(9, 3.0)}, {}),
        ({"n": np.full(9, np.nan)}, {"c": objects(*[None] * 9)}),
        ({"n": np.arange(9.0)}, {}),
        ({}, {"c": objects(*"abcabcabc")}),
        ({}, {"c": objects(*range(9))}),
    ],
    ids=["constant", "all null", "one number", "one category", "ids that are numbers"],
)
def test_poor_tables(columns: Columns) -> None:
    rows = fit_table(*columns, width=8, steps=FEW).rows(*columns)
    assert rows.shape == (9, 8) and np.isfinite(rows).all()
    cells = [tuple(str(column[row]) for part in columns for column in part.values()) for row in range(9)]
    assert len(np.unique(rows.round(4), axis=0)) == len(set(cells))


def test_one_row_no_row_and_no_column() -> None:
    one: Columns = ({"n": np.array([1.0])}, {"c": objects("a")})
    assert np.isfinite(fit_table(*one, width=8, steps=FEW).rows(*one)).all()
    none: Columns = ({"n": np.zeros(0)}, {})
    assert fit_table(*none).width == 0 and fit_table(*none).rows(*none).shape == (0, 0)
    bare = fit_table({}, {})
    assert bare.width == 0 and bare.rows({}, {}).shape == (0, 0)
    assert FittedTable.from_arrays(bare.to_arrays()).width == 0


def test_wrong_columns_are_named() -> None:
    (numbers, categories), _ = world(30)
    fitted = fit_table(numbers, categories, width=8, steps=1)
    with pytest.raises(UserError, match="price is missing"):
        fitted.rows({"stock": numbers["stock"]}, categories)
    with pytest.raises(UserError, match=r"lengths \[29, 30\]"):
        fit_table({"price": numbers["price"][1:]}, categories)
    with pytest.raises(UserError, match="got both for price"):
        fit_table(numbers, {"price": categories["shelf"]})


def test_numbers_are_written_in_quantiles() -> None:
    layout = Layout.of({"n": np.array([0.0, 1, 2, 3, 4]), "same": np.ones(5), "null": np.full(5, np.nan)}, {})
    assert layout.quantiles[0] == tuple(np.arange(17) / 4) and layout.quantiles[1:] == ((), ())


def test_rows_in_words() -> None:
    numbers = {"brand_share": np.array([0.3, np.nan, 1234567.0])}
    categories = {"department": objects("GROCERY", None, "")}
    assert serialise_rows(numbers, categories) == [
        "department: GROCERY, brand share: 0.3", "", "department: , brand share: 1.235e+06",
    ]  # fmt: skip
    assert serialise_rows({}, {}) == []
