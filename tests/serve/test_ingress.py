from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from lum_ray.lumos.predictor import Answer, Request
from serve.gts_types import RecommendResponse, ScoreResponse
from serve.ingress import Limits, UnavailableError, create_app
from serve.types import (
    Body,
    EmbedResponse,
    ErrorResponse,
    GtsInfo,
    HistoryResponse,
    LumosInfo,
    ModelsResponse,
    PredictResponse,
    Problem,
    Reply,
    WhatIfResponse,
)
from tests.serve.fake_predictor import FakeGts, FakePredictor, local

PREDICT, WHAT_IF, EMBED = "/v1/lumos/predict", "/v1/lumos/what-if", "/v1/lumos/embed"
RECOMMEND, SCORE = "/v1/gts/recommend", "/v1/gts/score"
ONE: dict[str, Any] = {"users": [{"user": "u1"}]}
ROW = {"event_type": "mailer", "start_day": "2017-11-03"}


def client(fake: FakePredictor | None = None, limits: Limits | None = None) -> TestClient:
    models = {"lumos": local(fake or FakePredictor()), "gts": local(FakeGts())}
    return TestClient(create_app(models, limits), raise_server_exceptions=False)


def problem(response: Any, status: int) -> Problem:
    assert response.status_code == status, response.text
    assert "Traceback" not in response.text
    assert list(response.json()) == ["error"]
    assert set(response.json()["error"]) == {"code", "message", "field"}
    return ErrorResponse.model_validate_json(response.content).error


def test_predict_answers_by_the_documented_type() -> None:
    response = client().post(PREDICT, json={"users": [{"user": "u1", "cut_day": "2017-11-01"}, {"user": "u22"}]})
    assert response.status_code == 200, response.text
    found = PredictResponse.model_validate_json(response.content)
    assert [answer.user for answer in found.answers] == ["u1", "u22"]
    assert found.answers[0].cut_day == "2017-11-01"
    assert found.answers[1].days[1].behaviours["sales"].mean == 3.0
    assert found.answers[0].horizons["active_any_7"].p == 0.5
    assert found.model.step == 7


def test_what_if_answers_by_the_documented_type() -> None:
    rows = [{"event_type": "mailer", "start_day": "2017-11-03", "end_day": "2017-11-05", "value": 2}]
    response = client().post(WHAT_IF, json={**ONE, "scenarios": [rows, []]})
    found = WhatIfResponse.model_validate_json(response.content).answers[0]
    assert found.scenarios[0].difference.days[0].behaviours == {"sales": 1.0}
    assert found.scenarios[1].difference.days[0].behaviours == {"sales": 0.0}
    assert found.scenarios[0].nearer_share == 0.25


def test_embed_and_models_answer_by_the_documented_types() -> None:
    found = EmbedResponse.model_validate_json(client().post(EMBED, json=ONE).content)
    assert found.embeddings == [[2.0, 1.5]]
    lumos, gts = ModelsResponse.model_validate_json(client().get("/v1/models").content).models
    assert isinstance(lumos, LumosInfo) and isinstance(gts, GtsInfo)
    assert (lumos.end_day, lumos.future_days, lumos.event_types) == ("2016-07-18", 2, ["holiday", "mailer"])
    assert (gts.name, gts.items, gts.event_columns) == ("fake_gts", 9, ["time", "item"])


def test_history_users_and_attention_answer_by_the_documented_types() -> None:
    (found,) = HistoryResponse.model_validate_json(client().post("/v1/lumos/history", json=ONE).content).histories
    assert (found.past[0].behaviours, found.past[0].events[0].event_type) == ({"active": 1.0}, "mailer")
    answer = PredictResponse.model_validate_json(client().post(PREDICT, json={**ONE, "attention": True}).content)
    assert answer.answers[0].attention == [[0.25, 0.75], [0.5, 0.5]]
    assert "attention" not in client().post(PREDICT, json=ONE).json()["answers"][0]
    assert client().get("/v1/lumos/users", params={"prefix": "u1"}).json() == {"users": ["u1", "u12"], "complete": True}
    assert client().get("/v1/gts/users", params={"limit": 1}).json() == {"users": ["u1"], "complete": False}
    assert problem(client().get("/v1/lumos/users", params={"limit": 0}), 422).field == "limit"


def test_gts_answers_by_the_documented_types() -> None:
    users = [{"user": "u1", "events": [{"time": "2016-07-17", "item": "i3"}]}, {"user": "someone"}]
    body = {"users": users, "k": 2, "seen_filter": True, "reading": "rerank"}
    found = RecommendResponse.model_validate_json(client().post(RECOMMEND, json=body).content).answers
    assert [(answer.user, answer.known, answer.events) for answer in found] == [("u1", True, 1), ("someone", False, 0)]
    assert [item.item for item in found[0].items] == ["i0", "i1"]
    asked = client().post(SCORE, json={"users": [{"user": "u1"}], "items": ["b", "a"]})
    scores = ScoreResponse.model_validate_json(asked.content).answers[0]
    assert [(item.item, item.share) for item in scores.items] == [("b", 0.5), ("a", 0.5)]
    embedded = client().post("/v1/gts/embed", json={"users": [{"user": "u1"}]})
    assert EmbedResponse.model_validate_json(embedded.content).embeddings == [[2.0, 2.5]]


def test_options_of_a_recommendation_reach_the_model() -> None:
    fake = FakeGts()
    web = TestClient(create_app({"gts": local(fake)}))
    for body in ({}, {"k": 3, "reading": "generate"}, {"k": 3, "reading": "rerank", "seen_filter": True}):
        assert web.post(RECOMMEND, json={**ONE, **body}).status_code == 200
    assert [how for _, how in fake.calls] == [
        (10, False, False, "retrieve"), (3, False, False, "generate"), (3, True, True, "retrieve"),
    ]  # fmt: skip
    assert problem(web.post(PREDICT, json=ONE), 404).code == "not_found"


def test_a_refusal_of_items_names_them() -> None:
    found = problem(client().post(SCORE, json={"users": [{"user": "u1"}], "items": ["a", "nothing"]}), 400)
    assert (found.code, found.field) == ("refused", "items")


def test_inline_events_reach_the_model_as_they_came() -> None:
    fake = FakePredictor()
    events = [{"time": "2017-10-30T18:30:00-04:00", "amount": 3, "note": None}]
    assert client(fake).post(PREDICT, json={"users": [{"user": "new", "events": events}]}).status_code == 200
    assert fake.requests[0].events == events
    assert fake.requests[0].profile is None


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (PREDICT, {}, "users"),
        (PREDICT, {"users": []}, "users"),
        (PREDICT, {**ONE, "model": "x"}, "model"),
        (PREDICT, {"users": [{"user": "u"}, {"user": "u", "cutday": 1}]}, "users[1].cutday"),
        (PREDICT, {"users": [{"user": "u", "cut_day": "soon"}]}, "users[0].cut_day"),
        (PREDICT, {"users": [{"user": "u", "events": [{}, {"amount": [1]}]}]}, "users[0].events[1].amount"),
        (PREDICT, {"users": [{"user": 7}]}, "users[0].user"),
        (WHAT_IF, ONE, "scenarios"),
        (WHAT_IF, {**ONE, "scenarios": [[{"event_type": "mailer"}]]}, "scenarios[0][0].start_day"),
        (WHAT_IF, {**ONE, "scenarios": [[], [{"event_type": 1, "start_day": 1}]]}, "scenarios[1][0].event_type"),
        (EMBED, {"users": [None]}, "users[0]"),
        (RECOMMEND, {**ONE, "k": 0}, "k"),
        (RECOMMEND, {**ONE, "reading": "literal"}, "reading"),
        (RECOMMEND, {"users": [{"user": "u", "calendar": []}]}, "users[0].calendar"),
        (SCORE, ONE, "items"),
        (SCORE, {**ONE, "items": ["a", 1]}, "items[1]"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(path: str, body: dict[str, Any], field: str) -> None:
    found = problem(client().post(path, json=body), 422)
    assert found.code == "invalid"
    assert found.field == field
    assert found.message.startswith(f"{field}: ")


def test_at_most_five_offenders_are_told() -> None:
    found = problem(client().post(PREDICT, json={"users": [{"user": i} for i in range(9)]}), 422)
    assert found.message.count("users[") == 5
    assert found.message.endswith("and 4 more")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b'{"users": [{"user": "u", "cut_day": NaN}]}', 422),
        (b'{"users": "\xff"}', 400),
        (b"[" * 100_000, 400),
        (b"9" * 5000, 400),
    ],
)
def test_a_body_that_is_no_request_is_refused(content: bytes, status: int) -> None:
    problem(client().post(PREDICT, content=content, headers={"Content-Type": "application/json"}), status)


def test_another_content_type_is_refused_with_a_hint() -> None:
    found = problem(client().post(PREDICT, content=json.dumps(ONE), headers={"Content-Type": "text/plain"}), 422)
    assert "Content-Type: application/json" in found.message


def test_refusals_of_the_model_keep_field_and_status() -> None:
    found = problem(client().post(PREDICT, json={"users": [{"user": "u"}, {"user": "nobody"}]}), 404)
    assert (found.code, found.field) == ("unknown_user", "users[1].user")
    rows = [{"event_type": "sale", "start_day": "2017-11-03"}]
    found = problem(client().post(WHAT_IF, json={**ONE, "scenarios": [rows]}), 400)
    assert (found.code, found.field) == ("refused", "scenarios[0][0].event_type")
    assert "holiday, mailer" in found.message


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (PREDICT, {"users": [{"user": "u"}] * 3}, "users"),
        (PREDICT, {"users": [{"user": "u"}, {"user": "u", "events": [{}] * 3}]}, "users[1].events"),
        (PREDICT, {"users": [{"user": "u", "calendar": [ROW] * 3}]}, "users[0].calendar"),
        (WHAT_IF, {**ONE, "scenarios": [[]] * 3}, "scenarios"),
        (WHAT_IF, {**ONE, "scenarios": [[], [ROW] * 3]}, "scenarios[1]"),
        (SCORE, {**ONE, "items": ["a"] * 5}, "items"),
        (SCORE, {"users": [{"user": "u"}] * 2, "items": ["a"] * 3}, "items"),
    ],
)  # fmt: skip
def test_too_many_of_anything_is_refused(path: str, body: dict[str, Any], field: str) -> None:
    fake = FakePredictor()
    limits = Limits(max_users=2, max_events=2, max_scenarios=2, max_calendar=2, max_pairs=4)
    found = problem(client(fake, limits).post(path, json=body), 422)
    assert (found.code, found.field) == ("too_many", field)
    assert fake.calls == []


def test_a_large_body_is_refused_announced_or_not() -> None:
    web = client(limits=Limits(max_body_bytes=100))
    assert problem(web.post(PREDICT, content=b" " * 101), 413).code == "too_large"

    def pieces() -> Iterator[bytes]:
        yield from [b" " * 60, b" " * 60]

    headers = {"Content-Type": "application/json"}
    assert problem(web.post(PREDICT, content=pieces(), headers=headers), 413).code == "too_large"
    assert web.post(PREDICT, json=ONE).status_code == 200


def test_the_deadline_ends_a_slow_answer() -> None:
    web = client(FakePredictor(work_s=1.0), Limits(timeout_s=0.1))
    assert problem(web.post(PREDICT, json=ONE), 504).code == "timeout"
    assert web.get("/healthz").json() == {"status": "ok"}


def test_a_caller_may_wait_for_less() -> None:
    web = client(FakePredictor(work_s=0.5))
    found = problem(web.post(PREDICT, json=ONE, headers={"X-Deadline-Ms": "50"}), 504)
    assert (found.code, "0.05 s" in found.message) == ("timeout", True)
    assert web.post(PREDICT, json=ONE, headers={"X-Deadline-Ms": "9000000"}).status_code == 200
    for wrong in ("0", "soon"):
        found = problem(web.post(PREDICT, json=ONE, headers={"X-Deadline-Ms": wrong}), 422)
        assert found.field == "X-Deadline-Ms"


class Held(FakePredictor):
    """Works until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.release = threading.Event(), threading.Event()

    def predict(self, requests: Sequence[Request], attention: bool = False) -> list[Answer]:
        self.entered.set()
        assert self.release.wait(timeout=20)
        return super().predict(requests)


def test_what_is_too_much_at_once_is_sent_away() -> None:
    fake = Held()
    with client(fake, Limits(max_in_flight=1)) as web, ThreadPoolExecutor(1) as pool:
        first = pool.submit(web.post, PREDICT, json=ONE)
        assert fake.entered.wait(timeout=20)
        response = web.post(PREDICT, json=ONE)
        alive = web.get("/healthz")
        fake.release.set()
        assert problem(response, 503).code == "overloaded"
        assert int(response.headers["Retry-After"]) >= 1
        assert alive.status_code == 200
        assert first.result(timeout=20).status_code == 200
        assert web.post(PREDICT, json=ONE).status_code == 200


def test_a_failure_shows_nothing_of_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    found = problem(client(FakePredictor(error=RuntimeError("secret path"))).post(PREDICT, json=ONE), 500)
    assert found.code == "internal"
    assert "failed: RuntimeError" in caplog.text and "secret path" not in caplog.text  # it may hold what was sent
    assert "secret" not in found.message
    assert problem(client(FakePredictor(value=float("inf"))).post(PREDICT, json=ONE), 500).code == "internal"


class Away:
    """A backend whose model is not there, or silent."""

    def __init__(self, silent: bool) -> None:
        self._silent = silent

    async def info(self) -> Mapping[str, Any]:
        if self._silent:
            await asyncio.sleep(60)
        raise UnavailableError("its process has died")

    async def call(self, method: str, body: Body) -> Reply:
        raise UnavailableError("its process has died")


@pytest.mark.parametrize("silent", [False, True])
def test_ready_and_alive_differ(silent: bool) -> None:
    web = TestClient(create_app({"lumos": Away(silent)}, Limits(timeout_s=0.1)))
    assert web.get("/healthz").status_code == 200
    assert problem(web.get("/readyz"), 503).code == "not_ready"
    response = web.post(PREDICT, json=ONE)
    assert problem(response, 503).code == "unavailable"
    assert response.headers["Retry-After"] == "1"
    assert client().get("/readyz").json() == {"status": "ready"}


def test_unknown_paths_and_methods_have_the_same_shape() -> None:
    assert problem(client().get("/v1/nothing"), 404).code == "not_found"
    response = client().get(PREDICT)
    assert problem(response, 405).code == "method_not_allowed"
    assert response.headers["Allow"] == "POST"


def test_the_documentation_shows_bodies_answers_and_errors() -> None:
    web = client()
    assert web.get("/docs").status_code == 200
    paths = web.get("/openapi.json").json()["paths"]
    for path in (PREDICT, WHAT_IF, EMBED, RECOMMEND, SCORE):
        assert "$ref" in paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for status in ("400", "401", "404", "413", "422", "429", "503", "504"):
            schema = paths[path]["post"]["responses"][status]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorResponse")
