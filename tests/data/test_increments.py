from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lum_ray import artifacts
from lum_ray.artifacts import Artifact, UserError, digest
from lum_ray.config import Data, Events, Profiles
from lum_ray.data import buckets
from lum_ray.data.compact import compact
from lum_ray.data.prepare import Tokenizer, prepare_timelines
from lum_ray.data.raw import RawTables
from lum_ray.lumos import timelines
from tests.data.increments import BEHAVIOURS, GTS, LUMOS, USERS, Root, day_of, events, same_rows


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files a folder, although the tables are small."""
    monkeypatch.setattr(buckets, "FILE_ROWS", 150)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int]], int]:
    """(late_days, [(seed, first day, end day) of each file]), no file with an event before its window."""
    late_days = draw(st.sampled_from([0, 1, 3, 7, 60]))
    end = draw(st.integers(1, 40))
    files = [(draw(st.integers(0, 99)), 0, end)]
    for _ in range(draw(st.integers(1, 3))):
        first = max(0, end - draw(st.integers(0, late_days)))
        end = max(end, first + draw(st.integers(1, 12)))
        files.append((draw(st.integers(0, 99)), first, end))
    return late_days, files, draw(st.sampled_from([20, 90, 400]))


@pytest.mark.parametrize("tokenizer", [LUMOS, GTS], ids=["timelines", "sequences"])
@pytest.mark.parametrize("with_id", [False, True])
@settings(
    max_examples=8, phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(history=histories())
def test_increments_are_equal_to_a_rebuild(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, with_id: bool, history: Any
) -> None:
    late_days, files, count = history
    named = Events(item="item", id="line" if with_id else None)
    data = Data(behaviours=BEHAVIOURS, events=named, max_reject_share=0.9, late_days=late_days)
    root = Root(tmp_path_factory.mktemp("root"), tokenizer, data)
    known, before = None, None
    for index, (seed, first, end) in enumerate(files):
        # names that go down, so that a repeated row of a later file is the one that stays
        table = events(count, seed, first, end, str(index))
        if known is not None:
            # some rows of the earlier file come again
            table = pa.concat_tables([table, before.slice(0, 9)])
            table = table.filter(pa.array(day_of(table) >= known - late_days))
            table = table if table.num_rows else events(1, seed, known, known + 1)
        root.write(f"{99 - index}", table)
        made = root.prepare()
        same_rows(made, root.rebuild())
        if known is not None:
            assert root.said[-1].startswith("continuing") and not any("rebuild" in text for text in root.said)
        known, before = made.manifest["known_end_day"], table


@pytest.mark.parametrize("tokenizer", [LUMOS, GTS], ids=["timelines", "sequences"])
def test_blocks_change_no_byte_of_an_increment(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = []
    for case, block_rows in enumerate([40, 1 << 20]):
        root = Root(tmp_path / str(case), tokenizer)
        root.write("a", events(600, 0, 0, 30))
        root.prepare(block_rows=block_rows)
        for name in ("b", "c") if case else ("c", "b"):
            root.write(name, events(150, ord(name), 28, 34))
        made = root.prepare(block_rows=block_rows)
        assert len(made.manifest["parts"]) == 2 and made.manifest["parts"][0]["to_day"] == 23
        files = {
            str(p.relative_to(made.uri)): p.read_bytes() for p in Path(made.uri).rglob("*.*") if p.suffix != ".json"
        }
        found.append(files)
    assert found[0] == found[1] and any(name.startswith("states/") for name in found[0])


def test_only_new_files_are_read(tmp_path: Path) -> None:
    read = list[int]()

    def partial(table: pa.Table, behaviours: Sequence[Any]) -> pa.Table:
        read.append(table.num_rows)
        return timelines.partial(table, behaviours)

    root = Root(tmp_path, replace(LUMOS, partial=partial))
    root.write("a", events(500, 0, 0, 30))
    root.prepare()
    root.write("b", events(70, 1, 29, 31))
    read.clear()
    made = root.prepare()
    assert sum(read) == 70 and made.manifest["events"] == 570 and made.manifest["rows_in"] == 570
    assert root.said[-1].endswith("1 new files of events, 70 rows")
    read.clear()
    assert root.prepare().manifest == made.manifest and not read


def test_events_before_the_window_are_rejected(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.write("a", events(500, 0, 0, 30))
    first = root.prepare()
    late = events(3, 2, 20, 21)
    root.write("b", pa.concat_tables([late, events(40, 1, 23, 31)]))
    made = root.prepare()
    rejects = pq.read_table(Path(made.uri) / "rejects").drop_columns(["user"]).to_pylist()
    assert rejects == [
        {
            "file": "events/b.parquet",
            "row": row,
            "reason": "comes more than data.late_days = 7 days before the end of what was known",
            "value": "10",
        }
        for row in range(3)
    ]
    assert (made.manifest["rows_in"], made.manifest["rows_rejected"]) == (543, 3)
    root.write("b", events(40, 1, 23, 31))
    same_rows(made, root.rebuild())
    # too many of the rows read now stop the job, and say which
    root.data = replace(root.data, max_reject_share=0.01)
    root.write("b", pa.concat_tables([late, events(40, 1, 23, 31)]))
    shutil.rmtree(made.uri)
    with pytest.raises(
        UserError, match=r"events: 3 of 43 rows .*\n.*comes more than data.late_days = 7 days before the end"
    ):
        root.prepare()
    assert artifacts.find(first.uri) is not None


def test_changed_and_removed_files_mean_a_rebuild(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.write("a", events(300, 0, 0, 30))
    root.write("b", events(50, 1, 25, 30))
    first = root.prepare()
    root.write("b", events(60, 2, 25, 30))
    made = root.prepare()
    assert root.said[-1] == (
        f"full rebuild: {first.manifest['digest']} cannot be continued: the event file b.parquet was changed"
    )
    assert len(made.manifest["parts"]) == 1
    same_rows(made, root.rebuild())
    (tmp_path / "events" / "b.parquet").unlink()
    root.prepare()
    assert root.said[-1].endswith("the event file b.parquet was removed")
    # another window is another lineage
    root.data = replace(root.data, late_days=3)
    root.write("c", events(20, 3, 29, 31))
    assert len(root.prepare().manifest["parts"]) == 1


def test_the_base_that_leaves_least_to_read_is_taken(tmp_path: Path) -> None:
    root = Root(tmp_path)
    for day, name in enumerate("abc"):
        root.write(name, events(100, day, 10 * day, 10 * day + 11))
        root.prepare()
    (second,) = [a for a in _made(tmp_path) if len(a.manifest["inputs"]["events"]) == 3]
    root.write("d", events(30, 5, 30, 32))
    made = root.prepare()
    assert root.said[-1].startswith(f"continuing {second.manifest['digest']}: 1 new files")
    # the parts that it refers to are where they were made, never behind another reference
    owners = [part.get("artifact") for part in made.manifest["parts"]]
    assert len(set(owners)) == 4 and owners[-1] is None
    for part in made.manifest["parts"][:-1]:
        assert (tmp_path / "made" / part["artifact"] / part["path"]).is_dir()
    same_rows(made, root.rebuild())
    # without the folder that holds a part, what refers to it is no base
    shutil.rmtree(tmp_path / "made" / owners[1])
    root.write("e", events(30, 6, 30, 33))
    same_rows(root.prepare(), root.rebuild())


def _made(root: Path) -> list[Artifact]:
    found = [artifacts.find(str(path)) for path in (root / "made").iterdir()]
    return [artifact for artifact in found if artifact is not None]


def test_profiles_are_referred_to_until_they_change(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.data = replace(root.data, profiles=Profiles(numbers=("age",)))
    (tmp_path / "profiles").mkdir()
    ages = pa.table({"user": [f"user-{n}" for n in range(USERS)], "age": np.arange(USERS) * 1.0})
    pq.write_table(ages, tmp_path / "profiles" / "a.parquet")
    root.write("a", events(200, 0, 0, 30))
    first = root.prepare()
    root.write("b", events(50, 1, 29, 31))
    second = root.prepare()
    assert second.manifest["profiles_of"] == first.manifest["digest"]
    assert second.manifest["rows_in"] == 250 + USERS
    same_rows(second, root.rebuild())
    pq.write_table(ages.slice(0, 20), tmp_path / "profiles" / "a.parquet")
    third = root.prepare()
    assert "profiles_of" not in third.manifest and third.manifest["rows_in"] == 250 + 20
    assert [part.get("artifact") for part in third.manifest["parts"][:2]] == [
        artifact.manifest["digest"] for artifact in (first, second)
    ]
    same_rows(third, root.rebuild())


def test_a_killed_increment_goes_on(tmp_path: Path) -> None:
    merges = list[int]()

    def merge(partials: Sequence[pa.Table], behaviours: Sequence[Any]) -> pa.Table:
        merges.append(1)
        if len(merges) == 2:
            raise KeyboardInterrupt
        return timelines.merge(partials, behaviours)

    root = Root(tmp_path)
    root.write("a", events(500, 0, 0, 30))
    root.prepare()
    root.write("b", events(300, 1, 29, 31))
    root.tokenizer = replace(LUMOS, merge=merge)
    with pytest.raises(KeyboardInterrupt):
        root.prepare()
    assert len(_made(tmp_path)) == 1
    same_rows(root.prepare(), root.rebuild())


def test_a_file_that_comes_while_others_are_read_is_the_next_increments(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.write("a", events(200, 0, 0, 30))
    folder = str(tmp_path / "events")
    prints = {"events": artifacts.fingerprint(folder), "profiles": None}
    root.write("b", events(40, 1, 28, 31))
    uri = str(tmp_path / "made" / digest(prints, 7))
    arguments = (root.data, RawTables(folder), uri, LUMOS, "local", prints)
    first = prepare_timelines(*arguments, lineage=digest(7, None))
    assert first.manifest["events"] == 200
    made = root.prepare()
    assert root.said[-1].startswith("continuing") and made.manifest["events"] == 240
    same_rows(made, root.rebuild())
    # one that is written anew meanwhile is neither what was seen nor whole
    root.write("a", events(300, 0, 0, 30))
    shutil.rmtree(first.uri)
    with pytest.raises(UserError, match=r"a\.parquet: was changed while it was being prepared"):
        prepare_timelines(*arguments, lineage=digest(7, None))


def test_a_base_that_is_compacted_meanwhile_is_still_a_base(tmp_path: Path) -> None:
    root = Root(tmp_path)
    for index, (first, end) in enumerate([(0, 20), (20, 30)]):
        root.write(str(index), events(200, index, first, end))
        base = root.prepare()

    def partial(table: pa.Table, behaviours: Sequence[Any]) -> pa.Table:
        compact(base.uri, root.said.append)
        return timelines.partial(table, behaviours)

    root.write("2", events(40, 2, 29, 31))
    root.tokenizer = replace(LUMOS, partial=partial)
    with pytest.raises(UserError, match="prepare again"):
        root.prepare()
    root.tokenizer = LUMOS
    made = root.prepare()
    assert made.manifest["parts"][0]["path"] == "part-0-30"
    same_rows(made, root.rebuild())


def test_manifests_are_json_of_plain_values(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.write("a", events(100, 0))
    root.prepare()
    root.write("b", events(100, 1, 39, 41))
    manifest = json.loads((Path(root.prepare().uri) / "manifest.json").read_text())
    assert manifest["states"].keys() == {"files", "of_files", "rows", "active_days"}
    assert sum(manifest["bucket_users"]) == manifest["users"]
