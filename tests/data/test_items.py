"""The catalogue: how an item's text is made, what is refused, and how hashes find their items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lum_ray.artifacts import UserError
from lum_ray.config import Data, Events, Items
from lum_ray.data import items as module
from lum_ray.data.items import Catalogue, Unknown, read_items, unknown_items
from lum_ray.data.rows import hash_strings
from lum_ray.data.schema import check_events

ITEMS = Items(item="sku", text=("title", "kind"), numbers=("price",), categories=("kind",))


def _data(**changes: Any) -> Data:
    return Data(**({"items": ITEMS, "events": Events(item="sku"), "max_reject_share": 0.3} | changes))


def _write(folder: Path, *tables: pa.Table) -> str:
    folder.mkdir(parents=True)
    for index, table in enumerate(tables):
        pq.write_table(table, folder / f"{index}.parquet")
    return str(folder)


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    names, types = ("sku", "title", "kind", "price"), (pa.string(), pa.string(), pa.string(), pa.float64())
    columns = list(zip(*rows, strict=True)) if rows else [()] * 4
    return pa.table({name: pa.array(c, kind) for name, kind, c in zip(names, types, columns, strict=True)})


def test_a_catalogue_by_hand(tmp_path: Path) -> None:
    first = _table([("b", " Tea ", None, 2.5), ("é", "", "drink", None), ("a", "Cup", "ware", float("inf"))])
    second = _table([("x", " ", None, 1.0), (None, "Lost", None, 1.0), ("B", "Tea", "", 0.0), ("c", "Mug", "ware", 3)])
    found, rejects = read_items(_write(tmp_path / "items", first, second), _data(max_reject_share=0.5))
    assert found.ids == ["B", "a", "b", "c", "é"] and len(found) == 5
    assert found.text == ["Tea", "Cup, ware", "Tea", "Mug, ware", "drink"]
    np.testing.assert_array_equal(found.numbers["price"], [0.0, np.nan, 2.5, 3.0, np.nan])
    assert found.categories["kind"].tolist() == ["", "ware", None, "ware", "drink"]
    assert found.hash_N.tolist() == hash_strings(found.ids).view(np.int64).tolist()
    assert [list(row.values()) for row in rejects.to_pylist()] == [
        ["items/0.parquet", 2, "`price` is infinite, taken as missing", "inf", None],
        ["items/1.parquet", 0, "has no text: title, kind", "x", None],
        ["items/1.parquet", 1, "`sku` is null", None, None],
    ]

    pq.write_table(found.to_table(), tmp_path / "items.parquet")
    again = Catalogue.from_table(pq.read_table(tmp_path / "items.parquet"))
    assert (again.ids, again.text, list(again.numbers)) == (found.ids, found.text, ["price"])
    np.testing.assert_array_equal(again.hash_N, found.hash_N)
    np.testing.assert_array_equal(again.numbers["price"], found.numbers["price"])
    assert again.categories["kind"].tolist() == found.categories["kind"].tolist()


def test_whole_numbers_are_ids_and_one_item_is_a_catalogue(tmp_path: Path) -> None:
    table = pa.table({"item": pa.array([12], pa.int32()), "text": pa.array(["Tea"]).dictionary_encode()})
    found, rejects = read_items(_write(tmp_path / "items", table), _data(items=Items()))
    assert (found.ids, found.text, rejects.num_rows) == (["12"], ["Tea"], 0)
    assert found.index_of(np.array([hash_strings(["12"]).view(np.int64)[0], 0, -(2**63)])).tolist() == [0, -1, -1]


@given(st.sets(st.text(), min_size=1, max_size=20), st.lists(st.text(), max_size=20))
def test_index_of_is_a_look_up(known: set[str], asked: list[str]) -> None:
    ids = sorted(known)
    catalogue = Catalogue(ids, hash_strings(ids).view(np.int64), ids, {}, {})
    asked = [*asked, *ids]
    expected = [ids.index(item) if item in known else -1 for item in asked]
    assert catalogue.index_of(hash_strings(asked).view(np.int64)).tolist() == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "x", None, 1), ("b", "y", None, 1), ("a", "z", None, 1)], r"one row per item, .*more than once: a;"),
        ([("a", None, None, 1)], r"items: none of the 1 rows can be used(.|\n)*row 0: has no text: title, kind"),
        (
            [("a", "x", None, 1), ("b", None, None, 1)],
            r"items: 1 of 2 rows break the schema, more than data\.max_reject_share = 30\.00%(.|\n)*1: has no text",
        ),
        ([], r"data\.items\.path: .*expected rows, but the 1 file\(s\) hold none"),
    ],
)
def test_bad_rows_stop(tmp_path: Path, rows: list[tuple[Any, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_items(_write(tmp_path / "items", _table(rows)), _data())


def test_at_most_five_offenders(tmp_path: Path) -> None:
    uri = _write(tmp_path / "items", _table([(str(n), None if n else "x", None, 1) for n in range(10)]))
    with pytest.raises(UserError) as refused:
        read_items(uri, _data())
    assert len(str(refused.value).splitlines()) == 7 and str(refused.value).endswith("... and 4 more")


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a file or a folder, found nothing"):
        read_items(str(tmp_path / "nowhere"), _data())
    table = _table([("a", "x", "y", 1)])
    with pytest.raises(UserError, match=r"missing column `title` \(data\.items\.text: title\); did you mean `titel`\?"):
        read_items(_write(tmp_path / "a", table.rename_columns(["sku", "titel", "kind", "price"])), _data())
    for column, values, message in (
        ("sku", [1.5], r"column `sku`: expected strings or whole numbers, got double; cast the ids to strings"),
        ("price", ["1"], r"column `price`: expected numbers, got string; cast it, or move it to data\.items\.cat"),
        ("kind", [1.5], r"column `kind`: expected strings, booleans or whole numbers, got double; cast it to strings"),
    ):
        bad = table.set_column(table.column_names.index(column), column, pa.array(values))
        with pytest.raises(UserError, match=message):
            read_items(_write(tmp_path / column, bad), _data())


def test_two_ids_with_one_hash_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hash_strings", lambda texts: np.array([len(text) for text in texts], np.uint64))
    uri = _write(tmp_path / "items", _table([("aa", "x", None, 1), ("b", "y", None, 1), ("cc", "z", None, 1)]))
    with pytest.raises(UserError, match="the items aa and cc have the same 64-bit hash"):
        read_items(uri, _data())


def test_unknown_items_are_counted_and_named(tmp_path: Path) -> None:
    def events(name: str, *skus: list[str | None]) -> Any:
        tables = [pa.table({"user": ["u"] * len(s), "time": [1] * len(s), "sku": s}) for s in skus]
        return check_events(_write(tmp_path / name, *tables), _data())

    catalogue, _ = read_items(_write(tmp_path / "items", _table([("a", "x", None, 1), ("b", "y", None, 1)])), _data())
    files = events("some", ["a", "z", None, "q"], ["q", "b", "a", "a"])
    assert unknown_items(files, _data(), catalogue) == Unknown(3, 3 / 7, ("q", "z"))
    assert unknown_items(events("none", ["a"]), _data(), catalogue) == Unknown(0, 0.0, ())
    with pytest.raises(UserError, match=r"none of the 2 events has an item .*`sku` holds 0a, 0b; .* holds a, b; name"):
        unknown_items(events("all", ["0a", "0b"]), _data(), catalogue)
