from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from lum_ray.artifacts import UserError
from lum_ray.data.adapters import oracle as subject
from lum_ray.data.adapters import simulator
from lum_ray.data.adapters.worlds import START_DAY, Options, world_of

LOCAL = fs.LocalFileSystem()
Array = npt.NDArray[np.float64]


def auc(score: Array, outcome: Array) -> float:
    """Area under the ROC curve; ties count one half."""
    positive, negative = np.sort(score[outcome == 1]), np.sort(score[outcome == 0])
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.sum() / 2 / len(positive) / len(negative))


@pytest.fixture(scope="module")
def signal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("signal")
    simulator.write(
        str(dest), LOCAL, None, {"users": 3000, "shards": 2, "days": 500, "seed": 11, "treatment_odds": 1.5}
    )
    return dest


# The second cut lies just before the festival of the first year, the last in the treatment window.
CUTS = [START_DAY + day for day in (180, 320, 410, 485)]


@pytest.fixture(scope="module")
def forecast(signal: Path) -> subject.Forecast:
    return subject.oracle(str(signal), LOCAL, CUTS, 7)


def assert_calibrated(p: Array, y: Array) -> None:
    """In tenths of p, the mean p lies within 4 standard errors of the frequency (one row per user)."""
    edges = np.quantile(p, np.linspace(0, 1, 11)[1:-1])
    place = np.searchsorted(edges, p)
    for index in range(10):
        mine = place == index
        error = np.sqrt((p[mine] * (1 - p[mine])).sum()) / mine.sum()
        assert abs(p[mine].mean() - y[mine].mean()) < 4 * error, (index, p[mine].mean(), y[mine].mean(), error)


@pytest.mark.parametrize("cut", range(len(CUTS)))
def test_calibrated_by_cut(forecast: subject.Forecast, cut: int) -> None:
    known = ~np.isnan(forecast.p_any[:, cut])
    assert known.sum() > 1500
    for ahead in (0, 6):
        for p_NCJ, y_NCJ in (
            (forecast.p_active, forecast.y_active),
            (forecast.p_purchase, forecast.y_purchase),
        ):
            assert_calibrated(p_NCJ[known, cut, ahead], y_NCJ[known, cut, ahead])
    assert_calibrated(forecast.p_any[known, cut], forecast.y_any[known, cut])
    gap_N = (forecast.y_amount - forecast.amount)[known, cut].sum(1)
    assert abs(gap_N.mean()) < 4 * gap_N.std() / np.sqrt(len(gap_N))


def test_better_than_the_frequency_of_the_past(signal: Path, forecast: subject.Forecast) -> None:
    events = pq.read_table(signal / "events")
    row_M = np.array([int(user[1:]) for user in events["user"].to_pylist()])
    day_M = events["time"].cast(pa.int64()).to_numpy() // 86_400_000_000
    for c, cut in enumerate(CUTS[1:3], 1):
        recent = np.unique(np.stack([row_M, day_M])[:, (day_M < cut) & (day_M >= cut - 84)], axis=1)
        share_N = np.bincount(recent[0], minlength=3000) / 84
        known = ~np.isnan(forecast.p_any[:, c])
        y_N = forecast.y_active[known, c, 0]
        assert auc(forecast.p_active[known, c, 0], y_N) > auc(share_N[known], y_N) + 0.02


def test_filter_equals_the_sum_over_all_hidden_paths(signal: Path) -> None:
    """Brute force on a short history: every archetype and every path of alive and dormant days."""
    world = world_of(Options.of({"users": 3000, "shards": 2, "days": 500, "seed": 11, "treatment_odds": 1.5}))
    history = [True, False, False, False, True, False]
    registered, ahead = 1, 3
    cut = START_DAY + registered + len(history)
    active_ND = np.zeros((1, 500), np.bool_)
    active_ND[0, registered : registered + len(history)] = history
    prior_NA = world.prior[None]
    none = np.zeros(1, np.int64)
    belief = subject._filter(world, active_ND, np.array([registered]), none, prior_NA, [cut])
    p_NCJ, any_NC = subject._ahead(world, belief, none, [cut], ahead)
    p_AD = world.active()
    evidence, joint_J, quiet = 0.0, np.zeros(ahead), 0.0
    for a, prior in enumerate(world.prior):
        move = {(True, True): 1 - world.die[a], (True, False): world.die[a]}
        move |= {(False, True): world.revive[a], (False, False): 1 - world.revive[a]}
        for tail in itertools.product([True, False], repeat=len(history) + 6):
            path = [True, *tail]
            weight = prior * np.prod([move[pair] for pair in itertools.pairwise(path)])
            p = [p_AD[a, registered + k] * alive for k, alive in enumerate(path)]
            weight *= np.prod([p[k] if seen else 1 - p[k] for k, seen in enumerate(history)])
            evidence += weight
            joint_J += weight * np.array(p[len(history) : len(history) + ahead])
            quiet += weight * np.prod([1 - item for item in p[len(history) :]])
    np.testing.assert_allclose(p_NCJ[0, 0], joint_J / evidence, rtol=1e-9)
    assert any_NC[0, 0] == pytest.approx(1 - quiet / evidence, rel=1e-9)


def test_prediction_rows(signal: Path) -> None:
    cut = START_DAY + 497
    users = ["u000000001", "u000002000"]
    result = subject.oracle(str(signal), LOCAL, [cut], 7, users)
    assert result.user == users
    rows = result.as_predictions().to_pylist()
    # The world ends 3 days after the cut: forecasts for these days, none for any of 7.
    assert {row["behaviour"] for row in rows} == {"active", "purchase", "amount"}
    assert [row["day"] for row in rows if row["behaviour"] == "active" and row["user"] == users[0]] == [
        cut,
        cut + 1,
        cut + 2,
    ]
    assert all(0 <= row["p"] <= 1 for row in rows)


def test_null_world_is_constant(tmp_path: Path) -> None:
    simulator.write(
        str(tmp_path), LOCAL, None, {"users": 200, "shards": 1, "days": 200, "world": "null", "activity": 0.1}
    )
    result = subject.oracle(str(tmp_path), LOCAL, [START_DAY + 100, START_DAY + 150], 7)
    known = ~np.isnan(result.p_active)
    np.testing.assert_allclose(result.p_active[known], 0.1, rtol=1e-9)
    np.testing.assert_allclose(result.p_any[~np.isnan(result.p_any)], 1 - 0.9**7, rtol=1e-9)


def test_errors_say_what_to_do(signal: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found nothing"):
        subject.oracle(str(tmp_path), LOCAL, CUTS, 7)
    with pytest.raises(UserError, match=r"expected cuts in"):
        subject.oracle(str(signal), LOCAL, [5], 7)
    with pytest.raises(UserError, match=r"future_days in 1 .. 30, got 31"):
        subject.oracle(str(signal), LOCAL, CUTS, 31)
    with pytest.raises(UserError, match=r"none of the 1 users"):
        subject.oracle(str(signal), LOCAL, CUTS, 7, ["nobody"])
