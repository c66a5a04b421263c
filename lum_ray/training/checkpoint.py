"""Checkpoints: `last/` (to resume) and `best/` (to predict) below a run's URI, on a local disk or an object store.

    <uri>/last/manifest.json                     the complete steps, newest first: folder, files, sizes, sha256
    <uri>/last/<step>-<attempt>/model.safetensors  trainable weights and buffers, fp32, complete
                                loop.json          step, loader position, best value, patience, open averages
                                engine/state.safetensors  what only resuming needs (Engine.state); only in `last`
    <uri>/best/...                                 the same without engine/

Rank 0 writes all of it: what it holds is whole, so any number of workers and any ZeRO stage can go on from it. A thread
hashes and stores, one checkpoint at a time. The manifest is replaced last, and older folders are removed after that; so
a reader always finds a complete step. `last` keeps two of them: should the newest not match its digests, the one before
is taken. There is no pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyarrow import fs
from safetensors.torch import save_file

from lum_ray.artifacts import MANIFEST, UserError, download, join, read_json, remove, storage, upload, write_json
from lum_ray.weights import KEEP, LOOP, MODEL, Step, steps

STATE = "engine/state.safetensors"
WRITING = ".writing"
CHUNK = 1 << 22


@dataclass(frozen=True)
class Resumed:
    """A checked step on this machine: `folder` (local) holds its files, `loop` is its loop.json."""

    step: int
    folder: str
    loop: dict[str, Any]
    temporary: bool
    notes: tuple[str, ...]

    def release(self) -> None:
        """Remove the local copy, if it is one."""
        if self.temporary:
            shutil.rmtree(self.folder)


def resume(uri: str) -> Resumed | None:
    """The newest intact step of `<uri>/last`, or None where nothing was saved.

    Every file is compared with its digest; a step with a missing or changed file is passed over, with a note. Raises
    UserError where steps were saved and none is intact.
    """
    notes = list[str]()
    for step in steps(join(uri, "last")):
        place = storage(step.uri)
        folder = place.path if place.is_local else tempfile.mkdtemp(prefix="lum-ray-resume-")
        problem = _fetch(step, folder, place.is_local)
        if problem is None:
            with open(os.path.join(folder, LOOP), encoding="utf-8") as stream:
                return Resumed(step.step, folder, json.load(stream), not place.is_local, tuple(notes))
        notes.append(f"checkpoint of step {step.step} passed over: {problem}")
        if not place.is_local:
            shutil.rmtree(folder)
    if notes:
        raise UserError("no intact checkpoint to resume from:\n" + "\n".join(notes) + "\ntrain anew with --fresh")
    return None


def _fetch(step: Step, folder: str, local: bool) -> str | None:
    """Bring the files of `step` to `folder` unless they are there; what is wrong with them, or None."""
    for name, expected in sorted(step.files.items()):
        path = os.path.join(folder, name)
        try:
            if not local:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                download(join(step.uri, name), path)
            found = describe(path)
        except FileNotFoundError:
            return f"{name} is missing"
        if found != dict(expected):
            return f"{name} has {found['size']} bytes and another digest than the manifest's ({expected['size']} bytes)"
    return None


def describe(path: str) -> dict[str, Any]:
    """Size and sha256 of a local file."""
    state, size = hashlib.sha256(), 0
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            state.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": state.hexdigest()}


class Writer:
    """Stores the checkpoints of a run in the background, on rank 0. `attempt` makes folder names new."""

    def __init__(self, uri: str, attempt: str) -> None:
        self.uri, self.attempt = uri, attempt
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        weights: Mapping[str, torch.Tensor],
        loop: Mapping[str, Any],
        state: Mapping[str, torch.Tensor] | None,
        best: bool,
    ) -> None:
        """Store step `step`: into `last` (with the engine's `state`), `best`, or both.

        Returns at once; waits first for the checkpoint before. The tensors and `loop` must not change afterwards.
        Raises what the checkpoint before failed with.
        """
        self.join()
        arguments = (step, weights, dict(loop), state, best)
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint-writer")
        self._thread.start()

    def join(self) -> None:
        """Wait until what was given to `save` is stored; raises what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """`join`, then remove scratch folders that a killed attempt left."""
        self.join()
        place = storage(self.uri)
        if place.is_local:
            shutil.rmtree(os.path.join(place.path, WRITING), ignore_errors=True)

    def _run(
        self,
        step: int,
        weights: Mapping[str, torch.Tensor],
        loop: Mapping[str, Any],
        state: Mapping[str, torch.Tensor] | None,
        best: bool,
    ) -> None:
        try:
            # The best first: a `last` already says which step is the best, and is resumed with that.
            if best:
                self._store("best", step, {MODEL: weights}, loop)
            if state is not None:
                self._store("last", step, {MODEL: weights, STATE: state}, loop)
        except BaseException as error:  # handed to the training thread, which raises it in `join`
            self._error = error

    def _store(
        self, which: str, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], loop: Mapping[str, Any]
    ) -> None:
        folder = self._scratch()
        for name, values in tensors.items():
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            save_file(dict(values), os.path.join(folder, name))
        with open(os.path.join(folder, LOOP), "w", encoding="utf-8") as stream:
            json.dump(loop, stream)
        name = f"{step:08d}-{self.attempt}"
        files = _move(folder, join(self.uri, which, name))
        shutil.rmtree(folder)
        entry = {"step": step, "folder": name, "files": files}
        manifest = join(self.uri, which, MANIFEST)
        try:
            before = read_json(manifest)["steps"]
        except FileNotFoundError:
            before = []
        kept = [entry, *(old for old in before if old["step"] < step)][: KEEP[which]]
        write_json(manifest, {"kind": "checkpoint", "steps": kept})
        place = storage(join(self.uri, which))
        for info in place.filesystem.get_file_info(fs.FileSelector(place.path)):
            if info.type == fs.FileType.Directory and info.base_name not in [old["folder"] for old in kept]:
                remove(join(self.uri, which, info.base_name))

    def _scratch(self) -> str:
        """A new local folder, on the disk of the checkpoint where that is local."""
        place = storage(self.uri)
        parent = os.path.join(place.path, WRITING) if place.is_local else None
        if parent:
            os.makedirs(parent, exist_ok=True)
        return tempfile.mkdtemp(prefix=f"{self.attempt}-", dir=parent)


def _move(folder: str, uri: str) -> dict[str, Any]:
    """Bring all files below `folder` to `uri`; their sizes and digests by name."""
    place = storage(uri)
    files = {}
    for parent, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = os.path.join(parent, name)
            relative = os.path.relpath(path, folder).replace(os.sep, "/")
            files[relative] = describe(path)
            if place.is_local:
                target = join(place.path, relative)
                _sync(path)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.move(path, target)
            else:
                upload(path, join(uri, relative))
    return files


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
