"""Fixtures of the whole suite: one Ray session for all tests that need one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from lum_ray.config import Run
from tests import s3

# One thread for every process of the tests: threads of several processes that wait for each other on few cores may
# stall for minutes. Set before torch is loaded, and inherited by what the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray gives its workers way to everything else (niceness 15): on a busy machine they then hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def s3_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    """Where the S3 server will be; the standard variables point there. Workers of Ray know what it was started with."""
    with pytest.MonkeyPatch.context() as patch:
        server = s3.Server(tmp_path_factory.mktemp("s3"))
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def s3_server(s3_place: s3.Server) -> Iterator[s3.Server]:
    """A real S3 server with the bucket `s3.BUCKET`, started on first use."""
    with s3.running(s3_place):
        yield s3_place


@pytest.fixture
def s3_root(s3_server: s3.Server) -> str:
    """A root on S3 that no other test uses."""
    return f"s3://{s3.BUCKET}/{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def ray_session(s3_place: s3.Server) -> Iterator[None]:
    """An embedded Ray of two CPUs, started on first use."""
    import ray

    for attempt in range(2):
        try:
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            break
        except (RuntimeError, TimeoutError):
            # the start has a hard limit of 30 s, which a busy machine may miss once
            if attempt:
                raise
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The preset `lumos_tiny`, trained by the local engine: a real checkpoint over real artifacts, in seconds."""
    from lum_ray import catalog, config, presets
    from lum_ray.steps import train

    root = str(tmp_path_factory.mktemp("tiny"))
    raw = config.override(config.dump(presets.lumos_tiny()), [f"root={root}", "data.engine=local"])
    run = catalog.read_run(raw)
    train(run)
    return run


@pytest.fixture(scope="session")
def tiny_gts(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The preset `gts_tiny` on fewer users, trained by the local engine."""
    from lum_ray import catalog, config, presets
    from lum_ray.steps import train

    raw = config.dump(presets.gts_tiny())
    raw["data"]["source"]["options"] |= {"users": 60}
    small = [f"root={tmp_path_factory.mktemp('tiny_gts')}", "data.engine=local", "gts.align_steps=2", "train.steps=4"]
    run = catalog.read_run(config.override(raw, small))
    train(run)
    return run
