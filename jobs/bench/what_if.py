"""What-if over kept histories against a full pass for each scenario: 16 users, 8 scenarios, 360 days, width 512.

    python -m jobs.bench.what_if [--quick] [--repeats 5]

Row: what_if/full_pass/users_per_s, ours being `Predictor.what_if` where the users' histories were encoded before, the
peer `Predictor.predict` with each scenario as the users' calendar, and once with their own. Exit code 1 if any figure
of the two differs by more than 1e-5 (relative above 1).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from jobs.bench.lumos_batch import INPUTS
from jobs.bench.rows import emit, hardware, note, spread
from jobs.bench.train_step import interleaved
from lum_ray import presets
from lum_ray.data.rows import Rows, hash_strings
from lum_ray.lumos.config import LumosConfig
from lum_ray.lumos.predictor import Answer, Nearness, Predictor, Request, RequestReader
from lum_ray.lumos.stage import LumosStage

TOLERANCE = 1e-5
END_DAY = 20_000
QUICK = LumosConfig(width=64, heads=4, encoder_layers=2, history_days=60, swiglu_width=64)


def history(user: str, days: int) -> Rows:
    """One user who did something on every twelfth day or so."""
    rng = np.random.default_rng(int(hash_strings([user])[0] % 2**32))
    active = np.flatnonzero(rng.random(days) < 0.08).astype(np.int32) + END_DAY - days
    values = rng.integers(1, 5_000, (len(active), len(INPUTS.behaviours)))
    values[:, [item.kind == "binary" for item in INPUTS.behaviours]] = 1
    profile = {"age": np.array([35.0]), "income": np.array([50.0]), "country": np.array(["in"], object)}
    return Rows(
        user=np.array([user], object),
        user_hash=hash_strings([user]),
        offsets=np.array([0, len(active)], np.int64),
        days=active,
        values=values.astype(np.int64),
        first_day=np.array([END_DAY - days], np.int32),
        end_day=np.array([END_DAY], np.int32),
        segment=np.array([""], object),
        profile=profile,
    )


def predictor(config: LumosConfig) -> Predictor:
    """Random weights over stored histories; what-if keeps what it encodes."""
    torch.manual_seed(0)
    stage = LumosStage(config, INPUTS, None, 2**31 - 1, 0)
    stored = {f"u{i}": history(f"u{i}", config.history_days) for i in range(16)}
    reader = RequestReader(
        presets.lumos_tiny(), stage.calendar.layout, {}, END_DAY - config.history_days, END_DAY,
        lambda users: {user: stored[user] for user in users},
    )  # fmt: skip
    rows = np.random.default_rng(0).normal(size=(365, 2 * len(INPUTS.event_types))).astype(np.float32)
    nearness = Nearness(rows, np.linspace(0, 1, 365, dtype=np.float32))
    return Predictor(stage, reader, {}, nearness, torch.device("cpu"), cache_bytes=1 << 30)


def full_passes(
    model: Predictor, users: Sequence[str], scenarios: Sequence[Sequence[Mapping[str, Any]]]
) -> list[list[Answer]]:
    """The answers of the baseline and of each scenario, the history encoded for each."""
    calendars = [None, *scenarios]
    return [model.predict([Request(user, calendar=calendar) for user in users]) for calendar in calendars]


def difference(one: Any, other: Any) -> float:
    """The largest difference between two answers, relative where a figure is above 1."""
    if isinstance(one, Mapping):
        return max((difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list):
        return max((difference(*pair) for pair in zip(one, other, strict=True)), default=0.0)
    return abs(one - other) / max(1.0, abs(other)) if isinstance(one, float) else float(one != other)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, one repeat: does it run at all")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args(arguments)
    config, repeats = (QUICK, 1) if chosen.quick else (LumosConfig(), chosen.repeats)
    model = predictor(config)
    users = [f"u{i}" for i in range(16)]
    scenarios = [
        [{"event_type": f"event_{(k + j) % 10}", "start_day": END_DAY + j} for j in range(7)] for k in range(8)
    ]
    asked = [Request(user) for user in users]
    begin = time.perf_counter()
    model.what_if(asked, scenarios)
    first_s = time.perf_counter() - begin

    found = model.what_if(asked, scenarios)
    answers = [
        [one.baseline for one in found],
        *([one.scenarios[k]["answer"] for one in found] for k in range(len(scenarios))),
    ]
    expected = full_passes(model, users, scenarios)
    worst = max(
        difference(one.as_dict(), other.as_dict())
        for ours, theirs in zip(answers, expected, strict=True) for one, other in zip(ours, theirs, strict=True)
    )  # fmt: skip
    note(f"largest difference: {worst:.2e}; {first_s:.2f} s where nothing is kept yet")
    ours_s, theirs_s = interleaved(
        [lambda: model.what_if(asked, scenarios) and None, lambda: full_passes(model, users, scenarios) and None],
        repeats,
    )
    rates = [len(users) / seconds for seconds in ours_s]
    median, low, high = spread(rates)
    peer = spread([len(users) / seconds for seconds in theirs_s])[0]
    emit(
        "what_if/full_pass/users_per_s", median, "users/s", low=low, high=high, ratio=median / peer,
        peer="predict with each scenario as the calendar", machine=hardware(), packages=("torch", "numpy"),
        run={"users": len(users), "scenarios": len(scenarios), "history_days": config.history_days,
             "width": config.width, "repeats": repeats, "largest_difference": worst,
             "first_users_per_s": len(users) / first_s, "peer_users_per_s": peer,
             "kept_bytes": model.memories.bytes},
    )  # fmt: skip
    if worst > TOLERANCE:
        note(f"expected differences up to {TOLERANCE:g}, got {worst:.2e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
