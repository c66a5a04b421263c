"""The reader: a stored user, the same user over several parts and the same user inline are the same arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from lum_ray.artifacts import UserError
from lum_ray.data.history import decode, merge
from lum_ray.data.reader import Timelines, rows_from_tables
from lum_ray.data.rows import Rows, hash_strings

BEHAVIOURS = ("active", "spend", "visits")
ALL = range(64)


def assert_same(ours: Rows, theirs: Rows) -> None:
    for name in ("user", "user_hash", "offsets", "days", "values", "first_day", "end_day", "segment"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, err_msg=name)
    assert list(ours.profile) == list(theirs.profile)
    for name, column in ours.profile.items():
        assert column.dtype == theirs.profile[name].dtype, name
        np.testing.assert_array_equal(column, theirs.profile[name], err_msg=name)


def test_rows_equal_the_plain_tables(stored: str, world: Any) -> None:
    rows = Timelines.open(stored).read(ALL)
    daily: dict[str, dict[int, list[int]]] = {}
    for record in world.daily.to_pylist():
        daily.setdefault(record["user"], {})[record["day"]] = [record[name] for name in BEHAVIOURS]
    profiles = {record["user"]: record for record in world.profiles.to_pylist()}
    assert sorted(rows.user) == sorted(daily)
    assert rows.user_hash.tolist() == hash_strings(rows.user).tolist()
    assert rows.days.dtype == np.int32
    assert rows.values.dtype == np.int64
    assert rows.values.shape == (len(rows.days), 3)
    for i, user in enumerate(rows.user):
        own = slice(rows.offsets[i], rows.offsets[i + 1])
        assert rows.days[own].tolist() == sorted(daily[user])
        assert rows.values[own].tolist() == [daily[user][day] for day in sorted(daily[user])]
        profile = profiles.get(user, dict.fromkeys(world.profiles.column_names))
        born = min(daily[user]) if profile["registered"] is None else profile["registered"]
        assert rows.first_day[i] == max(born, world.start_day)
        assert rows.end_day[i] == (world.end_day if profile["ends"] is None else profile["ends"])
        assert rows.segment[i] == (profile["segment"] or "")
        age = rows.profile["age"][i]
        assert np.isnan(age) if profile["age"] is None else age == profile["age"]
        assert rows.profile["town"][i] == profile["town"]
    assert list(rows.profile) == ["age", "town"]


def test_a_bucket_holds_its_users_sorted_by_hash(stored: str) -> None:
    timelines = Timelines.open(stored)
    for bucket in (0, 7, 63):
        rows = timelines.read([bucket])
        assert np.all(rows.user_hash % 64 == bucket)
        assert np.all(rows.user_hash[1:] > rows.user_hash[:-1])
        assert len(rows) == timelines.bucket_users[bucket]


def test_buckets_come_in_the_order_asked_for(stored: str) -> None:
    timelines = Timelines.open(stored)
    assert_same(timelines.read([9, 2]), Rows.concat([timelines.read([9]), timelines.read([2])]))


def test_parts_equal_their_merger(stored: str, world: Any, write: Callable[..., str], tmp_path: Path) -> None:
    parts = Timelines.open(write(tmp_path / "three", world, splits=(110, 111)))
    whole = Timelines.open(stored)
    assert len(parts.manifest["parts"]) == 3
    assert parts.bucket_users.tolist() == whole.bucket_users.tolist()
    assert_same(parts.read(ALL), whole.read(ALL))


def test_inline_tables_equal_the_artifact(stored: str, world: Any) -> None:
    stored_rows = Timelines.open(stored).read(ALL)
    inline = rows_from_tables(world.daily, world.profiles, BEHAVIOURS, world.start_day, world.end_day)
    known = np.flatnonzero(np.isin(inline.user, stored_rows.user))
    assert len(inline) == len(stored_rows) + 2
    order = np.argsort(stored_rows.user_hash)
    assert_same(inline.take(known), stored_rows.take(order))


def test_a_user_who_is_only_in_profiles_has_an_empty_history(world: Any) -> None:
    profiles = pa.table({"user": ["new", "old"], "registered": pa.array([None, 120], pa.int32()), "vip": [True, None]})
    rows = rows_from_tables(world.daily.slice(0, 0), profiles, BEHAVIOURS, 100, 160)
    assert rows.offsets.tolist() == [0, 0, 0]
    assert rows.values.shape == (0, 3)
    assert dict(zip(rows.user, rows.first_day.tolist(), strict=True)) == {"new": 160, "old": 120}
    assert rows.profile["vip"].dtype == np.float64


def test_inline_tables_without_profiles_or_users() -> None:
    daily = pa.table(
        {"user": pa.array([], pa.string()), "day": pa.array([], pa.int32()), "a": pa.array([], pa.int64())}
    )
    assert len(rows_from_tables(daily, None, ["a"], 0, 9)) == 0
    one = pa.table({"user": ["x"], "day": [3], "a": [True]})
    rows = rows_from_tables(one, None, ["a"], 0, 9)
    assert (rows.values.tolist(), rows.first_day.tolist(), rows.end_day.tolist(), rows.profile) == ([[1]], [3], [9], {})


def test_inline_fractions_are_refused() -> None:
    with pytest.raises(pa.ArrowInvalid, match="truncated"):
        rows_from_tables(pa.table({"user": ["x"], "day": [3], "a": [0.5]}), None, ["a"], 0, 9)


def test_a_day_that_comes_twice_is_refused(world: Any, write: Callable[..., str], tmp_path: Path) -> None:
    twice = world.daily.filter(pc.equal(world.daily["user"], "user-0")).slice(0, 1)
    with pytest.raises(UserError, match=r"daily table: .*users \['user-0'\]"):
        rows_from_tables(pa.concat_tables([world.daily, twice]), None, BEHAVIOURS, 100, 160)
    uri = write(tmp_path / "overlap", world, splits=(120,))
    manifest = json.loads((tmp_path / "overlap" / "manifest.json").read_text())
    manifest["parts"][1] = manifest["parts"][0]
    (tmp_path / "overlap" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"bucket 5: expected each \(user, day\) once .* over all parts"):
        Timelines.open(uri).read([5])


def test_users_of_equal_hash_stay_apart() -> None:
    """A collision of 64-bit hashes: the users are told apart by name, over parts too."""
    table = pa.table(
        {
            "user": ["b", "c", "a", "b"],
            "user_hash": np.array([7, 3, 7, 7], np.uint64),
            "days": pa.array([[1, 2], [5], [1], [3]], pa.list_(pa.int32())),
            "x": [[10, 20], [50], [11], [30]],
        }
    )
    merged = merge(decode(table, ["x"], "here"), "here")
    assert merged.user.to_pylist() == ["c", "a", "b"]
    assert merged.lengths.tolist() == [1, 1, 3]
    assert merged.days.tolist() == [5, 1, 1, 2, 3]
    assert merged.values[:, 0].tolist() == [50, 11, 10, 20, 30]


def test_list_columns_of_a_slice() -> None:
    table = pa.table(
        {
            "user": ["a", "b", "c", "d"],
            "user_hash": np.arange(4, dtype=np.uint64),
            "days": pa.array([[1], [2, 3], None, [4]], pa.list_(pa.int32())),
            "x": [[1], [2, 3], [], [4]],
        }
    ).slice(1, 3)
    history = decode(table, ["x"], "here")
    assert (history.lengths.tolist(), history.days.tolist(), history.values[:, 0].tolist()) == (
        [2, 0, 1],
        [2, 3, 4],
        [2, 3, 4],
    )


def test_values_that_do_not_fit_their_days_are_refused() -> None:
    lists = {"days": pa.array([[1], [2, 3]], pa.list_(pa.int32())), "x": [[1, 2], [3]]}
    table = pa.table({"user": ["a", "b"], "user_hash": np.arange(2, dtype=np.uint64), **lists})
    with pytest.raises(
        UserError, match=r"'x' must have one value per active day; expected \[1, 2\], got \[2, 1\].*'a', 'b'"
    ):
        decode(table, ["x"], "here")


def test_the_bytes_asked_for_are_those_of_the_files(stored: str) -> None:
    timelines = Timelines.open(stored)
    _, first = timelines.read_measured(ALL)
    _, again = timelines.read_measured(ALL)
    size = sum(path.stat().st_size for path in Path(stored).rglob("*.parquet"))
    footers = sum(pq.read_metadata(path).serialized_size for path in Path(stored).rglob("*.parquet"))
    assert first - again == footers
    assert 0.9 * size < first <= size  # the bucket column is not read


def test_days_alone_cost_less_and_are_the_same(stored: str) -> None:
    timelines = Timelines.open(stored)
    whole, size = timelines.read_measured(ALL)
    days, less = timelines.read_measured(ALL, behaviours=())
    assert days.values.shape == (len(whole.days), 0)
    assert less < size / 2
    np.testing.assert_array_equal(days.days, whole.days)
    np.testing.assert_array_equal(days.first_day, whole.first_day)
    some = timelines.read(ALL, behaviours=["visits", "active"])
    np.testing.assert_array_equal(some.values, whole.values[:, [2, 0]])


def test_no_buckets_give_no_rows_with_all_columns(stored: str) -> None:
    timelines = Timelines.open(stored)
    none, some = timelines.read([]), timelines.read(ALL)
    assert len(none) == 0
    assert none.values.shape == (0, 3)
    assert_same(Rows.concat([none, some]), some)


def test_a_bucket_without_profiles_has_their_columns(make: Any, write: Callable[..., str], tmp_path: Path) -> None:
    world = make(users=30)  # many buckets have no profile
    rows = Timelines.open(write(tmp_path / "few", world)).read(ALL)
    assert len(rows) == 30
    assert list(rows.profile) == ["age", "town"]
    bare = Timelines.open(write(tmp_path / "bare", world, with_profiles=False)).read(ALL)
    assert bare.profile == {}
    assert set(bare.segment) == {""}
    assert set(bare.end_day.tolist()) == {160}


@pytest.mark.parametrize("folder", ["part-100-160", "profiles"])
def test_a_missing_file_is_named(folder: str, world: Any, write: Callable[..., str], tmp_path: Path) -> None:
    timelines = Timelines.open(write(tmp_path / "t", world))
    (tmp_path / "t" / folder / "0000.parquet").unlink()
    with pytest.raises(
        UserError, match=rf"{folder}/0000.parquet: the manifest of .* names this file, but it is not there"
    ):
        timelines.read([3])


def test_a_file_that_was_cut_off_is_named(world: Any, write: Callable[..., str], tmp_path: Path) -> None:
    timelines = Timelines.open(write(tmp_path / "t", world))
    path = tmp_path / "t" / "part-100-160" / "0000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"0000.parquet: expected a parquet file with 6\d row groups, but it cannot be read"
    ):
        timelines.read([3])


def test_a_file_with_other_rows_than_its_manifest_is_refused(
    world: Any, write: Callable[..., str], tmp_path: Path
) -> None:
    uri = write(tmp_path / "t", world)
    path = tmp_path / "t" / "part-100-160" / "0000.parquet"
    whole = pq.ParquetFile(path)
    groups = [whole.read_row_group(index) for index in range(whole.num_row_groups)]
    with pq.ParquetWriter(path, groups[0].schema) as writer:
        for table in groups[:-1]:
            writer.write_table(table)
    with pytest.raises(UserError, match=r"has (\d+) row groups, its manifest says (\d+)"):
        Timelines.open(uri).read([3])
    with pq.ParquetWriter(path, groups[0].schema) as writer:
        for table in groups:
            writer.write_table(table.slice(1))
    with pytest.raises(UserError, match=r"row group \d+ has \d+ rows, its manifest says \d+"):
        Timelines.open(uri).read([3])


def test_no_artifact_and_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected an artifact, but it has no manifest.json"):
        Timelines.open(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"kind": "fitted"}')
    with pytest.raises(UserError, match="expected an artifact of kind 'timelines' or 'sequences', got 'fitted'"):
        Timelines.open(str(tmp_path))
