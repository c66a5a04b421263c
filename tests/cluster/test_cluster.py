"""`make cluster-test`: both models from raw tables to answers on a cluster of three Ray nodes, with S3 as root.

A node dies in training and one in serving. The metrics are those of one machine on which nothing dies.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pyarrow import fs

from jobs.bench.s3_server import s3_server
from lum_ray.artifacts import read_bytes, storage
from lum_ray.data.state import pointer
from lum_ray.weights import steps
from serve.access import new_token
from serve.client import Client
from tests.cluster.nodes import ROOT, Head, Node, free_ports, start_head, start_worker

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
STEPS, KILL_AT = 80, 10
SETTINGS = {
    "lumos_tiny": [
        f"train.steps={STEPS}", "train.batch=256", "train.micro_batch=128", "train.validate_every=40",
        "train.checkpoint_every=5", "train.learning_rate=0.0001",
    ],
    "gts_tiny": [],
}  # fmt: skip
ON_CLUSTER = ["train.workers=2", "train.min_workers=1"]
KINDS, PREFIXES = ("lumos", "gts"), ("/", "/gts")
WHOLE = Counter({(kind, deployment): 2 for kind in KINDS for deployment in ("ingress", kind)})
WAIT_S = 240.0
"""For any one thing that is waited for."""
UNHURT_S = 20.0
"""For how long requests go on after a node of the endpoints died."""


@dataclass
class Told:
    """What has been done, and in how many seconds."""

    began: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        now = time.monotonic()
        print(f"{now - self.began:6.0f} s  {what}: {now - start:.0f} s", flush=True)


@dataclass
class World:
    """The cluster, its nodes that have been started, and the runs' root."""

    head: Head
    nodes: list[Node]
    environment: Mapping[str, str]
    root: str

    def join(self, cpus: int) -> Node:
        node = start_worker(self.head, cpus, self.environment)
        self.nodes.append(node)
        return node


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    """A client's token; the endpoints' nodes know its hash."""
    secret, line = new_token("test")
    monkeypatch.setenv("LUM_RAY_TOKENS", line)
    return secret


@pytest.fixture
def world(tmp_path: Path, token: str) -> Iterator[World]:
    """A head, whose CPU is for the jobs' drivers, and an S3 server."""
    with s3_server(str(tmp_path)) as bucket:
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        nodes = [start_head(1, environment)]
        try:
            yield World(nodes[0].head, nodes, environment, f"{bucket}/runs")
        finally:
            for node in reversed(nodes):
                node.stop()


def test_both_models_from_raw_tables_to_answers_while_nodes_die(world: World, token: str, tmp_path: Path) -> None:
    told = Told()
    with told("two nodes of one CPU join"):
        world.join(1), world.join(1)
    made: dict[str, dict[str, str]] = {}
    for name in SETTINGS:
        with told(f"{name}: prepare"):
            finish(submit(world, name, "prepare"))
        if name == "lumos_tiny":
            with told(f"{name}: train, and lose a node"):
                checkpoint = train_and_lose_a_node(world, name)
                world.join(1)
        else:
            with told(f"{name}: train"):
                checkpoint = finish(submit(world, name, "train"))[0]
        with told(f"{name}: evaluate"):
            report = finish(submit(world, name, "evaluate"))[0]
        with told(f"{name}: publish"):
            state = finish(submit(world, name, "publish"))[0]
        made[name] = {"checkpoint": checkpoint, "report": report, "state": state}
    for name in SETTINGS:
        with told(f"{name}: the same on one machine"):
            alone = one_machine(name, tmp_path / "alone")
        same_metrics(made[name]["report"], alone)
    with told("the nodes of training go, two of two CPUs come"):
        for node in world.nodes[1:]:
            node.stop()
        world.join(2), world.join(2)
    with told("serve deploy of both applications"):
        url = deploy(world, made, tmp_path / "serve.yaml")
    with told("requests, and a node of the endpoints is lost"):
        ask_and_lose_a_node(world, url, token)
    with told("a node comes, and all replicas are there again"):
        world.join(2)
        wait_for(lambda: replicas(world.head) == WHOLE, "all replicas", lambda: applications(world.head))
    print(f"{time.monotonic() - told.began:.0f} s in all")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", *arguments]


def submit(world: World, name: str, step: str) -> subprocess.Popen[str]:
    """`lum-ray submit` of a step, which follows the job."""
    settings = [part for value in [*SETTINGS[name], *ON_CLUSTER] for part in ("--set", value)]
    options = ["--root", world.root, "--address", world.head.address, "--wait-s", "120", *settings]
    return subprocess.Popen(
        command("submit", name, step, *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "RAY_AUTH_TOKEN": world.head.token},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it made, and its log."""
    try:
        out, log = process.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, log = process.communicate()
    assert process.returncode == 0, log
    return out.splitlines()[-1], log


def train_and_lose_a_node(world: World, name: str) -> str:
    """Train on two nodes, of which one dies in the middle; the URI of the checkpoint."""
    _, stays, dies = world.nodes
    job = submit(world, name, "train")

    def went_to(step: int) -> bool:
        assert job.poll() is None, finish(job)
        return saved(world.root, name) >= step

    try:
        wait_for(lambda: went_to(KILL_AT), "a checkpoint")
        assert trainers(world.head) == sorted([stays.id, dies.id])
        dies.kill()
        at = saved(world.root, name)
        wait_for(lambda: went_to(at + 10), "steps of the worker that is left")
        assert trainers(world.head) == [stays.id]
        uri, _ = finish(job)
    finally:
        job.kill()
    assert saved(world.root, name) == STEPS
    return uri


def trainers(head: Head) -> list[str]:
    """The nodes of the training processes."""
    return sorted(row["node_id"] for row in head.rows("actors") if row["class_name"] == "RayTrainWorker")


def saved(root: str, name: str) -> int:
    """The step of the newest checkpoint of the run; 0 before the first."""
    place = storage(f"{root}/checkpoints")
    folders = place.filesystem.get_file_info(fs.FileSelector(place.path, allow_not_found=True))
    found = [step.step for info in folders if name in info.path for step in steps(f"s3://{info.path}/last")]
    return max(found, default=0)


def one_machine(name: str, root: Path) -> str:
    """The report of the same run by one process, without a cluster."""
    settings = [part for value in SETTINGS[name] for part in ("--set", value)]
    process = subprocess.Popen(
        command("evaluate", name, "--root", str(root), *settings),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    return finish(process)[0]


def same_metrics(report: str, other: str) -> None:
    """Every figure to 1e-5. The ends of the intervals to 1e-4: they are of one resample each, in which a user whose
    forecast lies within rounding of another's (AUC), or of a bin's edge (ECE), can count on the other side of it."""
    one, two = (pq.read_table(pa.BufferReader(read_bytes(beside(uri)))) for uri in (report, other))
    assert one.num_rows == two.num_rows > 0
    for column in one.schema:
        values, expected = one[column.name].to_numpy(), two[column.name].to_numpy()
        if pa.types.is_floating(column.type):
            tolerance = 1e-4 if column.name.endswith(("low", "high")) else 1e-5
            np.testing.assert_allclose(values, expected, rtol=tolerance, atol=tolerance, err_msg=column.name)
        else:
            assert values.tolist() == expected.tolist(), column.name


def beside(report: str) -> str:
    return report.replace("report.html", "metrics.parquet")


def deploy(world: World, made: Mapping[str, Mapping[str, str]], file: Path) -> str:
    """`serve deploy` of serve/lumos.yaml and serve/gts.yaml in one file, two replicas each; where the first answers."""
    whole, other = (yaml.safe_load((ROOT / f"serve/{kind}.yaml").read_text()) for kind in KINDS)
    (port,) = free_ports(1)
    whole["http_options"]["port"] = port
    whole["applications"] += other["applications"]
    for application, name, prefix in zip(whole["applications"], SETTINGS, PREFIXES, strict=True):
        args = application["args"]
        args |= {"checkpoint": made[name]["checkpoint"], "state": made[name]["state"]}
        args["pointer"] = pointer(world.root, name)
        args["serve"] |= {"replicas": 2, "max_replicas": 2}
        application["route_prefix"] = prefix
        # spread, so that a machine may go, as in cluster/rayservice-*.yaml
        application["deployments"] = [
            {"name": deployment, "max_replicas_per_node": 1} for deployment in ("ingress", application["name"])
        ]
    file.write_text(yaml.safe_dump(whole))
    binary = os.path.join(os.path.dirname(sys.executable), "serve")
    done = subprocess.run(
        [binary, "deploy", str(file), "--address", world.head.address],
        capture_output=True, text=True, timeout=WAIT_S, cwd=ROOT, env={**os.environ, **world.head.environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wait_for(lambda: replicas(world.head) == WHOLE, "all replicas", lambda: applications(world.head))
    return f"http://127.0.0.1:{port}"


def applications(head: Head) -> dict[str, Any]:
    """What Serve says of its applications, by name."""
    found: dict[str, Any] = head.get("/api/serve/applications/")["applications"]
    return found


def running(head: Head) -> list[tuple[str, str, str]]:
    """(application, deployment, node) of each replica that runs."""
    return [
        (name, deployment, replica["node_id"])
        for name, application in applications(head).items()
        for deployment, state in application["deployments"].items()
        for replica in state["replicas"]
        if replica["state"] == "RUNNING"
    ]


def replicas(head: Head) -> Counter[tuple[str, str]]:
    """How many replicas of each deployment run."""
    return Counter((name, deployment) for name, deployment, _ in running(head))


def ask_and_lose_a_node(world: World, url: str, token: str) -> None:
    """Ask both models in turn while a node with a replica of LUMOS dies: each call is answered, and alike."""
    headers = {"Authorization": f"Bearer {token}"}
    user = httpx.get(f"{url}/v1/lumos/users", params={"limit": 1}, headers=headers, timeout=30).json()["users"][0]
    answers: list[tuple[Any, Any]] = []
    with Client(url, token) as lumos, Client(f"{url}/gts", token) as gts:

        def ask() -> None:
            answers.append((lumos.predict([user]).answers, gts.recommend([user], k=5).answers))

        ask()
        placed = running(world.head)
        dies = next(node for node in world.nodes[-2:] if ("lumos", "lumos", node.id) in placed)
        dies.kill()
        deadline = time.monotonic() + UNHURT_S
        while time.monotonic() < deadline:
            ask()
    print(f"{len(answers)} answers of each model")
    assert all(answer == answers[0] for answer in answers)


def wait_for(condition: Callable[[], bool], what: str, detail: Callable[[], Any] = lambda: "") -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {WAIT_S:.0f} s: {detail()}"
        time.sleep(0.5)
