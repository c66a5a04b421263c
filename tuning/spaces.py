"""What is searched: settings of a run by dotted path, each with the values that it may take.

A space of one's own is a YAML file; whatever is wrong with it is said before anything starts:

    gts.slot_minutes: {choice: [15, 60, 240, 1440]}
    gts.max_tokens: {int: [32, 128]}
    train.learning_rate: {log: [0.0003, 0.01]}
    train.weight_decay: {float: [0.0, 0.1]}
    train.steps: 100                              # set for all trials
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from optuna import distributions as optuna_distributions
from optuna.distributions import BaseDistribution

from lum_ray import catalog, config
from lum_ray.artifacts import UserError
from lum_ray.config import Run

Values = Mapping[str, Any]
FORMS = ("choice", "int", "float", "log")
ASKED = ("name", "root", "split", "tune", "serve", "train.seed", "train.validate_users", "train.workers",
         "train.micro_batch", "train.zero_stage", "train.checkpoint_every", "train.max_failures")  # fmt: skip
ASKED_DATA = ("behaviours", "derived", "horizons", "events", "source", "time_zone", "start", "end", "engine",
              "max_reject_share")  # fmt: skip
MOST_INTS, DRAWS = 4096, 8


@dataclass(frozen=True)
class Distribution:
    """The values of one setting. `choice`: `values`; else `low` to `high`, both included; `log`: floats, by their
    logarithm."""

    form: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    def optuna(self) -> BaseDistribution:
        if self.form == "choice":
            return optuna_distributions.CategoricalDistribution(self.values)
        if self.form == "int":
            return optuna_distributions.IntDistribution(int(self.low), int(self.high))
        return optuna_distributions.FloatDistribution(self.low, self.high, log=self.form == "log")

    def holds(self, value: Any) -> bool:
        """Whether it is one of the values; a setting of the run may be null."""
        if self.form == "choice":
            return value in self.values
        return value is not None and bool(self.low <= value <= self.high)

    def size(self) -> float:
        """How many values there are."""
        if self.form == "choice":
            return len(self.values)
        return self.high - self.low + 1 if self.form == "int" else math.inf

    def probes(self) -> tuple[Any, ...]:
        """Values that stand for all in a check: all of a choice and of whole numbers, the ends of an interval."""
        if self.form == "choice":
            return self.values
        if self.form == "int":
            return tuple(range(int(self.low), int(self.high) + 1))
        return (self.low, (self.low + self.high) / 2, self.high)

    def draw(self, chance: random.Random) -> Any:
        if self.form == "choice":
            return chance.choice(self.values)
        if self.form == "int":
            return chance.randint(int(self.low), int(self.high))
        if self.form == "log":
            return math.exp(chance.uniform(math.log(self.low), math.log(self.high)))
        return chance.uniform(self.low, self.high)


def choice(*values: Any) -> Distribution:
    return Distribution("choice", values)


def _unchanged(run: Run, values: Values) -> Values:
    return {}


@dataclass(frozen=True)
class Space:
    """`fixed` is set in all trials; `also` gives settings that follow from a trial's values. `map_of`: the two settings
    (across, down) of the heat map."""

    name: str
    distributions: Mapping[str, Distribution]
    fixed: Values = field(default_factory=dict)
    also: Callable[[Run, Values], Values] = _unchanged
    map_of: tuple[str, str] | None = None

    def base(self, run: Run) -> Run:
        """The run with what is fixed: the trial that all others are compared with."""
        return with_values(run, self.fixed)

    def apply(self, run: Run, values: Values) -> Run:
        """The run of a trial. Raises UserError where these values do not go together."""
        base = self.base(run)
        return with_values(base, {**values, **self.also(base, values)}) if values else base

    def shape(self) -> dict[str, Any]:
        """What names the search, as plain values."""
        return {"fixed": dict(self.fixed), **{path: dataclasses.asdict(d) for path, d in self.distributions.items()}}


def with_values(run: Run, values: Values) -> Run:
    """The run with settings by dotted path. Raises UserError as reading a run file does."""
    raw = config.dump(run)
    for path, value in values.items():
        *parents, last = path.split(".")
        place: Any = raw
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[int(last) if isinstance(place, list) else last] = value
    return catalog.read_run(raw)


def value_of(run: Run, path: str) -> Any:
    """The run's setting at a dotted path. Raises UserError where there is none."""
    place: Any = config.dump(run)
    for part in path.split("."):
        if isinstance(place, dict) and part in place:
            place = place[part]
        elif isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        else:
            known = [
                str(part)
                for part in (place if isinstance(place, dict) else range(len(place)) if isinstance(place, list) else ())
            ]
            close = difflib.get_close_matches(part, known, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else f"; known there: {', '.join(known[:5]) or 'nothing'}"
            raise UserError(f"{path}: a setting that is not in the run {run.name}{hint}")
    return place


def _lumos_also(run: Run, values: Values) -> Values:
    """Cuts of one window keep their share of it, and what is read of the last days ends with it."""
    days = values.get("lumos.history_days", run.section.history_days)
    scale = days / run.section.history_days
    recent = {name: min(getattr(run.section, name), days) for name in ("recent_days", "calendar_days")}
    stride = max(1, int(run.section.cut_stride_days * scale))
    return {"lumos.cut_stride_days": stride, **{f"lumos.{name}": value for name, value in recent.items()}}


def _lumos_shape(run: Run) -> Space:
    width, heads = run.section.width, run.section.heads
    return Space(
        "lumos_shape",
        {
            "lumos.history_days": choice(*sorted({28, 84, 168, 252, 360, run.section.history_days})),
            "lumos.encoder_layers": choice(*sorted({1, 2, 4, run.section.encoder_layers})),
            "lumos.width": choice(*sorted({max(1, heads) * k for k in (4, 8, 16)} | {width})),
            "lumos.heads": choice(*sorted({2, 4, 8, heads})),
            "lumos.loss_weighting": choice("uncertainty", "sum", "geometric"),
            "train.learning_rate": Distribution("log", low=3e-4, high=1e-2),
        },
        also=_lumos_also,
        map_of=("lumos.history_days", "lumos.width"),
    )


def _gts_shape(run: Run) -> Space:
    return Space(
        "gts_shape",
        {
            "gts.slot_minutes": choice(5, 15, 60, 240, 480, 1440),
            "gts.branching": choice(*sorted({4, 8, 16, run.section.branching})),
            "gts.depth": choice(*sorted({1, 2, 3, run.section.depth})),
            "gts.max_tokens": choice(*sorted({48, 96, 240, run.section.max_tokens})),
            "gts.target_position": choice("front", "end", "none"),
            "gts.queries": choice(*sorted({1, 2, 4, 8, run.section.queries})),
        },
        map_of=("gts.slot_minutes", "gts.depth"),
    )


def _quick(run: Run) -> Space:
    """A dozen short trials in minutes on two cores."""
    steps = min(run.train.steps, 90)
    fixed = {"train.steps": steps, "train.validate_every": max(1, steps // 3),
             "train.checkpoint_every": max(1, steps // 3), "train.ema": min(run.train.ema, 0.9)}  # fmt: skip
    rate = Distribution("log", low=3e-4, high=1e-2)
    if run.model == "lumos":
        days = run.section.history_days
        shape = {"lumos.history_days": choice(*sorted({max(28, days // 3), max(28, 2 * days // 3), days})),
                 "lumos.width": choice(*sorted({run.section.width // 2, run.section.width}))}  # fmt: skip
        return Space("quick", {**shape, "train.learning_rate": rate}, fixed, _lumos_also,
                     ("lumos.history_days", "lumos.width"))  # fmt: skip
    fixed |= {"gts.align_steps": 0, "train.validate_users": min(run.train.validate_users, 300)}
    shape = {"gts.slot_minutes": choice(15, 60, 240, 1440), "gts.depth": choice(1, 2, 3)}
    return Space("quick", {**shape, "train.learning_rate": rate}, fixed, map_of=("gts.slot_minutes", "gts.depth"))


def _gts_grid(run: Run) -> Space:
    """Slot size and depth alone, every pair: for the picture of how sensitive the model is to them."""
    shape = {"gts.slot_minutes": choice(15, 60, 240, 1440), "gts.depth": choice(1, 2, 3)}
    return Space("gts_grid", shape, map_of=("gts.slot_minutes", "gts.depth"))


BUILT_IN: dict[str, tuple[str | None, Callable[[Run], Space]]] = {
    "quick": (None, _quick),
    "gts_shape": ("gts", _gts_shape),
    "gts_grid": ("gts", _gts_grid),
    "lumos_shape": ("lumos", _lumos_shape),
}
"""Name -> (the model that it is for, None for any; what makes it)."""


def load_space(name: str, run: Run) -> Space:
    """The space of that name, or of that YAML file, checked against the run. Raises UserError for whatever is wrong."""
    if name in BUILT_IN:
        model, make = BUILT_IN[name]
        if model not in (None, run.model):
            raise UserError(f"tune.space: {name} is a space of {model}, and {run.name} is a run of {run.model}")
        space = make(run)
    else:
        space = _read(name)
    check(space, run)
    return space


def _read(path: str) -> Space:
    if not os.path.exists(path):
        raise UserError(f"tune.space: expected one of {', '.join(BUILT_IN)}, or a YAML file, got {path!r}")
    with open(path, encoding="utf-8") as stream:
        try:
            raw = yaml.safe_load(stream)
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise UserError(f"{path}: expected settings such as `gts.slot_minutes: {{choice: [15, 60]}}`")
    found, fixed = {}, {}
    for setting, value in raw.items():
        if isinstance(value, dict):
            found[setting] = _distribution(setting, value)
        else:
            fixed[setting] = value
    name = os.path.splitext(os.path.basename(path))[0]
    return Space(name, found, fixed, map_of=_map_of(list(found)))


def _map_of(paths: list[str]) -> tuple[str, str] | None:
    if {"gts.slot_minutes", "gts.depth"} <= set(paths):
        return "gts.slot_minutes", "gts.depth"
    return (paths[0], paths[1]) if len(paths) > 1 else None


def _distribution(path: str, raw: Mapping[str, Any]) -> Distribution:
    if len(raw) != 1 or next(iter(raw)) not in FORMS:
        raise UserError(f"{path}: expected one of {', '.join(FORMS)} with a list, such as {{int: [5, 60]}}, got {raw}")
    form, values = next(iter(raw.items()))
    if not isinstance(values, list) or not values or (form != "choice" and len(values) != 2):
        raise UserError(f"{path}: {form}: expected {'a list of values' if form == 'choice' else '[low, high]'}, "
                        f"got {values!r}")  # fmt: skip
    if form == "choice":
        # a list is a value that no dictionary of results can hold, and Optuna takes plain ones only
        wrong = [value for value in values if isinstance(value, (list, dict))]
        if wrong or len({json.dumps(value) for value in values}) < len(values):
            raise UserError(f"{path}: choice: expected distinct plain values, got {values!r}")
        return choice(*values)
    kind = int if form == "int" else (int, float)
    if any(isinstance(value, bool) or not isinstance(value, kind) for value in values):
        raise UserError(f"{path}: {form}: expected two {'whole ' if form == 'int' else ''}numbers, got {values!r}")
    low, high = values
    if not low <= high or (form == "log" and low <= 0):
        raise UserError(f"{path}: {form}: expected low <= high{', low above 0' if form == 'log' else ''}, got {values}")
    return Distribution(form, (), float(low), float(high))


def check(space: Space, run: Run) -> None:
    """Raise UserError where a setting is not in the run, may not take a value, or changes what is asked of trials."""
    if not space.distributions:
        raise UserError(f"tune.space: {space.name} has nothing to search; give a setting a choice, int, float or log")
    for path in (*space.distributions, *space.fixed):
        value_of(run, path)
        top, _, rest = path.partition(".")
        asks = any(path == name or path.startswith(f"{name}.") for name in ASKED)
        asks |= top == "data" and rest.split(".")[0] in ASKED_DATA
        if (asks or path.endswith(".future_days")) and not (path in space.fixed and path.startswith("train.")):
            raise UserError(
                f"{path}: changes what is asked of a trial or how it is run, so trials could not be compared; set it "
                "in the run, for all of them"
            )
    base, chance = space.base(run), random.Random(0)
    for path, distribution in space.distributions.items():
        if distribution.form == "int" and distribution.size() > MOST_INTS:
            raise UserError(f"{path}: int: expected at most {MOST_INTS} values, use a choice or a float")
        wrong = [(value, error) for value in distribution.probes() if (error := _refused(space, base, path, value))]
        # a value that does not go with the run's others may go with those of a trial
        bad = [(value, error) for value, error in wrong[:3] if not _drawn(space, base, path, value, chance)]
        if bad:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            shown = ", ".join(str(value) for value, _ in bad)
            raise UserError(f"tune.space: {path} may not be {shown}{more}: {bad[0][1]}")


def _refused(space: Space, base: Run, path: str, value: Any) -> str | None:
    top, _, rest = path.partition(".")
    if isinstance(value, int) and not isinstance(value, bool) and top == base.model and "." not in rest:
        # thousands of whole numbers: the section alone is asked first, which is a thousand times faster than a run
        try:
            dataclasses.replace(base.section, **{rest: value})
        except ValueError as error:
            return str(error)
        if value not in (probes := space.distributions[path].probes())[:1] and value != probes[-1]:
            return None
    try:
        space.apply(base, {path: value})
    except UserError as error:
        return str(error)
    return None


def _drawn(space: Space, base: Run, path: str, value: Any, chance: random.Random) -> bool:
    """Whether any of some combinations with the value is a run."""
    for _ in range(DRAWS):
        values = {name: other.draw(chance) for name, other in space.distributions.items()} | {path: value}
        try:
            space.apply(base, values)
        except UserError:
            continue
        return True
    return False
