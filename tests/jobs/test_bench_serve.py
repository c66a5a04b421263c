from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from jobs.bench import serve, what_if
from jobs.bench.http_load import Load, cpu_s, measure
from jobs.bench.rows import KEYS
from serve.ingress import create_app
from tests.serve.fake_predictor import FakePredictor, local

BODY = b'{"users": [{"user": "u1"}]}'


@pytest.fixture
def url() -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app({"lumos": local(FakePredictor())}), log_level="warning"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}{serve.PATH}"
        server.should_exit = True
        thread.join(timeout=30)


def test_clients_count_answers_and_the_cpu_of_the_server(url: str) -> None:
    load = measure(url, [BODY], clients=4, seconds=0.5, warm_s=0.1, server_pid=os.getpid())
    assert load.requests_per_s > 10
    assert 0 < load.cpu_ms_per_request < 100
    assert 0 < load.p50_ms <= load.p99_ms
    assert cpu_s(os.getpid()) > 0


def test_an_answer_that_is_no_answer_ends_the_measurement(url: str) -> None:
    with pytest.raises(RuntimeError, match="404"):
        measure(url, [b'{"users": [{"user": "nobody"}]}'], clients=2, seconds=0.2, warm_s=0.0, server_pid=os.getpid())
    with pytest.raises(ValueError, match="only servers of this machine"):
        measure("http://192.0.2.1:80/", [BODY], clients=1, seconds=0.1, warm_s=0.0, server_pid=os.getpid())


def test_the_rows_compare_with_each_peer(capsys: pytest.CaptureFixture[str]) -> None:
    def loads(*rates: float) -> list[Load]:
        return [Load(rate, 1.5, 10.0, 20.0) for rate in rates]

    found = {"stack": loads(500), "ours": loads(80, 100, 120), "uvicorn": loads(125), "ray_default": loads(40)}
    serve.show(found, {"preset": "x"}, "a machine")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(tuple(row) == KEYS for row in rows)
    assert [(row["what"], row["value"], row["ratio"]) for row in rows] == [
        ("serve/stack/cpu_ms_per_request", 1.5, None),
        ("serve/uvicorn/requests_per_s", 100, 0.8),
        ("serve/ray_default/requests_per_s", 100, 2.5),
    ]


def test_what_if_agrees_with_full_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert what_if.main(["--quick"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["what"] == "what_if/full_pass/users_per_s"
    assert row["run"]["largest_difference"] <= what_if.TOLERANCE
    assert row["run"]["kept_bytes"] > 0
