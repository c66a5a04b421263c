from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lum_ray.artifacts import Artifact
from lum_ray.config import Profiles
from lum_ray.data import buckets
from lum_ray.data.compact import compact
from lum_ray.data.prepare import Tokenizer
from lum_ray.data.reader import Timelines
from tests.data.increments import GTS, LUMOS, USERS, Root, events, same_rows


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "FILE_ROWS", 150)


def _increments(path: Path, tokenizer: Tokenizer) -> tuple[Root, list[Artifact]]:
    root = Root(path, tokenizer)
    root.data = replace(root.data, profiles=Profiles(numbers=("age",)))
    (path / "profiles").mkdir()
    ages = pa.table({"user": [f"user-{n}" for n in range(USERS)], "age": np.arange(USERS) * 1.0})
    pq.write_table(ages, path / "profiles" / "a.parquet")
    made = []
    for index, (first, end) in enumerate([(0, 30), (25, 32), (30, 34)]):
        root.write(f"{index}", events(200, index, first, end))
        made.append(root.prepare())
    return root, made


@pytest.mark.parametrize("tokenizer", [LUMOS, GTS], ids=["timelines", "sequences"])
def test_the_same_rows_before_and_after_and_as_a_rebuild(tmp_path: Path, tokenizer: Tokenizer) -> None:
    root, (first, second, third) = _increments(tmp_path, tokenizer)
    assert len(third.manifest["parts"]) == 3 and third.manifest["profiles_of"] == first.manifest["digest"]
    every = range(1 << third.manifest["log2_buckets"])
    before = Timelines.open(third.uri).read(every)
    said: list[str] = []
    found = compact(third.uri, said.append)
    after = Timelines.open(third.uri).read(every)
    for name in ("user", "user_hash", "offsets", "days", "values", "first_day", "end_day", "segment"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name), err_msg=name)
    (part,) = found.manifest["parts"]
    assert "artifact" not in part and "profiles_of" not in found.manifest
    size = sum(file.stat().st_size for file in (Path(third.uri) / part["path"]).iterdir())
    assert found.manifest["bytes"] == size and said[-1].startswith("freed")
    assert [path.name for path in Path(third.uri).glob("part-*")] == [part["path"]]
    # it depends on no other artifact, and is continued as before
    shutil.rmtree(first.uri)
    shutil.rmtree(second.uri)
    same_rows(found, root.rebuild())
    root.write("9", events(50, 9, 29, 35))
    made = root.prepare()
    assert made.manifest["parts"][0]["artifact"] == found.manifest["digest"]
    same_rows(made, root.rebuild())


def test_what_others_refer_to_is_kept_until_they_are_gone(tmp_path: Path) -> None:
    root, (_, second, third) = _increments(tmp_path, LUMOS)
    said: list[str] = []
    compact(second.uri, said.append)
    own = next(part["path"] for part in second.manifest["parts"] if "artifact" not in part)
    assert said[-1] == f"kept {own}: later artifacts refer to them" and (Path(second.uri) / own).is_dir()
    same_rows(third, root.rebuild())
    shutil.rmtree(third.uri)
    compact(second.uri, said.append)
    assert said[-1].startswith("freed") and not (Path(second.uri) / own).exists()


def test_one_part_is_left_as_it_is(tmp_path: Path) -> None:
    _, (first, _, _) = _increments(tmp_path, LUMOS)
    manifest = (Path(first.uri) / "manifest.json").read_bytes()
    assert compact(first.uri, pytest.fail).uri == first.uri
    assert (Path(first.uri) / "manifest.json").read_bytes() == manifest
