"""The loader over timelines on a real S3 server: the same steps as from a local disk, and how often a byte is read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lum_ray import artifacts
from lum_ray.artifacts import UserError
from lum_ray.data.loader import Arrays, Loader
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.data.windows import CutPlan
from tests import s3
from tests.s3_proxy import proxied

PLAN = CutPlan(from_day=110, until_day=150, every_days=3, min_history_days=5)
BATCH = 200


@pytest.fixture(scope="module")
def both(
    s3_server: s3.Server, tmp_path_factory: pytest.TempPathFactory, make: Callable[..., Any], write: Callable[..., str]
) -> tuple[str, str]:
    """(local, remote): timelines of 2,500 users, 256 buckets in 3 files."""
    local = write(tmp_path_factory.mktemp("loader") / "t", make(users=2500, seed=3), log2_buckets=8, files=3)
    remote = f"s3://{s3.BUCKET}/loader/t"
    for file in Path(local).rglob("*"):
        if file.is_file():
            artifacts.upload(str(file), f"{remote}/{file.relative_to(local)}")
    return local, remote


def collate(rows: Rows, samples: Samples) -> Arrays:
    return {
        "hash": rows.user_hash[samples.row],
        "cut": samples.cut,
        "days": np.diff(rows.offsets)[samples.row],
        "spent": np.add.reduceat(rows.values[:, 1], rows.offsets[:-1])[samples.row],
        "age": rows.profile["age"][samples.row].astype(float),
    }


def loaders(uri: str, world: int, cache_mib: float = 0.0) -> list[Loader]:
    how: dict[str, Any] = {"batch": BATCH, "micro_batch": 50, "draws": 1, "seed": 1, "world": world}
    opened = Timelines.open(uri)
    return [Loader(opened, PLAN, collate, rank=rank, cache_mib=cache_mib, **how) for rank in range(world)]


def content(loader: Loader, steps: int) -> list[Any]:
    found = [
        [{name: array.tobytes() for name, array in micro.items()} for micro in step.micro_batches]
        for step in itertools.islice(loader, steps)
    ]
    loader.close()
    return found


def stored(local: str) -> int:
    return sum(path.stat().st_size for path in Path(local).rglob("*.parquet"))


@pytest.mark.parametrize("cache_mib", [0.0, 256.0])
def test_steps_from_s3_are_those_from_a_local_disk(both: tuple[str, str], cache_mib: float) -> None:
    local, remote = both
    for here, there in zip(loaders(local, 2, cache_mib), loaders(remote, 2, cache_mib), strict=True):
        assert content(here, 27) == content(there, 27)
        there.seek(5)
        assert content(there, 2) == content(here.seek(5), 2)


def test_a_byte_is_read_once_while_it_fits(both: tuple[str, str]) -> None:
    """Two epochs by two ranks; the second reads nothing. The server says the same as the loaders do."""
    local, remote = both
    server = int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1])
    with proxied(server) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        ranks = loaders(remote, 2)
        for loader in ranks:
            list(itertools.islice(loader, loader.steps_per_epoch))
        first, sent = [loader.stats.bytes_read for loader in ranks], proxy.bytes_sent
        for loader in ranks:
            list(itertools.islice(loader, loader.steps_per_epoch))
            loader.close()
        again = sum(loader.stats.bytes_read for loader in ranks) - sum(first)
    assert 0.95 * stored(local) < sum(first) < 1.2 * stored(local)
    # beside the manifest, each rank reads the last 64 KiB of each of the 4 files to find its footer
    assert sent < 1.2 * stored(local) + 2 * 4 * 65536
    assert again == 0
    assert proxy.bytes_sent - sent < 0.01 * stored(local)


def test_without_room_a_byte_is_read_once_an_epoch(both: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    local, remote = both
    size = stored(local)
    for limit, low, high in ((0.0, 1.5, 2.4), (size / 2**30 / 4, 1.1, 1.7)):  # the latter: half of it in two caches
        monkeypatch.setenv("LUM_RAY_CACHE_GIB", str(limit))
        ranks = loaders(remote, 2)
        for loader in ranks:
            list(itertools.islice(loader, 2 * loader.steps_per_epoch))
            loader.close()
        assert low * size < sum(loader.stats.bytes_read for loader in ranks) < high * size
    monkeypatch.setenv("LUM_RAY_CACHE_GIB", "much")
    with pytest.raises(UserError, match="LUM_RAY_CACHE_GIB: expected a size in GiB such as 16"):
        loaders(remote, 1)


def test_the_cache_has_no_name_and_gives_way_on_a_full_disk(
    both: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    local, remote = both
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (loader,) = loaders(remote, 1)

    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lum_ray.data.range_cache.os.pwrite", full)
    (other,) = loaders(local, 1)
    assert content(loader, 14) == content(other, 14)
    assert not list(tmp_path.iterdir())


def test_a_file_that_goes_missing_is_named(both: tuple[str, str], s3_root: str) -> None:
    local, _ = both
    for file in Path(local).rglob("*"):
        if file.is_file() and file.name != "0001.parquet":
            artifacts.upload(str(file), f"{s3_root}/t/{file.relative_to(local)}")
    (loader,) = loaders(f"{s3_root}/t", 1)
    with pytest.raises(UserError, match=r"0001\.parquet: the manifest of s3://\S+ names this file, but it is not"):
        next(loader)
    loader.close()
