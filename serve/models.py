"""Predictors behind plain bodies: the fields of a request in, finished replies out, many calls at once."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from lum_ray.artifacts import UserError
from lum_ray.gts import predictor as gts
from lum_ray.lumos import predictor as lumos
from serve.batching import merged
from serve.types import DAY_ZERO, Body, Reply, encode, error_reply, field_of

T = TypeVar("T")
Method = Callable[[Sequence[Body]], list[Reply]]
Find = Callable[[str, int], tuple[list[str], bool]]
STAMP = ("name", "checkpoint", "step")


class LumosPredictor(Protocol):
    """What is asked of `lum_ray.lumos.predictor.Predictor`."""

    info: Mapping[str, Any]
    dated: bool

    def predict(self, requests: Sequence[lumos.Request], attention: bool = False) -> list[lumos.Answer]: ...

    def what_if(
        self,
        requests: Sequence[lumos.Request],
        scenarios: Sequence[Sequence[Mapping[str, Any]]],
        attention: bool = False,
    ) -> list[lumos.WhatIf]: ...

    def embed(self, requests: Sequence[lumos.Request]) -> npt.NDArray[np.float32]: ...

    def history(self, requests: Sequence[lumos.Request]) -> list[dict[str, Any]]: ...


class GtsPredictor(Protocol):
    """What is asked of `lum_ray.gts.predictor.Predictor`."""

    info: Mapping[str, Any]
    dated: bool

    def recommend(
        self, requests: Sequence[gts.Request], k: int, seen_filter: bool, rerank: bool, method: Any
    ) -> list[gts.Answer]: ...

    def score(self, requests: Sequence[gts.Request], items: Sequence[str]) -> list[gts.Propensities]: ...

    def embed(self, requests: Sequence[gts.Request]) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class Model:
    """`info`: the fields of `serve.types.LumosInfo` or `GtsInfo`; `methods`: by name, a reply for each of some bodies.

    A method is not to be called by two threads at once.
    """

    info: Mapping[str, Any]
    methods: Mapping[str, Method]


def lumos_model(predictor: LumosPredictor, end_day: int | None = None, find: Find | None = None) -> Model:
    """`end_day`: the cut of users that name none, where the stored histories go further than the training's."""
    until = int(predictor.info["end_day"]) if end_day is None else end_day

    def request(user: Mapping[str, Any]) -> lumos.Request:
        cut = user.get("cut_day")
        return lumos.Request(**{**user, "cut_day": until if cut is None else cut})

    def predict(requests: Sequence[lumos.Request], attention: bool = False) -> list[Any]:
        return _by_calendar(
            requests, lambda part: [answer.as_dict() for answer in predictor.predict(part, attention=attention)]
        )

    def what_if(requests: Sequence[lumos.Request], scenarios: Any, attention: bool = False) -> list[Any]:
        return _by_calendar(
            requests, lambda part: [one.as_dict() for one in predictor.what_if(part, scenarios, attention=attention)]
        )

    def history(requests: Sequence[lumos.Request]) -> list[Any]:
        return _by_calendar(requests, predictor.history)

    replies = _Replies(predictor.info, request)
    return Model(
        {**predictor.info, "end_day": _shown(until, predictor.dated)},
        {
            "predict": replies.over_users("answers", predict),
            "what_if": replies.over_users("answers", what_if),
            "embed": replies.over_users("embeddings", lambda requests: _floats(predictor.embed(requests))),
            "history": replies.over_users("histories", history),
            "find": _finds(find),
        },
    )


def gts_model(predictor: GtsPredictor, find: Find | None = None) -> Model:
    def recommend(requests: Sequence[gts.Request], k: int = 10, seen_filter: bool = False, reading: str = "") -> Any:
        method = "generate" if reading == "generate" else "retrieve"
        found = predictor.recommend(requests, k, seen_filter, reading == "rerank", method)
        return [answer.as_dict() for answer in found]

    def score(requests: Sequence[gts.Request], items: Sequence[str]) -> list[Any]:
        return [answer.as_dict() for answer in predictor.score(requests, items)]

    replies = _Replies(predictor.info, lambda user: gts.Request(**user))
    return Model(
        {**predictor.info, "end_day": _shown(int(predictor.info["end_day"]), predictor.dated)},
        {
            "recommend": replies.over_users("answers", recommend),
            "score": replies.over_users("answers", score),
            "embed": replies.over_users("embeddings", lambda requests: _floats(predictor.embed(requests))),
            "find": _finds(find),
        },
    )


class _Replies:
    def __init__(self, info: Mapping[str, Any], request_of: Callable[[Mapping[str, Any]], Any]) -> None:
        self._stamp, self._request_of = {name: info[name] for name in STAMP}, request_of

    def over_users(self, name: str, run: Callable[..., list[Any]]) -> Method:
        """`run(requests, **options)` over the users of all calls with the same options; its results are the replies'
        field `name`."""

        def reply(found: list[Any] | UserError) -> Reply:
            if isinstance(found, UserError):
                return _refusal(found)
            return Reply(200, encode({"model": self._stamp, name: found}))

        def method(bodies: Sequence[Body]) -> list[Reply]:
            replies: dict[int, Reply] = {}
            for places in _alike([{**body, "users": None} for body in bodies]):
                calls = [[self._request_of(user) for user in bodies[i]["users"]] for i in places]
                options = {key: value for key, value in bodies[places[0]].items() if key != "users"}
                found = merged(calls, lambda requests, options=options: run(requests, **options))  # type: ignore[misc]
                replies.update(zip(places, map(reply, found), strict=True))
            return [replies[i] for i in range(len(bodies))]

        return method


def _finds(find: Find | None) -> Method:
    """Stored ids that begin with a body's `prefix`, at most its `limit`."""

    def one(body: Body) -> Reply:
        users, complete = find(body["prefix"], body["limit"]) if find else ([], True)
        return Reply(200, encode({"users": users, "complete": complete}))

    return lambda bodies: [one(body) for body in bodies]


def _alike(values: Sequence[Any]) -> list[list[int]]:
    """The places of equal values, a list for each distinct one."""
    places: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        places.setdefault(json.dumps(value, sort_keys=True), []).append(i)
    return list(places.values())


def _by_calendar(requests: Sequence[lumos.Request], run: Callable[[Sequence[lumos.Request]], list[T]]) -> list[T]:
    """`run` on the requests, those with one calendar at a time: a batch has one calendar of the coming days.

    An error names the places of the requests in the whole, not in the part.
    """
    results: dict[int, T] = {}
    for places in _alike([request.calendar for request in requests]):
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


def _floats(rows: npt.NDArray[np.float32]) -> list[list[float]]:
    found: list[list[float]] = rows.astype(float).tolist()
    return found


def _shown(day: int, dated: bool) -> int | str:
    return (DAY_ZERO + datetime.timedelta(days=day)).isoformat() if dated else day


def _refusal(error: UserError) -> Reply:
    field = field_of(str(error))
    if field is not None and re.fullmatch(r"users\[\d+\]\.user", field):
        return error_reply(404, "unknown_user", str(error), field)
    return error_reply(400, "refused", str(error), field)
