"""A small world with a known law: users with their own rates, a weekly rhythm, spend given active."""

from __future__ import annotations

import functools

import numpy as np

from lum_ray.data.rows import Rows, Samples
from lum_ray.data.windows import DerivedTarget, HorizonTarget, targets
from lum_ray.evaluation.baselines import Cuts, Setting
from lum_ray.evaluation.predictions import Task

END_DAY = 220
SETTING = Setting(
    names=("active", "coupon", "spend"),
    kinds=("binary", "binary", "continuous"),
    gates=(None, None, "active"),
    resolutions=(1.0, 1.0, 0.01),
    future_days=7,
    derived=(DerivedTarget("churned", "churned", 0, 14),),
    horizons=(HorizonTarget("active_any_7", "any", 0, 7), HorizonTarget("spend_sum_7", "sum", 2, 7)),
)
TASKS = {
    "active": Task("binary"),
    "coupon": Task("binary"),
    "spend": Task("continuous", gate="active"),
    "churned": Task("binary"),
    "active_any_7": Task("binary", horizon=True),
    "spend_sum_7": Task("continuous", horizon=True),
}


def rows_from_dense(dense: np.ndarray, first_day: np.ndarray, end_day: int) -> Rows:
    """Rows from (N, T, U) stored values; days with any value are active days."""
    user, day = np.nonzero(dense.any(axis=2))
    size = len(dense)
    return Rows(
        user=np.array([f"u{i:04d}" for i in range(size)], dtype=object),
        user_hash=np.arange(size, dtype=np.uint64),
        offsets=np.concatenate([[0], np.cumsum(np.bincount(user, minlength=size))]).astype(np.int64),
        days=day.astype(np.int32),
        values=dense[user, day].astype(np.int64),
        first_day=first_day.astype(np.int32),
        end_day=np.full(size, end_day, np.int32),
        segment=np.array([""] * size, dtype=object),
        profile={},
    )


def world(users: int = 300, seed: int = 0) -> Rows:
    """Active by a user's rate and a weekday factor; coupon on a third of the active days; log-normal spend in cents."""
    random = np.random.default_rng(seed)
    rate = random.beta(1.2, 4.0, size=(users, 1))
    weekday = np.array([0.6, 0.8, 1.0, 1.0, 1.2, 1.6, 1.4])[np.arange(END_DAY) % 7]
    first_day = random.integers(0, 60, users)
    active = (random.random((users, END_DAY)) < np.clip(rate * weekday, 0, 0.95)) & (
        np.arange(END_DAY) >= first_day[:, None]
    )
    coupon = active & (random.random((users, END_DAY)) < 0.35)
    spend = np.exp(random.normal(3.0, 0.7, (users, END_DAY)) + random.normal(0, 0.5, (users, 1))) * 100
    dense = np.stack([active, coupon, np.where(active, np.round(spend), 0)], axis=2)
    return rows_from_dense(dense, first_day, END_DAY)


def cuts(rows: Rows, days: list[int], until_day: int = END_DAY, setting: Setting = SETTING) -> Cuts:
    """All users at each of the cut days, with their targets."""
    row = np.repeat(np.arange(len(rows)), len(days)).astype(np.int64)
    samples = Samples(row, np.tile(np.array(days, np.int32), len(rows)), np.zeros(len(row), np.int32))
    daily, over = targets(rows, samples, setting.future_days, until_day, setting.derived, setting.horizons)
    return Cuts(rows, samples, daily, over)


@functools.cache
def splits() -> tuple[Cuts, Cuts]:
    """Training cuts whose labels end before day 190, test cuts from there on."""
    rows = world()
    return cuts(rows, [120, 134, 148, 162, 170], until_day=190), cuts(rows, [190, 197, 204])
