"""What travels over HTTP to and from GTS-LUM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.types import Day, Model, Name, Scalar, Strict

EXAMPLE: dict[str, Any] = {"users": [{"user": "1029"}], "k": 5, "seen_filter": True}
Id = Annotated[str, Field(min_length=1, max_length=512)]


class GtsUser(Strict):
    """One user: by id where the server has her history, or with her events, which join what is stored of her."""

    user: Name = Field(examples=["1029"])
    cut_day: Day | None = Field(
        default=None, description="What comes from this day on; the day after all that is known of her if left out"
    )
    events: list[dict[str, Scalar]] | None = Field(
        default=None,
        description="Rows as in the event table: its time and item columns; all before the cut",
        examples=[[{"time": "2017-10-30T18:30:00-04:00", "item": "1082185"}]],
    )
    profile: dict[str, Scalar] | None = Field(
        default=None, description="Columns of the profile table; replace what is stored"
    )


class GtsUsersRequest(Strict):
    users: list[GtsUser] = Field(min_length=1)


class RecommendRequest(GtsUsersRequest):
    model_config = ConfigDict(json_schema_extra={"example": EXAMPLE})
    k: int = Field(default=10, ge=1, le=1000, description="Items of a list")
    seen_filter: bool = Field(default=False, description="Leave out what the user had")
    reading: Literal["retrieve", "rerank", "generate"] = Field(
        default="retrieve",
        description="retrieve: match the user with every item; rerank: put the first of them in the order of their "
        "propensities; generate: write semantic IDs by beam search",
    )


class ScoreRequest(GtsUsersRequest):
    """Each item is read in front of each user's history: a pass of the language model a pair."""

    model_config = ConfigDict(json_schema_extra={"example": {"users": [{"user": "1029"}], "items": ["1082185"]}})
    items: list[Id] = Field(min_length=1)


class Recommended(BaseModel):
    item: str
    text: str
    score: float


class Asked(BaseModel):
    """`share`: of the items that were asked about; `probability` orders the items of a user, it is no frequency."""

    item: str
    text: str
    logit: float
    probability: float
    share: float


class Facts(BaseModel):
    """`known`: whether anything is stored of the user or was sent; `events`: of known items before the cut (none: the
    items are those that are popular); `unknown_events`: of items that nobody knows."""

    user: str
    cut_day: int | str
    known: bool
    events: int
    unknown_events: int


class Recommendations(Facts):
    """Best first."""

    items: list[Recommended]


class Propensities(Facts):
    """In the order of the question."""

    items: list[Asked]


class RecommendResponse(BaseModel):
    """`answers` in the order of the request's users."""

    model: Model
    answers: list[Recommendations]


class ScoreResponse(BaseModel):
    """`answers` in the order of the request's users."""

    model: Model
    answers: list[Propensities]
