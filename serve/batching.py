"""A predictor behind calls that arrive concurrently: their users are merged into one batch, and each call gets the
reply that it would have got alone. Knows nothing of HTTP beyond a status, and nothing of Ray.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from lum_ray.artifacts import UserError
from lum_ray.lumos.predictor import Answer, Request, WhatIf
from serve.types import DAY_ZERO, Reply, Rows, Users, encode, error_reply, field_of

T = TypeVar("T")


class LumosPredictor(Protocol):
    """What is asked of `lum_ray.lumos.predictor.Predictor`."""

    info: Mapping[str, Any]
    dated: bool

    def predict(self, requests: Sequence[Request]) -> list[Answer]: ...

    def what_if(self, requests: Sequence[Request], scenarios: Sequence[Rows]) -> list[WhatIf]: ...

    def embed(self, requests: Sequence[Request]) -> npt.NDArray[np.float32]: ...


class LumosModel:
    """Replies to calls of plain users (the fields of `Request`). All work runs in one thread, so that the event loop
    stays free for health checks and the processor is not shared by two batches.

    `end_day`: the cut of users that name none, where the stored histories go further than the checkpoint's training.
    """

    def __init__(self, predictor: LumosPredictor, end_day: int | None = None) -> None:
        self._predictor = predictor
        self._end_day = int(predictor.info["end_day"]) if end_day is None else end_day
        self._stamp = {name: predictor.info[name] for name in ("name", "checkpoint", "step")}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")

    def info(self) -> dict[str, Any]:
        """The fields of `serve.types.ModelInfo`."""
        date = DAY_ZERO + datetime.timedelta(days=self._end_day)
        return {**self._predictor.info, "end_day": date.isoformat() if self._predictor.dated else self._end_day}

    async def predict(self, calls: Sequence[Users]) -> list[Reply]:
        """One reply a call, in order."""
        return await self._in_thread(lambda: self._batched(calls, self._predict, "answers"))

    async def embed(self, calls: Sequence[Users]) -> list[Reply]:
        """One reply a call, in order."""
        return await self._in_thread(lambda: self._batched(calls, self._embed, "embeddings"))

    async def what_if(self, users: Users, scenarios: Sequence[Rows]) -> Reply:
        """The reply to one call: calls with different scenarios have no work in common."""

        def run(requests: Sequence[Request]) -> list[Any]:
            return _by_calendar(
                requests, lambda part: [_plain(one) for one in self._predictor.what_if(part, scenarios)]
            )

        return (await self._in_thread(lambda: self._batched([users], run, "answers")))[0]

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _predict(self, requests: Sequence[Request]) -> list[Any]:
        return _by_calendar(requests, lambda part: [answer.as_dict() for answer in self._predictor.predict(part)])

    def _embed(self, requests: Sequence[Request]) -> list[Any]:
        return [[float(value) for value in row] for row in self._predictor.embed(requests)]

    def _batched(self, calls: Sequence[Users], run: Callable[[Sequence[Request]], list[Any]], name: str) -> list[Reply]:
        outcomes = merged([[self._request(user) for user in call] for call in calls], run)
        return [
            _refusal(found) if isinstance(found, UserError) else Reply(200, encode({"model": self._stamp, name: found}))
            for found in outcomes
        ]

    def _request(self, user: Mapping[str, Any]) -> Request:
        cut = user.get("cut_day")
        return Request(**{**user, "cut_day": self._end_day if cut is None else cut})


class Local:
    """A model in this process, one call at a time: what `serve.ingress.create_app` asks of a backend, without Ray."""

    def __init__(self, model: LumosModel) -> None:
        self._model = model

    async def info(self) -> Mapping[str, Any]:
        return self._model.info()

    async def predict(self, users: Users) -> Reply:
        return (await self._model.predict([users]))[0]

    async def what_if(self, users: Users, scenarios: Sequence[Rows]) -> Reply:
        return await self._model.what_if(users, scenarios)

    async def embed(self, users: Users) -> Reply:
        return (await self._model.embed([users]))[0]


def merged(
    calls: Sequence[Sequence[Request]], run: Callable[[Sequence[Request]], list[T]]
) -> list[list[T] | UserError]:
    """`run` on the requests of all calls at once: for each call its part of the results, or its own error.

    A call that the merged batch is refused for is run again alone, so that its error counts its own users and shows
    nobody else's, and the others are run without it.
    """
    outcomes: dict[int, list[T] | UserError] = {}

    def alone(i: int) -> None:
        try:
            outcomes[i] = run(calls[i])
        except UserError as error:
            outcomes[i] = error

    left = list(range(len(calls)))
    while len(left) > 1:
        try:
            results = run([request for i in left for request in calls[i]])
        except UserError as error:
            named = {int(index) for index in re.findall(r"users\[(\d+)\]", str(error))}
            owner = [i for i in left for _ in calls[i]]
            culprits = {owner[index] for index in named if index < len(owner)} or set(left)
            for i in culprits:
                alone(i)
            left = [i for i in left if i not in culprits]
            continue
        start = 0
        for i in left:
            outcomes[i] = results[start : start + len(calls[i])]
            start += len(calls[i])
        left = []
    for i in left:
        alone(i)
    return [outcomes[i] for i in range(len(calls))]


def _by_calendar(requests: Sequence[Request], run: Callable[[Sequence[Request]], list[T]]) -> list[T]:
    """`run` on the requests, those with one calendar at a time: a batch has one calendar of the coming days.

    An error names the places of the requests in the whole, not in the part.
    """
    parts: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        parts.setdefault(json.dumps(request.calendar, sort_keys=True), []).append(i)
    results: dict[int, T] = {}
    for places in parts.values():
        try:
            found = run([requests[i] for i in places])
        except UserError as error:
            raise UserError(_renumber(str(error), places)) from None
        results.update(zip(places, found, strict=True))
    return [results[i] for i in range(len(requests))]


def _renumber(message: str, places: Sequence[int]) -> str:
    def place(match: re.Match[str]) -> str:
        index = int(match[1])
        return f"users[{places[index]}]" if index < len(places) else match[0]

    return re.sub(r"users\[(\d+)\]", place, message)


def _plain(what_if: WhatIf) -> dict[str, Any]:
    scenarios = [{**scenario, "answer": scenario["answer"].as_dict()} for scenario in what_if.scenarios]
    return {"baseline": what_if.baseline.as_dict(), "scenarios": scenarios}


def _refusal(error: UserError) -> Reply:
    field = field_of(str(error))
    if field is not None and re.fullmatch(r"users\[\d+\]\.user", field):
        return error_reply(404, "unknown_user", str(error), field)
    return error_reply(400, "refused", str(error), field)
