"""Where future days look in the history, in numbers. Source: LUMOS, section 5.1 (Figure 4's three patterns).

Legend: F future days, T history days; position t is the day cut - T + t, so T - 1 is the day before the cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lum_ray.evaluation.metrics import Floats

RECENT_DAYS = 14
SEASON_DAYS, SEASON_SLACK_DAYS = 365, 7


@dataclass(frozen=True)
class Attention:
    """Mean cross-attention of the future days over the history, and the events of both.

    weights: (F, T), each row sums to 1. marks: (position, event type) of past events. future_types: the event types of
    each future day, () or F entries. Raises ValueError where the shapes or the sums do not fit.
    """

    weights: Floats
    marks: tuple[tuple[int, str], ...] = ()
    future_types: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or not np.allclose(self.weights.sum(axis=1), 1, atol=1e-2):
            raise ValueError(
                f"attention: expected weights (F, T) with rows that sum to 1, got shape {self.weights.shape} and sums "
                f"{np.round(self.weights.sum(axis=-1), 3).tolist()[:5]}; average over users and heads after the softmax"
            )
        days, length = self.weights.shape
        if len(self.future_types) not in (0, days):
            raise ValueError(f"attention: expected event types of {days} future days, got {len(self.future_types)}")
        outside = [mark for mark in self.marks if not 0 <= mark[0] < length]
        if outside:
            raise ValueError(f"attention: expected marks at positions 0..{length - 1}, got {outside[:5]}")


@dataclass(frozen=True)
class Mass:
    """Share of the attention on some days against their share of the days; `absent` says why there is none."""

    name: str
    share: float = float("nan")
    uniform: float = float("nan")
    absent: str = ""


def attention_masses(attention: Attention) -> tuple[Mass, Mass, Mass]:
    """Mass on the last 14 days, on earlier events of the same kind, and on the same season of a year earlier.

    Events of the last 14 days are left out of the second, so that it does not measure recency again; it averages over
    the future days with an event of a kind that the earlier history holds. The season is 365 +- 7 days before the
    future day.
    """
    weights = attention.weights
    days, length = weights.shape
    recent = min(RECENT_DAYS, length)
    last = Mass(f"last {recent} days", float(weights[:, length - recent :].sum(axis=1).mean()), recent / length)

    chosen = np.zeros((days, length), dtype=bool)
    for day, kinds in enumerate(attention.future_types):
        chosen[day, [t for t, kind in attention.marks if kind in kinds and t < length - recent]] = True
    name = "earlier events of the same kind"
    if not any(attention.future_types):
        same = Mass(name, absent="no event on the future days")
    elif not chosen.any():
        same = Mass(name, absent="no event of the same kind earlier in the history")
    else:
        same = _mass(name, weights, chosen)

    lag = length - np.arange(length)[None, :] + np.arange(days)[:, None]
    season = np.abs(lag - SEASON_DAYS) <= SEASON_SLACK_DAYS
    name = "same season, a year earlier"
    if not season.any():
        return last, same, Mass(name, absent=f"the history of {length} days does not reach a year back")
    return last, same, _mass(name, weights, season)


def _mass(name: str, weights: Floats, chosen: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Mass:
    rows = chosen.any(axis=1)
    return Mass(name, float((weights * chosen)[rows].sum(axis=1).mean()), float(chosen[rows].mean()))
