"""Weights of a checkpoint, for whoever predicts: found by its manifests, checked by digest, never from a pickle.

The layout is described in `training.checkpoint`, which writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from lum_ray.artifacts import MANIFEST, UserError, join, read_bytes, read_json

MODEL, LOOP = "model.safetensors", "loop.json"
KEEP = {"last": 2, "best": 1}
"""Complete steps that are kept of each."""


@dataclass(frozen=True)
class Step:
    """A complete step: where its files are, and what they must be (`files`: name -> size, sha256)."""

    uri: str
    step: int
    files: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Weights:
    """What one complete step holds: tensors by name (fp32, on the CPU) and its `loop.json`."""

    tensors: dict[str, torch.Tensor]
    loop: dict[str, Any]


def load(uri: str) -> Weights:
    """The weights at `uri` (a run's checkpoint, or its `best` or `last`), and the loop's record of the same step.

    Of a run the best are taken, or the last where there is no best. A damaged step is passed over only for an older one
    of the same kind: the last are no stand-in for the best. Reads safetensors only. Raises UserError where there is no
    complete checkpoint, or none whose digests match.
    """
    named = uri.rstrip("/").rsplit("/", 1)[-1] in KEEP
    places = [uri] if named else [join(uri, "best"), join(uri, "last")]
    complete = next((found for place in places if (found := steps(place))), [])
    if not complete:
        raise UserError(f"{uri}: expected a checkpoint (best/ or last/), found none; run `lum-ray train` first")
    broken = list[str]()
    for step in complete:
        contents = {name: _checked(step, name, broken) for name in (MODEL, LOOP)}
        model, loop = contents[MODEL], contents[LOOP]
        if model is not None and loop is not None:
            try:
                return Weights(load_safetensors(model), json.loads(loop))
            except (SafetensorError, ValueError) as error:  # whoever wrote it wrote its digest too
                broken.append(f"{step.uri}: not what it should be: {error}")
    raise UserError("no intact checkpoint:\n" + "\n".join(broken[:5]) + "\nrestore it, or train anew with --fresh")


def tensors(uri: str) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file. Raises UserError for anything else."""
    try:
        found: dict[str, torch.Tensor] = load_safetensors(read_bytes(uri))
    except SafetensorError as error:
        raise UserError(f"{uri}: not safetensors ({error}); restore it, or train anew with --fresh") from None
    return found


def fingerprint(uri: str) -> str:
    """The SHA-256 (hex) of the weights that `load` takes first at the checkpoint `uri`. Raises as `load` does."""
    for place in (join(uri, "best"), join(uri, "last")):
        if found := steps(place):
            return str(found[0].files[MODEL]["sha256"])
    raise UserError(f"{uri}: expected a checkpoint (best/ or last/), found none; run `lum-ray train` first")


def _checked(step: Step, name: str, broken: list[str]) -> bytes | None:
    """The file's bytes if its digest is the manifest's; else None, and what is wrong is added to `broken`."""
    try:
        content = read_bytes(join(step.uri, name))
    except FileNotFoundError:
        broken.append(f"{join(step.uri, name)}: missing")
        return None
    if hashlib.sha256(content).hexdigest() != step.files[name]["sha256"]:
        broken.append(f"{join(step.uri, name)}: {len(content)} bytes, other than its digest says")
        return None
    return content


def steps(uri: str) -> list[Step]:
    """The complete steps of `<run>/last` or `<run>/best`, newest first; empty where nothing was saved."""
    try:
        manifest = read_json(join(uri, MANIFEST))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{join(uri, MANIFEST)}: not JSON ({error}); restore it, or train anew with --fresh") from None
    return [Step(join(uri, entry["folder"]), entry["step"], entry["files"]) for entry in manifest["steps"]]
