"""The Ray Serve application: an ingress (HTTP, limits, deadlines) in front of a model in a process of its own.

`build` makes the application, `lumos` is the builder for `serve deploy serve/lumos.yaml`, `run` starts it on a Ray
that the caller has started, and `until_signal` keeps it up until SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from lum_ray import config
from lum_ray.artifacts import UserError, list_files, open_artifact
from lum_ray.run import STRICT
from serve.ingress import Limits, UnavailableError, create_app
from serve.types import Reply, Rows, Users

NAME = "lumos"
BATCH_WAIT_S = 0.01
INGRESS_CPUS = 0.1
MODEL_CPUS = 1.0
START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Endpoint:
    """The `args` of an application in serve/lumos.yaml."""

    __pydantic_config__: ClassVar = STRICT
    checkpoint: str
    state: str | None = None
    gpus: float = 0.0
    """GPUs of each replica of the model."""
    serve: config.Serve = field(default_factory=config.Serve)


class Lumos:
    """The model's deployment. Calls that arrive within BATCH_WAIT_S of each other share a forward pass."""

    def __init__(self, checkpoint_uri: str, state_uri: str | None, max_batch: int) -> None:
        # torch is imported here: the ingress does without it
        from lum_ray.data.state import State
        from lum_ray.lumos.predictor import Predictor
        from serve.batching import LumosModel

        state = State.open(state_uri) if state_uri else None
        predictor = Predictor.load(
            checkpoint_uri, state.rows if state else None, end_day=state.end_day if state else None
        )
        self._model = LumosModel(predictor, state.end_day if state else None)

        def users(calls: Sequence[Users]) -> int:
            return sum(min(len(call), max_batch) for call in calls)

        batch = serve.batch(max_batch_size=max_batch, batch_wait_timeout_s=BATCH_WAIT_S, batch_size_fn=users)
        self._predict, self._embed = batch(self._model.predict), batch(self._model.embed)

    async def info(self) -> Mapping[str, Any]:
        return self._model.info()

    async def predict(self, users: Users) -> Reply:
        reply: Reply = await self._predict(users)
        return reply

    async def embed(self, users: Users) -> Reply:
        reply: Reply = await self._embed(users)
        return reply

    async def what_if(self, users: Users, scenarios: Sequence[Rows]) -> Reply:
        return await self._model.what_if(users, scenarios)

    def __del__(self) -> None:
        model = getattr(self, "_model", None)
        if model is not None:
            model.close()


class Remote:
    """The model's deployment as the ingress sees it."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def info(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._call("info")
        return found

    async def predict(self, users: Users) -> Reply:
        reply: Reply = await self._call("predict", users)
        return reply

    async def what_if(self, users: Users, scenarios: Sequence[Rows]) -> Reply:
        reply: Reply = await self._call("what_if", users, scenarios)
        return reply

    async def embed(self, users: Users) -> Reply:
        reply: Reply = await self._call("embed", users)
        return reply

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except (RayActorError, BackPressureError, DeploymentUnavailableError) as error:
            raise UnavailableError(str(error).splitlines()[0]) from error


class Ingress:
    """The HTTP deployment; Serve asks it for its ASGI application once it stands in its process."""

    def __init__(self, model: DeploymentHandle, limits: Limits) -> None:
        self._backend, self._limits = Remote(model), limits

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._backend, self._limits)


def build(
    checkpoint_uri: str, state_uri: str | None = None, settings: config.Serve | None = None, gpus: float = 0.0
) -> serve.Application:
    """The application that serves the checkpoint; `state_uri` is the snapshot of histories behind user ids.

    Without a state only users with inline events are answered. Raises UserError where nothing is at a URI.
    """
    settings = settings or config.Serve()
    checkpoint, state = _absolute(checkpoint_uri), _absolute(state_uri) if state_uri else None
    if not any(name.endswith("/run.json") for name in list_files(checkpoint)):
        raise UserError(f"{checkpoint}: expected a checkpoint, found no run.json; train one with `lum-ray train RUN`")
    if state:
        open_artifact(state)
    limits = Limits(max_users=settings.max_users, timeout_s=settings.timeout_s)
    model = serve.deployment(
        Lumos,
        name="model",
        num_replicas=settings.replicas,
        # what waits for a batch counts as ongoing, and the ingress has sent away what is too much
        max_ongoing_requests=2 * limits.max_in_flight,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=settings.timeout_s,
        ray_actor_options={"num_cpus": MODEL_CPUS, "num_gpus": gpus},
    ).bind(checkpoint, state, settings.max_batch)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        max_ongoing_requests=4 * limits.max_in_flight,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=settings.timeout_s,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
    )
    return ingress.bind(model, limits)


def lumos(args: dict[str, Any]) -> serve.Application:
    """The builder that serve/lumos.yaml names. Raises UserError naming the argument that is wrong."""
    endpoint = config.read(Endpoint, args, "args")
    return build(endpoint.checkpoint, endpoint.state, endpoint.serve, endpoint.gpus)


@dataclass(frozen=True)
class Server:
    """An application that answers at `url`."""

    url: str
    name: str

    def stop(self) -> None:
        """Let the requests in flight finish, then end the application and Serve (Ray stays: its owner ends it)."""
        serve.delete(self.name)
        serve.shutdown()


def run(
    checkpoint_uri: str,
    state_uri: str | None = None,
    settings: config.Serve | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Server:
    """Serve on the Ray that is running (`ray.init` is the caller's), and return once /readyz says yes.

    `host` and `port` replace those of `settings`; port 0 takes a free one. Raises UserError where the checkpoint is
    refused, the machines have no room, or nothing answers within `start_timeout_s`; nothing is left running then.
    """
    settings = settings or config.Serve()
    application = build(checkpoint_uri, state_uri, settings)
    host = settings.host if host is None else host
    port = settings.port if port is None else port
    needed = settings.replicas * MODEL_CPUS + INGRESS_CPUS
    have = ray.cluster_resources().get("CPU", 0.0)
    if needed > have:
        raise UserError(
            f"serve.replicas: {settings.replicas} need {needed:g} CPUs, Ray has {have:g}; take fewer, or give it more"
        )
    port = _bindable(host, port)
    # what is wrong with a checkpoint is said here in a second, rather than by a replica after three attempts
    from lum_ray.lumos.predictor import Predictor

    Predictor.load(_absolute(checkpoint_uri), device="cpu")
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port, "request_timeout_s": settings.timeout_s + 10},
        logging_config={"enable_access_log": False},
    )
    shown = "127.0.0.1" if host == "0.0.0.0" else host
    server = Server(f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}", NAME)
    try:
        serve.run_many(
            [serve.RunTarget(application, name=NAME, route_prefix="/", logging_config={"enable_access_log": False})],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        _wait_until_ready(server, time.monotonic() + start_timeout_s)
    except BaseException:
        server.stop()
        raise
    return server


def until_signal(server: Server) -> int:
    """Wait for SIGTERM or SIGINT, then stop the server; the number of the signal. Only in the main thread."""
    came: list[int] = []
    done = threading.Event()

    def stop(number: int, _frame: object) -> None:
        came.append(number)
        done.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not done.wait(1.0):
            pass
        server.stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return came[0]


def _wait_until_ready(server: Server, deadline: float) -> None:
    last = "the application has not been deployed"
    while time.monotonic() < deadline:
        application = serve.status().applications.get(server.name)
        if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reasons = [application.message, *(item.message for item in application.deployments.values())]
            raise UserError(f"{server.name} does not start: {_cause(reasons)}")
        if application is not None and application.status == "RUNNING":
            try:
                reply = httpx.get(f"{server.url}/readyz", timeout=10.0)
                if reply.status_code == 200:
                    return
                last = reply.text
            except httpx.TransportError as error:
                last = str(error)
        elif application is not None:
            last = f"{application.status} {application.message}".strip()
        time.sleep(0.2)
    raise UserError(f"{server.url}: not ready in time: {last}")


def _cause(reasons: Sequence[str]) -> str:
    """Why a replica failed: what its UserError says, else the last line; never the stack above it."""
    for reason in reasons:
        _, found, told = reason.rpartition("UserError: ")
        if found:
            return "\n".join(told.strip().splitlines()[:6])
    lines = [line.strip() for reason in reasons for line in reason.splitlines() if line.strip()]
    return lines[-1] if lines else "Serve gives no reason; see the logs of Ray"


def _absolute(uri: str) -> str:
    """A local path from the driver's folder, which is not that of the replicas."""
    return uri if "://" in uri else os.path.abspath(uri)


def _bindable(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises UserError for one that is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"cannot listen at {host}:{port}: {error.strerror}"
            raise UserError(f"serve.port: {reason}; take another, or 0 for a free one") from None
        return int(probe.getsockname()[1])
