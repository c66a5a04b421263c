from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lum_ray import artifacts
from lum_ray.artifacts import UserError
from lum_ray.config import Behaviour, Calendar, Data, Events, Profiles
from lum_ray.data import buckets, prepare, tasks
from lum_ray.data.calendar import prepare_calendar
from lum_ray.data.prepare import Tokenizer, prepare_timelines
from lum_ray.data.raw import RawTables, raw_files
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import hash_strings
from lum_ray.lumos import timelines

TOKENIZER = Tokenizer(timelines.partial, timelines.merge, timelines.TOKENIZER_VERSION)
BEHAVIOURS = (
    Behaviour("active", "binary", "count()"),
    Behaviour("spend", "continuous", "sum(price)", 0.01, "active"),
    Behaviour("average", "continuous", "mean(price)", 0.01),
    Behaviour("shops", "count", "n_unique(shop)"),
)
USERS = 150


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files a folder, although the tables are small."""
    monkeypatch.setattr(buckets, "FILE_ROWS", 400)


def _data(**changes: Any) -> Data:
    values: dict[str, Any] = {"behaviours": BEHAVIOURS, "max_reject_share": 0.01}
    return Data(**(values | changes))


def _rows(count: int = 3000, seed: int = 0) -> pa.Table:
    draw = np.random.default_rng(seed)
    return pa.table(
        {
            "user": [f"user-{number}" for number in draw.integers(0, USERS, count)],
            "time": pa.array(draw.integers(-20, 60, count), pa.int32()),
            "price": pa.array(draw.integers(-100, 10_000, count) / 100, mask=draw.random(count) < 0.1),
            "shop": [f"shop-{number}" for number in draw.integers(0, 5, count)],
            "line": [f"line-{number}" for number in range(count)],
        }
    )


def _write(folder: Path, table: pa.Table, files: int = 1, row_group_size: int = 10_000) -> str:
    folder.mkdir(parents=True)
    for index in range(files):
        begin, end = index * table.num_rows // files, (index + 1) * table.num_rows // files
        pq.write_table(table.slice(begin, end - begin), folder / f"{index:04d}.parquet", row_group_size=row_group_size)
    return str(folder)


def _profiles() -> pa.Table:
    users = [f"user-{number}" for number in range(USERS + 20)]
    return pa.table({"user": users, "age": np.arange(len(users)) * 0.5, "town": ["Ulm", "Bonn"] * (len(users) // 2)})


def _prepare(root: Path, tables: RawTables, data: Data | None = None, engine: Any = "local", **options: Any) -> Path:
    uri = root / "timelines" / "0123456789ab"
    prepare_timelines(data or _data(), tables, str(uri), TOKENIZER, engine, **options)
    return uri


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_artifact_is_as_the_data_model_says(tmp_path: Path) -> None:
    events = _rows()
    tables = RawTables(_write(tmp_path / "e", events), _write(tmp_path / "p", _profiles()))
    data = _data(profiles=Profiles(numbers=("age",), categories=("town",)))
    uri = _prepare(tmp_path, tables, data, fingerprint=["x", 1])
    manifest = json.loads((uri / "manifest.json").read_text())
    daily = timelines.tokenize(events.rename_columns({"time": "day"}), BEHAVIOURS)

    assert (manifest["kind"], manifest["digest"], manifest["inputs"]) == ("timelines", "0123456789ab", ["x", 1])
    assert (manifest["first_day"], manifest["end_day"], manifest["log2_buckets"]) == (-20, 60, 6)
    assert (manifest["users"], manifest["active_days"]) == (USERS, daily.num_rows)
    assert (manifest["rows_in"], manifest["rows_rejected"], manifest["events"]) == (3000 + USERS + 20, 0, 3000)
    assert manifest["behaviours"][1] == {"name": "spend", "kind": "continuous", "resolution": 0.01}
    (part,) = manifest["parts"]
    assert (part["path"], part["from_day"], part["to_day"]) == ("part--20-60", -20, 60)
    assert len(part["files"]) == 8 and not (uri / "_work").exists() and not (uri / "rejects").exists()
    assert manifest["bytes"] == sum((uri / part["path"] / file["name"]).stat().st_size for file in part["files"])

    for folder, files in ((part["path"], part["files"]), ("profiles", manifest["profiles"])):
        seen = []
        for file in files:
            parquet = pq.ParquetFile(uri / folder / file["name"])
            assert parquet.num_row_groups == len(file["row_groups"])
            for index, group in enumerate(file["row_groups"]):
                table = parquet.read_row_group(index)
                assert set(table["bucket"].to_pylist()) == {group["bucket"]} and table.num_rows == group["rows"]
                hashes = hash_strings(table["user"].to_pylist())
                assert table["user_hash"].to_pylist() == sorted(hashes.tolist()) == hashes.tolist()
                assert all(value % 64 == group["bucket"] for value in hashes.tolist())
                seen.append(group["bucket"])
        assert seen == sorted(set(seen))
    assert parquet.schema_arrow.names == ["bucket", "user", "user_hash", "registered", "ends", "segment", "age", "town"]

    rows = Timelines.open(str(uri)).read(range(64))
    order = np.lexsort((rows.days, np.repeat(rows.user, np.diff(rows.offsets)).astype(str)))
    assert np.repeat(rows.user, np.diff(rows.offsets))[order].tolist() == daily["user"].to_pylist()
    assert rows.days[order].tolist() == daily["day"].to_pylist()
    for column, behaviour in enumerate(BEHAVIOURS):
        assert rows.values[order, column].tolist() == daily[behaviour.name].to_pylist()
    assert rows.profile["age"].tolist() == [int(user.removeprefix("user-")) * 0.5 for user in rows.user]


@pytest.mark.parametrize("with_id", [False, True])
def test_order_blocks_and_files_change_no_byte(tmp_path: Path, with_id: bool) -> None:
    events, profiles = _rows(), _profiles()
    data = _data(
        profiles=Profiles(numbers=("age",), categories=("town",)), events=Events(id="line" if with_id else None)
    )
    shuffle = random.Random(1)
    expected = None
    for case, (files, group, block_rows) in enumerate(
        [(1, 10_000, 1 << 20), (1, 100, 150), (7, 90, 200), (30, 50, 1 << 20)]
    ):
        root = tmp_path / str(case)
        tables = RawTables(_write(root / "e", events, files, group), _write(root / "p", profiles, min(files, 5), 20))
        found = _content(_prepare(root, tables, data, block_rows=block_rows))
        expected = expected or found
        assert found == expected
        events = events.take(shuffle.sample(range(events.num_rows), events.num_rows))
        profiles = profiles.take(shuffle.sample(range(profiles.num_rows), profiles.num_rows))


def test_ray_gives_the_same_bytes(tmp_path: Path, ray_session: None) -> None:
    bad = pa.concat_tables([_rows(), _rows(2).set_column(2, "price", pa.array([float("nan"), 0.001]))])
    tables = RawTables(_write(tmp_path / "e", bad, 3, 400), _write(tmp_path / "p", _profiles(), 2))
    data = _data(profiles=Profiles(numbers=("age",), categories=("town",)))
    local = _content(_prepare(tmp_path / "local", tables, data, "local", block_rows=500))
    assert _content(_prepare(tmp_path / "ray", tables, data, "ray", block_rows=500)) == local
    assert "rejects/0000.parquet" in local and len([name for name in local if name.startswith("part-")]) == 8
    # what is wrong comes back in our words
    twice = RawTables(tables.events, _write(tmp_path / "twice", pa.concat_tables([_profiles(), _profiles()])))
    with pytest.raises(UserError, match="come more than once: user-0, user-1, user-10"):
        _prepare(tmp_path / "again", twice, data, "ray")


def test_auto_takes_ray_where_it_has_other_machines(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    assert prepare._engine("auto") is prepare._with_threads
    (node,) = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [node, node | {"Alive": False}])
    assert prepare._engine("auto") is prepare._with_threads
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    assert prepare._engine("auto") is prepare._with_ray


def test_rejects_are_kept_with_file_row_and_reason(tmp_path: Path) -> None:
    events = _rows(1000)
    prices = events["price"].to_pylist()
    prices[3], prices[998] = float("nan"), 1.005
    uri = _write(tmp_path / "e", events.set_column(2, "price", pa.array(prices)), files=2)
    found = _prepare(tmp_path, RawTables(uri))
    users = events["user"].to_pylist()
    assert [list(row.values()) for row in pq.read_table(found / "rejects").to_pylist()] == [
        ["events/0000.parquet", 3, "`price` is not a finite number", "nan", users[3]],
        ["events/0001.parquet", 498, "spend: sum(price) is finer than the resolution 0.01", "1.005", users[998]],
    ]
    manifest = json.loads((found / "manifest.json").read_text())
    assert (manifest["rows_in"], manifest["rows_rejected"], manifest["events"]) == (1000, 2, 998)


def test_too_many_rejects_stop_with_the_first_five(tmp_path: Path) -> None:
    events = _rows(1000).set_column(2, "price", pa.array([float("inf")] * 11 + [1.0] * 989))
    with pytest.raises(UserError) as error:
        _prepare(tmp_path, RawTables(_write(tmp_path / "e", events)))
    lines = str(error.value).splitlines()
    assert lines[0].startswith(
        "events: 11 of 1000 rows break the schema (1.10%), more than data.max_reject_share = 1.00%"
    )
    assert lines[1] == "  events/0000.parquet, row 0: `price` is not a finite number" and len(lines) == 7
    rejects = tmp_path / "timelines" / "0123456789ab" / "rejects" / "0000.parquet"
    assert str(rejects) in lines[6] and pq.read_table(rejects).num_rows == 11
    assert artifacts.find(str(rejects.parent.parent)) is None


def test_repeated_rows_of_other_files_are_rejected(tmp_path: Path) -> None:
    events = _rows(1000)
    repeated = pa.concat_tables([events, events.slice(10, 4)])
    data = _data(events=Events(id="line"))
    clean = _content(_prepare(tmp_path / "a", RawTables(_write(tmp_path / "a" / "e", events, 2)), data))
    found = _prepare(tmp_path / "b", RawTables(_write(tmp_path / "b" / "e", repeated, 5, 100)), data, block_rows=100)
    rejects = pq.read_table(found / "rejects").to_pylist()
    assert [(row["file"], row["row"]) for row in rejects] == [("events/0004.parquet", 197 + row) for row in range(4)]
    assert rejects[0]["reason"] == "repeats an id of its user"
    assert (rejects[0]["value"], rejects[0]["user"]) == ("line-10", events["user"][10].as_py())
    same = {name: content for name, content in _content(found).items() if name.startswith("part-")}
    assert same == {name: content for name, content in clean.items() if name.startswith("part-")}


def test_a_killed_job_goes_on_from_its_finished_files(tmp_path: Path) -> None:
    tables = RawTables(_write(tmp_path / "e", _rows(), 3))
    expected = _content(_prepare(tmp_path / "whole", tables, block_rows=1000))
    partials, merges = [], []

    def partial(events: pa.Table, behaviours: Sequence[Any]) -> pa.Table:
        partials.append(events.num_rows)
        return timelines.partial(events, behaviours)

    def merge(states: Sequence[pa.Table], behaviours: Sequence[Any]) -> pa.Table:
        merges.append(len(states))
        if len(merges) == 4:
            raise KeyboardInterrupt
        return timelines.merge(states, behaviours)

    uri = tmp_path / "timelines" / "0123456789ab"
    with pytest.raises(KeyboardInterrupt):
        prepare_timelines(_data(), tables, str(uri), Tokenizer(partial, merge, 1), "local", block_rows=1000)
    assert artifacts.find(str(uri)) is None
    before = len(partials)
    assert before == 3
    prepare_timelines(_data(), tables, str(uri), Tokenizer(partial, merge, 1), "local", block_rows=1000)
    # no block is read twice, and at most the merges that were running are made again
    assert len(partials) == before and 8 + 1 <= len(merges) <= 8 + (os.cpu_count() or 1)
    assert _content(uri) == expected
    # a committed artifact is returned as it is
    prepare_timelines(_data(), RawTables("nowhere"), str(uri), Tokenizer(partial, merge, 1), "local")


def test_a_driver_that_lost_the_race_takes_the_winners_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = RawTables(_write(tmp_path / "e", _rows()))
    uri = str(tmp_path / "timelines" / "0123456789ab")

    def overtaken(events: pa.Table, behaviours: Sequence[Any]) -> pa.Table:
        if artifacts.find(uri) is None:
            prepare_timelines(_data(), tables, uri, TOKENIZER, "local")
        raise FileNotFoundError("_work is gone")

    found = prepare_timelines(_data(), tables, uri, Tokenizer(overtaken, timelines.merge, 1), "local")
    assert found.manifest["users"] == USERS


def test_bounds_of_the_data_are_the_run_files(tmp_path: Path) -> None:
    tables = RawTables(_write(tmp_path / "e", _rows()))
    uri = _prepare(tmp_path, tables, _data(start=-100, end="1970-04-11"))
    manifest = json.loads((uri / "manifest.json").read_text())
    assert (manifest["first_day"], manifest["end_day"]) == (-100, 100) and (uri / "part--100-100").is_dir()


def test_k_is_inherited_or_follows_from_the_rows() -> None:
    assert [buckets.choose_log2_buckets(rows, 0) for rows in (0, 1_469_307, 10**9, 10**10)] == [6, 6, 13, 17]
    assert buckets.choose_log2_buckets(1000, 4096 * 300) == 9
    assert [buckets.choose_files(rows, 6) for rows in (0, 400, 801, 10**9)] == [1, 1, 2, 64]


def test_a_given_k_is_kept(tmp_path: Path) -> None:
    uri = _prepare(tmp_path, RawTables(_write(tmp_path / "e", _rows())), log2_buckets=8)
    manifest = json.loads((uri / "manifest.json").read_text())
    found = {group["bucket"] for file in manifest["parts"][0]["files"] for group in file["row_groups"]}
    assert manifest["log2_buckets"] == 8 and found == {
        int(value) % 256 for value in hash_strings([f"user-{n}" for n in range(USERS)])
    }


def test_missing_tables_and_no_valid_rows_stop(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing"):
        _prepare(tmp_path, RawTables(str(tmp_path / "nowhere")))
    tables = RawTables(_write(tmp_path / "e", _rows(10)))
    with pytest.raises(UserError, match="there is no profiles table"):
        _prepare(tmp_path, tables, _data(profiles=Profiles()))
    with pytest.raises(UserError, match="none of the 10 rows is a valid event"):
        _prepare(tmp_path, tables, _data(start=1000, max_reject_share=1.0))


def test_a_file_damaged_inside_is_named_by_the_worker(tmp_path: Path) -> None:
    uri = _write(tmp_path / "e", _rows())
    file = tmp_path / "e" / "0000.parquet"
    content = bytearray(file.read_bytes())
    content[4:400] = bytes(396)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"0000\.parquet: expected a complete parquet file"):
        _prepare(tmp_path, RawTables(uri))


def test_progress_counts_tasks(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    _prepare(
        tmp_path,
        RawTables(_write(tmp_path / "e", _rows(), 3)),
        block_rows=1000,
        progress=lambda *step: seen.append(step),
    )
    assert seen[:4] == [("read", done, 3) for done in range(4)] and seen[-1] == ("merge", 8, 8)


def test_map_tasks_hold_every_row_group_once(tmp_path: Path) -> None:
    files = raw_files(_write(tmp_path / "e", _rows(1000), 4, 60), "events")
    blocks = tasks.map_tasks("events", files, 130)
    pieces = [piece for block in blocks for piece in block["pieces"]]
    expected = [(file.uri, group) for file in files for group in range(5)]
    assert [(uri, group) for uri, _, groups, _, _ in pieces for group in groups] == expected
    assert all(row == groups[0] * 60 for _, _, groups, row, _ in pieces)
    sizes = [
        sum(60 if group < 4 else 10 for _, _, groups, _, _ in block["pieces"] for group in groups) for block in blocks
    ]
    assert max(sizes) <= 130 and sum(sizes) == 1000 and len({block["name"] for block in blocks}) == len(blocks) == 8


@pytest.mark.parametrize("with_id", [False, True])
def test_strings_that_are_stored_as_categories_change_no_byte(tmp_path: Path, with_id: bool) -> None:
    events, data = _rows(1000), _data(events=Events(id="line" if with_id else None))
    coded = events
    for name in ("user", "shop", "line"):
        coded = coded.set_column(coded.column_names.index(name), name, coded[name].dictionary_encode())
    found = [
        _content(_prepare(tmp_path / str(case), RawTables(_write(tmp_path / f"e{case}", table, 2, 90)), data))
        for case, table in enumerate((events, coded))
    ]
    assert found[0] == found[1]


def test_an_empty_file_in_front_changes_nothing(tmp_path: Path) -> None:
    whole = RawTables(_write(tmp_path / "e", _rows(1000)))
    (tmp_path / "f").mkdir()
    pq.write_table(_rows(1000).slice(0, 0), tmp_path / "f" / "0000.parquet")
    pq.write_table(_rows(1000), tmp_path / "f" / "0001.parquet")
    found = _content(_prepare(tmp_path / "two", RawTables(str(tmp_path / "f"))))
    assert found == _content(_prepare(tmp_path / "one", whole))


def test_the_calendar_artifact(tmp_path: Path) -> None:
    tables = RawTables(_write(tmp_path / "e", _rows(10).set_column(1, "time", pa.array([3] * 10, pa.date32()))))
    calendar = pa.table(
        {
            "scope": ["global", "user", "team"],
            "key": [None, "user-1", "x"],
            "start_day": pa.array([3, 4, 5], pa.int32()),
            "end_day": pa.array([3, 9, 5], pa.int32()),
            "event_type": ["match", "campaign", "match"],
        }
    )
    given = RawTables(tables.events, calendar=_write(tmp_path / "c", calendar))
    data = _data(calendar=Calendar(holidays="US"), max_reject_share=0.5)
    found = prepare_calendar(data, given, str(tmp_path / "calendar" / "abc"), 0, 10)
    rows = pq.read_table(tmp_path / "calendar" / "abc" / "0000.parquet")
    assert found.manifest["event_types"] == ["campaign", "holiday", "match"] and found.manifest["rows_rejected"] == 1
    assert (
        found.manifest["files"] == [{"name": "0000.parquet", "rows": rows.num_rows}]
        and found.manifest["kind"] == "calendar"
    )
    assert rows.filter(pa.array([kind != "holiday" for kind in rows["event_type"].to_pylist()])).num_rows == 2
    reasons = pq.read_table(tmp_path / "calendar" / "abc" / "rejects")["reason"].to_pylist()
    assert reasons == ["scope: is none of global, segment, user"]
    with pytest.raises(UserError, match=r"calendar: 1 of \d+ rows break the schema"):
        prepare_calendar(_data(calendar=Calendar(holidays="US")), given, str(tmp_path / "calendar" / "few"), 0, 10)

    nothing = prepare_calendar(_data(), given, str(tmp_path / "calendar" / "none"), 0, 10)
    assert nothing.manifest["files"] == [{"name": "0000.parquet", "rows": 0}]
    with pytest.raises(UserError, match="neither a calendar table nor `holidays`"):
        prepare_calendar(_data(calendar=Calendar()), tables, str(tmp_path / "calendar" / "x"), 0, 10)
    numbers = RawTables(_write(tmp_path / "n", _rows(10)))
    with pytest.raises(UserError, match="holds day numbers"):
        prepare_calendar(data, numbers, str(tmp_path / "calendar" / "x"), 0, 10)
