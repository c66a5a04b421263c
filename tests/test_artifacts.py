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


def test_a_folder_written_by_two_drivers_appears_whole_and_once(tmp_path: Path) -> None:
    """The slower one is in the middle of its files when the other has committed; a reader sees no difference."""
    uri, halfway, go_on = str(tmp_path / "raw" / "x"), threading.Event(), threading.Event()

    def quick(place: artifacts.Storage) -> None:
        (Path(place.path) / "table").write_bytes(b"whole")

    def slow(place: artifacts.Storage) -> None:
        with (Path(place.path) / "table").open("wb") as stream:
            stream.write(b"wh")
            stream.flush()
            halfway.set()
            assert go_on.wait(30)
            stream.write(b"ole")

    late: list[artifacts.Artifact] = []
    other = threading.Thread(target=lambda: late.append(artifacts.commit_folder(uri, {"by": "slow"}, slow)))
    other.start()
    assert halfway.wait(30)
    assert artifacts.find(uri) is None
    assert artifacts.commit_folder(uri, {"by": "quick"}, quick).manifest == {"by": "quick"}
    assert (Path(uri) / "table").read_bytes() == b"whole"
    go_on.set()
    other.join(30)
    assert late[0].manifest == {"by": "quick"}
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["x"]

    def broken(place: artifacts.Storage) -> None:
        quick(place)
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        artifacts.commit_folder(str(tmp_path / "raw" / "y"), {}, broken)
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["x"]
    (tmp_path / "raw" / "z").mkdir()
    (tmp_path / "raw" / "z" / "table").write_bytes(b"wh")
    with pytest.raises(UserError, match=r"raw/z: half-written by an earlier version of lum_ray; remove this folder"):
        artifacts.commit_folder(str(tmp_path / "raw" / "z"), {}, quick)
