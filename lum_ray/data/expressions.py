"""Aggregates of event columns, such as `sum(sales_value)` or `any(coupon_disc > 0)`: whitelisted, run by Arrow.

The language is a small part of Python: one aggregate function around one expression of columns, numbers, strings,
+ - * /, comparisons (chained too), and, or, not, `x in ('a', 'b')`, `x is None`. Nothing is ever passed to `eval`.

Nulls: arithmetic and comparisons with a null are null (`and`, `or` as in SQL); every aggregate leaves nulls out, so
`any` of nulls alone is false, a sum, mean, min, max or count of them is 0. A NaN never gets here (see `schema`).
Numbers are exact: integers stay integers (an overflow is an error, not a wrap), and `to_units` turns values into
whole multiples of a behaviour's resolution, or says which ones are not.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.artifacts import UserError

Function = Literal["sum", "count", "min", "max", "any", "mean", "n_unique"]
FUNCTIONS: tuple[str, ...] = get_args(Function)
ALLOWED = "columns, numbers, 'strings', + - * /, == != < <= > >=, and, or, not, `x in ('a', 'b')`, `x is None`"
MAX_UNITS = 1 << 48
"""Largest value of one event in units of its resolution: 32,768 of them still add up within 64 bits."""

_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: pc.add_checked,
    ast.Sub: pc.subtract_checked,
    ast.Mult: pc.multiply_checked,
    ast.Div: pc.divide,
}
_COMPARISON: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}


@dataclass(frozen=True)
class Aggregate:
    """A parsed aggregate: `expression` is its argument's source (None: `count()`), `columns` what it reads, sorted."""

    function: Function
    expression: str | None
    columns: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.function}({self.expression or ''})"

    def evaluate(self, table: pa.Table) -> pa.ChunkedArray:
        """The expression's value for each row: int64, float64, bool or string, nulls where unknown.

        Raises UserError for a column that is not there and for types that do not go together.
        """
        if self.expression is None:
            raise ValueError("count() has no expression to evaluate")
        try:
            value = _Evaluation(str(self), table).value(_tree(self.expression))
        except pa.ArrowInvalid:  # its message may hold the value
            raise UserError(
                f"{self}: a whole number does not fit in 64 bits: divide it or use a float column"
            ) from None
        if isinstance(value, pa.Scalar):
            value = pa.repeat(value, table.num_rows)
        if pa.types.is_null(value.type):
            value = pc.cast(value, pa.float64())
        return value if isinstance(value, pa.ChunkedArray) else pa.chunked_array([value])

    def check(self, schema: pa.Schema) -> None:
        """Raise UserError unless the columns are in `schema` with types that this aggregate can use."""
        if self.expression is None:
            return
        found = self.evaluate(schema.empty_table()).type
        if self.function == "any" and not pa.types.is_boolean(found):
            raise UserError(f"{self}: any() takes a condition such as `{self.expression} > 0`, got {_kind(found)}")
        if self.function in ("sum", "min", "max", "mean") and _kind(found) == "a string":
            raise UserError(f"{self}: {self.function}() takes numbers, got a string; use count() or n_unique()")


@lru_cache(maxsize=1024)
def parse(aggregate: str) -> Aggregate:
    """The parsed form of `function(expression)`, or `count()`.

    Raises UserError that names the aggregate, the place in it and what is allowed.
    """
    text = aggregate.strip()
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        place = f" at character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise UserError(
            f"{aggregate}: not an aggregate{place}; expected function(expression); allowed: {ALLOWED}"
        ) from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
        raise UserError(
            f"{aggregate}: expected function(expression) with one of {', '.join(FUNCTIONS)}, e.g. sum(sales_value)"
        )
    name = call.func.id
    if name not in FUNCTIONS:
        close = difflib.get_close_matches(name, FUNCTIONS, n=1)
        raise UserError(
            f"{aggregate}: unknown function `{name}`; "
            + (f"did you mean `{close[0]}`? " if close else "")
            + f"known: {', '.join(FUNCTIONS)}"
        )
    if len(call.args) != 1 and not (name == "count" and not call.args):
        raise UserError(
            f"{aggregate}: {name}() takes one expression{' or none' if name == 'count' else ''}, got {len(call.args)}"
        )
    expression = ast.unparse(call.args[0]) if call.args else None
    columns = sorted(_columns(call.args[0], aggregate)) if call.args else []
    return Aggregate(cast(Function, name), expression, tuple(columns))


@lru_cache(maxsize=1024)
def _tree(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


def _columns(node: ast.expr, aggregate: str) -> set[str]:
    """Names of the columns below `node`, which must consist of allowed parts only."""

    def refuse(part: ast.expr, what: str) -> UserError:
        return UserError(
            f"{aggregate}: at character {part.col_offset + 1}: `{ast.unparse(part)}`: {what}; allowed: {ALLOWED}"
        )

    parts: Sequence[ast.expr]
    match node:
        case ast.Name():
            return {node.id}
        case ast.Constant(value=int(number)) if abs(number) >= 1 << 63:
            raise refuse(node, "the number does not fit in 64 bits")
        case ast.Constant(value=bool() | int() | float() | str()):
            return set()
        case ast.BinOp() if type(node.op) in _ARITHMETIC:
            parts = [node.left, node.right]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not()):
            parts = [node.operand]
        case ast.BoolOp():
            parts = node.values
        case ast.Compare():
            parts = [node.left]
            for op, right in zip(node.ops, node.comparators, strict=True):
                if isinstance(op, ast.In | ast.NotIn):
                    if (
                        len(node.ops) > 1
                        or not isinstance(right, ast.Tuple | ast.List | ast.Set)
                        or not all(
                            isinstance(item, ast.Constant) and isinstance(item.value, int | float | str)
                            for item in right.elts
                        )
                    ):
                        raise refuse(node, "`in` takes one list of constants")
                    kinds = {isinstance(item.value, str) for item in right.elts if isinstance(item, ast.Constant)}
                    if len(kinds) != 1:
                        raise refuse(node, "`in` takes strings only or numbers only")
                elif isinstance(op, ast.Is | ast.IsNot):
                    if len(node.ops) > 1 or not (isinstance(right, ast.Constant) and right.value is None):
                        raise refuse(node, "`is` compares with None only")
                else:
                    parts.append(right)
        case _:
            raise refuse(node, f"{type(node).__name__} is not allowed")
    return set().union(*(_columns(part, aggregate) for part in parts))


def _kind(data_type: pa.DataType) -> str:
    if pa.types.is_boolean(data_type):
        return "a condition"
    return "a string" if pa.types.is_string(data_type) or pa.types.is_dictionary(data_type) else "a number"


@dataclass(frozen=True)
class _Evaluation:
    aggregate: str
    table: pa.Table

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name():
                return self._column(node.id)
            case ast.Constant(value=bool()):
                return pa.scalar(node.value, pa.bool_())
            case ast.Constant():
                return pa.scalar(cast(Any, node.value))
            case ast.BinOp():
                left, right = self._number(node.left), self._number(node.right)
                if isinstance(node.op, ast.Div) or "double" in (str(left.type), str(right.type)):
                    left, right = pc.cast(left, pa.float64(), safe=False), pc.cast(right, pa.float64(), safe=False)
                return _ARITHMETIC[type(node.op)](left, right)
            case ast.UnaryOp(op=ast.Not()):
                return pc.invert(self._condition(node.operand))
            case ast.UnaryOp():
                number = self._number(node.operand)
                return pc.negate_checked(number) if isinstance(node.op, ast.USub) else number
            case ast.BoolOp():
                combine = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
                value = self._condition(node.values[0])
                for part in node.values[1:]:
                    value = combine(value, self._condition(part))
                return value
            case ast.Compare():
                value, left = None, node.left
                for op, right in zip(node.ops, node.comparators, strict=True):
                    link = self._compare(left, op, right)
                    value, left = link if value is None else pc.and_kleene(value, link), right
                return value
        raise AssertionError(f"{type(node).__name__} passed the whitelist of {self.aggregate}")

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            close = difflib.get_close_matches(name, self.table.column_names, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"there are: {', '.join(self.table.column_names[:20])}"
            raise UserError(f"{self.aggregate}: unknown column `{name}`; {hint}")
        try:
            return plain(self.table[name])
        except pa.ArrowNotImplementedError:
            raise UserError(
                f"{self.aggregate}: column `{name}` holds {self.table[name].type}, expected numbers, booleans, strings"
            ) from None

    def _number(self, node: ast.expr) -> Any:
        value = _known_type(self.value(node), pa.float64())
        if pa.types.is_boolean(value.type):
            return pc.cast(value, pa.int64())
        if _kind(value.type) == "a string":
            raise UserError(f"{self.aggregate}: `{ast.unparse(node)}` is a string, expected a number")
        return value

    def _condition(self, node: ast.expr) -> Any:
        value = _known_type(self.value(node), pa.bool_())
        if not pa.types.is_boolean(value.type):
            raise UserError(
                f"{self.aggregate}: `{ast.unparse(node)}` is {_kind(value.type)}, expected a condition such as `x > 0`"
            )
        return value

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        value = self.value(left)
        if isinstance(op, ast.Is | ast.IsNot):
            return pc.is_null(value) if isinstance(op, ast.Is) else pc.is_valid(value)
        if isinstance(op, ast.In | ast.NotIn):
            constants = pa.array(ast.literal_eval(right))
            value = _known_type(value, constants.type)
            self._same_kind(left, value, right, constants)
            if _kind(value.type) != "a string" and value.type != constants.type:
                value, constants = pc.cast(value, pa.float64(), safe=False), constants.cast(pa.float64())
            inside = _of_distinct(lambda found: pc.is_in(found, value_set=constants), value)
            # is_in says false for a null; here it is unknown, so that `not in` does not hold for it either
            inside = pc.if_else(pc.is_valid(value), inside, pa.scalar(None, pa.bool_()))
            return inside if isinstance(op, ast.In) else pc.invert(inside)
        other = self.value(right)
        value, other = _known_type(value, other.type), _known_type(other, value.type)
        self._same_kind(left, value, right, other)
        if pa.types.is_boolean(value.type) != pa.types.is_boolean(other.type):
            value, other = pc.cast(value, pa.float64()), pc.cast(other, pa.float64())
        compare = _COMPARISON[type(op)]
        if isinstance(other, pa.Scalar):
            return _of_distinct(lambda found: compare(found, other), value)
        return compare(_written_out(value), _written_out(other))

    def _same_kind(self, left: ast.expr, value: Any, right: ast.expr, other: Any) -> None:
        if (_kind(value.type) == "a string") != (_kind(other.type) == "a string"):
            raise UserError(
                f"{self.aggregate}: cannot compare `{ast.unparse(left)}` ({_kind(value.type)}) "
                f"with `{ast.unparse(right)}` ({_kind(other.type)})"
            )


def _of_distinct(condition: Callable[[Any], Any], value: Any) -> Any:
    """The condition on `value`, asked once of each distinct one where it comes as a dictionary."""
    if not pa.types.is_dictionary(value.type):
        return condition(value)
    return pa.chunked_array([condition(part.dictionary).take(part.indices) for part in value.chunks], pa.bool_())


def _written_out(value: Any) -> Any:
    return pc.cast(value, value.type.value_type) if pa.types.is_dictionary(value.type) else value


def _known_type(value: Any, data_type: pa.DataType) -> Any:
    """A column of nothing but nulls, which a file may hold without a type, takes the type that is asked of it."""
    data_type = data_type.value_type if pa.types.is_dictionary(data_type) else data_type
    return pc.cast(value, data_type) if pa.types.is_null(value.type) else value


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as int64, float64, bool, string or null. Raises ArrowNotImplementedError for other types.

    Strings that come as a dictionary stay one: a comparison then looks at each distinct string once. float32 is read as
    the decimal of seven digits that it was written from (29.99, not 29.98999977), if there is one.
    """
    found = column.type
    if pa.types.is_dictionary(found):
        if pa.types.is_string(found.value_type):
            return column
        column = pc.cast(column, found.value_type)
        found = column.type
    if (
        pa.types.is_int64(found)
        or pa.types.is_float64(found)
        or pa.types.is_boolean(found)
        or pa.types.is_string(found)
    ):
        return column
    if pa.types.is_integer(found):
        return pc.cast(column, pa.int64())
    if pa.types.is_decimal(found):
        return pc.cast(column, pa.float64(), safe=False)
    if pa.types.is_large_string(found) or pa.types.is_string_view(found):
        return pc.cast(column, pa.string())
    if pa.types.is_null(found):
        return column
    if pa.types.is_floating(found):
        single = column.combine_chunks().to_numpy(zero_copy_only=False).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scale = 10.0 ** np.clip(6 - np.floor(np.log10(np.abs(single.astype(np.float64)))), -22, 22)
            decimal = np.rint(single * scale) / scale
            double = np.where(decimal.astype(np.float32) == single, decimal, single.astype(np.float64))
        missing = column.combine_chunks().is_null().to_numpy(zero_copy_only=False)
        return pa.chunked_array([pa.array(double, pa.float64(), mask=missing)])
    raise pa.ArrowNotImplementedError(f"{found} is neither a number, a boolean nor a string")


@dataclass(frozen=True)
class Units:
    """Values (N,) as whole multiples of a resolution: `whole` where `present`, and what is wrong with the others."""

    whole: npt.NDArray[np.int64]
    present: npt.NDArray[np.bool_]
    infinite: npt.NDArray[np.bool_]  # NaN too
    finer: npt.NDArray[np.bool_]
    large: npt.NDArray[np.bool_]


def to_units(values: pa.ChunkedArray, resolution: float) -> Units:
    """Numbers (or conditions, as 0 and 1) in units of `resolution`; exact, or marked.

    A quotient counts as whole when it is within 1e-6 (plus 1e-12 of itself, for large ones) of an integer: that covers
    the error of binary fractions (29.99 / 0.01), not a half cent.
    """
    if pa.types.is_boolean(values.type):
        values = pc.cast(values, pa.int64())
    array = values.combine_chunks()
    present = array.is_valid().to_numpy(zero_copy_only=False)
    if 2 * array.null_count > len(array):
        rows = np.flatnonzero(present)
        few = to_units(pa.chunked_array([array.drop_null()]), resolution)
        columns = (few.whole, few.present, few.infinite, few.finer, few.large)
        return Units(*(_spread(column, rows, len(array)) for column in columns))
    numbers = pc.fill_null(array, 0).to_numpy(zero_copy_only=False)
    if pa.types.is_integer(array.type) and resolution == 1:
        none = np.zeros(len(numbers), np.bool_)
        bounded = max(-int(numbers.min(initial=0)), int(numbers.max(initial=0))) <= MAX_UNITS
        large = none if bounded else (numbers > MAX_UNITS) | (numbers < -MAX_UNITS)
        return Units(numbers.astype(np.int64, copy=False), present, none, none, large)
    with np.errstate(invalid="ignore", over="ignore"):
        quotient = numbers / resolution
        infinite = ~np.isfinite(quotient)
        quotient = np.where(infinite, 0.0, quotient)
        rounded = np.rint(quotient)
        tolerance = np.minimum(0.25, 1e-6 + 1e-12 * np.abs(quotient))
        finer = np.abs(quotient - rounded) > tolerance
        large = np.abs(quotient) > MAX_UNITS
    whole = np.where(large, 0, rounded).astype(np.int64)
    return Units(whole, present, infinite & present, finer & present & ~large, large & present)


def _spread(values: npt.NDArray[Any], rows: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
    spread = np.zeros(length, values.dtype)
    spread[rows] = values
    return spread
