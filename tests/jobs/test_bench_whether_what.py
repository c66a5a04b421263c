"""The benchmark of both models together: its deviance and its habits, on numbers that can be done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.bench import whether_what
from jobs.bench.whether_what import DAYS, Asked, deviance, habits
from lum_ray.data.rows import Rows, hash_strings

ITEMS = 4


@pytest.fixture
def rows() -> Rows:
    """Two households, items 0 to 3 (9: unknown), days around a cut at day 100."""
    days = [[60, 90, 90, 100, 101, 101, 101, 108], [95, 106]]
    items = [[0, 1, 1, 1, 2, 2, 9, 3], [3, 0]]
    names = np.array(["a", "b"], np.object_)
    flat = np.concatenate([np.array(of) for of in items]).astype(np.int64)
    return Rows(
        user=names,
        user_hash=hash_strings(names.tolist()),
        offsets=np.array([0, 8, 10], np.int64),
        days=np.concatenate([np.array(of) for of in days]).astype(np.int32),
        values=np.stack([flat, flat * 0, flat * 0], axis=1),
        first_day=np.array([60, 95], np.int32),
        end_day=np.full(2, 200, np.int32),
        segment=np.full(2, "", np.object_),
        profile={},
    )


def asked_of(rows: Rows) -> tuple[Asked, np.ndarray]:
    item_A = np.where(rows.values[:, 0] < ITEMS, rows.values[:, 0], -1)
    return Asked.of(rows, [100], item_A, ITEMS), item_A


def test_lines_of_the_days_after_the_cut_are_counted_and_no_others(rows: Rows) -> None:
    asked, _ = asked_of(rows)
    found = list(zip(asked.pair_K.tolist(), asked.day_K.tolist(), asked.item_K.tolist(), asked.lines_K.tolist()))
    assert found == [(0, 0, 1, 1.0), (0, 1, 2, 2.0), (1, 6, 0, 1.0)]  # day 108 is behind the seven, item 9 unknown
    assert asked.lines_SD.tolist() == [[1, 2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]]
    early = Asked.of(rows, [80], np.zeros(10, np.int64), ITEMS)
    assert early.samples.row.tolist() == [0]  # the other one is not there yet


def test_the_short_form_is_the_deviance_over_all_items(rows: Rows) -> None:
    asked, _ = asked_of(rows)
    rng = np.random.default_rng(0)
    rate_SD, share_SN = rng.uniform(0.5, 3, (2, DAYS)), rng.dirichlet(np.ones(ITEMS), 2)
    y = np.zeros((2, DAYS, ITEMS))
    y[asked.pair_K, asked.day_K, asked.item_K] = asked.lines_K
    mu = rate_SD[:, :, None] * share_SN[:, None]
    logs = np.where(y > 0, y * np.log(np.where(y > 0, y, 1) / mu), 0.0)
    whole = 2 * (logs - (y - mu)).sum(axis=(1, 2))
    short = deviance(asked, rate_SD, np.log(share_SN[asked.pair_K, asked.item_K]))
    np.testing.assert_allclose(short, whole)


def test_habits_see_nothing_from_the_cut_on(rows: Rows) -> None:
    asked, item_A = asked_of(rows)
    days, lines, own_K, average_K = habits(asked, item_A, np.array([0.4, 0.3, 0.2, 0.1]))
    assert days.tolist() == [40, 5] and lines.tolist() == [3, 1]
    assert own_K.tolist() == [2, 0, 0]  # item 1 twice on day 90; item 2 comes from the cut on only
    assert average_K.tolist() == [0.3, 0.2, 0.4]


def test_what_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        whether_what.main(["--users", "0"])
    assert "--users, --steps: expected at least 1" in capsys.readouterr().err
