"""What a step needs, what a cluster has, and which paths mean the same on both."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.placement import Machine, Needs, alive, check_paths, largest, missing, needs
from lum_ray import catalog, config, presets
from lum_ray.artifacts import UserError


def tiny(*assignments: str) -> config.Run:
    return catalog.read_run(config.override(config.dump(presets.lumos_tiny()), ["root=s3://b/runs", *assignments]))


@pytest.mark.parametrize(
    ("step", "assignments", "gpus", "expected"),
    [
        ("train", [], False, Needs()),
        ("train", [], True, Needs(driver_gpus=1)),  # one worker trains in the driver
        ("train", ["train.workers=4"], True, Needs(cards=4)),
        ("train", ["train.workers=4"], False, Needs(plain=4)),
        ("train", ["train.workers=4", "train.min_workers=2"], False, Needs(plain=2)),
        ("prepare", ["train.workers=4", "data.engine=ray"], True, Needs(plain=1)),
        ("evaluate", ["train.workers=4"], True, Needs(driver_gpus=1)),
        ("tune", ["train.workers=2"], True, Needs(cards=2)),
        ("publish", [], True, Needs()),
    ],
)
def test_needs(step: str, assignments: list[str], gpus: bool, expected: Needs) -> None:
    assert needs(tiny(*assignments), step, gpus) == expected


def test_a_gpu_without_a_cpu_beside_it_is_none() -> None:
    assert missing(Needs(cards=2), [Machine(0, 8), Machine(8, 0), Machine(2, 1)]) == (
        "2 GPUs, each with a CPU on its machine, of which there are 1"
    )
    assert missing(Needs(cards=2), [Machine(2, 2)]) == "3 CPUs, of which there are 2"  # the driver has one too
    assert missing(Needs(cards=2), [Machine(3, 2)]) is None
    assert missing(Needs(), []) == "1 CPUs, of which there are 0"


def test_dead_machines_do_not_count() -> None:
    rows = [
        {"state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": 1.0, "memory": 5.0}},
        {"state": "ALIVE", "resources_total": {"memory": 5.0}},
        {"state": "DEAD", "resources_total": {"CPU": 64.0}},
    ]
    assert alive(rows) == [Machine(8, 1), Machine(0, 0)]


def test_what_a_cluster_file_may_grow_to(tmp_path: Path) -> None:
    def group(cpu: str, **more: object) -> dict[str, object]:
        return {"template": {"spec": {"containers": [{"resources": {"limits": {"cpu": cpu}}}]}}, **more}

    spec = {
        "headGroupSpec": group("500m"),
        "workerGroupSpecs": [group("1500m", groupName="a", maxReplicas=2, numOfHosts=2)],
    }
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump_all([{"kind": "Secret"}, {"kind": "RayJob", "spec": {"rayClusterSpec": spec}}]))
    assert largest(str(file)) == [Machine(1, 0), *[Machine(2, 0)] * 4]
    del spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]  # type: ignore[index]
    file.write_text(yaml.safe_dump({"spec": spec}))
    with pytest.raises(UserError, match=r"a: neither rayStartParams.num-cpus nor a limit of CPUs"):
        largest(str(file))
    file.write_text("{kind: Service}")
    with pytest.raises(UserError, match="expected a RayCluster, RayJob or RayService, or a file of `ray up`"):
        largest(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        largest(str(tmp_path / "none.yaml"))


def test_relative_paths_are_refused_and_local_ones_said_where_there_are_several_machines() -> None:
    one, two = [Machine(4, 0)], [Machine(4, 0)] * 2
    run = tiny("data.profiles.path=profiles", "root=runs")
    with pytest.raises(UserError, match=r"^root: runs, data.profiles.path: profiles: expected s3://bucket/path, or an"):
        check_paths(run, one)
    assert check_paths(tiny("root=/shared/runs"), one) is None
    said = check_paths(tiny("root=/shared/runs"), two)
    assert said == "root: /shared/runs: must be one folder that all 2 machines share, and not one of each"
    assert check_paths(tiny(), two) is None
