from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from serve.client import Client, ServeError
from serve.gts_types import GtsUser
from serve.ingress import create_app
from serve.types import CalendarRow, User
from tests.serve.fake_predictor import FakeGts, FakePredictor, local


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The fake behind uvicorn on a free port of the loopback."""
    server = uvicorn.Server(
        uvicorn.Config(create_app({"lumos": local(FakePredictor()), "gts": local(FakeGts())}), log_level="warning")
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=30)


def test_every_call_comes_back_typed(url: str) -> None:
    with Client(url) as client:
        assert client.ready()
        assert client.predict(["u1", User(user="u22", cut_day="2017-11-01")]).answers[1].cut_day == "2017-11-01"
        row = CalendarRow(event_type="mailer", start_day="2017-11-03")
        assert client.what_if(["u1"], [[row], []]).answers[0].scenarios[0].difference.horizons == {"active_any_7": 0.0}
        assert client.embed(["u1"]).embeddings == [[2.0, 1.5]]
        assert client.history(["u1"]).histories[0].past[0].behaviours == {"active": 1.0}
        assert [item.item for item in client.recommend(["u1"], k=2).answers[0].items] == ["i0", "i1"]
        assert client.score([GtsUser(user="u1")], ["a"]).answers[0].items[0].share == 1.0
        assert client.embed_gts(["u1"]).embeddings == [[2.0, 2.5]]
        assert [model.name for model in client.models()] == ["fake", "fake_gts"]


def test_a_refusal_is_an_error_with_its_field(url: str) -> None:
    with Client(url) as client, pytest.raises(ServeError, match="nobody") as caught:
        client.predict(["u1", "nobody"])
    assert (caught.value.status, caught.value.code, caught.value.field) == (404, "unknown_user", "users[1].user")


def test_a_server_that_is_not_there_is_a_transport_error() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", timeout_s=2) as client, pytest.raises(httpx.TransportError):
        client.ready()


class Flaky:
    """A transport that answers with each of `outcomes` in turn: a status, or an error to raise."""

    def __init__(
        self, *outcomes: int | Exception, headers: dict[str, str] | None = None, body: dict[str, Any] | None = None
    ) -> None:
        self.outcomes, self.headers, self.seen = list(outcomes), headers or {}, list[httpx.Request]()
        self.body = body or {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        body = {"model": {"name": "m", "checkpoint": "c", "step": 1}, "embeddings": [[1.0]]}
        return httpx.Response(outcome, headers=self.headers, json=body if outcome == 200 else self.body)


def client_of(flaky: Flaky, **settings: float) -> Client:
    client = Client("http://nowhere", token="secret", **settings)  # type: ignore[arg-type]
    client._http = httpx.Client(
        base_url="http://nowhere", headers=client._http.headers, transport=httpx.MockTransport(flaky)
    )
    return client


def test_what_is_lost_or_sent_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    flaky = Flaky(httpx.ConnectError("gone"), 503, 200)
    assert client_of(flaky).embed(["u1"]).embeddings == [[1.0]]
    assert len(flaky.seen) == 3
    assert 0.1 <= waits[0] <= 0.2 and 0.2 <= waits[1] <= 0.4
    assert flaky.seen[0].headers["Authorization"] == "Bearer secret"
    assert 0 < int(flaky.seen[0].headers["X-Deadline-Ms"]) <= 60_000
    waits.clear()
    assert client_of(Flaky(429, 200, headers={"Retry-After": "3"})).embed(["u1"]).embeddings == [[1.0]]
    assert waits == [3.0]


def test_of_failures_only_those_of_what_stands_in_front_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert client_of(Flaky(500, 502, 200)).embed(["u1"]).embeddings == [[1.0]]
    ours = Flaky(500, body={"error": {"code": "internal", "message": "the server failed to answer", "field": None}})
    with pytest.raises(ServeError, match="internal"):
        client_of(ours).embed(["u1"])
    assert len(ours.seen) == 1


def test_trying_again_has_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    refused = Flaky(404)
    with pytest.raises(ServeError):
        client_of(refused).embed(["u1"])
    assert len(refused.seen) == 1
    away = Flaky(*[503] * 9)
    with pytest.raises(ServeError):
        client_of(away, retries=2).embed(["u1"])
    assert len(away.seen) == 3
    patient = Flaky(503, 200, headers={"Retry-After": "30"})
    with pytest.raises(ServeError) as caught:
        client_of(patient, timeout_s=5.0).embed(["u1"])
    assert (len(patient.seen), caught.value.retry_after_s) == (1, 30.0)
    with pytest.raises(httpx.ConnectError):
        client_of(Flaky(*[httpx.ConnectError("gone")] * 3), retries=1).embed(["u1"])
