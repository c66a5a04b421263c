from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
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
