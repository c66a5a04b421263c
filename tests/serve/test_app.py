from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from lum_ray import config, presets
from lum_ray.artifacts import UserError
from lum_ray.data.state import State
from lum_ray.lumos.predictor import Predictor, Request
from serve.app import _cause, build, lumos, run, until_signal
from serve.client import Client, ServeError
from serve.types import CalendarRow, User

YAML = Path(__file__).parents[2] / "serve" / "lumos.yaml"


def test_the_config_is_one_that_serve_deploy_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    plain = yaml.safe_load(YAML.read_text())
    ServeDeploySchema.model_validate(plain)
    assert plain["http_options"]["host"] == "127.0.0.1"
    assert plain["http_options"]["request_timeout_s"] > plain["applications"][0]["args"]["serve"]["timeout_s"]
    assert plain["applications"][0]["import_path"] == f"{lumos.__module__}:{lumos.__name__}"


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    args = yaml.safe_load(YAML.read_text())["applications"][0]["args"]
    with pytest.raises(UserError, match=r"args\.serve\.max_user: unknown key; did you mean `max_users`"):
        lumos({**args, "serve": {"max_user": 3}})
    with pytest.raises(UserError, match=r"args\.gpus"):
        lumos({**args, "gpus": "one"})
    with pytest.raises(UserError, match="nothing"):
        lumos({**args, "checkpoint": str(tmp_path / "nothing")})
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no run\.json"):
        build(str(tmp_path))


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


@dataclass(frozen=True)
class Trained:
    checkpoint: str
    state: str


@pytest.fixture(scope="module")
def trained(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny model after two steps: what it says is of no worth, how it is served is the same."""
    from lum_ray.steps.predict import publish
    from lum_ray.steps.train import train

    tiny = presets.lumos_tiny()
    tiny = replace(tiny, root=str(tmp_path_factory.mktemp("runs")), train=replace(tiny.train, steps=2))
    return Trained(train(tiny), publish(tiny))


def predictor_of(trained: Trained) -> tuple[Predictor, list[str]]:
    state = State.open(trained.state)
    return Predictor.load(trained.checkpoint, state.rows), state.users()


@pytest.mark.ray
def test_what_cannot_start_is_refused_at_once(trained: Trained) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"serve\.port: cannot listen"):
            run(trained.checkpoint, trained.state, port=taken.getsockname()[1])
    with pytest.raises(UserError, match=r"serve\.replicas: 64 need"):
        run(trained.checkpoint, trained.state, config.Serve(replicas=64), port=0)


@pytest.mark.ray
def test_a_damaged_checkpoint_does_not_serve(trained: Trained, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints" / Path(trained.checkpoint).name
    shutil.copytree(trained.checkpoint, copy)
    for weights in copy.glob("*/*/model.safetensors"):
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        run(str(copy), trained.state, port=0)


def test_the_cause_of_a_failed_replica_is_told_without_its_stack() -> None:
    told = "no intact checkpoint:\nbest/model.safetensors: missing"
    assert _cause(["", f"Replica failed:\n  File x.py, line 3\nlum_ray.artifacts.UserError: {told}"]) == told
    assert _cause(["Traceback\n  File x.py\nValueError: no"]) == "ValueError: no"
    assert "logs" in _cause([""])


@pytest.mark.ray
def test_http_says_what_the_predictor_says(trained: Trained) -> None:
    predictor, users = predictor_of(trained)
    server = run(trained.checkpoint, trained.state, config.Serve(timeout_s=60.0), port=0)
    try:
        with Client(server.url) as client:
            expected = predictor.predict([Request(user) for user in users[:12]])
            with ThreadPoolExecutor(12) as pool:
                found = list(pool.map(lambda user: client.predict([user]).answers[0], users[:12]))
            for one, other in zip(found, expected, strict=True):
                assert one.user == other.user
                assert one.cut_day == other.cut_day
                for day, same_day in zip(one.days, other.days, strict=True):
                    assert day.day == same_day["day"]
                    for name, values in same_day["behaviours"].items():
                        assert day.behaviours[name].model_dump(exclude_none=True) == pytest.approx(
                            values, rel=1e-4, abs=1e-5
                        )

            row = CalendarRow(event_type=client.models()[0].event_types[0], start_day=expected[0].days[2]["day"])
            one_what_if = client.what_if([users[0]], [[row], []]).answers[0]
            same = predictor.what_if([Request(users[0])], [[row.model_dump(exclude_unset=True)], []])[0]
            for scenario, other_scenario in zip(one_what_if.scenarios, same.scenarios, strict=True):
                assert scenario.nearer_share == other_scenario["nearer_share"]
                assert scenario.difference.horizons == pytest.approx(other_scenario["difference"]["horizons"], abs=1e-4)
            np.testing.assert_allclose(
                client.embed(users[:3]).embeddings, predictor.embed([Request(u) for u in users[:3]]), atol=1e-5
            )

            with pytest.raises(ServeError) as caught:
                client.predict([users[0], User(user="nobody")])
            assert (caught.value.status, caught.value.field) == (404, "users[1].user")

            with ThreadPoolExecutor(1) as pool:
                work = pool.submit(client.predict, users[:200])
                waits = []
                while not work.done():
                    start = time.monotonic()
                    assert httpx.get(f"{server.url}/healthz", timeout=10).status_code == 200
                    waits.append(time.monotonic() - start)
                assert len(work.result().answers) == 200
            # on a busy machine a look at health may wait for a processor, but not for the whole of the work
            assert min(waits) < 1.0
    finally:
        server.stop()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/healthz", timeout=2)
