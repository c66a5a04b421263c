"""What a search knows, on the run's root: one folder a trial, `trials/<key>/`.

`params.json` is written before a trial starts, `manifest.json` is committed when it is over, by whoever ends it: the
trial itself where it finished or failed, the driver where it was pruned. This is the truth, and not Ray Tune's own
snapshot (`Tuner.restore`): Tune writes that every few seconds, so that after a SIGKILL trials that had finished since
would run again, and it restarts the others without their Optuna trial. Here a search is rebuilt from small files that
are there or not, on a disk or an object store, and an unfinished trial goes on from its own checkpoint, since that is
named by what shapes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pyarrow import fs

from lum_ray import config
from lum_ray.artifacts import commit, digest, find, join, read_json, storage, write_json
from lum_ray.config import Run
from lum_ray.steps.train import shaping

State = Literal["unfinished", "finished", "pruned", "failed"]


@dataclass(frozen=True)
class Record:
    """A trial. `values`: of the searched settings, none for the run as it is; `value`: of the metric, from prediction
    files where it finished, from its last validation where it was pruned; `curve`: (step, metric) of its validations;
    `checkpoint`, `forecasts`: names below the root's `checkpoints/` and `predictions/`; `train_s`: seconds of its
    training steps and validations."""

    key: str
    number: int
    values: Mapping[str, Any]
    state: State = "unfinished"
    value: float | None = None
    checkpoint: str | None = None
    forecasts: str | None = None
    train_s: float = 0.0
    parameters: int = 0
    curve: tuple[tuple[int, float], ...] = field(default=())
    message: str = ""


def key_of(run: Run) -> str:
    """A trial's name: two ways to the same weights are one trial, on however many workers."""
    plain = config.dump(run) | {"train": shaping(run)}
    plain["data"].pop("engine")
    return digest({name: value for name, value in plain.items() if name not in ("root", "serve", "tune")})


class Ledger:
    """The trials of a search at `uri`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def place(self, key: str) -> str:
        return join(self.uri, "trials", key)

    def start(self, key: str, number: int, values: Mapping[str, Any]) -> Record:
        """Note that a trial is about to run."""
        write_json(join(self.place(key), "params.json"), {"number": number, "values": dict(values)})
        return Record(key, number, dict(values))

    def trains(self, key: str, checkpoint: str) -> None:
        """Note where a trial's checkpoint is."""
        write_json(join(self.place(key), "checkpoint.json"), checkpoint)

    def end(self, key: str, state: State, **found: Any) -> None:
        """Commit how a trial ended; what was committed first stays."""
        commit(self.place(key), {"kind": "trial", "digest": key, "state": state, **found})

    def read(self, key: str) -> Record:
        params = read_json(join(self.place(key), "params.json"))
        ended = find(self.place(key))
        found: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):
            found["checkpoint"] = read_json(join(self.place(key), "checkpoint.json"))
        if ended is not None:
            found |= {name: value for name, value in ended.manifest.items() if name not in ("kind", "digest")}
            found["curve"] = tuple((int(step), float(value)) for step, value in found.get("curve", ()))
        return Record(key, int(params["number"]), params["values"], **found)

    def records(self) -> list[Record]:
        """All trials by number."""
        place = storage(join(self.uri, "trials"))
        selector = fs.FileSelector(place.path, allow_not_found=True, recursive=True)
        keys = {info.path.rsplit("/", 2)[-2] for info in place.filesystem.get_file_info(selector)
                if info.base_name == "params.json"}  # fmt: skip
        return sorted(map(self.read, keys), key=lambda record: (record.number, record.key))
