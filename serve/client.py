"""A small typed client: the request types in, the response types out, errors as ServeError."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from serve.types import (
    CalendarRow,
    EmbedResponse,
    ErrorResponse,
    ModelInfo,
    ModelsResponse,
    PredictRequest,
    PredictResponse,
    Problem,
    User,
    WhatIfRequest,
    WhatIfResponse,
)

Response = TypeVar("Response", bound=BaseModel)


class ServeError(Exception):
    """The server's refusal. `status` is the HTTP status, `field` the path of the field to change, if there is one."""

    def __init__(self, status: int, problem: Problem, retry_after_s: float | None) -> None:
        super().__init__(f"{status} {problem.code}: {problem.message}")
        self.status, self.code, self.field, self.retry_after_s = status, problem.code, problem.field, retry_after_s


class Client:
    """Calls a server at `url`. A user is an id or a `User`. Raises ServeError, or httpx.TransportError."""

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def predict(self, users: Sequence[str | User]) -> PredictResponse:
        return self._post("/v1/lumos/predict", PredictRequest(users=_users(users)), PredictResponse)

    def what_if(self, users: Sequence[str | User], scenarios: Sequence[Sequence[CalendarRow]]) -> WhatIfResponse:
        body = WhatIfRequest(users=_users(users), scenarios=[list(rows) for rows in scenarios])
        return self._post("/v1/lumos/what-if", body, WhatIfResponse)

    def embed(self, users: Sequence[str | User]) -> EmbedResponse:
        return self._post("/v1/lumos/embed", PredictRequest(users=_users(users)), EmbedResponse)

    def models(self) -> list[ModelInfo]:
        return _read(self._http.get("/v1/models"), ModelsResponse).models

    def ready(self) -> bool:
        return self._http.get("/readyz").status_code == 200

    def _post(self, path: str, body: BaseModel, kind: type[Response]) -> Response:
        return _read(self._http.post(path, json=_plain(body)), kind)


def _users(users: Sequence[str | User]) -> list[User]:
    return [User(user=user) if isinstance(user, str) else user for user in users]


def _plain(body: BaseModel) -> dict[str, Any]:
    return body.model_dump(mode="json", exclude_unset=True)


def _read(response: httpx.Response, kind: type[Response]) -> Response:
    if response.status_code == 200:
        return kind.model_validate_json(response.content)
    retry_after = response.headers.get("Retry-After")
    try:
        problem = ErrorResponse.model_validate_json(response.content).error
    except ValidationError:
        # not ours: a proxy in front, or Serve itself while the application is away
        problem = Problem(code="foreign", message=response.text[:200])
    seconds = float(retry_after) if retry_after and retry_after.isdigit() else None
    raise ServeError(response.status_code, problem, seconds)
