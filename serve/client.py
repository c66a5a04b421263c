"""A small typed client: the request types in, the response types out, errors as ServeError; what is lost or sent away
is asked again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from serve.gts_types import (
    GtsUser,
    GtsUsersRequest,
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
)
from serve.types import (
    CalendarRow,
    EmbedResponse,
    ErrorResponse,
    GtsInfo,
    HistoryResponse,
    LumosInfo,
    ModelsResponse,
    PredictRequest,
    PredictResponse,
    Problem,
    User,
    UsersRequest,
    WhatIfRequest,
    WhatIfResponse,
)

Response = TypeVar("Response", bound=BaseModel)
AGAIN = (429, 503)
FOREIGN = "foreign"
FIRST_WAIT_S, MOST_WAIT_S = 0.2, 10.0


class ServeError(Exception):
    """The server's refusal. `status` is the HTTP status, `field` the path of the field to change, if there is one."""

    def __init__(self, status: int, problem: Problem, retry_after_s: float | None) -> None:
        super().__init__(f"{status} {problem.code}: {problem.message}")
        self.status, self.code, self.field, self.retry_after_s = status, problem.code, problem.field, retry_after_s


class Client:
    """Calls a server at `url`. A user is an id or a `User` (`GtsUser`). Raises ServeError, or httpx.TransportError.

    Every call only reads, so each is tried again, up to `retries` times and within `timeout_s` in all: after a
    connection that failed, after 429 and 503, as long as Retry-After says (else longer each time), and after what a
    proxy says in the place of an ingress that died. The server is told how long an answer is waited for.
    """

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 60.0, retries: int = 4) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers)
        self._timeout_s, self._retries = timeout_s, retries

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def predict(self, users: Sequence[str | User], attention: bool = False) -> PredictResponse:
        body = PredictRequest(users=_users(users, User), attention=attention)
        return self._post("/v1/lumos/predict", body, PredictResponse)

    def what_if(
        self, users: Sequence[str | User], scenarios: Sequence[Sequence[CalendarRow]], attention: bool = False
    ) -> WhatIfResponse:
        rows = [list(rows) for rows in scenarios]
        body = WhatIfRequest(users=_users(users, User), scenarios=rows, attention=attention)
        return self._post("/v1/lumos/what-if", body, WhatIfResponse)

    def embed(self, users: Sequence[str | User]) -> EmbedResponse:
        return self._post("/v1/lumos/embed", UsersRequest(users=_users(users, User)), EmbedResponse)

    def history(self, users: Sequence[str | User]) -> HistoryResponse:
        return self._post("/v1/lumos/history", UsersRequest(users=_users(users, User)), HistoryResponse)

    def recommend(
        self,
        users: Sequence[str | GtsUser],
        k: int = 10,
        seen_filter: bool = False,
        reading: Literal["retrieve", "rerank", "generate"] = "retrieve",
    ) -> RecommendResponse:
        body = RecommendRequest(users=_users(users, GtsUser), k=k, seen_filter=seen_filter, reading=reading)
        return self._post("/v1/gts/recommend", body, RecommendResponse)

    def score(self, users: Sequence[str | GtsUser], items: Sequence[str]) -> ScoreResponse:
        body = ScoreRequest(users=_users(users, GtsUser), items=list(items))
        return self._post("/v1/gts/score", body, ScoreResponse)

    def embed_gts(self, users: Sequence[str | GtsUser]) -> EmbedResponse:
        """The users' vectors of GTS-LUM, which retrieval matches with those of items."""
        return self._post("/v1/gts/embed", GtsUsersRequest(users=_users(users, GtsUser)), EmbedResponse)

    def models(self) -> list[LumosInfo | GtsInfo]:
        response = self._again(lambda timeout_s: self._http.get("/v1/models", timeout=timeout_s))
        return _read(response, ModelsResponse).models

    def ready(self) -> bool:
        return self._http.get("/readyz", timeout=self._timeout_s).status_code == 200

    def _post(self, path: str, body: BaseModel, kind: type[Response]) -> Response:
        plain = body.model_dump(mode="json", exclude_unset=True)

        def send(timeout_s: float) -> httpx.Response:
            headers = {"X-Deadline-Ms": str(max(1, int(timeout_s * 1000)))}
            return self._http.post(path, json=plain, headers=headers, timeout=timeout_s)

        return _read(self._again(send), kind)

    def _again(self, send: Callable[[float], httpx.Response]) -> httpx.Response:
        end = time.monotonic() + self._timeout_s
        for attempt in range(self._retries + 1):
            wait_s = min(MOST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1)
            last = attempt == self._retries
            try:
                response = send(max(0.001, end - time.monotonic()))
                wait_s = _retry_after_s(response) or wait_s
                if last or not _may_pass(response) or time.monotonic() + wait_s >= end:
                    return response
            except httpx.TransportError:
                if last or time.monotonic() + wait_s >= end:
                    raise
            time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


User_ = TypeVar("User_", User, GtsUser)


def _users(users: Sequence[str | User_], kind: type[User_]) -> list[User_]:
    return [kind(user=user) if isinstance(user, str) else user for user in users]


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _problem(response: httpx.Response) -> Problem:
    try:
        return ErrorResponse.model_validate_json(response.content).error
    except ValidationError:
        # not ours: a proxy in front, or Serve itself while the application is away
        return Problem(code=FOREIGN, message=response.text[:200])


def _may_pass(response: httpx.Response) -> bool:
    status = response.status_code
    return status in AGAIN or (status >= 500 and _problem(response).code == FOREIGN)


def _read(response: httpx.Response, kind: type[Response]) -> Response:
    if response.status_code == 200:
        return kind.model_validate_json(response.content)
    raise ServeError(response.status_code, _problem(response), _retry_after_s(response))
