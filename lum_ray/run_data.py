"""What a run file says of the data, as frozen dataclasses: tables, their columns, behaviours and targets. See `run`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Day = int | str
"""A day number, or an ISO date (`2017-09-20`) in the run's time zone."""

Kind = Literal["binary", "continuous", "count"]
STRICT: dict[str, Any] = {"extra": "forbid"}
LATE_DAYS = 7


@dataclass(frozen=True)
class Source:
    """Where raw tables come from when they are not there yet: an adapter writes them under `<root>/raw/`."""

    __pydantic_config__: ClassVar = STRICT
    adapter: Literal["complete_journey", "ml_100k", "next_item", "oulad", "simulator"]
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Where a raw table is: a file, a folder of parquet files, or a Delta table, of which `version` or `timestamp` (an
    ISO time) pins a version; without them it is the newest."""

    path: str | None = None
    version: int | None = None
    timestamp: str | None = None

    def __post_init__(self) -> None:
        if self.version is not None and self.timestamp is not None:
            both = f"{self.version} and {self.timestamp}"
            raise ValueError(f"version: expected a version or a timestamp, got both, {both}; leave one out")


@dataclass(frozen=True)
class Events(Table):
    """`id` names a column (or none) whose repeated values mark duplicate rows, `item` the one that holds the item of
    each event (only GTS-LUM reads it)."""

    __pydantic_config__: ClassVar = STRICT
    user: str = "user"
    time: str = "time"
    id: str | None = None
    item: str | None = None


@dataclass(frozen=True)
class Profiles(Table):
    """`known_at` names a column (or none) with the day on which a row's numbers and categories became known: they are
    missing for every cut up to it. A row without one was always known."""

    __pydantic_config__: ClassVar = STRICT
    user: str = "user"
    registered: str | None = None
    ends: str | None = None
    segment: str | None = None
    numbers: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    known_at: str | None = None


@dataclass(frozen=True)
class Calendar(Table):
    __pydantic_config__: ClassVar = STRICT
    holidays: str | None = None


@dataclass(frozen=True)
class Items(Table):
    """The catalogue, one row an item. An item's text is its `text` columns joined with ", " in this order, without the
    empty ones; `numbers` and `categories` are its columns for the table encoder."""

    __pydantic_config__: ClassVar = STRICT
    item: str = "item"
    text: tuple[str, ...] = ("text",)
    numbers: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.text:
            raise ValueError("text: expected at least one column that describes the items, such as [title, category]")


@dataclass(frozen=True)
class Graph:
    """Edges between items: those of a table (`weight` None: 1; `known_at` None: always known), and, with
    `co_occurrence`, between items at the same instant of a user before the train cut."""

    __pydantic_config__: ClassVar = STRICT
    path: str | None = None
    source: str = "source"
    target: str = "target"
    weight: str | None = None
    known_at: str | None = None
    co_occurrence: bool = True


@dataclass(frozen=True)
class Behaviour:
    """A daily feature and target.

    `aggregate` is one of sum, count, min, max, any, mean, n_unique over an expression of event columns; numbers are
    stored as integers in units of `resolution`; `gate` names the binary behaviour without which a value is not counted.
    """

    __pydantic_config__: ClassVar = STRICT
    name: str
    kind: Kind
    aggregate: str
    resolution: float = 1.0
    gate: str | None = None
    transform: Literal["identity", "log1p"] = "log1p"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"expected a name like 'coupon_used' (a-z, 0-9, _), got {self.name!r}")
        if self.resolution <= 0:
            raise ValueError(f"resolution: expected a positive number such as 0.01, got {self.resolution}")
        if self.kind == "binary" and self.gate:
            raise ValueError(f"{self.name}: a binary behaviour has no gate; remove `gate: {self.gate}`")


@dataclass(frozen=True)
class Derived:
    """A binary target over days: `no active in the next 28 days` or `active after 28 days without`."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    when: str

    FORMS: ClassVar = (r"no (\w+) in the next (\d+) days", r"(\w+) after (\d+) days without")

    def __post_init__(self) -> None:
        self.parsed()

    def parsed(self) -> tuple[Literal["churned", "reactivated"], str, int]:
        """(form, binary behaviour, days)."""
        for form, pattern in zip(("churned", "reactivated"), self.FORMS, strict=True):
            if match := re.fullmatch(pattern, self.when):
                return form, match[1], int(match[2])  # type: ignore[return-value]
        raise ValueError(f"expected 'no X in the next N days' or 'X after N days without', got {self.when!r}")


@dataclass(frozen=True)
class Horizon:
    """A target over the first `days` days after the cut, with a head of its own: any (binary) or sum (numbers)."""

    __pydantic_config__: ClassVar = STRICT
    behaviour: str
    over: Literal["any", "sum"]
    days: int

    def __post_init__(self) -> None:
        if self.days < 1:
            raise ValueError(f"days: expected at least 1, got {self.days}")

    @property
    def name(self) -> str:
        return f"{self.behaviour}_{self.over}_{self.days}"


@dataclass(frozen=True)
class Data:
    """The raw tables, their columns, the time zone and the behaviours (LUMOS) or the items (GTS-LUM).

    `late_days`: events in new files may be so many days before the end of what was known; later ones are rejected.
    """

    __pydantic_config__: ClassVar = STRICT
    behaviours: tuple[Behaviour, ...] = ()
    source: Source | None = None
    events: Events = Events()
    profiles: Profiles | None = None
    calendar: Calendar | None = None
    items: Items | None = None
    graph: Graph | None = None
    time_zone: str = "UTC"
    derived: tuple[Derived, ...] = ()
    horizons: tuple[Horizon, ...] = ()
    start: Day | None = None
    end: Day | None = None
    max_reject_share: float = 0.001
    late_days: int = LATE_DAYS
    engine: Literal["auto", "local", "ray"] = "auto"

    def __post_init__(self) -> None:
        if self.late_days < 0:
            raise ValueError(f"late_days: expected 0 or more days, got {self.late_days}")
        everything: tuple[Behaviour | Derived | Horizon, ...] = (*self.behaviours, *self.derived, *self.horizons)
        names = [item.name for item in everything]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"behaviours: names must be distinct, these come twice: {', '.join(twice[:5])}")
        kinds = {item.name: item.kind for item in self.behaviours}
        for item in self.behaviours:
            if item.gate and kinds.get(item.gate) != "binary":
                raise ValueError(f"behaviours: the gate of {item.name} must be a binary behaviour, got {item.gate!r}")
        for derived in self.derived:
            if kinds.get(derived.parsed()[1]) != "binary":
                raise ValueError(f"derived: {derived.name} needs a binary behaviour, got {derived.parsed()[1]!r}")
        for horizon in self.horizons:
            kind = kinds.get(horizon.behaviour)
            if kind is None or (kind == "binary") != (horizon.over == "any"):
                raise ValueError(
                    f"horizons: {horizon.name}: use `any` over a binary behaviour, `sum` over numbers (it is {kind})"
                )
