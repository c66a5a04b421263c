"""The objective (Source: LUMOS, eq. 7) and what the heads' outputs mean.

A head's first output is a logit (binary terms) or a number: with `continuous: point` the transformed value
y = transform(value) / scale, with `lognormal` mu of log(value + shift), whose log sigma is the second output
and, with `learned_mape`, a correction of the least-MAPE forecast exp(mu - sigma^2) the third.

Both give a distribution of the value given that it counts (its gate is open), so that any functional can be read:
the residual variance of a point head is 2 sigma_k^2, for at the optimum of eq. 7 sigma_k^2 = L_k / 2.

Legend: B windows, C cuts, F future days, U behaviours, V daily targets, H horizon targets, K = V + H terms, P outputs
per head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lum_ray.lumos.config import BehaviourInput, Inputs, LumosConfig
from lum_ray.nn import Constants

Float64 = npt.NDArray[np.float64]
LOW, HIGH = 0.05, 0.95
LOG_SIGMA = (-1.5, 3.0)
"""Bounds of a predicted log sigma: a day that is fitted exactly must not take the whole loss. A gradient grows with
1 / sigma^2: at -5 a count that is 0 on most active days drowned all other tasks (see tuning/LOG.md)."""


def counted(
    inputs: Inputs, daily_BCFV: npt.NDArray[Any], horizon_BCH: npt.NDArray[Any], valid_BC: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which targets count, (B, C, F, V) and (B, C, H): known ones of valid samples; of a gated number only days on
    which its gate is open (the paper's zero-masking), of its sum over a horizon only sums above 0."""
    days = valid_BC[:, :, None, None] & ~np.isnan(daily_BCFV)
    for column, behaviour in enumerate(inputs.behaviours):
        if behaviour.gate is not None:
            days[..., column] &= daily_BCFV[..., behaviour.gate] > 0
    over = valid_BC[:, :, None] & ~np.isnan(horizon_BCH)
    for column, horizon in enumerate(inputs.horizons):
        if inputs.behaviours[horizon.behaviour].gate is not None:
            over[..., column] &= horizon_BCH[..., column] > 0
    return days, over


def counts(
    inputs: Inputs, daily_BCFV: npt.NDArray[Any], horizon_BCH: npt.NDArray[Any], valid_BC: npt.NDArray[Any]
) -> Float64:
    """counts_K (K,) of a batch in numpy, for collate: how many targets of each term count. Equal to the counts that
    `Objective` returns."""
    days, over = counted(inputs, daily_BCFV, horizon_BCH, valid_BC)
    return np.concatenate([days.sum(axis=(0, 1, 2)), over.sum(axis=(0, 1))]).astype(np.float64)


def starts(
    config: LumosConfig,
    inputs: Inputs,
    daily_BCFV: npt.NDArray[Any],
    horizon_BCH: npt.NDArray[Any],
    valid_BC: npt.NDArray[Any],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(starts, uncertainties) of `Inputs` from some training windows: the best constant output of each head, and the
    log sigma^2 that is optimal for it (log(loss / 2)). Terms without a counted target start at 0."""
    days, over = counted(inputs, daily_BCFV, horizon_BCH, valid_BC)
    first: list[float] = []
    second: list[float] = []
    for term, (binary, source) in enumerate(zip(inputs.binary, inputs.sources, strict=True)):
        column = term - inputs.daily
        values = daily_BCFV[..., term][days[..., term]] if column < 0 else horizon_BCH[..., column][over[..., column]]
        values = values.astype(np.float64)
        if len(values) == 0:
            first.append(0.0)
            second.append(0.0)
            continue
        if binary:
            share = float(np.clip((values > 0).mean(), 1e-4, 1 - 1e-4))
            first.append(math.log(share / (1 - share)))
            loss = -share * math.log(share) - (1 - share) * math.log(1 - share)
        else:
            scale, shift, log = _measure(config, inputs.behaviours[source])
            values = values * inputs.behaviours[source].resolution
            y = (np.log(np.maximum(values + shift, shift)) if log else values) / scale
            first.append(float(y.mean()))
            loss = float(y.var())
        second.append(math.log(max(loss, 1e-3) / 2))
    return tuple(first), tuple(second)


def _measure(config: LumosConfig, behaviour: BehaviourInput) -> tuple[float, float, bool]:
    """(scale, shift, log): a head of this number predicts y = log(value + shift) / scale, or value / scale.

    Log-normal: the shift is one resolution, so that a 0 on a day with an open gate stays a finite logarithm (for counts
    that is log1p). Point: the logarithm of log1p has shift 1.
    """
    if config.continuous == "lognormal":
        return 1.0, behaviour.resolution, True
    return behaviour.scale, 1.0, behaviour.transform == "log1p"


@dataclass(frozen=True)
class Amounts:
    """Distributions of numbers >= 0, all tensors of one shape (broadcastable), in the raw data's unit.

    Where `log`: log(value + shift) ~ Normal(location, spread^2); else value ~ Normal(location, spread^2).
    """

    location: Tensor
    spread: Tensor
    """NaN where it is not known (point heads without s_k, as under `sum`): means are medians, no intervals."""
    shift: Tensor
    log: Tensor
    correction: Tensor | float = 0.0
    """What is added to the location of the least-MAPE forecast (`learned_mape`)."""

    def _value(self, at: Tensor) -> Tensor:
        """From the scale of `location` to the value, never below 0."""
        return torch.where(self.log, at.exp() - self.shift, at).clamp(min=0.0)

    def median(self) -> Tensor:
        return self._value(self.location)

    def mean(self) -> Tensor:
        half = torch.where(self.log, self.spread.nan_to_num(0.0) ** 2 / 2, 0.0)
        return self._value(self.location + half)

    def least_mape(self) -> Tensor:
        """The forecast with the least expected |value - forecast| / value: exp(mu - sigma^2) of a log-normal (up to
        the shift); for a normal, for which it has no closed form, the median."""
        below = torch.where(self.log, self.spread.nan_to_num(0.0) ** 2, 0.0)
        return self._value(self.location - below + self.correction)

    def quantile(self, q: Tensor | float) -> Tensor:
        """The value below which lies the share `q`."""
        share = torch.as_tensor(q, dtype=self.location.dtype, device=self.location.device)
        return self._value(self.location + self.spread * torch.special.ndtri(share))

    def hurdle_quantile(self, p: Tensor, q: float) -> Tensor:
        """Quantile `q` of the mixture: 0 with probability 1 - p, else this distribution."""
        inside = ((q - (1 - p)) / p.clamp(min=1e-12)).clamp(1e-6, 1 - 1e-6)
        value = self.quantile(inside)
        if q == 0.5:  # known without a spread only if it is 0
            return torch.where(1 - p >= q, torch.zeros_like(value), value)
        return torch.where((1 - p >= q) & ~value.isnan(), torch.zeros_like(value), value)


class Objective(nn.Module):
    """Eq. 7 over K terms, with s_k = log sigma_k^2 as parameters, and the reading of outputs.

    sums_k = exp(-s_k) / 2 * sum_i L_i + s_k * n_k and counts_k = n_k, so that sums over a global batch divided by its
    counts are eq. 7, and a term without a counted target adds nothing, its regulariser included.
    L is binary cross-entropy, or the squared error of y, gated.

    Departs: a log-normal head predicts its variance per sample, so eq. 7 is used with sigma^2 = exp(2 log sigma) / 2 of
    that sample (up to a constant twice the negative log-likelihood), and has no s_k. `loss_weighting: sum` leaves out
    s_k: sums_k = sum_i L_i.

    Departs: `loss_weighting: geometric` is sums_k = sum_i L_i / L0_k, where L0_k is the loss of term k's best constant
    over training windows (`Inputs.uncertainties`). The geometric loss (prod_k L_k)^(1/K) (Source: Chennupati et al.,
    MultiNet++, 2019) goes down along sum_k grad L_k / L_k, with L_k over the whole global batch, which no micro-batch
    knows. Weights that follow L_k through training are eq. 7's: minimised over s_k it is K + sum_k log(L_k / 2), the
    geometric loss in logarithms. What is left to compare is the geometric loss whose weights stay those of the start.
    A log-normal head keeps the weight 1, since its loss may be negative.
    """

    def __init__(self, config: LumosConfig, inputs: Inputs) -> None:
        super().__init__()
        self.inputs, self.lognormal = inputs, config.continuous == "lognormal"
        self.spread = self.lognormal and not all(inputs.binary)
        self.corrects = self.spread and config.learned_mape
        self.outputs = 1 + self.spread + self.corrects
        self.terms = inputs.terms
        measures = [_measure(config, inputs.behaviours[source]) for source in inputs.sources]
        resolution = [inputs.behaviours[source].resolution for source in inputs.sources]
        constants = {
            "binary": torch.tensor(inputs.binary),
            "log": torch.tensor([m[2] for m in measures]),
            "scale": torch.tensor([m[0] for m in measures], dtype=torch.float32),
            "shift": torch.tensor([m[1] for m in measures], dtype=torch.float32),
            "resolution": torch.tensor(resolution, dtype=torch.float32),
        }
        weighted = [k for k in range(len(self.terms)) if inputs.binary[k] or not self.lognormal]
        first = torch.tensor([inputs.uncertainties[k] if inputs.uncertainties else 0.0 for k in weighted])
        self.weighted = weighted if config.loss_weighting == "uncertainty" else []
        self.log_variance = nn.Parameter(first) if self.weighted else None
        constants["weight"] = torch.ones(len(self.terms))
        if config.loss_weighting == "geometric":
            constants["weight"][weighted] = torch.exp(-first) / 2  # uncertainties are log(L0 / 2)
        constants["weighted"] = torch.tensor(self.weighted, dtype=torch.int64)
        self.constants = Constants(constants, persistent=False)

    def _spread_out(self, otherwise: float) -> Tensor:
        """s_K float32, `otherwise` for terms that have none."""
        s_K = torch.full((len(self.terms),), otherwise, device=self.constants["scale"].device)
        if self.log_variance is None:
            return s_K
        return s_K.index_put((self.constants["weighted"],), self.log_variance.float())

    def counted(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As `counted` in numpy: bool (B, C, F, V) and (B, C, H)."""
        daily, horizon, valid = batch["daily_BCFV"], batch["horizon_BCH"], batch["valid_BC"]
        gates = [b.gate for b in self.inputs.behaviours] + [None] * len(self.inputs.derived)
        always = torch.ones_like(daily[..., 0], dtype=torch.bool)
        open_days = [daily[..., g] > 0 if g is not None else always for g in gates]
        days = valid[:, :, None, None] & ~daily.isnan() & torch.stack(open_days, dim=-1)
        gated = [self.inputs.behaviours[h.behaviour].gate is not None for h in self.inputs.horizons]
        ungated = ~torch.tensor(gated, dtype=torch.bool, device=daily.device)
        return days, valid[:, :, None] & ~horizon.isnan() & ((horizon > 0) | ungated)

    def forward(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(sums_K float32 with gradient, counts_K float64). Always in float32, also under autocast."""
        days, over = self.counted(batch)
        with torch.autocast(days.device.type, enabled=False):
            width = self.inputs.daily
            daily = self._losses(outputs["daily_BCFVP"].float(), batch["daily_BCFV"].float(), slice(0, width))
            horizon = self._losses(outputs["horizon_BCHP"].float(), batch["horizon_BCH"].float(), slice(width, None))
            # where, not a product: what does not count may be NaN
            losses = [
                torch.where(days, daily, 0.0).flatten(0, 2).sum(0),
                torch.where(over, horizon, 0.0).flatten(0, 1).sum(0),
            ]
            counts_K = torch.cat([days.flatten(0, 2).sum(0), over.flatten(0, 1).sum(0)]).double()
            # terms without a sigma have the weight 1, or the fixed one
            weight_K = self.constants["weight"] * torch.exp(-self._spread_out(math.log(0.5))) / 2
            sums_K = weight_K * torch.cat(losses) + self._spread_out(0.0) * counts_K.float()
        return sums_K, counts_K

    def _losses(self, outputs_P: Tensor, values: Tensor, terms: slice) -> Tensor:
        """L of each target (..., terms); `values` in stored units, NaN replaced by 0."""
        known = torch.where(values.isnan(), 0.0, values)
        logit = outputs_P[..., 0]
        cross_entropy = F.binary_cross_entropy_with_logits(logit, (known > 0).float(), reduction="none")
        scale, shift = self.constants["scale"][terms], self.constants["shift"][terms]
        raw = known * self.constants["resolution"][terms]
        y = torch.where(self.constants["log"][terms], torch.log(torch.maximum(raw + shift, shift)), raw) / scale
        error = (logit - y) ** 2
        if self.spread:
            log_sigma = outputs_P[..., 1].clamp(*LOG_SIGMA)
            error = error * torch.exp(-2 * log_sigma) + 2 * log_sigma
        if self.corrects:
            implied = (logit - torch.exp(2 * log_sigma)).detach()
            # a forecast far above the value must not take the whole loss
            error = error + (1 - torch.exp((implied + outputs_P[..., 2] - y).clamp(max=3.0))).abs()
        return torch.where(self.constants["binary"][terms], cross_entropy, error)

    def _amounts(self, outputs_P: Tensor, terms: slice) -> Amounts:
        scale = self.constants["scale"][terms]
        location = outputs_P[..., 0] * scale
        if self.spread:
            spread = outputs_P[..., 1].clamp(*LOG_SIGMA).exp()
        elif self.log_variance is None:
            spread = torch.full_like(location, torch.nan)
        else:
            spread = (scale * (2 * self._spread_out(0.0).exp()[terms]).sqrt()).expand_as(location)
        correction = outputs_P[..., 2] if self.corrects else 0.0
        return Amounts(location, spread, self.constants["shift"][terms], self.constants["log"][terms], correction)

    @torch.no_grad()
    def read(self, outputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the outputs say, as float32 (B, C, F, V) for days and (B, C, H) for horizons, in the raw data's units.

        `p`: probability of a yes; of a number that its gate is open (NaN without a gate: then it counts always).
        `mean`, `median`, `low`, `high` (5 and 95 %): unconditional, the mixture of 0 and the amount; of a yes or no
        only `mean` = p. `mean_given`, `median_given`, `least_mape_given`, `low_given`, `high_given`: of the amount,
        given that it counts.
        The gate of a sum over a horizon is the `any` head of the same days if there is one, else 1 minus the product of
        the days' chances; NaN, and with it the unconditional columns, if the horizon is longer than the future days.
        """
        daily, horizon = outputs["daily_BCFVP"].float(), outputs["horizon_BCHP"].float()
        width, inputs = self.inputs.daily, self.inputs
        p_days, p_over = daily[..., 0].sigmoid(), horizon[..., 0].sigmoid()
        gates = [b.gate for b in inputs.behaviours] + [None] * len(inputs.derived)
        none_days = torch.full_like(p_days[..., 0], torch.nan)
        none_over = none_days[:, :, 0]
        gate_days = [p_days[..., g] if g is not None else none_days for g in gates]
        gate_over = []
        for item in inputs.horizons:
            gate = inputs.behaviours[item.behaviour].gate
            wanted = ("any", gate, item.days)
            same = [i for i, h in enumerate(inputs.horizons) if (h.over, h.behaviour, h.days) == wanted]
            if gate is None:
                gate_over.append(none_over)
            elif same:
                gate_over.append(p_over[..., same[0]])
            elif item.days <= daily.shape[2]:
                gate_over.append(1 - (1 - p_days[:, :, : item.days, gate]).prod(2))
            else:
                gate_over.append(none_over)
        always_days = torch.tensor([g is None for g in gates], device=daily.device)
        ungated = [inputs.behaviours[h.behaviour].gate is None for h in inputs.horizons]
        always_over = torch.tensor(ungated, dtype=torch.bool, device=daily.device)
        over = torch.stack(gate_over, dim=-1) if gate_over else p_over
        return (
            self._columns(daily, slice(0, width), p_days, torch.stack(gate_days, dim=-1), always_days),
            self._columns(horizon, slice(width, None), p_over, over, always_over),
        )

    def _columns(self, outputs_P: Tensor, terms: slice, yes: Tensor, gate: Tensor, always: Tensor) -> dict[str, Tensor]:
        binary = self.constants["binary"][terms]
        amounts = self._amounts(outputs_P, terms)
        weight = torch.where(always, 1.0, gate)
        number = {
            "p": gate,
            "mean": weight * amounts.mean(),
            "median": amounts.hurdle_quantile(weight, 0.5),
            "low": amounts.hurdle_quantile(weight, LOW),
            "high": amounts.hurdle_quantile(weight, HIGH),
            "mean_given": amounts.mean(),
            "median_given": amounts.median(),
            "least_mape_given": amounts.least_mape(),
            "low_given": amounts.quantile(LOW),
            "high_given": amounts.quantile(HIGH),
        }
        return {
            name: torch.where(binary, yes if name in ("p", "mean") else torch.full_like(yes, torch.nan), value)
            for name, value in number.items()
        }
