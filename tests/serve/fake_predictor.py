"""Predictors without a model: they answer from the length of a user's id, and refuse as the real ones do."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lum_ray.artifacts import UserError
from lum_ray.gts import predictor as gts
from lum_ray.lumos.predictor import Answer, Request, WhatIf
from serve.live import Live, Local, Target
from serve.models import gts_model, lumos_model

INFO = {
    "name": "fake", "checkpoint": "fake-000000000000", "step": 7, "model": "lumos", "behaviours": ["active", "sales"],
    "event_types": ["holiday", "mailer"], "history_days": 28, "future_days": 2, "start_day": 0, "end_day": 17000,
    "event_columns": {"amount": "double"},
}  # fmt: skip


GTS_INFO = {
    "name": "fake_gts", "checkpoint": "fake_gts-000000000000", "step": 9, "model": "gts", "items": 9, "start_day": 0,
    "end_day": 17000, "event_columns": ["time", "item"], "llm": "none", "scores": True, "generates": True,
}  # fmt: skip


def local(fake: FakePredictor | FakeGts, end_day: int | None = None) -> Local:
    """The fake as a model in this process."""
    return Local(live(fake, end_day))


def live(fake: FakePredictor | FakeGts, end_day: int | None = None) -> Live:
    def find(prefix: str, limit: int) -> tuple[list[str], bool]:
        found = [user for user in ("u1", "u12", "u2") if user.startswith(prefix)]
        return found[:limit], len(found) <= limit

    made = gts_model(fake, find) if isinstance(fake, FakeGts) else lumos_model(fake, end_day, find)
    return Live(lambda target: made, Target("fake"))


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

    def _answer(self, request: Request, plus: float = 0.0, attention: bool = False) -> Answer:
        days = [
            {"day": day, "behaviours": {"active": {"p": self._value}, "sales": {"mean": len(request.user) + plus}}}
            for day in ("2017-11-01", "2017-11-02")
        ]
        weights = [[0.25, 0.75], [0.5, 0.5]] if attention else None
        return Answer(request.user, str(request.cut_day), days, {"active_any_7": {"p": self._value}}, weights)

    def predict(self, requests: Sequence[Request], attention: bool = False) -> list[Answer]:
        self._check(requests)
        return [self._answer(request, len(request.calendar or ()), attention) for request in requests]

    def history(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        self._check(requests)
        event = {"event_type": "mailer", "count": 1, "value": 1.0}
        past = {"day": "2017-10-31", "existed": True, "behaviours": {"active": 1.0}, "events": [event]}
        coming = {"day": "2017-11-01", "events": []}
        return [{"user": one.user, "cut_day": "2017-11-01", "past": [past], "coming": [coming]} for one in requests]

    def what_if(
        self, requests: Sequence[Request], scenarios: Sequence[Sequence[Mapping[str, Any]]], attention: bool = False
    ) -> list[WhatIf]:
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


class FakeGts:
    """`calls` are the users of each call and what was asked of them."""

    def __init__(self) -> None:
        self.info: Mapping[str, Any] = GTS_INFO
        self.dated = True
        self.calls: list[tuple[list[str], Any]] = []

    def _facts(self, request: gts.Request) -> tuple[str, str, bool, int, int]:
        return request.user, "2016-07-18", request.user.startswith("u"), len(request.events or ()), 0

    def recommend(
        self, requests: Sequence[gts.Request], k: int, seen_filter: bool, rerank: bool, method: str
    ) -> list[gts.Answer]:
        self.calls.append(([request.user for request in requests], (k, seen_filter, rerank, method)))
        items = [gts.Recommended(f"i{place}", f"item {place}", 1 / (1 + place)) for place in range(k)]
        return [gts.Answer(*self._facts(request), items) for request in requests]

    def score(self, requests: Sequence[gts.Request], items: Sequence[str]) -> list[gts.Propensities]:
        if "nothing" in items:
            raise UserError("items: 1 are not in the catalogue of this model: nothing")
        self.calls.append(([request.user for request in requests], list(items)))
        asked = [gts.Asked(item, item, 0.0, 0.5, 1 / len(items)) for item in items]
        return [gts.Propensities(*self._facts(request), asked) for request in requests]

    def embed(self, requests: Sequence[gts.Request]) -> np.ndarray:
        return np.array([[len(request.user), 2.5] for request in requests], np.float32)
