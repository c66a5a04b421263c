"""LightGBM on hand-made features, one model per task and horizon: the strong peer that LUMOS must beat.

It stands in for the paper's task-specific networks with hand-made features (Source: LUMOS, section 4.1; Departs: trees
in place of networks). It is given what LUMOS is given: the same users and training cuts, the calendar as it was known,
the profile, and the validation cuts to stop early on; and what LUMOS is not given, a model for each day ahead and each
functional. So it is fed to each metric by a model trained for it: quantiles for the median and the interval, a gamma
model for the mean, LightGBM's MAPE objective for the forecast with the least percentage error.

Legend: S samples, F future days, H horizon targets, C features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

MODEL = "lightgbm"
GRID: tuple[dict[str, Any], ...] = (
    {"num_leaves": 15, "min_data_in_leaf": 100, "feature_fraction": 0.3},
    {"num_leaves": 7, "min_data_in_leaf": 100, "feature_fraction": 0.1},
    {"num_leaves": 31, "min_data_in_leaf": 300, "feature_fraction": 0.3},
)
FIXED = {
    "learning_rate": 0.03,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "verbose": -1,
    "deterministic": True,
    "force_row_wise": True,
}
MOST_TREES, PATIENCE_TREES = 1500, 60


def objectives(interval: tuple[float, float]) -> dict[str, dict[str, Any]]:
    """What each functional of a number, given that its gate is open, is trained with."""
    low, high = interval
    return {
        "mean": {"objective": "gamma"},
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
class Boosted:
    """Fits and predicts task by task. `profile` names the columns of the profile that it reads; `threads` 0: all."""

    setting: Setting
    train: Part
    validate: Part
    test: Part
    profile: tuple[str, ...] = ()
    calendar: bool = True
    seed: int = 0
    threads: int = 0
    _tuned: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    _general: list[Sheet] = field(default_factory=list)
    _focus: dict[int, list[Sheet]] = field(default_factory=dict)
    _opened: dict[int, Floats] = field(default_factory=dict)

    def table(
        self, tasks: Sequence[str], model: str = MODEL, log: Callable[[str], None] = lambda text: None
    ) -> pa.Table:
        """The prediction file of the test cuts for `tasks`: yes-or-no behaviours and horizons.

        Raises UserError, before any model is fitted, for a task that is neither, and where lightgbm is missing.
        """
        _lightgbm()
        for name in tasks:
            self._refuse(name)
        pieces = []
        for name in tasks:
            log(f"{model}: {name}")
            pieces.append(self._daily(name, model) if name in self.setting.names else self._horizon(name, model))
        return pa.concat_tables(pieces)

    def _parts(self) -> tuple[Part, Part, Part]:
        return self.train, self.validate, self.test

    def _refuse(self, name: str) -> None:
        names = [horizon.name for horizon in self.setting.horizons]
        if name in self.setting.names:
            if not self.setting.binary(self.setting.names.index(name)):
                raise UserError(f"{name}: the peer predicts numbers over horizons only; ask for a sum over days")
        elif name not in names:
            known = ", ".join((*self.setting.names, *names)[:20])
            raise UserError(f"{name}: the peer predicts behaviours and horizons; expected one of {known}")
        else:
            horizon = self.setting.horizons[names.index(name)]
            if horizon.over == "sum" and self.setting.open_horizon(horizon) is None:
                raise UserError(f"{name}: the peer needs `any` of its gate over the same days among the horizons")

    def _daily(self, name: str, model: str) -> pa.Table:
        column = self.setting.names.index(name)
        p = np.empty((len(self.test.cuts.samples), self.setting.future_days))
        for ahead_days in range(self.setting.future_days):
            y = [part.cuts.daily[:, ahead_days, column] > 0 for part in self._parts()[:2]]
            known = [~np.isnan(part.cuts.daily[:, ahead_days, column]) for part in self._parts()[:2]]
            sheets = self._sheets(column, ahead_days, 1)
            p[:, ahead_days] = self._fitted(column, {"objective": "binary"}, sheets, y, known)
        return prediction_rows(
            model, self.seed, self.test.cuts, name, self.test.cuts.daily[:, :, column], {"p": p, "mean": p}
        )

    def _horizon(self, name: str, model: str) -> pa.Table:
        place = [horizon.name for horizon in self.setting.horizons].index(name)
        horizon = self.setting.horizons[place]
        truth = self.test.cuts.over[:, place, None]
        if horizon.over == "any":
            p = self._any(place)
            return prediction_rows(model, self.seed, self.test.cuts, name, truth, {"p": p, "mean": p})
        unit = self.setting.resolutions[horizon.behaviour]
        sheets = self._sheets(horizon.behaviour, 0, horizon.days)
        values = [part.cuts.over[:, place] * unit for part in self._parts()[:2]]
        opened = [value > 0 for value in values]  # an unknown value is not above 0 either
        found = {
            column: np.maximum(self._fitted(horizon.behaviour, objective, sheets, values, opened), 0)[:, None]
            for column, objective in objectives(self.setting.interval).items()
        }
        gate = self.setting.open_horizon(horizon)
        assert gate is not None
        p = self._any(gate)
        columns = {"p": p, **found, "mean": p * found["mean"]}
        return prediction_rows(model, self.seed, self.test.cuts, name, truth * unit, columns)

    def _any(self, place: int) -> Floats:
        """(S, 1) P(`any` over the days), fitted once: a task of its own may be the gate of a sum as well."""
        if place in self._opened:
            return self._opened[place]
        horizon = self.setting.horizons[place]
        y = [part.cuts.over[:, place] for part in self._parts()[:2]]
        known = [~np.isnan(values) for values in y]
        sheets = self._sheets(horizon.behaviour, 0, horizon.days)
        yes = [values > 0 for values in y]
        self._opened[place] = self._fitted(horizon.behaviour, {"objective": "binary"}, sheets, yes, known)[:, None]
        return self._opened[place]

    def _sheets(self, column: int, first: int, days: int) -> list[Sheet]:
        """The features of training, validation and test for days [first, first + days) after the cut."""
        setting = self.setting
        focus = setting.names.index(gate) if (gate := setting.gates[column]) is not None else column
        if not self._general:
            seen = features.vocabulary(self.train.cuts.rows)
            known = {name: values for name, values in seen.items() if name in self.profile}
            gates = tuple(setting.names.index(gate) if gate is not None else None for gate in setting.gates)
            for part in self._parts():
                rows, samples = part.cuts.rows, part.cuts.samples
                sheet = features.general(rows, samples, setting.names, gates)
                self._general.append(sheet.beside(features.profile(rows, samples.row, known)))
        if focus not in self._focus:
            self._focus[focus] = [
                features.focus(part.cuts.rows, part.cuts.samples, self._ahead(part), focus, setting.names[focus])
                for part in self._parts()
            ]
        return [
            general.beside(own, features.coming(self._ahead(part), part.cuts.samples.cut.astype(np.int64), first, days))
            for part, general, own in zip(self._parts(), self._general, self._focus[focus], strict=True)
        ]

    def _ahead(self, part: Part) -> Ahead:
        if self.calendar:
            return part.ahead
        return replace(part.ahead, types=(), counts_ET=part.ahead.counts_ET[:, :0])

    def _fitted(
        self,
        column: int,
        objective: dict[str, Any],
        sheets: list[Sheet],
        y: Sequence[np.ndarray[Any, Any]],
        known: Sequence[np.ndarray[Any, Any]],
    ) -> Floats:
        """Predictions of the test (S,) by a model fitted on known training rows and stopped on known validation ones.

        The first model of a behaviour and an objective tries the grid; the others take what was best for it.
        """
        lightgbm = _lightgbm()
        train, test = (np.flatnonzero(mask) for mask in known)
        if len(train) == 0 or len(test) == 0:
            raise UserError(f"{self.setting.names[column]}: no training or no validation row with a known outcome")
        coded = [sheets[0].names.index(name) for name in sheets[0].categories]
        # else features are dropped for the first `min_data_in_leaf`, and the grid may not change it
        fixed = {"feature_pre_filter": False}
        table = lightgbm.Dataset(
            sheets[0].columns[train],
            y[0][train].astype(np.float64),
            categorical_feature=coded,
            params=fixed,
            free_raw_data=False,
        )
        watched = lightgbm.Dataset(
            sheets[1].columns[test], y[1][test].astype(np.float64), reference=table, params=fixed
        )
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
        return np.asarray(best[1].predict(sheets[2].columns, num_threads=self.threads), np.float64)


def _lightgbm() -> Any:
    # Imported where it is used: only the benchmark needs it.
    try:
        import lightgbm
    except ImportError as error:
        raise UserError("the peer needs lightgbm; install it with `pip install 'lum_ray[bench]'`") from error
    return lightgbm
