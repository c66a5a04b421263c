"""What a step of a run needs of a cluster, what the cluster has, and what is missing.

Every process takes whole bundles: one CPU, or one CPU and one GPU of the same machine. What an autoscaler may add is in
no interface of Ray, so it is read from the file that describes the cluster: a KubeRay manifest, or that of `ray up`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lum_ray.artifacts import UserError
from lum_ray.config import Run

SUFFIXES = {"m": 1e-3, "": 1.0, "k": 1e3}


@dataclass(frozen=True)
class Machine:
    """CPUs and GPUs that Ray may give away on one machine."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Needs:
    """One CPU and `driver_gpus` (0 or 1) for the driver; `plain` bundles of a CPU, `cards` of a CPU and a GPU."""

    driver_gpus: int = 0
    plain: int = 0
    cards: int = 0

    @property
    def with_gpu(self) -> int:
        return self.cards + self.driver_gpus

    @property
    def bundles(self) -> int:
        return self.plain + self.cards + 1


def needs(run: Run, step: str, gpus: bool) -> Needs:
    """What `step` holds at once at its peak; `gpus`: whether training and evaluation compute on GPUs.

    One worker trains in the driver itself. Ray Data's tasks need a CPU beside the driver's. With `min_workers` a
    training begins with these, as it goes on with them after a loss.
    """
    tasks = 1 if run.data.engine == "ray" else 0
    workers = run.train.workers
    if step == "train" and workers > 1:
        least = run.train.min_workers or workers
        return Needs(cards=least) if gpus else Needs(plain=max(least, tasks))
    if step == "tune":
        return Needs(cards=workers) if gpus else Needs(plain=workers)
    driver_gpus = int(gpus and step in ("train", "evaluate", "audit"))
    return Needs(driver_gpus, plain=tasks)


def missing(wanted: Needs, machines: Sequence[Machine]) -> str | None:
    """What the machines lack for `wanted`, in words; None where it can be placed."""
    with_gpu = sum(min(machine.cpus, machine.gpus) for machine in machines)
    cpus = sum(machine.cpus for machine in machines)
    lacks = []
    if wanted.with_gpu > with_gpu:
        lacks.append(f"{wanted.with_gpu} GPUs, each with a CPU on its machine, of which there are {with_gpu}")
    if wanted.bundles > cpus:
        lacks.append(f"{wanted.bundles} CPUs, of which there are {cpus}")
    return " and ".join(lacks) or None


def alive(nodes: Sequence[Mapping[str, Any]]) -> list[Machine]:
    """The machines of a cluster as its state API lists them."""
    return [
        Machine(int(node["resources_total"].get("CPU", 0)), int(node["resources_total"].get("GPU", 0)))
        for node in nodes
        if node["state"] == "ALIVE"
    ]


def largest(path: str) -> list[Machine]:
    """The machines of a cluster at its largest, from its RayCluster, RayJob, RayService or `ray up` file.

    Raises UserError where the file is none of these, or does not say what a machine has.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as stream:
            documents = [document for document in yaml.safe_load_all(stream) if isinstance(document, dict)]
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--cluster {path}: cannot be read ({' '.join(str(error).split())})") from None
    for document in documents:
        if "available_node_types" in document:
            return _of_launcher(path, document)
        spec = document.get("spec") or {}
        cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
        if "headGroupSpec" in cluster:
            return _of_kuberay(path, cluster)
    raise UserError(
        f"--cluster {path}: expected a RayCluster, RayJob or RayService, or a file of `ray up` with "
        "available_node_types; found neither"
    )


def _of_launcher(path: str, document: Mapping[str, Any]) -> list[Machine]:
    machines: list[Machine] = []
    head = document.get("head_node_type")
    for name, kind in document["available_node_types"].items():
        resources = kind.get("resources") or {}
        if "CPU" not in resources:
            raise UserError(
                f"--cluster {path}: available_node_types.{name}.resources: expected {{CPU: n, GPU: n}}, got "
                f"{resources or 'nothing'}; say what a machine has"
            )
        count = 1 if name == head else int(kind.get("max_workers", document.get("max_workers", 2)))
        machines += [Machine(int(resources["CPU"]), int(resources.get("GPU", 0)))] * count
    return machines


def _of_kuberay(path: str, cluster: Mapping[str, Any]) -> list[Machine]:
    machines = [_machine(path, "headGroupSpec", cluster["headGroupSpec"])]
    for group in cluster.get("workerGroupSpecs") or ():
        count = int(group.get("maxReplicas", 1)) * int(group.get("numOfHosts", 1))
        machines += [_machine(path, str(group.get("groupName")), group)] * count
    return machines


def _machine(path: str, name: str, group: Mapping[str, Any]) -> Machine:
    """What Ray counts in a pod: `rayStartParams` where they say it, else the limits of the Ray container."""
    start = group.get("rayStartParams") or {}
    container = group["template"]["spec"]["containers"][0]
    limits = (container.get("resources") or {}).get("limits") or {}
    cpus = start.get("num-cpus", limits.get("cpu"))
    if cpus is None:
        raise UserError(
            f"--cluster {path}: {name}: neither rayStartParams.num-cpus nor a limit of CPUs; say what a pod has"
        )
    return Machine(math.ceil(_quantity(cpus)), int(start.get("num-gpus", limits.get("nvidia.com/gpu", 0))))


def _quantity(text: Any) -> float:
    """A quantity of Kubernetes (`2`, `500m`) as a number."""
    plain = str(text)
    suffix = plain[-1] if plain[-1] in SUFFIXES else ""
    return float(plain.removesuffix(suffix)) * SUFFIXES[suffix]


def describe(machines: Sequence[Machine]) -> str:
    """`3 machines with 10 CPUs and 2 GPUs`."""
    cpus, gpus = sum(machine.cpus for machine in machines), sum(machine.gpus for machine in machines)
    return f"{len(machines)} machine{'s' if len(machines) != 1 else ''} with {cpus} CPUs and {gpus} GPUs"


def local_paths(run: Run) -> dict[str, str]:
    """The paths of a run that no object store holds, by their field (`root`, `data.events.path`)."""
    data = run.data
    found = {"root": run.root, "data.events.path": data.events.path}
    for name in ("source", "profiles", "calendar", "items", "graph"):
        part = getattr(data, name)
        found[f"data.{name}.path"] = part.path if part is not None else None
    return {field: path for field, path in found.items() if path and ("://" not in path or path[:7] == "file://")}


def check_paths(run: Run, machines: Sequence[Machine]) -> str | None:
    """Raises UserError for relative paths, which mean another folder on the cluster; a warning for local ones, if any
    other machine may be asked for them."""
    local = local_paths(run)
    relative = [f"{field}: {path}" for field, path in local.items() if not path.startswith(("/", "file:///"))]
    if relative:
        raise UserError(
            f"{', '.join(relative[:5])}: expected s3://bucket/path, or an absolute path that every machine of the "
            "cluster sees; a relative path means a temporary folder there. Set it in the run file, or --root and --set"
        )
    if local and len(machines) > 1:
        shown = ", ".join(f"{field}: {path}" for field, path in list(local.items())[:5])
        return f"{shown}: must be one folder that all {len(machines)} machines share, and not one of each"
    return None


def nodes_of(reply: str) -> list[Mapping[str, Any]]:
    """The rows of the state API's reply to `/api/v0/nodes`."""
    rows: list[Mapping[str, Any]] = json.loads(reply)["data"]["result"]["result"]
    return rows
