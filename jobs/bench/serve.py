"""The endpoint under load: what the stack costs, and the same model behind bare uvicorn and behind Ray Serve as it is.

    python -m jobs.bench.serve [--quick] [--root runs] [--preset lumos_demo] [--repeats 5] [--seconds 10] [--no-haproxy]

Servers run on one core, 64 clients on the other, each asking for one stored user at a time. Rows:
serve/stack/cpu_ms_per_request: ingress and a model that says the same at once (CPU of all processes of the server);
serve/uvicorn/requests_per_s: ours against uvicorn, FastAPI and the same micro-batcher in one process;
serve/ray_default/requests_per_s: ours against one ingress and one model with `@serve.batch`, as Ray's guide has them.
Each measurement starts its server anew, in turn. --quick: lumos_tiny, one short round, unpinned.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.bench.http_load import Load, measure
from jobs.bench.rows import emit, hardware, note, spread
from serve.environment import optimise

SERVERS = ("stack", "ours", "uvicorn", "ray_default")
PATH = "/v1/lumos/predict"
START_S = 240.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--preset", default="lumos_demo")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--haproxy", action=argparse.BooleanOptionalAction, default=True, help="in front of ours")
    parser.add_argument("--only", choices=SERVERS, action="append", help="measure this; repeatable")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--trained", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.serve:
        if chosen.serve in ("stack", "ours"):
            optimise(chosen.haproxy)
        serve_one(chosen.serve, chosen.port, *json.loads(chosen.trained))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives this
    preset, seconds, repeats = chosen.preset, chosen.seconds, chosen.repeats
    if chosen.quick:
        preset, seconds, repeats = "lumos_tiny", 2.0, 1
    checkpoint, state, users = trained(preset, chosen.root)
    bodies = [json.dumps({"users": [{"user": user}]}).encode() for user in users[:512]]
    machine = hardware()  # before this process keeps to one core
    cores = sorted(os.sched_getaffinity(0))
    pinned = not chosen.quick and len(cores) > 1
    if pinned:
        os.sched_setaffinity(0, {cores[0]})
    found: dict[str, list[Load]] = {name: [] for name in chosen.only or SERVERS}
    for _ in range(repeats):
        for name, loads in found.items():
            with Child(name, (checkpoint, state), {cores[1]} if pinned else None, chosen.haproxy) as child:
                warm_s = min(2.0, seconds)
                loads.append(measure(child.url + PATH, bodies, chosen.clients, seconds, warm_s, child.process.pid))
            note(f"{name}: {loads[-1]}")
    run = {"preset": preset, "clients": chosen.clients, "seconds": seconds, "repeats": repeats, "pinned": pinned,
           "haproxy": chosen.haproxy}  # fmt: skip
    show(found, run, machine)
    return 0


def show(found: dict[str, list[Load]], run: dict[str, Any], machine: str) -> None:
    """The rows of what was measured."""
    packages = ("ray", "fastapi", "uvicorn", "torch")
    if stack := found.get("stack"):
        value, low, high = spread([load.cpu_ms_per_request for load in stack])
        latencies = {"p50_ms": spread([load.p50_ms for load in stack])[0], "p99_ms": max(load.p99_ms for load in stack)}
        emit("serve/stack/cpu_ms_per_request", value, "ms", low=low, high=high, machine=machine,
             packages=packages, run={**run, **latencies})  # fmt: skip
    ours = spread([load.requests_per_s for load in found.get("ours", [])] or [float("nan")])
    for name, peer in (("uvicorn", "uvicorn + FastAPI + the same micro-batcher"), ("ray_default", "Ray Serve's guide")):
        if name in found and "ours" in found:
            theirs = spread([load.requests_per_s for load in found[name]])
            emit(f"serve/{name}/requests_per_s", ours[0], "requests/s", peer=peer, ratio=ours[0] / theirs[0],
                 low=ours[1], high=ours[2], machine=machine, packages=packages,
                 run={**run, "peer_requests_per_s": theirs[0]})  # fmt: skip


def trained(preset: str, root: str) -> tuple[str, str, list[str]]:
    """Checkpoint and snapshot of the preset, made where they are missing, and the users."""
    from lum_ray import catalog, config, presets
    from lum_ray.data.state import State
    from lum_ray.steps import publish, train

    raw = config.override(config.dump(presets.PRESETS[preset]()), [f"root={root}", "data.engine=local"])
    run = catalog.read_run(raw)
    checkpoint, state = (os.path.abspath(uri) for uri in (train(run, note), publish(run, note)))
    return checkpoint, state, State.open(state).users()


class Child:
    """A server in a process of its own; `url` answers once it is entered, and all of it has ended once it is left."""

    def __init__(self, name: str, uris: tuple[str, str], cores: set[int] | None, haproxy: bool) -> None:
        self._name, self._uris, self._cores, self._haproxy = name, uris, cores, haproxy

    def __enter__(self) -> Child:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "jobs.bench.serve", "--serve", self._name, "--port", str(port),
                   "--trained", json.dumps(self._uris), "--haproxy" if self._haproxy else "--no-haproxy"]  # fmt: skip
        log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        if self._cores:
            os.sched_setaffinity(self.process.pid, self._cores)  # its children take it over
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=10) as answer:
                    if answer.status == 200:
                        return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        self.__exit__()
        log.seek(0)
        raise RuntimeError(f"{self._name} did not start:\n{log.read().decode()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve_one(name: str, port: int, checkpoint: str, state: str) -> None:
    """Serve until SIGTERM."""
    if name == "uvicorn":
        import uvicorn

        from serve.ingress import create_app
        from serve.live import Live, Loader, Local, Target

        app = create_app({"lumos": Local(Live(Loader("lumos"), Target(checkpoint, state)))})
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
        return
    from lum_ray import config
    from lum_ray.steps.session import start_ray

    start_ray()
    settings = dataclasses.replace(config.Serve(), host="127.0.0.1", port=port)
    if name == "ours":
        from serve.app import Endpoint, run, until_signal

        until_signal(run([Endpoint(checkpoint, state, serve=settings)]))
        return
    from ray import serve

    from jobs.bench import serve_peers
    from serve.app import Server, deploy, in_front, until_signal

    application = (
        in_front({"lumos": serve.deployment(serve_peers.Null, name="lumos").bind()}, {"lumos": 64}, settings)
        if name == "stack"
        else serve_peers.default(checkpoint, state)
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    deploy(application)
    until_signal(Server(f"http://127.0.0.1:{port}", "lum_ray"))


if __name__ == "__main__":
    folder = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.exit(main())
