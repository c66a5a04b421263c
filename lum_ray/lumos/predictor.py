"""LUMOS answering requests: raw events or a user id in, every behaviour of every coming day out.

The tokenizer, the collate and the model are those of prepare and training; a request differs only in where its rows
come from. Shapes: R requests, C scenarios, F future days, E event rows, S event width without the rhythm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from lum_ray import config as runs
from lum_ray import weights
from lum_ray.artifacts import UserError, checkpoint_record, join, open_artifact, read_bytes
from lum_ray.data.rows import Rows, Samples
from lum_ray.lumos.collate import Calendar
from lum_ray.lumos.config import Inputs, LumosConfig
from lum_ray.lumos.memories import Memories, single, stacked
from lum_ray.lumos.model import Memory
from lum_ray.lumos.requests import FAR_FUTURE, History, Request, RequestReader
from lum_ray.lumos.stage import LumosStage, functionals
from lum_ray.stage import to_device

__all__ = ["FAR_FUTURE", "Answer", "Nearness", "Predictor", "Request", "WhatIf"]

FUNCTIONALS = ("p", "mean", "median", "least_mape", "low", "high")
RECORDED = ("run", "inputs", "calendar", "start_day", "end_day", "event_columns")
Values = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """`days`: [{day, behaviours: {name: {p | mean, median, low, high}}}]; `horizons`: {name: {...}}.

    Numbers with a gate hold p = P(gate open), the mean over all days, and median, low, high (5 %, 95 %)
    and least_mape (the forecast with the least expected percentage error) given the gate. `attention`, where it was
    asked for: for each day the share that each of the past `history_days` has, oldest first.
    """

    user: str
    cut_day: int | str
    days: list[dict[str, Any]]
    horizons: dict[str, Values]
    attention: list[list[float]] | None = None

    def as_dict(self) -> dict[str, Any]:
        plain = {"user": self.user, "cut_day": self.cut_day, "days": self.days, "horizons": self.horizons}
        return plain if self.attention is None else {**plain, "attention": self.attention}


@dataclass(frozen=True)
class WhatIf:
    """`scenarios`: [{answer, difference, nearer_share, out_of_range}] beside the `baseline`."""

    baseline: Answer
    scenarios: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        scenarios = [{**scenario, "answer": scenario["answer"].as_dict()} for scenario in self.scenarios]
        return {"baseline": self.baseline.as_dict(), "scenarios": scenarios}


@dataclass(frozen=True)
class Nearness:
    """How far a scenario lies from training: distances of event rows to the nearest of the training's."""

    rows: npt.NDArray[np.float32]
    """Distinct event rows (E, S) of training."""
    distances: npt.NDArray[np.float32]
    """For each training cut: the largest distance, over its days, of an event row to the nearest other one."""

    def gaps(self, rows_ES: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The distance (E,) of each event row to the nearest of training's."""
        return np.asarray(np.sqrt(((rows_ES[:, None, :] - self.rows[None]) ** 2).sum(axis=2)).min(axis=1))

    def share(self, gaps_F: npt.NDArray[np.float32]) -> tuple[float, bool]:
        """(share of training cuts that lie nearer, whether it lies farther than all) of a scenario with these gaps."""
        distance = float(gaps_F.max(initial=0.0))
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
        cache_bytes: int = 0,
    ) -> None:
        """`cache_bytes`: of encoded histories that what-if keeps, by user and cut."""
        self.stage, self.requests, self.info, self.nearness, self.device = stage, requests, info, nearness, device
        self.cache_bytes, self.memories = cache_bytes, Memories(cache_bytes)
        stage.module.to(device).eval()

    @classmethod
    def load(
        cls,
        uri: str,
        history_of: History | None = None,
        device: str = "auto",
        end_day: int | None = None,
        cache_bytes: int = 0,
    ) -> Predictor:
        """The predictor of the checkpoint at `uri` (its best weights).

        `history_of(user ids)` gives the stored rows of those that are known, up to `end_day` (exclusive; default: where
        the training data end), which is the default cut. Raises UserError for a checkpoint that is
        not there, is damaged or belongs to another model.
        """
        record = checkpoint_record(uri, ("lumos",), RECORDED)
        run = runs.read_run(record["run"], {"lumos": LumosConfig})
        inputs = Inputs.from_json(record["inputs"])
        known_until = int(record["end_day"] if end_day is None else end_day)
        trained = weights.load(uri)
        calendar = None
        if record["calendar"]:
            calendar = _calendar(join(uri.rstrip("/").rsplit("/", 2)[0], "calendar", record["calendar"]))
        stage = LumosStage(run.section, inputs, calendar, FAR_FUTURE, run.split.min_history_days)
        stage.module.load_state_dict(trained.tensors)
        found = weights.tensors(join(uri, "reference.safetensors"))
        reference = {name: value.numpy() for name, value in found.items()}
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
        nearness = Nearness(reference["event_rows_ES"], reference["distances"])
        return cls(stage, reader, info, nearness, place, cache_bytes)

    def with_history(self, history_of: History | None, end_day: int | None) -> Predictor:
        """The same weights over other stored histories; see `load`."""
        known_until = self.requests.end_day if end_day is None else end_day
        reader = replace(self.requests, history_of=history_of, end_day=known_until)
        info = {**self.info, "end_day": known_until}
        return Predictor(self.stage, reader, info, self.nearness, self.device, self.cache_bytes)

    @property
    def dated(self) -> bool:
        """Whether days are ISO dates in requests and answers, as in the run file (else day numbers)."""
        return self.requests.dated

    def predict(self, requests: Sequence[Request], attention: bool = False) -> list[Answer]:
        """One answer a request. Raises UserError naming the field of a request that cannot be answered."""
        rows, samples = self.requests.rows(requests)
        with torch.inference_mode():
            batch = self._batch(rows, samples, self._futures(requests, samples))
            memory = self.stage.module.encode(batch)
            ahead = (batch["event_rows_ES"], batch["future_event_BCX"], batch["visible_BC"])
            outputs = self.stage.module.decode(memory, *ahead, attention=attention)
        return self._answers(requests, samples, outputs)[0]

    def what_if(
        self, requests: Sequence[Request], scenarios: Sequence[Sequence[Mapping[str, Any]]], attention: bool = False
    ) -> list[WhatIf]:
        """Each user's prediction under her own calendar and under each scenario; the history is encoded once.

        A scenario's rows replace all that is known of the coming days. Raises UserError as `predict` does.
        """
        rows, samples = self.requests.rows(requests)
        cut = int(samples.cut.min()) if len(samples) else 0
        futures = [self.requests.scenario(rows_of, f"scenarios[{i}]", cut) for i, rows_of in enumerate(scenarios)]
        own = self._futures(requests, samples)
        calendars = [own[0] if own else self.stage.ahead, *futures]
        cuts_BC = np.repeat(samples.cut.astype(np.int64)[:, None], len(calendars), axis=1)
        rows_ES, index_BCX = self.stage.futures(rows, samples.row, cuts_BC, calendars)
        with torch.inference_mode():
            visible_BC = torch.full(cuts_BC.shape, self.stage.config.history_days, device=self.device)
            memory = self._encoded(requests, rows, samples)
            event_rows_ES, future_BCX = (torch.from_numpy(part).to(self.device) for part in (rows_ES, index_BCX))
            outputs = self.stage.module.decode(memory, event_rows_ES, future_BCX, visible_BC, attention=attention)
        answers = self._answers(requests, samples, outputs)
        gaps_E = self.nearness.gaps(rows_ES[:, self.stage.inputs.rhythm_width :])
        gaps_BCF = gaps_E[index_BCX[:, :, : self.stage.config.future_days]]
        result = []
        for i in range(len(requests)):
            parts = []
            for column in range(1, 1 + len(scenarios)):
                share, out_of_range = self.nearness.share(gaps_BCF[i, column])
                answer = answers[column][i]
                parts.append({
                    "answer": answer, "difference": _difference(answers[0][i], answer),
                    "nearer_share": share, "out_of_range": out_of_range,
                })  # fmt: skip
            result.append(WhatIf(answers[0][i], parts))
        return result

    def history(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """What the model reads of each request: {user, cut_day, past: [{day, existed, behaviours, events}], coming:
        [{day, events}]}, days in order. Raises UserError as `predict` does."""
        rows, samples = self.requests.rows(requests)
        batch = self.stage.collate(rows, samples, self._futures(requests, samples))
        length, inputs = self.stage.config.history_days, self.stage.inputs
        values_XU = np.zeros((len(requests) * length, len(inputs.behaviours)))  # X = B * T
        units_U = [1.0 if item.kind == "binary" else item.resolution for item in inputs.behaviours]
        values_XU[batch["slot_A"]] = batch["values_AU"] * np.array(units_U)
        values_BTU = values_XU.reshape(len(requests), length, -1)
        events_E = [self._known_events(row) for row in batch["event_rows_ES"]]
        names = [item.name for item in inputs.behaviours]
        found = []
        for i, request in enumerate(requests):
            cut, pads = int(samples.cut[i]), int(batch["pads_B"][i])
            past = [
                {
                    "day": self.requests.shown(cut - length + t), "existed": t >= pads,
                    "behaviours": dict(zip(names, values_BTU[i, t].tolist(), strict=True)),
                    "events": events_E[event],
                }
                for t, event in enumerate(batch["history_event_BT"][i].tolist())
            ]  # fmt: skip
            coming = [
                {"day": self.requests.shown(cut + j), "events": events_E[event]}
                for j, event in enumerate(batch["future_event_BCX"][i, 0].tolist())
            ]
            shown = self.requests.shown(cut)
            found.append({"user": request.user, "cut_day": shown, "past": past, "coming": coming})
        return found

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

    def _encoded(self, requests: Sequence[Request], rows: Rows, samples: Samples) -> Memory:
        """The requests' histories, encoded; those that are stored are kept, and taken from what was kept."""
        if not self.cache_bytes:
            return self.stage.module.encode(self._batch(rows, samples, []))
        found: dict[int, Memory] = {}
        lacking = []
        for i, request in enumerate(requests):
            own = request.events is not None or request.profile is not None
            memory = None if own else self.memories.get((request.user, int(samples.cut[i])))
            if memory is None:
                lacking.append(i)
            else:
                found[i] = memory
        if lacking:
            some = np.array(lacking)
            part = Samples(np.arange(len(some)), samples.cut[some], samples.draw[some])
            encoded = self.stage.module.encode(self._batch(rows.take(some), part, []))
            for place, i in enumerate(lacking):
                found[i] = single(encoded, place)
                if requests[i].events is None and requests[i].profile is None:
                    self.memories.put((requests[i].user, int(samples.cut[i])), found[i])
        return stacked([found[i] for i in range(len(requests))])

    def _known_events(self, row_S: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
        """What an event row says: {event_type, count, value} of each type that is there."""
        layout = self.stage.calendar.layout
        start, width = layout.rhythm_width, len(layout.types)
        counts, sums = row_S[start : start + width], row_S[start + width : start + 2 * width]
        return [
            {"event_type": name, "count": round(float(counts[k])),
             "value": float(sums[k]) * layout.scales[k] / float(counts[k])}
            for k, name in enumerate(layout.types) if counts[k]
        ]  # fmt: skip

    def _batch(self, rows: Rows, samples: Samples, futures: Sequence[Calendar]) -> dict[str, torch.Tensor]:
        return to_device(self.stage.collate(rows, samples, futures), self.device)

    def _answers(
        self,
        requests: Sequence[Request],
        samples: Samples,
        outputs: dict[str, torch.Tensor],
    ) -> list[list[Answer]]:
        """The answers of each cut or scenario."""
        terms, width = self.stage.inputs.terms, self.stage.inputs.daily
        # as lists: reading single figures of arrays would take longer than the decoder
        daily, over = (
            {name: part[name].tolist() for name in FUNCTIONALS}
            for part in functionals(self.stage.module, outputs)
        )  # fmt: skip
        read = outputs.get("attention_BCFT")
        weights = None if read is None else read.cpu().numpy().astype(float).round(6).tolist()
        figures = [("p",) if binary else FUNCTIONALS for binary in self.stage.inputs.binary]

        def values(found: Mapping[str, list[float]], first: int, last: int) -> dict[str, Values]:
            """The terms from `first` to `last`; a figure that means nothing for a term is NaN."""
            return {
                terms[k]: {
                    name: value for name in figures[k] if not math.isnan(value := found[name][k - first])
                }
                for k in range(first, last)
            }  # fmt: skip

        def answer(i: int, column: int) -> Answer:
            cut = int(samples.cut[i])
            days = []
            for j in range(self.stage.config.future_days):
                named = values({name: daily[name][i][column][j] for name in FUNCTIONALS}, 0, width)
                days.append({"day": self.requests.shown(cut + j), "behaviours": named})
            horizons = values({name: over[name][i][column] for name in FUNCTIONALS}, width, len(terms))
            attention = weights[i][column] if weights is not None else None
            return Answer(requests[i].user, self.requests.shown(cut), days, horizons, attention)

        return [[answer(i, column) for i in range(len(requests))] for column in range(len(daily["p"][0]))]


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


def _calendar(uri: str) -> pa.Table:
    """The calendar that the checkpoint was trained with, beside it under the same root."""
    import pyarrow.parquet as pq

    artifact = open_artifact(uri)
    return pq.read_table(pa.BufferReader(read_bytes(join(uri, artifact.manifest["files"][0]["name"]))))
