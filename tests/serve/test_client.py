from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from serve.batching import Local, LumosModel
from serve.client import Client, ServeError
from serve.ingress import create_app
from serve.types import CalendarRow, User
from tests.serve.fake_predictor import FakePredictor


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The fake behind uvicorn on a free port of the loopback."""
    server = uvicorn.Server(uvicorn.Config(create_app(Local(LumosModel(FakePredictor()))), log_level="warning"))
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
        assert client.models()[0].behaviours == ["active", "sales"]


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
