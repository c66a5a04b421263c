"""The table of rejected rows: what is wrong with a row, found block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.artifacts import UserError, join
from lum_ray.config import Data
from lum_ray.data.raw import RowNumbers

Bool = npt.NDArray[np.bool_]
REJECTS = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), *((name, pa.string()) for name in ("reason", "value", "user"))]
)


class Rejected:
    """Collects for each row of a block the first reason against it."""

    def __init__(self, file: str, rows_of: RowNumbers, rows: int) -> None:
        self.file, self.numbers = file, row_numbers(rows_of, rows)
        self.bad = np.zeros(rows, np.bool_)
        self._rows: list[npt.NDArray[np.int64]] = []
        self._reasons: list[pa.Array] = []
        self._values: list[pa.Array] = []

    def add(self, wrong: Bool, reason: str, values: pa.ChunkedArray | None = None) -> None:
        """Reject the rows of the mask `wrong` (N,) that are not rejected yet; `values` (N,) are what is wrong."""
        if not wrong.any():
            return
        rows = np.flatnonzero(wrong & ~self.bad)
        if len(rows) == 0:
            return
        self.bad[rows] = True
        # as Arrow writes them: Python has no datetime after the year 9999
        shown = (
            [None] * len(rows) if values is None else pc.cast(pc.take(values, pa.array(rows)), pa.string()).to_pylist()
        )
        self._rows.append(rows)
        self._reasons.append(pa.repeat(pa.scalar(reason), len(rows)))
        self._values.append(pa.array(shown, pa.string()))

    def table(self, users: pa.ChunkedArray | None = None) -> pa.Table:
        """The rejects so far, by row; `users` (N,) are those of all rows of the block."""
        if not self._rows:
            return REJECTS.empty_table()
        rows = np.concatenate(self._rows)
        order = np.argsort(rows)
        reasons, values = (pa.concat_arrays(parts).take(pa.array(order)) for parts in (self._reasons, self._values))
        file = pa.repeat(pa.scalar(self.file), len(rows))
        whose = pa.nulls(len(rows), pa.string()) if users is None else users.take(pa.array(rows[order]))
        row = pa.array(self.numbers[rows[order]], pa.int64())
        return pa.table([file, row, reasons, values, pc.cast(whose, pa.string())], schema=REJECTS)


def row_numbers(rows_of: RowNumbers, count: int) -> npt.NDArray[np.int64]:
    """The row in its file of each of `count` rows."""
    return np.arange(rows_of, rows_of + count) if isinstance(rows_of, int) else rows_of


def first_rejects(rejects: pa.Table) -> list[str]:
    """The first five as lines for a message: where and why, without data."""
    return [f"  {row['file']}, row {row['row']}: {row['reason']}" for row in rejects.slice(0, 5).to_pylist()]


def with_value(reject: Mapping[str, Any]) -> str:
    """A reject's reason and its value: for the one who sent it in a request, never for a log."""
    return str(reject["reason"]) + (f", got {reject['value']}" if reject["value"] is not None else "")


def readable(column: pa.ChunkedArray, rejected: Rejected, name: str) -> pa.ChunkedArray:
    """A column with null for texts that are no UTF-8, whose rows are rejected: parquet promises it, nobody checks."""
    coded = pa.types.is_dictionary(column.type)
    if not pa.types.is_string(decoded(column.type)):
        return column
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        column = pc.cast(column, pa.string()) if coded else column
        texts = pc.cast(column, pa.binary()).to_pylist()
    wrong = np.array([text is not None and text != text.decode(errors="ignore").encode() for text in texts], np.bool_)
    rejected.add(wrong, f"`{name}` is not UTF-8")
    mended = pc.if_else(pa.array(wrong), pa.scalar(None, pa.string()), column)
    return mended.dictionary_encode() if coded else mended


def mask(values: Any) -> Bool:
    """An Arrow condition as numpy, null as False."""
    array = pc.fill_null(values, False) if values.null_count else values
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    return np.asarray(array.to_numpy(zero_copy_only=False), np.bool_)


def decoded(found: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary."""
    return found.value_type if pa.types.is_dictionary(found) else found


def too_many(data: Data, table: str, count: int, total: int, rejects: pa.Table, uri: str) -> UserError:
    """What to say of a table of which more than `max_reject_share` was rejected."""
    lines = first_rejects(rejects)
    more = (
        [f"  ... and {count - len(lines)} more, in {join(uri, 'rejects', '0000.parquet')}"]
        if count > len(lines)
        else []
    )
    head = (
        f"{table}: {count} of {total} rows break the schema ({count / total:.2%}), more than data.max_reject_share = "
        f"{data.max_reject_share:.2%}; mend them at the source, or raise data.max_reject_share to go on without them"
    )
    return UserError("\n".join([head, *lines, *more]))
