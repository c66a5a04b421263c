"""Who may ask, and how often: bearer tokens, of which only the SHA-256 is stored, and a rate for each of them."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lum_ray.artifacts import UserError, read_bytes
from serve.types import error_reply

OPEN = ("/", "/healthz", "/readyz")
"""Paths that need no token: the page asks for one itself, and health is asked for by machines."""
ENV = "env:"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Token:
    """Who holds it, and the SHA-256 of the token in hex."""

    name: str
    sha256: str


def new_token(name: str) -> tuple[str, str]:
    """(a token that nobody has seen, the line that stands for it where tokens are stored)."""
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise UserError(f"{name!r}: expected a name of letters, digits and . @ - _, at most 64, to tell tokens apart")
    token = secrets.token_urlsafe(32)
    return token, f"{name} {_hash(token)}"


def read_tokens(place: str) -> tuple[Token, ...]:
    """The tokens at `place`: a file (local or s3://), or `env:NAME` for a variable. A line each: a name and a SHA-256
    (commas stand for line ends); empty lines and those that begin with # are left out. Raises UserError."""
    if place.startswith(ENV):
        text = os.environ.get(place.removeprefix(ENV))
        if text is None:
            raise UserError(f"serve.tokens: {place}: the variable is not set; put there what `lum-ray token` prints")
    else:
        try:
            text = read_bytes(place).decode()
        except FileNotFoundError:
            raise UserError(f"serve.tokens: {place}: no such file; write there what `lum-ray token` prints") from None
    found = []
    for number, line in enumerate(re.split(r"[\n,]", text), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split()
        if len(parts) != 2 or not re.fullmatch(r"[0-9a-f]{64}", parts[1]):
            # the line itself is not told: it may hold a token in the clear
            raise UserError(
                f"serve.tokens: {place}, line {number}: expected a name and a SHA-256 of 64 hex digits; "
                "write there what `lum-ray token` prints"
            )
        found.append(Token(*parts))
    if not found:
        raise UserError(f"serve.tokens: {place}: holds no token; make one with `lum-ray token NAME`")
    return tuple(found)


def check_exposure(host: str, tokens: str | None, allow_anonymous: bool) -> None:
    """Raises UserError where anybody on the network could ask, and nobody has said that this is meant."""
    if tokens or allow_anonymous or host in LOOPBACK:
        return
    raise UserError(
        f"serve.host: {host} can be reached by others, and there are no tokens; set serve.tokens (see `lum-ray token`) "
        "or serve.allow_anonymous: true where something in front checks who asks"
    )


@dataclass
class Rate:
    """A bucket of `burst` requests that fills at `per_s`."""

    per_s: float
    burst: float
    clock: Callable[[], float] = time.monotonic
    _level: float = field(default=math.inf, init=False)
    _at: float = field(default=0.0, init=False)

    def wait_s(self) -> float:
        """0 where a request may go (it is counted), else the seconds until one may."""
        now = self.clock()
        self._level = min(self.burst, self._level + (now - self._at) * self.per_s)
        self._at = now
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) / self.per_s


class Access:
    """ASGI middleware: 401 without a token that is known, 429 for one that asks too often.

    `requests_per_s` is for each token in this process, 0 for no bound; a second's worth may come at once. Without
    `tokens` everybody may ask, and shares one rate.
    """

    def __init__(self, app: ASGIApp, tokens: Sequence[Token] = (), requests_per_s: float = 0.0) -> None:
        self._app, self._tokens = app, tokens
        names = [token.name for token in tokens] or [""]
        burst = max(1.0, requests_per_s)
        self._rates = {name: Rate(requests_per_s, burst) for name in names} if requests_per_s else {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["path"] not in OPEN else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        name = self._who(Headers(scope=scope).get("authorization", "")) if self._tokens else ""
        if name is None:
            message = "expected a known token in the header `Authorization: Bearer TOKEN`; `lum-ray token` makes one"
            reply = error_reply(401, "unauthorized", message)
            return Response(reply.body, 401, {"WWW-Authenticate": "Bearer"}, "application/json")
        wait_s = self._rates[name].wait_s() if self._rates else 0.0
        if wait_s > 0:
            reply = error_reply(429, "too_often", "more requests than this token may send; wait as Retry-After says")
            return Response(reply.body, 429, {"Retry-After": str(math.ceil(wait_s))}, "application/json")
        return None

    def _who(self, header: str) -> str | None:
        scheme, _, token = header.partition(" ")
        sent = _hash(token.strip())
        # every token is compared, so that the time says nothing of which one is near
        known = [one.name for one in self._tokens if hmac.compare_digest(one.sha256, sent)]
        return known[0] if known and scheme.lower() == "bearer" else None


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
