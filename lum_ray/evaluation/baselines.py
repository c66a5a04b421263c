"""Baselines: four simple models that write the same prediction files as ours.

* `constant`: the training mean of each behaviour and day offset.
* `same_weekday`: the user's rate on that weekday over the last weeks, shrunk to the training mean.
* `active_share_84`: the user's share of days in the last 84. One number, and strong (FIELD.md, section 3). It is also
  the score of `any` over days, put on the scale of a probability by an increasing map (the AUC is the number's own).
* `recency_frequency_logistic`: logistic regression on recency, frequency, tenure and weekday; ridge on log1p for
  numbers.

They see a user's history by windows [from, cut) over cumulative sums, so nothing at or after a cut can enter. What is
fitted, is fitted on the training cuts alone. A number's median and interval are its conditional mean times the 50 %,
`low` and `high` quantiles of outcome / conditional mean over the training cuts: each baseline has its own functionals.

Legend: S samples, F future days, U behaviours, C = U + derived targets, H horizon targets, N users, A active days.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from lum_ray.data.windows import DerivedTarget, HorizonTarget
from lum_ray.evaluation.history import (
    LONGEST_DAYS,
    Cuts,
    design,
    features,
    observed_days,
    recency_days,
    weekday_sums,
    window_sums,
)
from lum_ray.evaluation.metrics import Floats
from lum_ray.evaluation.predictions import FUNCTIONALS, SCHEMA

WEEKS, PRIOR_WEEKS, SHARE_DAYS = 12, 4.0, 84


@dataclass(frozen=True)
class Setting:
    """What is predicted: U behaviours in the order of `Rows.values`, derived and horizon targets, and the days
    ahead.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]  # binary | continuous | count
    gates: tuple[str | None, ...]
    resolutions: tuple[float, ...]  # raw unit = stored integer * resolution; 1 for binary
    future_days: int
    derived: tuple[DerivedTarget, ...] = ()
    horizons: tuple[HorizonTarget, ...] = ()
    interval: tuple[float, float] = (0.05, 0.95)

    def binary(self, column: int) -> bool:
        """Whether column C of the daily targets is a probability (derived targets are)."""
        return column >= len(self.names) or self.kinds[column] == "binary"

    def open_horizon(self, horizon: HorizonTarget) -> int | None:
        """The horizon target that says whether the gate of a sum opens on any of the same days, if there is one."""
        gate = self.gates[horizon.behaviour]
        for index, other in enumerate(self.horizons):
            if other.over == "any" and other.days == horizon.days and self.names[other.behaviour] == gate:
                return index
        return None


# daily (S, F, C) and over (S, H): P for binary columns, E[value] in stored units for numbers
Scores = tuple[Floats, Floats]
Fitted = Callable[[Cuts], Scores]


def predict_baselines(setting: Setting, train: Cuts, test: Cuts, seed: int = 0) -> dict[str, pa.Table]:
    """Predictions of all four baselines for the test cuts, in the schema of prediction files, by model name.

    Every (sample, day, behaviour) gives a row, unknown outcomes too (y is NaN). `seed` goes into the files and into the
    choice of training rows of the regression.
    """
    fitted = {
        "constant": fit_constant(setting, train),
        "same_weekday": fit_same_weekday(setting, train),
        "active_share_84": fit_share(setting, train),
        "recency_frequency_logistic": fit_logistic(setting, train, seed),
    }
    return {name: _table(setting, name, seed, train, test, score) for name, score in fitted.items()}


def fit_constant(setting: Setting, train: Cuts) -> Fitted:
    """The mean of the training targets, per behaviour and day offset; 0 where none is known."""
    daily, over = _mean(train.daily), _mean(train.over)

    def score(cuts: Cuts) -> Scores:
        size = len(cuts.samples)
        return np.broadcast_to(daily, (size, *daily.shape)).copy(), np.broadcast_to(over, (size, *over.shape)).copy()

    return score


def fit_same_weekday(setting: Setting, train: Cuts, weeks: int = WEEKS, prior_weeks: float = PRIOR_WEEKS) -> Fitted:
    """(sum on that weekday over the last `weeks` + prior_weeks * mean) / (such days observed + prior_weeks).

    Derived and horizon targets follow from these rates with days taken as independent.
    """
    mean_U = _mean(train.daily[:, :, : len(setting.names)].reshape(-1, len(setting.names)))

    def score(cuts: Cuts) -> Scores:
        sums_SWU, seen_SW = weekday_sums(cuts, weeks)
        rate_SWU = (sums_SWU + prior_weeks * mean_U) / (seen_SW[:, :, None] + prior_weeks)
        return _from_rates(setting, cuts, rate_SWU, independent=True)

    return score


def fit_share(setting: Setting, train: Cuts, days: int = SHARE_DAYS) -> Fitted:
    """Mean per day over the last `days` days that the user was observed (the training mean where there is none)."""
    mean_U = _mean(train.daily[:, :, : len(setting.names)].reshape(-1, len(setting.names)))

    def score(cuts: Cuts) -> Scores:
        seen = observed_days(cuts, days)[:, None]
        rate_SU = np.where(seen > 0, window_sums(cuts, days) / np.maximum(seen, 1), mean_U)
        return _from_rates(setting, cuts, np.repeat(rate_SU[:, None], 7, axis=1), independent=False)

    over = score(train)[1]
    scaled = {
        h: _scaled(over[:, h], train.over[:, h]) for h, horizon in enumerate(setting.horizons) if horizon.over == "any"
    }

    def score_scaled(cuts: Cuts) -> Scores:
        daily, over = score(cuts)
        for h, scale in scaled.items():
            over[:, h] = scale(over[:, h])
        return daily, over

    return score_scaled


def _scaled(score: Floats, y: Floats) -> Callable[[Floats], Floats]:
    """An increasing map from a score to a probability (logistic in the score), or none where none can be fitted."""
    known = ~np.isnan(y)
    if len(np.unique(y[known])) < 2:
        return lambda values: values
    model = LogisticRegression(C=100.0).fit(score[known, None], y[known])
    if model.coef_[0, 0] <= 0:
        return lambda values: values
    return lambda values: np.asarray(model.predict_proba(values[:, None])[:, 1])


def fit_logistic(setting: Setting, train: Cuts, seed: int = 0, most_rows: int = 100_000) -> Fitted:
    """Per column a logistic regression (binary) or a ridge on log1p over open gates, smeared back to the mean.

    At most `most_rows` training rows a column, drawn by `seed`. A column with one class only gives its mean.
    """
    random = np.random.default_rng(seed)
    static = features(train)

    def fit(target_SF: Floats, column: int | None) -> Callable[[Floats, Cuts], Floats]:
        return _fit_column(setting, static, train, target_SF, column, random, most_rows)

    columns = [fit(train.daily[:, :, c], c) for c in range(train.daily.shape[2])]
    horizons = [fit(train.over[:, h, None], None) for h in range(len(setting.horizons))]

    def score(cuts: Cuts) -> Scores:
        static_S = features(cuts)
        daily = np.stack([model(static_S, cuts) for model in columns], axis=2)
        for u, gate in enumerate(setting.gates):
            if gate is not None:
                daily[:, :, u] *= daily[:, :, setting.names.index(gate)]
        over = [model(static_S, cuts)[:, 0] for model in horizons]
        return daily, np.stack(over, axis=1) if over else np.zeros((len(cuts.samples), 0))

    return score


def _mean(values: Floats) -> Floats:
    known = ~np.isnan(values)
    result: Floats = np.where(known, values, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return result


def _fit_column(
    setting: Setting,
    static: Floats,
    train: Cuts,
    target_SF: Floats,
    column: int | None,
    random: np.random.Generator,
    most_rows: int,
) -> Callable[[Floats, Cuts], Floats]:
    """A function from (features, cuts) to (S, F): P, or E[value | gate open]. `column` is None for a horizon target."""
    usable = ~np.isnan(target_SF)
    gate = setting.gates[column] if column is not None and column < len(setting.names) else None
    if gate is not None:
        usable &= train.daily[:, :, setting.names.index(gate)] == 1
    sample, offset = np.nonzero(usable)
    if len(sample) > most_rows:
        chosen = np.sort(random.choice(len(sample), most_rows, replace=False))
        sample, offset = sample[chosen], offset[chosen]
    y = target_SF[sample, offset]
    days = target_SF.shape[1]
    binary = setting.binary(column) if column is not None else bool(np.isin(y, (0, 1)).all())
    if len(y) == 0 or y.min() == y.max():
        level = float(y.mean()) if len(y) else 0.0
        return lambda _, cuts: np.full((len(cuts.samples), days), level)
    if not binary and gate is None and y.min() <= 0:
        # A number with days of 0 and no gate: whether it is positive, times how much if it is.
        nonzero = np.where(np.isnan(target_SF), np.nan, target_SF > 0)
        positive = np.where(target_SF > 0, target_SF, np.nan)
        whether = _fit_column(setting, static, train, nonzero, None, random, most_rows)
        amount = _fit_column(setting, static, train, positive, None, random, most_rows)
        return lambda static_S, cuts: whether(static_S, cuts) * amount(static_S, cuts)
    x = design(static, train, sample, offset)
    if binary:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=300)).fit(x, y)
        return lambda static_S, cuts: _apply(lambda rows: model.predict_proba(rows)[:, 1], static_S, cuts, days)
    lowest, highest = float(np.log1p(np.maximum(y, 0)).min()), float(np.log1p(np.maximum(y, 0)).max())
    ridge: Pipeline = make_pipeline(StandardScaler(), Ridge(alpha=1.0)).fit(x, np.log1p(np.maximum(y, 0)))

    def back(rows: Floats) -> Floats:
        # Clipped to the range seen: exp of an extrapolation has no bound.
        return np.asarray(np.expm1(np.clip(ridge.predict(rows), lowest, highest)))

    # The exponential of a mean of logarithms is too low for a mean: one factor restores the training mean (Duan's
    # smearing).
    smear = float(y.mean() / max(back(x).mean(), 1e-12))
    return lambda static_S, cuts: _apply(lambda rows: back(rows) * smear, static_S, cuts, days)


def _apply(model: Callable[[Floats], Floats], static: Floats, cuts: Cuts, days: int, chunk: int = 50_000) -> Floats:
    result = np.empty((len(cuts.samples), days))
    for start in range(0, len(result), chunk):
        sample = np.arange(start, min(start + chunk, len(result)))
        for offset in range(days):
            result[sample, offset] = model(design(static, cuts, sample, np.full(len(sample), offset)))
    return result


def _from_rates(setting: Setting, cuts: Cuts, rate_SWU: Floats, independent: bool) -> Scores:
    """Scores from each user's daily rate per weekday. `independent`: `any` over n days is 1 - prod(1 - rate); else the
    rate.
    """
    size = len(cuts.samples)
    cut, sample = cuts.samples.cut.astype(np.int64), np.arange(size)

    def over(column: int, start: int, days: int, complement: bool) -> Floats:
        rate = np.stack([rate_SWU[sample, (cut + start + j) % 7, column] for j in range(days)], axis=1)
        if not complement:
            return np.asarray(rate.sum(axis=1))
        if not independent:
            return np.asarray(1 - np.clip(rate.mean(axis=1), 0, 1))
        return np.asarray(np.prod(1 - np.clip(rate, 0, 1), axis=1))

    daily = np.empty((size, setting.future_days, len(setting.names) + len(setting.derived)))
    since = recency_days(cuts)
    for f in range(setting.future_days):
        daily[:, f, : len(setting.names)] = rate_SWU[sample, (cut + f) % 7]
        for column, target in enumerate(setting.derived, start=len(setting.names)):
            if target.form == "churned":
                daily[:, f, column] = over(target.behaviour, f, target.days, complement=True)
            else:
                # Active within the silence that a return needs: it cannot be one. The rest return at their rate.
                silent = since - 1 >= min(target.days - f, LONGEST_DAYS - 1)
                daily[:, f, column] = np.where(silent, rate_SWU[sample, (cut + f) % 7, target.behaviour], 0)
    binary = [c for c in range(daily.shape[2]) if setting.binary(c)]
    daily[:, :, binary] = np.clip(daily[:, :, binary], 0, 1)
    horizons = []
    for h in setting.horizons:
        total = over(h.behaviour, 0, h.days, complement=h.over == "any")
        horizons.append(1 - total if h.over == "any" else total)
    return daily, np.stack(horizons, axis=1) if horizons else np.zeros((size, 0))


def _table(setting: Setting, model: str, seed: int, train: Cuts, test: Cuts, score: Fitted) -> pa.Table:
    """The prediction file of a fitted baseline over the test cuts."""
    (train_daily, train_over), (daily, over) = score(train), score(test)
    pieces = []
    names = [*setting.names, *(target.name for target in setting.derived)]
    for c, name in enumerate(names):
        gate = setting.gates[c] if c < len(setting.names) else None
        y, value = test.daily[:, :, c], daily[:, :, c]
        if setting.binary(c):
            pieces.append(prediction_rows(model, seed, test, name, y, {"p": value, "mean": value}))
            continue
        unit, open_SF = setting.resolutions[c], ~np.isnan(train.daily[:, :, c])
        p = train_p = None
        if gate is not None:
            g = names.index(gate)
            p, train_p = daily[:, :, g], train_daily[:, :, g]
            open_SF &= train.daily[:, :, g] == 1
        functionals = _number(setting, value, p, train_daily[:, :, c], train_p, train.daily[:, :, c], open_SF)
        columns = {k: v if k == "p" else v * unit for k, v in functionals.items()}
        pieces.append(prediction_rows(model, seed, test, name, y * unit, columns))
    for h, horizon in enumerate(setting.horizons):
        y, value = test.over[:, h, None], over[:, h, None]
        if horizon.over == "any":
            pieces.append(prediction_rows(model, seed, test, horizon.name, y, {"p": value, "mean": value}))
            continue
        unit, past = setting.resolutions[horizon.behaviour], train.over[:, h, None]
        open_S1, p, train_p = ~np.isnan(past), None, None
        if (opened := setting.open_horizon(horizon)) is not None:
            p, train_p = over[:, opened, None], train_over[:, opened, None]
            open_S1 &= train.over[:, opened, None] == 1
        functionals = _number(setting, value, p, train_over[:, h, None], train_p, past, open_S1)
        columns = {k: v if k == "p" else v * unit for k, v in functionals.items()}
        pieces.append(prediction_rows(model, seed, test, horizon.name, y * unit, columns))
    return pa.concat_tables(pieces)


def _number(
    setting: Setting,
    mean: Floats,
    p: Floats | None,
    train_mean: Floats,
    train_p: Floats | None,
    y: Floats,
    counted: NDArray[np.bool_],
) -> dict[str, Floats]:
    """All functionals of a number from its mean; `y` and `counted` are the training outcomes to take the spread
    from.
    """

    def conditional(total: Floats, share: Floats | None) -> Floats:
        return total if share is None else np.divide(total, share, out=np.zeros_like(total), where=share > 0)

    expected = conditional(train_mean, train_p)
    counted = counted & (expected > 0)
    low, high = setting.interval
    spread = np.quantile(y[counted] / expected[counted], [low, 0.5, high]) if counted.any() else np.ones(3)
    value = conditional(mean, p)
    result = {"mean": mean, "low": value * spread[0], "median": value * spread[1], "high": value * spread[2]}
    return result if p is None else result | {"p": p}


def prediction_rows(model: str, seed: int, cuts: Cuts, name: str, y: Floats, columns: Mapping[str, Floats]) -> pa.Table:
    """One behaviour's rows of a prediction file (S * F, or S for a horizon target), by sample, then by day; `y` and
    each column are (S, F) or (S, 1), in raw units."""
    days = y.shape[1]
    sample = np.repeat(np.arange(len(y)), days)
    cut = cuts.samples.cut[sample].astype(np.int32)
    size = len(sample)
    absent = np.full(size, np.nan, dtype=np.float32)
    arrays = {
        "user": pa.array(cuts.rows.user, pa.string()).take(pa.array(cuts.samples.row[sample])),
        "cut_day": cut,
        "day": cut + np.tile(np.arange(days, dtype=np.int32), len(y)),
        "behaviour": pa.repeat(pa.scalar(name, pa.string()), size),
        "y": y.reshape(-1).astype(np.float64),
        "model": pa.repeat(pa.scalar(model, pa.string()), size),
        "seed": np.full(size, seed, dtype=np.int32),
    }
    for column in FUNCTIONALS:
        arrays[column] = columns[column].reshape(-1).astype(np.float32) if column in columns else absent
    return pa.table({field.name: arrays[field.name] for field in SCHEMA}, schema=SCHEMA)
