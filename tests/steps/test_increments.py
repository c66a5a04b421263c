from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from lum_ray import catalog, config
from lum_ray.artifacts import UserError, storage
from lum_ray.config import Run
from lum_ray.run_data import Events
from lum_ray.steps import compact
from lum_ray.steps.prepare import columns_of, pinned, prepare_timelines
from tests.data.increments import events, same_rows


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path)


def the_run(root: str, folder: str, **changes: Any) -> Run:
    spend = {"name": "spend", "kind": "continuous", "aggregate": "sum(price)", "resolution": 0.01}
    behaviours = [{"name": "active", "kind": "binary", "aggregate": "count()"}, spend]
    users = {"validate": {"users": [0.8, 0.9]}, "test": {"users": [0.9, 1.0]}, "train": {"users": [0.0, 0.8]}}
    source = {"path": f"{root}/{folder}"} | changes.pop("events", {})
    data = {"events": source, "behaviours": behaviours, "engine": "local", "max_reject_share": 0.5} | changes
    return catalog.read_run({"name": "r", "root": f"{root}/runs", "data": data, "split": users, "lumos": {}})


def test_new_files_are_continued_and_compacted(root: str) -> None:
    run, said = the_run(root, "e"), list[str]()
    (Path(root) / "e").mkdir()
    pq.write_table(events(300, 0, 0, 30), f"{root}/e/0.parquet")
    first = prepare_timelines(run)
    pq.write_table(events(60, 1, 26, 33), f"{root}/e/1.parquet")
    second = prepare_timelines(run, said.append)
    assert said[-1] == f"continuing {first.manifest['digest']}: 1 new files of events, 60 rows"
    uri = compact(run, said.append)
    assert uri == second.uri and said[-2].startswith("merging 2 parts") and said[-1].startswith("freed")
    rebuilt = prepare_timelines(catalog.read_run(config.dump(run) | {"root": f"{root}/other"}))
    same_rows(prepare_timelines(run), rebuilt)
    # another window is another lineage, and its digest another name
    other = prepare_timelines(the_run(root, "e", late_days=30), said.append)
    assert other.uri != uri and not said[-1].startswith("continuing")


def test_a_table_is_pinned_to_the_version_that_is_read(root: str) -> None:
    for seed, days in enumerate([(0, 30), (28, 33)]):
        write_deltalake(
            f"{root}/t", events(200, seed, *days), mode="append", storage_options=dict(storage(root).options)
        )
    said: list[str] = []
    run = pinned(the_run(root, "t"), said.append)
    assert (run.data.events.version, said) == (1, [f"events: version 1 of {root}/t"])
    made = prepare_timelines(run)
    assert made.manifest["inputs"]["events"]["version"] == 1 and made.manifest["events"] == 400
    old = prepare_timelines(the_run(root, "t", events={"version": 0}))
    assert old.manifest["events"] == 200
    # the same rows, whether by the newest, by its number, in the path, or by time
    for same in ({}, {"version": 1}, {"path": f"{root}/t@v1"}, {"timestamp": "2999-01-01"}):
        assert prepare_timelines(the_run(root, "t", events=same)).uri == made.uri
    with pytest.raises(UserError, match=r"data\.events\.path: .*: expected a Delta table"):
        prepare_timelines(the_run(root, "nothing", events={"version": 3}))
    with pytest.raises(UserError, match=r"data\.events: version: expected a version or a timestamp, got both"):
        the_run(root, "t", events={"version": 1, "timestamp": "2024-01-01"})


def test_what_says_where_a_table_is_shapes_no_artifact() -> None:
    assert columns_of(Events(path="a", version=3)) == columns_of(Events(path="b", timestamp="2024-01-01"))
    assert "version" not in columns_of(Events())
