"""LUMOS as the training loop sees it: collate, loss, predict, trainable.

Shapes: S samples (= B windows), T history days, C cuts, F future days, X days that the queries look at, U behaviours,
V daily targets (U and the derived ones), H horizon targets, K = V + H terms, A active days.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from lum_ray.data.rows import Int64, Rows, Samples
from lum_ray.data.windows import HorizonTarget, history, targets
from lum_ray.lumos import losses
from lum_ray.lumos.collate import Calendar, EventLayout, as_of_days, profile_arrays, shuffled, stand_in
from lum_ray.lumos.config import Inputs, LumosConfig
from lum_ray.lumos.model import Lumos
from lum_ray.stage import Arrays, Batch

Floats = npt.NDArray[np.float32]


def layout_of(config: LumosConfig, inputs: Inputs) -> EventLayout:
    return EventLayout(inputs.event_types, inputs.event_scales, config.weekday, config.season)


class LumosStage:
    """`until_day`: no target at or after it is used; `min_history_days`: the shortest history of a supervised cut.

    `cuts` is how many cuts a window has: `config.cuts_per_window` in training, 1 where one answer a sample is wanted.
    """

    def __init__(
        self,
        config: LumosConfig,
        inputs: Inputs,
        calendar: pa.Table | None,
        until_day: int,
        min_history_days: int,
        cuts: int = 1,
        module: Lumos | None = None,
    ) -> None:
        self.config, self.inputs, self.until_day, self.cuts = config, inputs, until_day, cuts
        self.min_history_days = min_history_days
        self.calendar = self.ahead = Calendar(calendar, layout_of(config, inputs))
        if config.future_events == "shuffled" and calendar is not None:
            self.ahead = Calendar(shuffled(calendar), self.calendar.layout)
        self.module: Lumos = module if module is not None else Lumos(config, inputs)
        self.terms = inputs.terms

    def collate(self, rows: Rows, samples: Samples, scenarios: Sequence[Calendar] = ()) -> Arrays:
        """The batch of `samples`; see the model's docstring for its arrays. Days come as integers, values as stored.

        With `scenarios` the cuts of a window are these futures of the one cut, each seen through its own calendar.
        """
        present = len(samples) > 0
        if not present:
            names = [*(item.name for item in self.inputs.numbers), *(item.name for item in self.inputs.categories)]
            rows = stand_in(len(self.inputs.behaviours), names)
            samples = Samples(np.zeros(1, np.int64), np.zeros(1, np.int32), np.zeros(1, np.int32))
        length, cuts = self.config.history_days, len(scenarios) or self.cuts
        cut_B = samples.cut.astype(np.int64)
        row = samples.row
        start_B = cut_B - length
        sample_A, place_A, index_A = history(rows, samples, length)
        pads_B = np.clip(rows.first_day[row] - start_B, 0, length)
        back = np.arange(cuts - 1, -1, -1) * (0 if scenarios else self.config.cut_stride_days)
        cuts_BC = cut_B[:, None] - back
        user_hash, segment = rows.user_hash[row], rows.segment[row]
        past_rows, past_BT = self.calendar.look_up(user_hash, segment, start_B, as_of_days(cuts_BC, start_B, length))
        ahead_rows, future_BCX = self.futures(rows, row, cuts_BC, scenarios or [self.ahead] * cuts)
        valid_BC = (rows.first_day[row][:, None] + self.min_history_days < cuts_BC) & present
        valid_BC[:, -1] = present  # the plan drew the last cut itself
        daily, horizon = targets(
            rows,
            Samples(np.repeat(row, cuts), cuts_BC.ravel().astype(np.int32), np.repeat(samples.draw, cuts)),
            self.config.future_days,
            self.until_day,
            self.inputs.derived,
            self.inputs.horizons,
        )
        shape = (len(samples), cuts)
        daily = np.where(valid_BC[:, :, None, None], daily.reshape(*shape, *daily.shape[1:]), np.nan).astype(np.float32)
        horizon = np.where(valid_BC[:, :, None], horizon.reshape(*shape, -1), np.nan).astype(np.float32)
        numbers_BN, categories_BG = profile_arrays(
            rows,
            row,
            cuts_BC.min(axis=1),  # a window has one profile: what its earliest cut knows
            [item.name for item in self.inputs.numbers],
            [(item.name, item.values) for item in self.inputs.categories],
        )
        return {
            "values_AU": rows.values[index_A],
            "slot_A": sample_A * length + place_A,
            "pads_B": pads_B.astype(np.int64),
            "numbers_BN": numbers_BN,
            "categories_BG": categories_BG,
            "event_rows_ES": np.concatenate([past_rows, ahead_rows]),
            "history_event_BT": past_BT,
            "future_event_BCX": future_BCX + len(past_rows),
            "visible_BC": np.maximum(cuts_BC - start_B[:, None], 0),
            "daily_BCFV": daily,
            "horizon_BCH": horizon,
            "valid_BC": valid_BC,
            "counts_K": losses.counts(self.inputs, daily, horizon, valid_BC),
            "tokens": np.array(int((length - pads_B).sum()) if present else 0, np.int64),
            "user": rows.user[row],  # for the log; no model reads it
        }

    def futures(self, rows: Rows, row_B: Int64, cuts_BC: Int64, calendars: Sequence[Calendar]) -> tuple[Floats, Int64]:
        """(event_rows_ES, future_event_BCX): the days from each cut on, each of the C seen through its own calendar."""
        ahead = self.inputs.days_ahead(self.config.future_days)
        found_ES: list[Floats] = []
        future_BCX = np.empty((*cuts_BC.shape, ahead), np.int64)
        for column, calendar in enumerate(calendars):
            cut = cuts_BC[:, column]
            as_of = np.repeat(cut[:, None], ahead, axis=1)
            found, index = calendar.look_up(rows.user_hash[row_B], rows.segment[row_B], cut, as_of)
            future_BCX[:, column] = index + sum(len(part) for part in found_ES)
            found_ES.append(found)
        return np.concatenate(found_ES), future_BCX

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sums_K, counts_K) of eq. 7; see `losses.Objective`."""
        return self.module.loss(batch)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Arrays:
        """One entry a (sample, day, daily term) and a (sample, horizon term), in raw units.

        `sample`, `offset` (days after the cut; 0 for horizons) and `term` int64; p, mean, median, low, high float32
        (NaN where they mean nothing; see `functionals`) and y float64 (NaN where masked).
        """
        return prediction_rows(functionals(self.module, self.module(batch)), batch, self.inputs)

    def trainable(self) -> list[dict[str, Any]]:
        """The model's parameter groups; only matrices decay."""
        return self.module.parameter_groups()


def functionals(module: Lumos, outputs: dict[str, torch.Tensor]) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """What a prediction file holds, for days (B, C, F, V) and for horizons (B, C, H), float32; and `least_mape`, the
    forecast with the least expected percentage error, given that there is anything to forecast.

    p: of a yes, or of an open gate; mean: unconditional; median, low, high (5 %, 95 %): given that the gate is open,
    because the hurdle metrics judge the chance and the amount apart. A sum over a horizon has a gate only where
    that has an `any` head over the same days; else p is NaN and all its figures are unconditional.
    """
    days, over = module.objective.read(outputs)
    gated = torch.tensor([_has_gate(module.inputs, item) for item in module.inputs.horizons], dtype=torch.bool)
    given = {name: f"{name}_given" for name in ("median", "low", "high")}
    daily = {name: days[given.get(name, name)] for name in ("p", "mean", *given)} | {
        "least_mape": days["least_mape_given"]
    }
    horizon = {"p": over["p"], "mean": over["mean"], "least_mape": over["least_mape_given"]}
    if len(gated):
        any_of = torch.tensor([item.over == "any" for item in module.inputs.horizons])
        keep = (gated | any_of).to(over["p"].device)
        horizon["p"] = torch.where(keep, over["p"], torch.nan)
        horizon |= {name: torch.where(keep, over[source], over[name]) for name, source in given.items()}
    else:
        horizon |= {name: over[name] for name in given}
    return tuple({name: value.float().cpu().numpy() for name, value in part.items()} for part in (daily, horizon))  # type: ignore[return-value]


def _has_gate(inputs: Inputs, item: HorizonTarget) -> bool:
    """Whether there is an `any` head of the item's gate over the same days."""
    gate = inputs.behaviours[item.behaviour].gate
    return any(other.over == "any" and (other.behaviour, other.days) == (gate, item.days) for other in inputs.horizons)


def prediction_rows(found: tuple[dict[str, Floats], dict[str, Floats]], batch: Batch, inputs: Inputs) -> Arrays:
    """The `functionals` of windows with one cut as the rows of a prediction file, by sample, day and term."""
    daily, over = found
    windows, _, future, width = daily["p"].shape
    horizons = over["p"].shape[-1]
    units = np.array([1.0 if b else inputs.behaviours[s].resolution for b, s in zip(inputs.binary, inputs.sources)])

    def flat(of_days: npt.ArrayLike, of_horizons: npt.ArrayLike) -> npt.NDArray[Any]:
        days = np.broadcast_to(np.asarray(of_days), (windows, future, width)).reshape(windows, -1)
        ends = np.broadcast_to(np.asarray(of_horizons), (windows, horizons))
        return np.concatenate([days, ends], axis=1).ravel()

    return {
        "sample": np.repeat(np.arange(windows), future * width + horizons),
        "offset": flat(np.arange(future)[None, :, None], 0),
        "term": flat(np.arange(width), np.arange(width, width + horizons)),
        "y": flat(
            batch["daily_BCFV"][:, 0].double().cpu().numpy() * units[:width],
            batch["horizon_BCH"][:, 0].double().cpu().numpy() * units[width:],
        ),
        **{name: flat(daily[name][:, 0], over[name][:, 0]) for name in daily},
    }
