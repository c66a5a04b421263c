"""The Ray Serve application: an ingress (HTTP, limits, deadlines) in front of models in processes of their own.

`build` makes the application, `lumos` and `gts` are the builders for `serve deploy serve/lumos.yaml` and `gts.yaml`,
`run` starts it on a Ray that the caller has started, and `until_signal` keeps it up until SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from lum_ray import config
from lum_ray.artifacts import UserError, checkpoint_record, open_artifact
from lum_ray.run_data import STRICT
from serve.access import Token, check_exposure, read_tokens
from serve.batching import Batcher
from serve.ingress import Limits, create_app
from serve.remote import BATCHES_IN_FLIGHT, Remote
from serve.types import Body, Reply

NAME = "lum_ray"
KINDS = ("lumos", "gts")
INGRESS_CPUS = 0.1
MODEL_CPUS = 0.8  # so that both models and their ingress have room on two cores
START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Endpoint:
    """One model: the `args` of an application in serve/lumos.yaml and serve/gts.yaml.

    `pointer`: the file that `lum-ray publish` writes; what it says goes before `checkpoint` and `state`, now and later.
    `others`: models of the other kind behind the same ingress, whose settings are those of the first.
    """

    __pydantic_config__: ClassVar = STRICT
    checkpoint: str
    state: str | None = None
    pointer: str | None = None
    gpus: float = 0.0
    """GPUs of each replica of the model."""
    serve: config.Serve = field(default_factory=config.Serve)
    others: tuple[Endpoint, ...] = ()


class Deployed:
    """A model's deployment: batches of several ingress replicas that come while it works are answered together."""

    def __init__(self, kind: str, endpoint: Endpoint) -> None:
        # torch is imported here: the ingress does without it
        from serve.live import Live, Loader, Target

        settings = endpoint.serve
        load = Loader(kind, settings.cache_mib << 20)
        self._live = Live(load, Target(endpoint.checkpoint, endpoint.state), endpoint.pointer)
        self._batcher = Batcher(self._live.reply, settings.max_batch)
        self._watch_s = settings.watch_s
        self._watching: asyncio.Task[None] | None = None

    async def info(self) -> Mapping[str, Any]:
        self._watch()
        return self._live.info()

    async def replies(self, method: str, bodies: Sequence[Body]) -> list[Reply]:
        """A reply for each body, in order."""
        self._watch()
        return list(await asyncio.gather(*(self._batcher.call(method, body) for body in bodies)))

    async def check_health(self) -> None:
        # Serve asks every replica for its health, so that one without requests watches too
        self._watch()

    def _watch(self) -> None:
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._live.watch(self._watch_s))

    def __del__(self) -> None:
        live = getattr(self, "_live", None)
        if live is not None:
            live.close()


class Ingress:
    """The HTTP deployment; Serve asks it for its ASGI application once it stands in its process."""

    def __init__(
        self,
        models: Mapping[str, DeploymentHandle],
        max_batch: Mapping[str, int],
        limits: Limits,
        tokens: Sequence[Token],
        requests_per_s: float,
        share: float,
    ) -> None:
        self._models = {
            name: Remote(handle, max_batch[name], limits.timeout_s, share) for name, handle in models.items()
        }
        self._limits, self._tokens, self._requests_per_s = limits, tokens, requests_per_s

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._models, self._limits, self._tokens, self._requests_per_s)


def build(endpoints: Sequence[Endpoint]) -> serve.Application:
    """The application that serves the models of `endpoints`, at most one of each kind; the first one's `serve` is that
    of the ingress. Without a state only users with events of their own are answered.

    Raises UserError where nothing is at a URI, and where the tokens cannot be read.
    """
    settings = endpoints[0].serve
    models, most = {}, {}
    for endpoint in map(_absolute, endpoints):
        kind = kind_of(endpoint.checkpoint)
        if kind in models:
            raise UserError(f"{endpoint.checkpoint}: expected at most one model of each kind, got two of {kind}")
        if endpoint.state:
            open_artifact(endpoint.state)
        models[kind], most[kind] = _deployment(kind, endpoint, settings), endpoint.serve.max_batch
    return in_front(models, most, settings)


def in_front(
    models: Mapping[str, serve.Application], max_batch: Mapping[str, int], settings: config.Serve
) -> serve.Application:
    """The ingress over the deployments of `models`. Raises UserError where the tokens cannot be read."""
    limits = Limits(max_users=settings.max_users, timeout_s=settings.timeout_s)
    tokens = read_tokens(settings.tokens) if settings.tokens else ()
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=4 * limits.max_in_flight,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=settings.timeout_s,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
    )
    # a call may come to any replica, so each allows its part
    share = 1 / settings.ingress_replicas
    return ingress.bind(models, max_batch, limits, tokens, settings.requests_per_s * share, share)


def _deployment(kind: str, endpoint: Endpoint, ingress: config.Serve) -> serve.Application:
    own = endpoint.serve
    most = own.max_replicas or own.replicas
    scaling: dict[str, Any] = {"num_replicas": own.replicas}
    if most > own.replicas:
        bounds = {"min_replicas": own.replicas, "max_replicas": most}
        delays = {"upscale_delay_s": own.upscale_delay_s, "downscale_delay_s": own.downscale_delay_s}
        scaling = {"autoscaling_config": {**bounds, **delays, "target_ongoing_requests": own.target_batches}}
    return serve.deployment(
        Deployed,
        name=kind,
        # what waits counts as ongoing, and the ingress has sent away what is too much
        max_ongoing_requests=2 * BATCHES_IN_FLIGHT * ingress.ingress_replicas,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=ingress.timeout_s,
        health_check_period_s=min(10.0, own.watch_s),
        ray_actor_options={"num_cpus": MODEL_CPUS, "num_gpus": endpoint.gpus},
        **scaling,
    ).bind(kind, endpoint)


def kind_of(checkpoint: str) -> str:
    """`lumos` or `gts`. Raises UserError where there is no checkpoint of either."""
    return str(checkpoint_record(checkpoint, KINDS)["model"])


def lumos(args: dict[str, Any]) -> serve.Application:
    """The builder that serve/lumos.yaml names. Raises UserError naming the argument that is wrong."""
    return _built("lumos", args)


def gts(args: dict[str, Any]) -> serve.Application:
    """The builder that serve/gts.yaml names. Raises UserError naming the argument that is wrong."""
    return _built("gts", args)


def _built(kind: str, args: dict[str, Any]) -> serve.Application:
    endpoint = config.read(Endpoint, args, "args")
    if not endpoint.serve.tokens and not endpoint.serve.allow_anonymous:
        # where it listens is not for the application to know
        raise UserError("args.serve.tokens: expected tokens (see `lum-ray token`), or allow_anonymous: true beside it")
    if (found := kind_of(endpoint.checkpoint)) != kind:
        raise UserError(f"args.checkpoint: expected a model of {kind}, got one of {found}: {endpoint.checkpoint}")
    return build([endpoint, *endpoint.others])


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
    endpoints: Sequence[Endpoint],
    *,
    host: str | None = None,
    port: int | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Server:
    """Serve on the Ray that is running (`ray.init` is the caller's), and return once /readyz says yes.

    `host` and `port` replace those of the first endpoint's settings; port 0 takes a free one. Raises UserError where a
    checkpoint is refused, others could ask without a token, the machines have no room, or nothing answers within
    `start_timeout_s`; nothing is left running then.
    """
    settings = endpoints[0].serve
    host = settings.host if host is None else host
    port = settings.port if port is None else port
    check_exposure(host, settings.tokens, settings.allow_anonymous)
    application = build(endpoints)
    replicas = sum(endpoint.serve.replicas for endpoint in endpoints)
    needed = replicas * MODEL_CPUS + settings.ingress_replicas * INGRESS_CPUS
    have = ray.cluster_resources().get("CPU", 0.0)
    if needed > have:
        raise UserError(
            f"serve.replicas: {replicas} of models need {needed:g} CPUs with the ingress, Ray has {have:g}; "
            "take fewer, or give it more"
        )
    port = _bindable(host, port)
    # what is wrong with a checkpoint is said here in a second, rather than by a replica after three attempts
    from lum_ray import weights

    for endpoint in endpoints:
        weights.load(endpoint.checkpoint)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # that it starts and ends is said by who calls this
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port, "request_timeout_s": settings.timeout_s + 10},
        logging_config={"enable_access_log": False},
    )
    shown = "127.0.0.1" if host == "0.0.0.0" else host
    server = Server(f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}", NAME)
    try:
        deploy(application)
        _wait_until_ready(server, time.monotonic() + start_timeout_s)
    except BaseException:
        server.stop()
        raise
    return server


def deploy(application: serve.Application) -> None:
    """Hand the application to Serve: its replicas are started, or replaced one after the other where it runs."""
    serve.run_many(
        [serve.RunTarget(application, name=NAME, route_prefix="/", logging_config={"enable_access_log": False})],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


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


def _absolute(endpoint: Endpoint) -> Endpoint:
    """With local paths from the driver's folder on, which is not that of the replicas."""

    def absolute(uri: str | None) -> str | None:
        return uri if uri is None or "://" in uri else os.path.abspath(uri)

    state, pointer = absolute(endpoint.state), absolute(endpoint.pointer)
    return replace(endpoint, checkpoint=absolute(endpoint.checkpoint) or "", state=state, pointer=pointer, others=())


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
