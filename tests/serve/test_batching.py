from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from lum_ray.lumos.predictor import Request
from serve.batching import Batcher, merged
from serve.models import gts_model, lumos_model
from serve.types import Body, Reply
from tests.serve.fake_predictor import FakeGts, FakePredictor, local


def predict(fake: FakePredictor, *calls: list[dict[str, Any]], end_day: int | None = None) -> list[Reply]:
    return lumos_model(fake, end_day).methods["predict"]([{"users": call} for call in calls])


def users_of(reply: Reply) -> list[str]:
    assert reply.status == 200, reply
    return [answer["user"] for answer in json.loads(reply.body)["answers"]]


def test_calls_share_one_batch_and_keep_their_users() -> None:
    fake = FakePredictor()
    replies = predict(fake, [{"user": "u1"}, {"user": "u22"}], [{"user": "u333"}])
    assert [users_of(reply) for reply in replies] == [["u1", "u22"], ["u333"]]
    assert fake.calls == [["u1", "u22", "u333"]]
    assert json.loads(replies[1].body)["model"] == {"name": "fake", "checkpoint": "fake-000000000000", "step": 7}


def test_a_bad_call_fails_alone_and_counts_its_own_users() -> None:
    fake = FakePredictor()
    bad = [{"user": "u9"}, {"user": "nobody"}]
    first, second, third = predict(fake, [{"user": "u1"}], bad, [{"user": "u2"}])
    assert users_of(first) == ["u1"]
    assert users_of(third) == ["u2"]
    error = json.loads(second.body)["error"]
    assert (second.status, error["code"], error["field"]) == (404, "unknown_user", "users[1].user")
    assert fake.calls == [["u1", "u2"]]


def test_each_of_several_bad_calls_gets_its_own_error() -> None:
    calls = [[{"user": "a"}], [{"user": "u"}], [{"user": "u", "events": [{"amount": 1}, {}]}], [{"user": "b"}]]
    replies = predict(FakePredictor(), *calls)
    assert [reply.status for reply in replies] == [404, 200, 400, 404]
    assert json.loads(replies[2].body)["error"]["field"] == "users[0].events[1].amount"
    assert "'b'" in replies[3].body.decode()
    assert "'a'" not in replies[3].body.decode()


def test_users_with_calendars_of_their_own_share_a_call() -> None:
    row = {"event_type": "mailer", "start_day": "2017-11-03"}
    fake = FakePredictor()
    (reply,) = predict(fake, [{"user": "u1", "calendar": [row]}, {"user": "u2"}, {"user": "u3", "calendar": [row]}])
    means = [answer["days"][0]["behaviours"]["sales"]["mean"] for answer in json.loads(reply.body)["answers"]]
    assert users_of(reply) == ["u1", "u2", "u3"]
    assert means == [3.0, 2.0, 3.0]
    assert fake.calls == [["u1", "u3"], ["u2"]]


def test_an_error_names_the_user_in_the_whole_request() -> None:
    (reply,) = predict(FakePredictor(), [{"user": "u1", "calendar": []}, {"user": "u2"}, {"user": "nobody"}])
    assert json.loads(reply.body)["error"]["field"] == "users[2].user"


def test_the_default_cut_is_the_end_of_the_state() -> None:
    fake = FakePredictor()
    predict(fake, [{"user": "u1"}, {"user": "u2", "cut_day": "2017-10-01"}], end_day=17471)
    assert [request.cut_day for request in fake.requests] == [17471, "2017-10-01"]
    assert lumos_model(fake, 17471).info["end_day"] == "2017-11-01"


def test_calls_with_other_options_are_batches_of_their_own() -> None:
    fake = FakeGts()
    bodies = [
        {"users": [{"user": "a"}], "k": 1},
        {"users": [{"user": "b"}], "k": 2},
        {"users": [{"user": "c"}], "k": 1},
    ]
    replies = gts_model(fake).methods["recommend"](bodies)
    assert [json.loads(reply.body)["answers"][0]["user"] for reply in replies] == ["a", "b", "c"]
    assert [users for users, _ in fake.calls] == [["a", "c"], ["b"]]


def test_what_if_and_embed_reply_for_each_user() -> None:
    methods = lumos_model(FakePredictor()).methods
    scenarios = [[{"event_type": "mailer", "start_day": "2017-11-03"}], []]
    users = [{"user": "u1"}, {"user": "u2", "calendar": []}]
    (reply,) = methods["what_if"]([{"users": users, "scenarios": scenarios}])
    answers = json.loads(reply.body)["answers"]
    assert [answer["baseline"]["user"] for answer in answers] == ["u1", "u2"]
    assert [len(answer["scenarios"]) for answer in answers] == [2, 2]
    (embedded,) = methods["embed"]([{"users": [{"user": "u1"}, {"user": "u22"}]}])
    assert json.loads(embedded.body)["embeddings"] == [[2.0, 1.5], [3.0, 1.5]]


def test_a_failure_that_is_no_refusal_is_raised() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        predict(FakePredictor(error=RuntimeError("broken")), [{"user": "u1"}], [{"user": "u2"}])
    with pytest.raises(ValueError, match="JSON"):
        predict(FakePredictor(value=float("nan")), [{"user": "u1"}])


def test_merging_nothing_gives_nothing() -> None:
    def run(requests: Any) -> list[Request]:
        raise AssertionError("nothing to run")

    assert merged([], run) == []


class Works:
    """Takes batches and holds them until it is let go."""

    def __init__(self, error: Exception | None = None) -> None:
        self.batches: list[tuple[str, list[Any]]] = []
        self.go = asyncio.Event()
        self._error = error

    async def __call__(self, method: str, bodies: list[Body]) -> list[Reply]:
        self.batches.append((method, [body["users"][0] for body in bodies]))
        await self.go.wait()
        if self._error:
            raise self._error
        return [Reply(200, str(body["users"][0]).encode()) for body in bodies]


def body(name: str, users: int = 1) -> Body:
    return {"users": [name] * users}


def test_what_waits_goes_together_by_method_and_up_to_the_bound() -> None:
    async def scenario() -> None:
        works = Works()
        batcher = Batcher(works, most=4)
        calls = [("a", 1), ("b", 2), ("c", 3), ("d", 1), ("e", 9)]
        tasks = [asyncio.create_task(batcher.call("predict", body(name, users))) for name, users in calls]
        other = asyncio.create_task(batcher.call("embed", body("f")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert works.batches == [("predict", ["a"])]
        works.go.set()
        assert [reply.body.decode() for reply in await asyncio.gather(*tasks, other)] == list("abcdef")
        assert works.batches == [
            ("predict", ["a"]), ("predict", ["b", "d"]), ("predict", ["c"]), ("predict", ["e"]), ("embed", ["f"]),
        ]  # fmt: skip

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("sizes", "taken"),
    [
        ([2, 3, 2, 1], [True, True, False, False]),
        ([9, 1, 1], [True, True, False]),
    ],
)
def test_what_there_is_no_room_for_is_sent_away_at_once(sizes: list[int], taken: list[bool]) -> None:
    async def scenario() -> None:
        works = Works()
        batcher = Batcher(works, most=3, room=4)
        tasks = [asyncio.create_task(batcher.call("predict", body(str(i), users))) for i, users in enumerate(sizes)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [not one for one in taken]
        works.go.set()
        assert [reply.status for reply in await asyncio.gather(*tasks)] == [200 if one else 503 for one in taken]
        assert (await batcher.call("predict", body("z", users=9))).status == 200

    asyncio.run(scenario())


def test_who_gives_up_is_not_waited_for() -> None:
    async def scenario() -> None:
        works = Works()
        batcher = Batcher(works, most=4)
        first = asyncio.create_task(batcher.call("predict", body("a")))
        gone = asyncio.create_task(batcher.call("predict", body("b")))
        last = asyncio.create_task(batcher.call("predict", body("c")))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        works.go.set()
        assert [(await task).body for task in (first, last)] == [b"a", b"c"]
        assert works.batches == [("predict", ["a"]), ("predict", ["c"])]

    asyncio.run(scenario())


def test_a_batch_that_fails_tells_each_of_its_calls_and_the_next_goes_on() -> None:
    async def scenario() -> None:
        works = Works(error=RuntimeError("broken"))
        works.go.set()
        batcher = Batcher(works, most=4)
        found = await asyncio.gather(*(batcher.call("predict", body(name)) for name in "abc"), return_exceptions=True)
        assert [str(error) for error in found] == ["broken"] * 3
        assert len(works.batches) == 2

    asyncio.run(scenario())


def test_the_event_loop_is_free_while_the_model_works() -> None:
    fake = FakePredictor(work_s=0.3)
    model = local(fake)

    async def beats() -> int:
        work = asyncio.ensure_future(model.call("predict", {"users": [{"user": "u1"}]}))
        count = 0
        while not work.done():
            await asyncio.sleep(0.01)
            count += 1
        return count

    assert asyncio.run(beats()) > 5
    assert threading.get_ident() not in fake.threads
