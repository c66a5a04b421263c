"""What a run file says, as frozen dataclasses; `config` reads them, strictly. `data:` is in `run_data`.

Plain dataclasses without a dependency: pydantic finds its settings in `__pydantic_config__` where it is there at all.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lum_ray.run_data import STRICT, Data, Day


@dataclass(frozen=True)
class Subset:
    """Cuts from `from_day` to `until_day` (inclusive) every `every_days`, of users by segment and by hash."""

    __pydantic_config__: ClassVar = STRICT
    from_day: Day | None = None
    until_day: Day | None = None
    every_days: int = 1
    segments: tuple[str, ...] = ()
    users: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.every_days < 1:
            raise ValueError(f"every_days: expected at least 1, got {self.every_days}")
        if not 0.0 <= self.users[0] < self.users[1] <= 1.0:
            raise ValueError(f"users: expected a range of shares such as [0.8, 1.0], got {list(self.users)}")


@dataclass(frozen=True)
class Split:
    """Time, segment and user splits, combinable. Training targets end before `validate_from`; without it the users of
    `validate` and `test` are kept out of training."""

    __pydantic_config__: ClassVar = STRICT
    validate: Subset
    test: Subset
    train: Subset = Subset()
    validate_from: Day | None = None
    segment_column: str | None = None
    min_history_days: int = 28

    def __post_init__(self) -> None:
        used = any(subset.segments for subset in (self.train, self.validate, self.test))
        if used and not self.segment_column:
            raise ValueError("segment_column: `segments` are named, so say which profile column holds them")
        if self.validate_from is not None:
            named = {"validate_from": self.validate_from, "test.from_day": self.test.from_day}
            days = [_comparable(name, day) for name, day in named.items()]
            first = self.validate.from_day if self.validate.from_day is not None else self.validate_from
            start = _comparable("validate.from_day", first)
            if not days[0] <= start < days[1]:
                raise ValueError(
                    "expected validate_from <= validate.from_day < test.from_day (the test must choose nothing), got "
                    f"{self.validate_from}, {self.validate.from_day}, {self.test.from_day}"
                )
        if self.validate_from is None:
            if self.validate == self.test:
                raise ValueError("validate and test are the same users and days; the test would choose the weights")
            apart = [
                (set(self.train.segments).isdisjoint(part.segments) and part.segments and self.train.segments)
                or part.segments
                or part.users != (0.0, 1.0)
                for part in (self.validate, self.test)
            ]
            if not all(apart):
                raise ValueError(
                    "validate_from: missing; without it, `validate` and `test` must be made of segments or users "
                    "of their own"
                )


def _comparable(name: str, day: Day | None) -> float:
    """A day of a split as days since 1970-01-01 or as its own number. Raises ValueError naming it."""
    if day is None:
        raise ValueError(f"{name}: missing; a split in time needs it")
    if isinstance(day, int):
        return day
    try:
        return datetime.date.fromisoformat(day).toordinal() - datetime.date(1970, 1, 1).toordinal()
    except ValueError as error:
        raise ValueError(
            f"{name}: expected a day number or an ISO date such as 2017-09-20, got {day!r} ({error})"
        ) from None


@dataclass(frozen=True)
class Train:
    """How to train. `batch` is the number of windows in a global step, whatever the number of workers.

    With `min_workers` a run goes on with fewer workers after a loss, at least these, and with more as machines come."""

    __pydantic_config__: ClassVar = STRICT
    steps: int = 1000
    batch: int = 64
    micro_batch: int = 64
    workers: int = 1
    min_workers: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    clip_norm: float = 1.0
    ema: float = 0.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    validate_every: int = 100
    checkpoint_every: int = 100
    validate_users: int = 100_000
    patience: int = 0
    keep_best: str = "eval/roc_auc"
    max_failures: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "workers", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ValueError(f"min_workers: expected 1 to {self.workers} (train.workers), got {self.min_workers}")
        if self.workers > 64:
            raise ValueError(f"workers: the loader has 64 lanes, so at most 64, got {self.workers}")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema: expected 0 (off) or a decay below 1 such as 0.999, got {self.ema}")


@dataclass(frozen=True)
class Tune:
    """A search over settings of the run. `space`: the name of one, or a YAML file; `metric`: of the validation, None
    for the model's own; `parallel`: trials at once, None for as many as the machines take; `prune`: whether trials
    that fall behind are stopped (ASHA)."""

    __pydantic_config__: ClassVar = STRICT
    space: str = "quick"
    trials: int = 12
    metric: str | None = None
    parallel: int | None = None
    prune: bool = True

    def __post_init__(self) -> None:
        for name in ("trials", "parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")


@dataclass(frozen=True)
class Serve:
    """`replicas` of the model at least and at most `max_replicas` (None: as many), so that each has `target_batches`
    under way; more or fewer are taken once that has been needed for `upscale_delay_s` or `downscale_delay_s`.
    `tokens`: where hashed bearer tokens are; `requests_per_s` of each (0: no bound); `watch_s`: how often a replica
    looks for what was published; `cache_mib` of encoded histories a replica (LUMOS)."""

    __pydantic_config__: ClassVar = STRICT
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    max_replicas: int | None = None
    target_batches: float = 1.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    ingress_replicas: int = 2
    max_batch: int = 64
    max_users: int = 256
    timeout_s: float = 30.0
    tokens: str | None = None
    allow_anonymous: bool = False
    requests_per_s: float = 0.0
    watch_s: float = 5.0
    cache_mib: int = 256

    def __post_init__(self) -> None:
        for name, least in (("replicas", 1), ("ingress_replicas", 1), ("max_batch", 1), ("max_users", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas: expected at least replicas, {self.replicas}, got {self.max_replicas}")
        for name in ("timeout_s", "watch_s", "target_batches"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name in ("requests_per_s", "cache_mib", "upscale_delay_s", "downscale_delay_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Run:
    """A resolved run: `model` names the section that came with it (`lumos` or `gts`), `section` is that dataclass."""

    name: str
    model: str
    section: Any
    data: Data
    split: Split
    train: Train = Train()
    tune: Tune = Tune()
    serve: Serve = Serve()
    root: str = "runs"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model == "lumos" and all(item.kind != "binary" for item in self.data.behaviours):
            raise ValueError(
                "data: behaviours: expected at least one binary behaviour, such as "
                "{name: active, kind: binary, aggregate: count()}"
            )
        if self.model == "gts" and self.data.events.item is None:
            raise ValueError(
                "data.events.item: missing; GTS-LUM reads the item of each event: name the column of the events that "
                "holds it, such as product_id"
            )
        if self.model == "gts" and self.data.items is None:
            raise ValueError(
                "data.items: missing; GTS-LUM needs a table of the items with their texts, such as "
                "{path: items/, item: product_id, text: [title, category]}"
            )
