"""Every arrow on a root on S3 gives what it gives on a local one, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from lum_ray import catalog, config, weights
from lum_ray.artifacts import read_bytes, storage
from lum_ray.config import Run
from lum_ray.data.state import State
from lum_ray.steps import evaluate, open_predictor, predict, prepare, publish, train

PER_RUN = {"raw", "timelines", "sequences", "calendar", "fitted", "items", "tree", "predictions", "reports", "state"}
"""Folders of a root whose every byte follows from the run; a checkpoint holds times and the names of attempts too."""


def on_s3(run: Run, root: str, *assignments: str) -> Run:
    return catalog.read_run(config.override(config.dump(run), [f"root={root}", *assignments]))


def all_steps(run: Run) -> tuple[str, Any]:
    train(run)
    evaluate(run, max_users=50)
    predict(run)
    state = State.open(publish(run))
    user = state.users()[0]
    assert list(state.rows([user])) == [user]
    return train(run), open_predictor(run)


def files(root: str) -> list[str]:
    place = storage(root)
    found = place.filesystem.get_file_info(fs.FileSelector(place.path, recursive=True))
    return sorted(info.path[len(place.path) + 1 :] for info in found if info.is_file)


def same_bytes(root: str, local: str) -> set[str]:
    """The first folders of the files below `root` that follow from the run alone, after comparing each to the local."""
    compared = set()
    for name in files(root):
        folder = name.split("/")[0]
        # a pointer to the newest snapshot holds its URI
        if folder in PER_RUN and not name.endswith(".html") and not name.startswith("state/latest-"):
            assert read_bytes(f"{root}/{name}") == (Path(local) / name).read_bytes(), name
            compared.add(folder)
    return compared


@pytest.mark.parametrize("fixture", ["tiny", pytest.param("tiny_gts", marks=pytest.mark.faults)])
def test_a_root_on_s3_is_as_a_local_one(fixture: str, request: pytest.FixtureRequest, s3_root: str) -> None:
    local: Run = request.getfixturevalue(fixture)
    run = on_s3(local, s3_root)
    (here, _), (there, predictor) = all_steps(local), all_steps(run)
    expected = {"raw", "predictions", "reports", "state", "fitted"}
    assert same_bytes(s3_root, local.root) >= expected | ({"timelines"} if fixture == "tiny" else {"sequences", "tree"})
    assert Path(here).name == there.rsplit("/", 1)[-1]
    mine, theirs = weights.load(here).tensors, weights.load(there).tensors
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)
    assert any(name.startswith("tensorboard/") for name in files(there))
    assert predictor is not None
    said: list[str] = []
    train(run, said.append)
    assert said == ["already trained"]


def test_the_ray_engine_on_s3_gives_the_same_bytes(tiny: Run, s3_root: str, ray_session: None) -> None:
    prepare(on_s3(tiny, s3_root, "data.engine=ray"))
    assert same_bytes(s3_root, tiny.root) == {"raw", "timelines", "calendar", "fitted"}
