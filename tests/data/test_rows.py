"""Rows: CSR arithmetic against plain lists, and hashes that every machine agrees on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lum_ray.data.rows import Rows, distinct_keys, expand, hash_strings, mix, number_keys, share

histories = st.lists(st.lists(st.integers(-50, 50), unique=True, max_size=12).map(sorted), min_size=1, max_size=6)


def rows_of(days: list[list[int]], width: int = 2) -> Rows:
    flat = np.array([day for user in days for day in user], np.int32)
    count = len(days)
    return Rows(
        user=np.array([f"u{i}" for i in range(count)], object),
        user_hash=np.arange(count, dtype=np.uint64) + np.uint64(2**63),
        offsets=np.cumsum([0, *map(len, days)]).astype(np.int64),
        days=flat,
        values=np.arange(len(flat) * width).reshape(len(flat), width).astype(np.int64),
        first_day=np.full(count, -50, np.int32),
        end_day=np.full(count, 51, np.int32),
        segment=np.full(count, "", object),
        profile={"age": np.arange(count) * 1.5, "town": np.array([None] * count, object)},
    )


def plain(rows: Rows) -> list[tuple[object, ...]]:
    """Each user as (name, hash, [(day, values)], bounds, segment, profile)."""
    return [
        (
            rows.user[i],
            int(rows.user_hash[i]),
            [(int(rows.days[a]), rows.values[a].tolist()) for a in range(rows.offsets[i], rows.offsets[i + 1])],
            (int(rows.first_day[i]), int(rows.end_day[i])),
            rows.segment[i],
            {name: column[i] for name, column in rows.profile.items()},
        )
        for i in range(len(rows))
    ]


@given(histories, st.data())
def test_take_gives_the_users_at_the_index_in_that_order(days: list[list[int]], data: st.DataObject) -> None:
    rows = rows_of(days)
    index = data.draw(st.lists(st.integers(0, len(days) - 1), max_size=8))
    assert plain(rows.take(np.array(index, np.int64))) == [plain(rows)[i] for i in index]


@given(histories, st.data())
def test_slice_gives_what_take_does(days: list[list[int]], data: st.DataObject) -> None:
    rows = rows_of(days)
    begin, end = sorted(data.draw(st.integers(0, len(days))) for _ in range(2))
    assert plain(rows.slice(begin, end)) == plain(rows.take(np.arange(begin, end)))


@given(histories, st.data())
def test_concat_undoes_a_split(days: list[list[int]], data: st.DataObject) -> None:
    rows = rows_of(days)
    place = data.draw(st.integers(0, len(days)))
    halves = [rows.take(np.arange(place)), rows.take(np.arange(place, len(days)))]
    joined = Rows.concat(halves)
    assert plain(joined) == plain(rows)
    assert joined.offsets.dtype == np.int64
    assert joined.days.dtype == np.int32
    assert joined.values.shape == rows.values.shape


@given(histories, st.data())
def test_span_finds_the_days_inside_bounds(days: list[list[int]], data: st.DataObject) -> None:
    rows = rows_of(days)
    asked = data.draw(
        st.lists(
            st.tuples(st.integers(0, len(days) - 1), st.integers(-60, 60), st.integers(-60, 60)), min_size=1, max_size=8
        )
    )
    row, start, stop = (np.array(column) for column in zip(*asked, strict=True))
    begin, end = rows.span(row, start, stop)
    for i, (user, first, last) in enumerate(asked):
        assert rows.days[begin[i] : end[i]].tolist() == [day for day in days[user] if first <= day < last]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=8))
def test_expand_lists_ranges(ranges: list[tuple[int, int]]) -> None:
    begin = np.array([b for b, _ in ranges], np.int64)
    end = np.array([e for _, e in ranges], np.int64)
    which, index = expand(begin, end)
    expected = [(i, at) for i, (b, e) in enumerate(ranges) for at in range(b, e)]
    assert list(zip(which.tolist(), index.tolist(), strict=True)) == expected


texts = st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=30), min_size=1, max_size=12)


@given(texts)
def test_a_hash_does_not_depend_on_its_neighbours(names: list[str]) -> None:
    together = hash_strings(names)
    assert together.dtype == np.uint64
    assert together.tolist() == [int(hash_strings([name])[0]) for name in names]
    assert together[::-1].tolist() == hash_strings(np.array(names[::-1], object)).tolist()


@given(texts, st.integers(0, 5))
def test_a_slice_of_an_arrow_array_is_hashed_as_its_texts(names: list[str], begin: int) -> None:
    assert hash_strings(pa.array(names)[begin:]).tolist() == hash_strings(names[begin:]).tolist()


@given(st.lists(st.integers(0, 5000), max_size=40), st.sampled_from([5001, 10**7, 2**45]))
def test_keys_are_numbered_as_numpy_does_in_small_and_large_spaces(keys: list[int], space: int) -> None:
    given_keys = np.array(keys, np.int64)
    distinct, place = np.unique(given_keys, return_inverse=True)
    assert distinct_keys(given_keys, space).tolist() == distinct.tolist()
    assert [found.tolist() for found in number_keys(given_keys, space)] == [distinct.tolist(), place.tolist()]
    dense = np.tile(given_keys, 200)
    assert number_keys(dense, space)[1].tolist() == np.tile(place, 200).tolist()


@given(texts)
def test_different_texts_have_different_hashes(names: list[str]) -> None:
    distinct = sorted(set(names))
    assert len(set(hash_strings(distinct).tolist())) == len(distinct)


def test_trailing_nul_and_empty_texts_are_told_apart() -> None:
    names = ["", "\0", "a", "a\0", "a\0\0", "abcdefgh", "abcdefgh\0", "aaaaaaaaa", "ä", "a" * 64]
    assert len(set(hash_strings(names).tolist())) == len(names)
    assert hash_strings([]).shape == (0,)


def test_hashes_stay_what_stored_artifacts_have() -> None:
    """Buckets, splits and draws of every stored artifact hang on these values."""
    assert hash_strings(["user-1", "a longer user name"]).tolist() == HASHES
    assert int(mix(1, 2, 3)) == MIXED


def test_mix_broadcasts_and_depends_on_every_part_and_their_order() -> None:
    grid = mix(7, np.arange(100)[:, None], np.arange(100))
    assert grid.shape == (100, 100)
    assert len(np.unique(grid)) == 10_000
    assert int(mix(1, 2)) != int(mix(2, 1))
    assert int(grid[3, 5]) == int(mix(7, 3, 5)) == int(mix(np.int32(7), np.uint64(3), np.int64(5)))
    assert int(mix(-1)) == int(mix(np.uint64(2**64 - 1)))


def test_share_is_uniform_in_the_unit_interval() -> None:
    shares = share(mix(1, np.arange(20_000)))
    assert shares.min() >= 0
    assert shares.max() < 1
    assert np.histogram(shares, 10, (0, 1))[0] == pytest.approx(2000, abs=200)
    assert share(np.array([2**64 - 1], np.uint64))[0] < 1


HASHES = [11621702929070382883, 3226094737821744540]
MIXED = 15020427595393229491
