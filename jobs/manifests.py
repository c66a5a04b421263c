"""Check KubeRay manifests against the CustomResourceDefinitions, strictly: an unknown field is an error, as a typo is.

    python -m jobs.manifests --schemas FOLDER cluster/raycluster.yaml ...

FOLDER holds `ray.io_*.yaml.gz`. An API server would drop an unknown field in silence, and a typo of `limits` with it.
Ray Serve's own schema checks what `serveConfigV2` holds.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jsonschema
import yaml

from lum_ray.artifacts import UserError

METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["name"],
    "additionalProperties": False,
}
"""The API server knows it; a CustomResourceDefinition says only that it is an object."""


def schemas(folder: str) -> dict[str, Any]:
    """The strict JSON schema of each kind, of version v1. Raises UserError where the folder holds none."""
    found = {}
    for name in sorted(glob.glob(os.path.join(folder, "ray.io_*.yaml.gz"))):
        with gzip.open(name, "rt", encoding="utf-8") as stream:
            spec = yaml.load(stream, yaml.CSafeLoader)["spec"]
        version = next(item for item in spec["versions"] if item["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = METADATA
        schema["properties"]["apiVersion"] = {"const": "ray.io/v1"}
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
        found[spec["names"]["kind"]] = schema
    if not found:
        raise UserError(f"{folder}: expected KubeRay's ray.io_*.yaml.gz, found none")
    return found


def strict(node: Mapping[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as a JSON schema that refuses unknown fields."""
    result = {
        key: value for key, value in node.items() if not key.startswith("x-") and key not in ("nullable", "format")
    }
    if "properties" in node:
        result["properties"] = {key: strict(value) for key, value in node["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            result[key] = strict(node[key])
    if node.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
        result.pop("anyOf", None)
    elif node.get("nullable") and "type" in node:
        result["type"] = [node["type"], "null"]
    known = "additionalProperties" in node or node.get("x-kubernetes-preserve-unknown-fields")
    if result.get("type") == "object" and "properties" in node and not known:
        result["additionalProperties"] = False
    return result


def check(path: str, known: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the documents of a manifest, a line each; kinds that KubeRay does not define are left out."""
    with open(path, encoding="utf-8") as stream:
        documents = list(yaml.safe_load_all(stream))
    for document in documents:
        kind = document.get("kind")
        if kind not in known:
            continue
        for error in jsonschema.Draft202012Validator(known[kind]).iter_errors(document):
            place = ".".join(str(part) for part in error.absolute_path) or kind
            yield f"{path}: {place}: {error.message[:200]}"
        yield from (f"{path}: spec.serveConfigV2: {text}" for text in _serve_config(document))


def _serve_config(document: Mapping[str, Any]) -> Iterator[str]:
    text = document["spec"].get("serveConfigV2")
    if text is None:
        return
    from ray.serve.schema import ServeDeploySchema

    # Serve itself ignores what it does not know
    schema = ServeDeploySchema.model_json_schema()
    parts = schema["$defs"]
    for part in (schema, *parts.values()):
        if "properties" in part:
            part["additionalProperties"] = False
    parts["DeploymentSchema"]["properties"]["autoscaling_config"] = {"$ref": "#/$defs/AutoscalingConfig"}
    for error in jsonschema.Draft202012Validator(schema).iter_errors(yaml.safe_load(text)):
        yield f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message[:200]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.manifests", description="Check KubeRay manifests.")
    parser.add_argument("--schemas", required=True, help="the folder of KubeRay's ray.io_*.yaml.gz")
    parser.add_argument("manifests", nargs="+")
    options = parser.parse_args(arguments)
    if not os.path.isdir(options.schemas):
        print(f"skipped: no folder {options.schemas} with KubeRay's schemas; SCHEMAS=FOLDER names it", file=sys.stderr)
        return 0
    try:
        known = schemas(options.schemas)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    wrong = [line for path in options.manifests for line in check(path, known)]
    print("\n".join(wrong) or f"{len(options.manifests)} manifests are valid", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
