"""The HTTP side, around any model: routes, limits, the deadline and the one shape of an error.

It checks what can be checked without the model and hands plain users on. A model is reached through `Backend`: in
another process (`serve.app`) or in this one (`serve.batching.Local`).
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import lum_ray
from serve.types import (
    EmbedResponse,
    ErrorResponse,
    ModelInfo,
    ModelsResponse,
    PredictRequest,
    PredictResponse,
    Reply,
    Rows,
    StatusResponse,
    Users,
    WhatIfRequest,
    WhatIfResponse,
    encode,
    error_reply,
    path_of,
    shown,
)

log = logging.getLogger("lum_ray.serve")
READY_TIMEOUT_S = 5.0
RETRY_AFTER_S = 1
CODES = {400: "malformed", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The model cannot answer this; `field` names what to change"},
    404: {"model": ErrorResponse, "description": "A user is neither stored nor sent with events"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
    422: {"model": ErrorResponse, "description": "A field is unknown, missing, of the wrong type, or holds too many"},
    503: {"model": ErrorResponse, "description": "Busy or starting; try again after Retry-After seconds"},
    504: {"model": ErrorResponse, "description": "The deadline has passed"},
}


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for."""

    max_users: int = 256
    max_events: int = 10_000
    """Events of one user in a request."""
    max_scenarios: int = 32
    max_calendar: int = 1_000
    """Rows of one calendar or scenario."""
    max_body_bytes: int = 8 << 20
    max_in_flight: int = 256
    """Requests that this process holds at once; a further one is sent away with 503."""
    timeout_s: float = 30.0


class UnavailableError(Exception):
    """The model cannot take the call now: its process is starting, has died, or its queue is full."""


class Backend(Protocol):
    """The model as the ingress reaches it. Every method may raise UnavailableError."""

    async def info(self) -> Mapping[str, Any]: ...

    async def predict(self, users: Users) -> Reply: ...

    async def what_if(self, users: Users, scenarios: Sequence[Rows]) -> Reply: ...

    async def embed(self, users: Users) -> Reply: ...


def create_app(backend: Backend, limits: Limits | None = None) -> FastAPI:
    """The FastAPI application around `backend`."""
    limits = limits or Limits()
    gate = _Gate(limits)
    app = FastAPI(
        title="lum_ray",
        version=lum_ray.__version__,
        description="What users will do on each of the coming days, and what would change under other events.",
    )
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(Exception, _internal)

    @app.post("/v1/lumos/predict", response_model=PredictResponse, responses=REFUSALS, tags=["lumos"])
    async def predict(request: PredictRequest) -> Response:
        """Every behaviour on each of the coming days, for each user, with intervals."""
        users = [user.plain() for user in request.users]
        return await gate.answer(_over(users, (), limits), lambda: backend.predict(users))

    @app.post("/v1/lumos/what-if", response_model=WhatIfResponse, responses=REFUSALS, tags=["lumos"])
    async def what_if(request: WhatIfRequest) -> Response:
        """The same users under other calendars: predictions, differences, and how near training each scenario is."""
        users = [user.plain() for user in request.users]
        scenarios = [[row.model_dump(exclude_unset=True) for row in rows] for rows in request.scenarios]
        return await gate.answer(_over(users, scenarios, limits), lambda: backend.what_if(users, scenarios))

    @app.post("/v1/lumos/embed", response_model=EmbedResponse, responses=REFUSALS, tags=["lumos"])
    async def embed(request: PredictRequest) -> Response:
        """A vector for each user at her cut."""
        users = [user.plain() for user in request.users]
        return await gate.answer(_over(users, (), limits), lambda: backend.embed(users))

    @app.get("/v1/models", response_model=ModelsResponse, responses={503: REFUSALS[503]}, tags=["models"])
    async def models() -> Response:
        """What is served: behaviours, event types, the columns that raw events must have, the default cut."""
        return await gate.answer(None, lambda: _models(backend))

    @app.get("/healthz", response_model=StatusResponse, tags=["health"])
    async def healthz() -> Response:
        """This process is alive."""
        return _response(Reply(200, encode({"status": "ok"})))

    @app.get("/readyz", response_model=StatusResponse, responses={503: REFUSALS[503]}, tags=["health"])
    async def readyz() -> Response:
        """The model answers."""
        try:
            async with asyncio.timeout(min(READY_TIMEOUT_S, limits.timeout_s)):
                await backend.info()
        except (TimeoutError, UnavailableError) as error:
            return _response(error_reply(503, "not_ready", f"the model does not answer: {error or 'no reply in time'}"))
        return _response(Reply(200, encode({"status": "ready"})))

    return app


class _Gate:
    """Counts the requests that are being answered, and ends each of them in time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._in_flight = 0

    async def answer(self, refusal: Reply | None, call: Callable[[], Awaitable[Reply]]) -> Response:
        if refusal is not None:
            return _response(refusal)
        if self._in_flight >= self._limits.max_in_flight:
            message = f"{self._in_flight} requests are being answered; try again later"
            return _response(error_reply(503, "overloaded", message))
        self._in_flight += 1
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return _response(await call())
        except TimeoutError:
            message = f"no answer within {self._limits.timeout_s:g} s; send fewer users a request"
            return _response(error_reply(504, "timeout", message))
        except UnavailableError as error:
            return _response(error_reply(503, "unavailable", f"the model cannot take the request now: {error}"))
        finally:
            self._in_flight -= 1


async def _models(backend: Backend) -> Reply:
    info = await backend.info()
    return Reply(200, encode({"models": [{name: info[name] for name in ModelInfo.model_fields}]}))


def _over(users: Sequence[Mapping[str, Any]], scenarios: Sequence[Rows], limits: Limits) -> Reply | None:
    """The refusal of a request with more of something than the limits allow."""
    counts = [("users", len(users), limits.max_users), ("scenarios", len(scenarios), limits.max_scenarios)]
    for i, user in enumerate(users):
        counts.append((f"users[{i}].events", len(user.get("events") or ()), limits.max_events))
        counts.append((f"users[{i}].calendar", len(user.get("calendar") or ()), limits.max_calendar))
    counts += [(f"scenarios[{i}]", len(rows), limits.max_calendar) for i, rows in enumerate(scenarios)]
    for field, count, most in counts:
        if count > most:
            message = f"{field}: expected at most {most}, got {count}; split the request"
            return error_reply(422, "too_many", message, field)
    return None


def _response(reply: Reply) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if reply.status == 503 else None
    return Response(reply.body, reply.status, headers, media_type="application/json")


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        message = f"the body is not JSON: {found[0]['ctx']['error']} at character {found[0]['loc'][-1]}"
        return _response(error_reply(422, "invalid", message))
    fields = [path_of(item["loc"][1:]) for item in found]
    lines = [f"{field or 'the body'}: {_reason(item)}" for field, item in zip(fields[:5], found[:5], strict=True)]
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    return _response(error_reply(422, "invalid", "; ".join(lines) + more, fields[0] or None))


def _reason(item: Mapping[str, Any]) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown field"
    if item["type"] == "missing":
        return "required, but missing"
    if isinstance(item["input"], bytes):
        return "expected JSON; send it with the header Content-Type: application/json"
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return message if item["type"] == "value_error" else f"{message}, got {shown(item['input'])}"


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    reply = error_reply(error.status_code, CODES.get(error.status_code, "refused"), str(error.detail))
    return Response(reply.body, reply.status, error.headers, media_type="application/json")


async def _internal(request: Request, error: Exception) -> Response:
    # where it failed and how, but not what the error says: that may hold what was sent
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s %s failed: %s\n%s", request.method, request.url.path, type(error).__name__, where)
    return _response(error_reply(500, "internal", "the server failed to answer; its log says why"))


class BodyLimit:
    """ASGI middleware: a body of more than `max_bytes` is refused with 413, whether or not its length was announced."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"the body: expected at most {self._max_bytes} bytes; split the request"
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await _response(error_reply(413, "too_large", message))(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, message)
            return part

        await self._app(scope, counted, send)
