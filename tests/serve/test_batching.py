from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from lum_ray.lumos.predictor import Request
from serve.batching import LumosModel, merged
from serve.types import Reply
from tests.serve.fake_predictor import FakePredictor


def predict(model: LumosModel, *calls: list[dict[str, Any]]) -> list[Reply]:
    return asyncio.run(model.predict(calls))


def users_of(reply: Reply) -> list[str]:
    assert reply.status == 200, reply
    return [answer["user"] for answer in json.loads(reply.body)["answers"]]


def test_calls_share_one_batch_and_keep_their_users() -> None:
    fake = FakePredictor()
    replies = predict(LumosModel(fake), [{"user": "u1"}, {"user": "u22"}], [{"user": "u333"}])
    assert [users_of(reply) for reply in replies] == [["u1", "u22"], ["u333"]]
    assert fake.calls == [["u1", "u22", "u333"]]
    assert json.loads(replies[1].body)["model"] == {"name": "fake", "checkpoint": "fake-000000000000", "step": 7}


def test_a_bad_call_fails_alone_and_counts_its_own_users() -> None:
    fake = FakePredictor()
    bad = [{"user": "u9"}, {"user": "nobody"}]
    first, second, third = predict(LumosModel(fake), [{"user": "u1"}], bad, [{"user": "u2"}])
    assert users_of(first) == ["u1"]
    assert users_of(third) == ["u2"]
    error = json.loads(second.body)["error"]
    assert (second.status, error["code"], error["field"]) == (404, "unknown_user", "users[1].user")
    assert fake.calls == [["u1", "u2"]]


def test_each_of_several_bad_calls_gets_its_own_error() -> None:
    calls = [[{"user": "a"}], [{"user": "u"}], [{"user": "u", "events": [{"amount": 1}, {}]}], [{"user": "b"}]]
    replies = predict(LumosModel(FakePredictor()), *calls)
    assert [reply.status for reply in replies] == [404, 200, 400, 404]
    assert json.loads(replies[2].body)["error"]["field"] == "users[0].events[1].amount"
    assert "'b'" in replies[3].body.decode()
    assert "'a'" not in replies[3].body.decode()


def test_users_with_calendars_of_their_own_share_a_call() -> None:
    row = {"event_type": "mailer", "start_day": "2017-11-03"}
    fake = FakePredictor()
    (reply,) = predict(
        LumosModel(fake), [{"user": "u1", "calendar": [row]}, {"user": "u2"}, {"user": "u3", "calendar": [row]}]
    )
    means = [answer["days"][0]["behaviours"]["sales"]["mean"] for answer in json.loads(reply.body)["answers"]]
    assert users_of(reply) == ["u1", "u2", "u3"]
    assert means == [3.0, 2.0, 3.0]
    assert fake.calls == [["u1", "u3"], ["u2"]]


def test_an_error_names_the_user_in_the_whole_request() -> None:
    (reply,) = predict(
        LumosModel(FakePredictor()), [{"user": "u1", "calendar": []}, {"user": "u2"}, {"user": "nobody"}]
    )
    assert json.loads(reply.body)["error"]["field"] == "users[2].user"


def test_the_default_cut_is_the_end_of_the_state() -> None:
    fake = FakePredictor()
    model = LumosModel(fake, end_day=17471)
    predict(model, [{"user": "u1"}, {"user": "u2", "cut_day": "2017-10-01"}])
    assert [request.cut_day for request in fake.requests] == [17471, "2017-10-01"]
    assert model.info()["end_day"] == "2017-11-01"


def test_the_event_loop_is_free_while_the_model_works() -> None:
    fake = FakePredictor(work_s=0.3)
    model = LumosModel(fake)

    async def beats() -> int:
        work = asyncio.ensure_future(model.predict([[{"user": "u1"}]]))
        count = 0
        while not work.done():
            await asyncio.sleep(0.01)
            count += 1
        return count

    assert asyncio.run(beats()) > 5
    assert threading.get_ident() not in fake.threads


def test_what_if_and_embed_reply_for_each_user() -> None:
    model = LumosModel(FakePredictor())
    scenarios = [[{"event_type": "mailer", "start_day": "2017-11-03"}], []]
    reply = asyncio.run(model.what_if([{"user": "u1"}, {"user": "u2", "calendar": []}], scenarios))
    answers = json.loads(reply.body)["answers"]
    assert [answer["baseline"]["user"] for answer in answers] == ["u1", "u2"]
    assert [len(answer["scenarios"]) for answer in answers] == [2, 2]
    (embedded,) = asyncio.run(model.embed([[{"user": "u1"}, {"user": "u22"}]]))
    assert json.loads(embedded.body)["embeddings"] == [[2.0, 1.5], [3.0, 1.5]]


def test_a_failure_that_is_no_refusal_is_raised() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        predict(LumosModel(FakePredictor(error=RuntimeError("broken"))), [{"user": "u1"}], [{"user": "u2"}])
    with pytest.raises(ValueError, match="JSON"):
        predict(LumosModel(FakePredictor(value=float("nan"))), [{"user": "u1"}])


def test_merging_nothing_gives_nothing() -> None:
    def run(requests: Any) -> list[Request]:
        raise AssertionError("nothing to run")

    assert merged([], run) == []
