"""Real Ray nodes on this machine: `ray start` as processes of their own, with their own folder and ports."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
START_S = 180.0
END_S = 20.0


@dataclass(frozen=True)
class Head:
    """URLs of the dashboard, for drivers (`gcs`) and of the node's metrics, and the token that the first two want."""

    address: str
    gcs: str
    metrics: str
    token: str

    @property
    def environment(self) -> dict[str, str]:
        """For a driver that joins it."""
        return {
            **os.environ,
            "RAY_ADDRESS": self.gcs,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_metrics_report_interval_ms": "1000",
            "PYTHONPATH": str(ROOT),
        }

    def get(self, path: str, **params: str) -> Any:
        """The JSON that the dashboard has at `path`. Raises httpx.HTTPError."""
        headers = {"Authorization": f"Bearer {self.token}"}
        reply = httpx.get(f"{self.address}{path}", params=params, headers=headers, timeout=30)
        reply.raise_for_status()
        return reply.json()

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """What the state API lists of `kind` (nodes, actors) that is alive."""
        found = self.get(f"/api/v0/{kind}", detail="1", limit="10000")["data"]["result"]["result"]
        return [row for row in found if row["state"] == "ALIVE"]


@dataclass
class Node:
    """A started node; `id` is Ray's."""

    head: Head
    id: str
    folder: Path
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """SIGKILL to all of its processes, as when a machine loses its power."""
        for process in _tree(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(END_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        """End it in order; what does not end by itself is killed."""
        if self.process.poll() is None:
            tree = _tree(self.process.pid)
            self.process.send_signal(signal.SIGTERM)  # `ray start --block` ends what it started
            for process in psutil.wait_procs(tree, END_S)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait(END_S)
        shutil.rmtree(self.folder, ignore_errors=True)


def start_head(cpus: int, environment: Mapping[str, str] | None = None) -> Node:
    """A head with dashboard, job server, metrics and token. Its processes and their children get `environment`."""
    gcs, dashboard, client, metrics = free_ports(4)
    head = Head(
        f"http://127.0.0.1:{dashboard}",
        f"127.0.0.1:{gcs}",
        f"http://127.0.0.1:{metrics}/metrics",
        secrets.token_hex(24),
    )
    arguments = [
        "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}",
    ]  # fmt: skip
    return _start(head, arguments, cpus, environment or {}, known=set())


def start_worker(head: Head, cpus: int, environment: Mapping[str, str] | None = None) -> Node:
    """A node that joins `head`."""
    (metrics,) = free_ports(1)
    arguments = [f"--address={head.gcs}", f"--metrics-export-port={metrics}"]
    return _start(head, arguments, cpus, environment or {}, known={row["node_id"] for row in head.rows("nodes")})


def _start(head: Head, arguments: list[str], cpus: int, environment: Mapping[str, str], known: set[str]) -> Node:
    """Raises RuntimeError with the end of its log where the dashboard does not list it within START_S."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: a socket's path has at most 107 bytes
    agent, agent_grpc, runtime_env = free_ports(3)
    beside = os.path.dirname(sys.executable)
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    log = folder / "node.log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [
                os.path.join(beside, "ray"), "start", "--block", *arguments, f"--num-cpus={cpus}", "--num-gpus=0",
                f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
                f"--runtime-env-agent-port={runtime_env}", "--node-ip-address=127.0.0.1",
                "--min-worker-port=0", "--max-worker-port=0",  # nodes on one machine must not share a range
                "--object-store-memory=100000000", f"--temp-dir={folder}", "--disable-usage-stats",
            ],
            stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            env={
                **inherited, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token,
                "PATH": f"{beside}:{os.environ['PATH']}", "RAY_metrics_report_interval_ms": "1000", **environment,
            },
        )  # fmt: skip
    node = Node(head, "", folder, process)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError, KeyError, TypeError):
            if new := {row["node_id"] for row in head.rows("nodes")} - known:
                (node.id,) = new
                return node
        time.sleep(0.5)
    text = log.read_text()[-2000:]
    node.kill()
    raise RuntimeError(f"the node does not answer: {text}")


def _tree(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    return []


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports
