"""The snapshot of histories behind user ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lum_ray.artifacts import UserError
from lum_ray.data.rows import Rows, hash_strings
from lum_ray.data.state import State, write_state

K = 2


def rows_of(names: list[str]) -> Rows:
    lengths = np.arange(len(names)) + 1
    total = int(lengths.sum())
    return Rows(
        user=np.array(names, object),
        user_hash=hash_strings(names),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        days=np.concatenate([np.arange(n, dtype=np.int32) + 10 for n in lengths]),
        values=np.arange(total * 2).reshape(total, 2),
        first_day=np.full(len(names), 9, np.int32),
        end_day=np.full(len(names), 40, np.int32),
        segment=np.array(["s"] * len(names), object),
        profile={
            "age": np.where(lengths > 2, lengths * 1.5, np.nan),
            "town": np.array([None, *["x"] * (len(names) - 1)], object),
        },
    )


def publish(uri: str, names: list[str]) -> Rows:
    rows = rows_of(names)
    bucket = (rows.user_hash & np.uint64((1 << K) - 1)).astype(int)
    write_state(uri, ((b, rows.take(np.flatnonzero(bucket == b))) for b in np.unique(bucket).tolist()), K, 40)
    return rows


def test_a_user_comes_back_as_she_was(tmp_path: Path) -> None:
    names = [f"user-{i}" for i in range(20)]
    rows = publish(str(tmp_path), names)
    state = State.open(str(tmp_path))
    assert state.end_day == 40
    assert sorted(state.users()) == sorted(names)
    found = state.rows(["user-7", "nobody", "user-0"])
    assert set(found) == {"user-7", "user-0"}
    for name, got in found.items():
        want = rows.take(np.array([names.index(name)]))
        for field in ("user", "user_hash", "offsets", "days", "values", "first_day", "end_day", "segment"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
        np.testing.assert_array_equal(got.profile["age"], want.profile["age"])
        assert got.profile["town"].tolist() == want.profile["town"].tolist()
    assert len(Rows.concat(list(found.values()))) == 2


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no users to publish"):
        write_state(str(tmp_path / "none"), [], K, 40)
    with pytest.raises(UserError, match="expected an artifact"):
        State.open(str(tmp_path / "other"))
