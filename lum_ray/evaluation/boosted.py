"""LightGBM on hand-made features, one model per task and horizon: the strong peer that LUMOS must beat.

It stands in for the paper's task-specific networks with hand-made features (Source: LUMOS, section 4.1; Departs: trees
in place of networks). It is given what LUMOS is given: the same users and training cuts, the calendar as it was known,
the profile, and the validation cuts to stop early on; and what LUMOS is not given, a model for each day ahead and each
functional. So it is fed to each metric by a model trained for it: quantiles for the median and the interval, a gamma
model for the mean, LightGBM's MAPE objective for the forecast with the least percentage error.

Legend: S samples, F future days, H horizon targets, C features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lum_ray.artifacts import UserError
from lum_ray.evaluation import features
from lum_ray.evaluation.baselines import Setting, prediction_rows
from lum_ray.evaluation.features import Ahead, Sheet
from lum_ray.evaluation.history import Cuts
from lum_ray.evaluation.metrics import Floats
from lum_ray.evaluation.predictions import Task

MODEL = "lightgbm"
GRID: tuple[dict[str, Any], ...] = (
    {"num_leaves": 15, "min_data_in_leaf": 100, "feature_fraction": 0.3},
    {"num_leaves": 31, "min_data_in_leaf": 300, "feature_fraction": 0.2},
)
FIXED = {
    "learning_rate": 0.05,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "verbose": -1,
    "deterministic": True,
    "force_row_wise": True,
}
MOST_TREES, PATIENCE_TREES = 1000, 40
BINARY: dict[str, Any] = {"objective": "binary"}


def objectives(interval: tuple[float, float], gated: bool) -> dict[str, dict[str, Any]]:
    """What each functional of a number is trained with: given that its gate is open (then it is above 0), or of all."""
    low, high = interval
    return {
        "mean": {"objective": "gamma" if gated else "tweedie"},
        "median": {"objective": "quantile", "alpha": 0.5},
        "low": {"objective": "quantile", "alpha": low},
        "high": {"objective": "quantile", "alpha": high},
        "least_mape": {"objective": "mape"},
    }


@dataclass(frozen=True)
class Part:
    """Samples of some users with their targets, and the calendar as it was known at each cut."""

    cuts: Cuts
    ahead: Ahead


@dataclass(frozen=True)
class _Book:
    """The features of a part, each computed once."""

    part: Part
    setting: Setting
    vocabulary: Mapping[str, tuple[str, ...]]
    calendar: bool
    _general: list[Sheet] = field(default_factory=list)
    _focus: dict[int, Sheet] = field(default_factory=dict)

    def sheet(self, column: int, first: int, days: int) -> Sheet:
        """Everything about behaviour `column` on days [first, first + days) after the cut."""
        setting, cuts = self.setting, self.part.cuts
        ahead = self.part.ahead
        if not self.calendar:
            ahead = replace(ahead, types=(), counts_ET=ahead.counts_ET[:, :0])
        gates = tuple(setting.names.index(gate) if gate is not None else None for gate in setting.gates)
        gate = gates[column]
        focus = column if gate is None else gate
        if not self._general:
            sheet = features.general(cuts.rows, cuts.samples, setting.names, gates)
            self._general.append(sheet.beside(features.profile(cuts.rows, cuts.samples, self.vocabulary)))
        if focus not in self._focus:
            self._focus[focus] = features.focus(cuts.rows, cuts.samples, ahead, focus, setting.names[focus])
        coming = features.coming(ahead, cuts.samples.cut.astype(np.int64), first, days)
        return self._general[0].beside(self._focus[focus], coming)


@dataclass(frozen=True)
class Boosted:
    """Fits task by task, on demand, and predicts any part. `profile` names the columns of the profile that it reads;
    `threads` 0: all."""

    setting: Setting
    train: Part
    validate: Part
    profile: tuple[str, ...] = ()
    calendar: bool = True
    seed: int = 0
    threads: int = 0
    _books: list[_Book] = field(default_factory=list)
    _tuned: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    _models: dict[tuple[str, int, str], Any] = field(default_factory=dict)

    def table(
        self,
        test: Part,
        tasks: Mapping[str, Task],
        model: str = MODEL,
        log: Callable[[str], None] = lambda text: None,
    ) -> pa.Table:
        """The prediction file of the cuts of `test` for `tasks`: yes-or-no behaviours and horizons.

        A number whose task has no gate is predicted as it is, over all rows. Raises UserError, before any model is
        fitted, for a task that is neither, and where lightgbm is missing.
        """
        _lightgbm()
        for name, task in tasks.items():
            self._refuse(name, task)
        book = self._book(test)
        pieces = []
        for name, task in tasks.items():
            log(f"{model}: {name}")
            daily = name in self.setting.names
            pieces.append(self._daily(book, name, model) if daily else self._horizon(book, name, task, model))
        return pa.concat_tables(pieces)

    def _book(self, part: Part) -> _Book:
        seen = features.vocabulary(self.train.cuts.rows)
        known = {name: values for name, values in seen.items() if name in self.profile}
        return _Book(part, self.setting, known, self.calendar)

    def _refuse(self, name: str, task: Task) -> None:
        names = [horizon.name for horizon in self.setting.horizons]
        if name in self.setting.names:
            if not self.setting.binary(self.setting.names.index(name)):
                raise UserError(f"{name}: the peer predicts numbers over horizons only; ask for a sum over days")
        elif name not in names:
            known = ", ".join((*self.setting.names, *names)[:20])
            raise UserError(f"{name}: the peer predicts behaviours and horizons; expected one of {known}")
        elif task.gate and self.setting.open_horizon(self.setting.horizons[names.index(name)]) is None:
            raise UserError(f"{name}: the peer needs `any` of its gate over the same days among the horizons")

    def _daily(self, book: _Book, name: str, model: str) -> pa.Table:
        column, cuts = self.setting.names.index(name), book.part.cuts
        p = np.empty((len(cuts.samples), self.setting.future_days))
        for ahead in range(self.setting.future_days):
            y = [part.cuts.daily[:, ahead, column] for part in (self.train, self.validate)]
            p[:, ahead] = self._predict(book, name, column, (ahead, 1), BINARY, [_yes(values) for values in y])
        return prediction_rows(model, self.seed, cuts, name, cuts.daily[:, :, column], {"p": p, "mean": p})

    def _horizon(self, book: _Book, name: str, task: Task, model: str) -> pa.Table:
        place = [horizon.name for horizon in self.setting.horizons].index(name)
        horizon, cuts = self.setting.horizons[place], book.part.cuts
        truth = cuts.over[:, place, None]
        if horizon.over == "any":
            p = self._any(book, place)
            return prediction_rows(model, self.seed, cuts, name, truth, {"p": p, "mean": p})
        unit = self.setting.resolutions[horizon.behaviour]
        values = [part.cuts.over[:, place] * unit for part in (self.train, self.validate)]
        gated = task.gate is not None
        if gated:
            values = [np.where(value > 0, value, np.nan) for value in values]
        days, target = (0, horizon.days), name if gated else f"{name}, all rows"
        columns = {
            column: np.maximum(self._predict(book, target, horizon.behaviour, days, objective, values), 0)[:, None]
            for column, objective in objectives(self.setting.interval, gated).items()
        }
        if gated:
            gate = self.setting.open_horizon(horizon)
            assert gate is not None
            columns["p"] = self._any(book, gate)
            columns["mean"] = columns["p"] * columns["mean"]
        return prediction_rows(model, self.seed, cuts, name, truth * unit, columns)

    def _any(self, book: _Book, place: int) -> Floats:
        """(S, 1) P(`any` over the days)."""
        horizon = self.setting.horizons[place]
        y = [_yes(part.cuts.over[:, place]) for part in (self.train, self.validate)]
        return self._predict(book, horizon.name, horizon.behaviour, (0, horizon.days), BINARY, y)[:, None]

    def _predict(
        self,
        book: _Book,
        target: str,
        column: int,
        days: tuple[int, int],
        objective: dict[str, Any],
        y: Sequence[Floats],
    ) -> Floats:
        """(S,) predictions of `target` by the model of an objective, fitted once on training and validation outcomes
        `y` (NaN: a row that does not count)."""
        key = (target, days[0], f"{sorted(objective.items())}")
        if key not in self._models:
            self._models[key] = self._fitted(column, days, objective, y)
        sheet = book.sheet(column, *days)
        return np.asarray(self._models[key].predict(sheet.columns, num_threads=self.threads), np.float64)

    def _fitted(self, column: int, days: tuple[int, int], objective: dict[str, Any], y: Sequence[Floats]) -> Any:
        """A booster, stopped early on the validation rows.

        The first model of a behaviour and an objective tries the grid; the others take what was best for it.
        """
        lightgbm = _lightgbm()
        train, test = (np.flatnonzero(~np.isnan(values)) for values in y)
        if not self._books:
            self._books.extend(self._book(part) for part in (self.train, self.validate))
        known, held = (book.sheet(column, *days) for book in self._books)
        if len(train) and not len(test):
            # a target over more days than validation has: the newest fifth of the training rows watches instead
            cut = self.train.cuts.samples.cut[train]
            newest = cut > min(np.quantile(cut, 0.8), cut.max() - 1)
            train, test, held, y = train[~newest], train[newest], known, (y[0], y[0])
        if len(train) == 0 or len(test) == 0:
            raise UserError(f"{self.setting.names[column]}: no training or no validation row with a known outcome")
        coded = [known.names.index(name) for name in known.categories]
        # else features are dropped for the first `min_data_in_leaf`, and the grid may not change it
        fixed = {"feature_pre_filter": False}
        table = lightgbm.Dataset(
            known.columns[train], y[0][train], categorical_feature=coded, params=fixed, free_raw_data=False
        )
        watched = lightgbm.Dataset(held.columns[test], y[1][test], reference=table, params=fixed)
        key = (column, str(sorted(objective.items())))
        best: tuple[float, Any, dict[str, Any]] | None = None
        for setting in [self._tuned[key]] if key in self._tuned else GRID:
            booster = lightgbm.train(
                {**FIXED, **objective, **setting, "num_threads": self.threads, "seed": self.seed},
                table,
                MOST_TREES,
                valid_sets=[watched],
                callbacks=[lightgbm.early_stopping(PATIENCE_TREES, verbose=False)],
            )
            (loss,) = booster.best_score["valid_0"].values()
            if best is None or loss < best[0]:
                best = (loss, booster, setting)
        assert best is not None
        self._tuned[key] = best[2]
        return best[1]


def _yes(values: Floats) -> Floats:
    """1 where above 0, NaN where unknown."""
    return np.where(np.isnan(values), np.nan, values > 0)


def _lightgbm() -> Any:
    # Imported where it is used: only the benchmark needs it.
    try:
        import lightgbm
    except ImportError as error:
        raise UserError("the peer needs lightgbm; install it with `pip install 'lum_ray[bench]'`") from error
    return lightgbm
