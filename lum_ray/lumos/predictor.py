"""LUMOS answering requests: raw events or a user id in, every behaviour of every coming day out.

The tokenizer, the collate and the model are those of prepare and training; a request differs only in where its rows
come from. Shapes: R requests, C scenarios, F future days, V daily terms, H horizon terms, E event rows.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors.torch import load as load_tensors

from lum_ray import config as runs
from lum_ray.artifacts import UserError, join, read_bytes, read_json
from lum_ray.data.reader import rows_from_tables
from lum_ray.data.rows import Rows, Samples
from lum_ray.data.schema import clean_events
from lum_ray.lumos.collate import Calendar
from lum_ray.lumos.config import Inputs, LumosConfig
from lum_ray.lumos.stage import Floats, LumosStage, functionals, layout_of
from lum_ray.lumos.timelines import tokenize
from lum_ray.stage import to_device
from lum_ray.weights import load_loop, load_weights

FUNCTIONALS = ("p", "mean", "median", "low", "high")
Values = dict[str, float]
FAR_FUTURE = 2**31 - 1


@dataclass(frozen=True)
class Request:
    """One user. `events` are raw rows as in the event table (without the user column); they join what is stored of the
    user, if anything is. `calendar` replaces what is known of the coming days: {event_type, start_day, end_day, value}.
    Days are ISO dates or day numbers, as in the run file; `cut_day` defaults to the day after the stored history.
    """

    user: str
    cut_day: int | str | None = None
    events: Sequence[Mapping[str, Any]] | None = None
    profile: Mapping[str, Any] | None = None
    calendar: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Answer:
    """`days`: [{day, behaviours: {name: {p | mean, median, low, high}}}]; `horizons`: {name: {...}}.

    Numbers with a gate hold p = P(gate open), the mean over all days, and median, low, high (5 %, 95 %) given the gate.
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

    rows_ES: npt.NDArray[np.float32]
    distances: npt.NDArray[np.float32]
    """For each training cut: the largest distance, over its days, of an event row to the nearest other one."""

    def share(self, rows_FS: npt.NDArray[np.float32]) -> tuple[float, bool]:
        """(share of training cuts that lie nearer, whether it lies farther than all) of a scenario's days."""
        gaps = np.sqrt(((rows_FS[:, None, :] - self.rows_ES[None]) ** 2).sum(axis=2)).min(axis=1)
        distance = float(gaps.max(initial=0.0))
        nearer = float((self.distances < distance - 1e-6).mean()) if len(self.distances) else 1.0
        return nearer, bool(distance > self.distances.max(initial=0.0) + 1e-6)


class Predictor:
    """A checkpoint, loaded. `load` never executes a pickle."""

    def __init__(
        self,
        stage: LumosStage,
        run: runs.Run,
        info: Mapping[str, Any],
        nearness: Nearness,
        history_of: Callable[[Sequence[str]], dict[str, Rows]] | None,
        device: torch.device,
    ) -> None:
        self.stage, self.run, self.info, self.nearness = stage, run, info, nearness
        self.history_of, self.device = history_of, device
        self.dated = any(
            isinstance(day, str)
            for part in (run.split.train, run.split.validate, run.split.test)
            for day in (part.from_day, part.until_day)
        )
        stage.module.to(device).eval()

    @classmethod
    def load(
        cls, uri: str, history_of: Callable[[Sequence[str]], dict[str, Rows]] | None = None, device: str = "auto"
    ) -> Predictor:
        """The predictor of the checkpoint at `uri` (its best weights).

        `history_of(user ids)` gives the stored rows of those that are known. Raises UserError for a checkpoint that is
        not there, is damaged or belongs to another model.
        """
        record = read_json(join(uri, "run.json")) if _exists(uri) else None
        if record is None:
            raise UserError(f"{uri}: expected a checkpoint, found no run.json; train one with `lum-ray train RUN`")
        if record.get("model") != "lumos":
            raise UserError(f"{uri}: expected a LUMOS checkpoint, got one of {record.get('model')!r}")
        run = runs.read_run(record["run"], {"lumos": LumosConfig})
        inputs = Inputs.from_json(record["inputs"])
        weights, step = load_weights(uri), int(load_loop(uri)["step"])
        calendar = None
        if record.get("calendar"):
            calendar = _read_table(join(_root(uri), "calendar", record["calendar"], "0000.parquet"))
        stage = LumosStage(run.section, inputs, calendar, FAR_FUTURE, run.split.min_history_days)
        stage.module.load_state_dict(weights)
        reference = {name: value.numpy() for name, value in load_tensors(read_bytes(join(uri, "reference.safetensors"))).items()}
        info = {
            "name": run.name, "checkpoint": uri.rstrip("/").rsplit("/", 1)[-1], "step": step, "model": "lumos",
            "behaviours": list(inputs.terms), "event_types": list(inputs.event_types),
            "history_days": run.section.history_days, "future_days": run.section.future_days,
            "start_day": record["start_day"], "end_day": record["end_day"], "event_columns": record["event_columns"],
        }  # fmt: skip
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
        return cls(stage, run, info, Nearness(reference["event_rows_ES"], reference["distances"]), history_of, place)

    def predict(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request. Raises UserError naming the field of a request that cannot be answered."""
        rows, samples = self.rows(requests)
        with torch.inference_mode():
            batch = self._batch(rows, samples, self._futures(requests, samples))
            found = functionals(self.stage.module, self.stage.module(batch))
        return self._answers(requests, samples, found, 0)

    def what_if(
        self, requests: Sequence[Request], scenarios: Sequence[Sequence[Mapping[str, Any]]]
    ) -> list[WhatIf]:
        """Each user's prediction under her own calendar and under each scenario; the history is encoded once.

        A scenario's rows replace all that is known of the coming days. Raises UserError as `predict` does.
        """
        rows, samples = self.rows(requests)
        cut = int(samples.cut.min()) if len(samples) else 0
        futures = [self._scenario(rows_of, f"scenarios[{i}]", cut) for i, rows_of in enumerate(scenarios)]
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
        rows, samples = self.rows(requests)
        with torch.inference_mode():
            return np.asarray(self.stage.module.embed(self._batch(rows, samples, [])).float().cpu().numpy())

    def rows(self, requests: Sequence[Request]) -> tuple[Rows, Samples]:
        """Tokenize the requests: their rows (R users) and one sample each."""
        if not requests:
            raise UserError("users: expected at least one")
        stored = self.history_of([request.user for request in requests]) if self.history_of else {}
        pieces, cuts = [], []
        for i, request in enumerate(requests):
            where = f"users[{i}]"
            known = stored.get(request.user)
            cut = self._day(request.cut_day, f"{where}.cut_day") if request.cut_day is not None else int(self.info["end_day"])
            if known is None and request.events is None:
                raise UserError(f"{where}.user: {request.user!r} is not known; send her events, or publish a newer state")
            piece = known
            if request.events is not None or request.profile is not None:
                inline = self._inline(request, where, cut)
                piece = inline if known is None else _join(known, inline, request.profile is not None, f"{where}.events")
            assert piece is not None
            # a stored history may go on behind the cut of the request: the cut hides it; and predictions have no end
            pieces.append(replace(piece, end_day=np.full(1, FAR_FUTURE, np.int32)))
            cuts.append(cut)
        return Rows.concat(pieces), Samples(
            np.arange(len(requests)), np.array(cuts, np.int32), np.zeros(len(requests), np.int32)
        )

    def _inline(self, request: Request, where: str, cut: int) -> Rows:
        """The request's own events and profile as a row. Raises UserError for an event at or after the cut."""
        data = self.run.data
        raw = [dict(event) for event in request.events or []]
        times = [event.get(data.events.time) for event in raw]
        table = {data.events.user: pa.array([request.user] * len(raw), pa.string()),
                 data.events.time: self._times(times, where)}  # fmt: skip
        for name, kind in self.info["event_columns"].items():
            missing = [j for j, event in enumerate(raw) if name not in event]
            if missing:
                raise UserError(f"{where}.events[{missing[0]}].{name}: missing; every event holds {', '.join(self.info['event_columns'])}")
            try:
                table[name] = pa.array([event[name] for event in raw], pa.type_for_alias(kind))
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise UserError(f"{where}.events: {name}: expected {kind}: {error}") from None
        events, rejects = clean_events(pa.table(table), replace(data, start=None, end=None), f"{where}.events")
        if rejects.num_rows:
            first = rejects.to_pylist()[:5]
            raise UserError("; ".join(f"{where}.events[{row['row']}]: {row['reason']}" for row in first))
        late = np.flatnonzero(events["day"].to_numpy() >= cut)
        if len(late):
            raise UserError(
                f"{where}.events[{late[0]}].{data.events.time}: expected a time before the cut, {self._shown(cut)}, got {times[late[0]]}; "
                "leave it out or ask for a later cut_day"
            )
        return rows_from_tables(
            tokenize(events, data.behaviours), self._profile(request, where), [item.name for item in data.behaviours],
            int(self.info["start_day"]), cut,
        )

    def _times(self, times: Sequence[Any], where: str) -> pa.Array:
        def parse(j: int, value: Any) -> Any:
            try:
                if isinstance(value, str):
                    return datetime.date.fromisoformat(value) if len(value) == 10 else datetime.datetime.fromisoformat(value)
                if isinstance(value, (datetime.date, int)) and not isinstance(value, bool):
                    return value
            except ValueError:
                pass
            expected = "an ISO date or an ISO timestamp with a zone" if self.dated else "a day number"
            raise UserError(f"{where}.events[{j}].{self.run.data.events.time}: expected {expected}, got {value!r}")

        values = [parse(j, value) for j, value in enumerate(times)]
        if not values:
            return pa.array([], pa.int32())
        if all(isinstance(value, datetime.datetime) for value in values):
            naive = [j for j, value in enumerate(values) if value.tzinfo is None]
            if naive and self.run.data.time_zone != "UTC":
                raise UserError(f"{where}.events[{naive[0]}]: the timestamp has no zone; write it like 2017-09-20T18:30:00-04:00")
            return pa.array([v if v.tzinfo else v.replace(tzinfo=datetime.UTC) for v in values], pa.timestamp("us", "UTC"))
        if len({type(value) for value in values}) > 1:
            raise UserError(f"{where}.events: expected times of one kind, got timestamps, dates and numbers mixed")
        return pa.array(values, pa.int32() if isinstance(values[0], int) else pa.date32())

    def _profile(self, request: Request, where: str) -> pa.Table:
        """One row with every profile column of the run, null where the request says nothing."""
        given = dict(request.profile or {})
        profiles = self.run.data.profiles
        columns: dict[str, pa.Array] = {"user": pa.array([request.user], pa.string())}
        if profiles is None:
            if given:
                raise UserError(f"{where}.profile: this model was trained without profiles; leave it out")
            return pa.table(columns)
        known = {*profiles.numbers, *profiles.categories, *profiles.splits}
        roles = {name for name in (profiles.registered, profiles.ends, profiles.segment) if name}
        unknown = sorted(set(given) - known - roles)
        if unknown:
            raise UserError(f"{where}.profile.{unknown[0]}: unknown; known are {', '.join(sorted(known | roles))}")
        day = given.get(profiles.registered) if profiles.registered else None
        columns["registered"] = pa.array([None if day is None else self._day(day, f"{where}.profile")], pa.int32())
        columns["ends"] = pa.array([None], pa.int32())
        segment = given.get(profiles.segment) if profiles.segment else None
        columns["segment"] = pa.array([None if segment is None else str(segment)], pa.string())
        for name in sorted(known):
            value = given.get(name)
            try:
                columns[name] = (
                    pa.array([None if value is None else float(value)], pa.float64())
                    if name in profiles.numbers
                    else pa.array([None if value is None else str(value)], pa.string())
                )
            except (TypeError, ValueError):
                raise UserError(f"{where}.profile.{name}: expected a number, got {value!r}") from None
        return pa.table(columns)

    def _futures(self, requests: Sequence[Request], samples: Samples) -> list[Calendar]:
        """The one calendar that replaces the coming days of all requests, or none."""
        given = [request.calendar for request in requests]
        if all(calendar is None for calendar in given):
            return []
        if any(calendar != given[0] for calendar in given):
            raise UserError("users: expected the same calendar in all users of one call; send the others in a call of their own")
        return [self._scenario(given[0] or [], "users[0].calendar", int(samples.cut.min()))]

    def _scenario(self, rows: Sequence[Mapping[str, Any]], where: str, cut: int) -> Calendar:
        known = self.stage.inputs.event_types
        columns: dict[str, list[Any]] = {name: [] for name in ("event_type", "start_day", "end_day", "value")}
        for j, row in enumerate(rows):
            place = f"{where}[{j}]"
            kind = row.get("event_type")
            if kind not in known:
                raise UserError(f"{place}.event_type: expected one of {', '.join(known) or 'none (the run has no calendar)'}, got {kind!r}")
            start = self._day(row.get("start_day"), f"{place}.start_day")
            end = self._day(row["end_day"], f"{place}.end_day") if row.get("end_day") is not None else start
            if end < max(start, cut):
                raise UserError(f"{place}.end_day: expected a day from {self._shown(max(start, cut))} on, got {row.get('end_day')!r}")
            value = row.get("value")
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise UserError(f"{place}.value: expected a finite number, got {value!r}")
            for name, item in (("event_type", kind), ("start_day", start), ("end_day", end), ("value", value)):
                columns[name].append(item)
        count = len(rows)
        table = pa.table({
            "scope": pa.array(["global"] * count, pa.string()), "key": pa.nulls(count, pa.string()),
            "start_day": pa.array(columns["start_day"], pa.int32()), "end_day": pa.array(columns["end_day"], pa.int32()),
            "event_type": pa.array(columns["event_type"], pa.string()), "value": pa.array(columns["value"], pa.float64()),
            "known_at": pa.nulls(count, pa.int32()),
        })  # fmt: skip
        return Calendar(table, layout_of(self.stage.config, self.stage.inputs))

    def _batch(self, rows: Rows, samples: Samples, futures: Sequence[Calendar]) -> dict[str, torch.Tensor]:
        return to_device(self.stage.collate(rows, samples, futures), self.device)

    def _answers(
        self, requests: Sequence[Request], samples: Samples, found: tuple[dict[str, Floats], dict[str, Floats]], column: int
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
            days = [
                {"day": self._shown(cut + j),
                 "behaviours": {name: values(daily, (i, column, j, k), k) for k, name in enumerate(inputs.terms[:width])}}
                for j in range(self.stage.config.future_days)
            ]  # fmt: skip
            horizons = {name: values(over, (i, column, k), width + k) for k, name in enumerate(inputs.terms[width:])}
            answers.append(Answer(request.user, self._shown(cut), days, horizons))
        return answers

    def _day(self, value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise UserError(f"{where}: expected {'an ISO date' if self.dated else 'a day number'}, got {value!r}")
        try:
            return runs.day_number(value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _shown(self, day: int) -> int | str:
        return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat() if self.dated else day


def _difference(baseline: Answer, scenario: Answer) -> dict[str, Any]:
    """Scenario minus baseline, of p for yes-or-no behaviours and of the mean for numbers."""

    def minus(new: Mapping[str, Values], old: Mapping[str, Values]) -> dict[str, float]:
        return {
            name: new[name].get("mean", new[name].get("p", 0.0)) - old[name].get("mean", old[name].get("p", 0.0)) for name in new
        }

    return {
        "days": [
            {"day": one["day"], "behaviours": minus(one["behaviours"], other["behaviours"])}
            for one, other in zip(scenario.days, baseline.days, strict=True)
        ],
        "horizons": minus(scenario.horizons, baseline.horizons),
    }


def _join(stored: Rows, inline: Rows, with_profile: bool, where: str) -> Rows:
    """The stored history of a user and her newer events."""
    if len(stored.days) and len(inline.days) and inline.days[0] <= stored.days[-1]:
        raise UserError(f"{where}: expected events after the stored history, which goes up to day {stored.days[-1]}; leave older ones out")
    source = inline if with_profile else stored
    return replace(
        stored,
        offsets=np.array([0, len(stored.days) + len(inline.days)], np.int64),
        days=np.concatenate([stored.days, inline.days]),
        values=np.concatenate([stored.values, inline.values]),
        profile=source.profile,
    )


def _exists(uri: str) -> bool:
    try:
        read_bytes(join(uri, "run.json"))
    except FileNotFoundError:
        return False
    return True


def _read_table(uri: str) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(read_bytes(uri)))


def _root(checkpoint: str) -> str:
    return checkpoint.rstrip("/").rsplit("/", 2)[0]
