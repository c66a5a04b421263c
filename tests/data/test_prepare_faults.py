"""prepare under kills, a failing store, a full disk and a second driver: always one artifact, the undisturbed one.

While the fault goes on, a reader polls: as soon as it finds the artifact, every file of it must be there and whole.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from lum_ray import artifacts
from lum_ray.artifacts import UserError, join, storage
from tests import s3
from tests.data import prepare_driver
from tests.s3_proxy import proxied

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120


@dataclass(frozen=True)
class World:
    """Raw tables, what prepare makes of them undisturbed, and how long that takes."""

    events: str
    profiles: str
    expected: dict[str, bytes]
    takes_s: float

    def prepare(self, uri: str, engine: str = "local") -> None:
        prepare_driver.prepare(self.events, self.profiles, uri, engine)

    def start(self, uri: str) -> subprocess.Popen[str]:
        """A driver in a process of its own that is about to begin."""
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.data.prepare_driver", self.events, self.profiles, uri],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert driver.stdout is not None
        assert driver.stdout.readline() == "go\n"
        return driver


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root, draw = tmp_path_factory.mktemp("faults"), np.random.default_rng(0)
    count, users = 3000, 150
    events = pa.table(
        {
            "user": [f"user-{number}" for number in draw.integers(0, users, count)],
            "time": pa.array(draw.integers(0, 60, count), pa.int32()),
            "price": draw.integers(0, 10_000, count) / 100,
            "shop": [f"shop-{number}" for number in draw.integers(0, 5, count)],
        }
    )
    events = pa.concat_tables([events, events.slice(0, 1).set_column(2, "price", pa.array([float("nan")]))])
    people = pa.table(
        {"user": [f"user-{n}" for n in range(users)], "age": np.arange(users) * 0.5, "town": ["Ulm"] * users}
    )
    for name, table in (("events", events), ("profiles", people)):
        (root / name).mkdir()
        pq.write_table(table, root / name / "0000.parquet", row_group_size=200)
    uri = str(root / "timelines" / "0123456789ab")
    started_at = time.monotonic()
    prepare_driver.prepare(str(root / "events"), str(root / "profiles"), uri)
    takes_s = time.monotonic() - started_at
    found = content(uri)
    assert "manifest.json" in found and "rejects/0000.parquet" in found and len(found) > 10
    return World(str(root / "events"), str(root / "profiles"), found, takes_s)


def content(uri: str) -> dict[str, bytes]:
    """Every file below `uri`, whatever its name."""
    place = storage(uri)
    found = place.filesystem.get_file_info(fs.FileSelector(place.path, recursive=True))
    names = [info.path[len(place.path) + 1 :] for info in found if info.is_file]
    return {name: artifacts.read_bytes(join(uri, name)) for name in names}


@contextlib.contextmanager
def watched(world: World, uri: str) -> Iterator[None]:
    """Polls the artifact meanwhile; afterwards there is exactly it, as undisturbed."""
    over, wrong = threading.Event(), list[str]()

    def poll() -> None:
        while not over.wait(0.02):
            # a store that is away for longer than it is tried is no partial artifact
            with contextlib.suppress(UserError):
                if artifacts.find(uri) is None:
                    continue
                for name, expected in world.expected.items():
                    try:
                        if artifacts.read_bytes(join(uri, name)) != expected:
                            wrong.append(f"{name} differs")
                    except FileNotFoundError:
                        wrong.append(f"{name} is missing")

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join(TIMEOUT_S)
    assert wrong == []
    assert content(uri) == world.expected
    siblings = storage(uri.rpartition("/")[0])
    assert len(siblings.filesystem.get_file_info(fs.FileSelector(siblings.path))) == 1


def place(root: str) -> str:
    return join(root, uuid.uuid4().hex[:8], "timelines", "0123456789ab")


def kill_driver(world: World, root: str, seed: int) -> None:
    """SIGKILL at a random moment, then the same again."""
    uri, draw = place(root), random.Random(seed)
    with watched(world, uri):
        driver = world.start(uri)
        time.sleep(draw.uniform(0, world.takes_s))
        driver.kill()
        driver.communicate(timeout=TIMEOUT_S)
        world.prepare(uri)


def kill_worker(world: World, root: str, seed: int) -> None:
    """SIGKILL of one of Ray's workers at a random moment: the driver does not even notice."""
    uri, draw = place(root), random.Random(seed)
    with watched(world, uri):
        failed: list[BaseException] = []

        def drive() -> None:
            try:
                world.prepare(uri, "ray")
            except BaseException as error:
                failed.append(error)

        driver = threading.Thread(target=drive)
        driver.start()
        moment, killed = draw.uniform(0, 0.3), False
        while driver.is_alive() and not killed:
            if busy := busy_workers():
                time.sleep(moment)
                for victim in draw.sample(busy, len(busy)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        victim.kill()
                        killed = True
                        break
            time.sleep(0.01)
        driver.join(TIMEOUT_S)
        assert failed == []
        assert killed
        assert not driver.is_alive()


def busy_workers() -> list[psutil.Process]:
    """The processes below this one that are at a task of ours; Ray names a worker after its task."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::Map"):
                found.append(child)
    return found


def kill_server(world: World, server: s3.Server, seed: int) -> None:
    """SIGKILL of the store at a random moment; it comes back on the same disk after a while."""
    uri, draw = place(f"s3://{s3.BUCKET}"), random.Random(seed)

    def interrupt() -> None:
        time.sleep(draw.uniform(0, world.takes_s))
        server.kill()
        time.sleep(draw.uniform(0.5, 2))
        server.start()

    with watched(world, uri):
        away = threading.Thread(target=interrupt)
        away.start()
        try:
            world.prepare(uri)
        finally:
            away.join(TIMEOUT_S)


def two_drivers(world: World, root: str) -> None:
    uri = place(root)
    with watched(world, uri):
        drivers = [world.start(uri), world.start(uri)]
        said = [driver.communicate(timeout=TIMEOUT_S) for driver in drivers]
        assert [driver.returncode for driver in drivers] == [0, 0], said


def failing_requests(world: World, server: s3.Server, seed: int, share: float) -> None:
    uri = place(f"s3://{s3.BUCKET}")
    with proxied(server.ports[3], share, seed) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with watched(world, uri):
            world.prepare(uri)
        assert proxy.failures > 5


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of its own of that size."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no right to mount a small disk here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_killed_driver(world: World, tmp_path: Path) -> None:
    kill_driver(world, str(tmp_path), 0)


def test_a_killed_worker(world: World, tmp_path: Path, ray_session: None) -> None:
    kill_worker(world, str(tmp_path), 0)


def test_a_killed_store(world: World, s3_server: s3.Server) -> None:
    kill_server(world, s3_server, 0)


def test_two_drivers_on_s3(world: World, s3_root: str) -> None:
    two_drivers(world, s3_root)


def test_some_requests_fail(world: World, s3_server: s3.Server) -> None:
    failing_requests(world, s3_server, 0, 0.05)


def test_a_full_disk_is_named_and_nothing_is_committed(world: World, tmp_path: Path) -> None:
    """The disk fills up midway; once there is room, the same again makes the artifact."""
    with small_disk(tmp_path / "disk", 8 << 10) as disk:
        uri = str(disk / "timelines" / "0123456789ab")
        filler = disk / "filler"
        filler.write_bytes(bytes((8 << 20) - (200 << 10)))
        driver = world.start(uri)
        _, errors = driver.communicate(timeout=TIMEOUT_S)
        assert driver.returncode == 1
        assert "No space left on device" in errors and f"MiB free on the disk of {disk}" in errors
        assert "Traceback" not in errors
        assert artifacts.find(uri) is None
        assert not [name for name in content(uri) if name.endswith(".tmp")]
        filler.unlink()
        with watched(world, uri):
            world.prepare(uri)


def test_a_file_that_may_not_grow_is_said(world: World, tmp_path: Path) -> None:
    """A limit of the file's size, as a quota: no rights are needed to provoke it."""
    import resource

    uri = place(str(tmp_path))
    driver = world.start(uri)
    resource.prlimit(driver.pid, resource.RLIMIT_FSIZE, (2000, 2000))
    _, errors = driver.communicate(timeout=TIMEOUT_S)
    assert driver.returncode == 1
    assert "File too large" in errors
    assert artifacts.find(uri) is None
    with watched(world, uri):
        world.prepare(uri)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_twenty_kills(world: World, tmp_path: Path, s3_server: s3.Server, s3_root: str, ray_session: None) -> None:
    for seed in range(1, 9):
        kill_driver(world, s3_root if seed % 2 else str(tmp_path), seed)
    for seed in range(1, 7):
        kill_worker(world, s3_root if seed % 2 else str(tmp_path), seed)
    for seed in range(1, 7):
        kill_server(world, s3_server, seed)


@pytest.mark.faults
def test_two_drivers_again_and_again(world: World, tmp_path: Path, s3_root: str) -> None:
    for root in (s3_root, str(tmp_path)) * 2:
        two_drivers(world, root)


@pytest.mark.faults
@pytest.mark.parametrize(("seed", "share"), [(1, 0.05), (2, 0.05), (3, 0.05), (4, 0.2)])
def test_more_requests_fail(world: World, s3_server: s3.Server, seed: int, share: float) -> None:
    failing_requests(world, s3_server, seed, share)
