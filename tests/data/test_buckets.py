from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lum_ray.data import buckets
from lum_ray.data.rows import hash_strings


def _table(names: list[str], coded: bool) -> pa.Table:
    user = pa.array(names)
    return pa.table({"user": user.dictionary_encode() if coded else user, "n": np.arange(len(names))})


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("files", [1, 8])
def test_a_file_gets_the_rows_of_its_buckets_of_every_table(tmp_path: Path, coded: bool, files: int) -> None:
    tables = [_table([f"user-{n * step % 50}" for n in range(120)], coded) for step in (1, 7)] + [_table([], coded)]
    buckets.scatter(str(tmp_path / "a"), tables, 6, files)
    buckets.scatter(str(tmp_path / "b"), tables[:1], 6, files)
    expected: list[list[tuple[str, int]]] = [[] for _ in range(files)]
    for table in [*tables, tables[0]]:
        for user, n in zip(table["user"].to_pylist(), table["n"].to_pylist(), strict=True):
            expected[int(hash_strings([user])[0] % np.uint64(64)) * files // 64].append((user, n))
    for index in range(files):
        found = buckets.gather([str(tmp_path / name) for name in "ab"], index)
        assert found.schema.field("user").type == pa.string()
        assert sorted(zip(*found.to_pydict().values(), strict=True)) == sorted(expected[index])


def test_a_dictionary_by_file_keeps_the_users_and_brings_files_together() -> None:
    names = [f"user-{n % 40}" for n in range(100)]
    found = buckets.by_file(pa.chunked_array([pa.array(names[:60]), pa.array(names[60:])]), 6, 8)
    assert found.to_pylist() == names
    files = [int(h % np.uint64(64)) // 8 for h in hash_strings(found.dictionary)]
    assert files == sorted(files) and len(set(files)) > 1


def test_days_and_amounts_are_packed_and_hashes_of_items_are_not(tmp_path: Path) -> None:
    hashes = hash_strings([f"item-{n}" for n in range(3)]).view(np.int64)
    lists = {"days": np.arange(300), "amount": np.arange(300) % 7, "item": hashes[np.arange(300) % 3]}
    offsets = pa.array(np.arange(0, 301, 30), pa.int32())
    table = pa.table(
        {"bucket": pa.array(np.arange(10) // 5, pa.int32()), "user": [f"u{n}" for n in range(10)]}
        | {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()}
    )
    groups, size = buckets.write_buckets(str(tmp_path / "a"), table)
    file = pq.ParquetFile(tmp_path / "a")
    assert groups == [{"bucket": 0, "rows": 5}, {"bucket": 1, "rows": 5}]
    assert size == (tmp_path / "a").stat().st_size and file.read().equals(table)
    encodings = {c.path_in_schema: c.encodings for c in map(file.metadata.row_group(0).column, range(5))}
    assert "DELTA_BINARY_PACKED" in encodings["days.list.element"]
    assert "DELTA_BINARY_PACKED" in encodings["amount.list.element"]
    assert any("DICTIONARY" in name for name in encodings["item.list.element"])
