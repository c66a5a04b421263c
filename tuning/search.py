"""Which trial is next, and which is stopped: Optuna's study behind Ray Tune's searcher, and ASHA.

Tune's own `OptunaSearch` knows neither trials of an earlier process that go on, nor values that do not go together, nor
repeats, which a small space is full of; it would run each of these.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from lum_ray import config
from lum_ray.artifacts import UserError, join
from lum_ray.config import Run
from tuning.ledger import Ledger, Record, key_of
from tuning.spaces import Space, value_of
from tuning.trial import train_seconds

ATTEMPTS = 20
MOST_COMBINATIONS = 20_000
REDUCTION = 3


class Search(Searcher):
    """Suggests the trials of a ledger up to `trials`, unfinished ones first, and none after `deadline` (time.time()).

    The first trial is the run as it is. A suggestion is {key, run (JSON), steps}.
    """

    def __init__(
        self,
        run: Run,
        space: Space,
        ledger: Ledger,
        metric: str,
        mode: str,
        trials: int,
        deadline: float,
        ended: Callable[[Record], None],
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self.run, self.space, self.ledger, self.trials, self.deadline = run, space, ledger, trials, deadline
        self.ended = ended
        self.known = {record.key: record for record in ledger.records()}
        self.queue = [record for record in self.known.values() if record.state == "unfinished"]
        self.live: dict[str, tuple[Record, optuna.Trial | None]] = {}
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.study = study_of(run, space, list(self.known.values()), mode, run.seed + len(self.known))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial, or that there is none."""
        if time.time() > self.deadline:
            return Searcher.FINISHED
        record, trial = self._next()
        if record is None:
            return Searcher.FINISHED
        self.live[trial_id] = record, trial
        self.curves[trial_id] = []
        run = self.space.apply(self.run, record.values)
        return {"key": record.key, "run": json.dumps(config.dump(run)), "steps": run.train.steps}

    def over(self) -> bool:
        """Whether all trials are over: as many as were asked for, or all that a finite space holds."""
        if any(record.state == "unfinished" for record in self.known.values()):
            return False
        return len(self.known) >= self.trials or (self._finite() and self._left() is None)

    def _next(self) -> tuple[Record | None, optuna.Trial | None]:
        if self.queue:
            record = self.queue.pop(0)
            return record, self._told(record.values)
        if len(self.known) >= self.trials:
            return None, None
        if not self.known:
            return self._started({}), self._told({})
        for _ in range(ATTEMPTS):
            trial = self.study.ask(self._distributions())
            if self._new(trial.params):
                return self._started(trial.params), trial
            self.study.tell(trial, state=TrialState.FAIL)
        values = self._left()
        return (None, None) if values is None else (self._started(values), self._told(values))

    def _new(self, values: Mapping[str, Any]) -> bool:
        try:
            return key_of(self.space.apply(self.run, values)) not in self.known
        except UserError:
            return False

    def _finite(self) -> bool:
        return math.prod(item.size() for item in self.space.distributions.values()) <= MOST_COMBINATIONS

    def _left(self) -> dict[str, Any] | None:
        """Values that no trial had yet, where the space is finite."""
        if not self._finite():
            return None
        distributions = self.space.distributions
        every = [dict(zip(distributions, v)) for v in itertools.product(*(d.probes() for d in distributions.values()))]
        random.Random(len(self.known)).shuffle(every)
        return next((values for values in every if self._new(values)), None)

    def _started(self, values: Mapping[str, Any]) -> Record:
        key = key_of(self.space.apply(self.run, values))
        number = 1 + max((record.number for record in self.known.values()), default=-1)
        self.known[key] = self.ledger.start(key, number, values)
        return self.known[key]

    def _told(self, values: Mapping[str, Any]) -> optuna.Trial | None:
        """The study's trial of given values; None where they lie outside the space, as the run's own may."""
        params = params_of(self.run, self.space, values)
        if params is None:
            return None
        self.study.enqueue_trial(params)
        return self.study.ask(self._distributions())

    def _distributions(self) -> dict[str, Any]:
        return {path: item.optuna() for path, item in self.space.distributions.items()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A validation of a running trial."""
        if "state" in result or trial_id not in self.live:
            return
        step, value = int(result["step"]), float(result[self.metric])
        self.curves[trial_id].append((step, value))
        trial = self.live[trial_id][1]
        if trial is not None and not math.isnan(value):
            trial.report(value, step)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial is over: finished or failed by its own word, pruned, out of time, or (`error`) crashed too often."""
        if trial_id not in self.live:
            return
        record, trial = self.live.pop(trial_id)
        curve = self.curves.pop(trial_id)
        said = (result or {}).get("state")
        if said is None and not error and result:
            curve.append((int(result["step"]), float(result[self.metric])))  # Tune hands the last one on here alone
            checkpoint = self.ledger.read(record.key).checkpoint
            seconds = train_seconds(join(self.run.root, "checkpoints", checkpoint)) if checkpoint else 0.0
            self.ledger.end(record.key, "pruned", value=curve[-1][1], curve=curve, train_s=seconds)
        record = self.ledger.read(record.key)
        self.known[record.key] = record
        if trial is not None:
            state = _state(record)
            self.study.tell(trial, record.value if state == TrialState.COMPLETE else None, state=state)
        if said != "stopped":
            self.ended(replace(record, message=record.message or ("crashed too often" if error else "")))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles the searcher beside its own files; the ledger is the truth

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


def params_of(run: Run, space: Space, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """All searched settings of a trial, or None where one lies outside the space."""
    base = space.base(run)
    params = {path: values.get(path, value_of(base, path)) for path in space.distributions}
    return params if all(item.holds(params[path]) for path, item in space.distributions.items()) else None


def study_of(run: Run, space: Space, records: list[Record], mode: str, seed: int = 0) -> optuna.Study:
    """An Optuna study that has seen the trials of `records` that are over."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=6)
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize", sampler=sampler)
    distributions = {path: item.optuna() for path, item in space.distributions.items()}
    for record in records:
        params = params_of(run, space, record.values)
        if record.state != "unfinished" and params is not None:
            study.add_trial(_frozen(record, params, distributions))
    return study


def _frozen(record: Record, params: dict[str, Any], distributions: dict[str, Any]) -> FrozenTrial:
    state = _state(record)
    return optuna.trial.create_trial(
        state=state,
        value=record.value if state == TrialState.COMPLETE else None,
        params=params,
        distributions=distributions,
        intermediate_values={step: value for step, value in record.curve if not math.isnan(value)},
    )


def _state(record: Record) -> TrialState:
    if record.state == "finished" and record.value is not None and not math.isnan(record.value):
        return TrialState.COMPLETE
    return TrialState.PRUNED if record.state == "pruned" else TrialState.FAIL


class Pruner(ASHAScheduler):
    """ASHA over training steps. Not stopped: the run as it is (`never`), which all are compared with, and a trial whose
    training is over, since its prediction files are all that is still missing."""

    def __init__(self, metric: str, mode: str, first: int, steps: int, never: str, records: list[Record]) -> None:
        super().__init__("step", metric, mode, max_t=max(steps, first), grace_period=first,
                         reduction_factor=REDUCTION, stop_last_trials=False)  # fmt: skip
        self.never = never
        for record in records:
            # what earlier processes saw of the trials that are over
            stub: Any = SimpleNamespace(trial_id=record.key, config={"key": record.key, "steps": math.inf})
            if record.state != "unfinished":
                self.on_trial_add(None, stub)
                for step, value in record.curve:
                    super().on_trial_result(None, stub, {"step": step, metric: value})
                self.on_trial_remove(None, stub)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether a trial goes on after a validation."""
        if "state" in result or result["step"] >= trial.config["steps"]:
            return str(TrialScheduler.CONTINUE)
        action = str(super().on_trial_result(controller, trial, result))
        return str(TrialScheduler.CONTINUE) if trial.config["key"] == self.never else action

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial is over; its last report is no validation."""
        self.on_trial_remove(controller, trial)
