"""Checkpoints: complete or not there, checked before use, and readable without a pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lum_ray.artifacts import UserError
from lum_ray.training import checkpoint
from lum_ray.training.checkpoint import Writer, resume
from lum_ray.weights import load, steps


def save(place: Path, *which: int, best: bool = False) -> None:
    """Save these steps; the weights of step n are all n."""
    writer = Writer(str(place), "abc123")
    for step in which:
        tensor = torch.full((3,), float(step))
        writer.save(step, {"w": tensor}, {"step": step}, {"exp_avg/w": tensor}, best)
    writer.close()


def file_of(place: Path, index: int, name: str, which: str = "last") -> Path:
    return Path(steps(str(place / which))[index].uri, name)


def test_two_last_steps_and_one_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, best=True)
    assert [step.step for step in steps(str(tmp_path / "last"))] == [15, 10]
    assert [step.step for step in steps(str(tmp_path / "best"))] == [15]
    names = {path.name for path in (tmp_path / "last").iterdir()}
    assert names == {"00000010-abc123", "00000015-abc123", "manifest.json"}
    assert {"model.safetensors", "loop.json", "engine/state.safetensors"} == set(steps(str(tmp_path / "last"))[0].files)
    assert {"model.safetensors", "loop.json"} == set(steps(str(tmp_path / "best"))[0].files)
    assert not (tmp_path / ".writing").exists()


def test_weights_are_those_of_the_best_else_of_the_last(tmp_path: Path) -> None:
    save(tmp_path, 5, best=True)
    save(tmp_path, 10)
    assert load(str(tmp_path)).tensors["w"].tolist() == [5, 5, 5]
    assert load(str(tmp_path / "last")).tensors["w"].tolist() == [10, 10, 10]
    shutil.rmtree(tmp_path / "best")
    assert load(str(tmp_path)).tensors["w"].tolist() == [10, 10, 10]
    assert load(str(tmp_path)).loop == {"step": 10}


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    save(tmp_path, 5, best=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert not [path for path in files if path.read_bytes()[:1] == b"\x80"]


@pytest.mark.parametrize("name", ["model.safetensors", "engine/state.safetensors", "loop.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_step_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 5, 10)
    path = file_of(tmp_path, 0, name)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage == "changed" else content[:-3])
    resumed = resume(str(tmp_path))
    assert resumed is not None
    assert resumed.step == 5
    assert resumed.loop == {"step": 5}
    assert len(resumed.notes) == 1
    assert name in resumed.notes[0]
    assert "step 10" in resumed.notes[0]
    if name == "model.safetensors":
        assert load(str(tmp_path / "last")).tensors["w"].tolist() == [5, 5, 5]


def test_with_no_intact_step_it_says_so(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    for index in (0, 1):
        file_of(tmp_path, index, "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no intact checkpoint to resume from:\ncheckpoint of step 10.*\n.*step 5"):
        resume(str(tmp_path))
    with pytest.raises(UserError, match="no intact checkpoint"):
        load(str(tmp_path))


def test_nothing_there(tmp_path: Path) -> None:
    assert resume(str(tmp_path)) is None
    assert steps(str(tmp_path / "last")) == []
    with pytest.raises(UserError, match="found none; run `lum-ray train` first"):
        load(str(tmp_path))


def test_files_without_a_manifest_are_no_checkpoint_and_are_removed_later(tmp_path: Path) -> None:
    orphan = tmp_path / "last" / "00000005-killed"
    orphan.mkdir(parents=True)
    (orphan / "model.safetensors").write_bytes(b"a part")
    assert resume(str(tmp_path)) is None
    save(tmp_path, 5)
    assert not orphan.exists()
    assert resume(str(tmp_path)) is not None


def test_a_failed_writer_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: str, uri: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "_move", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 5)
    assert steps(str(tmp_path / "last")) == []


def test_a_manifest_that_is_not_json_is_named(tmp_path: Path) -> None:
    save(tmp_path, 5)
    manifest = tmp_path / "last" / "manifest.json"
    assert json.loads(manifest.read_text())["steps"][0]["step"] == 5
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest.json: not JSON"):
        resume(str(tmp_path))
