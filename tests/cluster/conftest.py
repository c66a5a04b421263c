"""A real Ray head with dashboard, job server, metrics and token, as a process of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

START_S = 180.0


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
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """Three CPUs, no GPU, for the whole session; ended by its own process id."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: a socket's path has at most 107 bytes
    gcs, dashboard, agent, agent_grpc, runtime_env, metrics, client = free_ports(7)
    token = secrets.token_hex(24)
    beside = os.path.dirname(sys.executable)
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PATH": f"{beside}:{os.environ['PATH']}",
        "RAY_metrics_report_interval_ms": "1000",
    }  # fmt: skip
    for name in ("PYTHONPATH", "RAY_ADDRESS"):  # jobs must live on what was sent with them
        environment.pop(name, None)
    with open(os.path.join(folder, "head.log"), "wb") as log:
        process = subprocess.Popen(
            [
                os.path.join(beside, "ray"), "start", "--head", "--block", "--num-cpus=3", "--num-gpus=0",
                f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
                f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
                f"--runtime-env-agent-port={runtime_env}", f"--metrics-export-port={metrics}",
                f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1",
                "--object-store-memory=100000000", f"--temp-dir={folder}", "--disable-usage-stats",
            ],
            stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    found = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", f"http://127.0.0.1:{metrics}/metrics", token)
    try:
        _wait(found, process, os.path.join(folder, "head.log"))
        yield found
    finally:
        process.send_signal(signal.SIGTERM)  # `ray start --block` ends what it started
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(head: Head, process: subprocess.Popen[bytes], log: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            reply = httpx.get(
                f"{head.address}/api/v0/nodes", headers={"Authorization": f"Bearer {head.token}"}, timeout=5
            )
            if reply.status_code == 200 and reply.json()["data"]["result"]["total"] == 1:
                return
        except (httpx.HTTPError, KeyError, TypeError):
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the head does not answer: {Path(log).read_text()[-2000:]}")
