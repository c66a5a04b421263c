"""cluster/*.yaml: KubeRay's and Serve's own schemas, and what no schema knows."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs import placement
from jobs.manifests import _serve_config, check, main, schemas
from lum_ray import config

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted(ROOT.glob("cluster/ray*.yaml"))
FOLDER = Path(os.environ.get("KUBERAY_SCHEMAS") or ROOT.parent / "shared/schemas/kuberay")


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    if not FOLDER.is_dir():
        pytest.skip(f"no folder {FOLDER}; KUBERAY_SCHEMAS names it")
    return schemas(str(FOLDER))


def documents(name: str) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all((ROOT / "cluster" / name).read_text())


def cluster_of(path: Path) -> dict[str, Any]:
    spec: dict[str, Any] = next(documents(path.name))["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def groups(path: Path) -> list[dict[str, Any]]:
    cluster = cluster_of(path)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_there_are_manifests() -> None:
    names = ["raycluster.yaml", "rayjob.yaml", "rayservice-gts.yaml", "rayservice-lumos.yaml"]
    assert [path.name for path in MANIFESTS] == names


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_valid_and_a_typo_in_it_is_not(path: Path, known: dict[str, Any], tmp_path: Path) -> None:
    assert list(check(str(path), known)) == []
    bad = tmp_path / path.name
    for right, wrong in [
        ("readinessProbe:", "readynessProbe:"),
        ("maxReplicas:", "maxReplica:"),
        ("limits:", "limit:"),
    ]:
        text = path.read_text()
        assert right in text
        bad.write_text(text.replace(right, wrong))
        found = list(check(str(bad), known))
        assert any(f"'{wrong.rstrip(':')}' was unexpected" in line for line in found), (wrong, found)
    bad.write_text(re.sub(r"maxReplicas: \d+", "maxReplicas: many", path.read_text()))
    assert any("maxReplicas: 'many' is not of type 'integer'" in line for line in check(str(bad), known))


def test_without_schemas_the_command_says_that_it_was_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--schemas", str(tmp_path / "none"), str(MANIFESTS[0])]) == 0
    assert "skipped: no folder" in capsys.readouterr().err
    assert main(["--schemas", str(tmp_path), str(MANIFESTS[0])]) == 2


@pytest.mark.parametrize("model", ["lumos", "gts"])
def test_what_serve_is_told_is_what_the_application_takes(model: str) -> None:
    document = next(documents(f"rayservice-{model}.yaml"))
    assert list(_serve_config(document)) == []
    deploy = yaml.safe_load(document["spec"]["serveConfigV2"])
    (application,) = deploy["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    endpoint = config.read(importlib.import_module("serve.app").Endpoint, application["args"], "args")
    assert endpoint.serve.timeout_s < deploy["http_options"]["request_timeout_s"]
    assert endpoint.serve.tokens and endpoint.serve.replicas >= 2 and endpoint.serve.ingress_replicas >= 2
    assert application["deployments"] == [{"name": name, "max_replicas_per_node": 1} for name in ("ingress", model)]


def test_a_typo_in_the_serve_config_is_found() -> None:
    document = next(documents("rayservice-lumos.yaml"))
    document["spec"]["serveConfigV2"] = document["spec"]["serveConfigV2"].replace("_per_node:", "_a_node:")
    assert [line for line in _serve_config(document) if "'max_replicas_a_node' was unexpected" in line]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_pod_has_limits_probes_and_no_rights(path: Path) -> None:
    for group in groups(path):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"containerPort": 8080, "name": "metrics"} in container["ports"]
        assert group["rayStartParams"]["metrics-export-port"] == "8080"
        assert pod["terminationGracePeriodSeconds"] >= 60
    head, *workers = groups(path)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert all(worker["template"]["spec"]["serviceAccountName"] == "lum-ray-worker" for worker in workers)
    cards = [worker for worker in workers if "nvidia.com/gpu" in str(worker)]
    assert all(worker["template"]["spec"]["tolerations"] for worker in cards)
    cluster = cluster_of(path)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "lum-ray-token"}
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    # a job's head may forget: its steps go on from artifacts
    assert ("gcsFaultToleranceOptions" in cluster) == (path.name != "rayjob.yaml")


@pytest.mark.parametrize("path", [*MANIFESTS, ROOT / "cluster/access.yaml", ROOT / "cluster/launcher.yaml"], ids=str)
def test_secrets_come_by_reference(path: Path) -> None:
    for name, value in _leaves(list(documents(path.name))):
        secret = re.search(r"password|token$|secret_?(access)?_?key$", name, re.I)
        assert not secret or not isinstance(value, str) or value.startswith("~/"), name


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, name)
    else:
        yield name, node


def test_the_network_and_the_disruption_budget_select_pods_that_are_there() -> None:
    found = {document["kind"]: document for document in documents("access.yaml")}
    labels = [
        {**group["template"]["metadata"]["labels"], "ray.io/group": group.get("groupName", "headgroup")}
        for path in MANIFESTS
        for group in groups(path)
    ]
    policy = found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()
    assert all(policy <= item.items() for item in labels)
    budget = found["PodDisruptionBudget"]["spec"]
    # KubeRay's pods have no controller with a scale: a budget may count only what must stay
    assert budget["minAvailable"] == 1 and "maxUnavailable" not in budget
    serving = [item for item in labels if budget["selector"]["matchLabels"].items() <= item.items()]
    assert {item["ray.io/group"] for item in serving} == {"serving"}
    assert found["ServiceAccount"]["metadata"]["name"] == "lum-ray-worker"


def test_the_launcher_file_is_what_ray_up_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (document,) = documents("launcher.yaml")
    validate_config(prepare_config(document))
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**document, "max_worker": 3})
    head, *rest = placement.largest(str(ROOT / "cluster/launcher.yaml"))
    assert head == placement.Machine(0, 0) and sum(machine.gpus for machine in rest) == 8


def test_the_largest_cluster_of_a_manifest() -> None:
    machines = placement.largest(str(ROOT / "cluster/raycluster.yaml"))
    assert placement.describe(machines) == "25 machines with 192 CPUs and 8 GPUs"


def test_versions_agree() -> None:
    lock = dict(line.split("==") for line in (ROOT / "cluster/requirements.lock").read_text().split())
    assert {cluster_of(path)["rayVersion"] for path in MANIFESTS} == {lock["ray"]}
    text = " ".join(path.read_text() for path in [*MANIFESTS, ROOT / "cluster/launcher.yaml"])
    minor = re.search(r'__version__ = "(\d+\.\d+)', (ROOT / "lum_ray/__init__.py").read_text())
    assert minor and set(re.findall(r"image: (\S+)", text)) == {f"lum-ray:{minor[1]}-cpu", f"lum-ray:{minor[1]}-cuda"}
