"""The leak battery: a table of checks, and the verdicts over plain numbers. What is measured is `steps/audit`'s.

A check asks one question whose honest answer is known beforehand, such as "do scores stay when the labels change?".

Choices that are not obvious:
* What must not change is compared bit for bit, unless an order of sums may differ. Each such check comes with a
  control, something that must change the same numbers: a check that cannot fail says nothing, and is not applicable.
* A figure that is estimated is LEAKY only where its paired 95 % interval over users lies wholly on the wrong side.
* Popularity stands for what can be known without the user; the reference is the better of its two forms, since what
  was popular of late is known to whoever has any history of that time.

Source: FIELD.md, section 3 (leak battery). Legend: B baskets (a user at a cut), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from lum_ray.evaluation import bootstrap
from lum_ray.evaluation.metrics import Floats, Ints

Verdict = Literal["ok", "LEAKY", "not applicable"]
OK: Final = "ok"
LEAKY: Final = "LEAKY"
NOT_APPLICABLE: Final = "not applicable"
KEPT_NEGATIVES: Final = 0.5
RESAMPLES: Final = 200
_SHOWN = 5


@dataclass(frozen=True)
class Check:
    """A row of the table. `figure` and `bar` are for readers, `values` holds the numbers behind them."""

    name: str
    compared: str
    figure: str
    bar: str
    verdict: Verdict
    values: Mapping[str, float] = field(default_factory=dict)


def leaky(checks: Sequence[Check]) -> list[str]:
    """Names of the checks that failed."""
    return [check.name for check in checks if check.verdict == LEAKY]


def to_plain(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """As JSON holds them; a number that is not finite becomes null."""
    rows = [asdict(check) for check in checks]
    for row in rows:
        row["values"] = {name: value if math.isfinite(value) else None for name, value in row["values"].items()}
    return rows


def from_plain(rows: Sequence[Mapping[str, Any]]) -> list[Check]:
    """What `to_plain` wrote."""
    nan = float("nan")
    return [
        Check(**{**row, "values": {name: nan if v is None else v for name, v in row["values"].items()}}) for row in rows
    ]


def not_applicable(name: str, compared: str, why: str) -> Check:
    return Check(name, compared, "-", why, NOT_APPLICABLE)


def largest_change(before: NDArray[np.generic], after: NDArray[np.generic]) -> float:
    """The largest |difference| of two arrays; infinite where their shapes or the places of NaN or infinity differ."""
    one, other = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if one.shape != other.shape:
        return math.inf
    finite = np.isfinite(one) & np.isfinite(other)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return math.inf
    return float(np.abs(one[finite] - other[finite]).max(initial=0.0))


def unchanged(name: str, compared: str, change: float, control: float, tolerance: float = 0.0) -> Check:
    """LEAKY where something that must not move a score moved it by more than `tolerance`.

    `control`: how far the same scores move when something changes that they should follow; where they do not, the
    check has no power.
    """
    if change > tolerance or math.isnan(change):
        verdict: Verdict = LEAKY
    else:
        verdict = OK if control > tolerance else NOT_APPLICABLE
    note = f"control {_short(control)}" if verdict != NOT_APPLICABLE else "nor does the control move them"
    bar = "0, bit for bit" if not tolerance else f"at most {tolerance:g}"
    values = {"change": change, "control": control, "tolerance": tolerance}
    return Check(name, compared, f"largest change {_short(change)} ({note})", bar, verdict, values)


def identical(name: str, compared: str, differing: Sequence[str], total: int, note: str = "") -> Check:
    """LEAKY where any of `total` named arrays or numbers differs."""
    shown = f": {', '.join(differing[:_SHOWN])}{', ...' if len(differing) > _SHOWN else ''}" if differing else ""
    figure = f"{len(differing)} of {total} differ{shown}{note}"
    verdict: Verdict = LEAKY if differing else OK
    return Check(name, compared, figure, "0 differ", verdict, {"differ": len(differing), "total": total})


def no_gain(
    name: str,
    compared: str,
    metric: str,
    ours_B: Floats,
    reference_B: Floats,
    user_B: Ints,
    against: str = "the best constant ranking",
    note: str = "",
) -> Check:
    """LEAKY where `ours_B` beats `reference_B`, a metric of the same baskets (B,), beyond its paired interval.

    Baskets where either is NaN are left out. `user_B` (B,): whose basket it is.
    """
    ours, reference, gain = gain_intervals(ours_B, reference_B, user_B)
    if math.isnan(gain.value):
        return not_applicable(name, compared, "no basket has a target")
    figure = (
        f"{metric} {ours.value:.3f}, {against} {reference.value:.3f}, gain {gain.value:+.3f} "
        f"({gain.low:+.3f} to {gain.high:+.3f}){note}"
    )
    verdict: Verdict = LEAKY if gain.low > 0 else OK
    values = {"value": ours.value, "reference": reference.value, "reference_low": reference.low,
              "reference_high": reference.high, "gain": gain.value, "gain_low": gain.low,
              "gain_high": gain.high}  # fmt: skip
    return Check(name, compared, figure, "low end of the gain at most 0", verdict, values)


def no_rerank_gain(
    name: str,
    compared: str,
    metric: str,
    own: tuple[Floats, Floats],
    shuffled: tuple[Floats, Floats],
    constant_B: Floats,
    user_B: Ints,
) -> Check:
    """LEAKY where reading P still gains on R, and beats the best constant ranking, with another user's history.

    `own`, `shuffled`: the metric (B,) of R and of P, with the user's history and with a stranger's. A gain alone is no
    leak: P may know better than a weak R what is popular. What beats popularity without the user must know the label.
    """
    gained = gain_intervals(own[1], own[0], user_B)[2]
    _, _, still = gain_intervals(shuffled[1], shuffled[0], user_B)
    over = gain_intervals(shuffled[1], constant_B, user_B)[2]
    if math.isnan(still.value):
        return not_applicable(name, compared, "no basket has a target")
    figure = (
        f"{metric}, gain of P on R: own history {gained.value:+.3f} ({gained.low:+.3f} to {gained.high:+.3f}), "
        f"shuffled {still.value:+.3f} ({still.low:+.3f} to {still.high:+.3f})"
    )
    verdict: Verdict = LEAKY if still.low > 0 and over.low > 0 else OK
    values = {"own_gain": gained.value, "own_gain_low": gained.low, "own_gain_high": gained.high,
              "shuffled_gain": still.value, "shuffled_gain_low": still.low, "shuffled_gain_high": still.high,
              "over_constant": over.value, "over_constant_low": over.low}  # fmt: skip
    return Check(name, compared, figure, "shuffled: low end at most 0, of it or of that on popularity", verdict, values)


def no_skill(name: str, compared: str, y: Floats, score: Floats, user: Ints) -> Check:
    """LEAKY where the AUC of a world without any signal lies above 0.5 beyond its interval over users."""
    known = ~np.isnan(y)
    place = np.unique(user[known], return_inverse=True)[1].astype(np.int64)
    weights = bootstrap.user_weights(int(place.max(initial=-1)) + 1, RESAMPLES)
    at = bootstrap.interval(bootstrap.auc_resamples(y[known], score[known], place, weights))
    if math.isnan(at.value):
        return not_applicable(name, compared, "only one outcome is known")
    verdict: Verdict = LEAKY if at.low > 0.5 else OK
    figure = f"AUC {at.value:.3f} ({at.low:.3f} to {at.high:.3f})"
    return Check(name, compared, figure, "0.5 within or above the interval", verdict,
                 {"auc": at.value, "low": at.low, "high": at.high})  # fmt: skip


def kept_share(name: str, compared: str, masked: int, pairs: int) -> Check:
    """LEAKY where half or more of the (query, candidate) pairs of training are masked: it is then no ranking any more.

    Source: FIELD.md, section 1 (masking by cosine can mask all negatives).
    """
    if not pairs:
        return not_applicable(name, compared, "no query in the batch")
    share = 1 - masked / pairs
    verdict: Verdict = OK if share > KEPT_NEGATIVES else LEAKY
    return Check(name, compared, f"{share:.4f} of {pairs:,} pairs kept", f"more than {KEPT_NEGATIVES}", verdict,
                 {"share": share, "pairs": pairs})  # fmt: skip


def best_constant(candidates: Mapping[str, Floats]) -> tuple[str, Floats]:
    """The name and the metric (B,) of the constant ranking with the highest mean."""
    name = max(candidates, key=lambda key: float(np.nanmean(candidates[key])) if len(candidates[key]) else 0.0)
    return name, candidates[name]


def gain_intervals(
    ours_B: Floats, reference_B: Floats, user_B: Ints
) -> tuple[bootstrap.Interval, bootstrap.Interval, bootstrap.Interval]:
    """The means of both and of their difference, with 95 % intervals over the same resamples of users."""
    known = ~np.isnan(ours_B) & ~np.isnan(reference_B)
    place = np.unique(user_B[known], return_inverse=True)[1].astype(np.int64)
    weights = bootstrap.user_weights(int(place.max(initial=-1)) + 1, RESAMPLES)
    ones = np.ones(int(known.sum()))
    one, other = (bootstrap.ratio_resamples((values[known], ones), place, weights) for values in (ours_B, reference_B))
    return bootstrap.interval(one), bootstrap.interval(other), bootstrap.interval(one - other)


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}"
