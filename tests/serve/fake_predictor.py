"""A predictor without a model: it answers from the length of a user's id, and refuses as the real one does."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lum_ray.artifacts import UserError
from lum_ray.lumos.predictor import Answer, Request, WhatIf

INFO = {
    "name": "fake", "checkpoint": "fake-000000000000", "step": 7, "model": "lumos", "behaviours": ["active", "sales"],
    "event_types": ["holiday", "mailer"], "history_days": 28, "future_days": 2, "start_day": 0, "end_day": 17000,
    "event_columns": {"amount": "double"},
}  # fmt: skip


class FakePredictor:
    """Knows the users whose id begins with "u". `calls` are the users of each call, in order."""

    def __init__(self, work_s: float = 0.0, error: Exception | None = None, value: float = 0.5) -> None:
        self.info: Mapping[str, Any] = INFO
        self.dated = True
        self.calls: list[list[str]] = []
        self.requests: list[Request] = []
        self.threads: set[int] = set()
        self._work_s, self._error, self._value = work_s, error, value

    def _check(self, requests: Sequence[Request]) -> None:
        self.threads.add(threading.get_ident())
        if self._error is not None:
            raise self._error
        for i, request in enumerate(requests):
            if not request.user.startswith("u") and request.events is None:
                raise UserError(f"users[{i}].user: {request.user!r} is not known; send her events")
            for j, event in enumerate(request.events or []):
                if "amount" not in event:
                    raise UserError(f"users[{i}].events[{j}].amount: missing; every event holds amount")
        if any(request.calendar != requests[0].calendar for request in requests):
            raise UserError("users: expected the same calendar in all users of one call")
        time.sleep(self._work_s)
        self.calls.append([request.user for request in requests])
        self.requests += requests

    def _answer(self, request: Request, plus: float = 0.0) -> Answer:
        days = [
            {"day": day, "behaviours": {"active": {"p": self._value}, "sales": {"mean": len(request.user) + plus}}}
            for day in ("2017-11-01", "2017-11-02")
        ]
        return Answer(request.user, str(request.cut_day), days, {"active_any_7": {"p": self._value}})

    def predict(self, requests: Sequence[Request]) -> list[Answer]:
        self._check(requests)
        return [self._answer(request, len(request.calendar or ())) for request in requests]

    def what_if(self, requests: Sequence[Request], scenarios: Sequence[Sequence[Mapping[str, Any]]]) -> list[WhatIf]:
        for i, rows in enumerate(scenarios):
            for j, row in enumerate(rows):
                if row["event_type"] not in self.info["event_types"]:
                    raise UserError(
                        f"scenarios[{i}][{j}].event_type: expected one of holiday, mailer, got {row['event_type']!r}"
                    )
        self._check(requests)
        results = []
        for request in requests:
            base = self._answer(request)
            parts = [
                {
                    "answer": self._answer(request, len(rows)),
                    "difference": {
                        "days": [{"day": day["day"], "behaviours": {"sales": float(len(rows))}} for day in base.days],
                        "horizons": {"active_any_7": 0.0},
                    },
                    "nearer_share": 0.25,
                    "out_of_range": False,
                }
                for rows in scenarios
            ]
            results.append(WhatIf(base, parts))
        return results

    def embed(self, requests: Sequence[Request]) -> np.ndarray:
        self._check(requests)
        return np.array([[len(request.user), 1.5] for request in requests], np.float32)
