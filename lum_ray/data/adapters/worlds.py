"""Worlds of the simulator: every parameter of the process that makes the events, and its exact probabilities.

A user has an archetype (weekly rhythm x sensitivity to each kind of event) and, independently, a spending level. From
the day of registration on the user is alive or dormant, a Markov chain by day that starts alive. Alive, the user is
active on day d with P = sigmoid(base + weekday effect + effects of the day's events + treatment), dormant never.

Suffixes: A archetypes, D days of the world, E event types, G demographic groups, L spending levels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt

from lum_ray.artifacts import UserError

Array = npt.NDArray[np.float64]

START_DAY = (date(2022, 1, 1) - date(1970, 1, 1)).days
ANNOUNCE_DAYS = 30
TREATED_COHORT = "treatment"
REGISTERED_AT_START = 0.3
REGISTRATION_SHARE = 0.6


@dataclass(frozen=True)
class Options:
    """Settings of a simulated world.

    `users`, `shards`: size, and number of files. `days`: length from 2022-01-01 on (1096 = three years).
    `world`: `signal` (rhythms, a yearly festival, irregular matches, churn), `yearly` (three yearly festivals; only a
    user's earlier reaction to the same festival tells how the user will react) or `null` (activity and spends
    independent and identical). `activity`: share of active days from registration on.
    `treatment_odds`: factor on the odds of an active day, for users of the cohort `treatment` in the last
    `treatment_days` days. `cohorts`: shares by name, see `cohort_of`; `salt`: its salt.
    """

    users: int = 2000
    shards: int = 4
    days: int = 1096
    seed: int = 7
    world: str = "signal"
    activity: float = 0.11
    treatment_odds: float = 1.0
    treatment_days: int = 28
    salt: str = "lum_ray"
    cohorts: Mapping[str, float] = dataclasses.field(default_factory=lambda: {TREATED_COHORT: 0.5, "control": 0.5})

    @staticmethod
    def of(options: Mapping[str, Any]) -> Options:
        """The settings of a run file. Raises UserError for an unknown name or a value out of range."""
        known = {item.name: item.type for item in dataclasses.fields(Options)}
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise UserError(f"simulator: unknown options {unknown[:5]}; known: {sorted(known)}")
        for name, value in options.items():
            kinds = {"int": int, "float": (int, float), "str": str, "Mapping[str, float]": Mapping}[str(known[name])]
            if not isinstance(value, kinds) or isinstance(value, bool):  # type: ignore[arg-type]
                raise UserError(f"simulator: option {name}: expected {known[name]}, got {value!r}")
        result = Options(**options)
        for name, good, expected in (
            ("world", result.world in SHAPES, f"one of {sorted(SHAPES)}"),
            ("users", result.users >= 1, "at least 1"),
            ("shards", 1 <= result.shards <= result.users, "1 .. users"),
            ("days", result.days >= 60, "at least 60"),
            ("seed", result.seed >= 0, "at least 0"),
            ("activity", 0.005 <= result.activity <= 0.6, "0.005 .. 0.6"),
            ("treatment_odds", result.treatment_odds > 0, "more than 0"),
            ("treatment_days", 1 <= result.treatment_days <= result.days // 4, "1 .. a quarter of `days`"),
            ("cohorts", abs(sum(result.cohorts.values()) - 1) < 1e-9, "shares that sum to 1"),
        ):
            if not good:
                raise UserError(f"simulator: option {name}: expected {expected}, got {getattr(result, name)!r}")
        return result


@dataclass(frozen=True)
class Rhythm:
    """A weekly rhythm: `weekday` effects Monday to Sunday on the logit; `die`, `revive`: probabilities per day."""

    name: str
    share: float
    base: float
    weekday: tuple[float, ...]
    die: float
    revive: float


@dataclass(frozen=True)
class EventKind:
    """A kind of event; `yearly` = (month, first day, last day), None = irregular days. Effects are on the logit."""

    name: str
    yearly: tuple[int, int, int] | None
    sensitive_share: float
    effect: float
    insensitive_effect: float


FLAT = (0.0,) * 7
WORKDAYS = Rhythm("workdays", 0.3, 0.4, (0.5, 0.5, 0.5, 0.5, 0.3, -1.0, -1.2), 1 / 400, 1 / 90)
WEEKENDS = Rhythm("weekends", 0.3, 0.0, (-0.7, -0.7, -0.6, -0.4, 0.5, 1.4, 1.2), 1 / 250, 1 / 120)
THURSDAYS = Rhythm("thursdays", 0.2, -0.4, (-0.4, -0.4, 0.0, 2.2, 0.0, -0.4, -0.4), 1 / 150, 1 / 90)
ANYDAY = Rhythm("anyday", 0.2, -1.0, FLAT, 1 / 200, 1 / 60)
# world -> (rhythms, kinds of events, spending levels: share, mean of the log amount, P(purchase | active))
SHAPES: dict[str, tuple[tuple[Rhythm, ...], tuple[EventKind, ...], tuple[tuple[float, float, float], ...]]] = {
    "signal": (
        (WORKDAYS, WEEKENDS, THURSDAYS, ANYDAY),
        (EventKind("festival", (11, 20, 24), 0.5, 2.0, 0.0), EventKind("match", None, 0.5, 1.6, -0.3)),
        ((0.5, 2.0, 0.3), (0.3, 2.8, 0.5), (0.2, 3.6, 0.7)),
    ),
    "yearly": (
        tuple(dataclasses.replace(item, share=0.5, die=1 / 900, revive=1 / 60) for item in (WORKDAYS, WEEKENDS)),
        tuple(
            EventKind(name, when, 0.5, 3.0, -0.5)
            for name, when in (
                ("spring_festival", (3, 10, 14)),
                ("summer_festival", (7, 5, 9)),
                ("winter_festival", (11, 20, 24)),
            )
        ),
        ((0.5, 2.0, 0.3), (0.3, 2.8, 0.5), (0.2, 3.6, 0.7)),
    ),
    "null": (
        (Rhythm("same", 1.0, 0.0, FLAT, 0.0, 1.0),),
        (EventKind("festival", (11, 20, 24), 1.0, 0.0, 0.0), EventKind("match", None, 1.0, 0.0, 0.0)),
        ((1.0, 2.8, 0.5),),
    ),
}
LOG_AMOUNT_SD = 0.6
DEMOGRAPHICS = ("young", "middle", "senior", "retired")
DEMOGRAPHIC_HIT = 0.55
DEMOGRAPHIC_MISSING = 0.1


@dataclass(frozen=True)
class CalendarRow:
    """A known event on days `start` .. `end` (inclusive); `known_at` None: always known."""

    event_type: str
    start: int
    end: int
    known_at: int | None


@dataclass(frozen=True)
class World:
    """All parameters of a world; `world_of` makes one from its options alone.

    By archetype (A): `prior`, `base` logit, `weekday` (A, 7: Monday first) and `effect` (A, E) on it, `die` and
    `revive` per day, `demographic` (A, G: P(group | archetype)). By spending level (L): `level_share`, `log_amount`
    (mean of the logarithm), `purchase` (P(purchase | active)).
    """

    options: Options
    archetypes: tuple[str, ...]
    event_types: tuple[str, ...]
    prior: Array
    base: Array
    weekday: Array
    effect: Array
    die: Array
    revive: Array
    demographic: Array
    level_share: Array
    log_amount: Array
    purchase: Array
    calendar: tuple[CalendarRow, ...]

    @property
    def end_day(self) -> int:
        """Day after the last simulated one."""
        return START_DAY + self.options.days

    @property
    def treatment_from(self) -> int:
        """First day of the treatment window, which runs to the end."""
        return self.end_day - self.options.treatment_days

    def active(self, treated: bool = False) -> Array:
        """P(active | alive), shape (A, D), of each archetype on each day from START_DAY on."""
        day_D = START_DAY + np.arange(self.options.days)
        happening_ED = np.zeros((len(self.event_types), len(day_D)))
        for row in self.calendar:
            happening_ED[self.event_types.index(row.event_type), (day_D >= row.start) & (day_D <= row.end)] = 1.0
        # 1970-01-01, day 0, was a Thursday.
        logit_AD = self.base[:, None] + self.weekday[:, (day_D + 3) % 7] + self.effect @ happening_ED
        if treated:
            logit_AD = logit_AD + np.log(self.options.treatment_odds) * (day_D >= self.treatment_from)
        return np.asarray(1.0 / (1.0 + np.exp(-logit_AD)), np.float64)

    def registration(self) -> Array:
        """P(registered on day d), shape (D,), which also is the user's first day alive."""
        result_D = np.zeros(self.options.days)
        late = int(REGISTRATION_SHARE * self.options.days)
        result_D[:late] = (1 - REGISTERED_AT_START) / late
        result_D[0] += REGISTERED_AT_START
        return result_D

    def alive(self) -> Array:
        """P(registered by day d and alive on it), shape (A, D)."""
        days_K = np.arange(self.options.days)
        alive_AK = np.empty((len(self.prior), len(days_K)))
        for a, (die, revive) in enumerate(zip(self.die, self.revive, strict=True)):
            rest = revive / (die + revive)
            alive_AK[a] = rest + (1 - rest) * (1 - die - revive) ** days_K
        registration_D = self.registration()
        return np.stack([np.convolve(registration_D, row_K)[: len(days_K)] for row_K in alive_AK])

    def planted_effect(self) -> dict[str, float]:
        """Exact mean effect of the treatment in its window, over users registered before it.

        `active_days`: difference of the expected active days per user; `active_any`: of P(active on any day).
        """
        first = self.treatment_from - START_DAY
        registered = self.registration()[:first].sum()
        # One more transition than on the day before: nobody who registers inside the window is counted.
        before_A = self.alive()[:, first - 1] / registered
        start_A = before_A * (1 - self.die) + (1 - before_A) * self.revive
        result: dict[str, float] = {}
        days, any_active = [], []
        for treated in (True, False):
            p_AD = self.active(treated)[:, first:]
            alive_A, quiet_alive_A, quiet_dormant_A = start_A, start_A, 1 - start_A
            expected_A = np.zeros_like(start_A)
            for p_A in p_AD.T:
                expected_A = expected_A + alive_A * p_A
                alive_A = alive_A * (1 - self.die) + (1 - alive_A) * self.revive
                kept_A = quiet_alive_A * (1 - p_A)
                quiet_alive_A = kept_A * (1 - self.die) + quiet_dormant_A * self.revive
                quiet_dormant_A = kept_A * self.die + quiet_dormant_A * (1 - self.revive)
            days.append(float(self.prior @ expected_A))
            any_active.append(float(self.prior @ (1 - quiet_alive_A - quiet_dormant_A)))
        result["active_days"] = days[0] - days[1]
        result["active_any"] = any_active[0] - any_active[1]
        return result

    def to_json(self) -> dict[str, Any]:
        """Plain values; the effects of the treatment and constants of the process with them, for readers."""
        plain: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            plain[item.name] = value.tolist() if isinstance(value, np.ndarray) else value
        plain["options"] = dataclasses.asdict(self.options) | {"cohorts": dict(self.options.cohorts)}
        plain["calendar"] = [dataclasses.asdict(row) for row in self.calendar]
        return plain | {
            "start_day": START_DAY,
            "end_day": self.end_day,
            "log_amount_sd": LOG_AMOUNT_SD,
            "treatment": {"from_day": self.treatment_from, "until_day": self.end_day} | self.planted_effect(),
        }


def world_of(options: Options) -> World:
    """The world of these options; the same options always give the same one."""
    rhythms, kinds, levels = SHAPES[options.world]
    names: list[str] = []
    prior: list[float] = []
    chosen: list[int] = []
    effects: list[list[float]] = []
    # Each kind of event splits every rhythm in (share, sensitive?) parts.
    splits = [
        [(share, sense) for share, sense in ((kind.sensitive_share, True), (1 - kind.sensitive_share, False)) if share]
        for kind in kinds
    ]
    for index, rhythm in enumerate(rhythms):
        for senses in itertools.product(*splits):
            pairs = list(zip(kinds, senses, strict=True))
            names.append(rhythm.name + "".join(f"+{kind.name}" for kind, (_, sensitive) in pairs if sensitive))
            prior.append(rhythm.share * float(np.prod([share for share, _ in senses])))
            chosen.append(index)
            effects.append([kind.effect if sensitive else kind.insensitive_effect for kind, (_, sensitive) in pairs])
    groups = len(DEMOGRAPHICS)
    demographic = np.full((len(rhythms), groups), 1 / groups)
    if len(rhythms) > 1:
        demographic[:] = (1 - DEMOGRAPHIC_HIT) / (groups - 1)
        demographic[np.arange(len(rhythms)), np.arange(len(rhythms))] = DEMOGRAPHIC_HIT
    rhythm_A = [rhythms[index] for index in chosen]
    world = World(
        options=options,
        archetypes=tuple(names),
        event_types=tuple(kind.name for kind in kinds),
        prior=np.array(prior),
        base=np.array([rhythm.base for rhythm in rhythm_A]),
        weekday=np.array([rhythm.weekday for rhythm in rhythm_A]),
        effect=np.array(effects),
        die=np.array([rhythm.die for rhythm in rhythm_A]),
        revive=np.array([rhythm.revive for rhythm in rhythm_A]),
        demographic=demographic[chosen],
        level_share=np.array([level[0] for level in levels]),
        log_amount=np.array([level[1] for level in levels]),
        purchase=np.array([level[2] for level in levels]),
        calendar=_calendar(kinds, options),
    )
    return dataclasses.replace(world, base=world.base + _shift(world, options.activity))


def _shift(world: World, activity: float) -> float:
    """What to add to every base so that the expected share of active days, from registration on, is `activity`."""
    alive_AD = world.alive() * world.prior[:, None]
    registered = np.cumsum(world.registration()).sum()
    low, high = -15.0, 15.0
    for _ in range(60):
        middle = (low + high) / 2
        p_AD = dataclasses.replace(world, base=world.base + middle).active()
        low, high = (low, middle) if (alive_AD * p_AD).sum() / registered > activity else (middle, high)
    return (low + high) / 2


def _calendar(kinds: tuple[EventKind, ...], options: Options) -> tuple[CalendarRow, ...]:
    # One more year and one more month than simulated: the future of the last cut is on the calendar too.
    end = START_DAY + options.days
    rng = np.random.default_rng([options.seed, 0])
    rows: list[CalendarRow] = []
    for kind in kinds:
        if kind.yearly is not None:
            month, first, last = kind.yearly
            for year in range(2022, 2022 + options.days // 365 + 2):
                start = (date(year, month, first) - date(1970, 1, 1)).days
                rows.append(CalendarRow(kind.name, start, start + last - first, None))
        else:
            day = START_DAY + int(rng.integers(3, 15))
            while day < end + ANNOUNCE_DAYS:
                rows.append(CalendarRow(kind.name, day, day, day - ANNOUNCE_DAYS))
                day += int(rng.integers(7, 19))
    return tuple(rows)


def cohort_of(user: str, cohorts: Mapping[str, float], salt: str) -> str:
    """The user's cohort, stable under any change of order or shards.

    With u = (first 8 bytes of SHA-256 of "<salt>:<user>", big-endian) / 2^64, the first cohort, in the order given,
    whose cumulative share exceeds u.
    """
    u = int.from_bytes(hashlib.sha256(f"{salt}:{user}".encode()).digest()[:8], "big") / 2.0**64
    total = 0.0
    for name, share in cohorts.items():
        total += share
        if u < total:
            return name
    return list(cohorts)[-1]
