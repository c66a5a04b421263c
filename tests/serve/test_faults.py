"""What dies or is replaced under load: nothing that was asked may be lost."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from lum_ray.data.state import State, point
from lum_ray.lumos.predictor import Predictor, Request
from serve.access import new_token
from serve.app import NAME, Endpoint, Server, build, deploy, run
from serve.client import Client, ServeError


@dataclass(frozen=True)
class Asked:
    """A server that eight clients ask without a pause, each for one user. `answered`: what was right; `failed`: what
    the client gave up; `raw`: outcomes of plain requests beside, each sent once."""

    server: Server
    endpoint: Endpoint
    token: str
    answered: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    raw: Counter[str] = field(default_factory=Counter)

    def goes_on(self, what: str) -> None:
        """Wait until some more answers have come."""
        seen = len(self.answered)
        self.until(lambda: len(self.answered) > seen + 20, f"no answers {what}")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.2)

    def replica(self, of: str) -> str:
        """The name of one of the deployment's replicas."""
        found = ray.util.list_named_actors(all_namespaces=True)
        return next(str(actor["name"]) for actor in found if f"#{of}#" in actor["name"])


@contextmanager
def asked(trained: Endpoint, folder: Path, retries: int = 0) -> Iterator[Asked]:
    """The server of `trained` under load: nothing that was asked of it may be lost, whatever is done meanwhile.

    Without retries of the client what is lost would be seen even if it came back.
    """
    assert trained.state
    state = State.open(trained.state)
    users = state.users()
    expected = Predictor.load(trained.checkpoint, state.rows).predict([Request(user) for user in users[:8]])
    token, line = new_token("test")
    (folder / "tokens").write_text(line)
    settings = replace(trained.serve, tokens=str(folder / "tokens"), watch_s=0.5, ingress_replicas=2)
    endpoint = replace(trained, pointer=str(folder / "latest.json"), serve=settings)
    server = run([endpoint], port=0)
    stop = threading.Event()
    load = Asked(server, endpoint, token)

    def ask(number: int) -> None:
        with Client(server.url, token, timeout_s=60.0, retries=retries) as client:
            while not stop.is_set():
                try:
                    answer = client.predict([users[number]]).answers[0]
                except (ServeError, httpx.TransportError) as error:
                    load.failed.append(repr(error))
                    continue
                assert answer.days[0].behaviours["active"].p == pytest.approx(
                    expected[number].days[0]["behaviours"]["active"]["p"], abs=1e-5
                )
                load.answered.append(number)

    def ask_once() -> None:
        headers = {"Authorization": f"Bearer {token}"}
        body = {"users": [{"user": users[0]}]}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60.0) as client:
            while not stop.wait(0.02):
                try:
                    load.raw[str(client.post("/v1/lumos/predict", json=body).status_code)] += 1
                except httpx.TransportError as error:
                    load.raw[type(error).__name__] += 1

    try:
        with ThreadPoolExecutor(9) as pool:
            work = [pool.submit(ask_once), *(pool.submit(ask, number) for number in range(8))]
            try:
                yield load
            finally:
                stop.set()
            for one in work:
                one.result()
        assert not load.failed
    finally:
        server.stop()


def kill(name: str) -> None:
    ray.kill(ray.get_actor(name, "serve"), no_restart=True)


@pytest.mark.ray
def test_it_answers_on_while_a_replica_dies_and_another_snapshot_comes(
    ray_session: None, trained: Endpoint, tmp_path: Path
) -> None:
    """One server for all, since each start takes long: it says what Python says, and loses nothing."""
    with asked(trained, tmp_path) as load, Client(load.server.url, load.token) as client:
        url, place = load.server.url, load.endpoint.pointer
        assert trained.state and place
        assert httpx.post(f"{url}/v1/lumos/predict", json={"users": [{"user": "u"}]}).status_code == 401
        load.goes_on("at all")
        kill(load.replica("lumos"))
        load.goes_on("after a replica died")
        newer = str(tmp_path / "state")
        shutil.copytree(trained.state, newer)
        point(place, state=newer)
        load.until(lambda: client.models()[0].state == newer, "the newer snapshot is not taken")
        point(place, checkpoint=str(tmp_path / "nothing"))
        load.until(lambda: client.models()[0].refused is not None, "the refusal is not told")
        assert client.models()[0].name == "lumos_tiny"
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/healthz", timeout=2)


def update(load: Asked, number: int) -> None:
    """Replace all replicas by others of a new version."""
    before = load.replica("lumos")
    settings = replace(load.endpoint.serve, max_batch=32 + number)
    deploy(build([replace(load.endpoint, serve=settings)]))
    load.until(lambda: load.replica("lumos") != before, "no newer replica")
    load.until(lambda: serve.status().applications[NAME].status == "RUNNING", "the update does not end")


def swap(load: Asked, number: int) -> None:
    """Publish another snapshot of histories, and wait until it is served."""
    assert load.endpoint.state and load.endpoint.pointer
    newer = str(Path(load.endpoint.pointer).with_name(f"state-{number}"))
    shutil.copytree(load.endpoint.state, newer)
    point(load.endpoint.pointer, state=newer)
    with Client(load.server.url, load.token) as client:
        load.until(lambda: client.models()[0].state == newer, "the newer snapshot is not taken")


@pytest.mark.ray
@pytest.mark.faults
def test_of_a_thousand_calls_none_fails(ray_session: None, trained: Endpoint, tmp_path: Path) -> None:
    faults: dict[str, Callable[[Asked, int], None]] = {
        "killed model replica": lambda load, _: kill(load.replica("lumos")),
        "killed ingress replica": lambda load, _: kill(load.replica("ingress")),
        "rolling update": update,
        "snapshot swap": swap,
    }
    with asked(trained, tmp_path, retries=4) as load:
        load.goes_on("at all")
        for name, fault in faults.items():
            calls, failed, raw = len(load.answered), len(load.failed), load.raw.copy()
            for number in range(3):
                fault(load, number)
                load.goes_on(f"after {name}")
            load.until(lambda calls=calls: len(load.answered) >= calls + 1000, "too few answers")  # type: ignore[misc]
            print(
                f"{name}, 3 times: {len(load.failed) - failed} failed of {len(load.answered) - calls} calls; "
                f"raw requests: {dict(load.raw - raw)}"
            )


@pytest.mark.ray
@pytest.mark.faults
def test_kills_and_rolling_updates_lose_nothing(ray_session: None, trained: Endpoint, tmp_path: Path) -> None:
    """Not even where the client asks once."""
    with asked(trained, tmp_path) as load:
        load.goes_on("at all")
        for number in range(3):
            kill(load.replica("lumos"))
            load.goes_on("after a replica died")
            update(load, number)
            load.goes_on("after an update")
