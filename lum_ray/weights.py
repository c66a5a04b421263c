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


def load_weights(uri: str) -> dict[str, torch.Tensor]:
    """The weights at `uri` (a run's checkpoint, or its `best` or `last`), fp32, on the CPU.

    Of a run the best are taken, else the last. Reads safetensors only. Raises UserError where there is no complete
    checkpoint, or none whose digest matches.
    """
    step, content = _newest(uri, MODEL)
    return load_safetensors(content)


def load_loop(uri: str) -> dict[str, Any]:
    """`loop.json` of the checkpoint at `uri` (see `load_weights`)."""
    step, content = _newest(uri, LOOP)
    result: dict[str, Any] = json.loads(content)
    return result


def steps(uri: str) -> list[Step]:
    """The complete steps of `<run>/last` or `<run>/best`, newest first; empty where nothing was saved."""
    try:
        manifest = read_json(join(uri, MANIFEST))
    except FileNotFoundError:
        return []
    except json.JSONDecodeError as error:
        raise UserError(f"{join(uri, MANIFEST)}: not JSON ({error}); restore it, or train anew with --fresh") from None
    return [Step(join(uri, entry["folder"]), entry["step"], entry["files"]) for entry in manifest["steps"]]


def _newest(uri: str, name: str) -> tuple[Step, bytes]:
    places = [uri] if uri.rstrip("/").rsplit("/", 1)[-1] in KEEP else [join(uri, "best"), join(uri, "last")]
    broken = []
    for step in (step for place in places for step in steps(place)):
        try:
            content = read_bytes(join(step.uri, name))
        except FileNotFoundError:
            broken.append(f"{join(step.uri, name)}: missing")
            continue
        if hashlib.sha256(content).hexdigest() == step.files[name]["sha256"]:
            return step, content
        broken.append(f"{join(step.uri, name)}: {len(content)} bytes, other than its digest says")
    if broken:
        raise UserError("no intact checkpoint:\n" + "\n".join(broken[:5]) + "\ntrain anew with --fresh")
    raise UserError(f"{uri}: expected a checkpoint (best/ or last/), found none; run `lum-ray train` first")
