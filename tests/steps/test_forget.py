"""A forgotten user is in no file any more, stays out, and nobody else is changed; a killed `forget` goes on."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from lum_ray import catalog, config
from lum_ray.artifacts import UserError, find, open_artifact
from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, hash_strings
from lum_ray.data.state import State
from lum_ray.steps import forget, prepare, publish
from lum_ray.steps.traces import Sought, look

HER = "anna-17"
COUNTS = ("users", "active_days", "events", "rows_in", "rows_rejected", "rows_forgotten", "bytes")


def own_run(folder: Path, her: str = HER, users: int = 40, model: str = "lumos") -> Run:
    """A run over tables of its own: some rows of hers and of another are broken, she has a profile and a campaign."""
    random = np.random.default_rng(0)
    names = [her, *(f"user-{number}" for number in range(users))]
    user = np.array(names, object)[np.concatenate([np.arange(users + 1), random.integers(0, users + 1, 900)])]
    price = random.integers(1, 500, len(user)) / 100
    price[[0, 1]] = np.inf, np.nan
    events = pa.table(
        {
            "user": user,
            "time": pa.array(random.integers(100, 160, len(user)), pa.int32()),
            "price": price,
            "product": [f"p{number}" for number in random.integers(0, 9, len(user))],
        }
    )
    calendar = pa.table(
        {
            "scope": ["user", "user", "global"],
            "key": [her, "user-1", None],
            "start_day": pa.array([130, 130, 140], pa.int32()),
            "end_day": pa.array([133, 133, 140], pa.int32()),
            "event_type": ["letter", "campaign", "match"],
        }
    )
    profiles = pa.table({"user": names, "town": ["Ulm"] * len(names)})
    for name, table in (("events", events), ("calendar", calendar), ("profiles", profiles)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        half = table.num_rows // 2
        pq.write_table(table.slice(0, half), folder / name / "0.parquet")
        pq.write_table(table.slice(half), folder / name / "1.parquet")
    raw: dict[str, Any] = {
        "name": "own",
        "root": str(folder / "root"),
        "data": {
            "events": {"path": str(folder / "events")},
            "profiles": {"path": str(folder / "profiles"), "categories": ["town"]},
            "calendar": {"path": str(folder / "calendar")},
            "behaviours": [
                {"name": "active", "kind": "binary", "aggregate": "count()"},
                {"name": "spend", "kind": "continuous", "aggregate": "sum(price)", "resolution": 0.01},
            ],
            "max_reject_share": 0.01,
            "engine": "local",
        },
        "split": {
            "validate_from": 140,
            "validate": {"from_day": 140},
            "test": {"from_day": 150},
            "min_history_days": 7,
        },
        "lumos": {"history_days": 14, "future_days": 3},
    }
    return catalog.read_run(raw)


def holders(root: Path, user: str) -> list[str]:
    """Files below `root`, but for the tombstones, with the user's ID or hash: found without the product's code."""
    number = int(hash_strings([user])[0])
    found = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if path.parent.name == "forgotten":
            continue
        content = path.read_bytes()
        texts = [content.decode(errors="replace")]
        if content.startswith(b"PAR1") and content.endswith(b"PAR1"):
            file = pq.ParquetFile(path)
            texts.append(str(file.read().to_pylist()) + str(file.metadata.to_dict()))
        elif content.startswith(b"ARROW1"):
            texts.append(str(pa.ipc.open_file(path).read_all().to_pylist()))
        if any(user in text or str(number) in text for text in texts):
            found.append(str(path.relative_to(root)))
    return found


def same(one: Rows, other: Rows) -> bool:
    names = ("user", "user_hash", "offsets", "days", "values", "first_day", "end_day", "segment")
    equal = [np.array_equal(getattr(one, name), getattr(other, name)) for name in names]
    return all(equal) and all(one.profile[name].tolist() == column.tolist() for name, column in other.profile.items())


def everyone(uri: str) -> Rows:
    timelines = Timelines.open(uri)
    return timelines.read(range(timelines.buckets))


def others(rows: Rows, user: str) -> Rows:
    return rows.take(np.flatnonzero(rows.user != user))


def counts_of(uri: str) -> dict[str, Any]:
    return {name: open_artifact(uri).manifest[name] for name in COUNTS}


def test_what_continues_an_artifact_that_forgot_her_equals_a_rebuild(tmp_path: Path) -> None:
    """Prepare, new events, forget, new events: rows and counts are those of preparing all of it without her."""
    events = tmp_path / "grown" / "events"

    def day(name: str, first_day: int) -> None:
        names = [HER, "user-1", "user-2", "newcomer"] * 3
        days = pa.array([first_day + place % 3 for place in range(len(names))], pa.int32())
        table = pa.table({"user": names, "time": days, "price": [1.5, float("nan")] * 6, "product": ["p1"] * 12})
        pq.write_table(table, events / name)

    run = own_run(tmp_path / "grown")
    run = catalog.read_run(config.override(config.dump(run), ["data.max_reject_share=0.6"]))
    prepare(run)
    day("2.parquet", 158)
    grown = prepare(run)
    assert open_artifact(grown.uri).manifest["parts"][0].get("artifact")
    found = forget(run, [HER])
    assert found.left == {}
    day("3.parquet", 161)
    grown = prepare(run)
    assert len(open_artifact(grown.uri).manifest["parts"]) > 1
    shutil.copytree(tmp_path / "grown" / "root" / "forgotten", tmp_path / "anew" / "forgotten")
    anew = prepare(catalog.read_run(config.override(config.dump(run), [f"root={tmp_path / 'anew'}"])))
    assert same(everyone(grown.uri), everyone(anew.uri))
    assert HER not in everyone(grown.uri).user
    for name in set(COUNTS) - {"bytes"}:
        assert counts_of(grown.uri)[name] == counts_of(anew.uri)[name], name
    one, other = (open_artifact(made.uri).manifest["read"] for made in (grown, anew))
    assert one == other
    counts = counts_of(grown.uri)
    used = counts["events"] + 41 - 1  # and the profiles but hers
    assert counts["rows_in"] == used + counts["rows_rejected"] + counts["rows_forgotten"]


def test_a_delta_table_under_the_root_is_not_rewritten_behind_its_log(tmp_path: Path) -> None:
    run = own_run(tmp_path)
    prepared = prepare(run)
    write_deltalake(tmp_path / "root" / "delivered", pa.table({"user": [HER, "user-1"], "p": [0.1, 0.2]}))
    before = everyone(prepared.uri)
    with pytest.raises(UserError, match=r"root/delivered: expected no Delta table .* nothing was changed"):
        forget(run, [HER])
    assert same(everyone(prepared.uri), before) and not (tmp_path / "root" / "forgotten").exists()


def test_a_user_leaves_every_file_and_nobody_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, root = own_run(tmp_path), tmp_path / "root"
    prepared, state = prepare(run), publish(run)
    before, known = everyone(prepared.uri), State.open(state)
    rows = known.rows(["user-1", HER])
    assert set(rows) == {"user-1", HER}
    cache = tmp_path / "tmp" / "lum_ray_state_x"
    cache.mkdir(parents=True)
    shutil.copy(root / "state" / Path(state).name / "state.arrow", cache / "state.arrow")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    # what other steps and killed jobs leave behind
    for name in ("reports/r/report.html", "timelines/abc/_work/x/map-0.arrow", "timelines/abc/part.parquet.0f.tmp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "reports" / "r" / "report.html").write_text("<p>anna&#45;17: 3 items</p>")
    (root / "reports" / "r" / "manifest.json").write_text("{}")
    shutil.copy(cache / "state.arrow", root / "timelines" / "abc" / "_work" / "x" / "map-0.arrow")
    cut = next((root / "timelines").rglob("0000.parquet")).read_bytes()[:-20]
    (root / "timelines" / "abc" / "part.parquet.0f.tmp").write_bytes(cut)
    folder = root / "predictions" / "own-1"
    (folder / "rankings").mkdir(parents=True)
    table = pa.table({"user": [HER, "user-1", "user-2"], "item": ["a", "b", "c"]})
    coded = table.set_column(0, "user", table["user"].dictionary_encode())
    pq.write_table(coded, folder / "rankings" / "0000.parquet")
    pq.write_table(table.select(["user"]), folder / "cohorts.parquet")
    (folder / "manifest.json").write_text('{"kind": "predictions", "rows": 3}')
    assert len(holders(root, HER)) >= 9

    found = forget(run, [HER])
    assert found.left == {} and found.removed >= 4 and holders(root, HER) == []
    assert not (cache / "state.arrow").exists() and not (root / "reports" / "r").exists()
    hers = pq.read_table(tmp_path / "events")["user"].to_pylist().count(HER)
    assert found.source_rows == hers + 1  # her profile too
    assert same(everyone(prepared.uri), others(before, HER))
    again = State.open(state)
    assert sorted(again.users()) == sorted(set(known.users()) - {HER}) and again.rows([HER]) == {}
    assert same(again.rows(["user-1"])["user-1"], rows["user-1"])
    assert open_artifact(str(folder)).manifest["rows"] == 2
    assert pq.read_table(folder / "rankings")["item"].to_pylist() == ["b", "c"]
    assert prepare(run).calendar_table["event_type"].to_pylist() == ["match", "campaign"]

    counts, files = counts_of(prepared.uri), sorted(path for path in root.rglob("*") if path.is_file())
    profiles = 40
    assert counts["rows_in"] == counts["events"] + counts["rows_rejected"] + counts["rows_forgotten"] + profiles
    assert counts["rows_rejected"] == pq.read_table(Path(prepared.uri) / "rejects").num_rows == 1
    twice = forget(run, [HER])
    assert (twice.rewritten, twice.removed, twice.rows, twice.left) == (0, 0, 0, {})
    assert sorted(path for path in root.rglob("*") if path.is_file()) == files
    shutil.rmtree(root / "timelines")
    anew = prepare(run)  # the source still has her
    assert anew.uri == prepared.uri and anew.fitted.uri == prepared.fitted.uri
    assert counts_of(anew.uri) == counts and same(everyone(anew.uri), others(before, HER))
    assert holders(root, HER) == []


def test_an_id_that_items_have_too_is_told_apart(tmp_path: Path) -> None:
    run = own_run(tmp_path, her="7")
    prepared = prepare(run)
    folder = tmp_path / "root" / "predictions" / "own-1" / "rankings"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"user": ["7", "user-1"], "item": ["a", "7"]}), folder / "0.parquet")
    found = forget(run, ["7"])
    assert found.left == {} and list(found.namesakes) == [str(folder / "0.parquet")]
    assert pq.read_table(folder).to_pylist() == [{"user": "user-1", "item": "7"}]
    assert "7" not in everyone(prepared.uri).user


def test_a_user_who_is_not_there_is_no_fault_and_stays_out(tmp_path: Path) -> None:
    run = own_run(tmp_path)
    assert forget(run, [HER, "user-3", HER]).left == {}  # nothing has been prepared yet
    users = everyone(prepare(run).uri).user
    assert HER not in users and "user-3" not in users and len(users) == 39
    with pytest.raises(UserError, match="expected the IDs of users"):
        forget(run, [])


def test_what_cannot_be_rewritten_fails_the_proof(tmp_path: Path) -> None:
    run = own_run(tmp_path)
    note = Path(prepare(run).fitted.uri) / "notes.bin.gz"
    note.write_bytes(gzip.compress(b"\x00ask anna-17\x00"))
    (note.parent / "broken.parquet").write_bytes(b"PAR1 and no more")
    found = forget(run, [HER])
    assert {Path(uri).name: trace.mentions[0] for uri, trace in found.left.items()} == {
        "notes.bin.gz": "its bytes",
        "broken.parquet": "cannot be read (ArrowInvalid): nothing can be proved of it",
    }


@pytest.mark.parametrize(
    ("column", "held"),
    [
        (pa.array(["x", HER]), True),
        (pa.array([f"ask {HER}!", "x"]), True),
        (pa.array([f"{HER}0", "x"]), False),
        (pa.array([["x"], [HER]]), True),
        (pa.array([{"a": {"b": HER}}, None]), True),
        (pa.array([HER.encode(), b"x"]), True),
        (pa.array(["x", HER, "y"]).dictionary_encode().take(pa.array([0, 2])), True),
        (pa.array([1.5, 2.5]), False),
    ],
)
def test_ids_are_found_however_deep(tmp_path: Path, column: pa.Array, held: bool) -> None:
    table = pa.table({"other": column})
    pq.write_table(table, tmp_path / "x.parquet")
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("x.parquet", "x.arrow"):
        # parquet keeps no more of a dictionary than the rows have, if it is read as one
        assert bool(look(str(tmp_path / name), Sought((HER,)))) is held


class Killed(BaseException):
    """The process is gone."""


def test_a_killed_forget_goes_on_and_readers_never_see_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, template = own_run(tmp_path), tmp_path / "template"
    prepared = prepare(run)
    publish(run)
    before, expected = everyone(prepared.uri), counts_of(prepared.uri)
    (tmp_path / "root").rename(template)
    replace, delete = os.replace, shutil.rmtree
    left = 0

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def one(*args: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return work(*args, **keywords)

        return one

    from lum_ray.steps.forget import _Work

    finished, kills = False, 0
    while not finished:
        delete(tmp_path / "root", ignore_errors=True)
        shutil.copytree(template, tmp_path / "root")
        kills += 1
        left = kills
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", counted(replace))
            patch.setattr(_Work, "_delete", counted(_Work._delete))
            try:
                forget(run, [HER])
                finished = True
            except Killed:
                assert same(others(everyone(prepared.uri), HER), others(before, HER))
                State.open(str(next(path for path in (tmp_path / "root" / "state").iterdir() if path.is_dir()))).users()
        assert forget(run, [HER]).left == {} and holders(tmp_path / "root", HER) == []
        counts = counts_of(prepared.uri)
        assert counts["users"] == expected["users"] - 1 and counts["rows_rejected"] == expected["rows_rejected"] - 1
        assert counts["rows_in"] == counts["events"] + counts["rows_rejected"] + counts["rows_forgotten"] + 40
        names = [path.name for path in (Path(prepared.uri)).rglob("*.parquet")]
        assert len(names) == 3, names  # a part, the profiles, the rejects: nothing is left over
    assert kills > 10


def test_checkpoints_that_were_trained_with_her_are_listed_until_they_are_trained_anew(
    tiny: Run, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny.root, root)
    run = catalog.read_run(config.override(config.dump(tiny), [f"root={root}"]))
    uri = publish(run)
    user = State.open(uri).users()[3]
    found = forget(run, [user])
    assert found.left == {} and [Path(place).name for place in found.checkpoints] == [
        path.name for path in (root / "checkpoints").iterdir()
    ]
    assert holders(root, user) == []
    place = Path(found.checkpoints[0]) / "best" / "manifest.json"
    steps = json.loads(place.read_text())
    steps["steps"][0]["files"]["model.safetensors"]["sha256"] = "other weights"
    place.write_text(json.dumps(steps))
    assert forget(run, [user]).checkpoints == ()


def test_sequences_forget_too(tiny_gts: Run, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny_gts.root, root)
    run = catalog.read_run(config.override(config.dump(tiny_gts), [f"root={root}"]))
    publish(run)
    prepared = prepare(run)
    before = everyone(prepared.uri)
    user = str(before.user[5])
    found = forget(run, [user])
    assert found.left == {} and holders(root, user) == [] and len(found.checkpoints) >= 2
    assert prepare(run).uri == prepared.uri and same(everyone(prepared.uri), others(before, user))
    counts = counts_of(prepared.uri)
    assert counts["rows_in"] == counts["events"] + counts["rows_forgotten"] + 59
    shutil.rmtree(prepared.uri)
    anew = counts_of(prepare(run).uri)  # of raw tables without her, since these are lum_ray's own
    assert anew == counts | {"rows_in": counts["rows_in"] - counts["rows_forgotten"], "rows_forgotten": 0}
    assert same(everyone(prepared.uri), others(before, user))
    assert find(str(root / "forgotten")) is None
