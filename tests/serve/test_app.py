from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve

from lum_ray import config
from lum_ray.artifacts import UserError
from lum_ray.config import Run
from lum_ray.data.state import State, point
from lum_ray.lumos.predictor import Predictor, Request
from lum_ray.steps import publish, train
from serve.access import new_token
from serve.app import NAME, Endpoint, Server, _cause, _deployment, build, deploy, gts, lumos, run, until_signal
from serve.client import Client

FOLDER = Path(__file__).parents[2] / "serve"


def args_of(name: str) -> dict[str, Any]:
    plain: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["applications"][0]["args"]
    return plain


@pytest.mark.parametrize(("name", "builder"), [("lumos", lumos), ("gts", gts)])
def test_the_configs_are_ones_that_serve_deploy_takes(name: str, builder: Any) -> None:
    from ray.serve.schema import ServeDeploySchema

    plain = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    ServeDeploySchema.model_validate(plain)
    assert plain["http_options"]["host"] == "127.0.0.1"
    assert plain["http_options"]["request_timeout_s"] > plain["applications"][0]["args"]["serve"]["timeout_s"]
    assert plain["applications"][0]["import_path"] == f"{builder.__module__}:{builder.__name__}"
    assert config.read(Endpoint, args_of(name), "args").serve.max_replicas == 4


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    args = args_of("lumos")
    with pytest.raises(UserError, match=r"args\.serve\.max_user: unknown key; did you mean `max_users`"):
        lumos({**args, "serve": {"max_user": 3}})
    with pytest.raises(UserError, match=r"args\.gpus"):
        lumos({**args, "gpus": "one"})
    with pytest.raises(UserError, match=r"args\.serve\.tokens"):
        lumos({**args, "serve": {"tokens": None}})
    with pytest.raises(UserError, match="max_replicas: expected at least replicas, 2, got 1"):
        lumos({**args, "serve": {"replicas": 2, "max_replicas": 1}})
    open_ = {"serve": {"allow_anonymous": True}}
    (tmp_path / "run.json").write_text('{"model": "gts"}')
    with pytest.raises(UserError, match=r"args\.checkpoint: expected a model of lumos, got one of gts"):
        lumos({**args, **open_, "checkpoint": str(tmp_path)})
    two = {"checkpoint": str(tmp_path)}
    with pytest.raises(UserError, match="at most one model of each kind, got two of gts"):
        gts({**two, **open_, "others": [two]})
    with pytest.raises(UserError, match=r"no run\.json"):
        build([Endpoint(str(tmp_path / "nothing"))])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: damaged"):
        build([Endpoint(str(tmp_path))])


@dataclass
class Stoppable:
    url: str = ""
    name: str = ""
    stopped: list[float] = field(default_factory=list)

    def stop(self) -> None:
        self.stopped.append(time.monotonic())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_once(number: signal.Signals) -> None:
    server: Any = Stoppable()
    before = signal.getsignal(number)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), number))
    timer.start()
    assert until_signal(server) == number
    timer.join(timeout=5)
    assert len(server.stopped) == 1
    assert signal.getsignal(number) is before


@pytest.fixture(scope="module")
def trained(tiny: Run) -> Endpoint:
    return Endpoint(train(tiny), publish(tiny), serve=config.Serve(timeout_s=60.0, ingress_replicas=1))


@pytest.mark.ray
def test_what_cannot_start_is_refused_at_once(ray_session: None, trained: Endpoint) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"serve\.port: cannot listen"):
            run([trained], port=taken.getsockname()[1])
    with pytest.raises(UserError, match=r"serve\.replicas: 64 of models need"):
        run([replace(trained, serve=config.Serve(replicas=64))], port=0)
    with pytest.raises(UserError, match=r"serve\.host: 0\.0\.0\.0"):
        run([trained], host="0.0.0.0", port=0)


@pytest.mark.ray
def test_a_damaged_checkpoint_does_not_serve(ray_session: None, trained: Endpoint, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints" / Path(trained.checkpoint).name
    shutil.copytree(trained.checkpoint, copy)
    for weights in copy.glob("*/*/model.safetensors"):
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        run([replace(trained, checkpoint=str(copy))], port=0)


def test_the_cause_of_a_failed_replica_is_told_without_its_stack() -> None:
    told = "no intact checkpoint:\nbest/model.safetensors: missing"
    assert _cause(["", f"Replica failed:\n  File x.py, line 3\nlum_ray.artifacts.UserError: {told}"]) == told
    assert _cause(["Traceback\n  File x.py\nValueError: no"]) == "ValueError: no"
    assert "logs" in _cause([""])


@dataclass(frozen=True)
class Asked:
    """A server that eight clients ask without a pause, each for one user; `answered` counts what was right."""

    server: Server
    endpoint: Endpoint
    token: str
    answered: list[int]

    def goes_on(self, what: str) -> None:
        """Wait until some more answers have come."""
        seen = len(self.answered)
        self.until(lambda: len(self.answered) > seen + 20, f"no answers {what}")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.2)

    def replica(self, of: str) -> str:
        """The name of one of the deployment's replicas."""
        found = ray.util.list_named_actors(all_namespaces=True)
        return next(str(actor["name"]) for actor in found if f"#{of}#" in actor["name"])


@contextmanager
def asked(trained: Endpoint, folder: Path) -> Iterator[Asked]:
    """The server of `trained` under load: nothing that was asked of it may be lost, whatever is done meanwhile."""
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
    answered: list[int] = []

    def ask(number: int) -> None:
        # no retries: what is lost would be seen
        with Client(server.url, token, timeout_s=60.0, retries=0) as client:
            while not stop.is_set():
                answer = client.predict([users[number]]).answers[0]
                assert answer.days[0].behaviours["active"].p == pytest.approx(
                    expected[number].days[0]["behaviours"]["active"]["p"], abs=1e-5
                )
                answered.append(number)

    try:
        with ThreadPoolExecutor(8) as pool:
            work = [pool.submit(ask, number) for number in range(8)]
            try:
                yield Asked(server, endpoint, token, answered)
            finally:
                stop.set()
            for one in work:
                one.result()
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


@pytest.mark.ray
@pytest.mark.faults
def test_kills_and_rolling_updates_lose_nothing(ray_session: None, trained: Endpoint, tmp_path: Path) -> None:
    with asked(trained, tmp_path) as load:
        load.goes_on("at all")
        for round_ in range(3):
            kill(load.replica("lumos"))
            load.goes_on("after a replica died")
            before = load.replica("lumos")
            newer = replace(load.endpoint.serve, max_batch=32 + round_)
            deploy(build([replace(load.endpoint, serve=newer)]))
            load.until(lambda before=before: load.replica("lumos") != before, "no newer replica")  # type: ignore[misc]
            load.until(lambda: serve.status().applications[NAME].status == "RUNNING", "the update does not end")
            load.goes_on("after an update")


def test_a_model_grows_between_its_bounds() -> None:
    config_of = _deployment(
        "lumos", Endpoint("x", serve=config.Serve(replicas=2, max_replicas=5)), config.Serve()
    )._bound_deployment._deployment_config
    assert (config_of.autoscaling_config.min_replicas, config_of.autoscaling_config.max_replicas) == (2, 5)
    fixed = _deployment("lumos", Endpoint("x", serve=config.Serve(replicas=2)), config.Serve())
    assert fixed._bound_deployment._deployment_config.num_replicas == 2
