"""The HTTP side, around any models: routes, limits, the deadline and the one shape of an error.

It checks what can be checked without a model and hands plain bodies on. A model is reached through `Backend`: in
another process (`serve.app`) or in this one (`serve.live.Local`). `serve.access` stands in front.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import lum_ray
from serve.access import Access, Token
from serve.gts_types import GtsUsersRequest, RecommendRequest, RecommendResponse, ScoreRequest, ScoreResponse
from serve.types import (
    Body,
    EmbedResponse,
    ErrorResponse,
    FoundResponse,
    GtsInfo,
    HistoryResponse,
    LumosInfo,
    ModelsResponse,
    PredictRequest,
    PredictResponse,
    Reply,
    StatusResponse,
    Strict,
    UsersRequest,
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
PAGE = Path(__file__).with_name("playground.html")
PAGE_POLICY = "; ".join((
    "default-src 'none'", "script-src 'unsafe-inline'", "style-src 'unsafe-inline'", "connect-src 'self'",
    "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
))  # fmt: skip
CODES = {400: "malformed", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
TOLD = {
    400: "The model cannot answer this; `field` names what to change",
    401: "No token, or one that is not known",
    404: "A user is neither stored nor sent with events",
    413: "The body is too large",
    422: "A field is unknown, missing, of the wrong type, or holds too many",
    429: "This token asks too often; try again after Retry-After seconds",
    503: "Busy or starting; try again after Retry-After seconds",
    504: "The deadline has passed",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": told} for status, told in TOLD.items()
}
Deadline = Annotated[
    int | None, Header(alias="X-Deadline-Ms", gt=0, description="Answer within so many milliseconds, or 504")
]


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for."""

    max_users: int = 256
    max_events: int = 10_000
    """Events of one user in a request."""
    max_scenarios: int = 32
    max_calendar: int = 1_000
    """Rows of one calendar or scenario."""
    max_pairs: int = 4_096
    """Users of a request times the items that are scored for each."""
    max_body_bytes: int = 8 << 20
    max_in_flight: int = 256
    """Requests that this process holds at once; a further one is sent away with 503."""
    timeout_s: float = 30.0


class UnavailableError(Exception):
    """The model cannot take the call now: its process is starting, has died, or its queue is full."""


class Backend(Protocol):
    """A model as the ingress reaches it. Both may raise UnavailableError."""

    async def info(self) -> Mapping[str, Any]: ...

    async def call(self, method: str, body: Body) -> Reply: ...


def create_app(
    models: Mapping[str, Backend],
    limits: Limits | None = None,
    tokens: Sequence[Token] = (),
    requests_per_s: float = 0.0,
) -> FastAPI:
    """The FastAPI application around `models` (`lumos`, `gts`, or both); see `serve.access.Access` for the rest."""
    limits = limits or Limits()
    gate = _Gate(limits)
    app = FastAPI(
        title="lum_ray",
        version=lum_ray.__version__,
        description="What users will do on each of the coming days and what they take next; and what would change.",
    )
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    app.add_middleware(Access, tokens=tokens, requests_per_s=requests_per_s)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(Exception, _internal)
    for name, routes in (("lumos", _lumos_routes), ("gts", _gts_routes)):
        if name in models:
            app.include_router(routes(models[name], gate))

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        # read anew, so that the page can be worked on beside a server
        headers = {
            "Content-Security-Policy": PAGE_POLICY,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/v1/models", response_model=ModelsResponse, responses={503: REFUSALS[503]}, tags=["models"])
    async def list_models(deadline_ms: Deadline = None) -> Response:
        """What is served: its names, the columns that raw events must have, the default cut."""

        async def found() -> Reply:
            infos = [await backend.info() for backend in models.values()]
            kinds = [GtsInfo if info["model"] == "gts" else LumosInfo for info in infos]
            plain = [kind.model_validate(info).model_dump(mode="json") for kind, info in zip(kinds, infos, strict=True)]
            return Reply(200, encode({"models": plain}))

        return await gate.answer(None, found, deadline_ms)

    @app.get("/healthz", response_model=StatusResponse, tags=["health"])
    async def healthz() -> Response:
        """This process is alive."""
        return _response(Reply(200, encode({"status": "ok"})))

    @app.get("/readyz", response_model=StatusResponse, responses={503: REFUSALS[503]}, tags=["health"])
    async def readyz() -> Response:
        """Every model answers."""
        try:
            async with asyncio.timeout(min(READY_TIMEOUT_S, limits.timeout_s)):
                for backend in models.values():
                    await backend.info()
        except (TimeoutError, UnavailableError) as error:
            return _response(error_reply(503, "not_ready", f"a model does not answer: {error or 'no reply in time'}"))
        return _response(Reply(200, encode({"status": "ready"})))

    return app


def _lumos_routes(model: Backend, gate: _Gate) -> APIRouter:
    routes = APIRouter(prefix="/v1/lumos", responses=REFUSALS, tags=["lumos"])

    @routes.post("/predict", response_model=PredictResponse)
    async def predict(request: PredictRequest, deadline_ms: Deadline = None) -> Response:
        """Every behaviour on each of the coming days, for each user, with intervals."""
        return await gate.call(model, "predict", request, deadline_ms)

    @routes.post("/what-if", response_model=WhatIfResponse)
    async def what_if(request: WhatIfRequest, deadline_ms: Deadline = None) -> Response:
        """The same users under other calendars: predictions, differences, and how near training each scenario is."""
        return await gate.call(model, "what_if", request, deadline_ms)

    @routes.post("/embed", response_model=EmbedResponse)
    async def embed(request: UsersRequest, deadline_ms: Deadline = None) -> Response:
        """A vector for each user at her cut."""
        return await gate.call(model, "embed", request, deadline_ms)

    @routes.post("/history", response_model=HistoryResponse)
    async def history(request: UsersRequest, deadline_ms: Deadline = None) -> Response:
        """What the model reads: the past days of each user, and the events that are known of the coming ones."""
        return await gate.call(model, "history", request, deadline_ms)

    _find_route(routes, model, gate)
    return routes


def _gts_routes(model: Backend, gate: _Gate) -> APIRouter:
    routes = APIRouter(prefix="/v1/gts", responses=REFUSALS, tags=["gts"])

    @routes.post("/recommend", response_model=RecommendResponse)
    async def recommend(request: RecommendRequest, deadline_ms: Deadline = None) -> Response:
        """The items that each user takes next, best first."""
        return await gate.call(model, "recommend", request, deadline_ms)

    @routes.post("/score", response_model=ScoreResponse)
    async def score(request: ScoreRequest, deadline_ms: Deadline = None) -> Response:
        """The propensity of each of some items, for each user."""
        return await gate.call(model, "score", request, deadline_ms)

    @routes.post("/embed", response_model=EmbedResponse)
    async def embed(request: GtsUsersRequest, deadline_ms: Deadline = None) -> Response:
        """A vector for each user at her cut: what retrieval matches with the items' vectors."""
        return await gate.call(model, "embed", request, deadline_ms)

    _find_route(routes, model, gate)
    return routes


def _find_route(routes: APIRouter, model: Backend, gate: _Gate) -> None:
    @routes.get("/users", response_model=FoundResponse)
    async def users(
        prefix: Annotated[str, Query(max_length=512)] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        deadline_ms: Deadline = None,
    ) -> Response:
        """Stored users whose id begins with `prefix`."""
        body = {"prefix": prefix, "limit": limit}
        return await gate.answer(None, lambda: model.call("find", body), deadline_ms)


class _Gate:
    """Counts the requests that are being answered, and ends each of them in time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._in_flight = 0

    async def call(self, model: Backend, method: str, request: Strict, deadline_ms: int | None) -> Response:
        body = request.model_dump(exclude_unset=True)
        return await self.answer(_over(body, self._limits), lambda: model.call(method, body), deadline_ms)

    async def answer(
        self, refusal: Reply | None, call: Callable[[], Awaitable[Reply]], deadline_ms: int | None = None
    ) -> Response:
        if refusal is not None:
            return _response(refusal)
        if self._in_flight >= self._limits.max_in_flight:
            message = f"{self._in_flight} requests are being answered; try again later"
            return _response(error_reply(503, "overloaded", message))
        limit_s = min(self._limits.timeout_s, (deadline_ms or float("inf")) / 1000)
        self._in_flight += 1
        try:
            async with asyncio.timeout(limit_s):
                return _response(await call())
        except TimeoutError:
            message = f"no answer within {limit_s:g} s; send fewer users a request, or allow more time"
            return _response(error_reply(504, "timeout", message))
        except UnavailableError as error:
            return _response(error_reply(503, "unavailable", f"the model cannot take the request now: {error}"))
        finally:
            self._in_flight -= 1


def _over(body: Body, limits: Limits) -> Reply | None:
    """The refusal of a request with more of something than the limits allow."""
    users, scenarios = body["users"], body.get("scenarios", ())
    counts = [("users", len(users), limits.max_users), ("scenarios", len(scenarios), limits.max_scenarios)]
    for i, user in enumerate(users):
        counts.append((f"users[{i}].events", len(user.get("events") or ()), limits.max_events))
        counts.append((f"users[{i}].calendar", len(user.get("calendar") or ()), limits.max_calendar))
    counts += [(f"scenarios[{i}]", len(rows), limits.max_calendar) for i, rows in enumerate(scenarios)]
    items = len(body.get("items", ()))
    counts.append(("items", items, limits.max_pairs // len(users)))
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
