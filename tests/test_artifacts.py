"""Artifacts: committed once, found only when complete."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lum_ray import artifacts
from lum_ray.artifacts import UserError
from lum_ray.config import Source


def test_the_first_committer_wins_and_every_other_gets_its_manifest(tmp_path: Path) -> None:
    uri = str(tmp_path / "timelines" / "abc")
    assert artifacts.find(uri) is None
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        artifacts.open_artifact(uri)
    won: list[int] = []
    threads = [
        threading.Thread(target=lambda i=i: won.append(int(artifacts.commit(uri, {"by": i}).manifest["by"])))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(won) == 8
    assert len(set(won)) == 1
    assert sorted(path.name for path in Path(uri).iterdir()) == ["manifest.json"]


def test_digest_depends_on_content_and_not_on_order_of_keys() -> None:
    assert artifacts.digest({"a": 1, "b": [2]}) == artifacts.digest({"b": [2], "a": 1})
    assert artifacts.digest(Source("oulad")) != artifacts.digest(Source("oulad", path="x"))
    assert len(artifacts.digest(1)) == 12
    with pytest.raises(TypeError, match="set has no canonical"):
        artifacts.digest({1})


def test_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"1")
    (tmp_path / "_hidden").write_bytes(b"1")
    before = artifacts.fingerprint(str(tmp_path))
    assert [row[0] for row in before] == ["a.parquet"]
    (tmp_path / "b.parquet").write_bytes(b"22")
    assert artifacts.fingerprint(str(tmp_path)) != before


def test_storage_refuses_other_schemes_and_list_files_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got the scheme 'gs'"):
        artifacts.storage("gs://bucket/x")
    with pytest.raises(UserError, match="found nothing"):
        artifacts.list_files(str(tmp_path / "none"))


def test_write_bytes_replaces_whole_files(tmp_path: Path) -> None:
    uri = str(tmp_path / "deep" / "x.json")
    artifacts.write_json(uri, {"a": 1})
    artifacts.write_json(uri, {"a": 2})
    assert artifacts.read_json(uri) == {"a": 2}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.json"]
