"""The catalogue: what the items are, in the order of their IDs. An item's place in it is its index in the model.

Events carry a hash of their item, not its index, so that a new catalogue needs no new sequences; `index_of` brings the
two together. An item without any text is left out, because nothing is known of it but its ID: its events become those
of an unknown item, as `unknown_items` counts them.

Legend: N items, A events.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.artifacts import UserError
from lum_ray.config import Data, Items
from lum_ray.data.expressions import plain
from lum_ray.data.raw import RawFile, RowNumbers, batches, raw_files
from lum_ray.data.rejects import REJECTS, Rejected, first_rejects, mask, readable
from lum_ray.data.rows import HashIndex, Int64, Strings, hash_strings
from lum_ray.data.schema import check_user, item_column, plain_column, require, wrong_type

BATCH_ROWS = 1 << 19
SEPARATOR = ", "


@dataclass(frozen=True, eq=False)
class Catalogue:
    """N items, sorted by ID, each with a text that is not empty."""

    ids: list[str]
    hash_N: Int64
    """`hash_strings` of the IDs as int64, all distinct."""
    text: list[str]
    numbers: dict[str, npt.NDArray[np.float64]]  # name -> (N,), NaN where unknown
    categories: dict[str, Strings]  # name -> (N,), None where unknown

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _places(self) -> HashIndex:
        return HashIndex(self.hash_N)

    def index_of(self, hashes: Int64) -> Int64:
        """The indices (A,) of the items with these hashes (A,), -1 where the catalogue has no such item."""
        return self._places.of(hashes)

    def to_table(self) -> pa.Table:
        """One row an item: item, hash, text, `number.<name>` (null: unknown), `category.<name>`."""
        columns = {
            "item": pa.array(self.ids, pa.string()),
            "hash": pa.array(self.hash_N, pa.int64()),
            "text": pa.array(self.text, pa.string()),
        }
        for name, numbers in self.numbers.items():
            columns[f"number.{name}"] = pa.array(numbers, pa.float64(), from_pandas=True)
        for name, categories in self.categories.items():
            columns[f"category.{name}"] = pa.array(categories, pa.string())
        return pa.table(columns)

    @staticmethod
    def from_table(table: pa.Table) -> Catalogue:
        """The catalogue that `to_table` gave."""
        numbers, categories = {}, {}
        for column in table.column_names:
            kind, _, name = column.partition(".")
            if kind == "number":
                array = pc.fill_null(table[column], float("nan")).combine_chunks()
                numbers[name] = np.array(array.to_numpy(zero_copy_only=False), np.float64)
            elif kind == "category":
                categories[name] = np.array(table[column].to_pylist(), np.object_)
        hashes = np.array(table["hash"].combine_chunks().to_numpy(), np.int64)
        return Catalogue(table["item"].to_pylist(), hashes, table["text"].to_pylist(), numbers, categories)


def check_items(uri: str, data: Data) -> list[RawFile]:
    """The item files, after checking the columns and types of every file. Raises UserError."""
    items = _items(data)
    files = raw_files(uri, "items")
    for file in files:
        require(file, {"data.items.item": items.item})
        for key, names in (("text", items.text), ("numbers", items.numbers), ("categories", items.categories)):
            require(file, {f"data.items.{key}: {name}": name for name in names})
        check_user(file, items.item)
        for name in items.numbers:
            if not _is_number(file.schema.field(name).type):
                raise wrong_type(file, name, "numbers", "cast it, or move it to data.items.categories")
        for name in (*items.text, *items.categories):
            if not _is_word(file.schema.field(name).type):
                expected = "strings, booleans or whole numbers"
                raise wrong_type(file, name, expected, "cast it to strings, or move it to data.items.numbers")
    return files


def read_items(uri: str, data: Data) -> tuple[Catalogue, pa.Table]:
    """The catalogue of the items table at `uri`, and the rejects (REJECTS).

    Rejected: a null ID, an item without any text; an infinite number is taken as missing and noted. Raises UserError
    for what `check_items` refuses, an item that has two rows, more rejects than `data.max_reject_share`, no item that
    is left, and two IDs with the same hash.
    """
    parts, rejects, rows = [], [REJECTS.empty_table()], 0
    items = _items(data)
    columns = list(dict.fromkeys((items.item, *items.text, *items.numbers, *items.categories)))
    for file in check_items(uri, data):
        rows += file.rows
        for batch, first_row in batches(file.uri, columns, None, 0, BATCH_ROWS, file.overlay):
            cleaned, bad = clean_items(batch, items, file.name, first_row)
            parts.append(cleaned)
            rejects.append(bad)
    table, rejected = pa.concat_tables(parts).sort_by("item").combine_chunks(), pa.concat_tables(rejects)
    if rejected.num_rows > data.max_reject_share * rows or table.num_rows == 0:
        raise _too_many(data, rejected, rows, table.num_rows)
    ids: list[str] = table["item"].to_pylist()
    _check_distinct(uri, ids)
    hashes = hash_strings(ids).view(np.int64)
    _check_hashes(uri, ids, hashes)
    return Catalogue.from_table(table.append_column("hash", pa.array(hashes, pa.int64()))), rejected


def clean_items(
    table: pa.Table, items: Items, file: str = "items", first_row: RowNumbers = 0
) -> tuple[pa.Table, pa.Table]:
    """Items as they are in a file -> the columns of `Catalogue.to_table` without `hash`, and the rejects."""
    rejected, noted = (Rejected(file, first_row, table.num_rows) for _ in range(2))
    names = (items.item, *items.text, *items.categories)
    texts = {name: pc.cast(plain_column(table, name, file), pa.string()) for name in names}
    words = {name: readable(text, rejected, name) for name, text in texts.items()}
    ids = words[items.item]
    parts = [pc.fill_null(pc.utf8_trim_whitespace(words[name]), "") for name in items.text]
    # not `binary_join_element_wise` with its null_handling="skip": it loses rows in which all are null (pyarrow 26)
    led = [pc.if_else(pc.equal(part, ""), "", pc.binary_join_element_wise(SEPARATOR, part, "")) for part in parts]
    text = pc.utf8_slice_codeunits(pc.binary_join_element_wise(*led, ""), len(SEPARATOR))
    rejected.add(mask(pc.is_null(ids)), f"`{items.item}` is null")
    rejected.add(mask(pc.equal(text, "")), f"has no text: {', '.join(items.text)}", ids)
    columns = {"item": ids, "text": text}
    for name in items.numbers:
        number = pc.cast(plain_column(table, name, file), pa.float64(), safe=False)
        noted.add(mask(pc.is_inf(number)) & ~rejected.bad, f"`{name}` is infinite, taken as missing", number)
        columns[f"number.{name}"] = pc.if_else(pc.is_finite(number), number, pa.scalar(None, pa.float64()))
    for name in items.categories:
        columns[f"category.{name}"] = words[name]
    bad = pa.concat_tables([rejected.table(), noted.table()]).sort_by("row")
    return pa.table(columns).filter(pa.array(~rejected.bad)), bad


@dataclass(frozen=True)
class Unknown:
    """Raw events of items that the catalogue does not have; `items` holds the five most frequent of them."""

    events: int
    share: float
    items: tuple[str, ...]


def unknown_items(files: Sequence[RawFile], data: Data, catalogue: Catalogue) -> Unknown:
    """How many rows of the event `files` (see `schema.check_events`) are of items that `catalogue` does not have.

    Reads nothing but the item column; null items are not counted. Raises UserError where no event has a known item.
    """
    column = item_column(data)
    assert column is not None
    counts = pa.table({"item": pa.array([], pa.string()), "n": pa.array([], pa.int64())})
    for file in files:
        parts = [counts]
        for batch, _ in batches(file.uri, [column], None, 0, BATCH_ROWS, file.overlay):
            found = pc.value_counts(_words(batch[column]).drop_null().combine_chunks())
            parts.append(pa.table({"item": found.field("values"), "n": found.field("counts")}))
        counts = pa.concat_tables(parts).group_by("item").aggregate([("n", "sum")]).rename_columns(["item", "n"])
    total = int(pc.sum(counts["n"]).as_py() or 0)
    index = catalogue.index_of(hash_strings(counts["item"].to_pylist()).view(np.int64))
    missing = counts.filter(pa.array(index < 0)).sort_by([("n", "descending"), ("item", "ascending")])
    events = int(pc.sum(missing["n"]).as_py() or 0)
    some = tuple(missing["item"].slice(0, 5).to_pylist())
    if events == total:
        raise UserError(
            f"data.items.item: none of the {total} events has an item of the catalogue: the events' `{column}` holds "
            f"{', '.join(some) or 'nothing'}; `{_items(data).item}` of the items holds "
            f"{', '.join(catalogue.ids[:5])}; name the columns that hold the same IDs"
        )
    return Unknown(events, events / total, some)


def _items(data: Data) -> Items:
    if data.items is None:
        raise UserError("data.items: missing; GTS-LUM needs a table of the items with their texts")
    return data.items


def _words(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.cast(plain(column), pa.string())


def _is_word(found: pa.DataType) -> bool:
    found = found.value_type if pa.types.is_dictionary(found) else found
    text = pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
    return bool(text or pa.types.is_boolean(found) or pa.types.is_integer(found) or pa.types.is_null(found))


def _is_number(found: pa.DataType) -> bool:
    whole = pa.types.is_boolean(found) or pa.types.is_integer(found) or pa.types.is_null(found)
    return bool(whole or pa.types.is_floating(found) or pa.types.is_decimal(found))


def _check_distinct(uri: str, ids: list[str]) -> None:
    twice = sorted({one for one, other in itertools.pairwise(ids) if one == other})[:5]
    if twice:
        raise UserError(
            f"{uri}: expected one row per item, these come more than once: {', '.join(twice)}; keep one row of each"
        )


def _check_hashes(uri: str, ids: list[str], hashes: Int64) -> None:
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if len(same):
        pair = sorted(ids[place] for place in order[same[0] : same[0] + 2].tolist())
        raise UserError(f"{uri}: the items {' and '.join(pair)} have the same 64-bit hash; rename one of them")


def _too_many(data: Data, rejects: pa.Table, rows: int, left: int) -> UserError:
    lines = first_rejects(rejects)
    more = [f"  ... and {rejects.num_rows - 5} more"] if rejects.num_rows > 5 else []
    head = (
        f"items: {rejects.num_rows} of {rows} rows break the schema, more than data.max_reject_share = "
        f"{data.max_reject_share:.2%}; mend them at the source, name more columns in data.items.text, or raise "
        "data.max_reject_share to go on without them"
    )
    if left == 0:
        head = f"items: none of the {rows} rows can be used; mend them, or name other columns in data.items.text"
    return UserError("\n".join([head, *lines, *more]))
