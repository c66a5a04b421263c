"""What travels over HTTP to and from LUMOS, and what both models share: requests (strict: unknown fields are refused),
answers, and the one shape of an error. GTS-LUM's own are in `gts_types`.

Days are ISO dates where the model's run file uses dates, day numbers otherwise. The client reads answers with the same
types that the server documents at /docs.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

FIRST_DAY, LAST_DAY = -700_000, 2_900_000  # years 53 to 9909: every day that is computed from one is still a date
DAY_ZERO = datetime.date(1970, 1, 1)


def _day(value: Any) -> int | str:
    number: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        try:
            number = (datetime.date.fromisoformat(value) - DAY_ZERO).days
        except ValueError as error:
            raise ValueError(f"expected an ISO date, got {shown(value)} ({error})") from None
    if number is None:
        raise ValueError(f"expected an ISO date like '2017-09-20' or a day number, got {shown(value)}")
    if not FIRST_DAY <= number <= LAST_DAY:
        raise ValueError(f"expected a day from {FIRST_DAY} to {LAST_DAY} (days since 1970-01-01), got {shown(value)}")
    assert isinstance(value, (int, str))
    return value


def _scalar(value: object) -> str | int | float | bool | None:
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("expected text, got half of a surrogate pair")
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"expected an integer of 64 bits, got {shown(value)}")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"expected a finite number, got {value}")
        return value
    if value is not None:
        raise ValueError(f"expected a string, a number, true, false or null, got {shown(value)}")
    return None


def shown(value: Any) -> str:
    """`value` as Python writes it, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


Day = Annotated[
    int | str,
    PlainValidator(_day),
    WithJsonSchema({"anyOf": [{"type": "string", "format": "date"}, {"type": "integer"}], "examples": ["2017-11-01"]}),
]
Scalar = Annotated[
    str | int | float | bool | None,
    PlainValidator(_scalar),
    WithJsonSchema({"anyOf": [{"type": kind} for kind in ("string", "number", "boolean", "null")]}),
]
Body = Mapping[str, Any]
"""A checked request as plain values: `users`, each with the fields that were sent, and the options of the call."""
Name = Annotated[str, Field(min_length=1, max_length=512)]


class Strict(BaseModel):
    """A request: no unknown field, no coercion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CalendarRow(Strict):
    """An event that is known ahead: `value` (1 if left out) on the days from `start_day` to `end_day` inclusive."""

    event_type: Name = Field(description="One of the model's event types, see /v1/models")
    start_day: Day
    end_day: Day | None = Field(default=None, description="Inclusive; `start_day` where it is left out")
    value: float | None = None


class User(Strict):
    """One user: by id where the server has her history, or with her events, which join what is stored of her."""

    user: Name = Field(examples=["1029"])
    cut_day: Day | None = Field(
        default=None, description="First predicted day; the day after the stored histories if left out"
    )
    events: list[dict[str, Scalar]] | None = Field(
        default=None,
        description="Rows as in the event table, with the time column, without the user column; all before the cut",
        examples=[[{"time": "2017-10-30T18:30:00-04:00", "sales_value": 12.5, "quantity": 3}]],
    )
    profile: dict[str, Scalar] | None = Field(
        default=None, description="Columns of the profile table; replaces what is stored"
    )
    calendar: list[CalendarRow] | None = Field(
        default=None,
        description="Replaces all that is known of the coming days of this user; [] means that nothing is coming",
    )


EXAMPLE: dict[str, Any] = {"users": [{"user": "1029", "cut_day": "2017-11-01"}]}
ATTENTION = "Also give the share of attention that each coming day pays to each past day"


class UsersRequest(Strict):
    model_config = ConfigDict(json_schema_extra={"example": EXAMPLE})
    users: list[User] = Field(min_length=1)


class PredictRequest(UsersRequest):
    attention: bool = Field(default=False, description=ATTENTION)


class WhatIfRequest(Strict):
    """The same users under alternative calendars; a scenario replaces all that is known of the coming days."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "users": [{"user": "1029", "cut_day": "2017-11-01"}],
                "scenarios": [[{"event_type": "mailer", "start_day": "2017-11-03", "end_day": "2017-11-05"}], []],
            }
        }
    )
    users: list[User] = Field(min_length=1)
    scenarios: list[list[CalendarRow]] = Field(min_length=1)
    attention: bool = Field(default=False, description=ATTENTION)


class Model(BaseModel):
    """Which weights gave an answer."""

    name: str
    checkpoint: str
    step: int


class Values(BaseModel):
    """`p` for yes-or-no behaviours. For numbers: `p` that there is any (where the behaviour has a gate), the mean over
    all days, and the median, the 5 % and 95 % quantiles and the forecast with the least expected percentage error given
    that there is any. A sum over a horizon whose gate has no head of its own comes without `p`, and all its
    figures are over all users.
    """

    p: float | None = None
    mean: float | None = None
    median: float | None = None
    least_mape: float | None = None
    low: float | None = None
    high: float | None = None


class DayValues(BaseModel):
    day: int | str
    behaviours: dict[str, Values]


class Answer(BaseModel):
    """`attention`, where it was asked for: for each coming day the share that each of the past `history_days` has,
    oldest first."""

    user: str
    cut_day: int | str
    days: list[DayValues]
    horizons: dict[str, Values]
    attention: list[list[float]] | None = None


class PredictResponse(BaseModel):
    """`answers` in the order of the request's users."""

    model: Model
    answers: list[Answer]


class DayDifference(BaseModel):
    day: int | str
    behaviours: dict[str, float]


class Difference(BaseModel):
    """Scenario minus baseline: of `p` for yes-or-no behaviours, of the mean for numbers."""

    days: list[DayDifference]
    horizons: dict[str, float]


class Scenario(BaseModel):
    """`nearer_share`: the share of training cuts whose coming events are nearer to training than this scenario's."""

    answer: Answer
    difference: Difference
    nearer_share: float = Field(ge=0, le=1)
    out_of_range: bool


class WhatIf(BaseModel):
    baseline: Answer
    scenarios: list[Scenario]


class WhatIfResponse(BaseModel):
    """`answers` in the order of the request's users, `scenarios` in the order of the request's."""

    model: Model
    answers: list[WhatIf]


class EmbedResponse(BaseModel):
    """One vector a user, in the order of the request's users."""

    model: Model
    embeddings: list[list[float]]


class KnownEvent(BaseModel):
    """`count` events of a type on a day; `value`: of each of them, on average."""

    event_type: str
    count: int
    value: float


class PastDay(BaseModel):
    """`existed`: whether the user was there yet."""

    day: int | str
    existed: bool
    behaviours: dict[str, float]
    events: list[KnownEvent]


class ComingDay(BaseModel):
    day: int | str
    events: list[KnownEvent]


class History(BaseModel):
    """`past`: the days that the model reads, oldest first. `coming`: what is known of the days that it looks ahead."""

    user: str
    cut_day: int | str
    past: list[PastDay]
    coming: list[ComingDay]


class HistoryResponse(BaseModel):
    """`histories` in the order of the request's users."""

    model: Model
    histories: list[History]


class FoundResponse(BaseModel):
    """Stored ids that begin as asked; `complete`: whether there are no more of them."""

    users: list[str]
    complete: bool


class ModelInfo(Model):
    """What a client must know of a model. `model` is `lumos` or `gts`; `end_day` is the cut of a request that names
    none; `refused` says why a newer checkpoint or snapshot that was published is not taken."""

    model: str
    end_day: int | str
    state: str | None = None
    refused: str | None = None


class LumosInfo(ModelInfo):
    behaviours: list[str]
    event_types: list[str]
    history_days: int
    future_days: int
    event_columns: dict[str, str] = {}


class GtsInfo(ModelInfo):
    """`event_columns`: what an event must have; `scores`, `generates`: whether the model can rerank and score, and
    generate."""

    items: int
    event_columns: list[str]
    llm: str
    scores: bool
    generates: bool


class ModelsResponse(BaseModel):
    models: list[LumosInfo | GtsInfo]


class StatusResponse(BaseModel):
    status: str


class Problem(BaseModel):
    code: str = Field(examples=["invalid"])
    message: str = Field(
        examples=["users[0].events[0].time: expected a time before the cut, 2017-11-01, got 2017-11-02"]
    )
    field: str | None = Field(default=None, examples=["users[0].events[0].time"])


class ErrorResponse(BaseModel):
    """The body of every answer that is not 200."""

    error: Problem


@dataclass(frozen=True)
class Reply:
    """A finished answer: HTTP status and JSON body. The model's process writes it, so that the ingress need not."""

    status: int
    body: bytes


def error_reply(status: int, code: str, message: str, field: str | None = None) -> Reply:
    return Reply(status, encode({"error": {"code": code, "message": message, "field": field}}))


def encode(value: Mapping[str, Any]) -> bytes:
    """JSON bytes. Raises ValueError for NaN or infinity: no client gets them as numbers."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def field_of(message: str) -> str | None:
    """The field path that a UserError's message starts with (`users[3].events[0].time: ...`)."""
    found = re.match(r"([A-Za-z_][\w.\[\]]*): ", message)
    return found[1] if found else None


def path_of(location: Sequence[str | int]) -> str:
    """`users[3].events[0].time` of ("users", 3, "events", 0, "time")."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
