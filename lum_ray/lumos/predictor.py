"""LUMOS answering requests: raw events or a user id in, every behaviour of every coming day out.

The tokenizer, the collate and the model are those of prepare and training; a request differs only in where its rows
come from. Shapes: R requests, C scenarios, F future days, E event rows, S event width without the rhythm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors.torch import load as load_tensors

from lum_ray import config as runs
from lum_ray import weights
from lum_ray.artifacts import UserError, join, open_artifact, read_bytes, read_json
from lum_ray.data.rows import Rows, Samples
from lum_ray.lumos.collate import Calendar
from lum_ray.lumos.config import Inputs, LumosConfig
from lum_ray.lumos.requests import FAR_FUTURE, History, Request, RequestReader
from lum_ray.lumos.stage import Floats, LumosStage, functionals
from lum_ray.stage import to_device

__all__ = ["FAR_FUTURE", "Answer", "Nearness", "Predictor", "Request", "WhatIf"]

FUNCTIONALS = ("p", "mean", "median", "least_mape", "low", "high")
Values = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """`days`: [{day, behaviours: {name: {p | mean, median, low, high}}}]; `horizons`: {name: {...}}.

    Numbers with a gate hold p = P(gate open), the mean over all days, and median, low, high (5 %, 95 %)
    and least_mape (the forecast with the least expected percentage error) given the gate.
    """

    user: str
    cut_day: int | str
    days: list[dict[str, Any]]
    horizons: dict[str, Values]

    def as_dict(self) -> dict[str, Any]:
        return {"user": self.user, "cut_day": self.cut_day, "days": self.days, "horizons": self.horizons}


@dataclass(frozen=True)
class WhatIf:
    """`scenarios`: [{answer, difference, nearer_share, out_of_range}] beside the `baseline`."""

    baseline: Answer
    scenarios: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Nearness:
    """How far a scenario lies from training: distances of event rows to the nearest of the training's."""

    rows: npt.NDArray[np.float32]
    """Distinct event rows (E, S) of training."""
    distances: npt.NDArray[np.float32]
    """For each training cut: the largest distance, over its days, of an event row to the nearest other one."""

    def share(self, rows_FS: npt.NDArray[np.float32]) -> tuple[float, bool]:
        """(share of training cuts that lie nearer, whether it lies farther than all) of a scenario's days."""
        gaps = np.sqrt(((rows_FS[:, None, :] - self.rows[None]) ** 2).sum(axis=2)).min(axis=1)
        distance = float(gaps.max(initial=0.0))
        nearer = float((self.distances < distance - 1e-6).mean()) if len(self.distances) else 1.0
        return nearer, bool(distance > self.distances.max(initial=0.0) + 1e-6)


class Predictor:
    """A checkpoint, loaded. `load` never executes a pickle."""

    def __init__(
        self,
        stage: LumosStage,
        requests: RequestReader,
        info: Mapping[str, Any],
        nearness: Nearness,
        device: torch.device,
    ) -> None:
        self.stage, self.requests, self.info, self.nearness, self.device = stage, requests, info, nearness, device
        stage.module.to(device).eval()

    @classmethod
    def load(
        cls, uri: str, history_of: History | None = None, device: str = "auto", end_day: int | None = None
    ) -> Predictor:
        """The predictor of the checkpoint at `uri` (its best weights).

        `history_of(user ids)` gives the stored rows of those that are known, up to `end_day` (exclusive; default: where
        the training data end), which is the default cut. Raises UserError for a checkpoint that is
        not there, is damaged or belongs to another model.
        """
        record = read_json(join(uri, "run.json")) if _exists(uri) else None
        if record is None:
            raise UserError(f"{uri}: expected a checkpoint, found no run.json; train one with `lum-ray train RUN`")
        if record.get("model") != "lumos":
            raise UserError(f"{uri}: expected a LUMOS checkpoint, got one of {record.get('model')!r}")
        run = runs.read_run(record["run"], {"lumos": LumosConfig})
        inputs = Inputs.from_json(record["inputs"])
        known_until = int(record["end_day"] if end_day is None else end_day)
        trained = weights.load(uri)
        calendar = None
        if record.get("calendar"):
            calendar = _calendar(join(uri.rstrip("/").rsplit("/", 2)[0], "calendar", record["calendar"]))
        stage = LumosStage(run.section, inputs, calendar, FAR_FUTURE, run.split.min_history_days)
        stage.module.load_state_dict(trained.tensors)
        reference = {
            name: value.numpy() for name, value in load_tensors(read_bytes(join(uri, "reference.safetensors"))).items()
        }
        info = {
            "name": run.name, "model": "lumos", "step": trained.loop["step"],
            "checkpoint": uri.rstrip("/").rsplit("/", 1)[-1],
            "behaviours": list(inputs.terms), "event_types": list(inputs.event_types),
            "history_days": run.section.history_days, "future_days": run.section.future_days,
            "start_day": record["start_day"], "end_day": known_until, "event_columns": record["event_columns"],
        }  # fmt: skip
        reader = RequestReader(
            run, stage.calendar.layout, record["event_columns"], record["start_day"], known_until, history_of
        )
        place = (
            torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
        )
        return cls(stage, reader, info, Nearness(reference["event_rows_ES"], reference["distances"]), place)

    @property
    def dated(self) -> bool:
        """Whether days are ISO dates in requests and answers, as in the run file (else day numbers)."""
        return self.requests.dated

    def predict(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request. Raises UserError naming the field of a request that cannot be answered."""
        rows, samples = self.requests.rows(requests)
        with torch.inference_mode():
            batch = self._batch(rows, samples, self._futures(requests, samples))
            found = functionals(self.stage.module, self.stage.module(batch))
        return self._answers(requests, samples, found, 0)

    def what_if(self, requests: Sequence[Request], scenarios: Sequence[Sequence[Mapping[str, Any]]]) -> list[WhatIf]:
        """Each user's prediction under her own calendar and under each scenario; the history is encoded once.

        A scenario's rows replace all that is known of the coming days. Raises UserError as `predict` does.
        """
        rows, samples = self.requests.rows(requests)
        cut = int(samples.cut.min()) if len(samples) else 0
        futures = [self.requests.scenario(rows_of, f"scenarios[{i}]", cut) for i, rows_of in enumerate(scenarios)]
        own = self._futures(requests, samples)
        with torch.inference_mode():
            batch = self._batch(rows, samples, [own[0] if own else self.stage.calendar, *futures])
            found = functionals(self.stage.module, self.stage.module(batch))
        answers = [self._answers(requests, samples, found, column) for column in range(1 + len(scenarios))]
        rhythm = self.stage.inputs.rhythm_width
        rows_ES, index_BCX = batch["event_rows_ES"].cpu().numpy(), batch["future_event_BCX"].cpu().numpy()
        result = []
        for i in range(len(requests)):
            parts = []
            for column in range(1, 1 + len(scenarios)):
                days = rows_ES[index_BCX[i, column, : self.stage.config.future_days], rhythm:]
                share, out_of_range = self.nearness.share(days)
                answer = answers[column][i]
                parts.append({
                    "answer": answer, "difference": _difference(answers[0][i], answer),
                    "nearer_share": share, "out_of_range": out_of_range,
                })  # fmt: skip
            result.append(WhatIf(answers[0][i], parts))
        return result

    def embed(self, requests: Sequence[Request]) -> npt.NDArray[np.float32]:
        """User embeddings (R, D) at each request's cut."""
        rows, samples = self.requests.rows(requests)
        with torch.inference_mode():
            return np.asarray(self.stage.module.embed(self._batch(rows, samples, [])).float().cpu().numpy())

    def _futures(self, requests: Sequence[Request], samples: Samples) -> list[Calendar]:
        """The one calendar that replaces the coming days of all requests, or none."""
        given = [request.calendar for request in requests]
        if all(calendar is None for calendar in given):
            return []
        if any(calendar != given[0] for calendar in given):
            raise UserError(
                "users: expected the same calendar in all users of one call; send the others in a call of their own"
            )
        return [self.requests.scenario(given[0] or [], "users[0].calendar", int(samples.cut.min()))]

    def _batch(self, rows: Rows, samples: Samples, futures: Sequence[Calendar]) -> dict[str, torch.Tensor]:
        return to_device(self.stage.collate(rows, samples, futures), self.device)

    def _answers(
        self,
        requests: Sequence[Request],
        samples: Samples,
        found: tuple[dict[str, Floats], dict[str, Floats]],
        column: int,
    ) -> list[Answer]:
        inputs = self.stage.inputs
        daily, over = found
        width = inputs.daily

        def values(source: Mapping[str, Floats], place: tuple[int, ...], term: int) -> Values:
            named = {name: float(source[name][place]) for name in (("p",) if inputs.binary[term] else FUNCTIONALS)}
            return {name: value for name, value in named.items() if not math.isnan(value)}

        answers = []
        for i, request in enumerate(requests):
            cut = int(samples.cut[i])
            days = []
            for j in range(self.stage.config.future_days):
                named = {name: values(daily, (i, column, j, k), k) for k, name in enumerate(inputs.terms[:width])}
                days.append({"day": self.requests.shown(cut + j), "behaviours": named})
            horizons = {name: values(over, (i, column, k), width + k) for k, name in enumerate(inputs.terms[width:])}
            answers.append(Answer(request.user, self.requests.shown(cut), days, horizons))
        return answers


def _difference(baseline: Answer, scenario: Answer) -> dict[str, Any]:
    """Scenario minus baseline, of p for yes-or-no behaviours and of the mean for numbers."""

    def minus(new: Mapping[str, Values], old: Mapping[str, Values]) -> dict[str, float]:
        return {
            name: new[name].get("mean", new[name].get("p", 0.0)) - old[name].get("mean", old[name].get("p", 0.0))
            for name in new
        }

    return {
        "days": [
            {"day": one["day"], "behaviours": minus(one["behaviours"], other["behaviours"])}
            for one, other in zip(scenario.days, baseline.days, strict=True)
        ],
        "horizons": minus(scenario.horizons, baseline.horizons),
    }


def _exists(uri: str) -> bool:
    try:
        read_bytes(join(uri, "run.json"))
    except FileNotFoundError:
        return False
    return True


def _calendar(uri: str) -> pa.Table:
    """The calendar that the checkpoint was trained with, beside it under the same root."""
    import pyarrow.parquet as pq

    artifact = open_artifact(uri)
    return pq.read_table(pa.BufferReader(read_bytes(join(uri, artifact.manifest["files"][0]["name"]))))
