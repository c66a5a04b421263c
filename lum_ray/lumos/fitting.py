"""What LUMOS must know of the data before it can read it, fitted on what lies before the train cut only.

Shapes: N users, A active days, U behaviours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from lum_ray.artifacts import UserError
from lum_ray.data.rows import Rows, Samples
from lum_ray.data.windows import UNKNOWN_AHEAD, DerivedTarget, HorizonTarget, profile_at, targets, visible
from lum_ray.lumos import losses
from lum_ray.lumos.collate import EventLayout
from lum_ray.lumos.config import BehaviourInput, CategoryInput, Inputs, LumosConfig, NumberInput

MAX_CATEGORIES = 1000


class BehaviourSpec(Protocol):
    """A behaviour of a run file."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Literal["binary", "continuous", "count"]: ...
    @property
    def resolution(self) -> float: ...
    @property
    def gate(self) -> str | None: ...
    @property
    def transform(self) -> Literal["identity", "log1p"]: ...


def fit_inputs(
    buckets: Iterable[Rows],
    calendar: pa.Table | None,
    behaviours: Sequence[BehaviourSpec],
    derived: Sequence[DerivedTarget],
    horizons: Sequence[HorizonTarget],
    numbers: Sequence[str],
    categories: Sequence[str],
    until_day: int,
    config: LumosConfig,
) -> Inputs:
    """Scales, vocabularies and event types from what is known before `until_day`, in one pass over `buckets`.

    A behaviour's scale is the root mean square of its transformed value over all days, idle ones too, so that rare
    behaviours speak as loud as common ones. Users who were not there before `until_day` shape nothing.
    Raises UserError where nothing lies before `until_day`.
    """
    squares, user_days = np.zeros(len(behaviours)), 0
    moments = {name: np.zeros(3) for name in numbers}
    vocabulary: dict[str, set[str]] = {name: set() for name in categories}
    days = 0
    for rows in buckets:
        seen = visible(rows.days, until_day)
        days += int(seen.sum())
        values = rows.values[seen]
        for column, item in enumerate(behaviours):
            x = values[:, column] * item.resolution
            x = np.sign(x) * np.log1p(np.abs(x)) if _transform(item) == "log1p" else x
            squares[column] += float((x**2).sum())
        known = visible(rows.first_day, until_day)
        user_days += int((until_day - rows.first_day[known].astype(np.int64)).sum())
        profile = profile_at(rows, np.flatnonzero(known), until_day)
        for name in numbers:
            column_N = profile[name].astype(np.float64)
            column_N = column_N[np.isfinite(column_N)]
            moments[name] += [len(column_N), column_N.sum(), (column_N**2).sum()]
        for name in categories:
            vocabulary[name].update(str(value) for value in set(profile[name].tolist()) if value is not None)
    if not days:
        raise UserError(
            f"no event lies before day {until_day}, where training must end; check `split` against the days of the data"
        )
    large = [f"{name} ({len(values)})" for name, values in vocabulary.items() if len(values) > MAX_CATEGORIES]
    if large:
        raise UserError(
            f"data.profiles.categories: expected at most {MAX_CATEGORIES} values, got {', '.join(large[:5])}; "
            "leave them out"
        )
    types, scales = _event_types(calendar, until_day)
    layout = EventLayout(types, scales, config.weekday, config.season)
    names = [item.name for item in behaviours]
    return Inputs(
        behaviours=tuple(
            BehaviourInput(
                name=item.name,
                kind=item.kind,
                resolution=item.resolution,
                gate=names.index(item.gate) if item.gate else None,
                transform=_transform(item),
                scale=max(float(np.sqrt(squares[i] / max(user_days, 1))), 0.01) if squares[i] else 1.0,
            )
            for i, item in enumerate(behaviours)
        ),
        event_width=layout.width,
        derived=tuple(derived),
        horizons=tuple(horizons),
        event_types=types,
        event_scales=scales,
        numbers=tuple(_number(name, moments[name]) for name in numbers),
        categories=tuple(CategoryInput(name, tuple(sorted(vocabulary[name]))) for name in categories),
    )


def _transform(item: BehaviourSpec) -> Literal["identity", "log1p"]:
    return "identity" if item.kind == "binary" else item.transform


def with_starts(inputs: Inputs, config: LumosConfig, windows: Iterable[tuple[Rows, Samples]], until_day: int) -> Inputs:
    """`inputs` with the heads' and the loss weights' starts, from the targets of some training windows.

    A head that starts at its base rate, and a weight at what is optimal for it, save the steps that find them.
    """
    parts = [
        targets(rows, samples, config.future_days, until_day, inputs.derived, inputs.horizons)
        for rows, samples in windows
    ]
    if not sum(len(daily) for daily, _ in parts):
        raise UserError(
            "split.train: no user has a cut there; check its days and `split.min_history_days` against the data"
        )
    daily = np.concatenate([part[0] for part in parts])[:, None]
    horizon = np.concatenate([part[1] for part in parts])[:, None]
    first, second = losses.starts(config, inputs, daily, horizon, np.ones(daily.shape[:2], np.bool_))
    return replace(inputs, starts=first, uncertainties=second)


def _number(name: str, moments: np.ndarray[tuple[int], np.dtype[np.float64]]) -> NumberInput:
    count = max(moments[0], 1.0)
    mean = moments[1] / count
    deviation = float(np.sqrt(max(moments[2] / count - mean**2, 0.0)))
    return NumberInput(name, float(mean), deviation or 1.0)


def _event_types(calendar: pa.Table | None, until_day: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Event types known before `until_day`, sorted, and the largest absolute value of each."""
    largest: dict[str, float] = {}
    for row in calendar.to_pylist() if calendar is not None else []:
        default = row["start_day"] if row["scope"] == "user" else UNKNOWN_AHEAD
        if visible(default if row["known_at"] is None else row["known_at"], until_day):
            value = 1.0 if row["value"] is None else abs(row["value"])
            largest[row["event_type"]] = max(largest.get(row["event_type"], 0.0), value)
    return tuple(sorted(largest)), tuple(largest[name] or 1.0 for name in sorted(largest))
