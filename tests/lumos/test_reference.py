"""How far a scenario lies from what training saw, on cases solved by hand."""

from __future__ import annotations

import numpy as np

from lum_ray.lumos.predictor import Nearness
from lum_ray.lumos.reference import reference_rows


def batch(values: list[list[float]]) -> dict[str, np.ndarray]:
    """Windows of one day each; an event row is [rhythm | count]."""
    rows = np.array([[9.0, v] for window in values for v in window], np.float32)
    count, days = len(values), len(values[0])
    return {
        "event_rows_ES": rows,
        "future_event_BCX": np.arange(count * days).reshape(count, 1, days),
        "valid_BC": np.ones((count, 1), bool),
    }


def test_rows_are_distinct_and_distances_leave_the_row_itself_out() -> None:
    found = reference_rows([batch([[0, 0], [0, 1]]), batch([[1, 0], [0, 4]])], 1, 2)
    assert found["event_rows_ES"].ravel().tolist() == [0, 1, 4]
    assert found["distances"].tolist() == [0, 0, 0, 3]


def test_share_of_nearer_cuts() -> None:
    found = reference_rows([batch([[0, 0], [0, 1], [1, 0], [0, 4]])], 1, 2)
    nearness = Nearness(found["event_rows_ES"], found["distances"])
    assert nearness.share(nearness.gaps(np.array([[0.0], [1.0]], np.float32))) == (0.0, False)
    assert nearness.share(nearness.gaps(np.array([[0.0], [2.0]], np.float32))) == (0.75, False)
    assert nearness.share(nearness.gaps(np.array([[0.0], [8.0]], np.float32))) == (1.0, True)


def test_a_run_without_calendar_has_no_distance() -> None:
    rows = {
        "event_rows_ES": np.ones((2, 1), np.float32),
        "future_event_BCX": np.zeros((1, 1, 2), np.int64),
        "valid_BC": np.ones((1, 1), bool),
    }
    found = reference_rows([rows], 1, 2)
    nearness = Nearness(found["event_rows_ES"], found["distances"])
    assert nearness.share(nearness.gaps(np.zeros((2, 0), np.float32))) == (0.0, False)
