from __future__ import annotations

import json

import pydantic
import pytest

from serve.types import CalendarRow, PredictRequest, User, WhatIfRequest, encode, error_reply, field_of, path_of


@pytest.mark.parametrize("day", ["2017-11-01", "2016-02-29", 0, -3, 17000])
def test_days_pass_as_they_were_written(day: int | str) -> None:
    assert User(user="u", cut_day=day).model_dump(exclude_unset=True) == {"user": "u", "cut_day": day}


@pytest.mark.parametrize("day", ["soon", "2017-02-30", "20171101", "2017-W01-1", True, 1.0, 2**31, "9999-12-31", [1]])
def test_what_is_no_day_is_refused(day: object) -> None:
    with pytest.raises(pydantic.ValidationError, match="cut_day"):
        User.model_validate({"user": "u", "cut_day": day})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63, [1], {"a": 1}, "\ud800"])
def test_event_values_are_finite_scalars(value: object) -> None:
    with pytest.raises(pydantic.ValidationError, match="amount"):
        User.model_validate({"user": "u", "events": [{"amount": value}]})


@pytest.mark.parametrize("body", [{}, {"user": ""}, {"user": 3}, {"user": "\ud800"}, {"user": "u", "cutday": 3}])
def test_users_are_strict(body: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError):
        User.model_validate(body)


def test_what_was_left_out_is_not_sent_on() -> None:
    row = CalendarRow(event_type="mailer", start_day="2017-11-03")
    assert User(user="u", calendar=[row]).model_dump(exclude_unset=True)["calendar"] == [
        {"event_type": "mailer", "start_day": "2017-11-03"}
    ]
    assert User(user="u", calendar=[]).model_dump(exclude_unset=True) == {"user": "u", "calendar": []}


@pytest.mark.parametrize("kind", [PredictRequest, WhatIfRequest])
def test_the_documented_examples_are_valid(kind: type[pydantic.BaseModel]) -> None:
    kind.model_validate(kind.model_json_schema()["example"])


def test_numbers_that_json_has_not_are_never_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode({"p": float("nan")})


def test_a_field_is_read_from_the_message_and_back() -> None:
    assert field_of("users[3].events[0].time: expected") == path_of(["users", 3, "events", 0, "time"])
    assert field_of("s3://bucket: no such thing") is None
    assert field_of("expected something else: this") is None


def test_an_error_has_one_shape() -> None:
    reply = error_reply(400, "refused", "no\ud800")
    assert json.loads(reply.body) == {"error": {"code": "refused", "message": "no\ud800", "field": None}}
