from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lum_ray import config
from lum_ray.artifacts import UserError
from serve.app import Endpoint, _cause, _deployment, build, gts, lumos, run, until_signal

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
    with pytest.raises(UserError, match=r"run\.json: not JSON"):
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


def test_a_model_grows_between_its_bounds() -> None:
    config_of = _deployment(
        "lumos", Endpoint("x", serve=config.Serve(replicas=2, max_replicas=5)), config.Serve()
    )._bound_deployment._deployment_config
    assert (config_of.autoscaling_config.min_replicas, config_of.autoscaling_config.max_replicas) == (2, 5)
    fixed = _deployment("lumos", Endpoint("x", serve=config.Serve(replicas=2)), config.Serve())
    assert fixed._bound_deployment._deployment_config.num_replicas == 2
