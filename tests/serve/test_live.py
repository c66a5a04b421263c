"""Real models behind HTTP, in this process: they say what Python and the batch say, and are replaced meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from lum_ray.artifacts import UserError
from lum_ray.config import Run
from lum_ray.data.state import State, latest, point, pointer
from lum_ray.gts.predictor import Predictor as Gts
from lum_ray.gts.requests import Request as GtsRequest
from lum_ray.lumos.predictor import Predictor as Lumos
from lum_ray.lumos.predictor import Request
from lum_ray.steps import predict, publish, train
from serve.ingress import create_app
from serve.live import Live, Loader, Local, Target
from serve.models import Model
from serve.types import Reply


def served(run: Run) -> tuple[TestClient, Any, list[str]]:
    """The run behind HTTP, its predictor, and its users."""
    checkpoint, place = train(run), publish(run)
    state = State.open(place)
    live = Live(Loader(run.model, 64 << 20), Target(checkpoint, place))
    predictor = (Gts if run.model == "gts" else Lumos).load(checkpoint, state.rows, end_day=state.end_day)
    return TestClient(create_app({run.model: Local(live)})), predictor, state.users()


def answers(web: TestClient, path: str, body: dict[str, Any], name: str = "answers") -> Any:
    response = web.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()[name]


def users_of(names: list[str], **more: Any) -> dict[str, Any]:
    return {"users": [{"user": name} for name in names], **more}


@pytest.mark.parametrize("reading", ["retrieve", "rerank", "generate"])
def test_http_batch_and_python_recommend_the_same(tiny_gts: Run, reading: str) -> None:
    web, predictor, users = served(tiny_gts)
    some, k = users[:7], 6
    over_http = answers(web, "/v1/gts/recommend", users_of(some, k=k, reading=reading))
    method = "generate" if reading == "generate" else "retrieve"
    in_python = predictor.recommend([GtsRequest(user) for user in some], k, False, reading == "rerank", method)
    table = pq.read_table(predict(tiny_gts, readings=[reading], k=k) + "/rankings")
    for one, other in zip(over_http, in_python, strict=True):
        rows = table.filter(np.array(table["user"].to_pylist()) == one["user"]).sort_by("rank").to_pydict()
        assert one["user"] == other.user
        scores = [item["score"] for item in one["items"]]
        for same in ([item.score for item in other.items], rows["score"]):
            np.testing.assert_allclose(scores, same, atol=1e-5)
        # items whose scores are equal to 1e-5 may change places
        assert {item["item"] for item in one["items"]} == set(rows["item"]) == {item.item for item in other.items}


def test_http_and_python_score_and_embed_the_same(tiny_gts: Run) -> None:
    web, predictor, users = served(tiny_gts)
    items = list(predictor.items().ids[:4])
    late = {"time": "2023-03-29T09:00:00+02:00", "item": items[0]}
    asked = [{"user": users[0]}, {"user": users[1], "events": [late]}, {"user": "new", "events": [late]}]
    requests = [GtsRequest(**one) for one in asked]
    found = answers(web, "/v1/gts/score", {"users": asked, "items": items})
    for one, other in zip(found, predictor.score(requests, items), strict=True):
        assert (one["known"], one["events"], one["cut_day"]) == (other.known, other.events, other.cut_day)
        assert [item["item"] for item in one["items"]] == items
        np.testing.assert_allclose([item["logit"] for item in one["items"]], [i.logit for i in other.items], atol=1e-5)
    np.testing.assert_allclose(
        answers(web, "/v1/gts/embed", {"users": asked}, "embeddings"), predictor.embed(requests), atol=1e-5
    )
    refused = web.post("/v1/gts/recommend", json={"users": [{"user": "u", "events": [{"time": "soon", "item": "1"}]}]})
    assert (refused.status_code, refused.json()["error"]["field"]) == (400, "users[0].events[0].time")


def test_what_if_over_kept_histories_is_the_full_pass(tiny: Run) -> None:
    web, predictor, users = served(tiny)
    kind = predictor.info["event_types"][0]
    some = users[:5]
    days = [day["day"] for day in predictor.predict([Request(some[0])])[0].days]
    rows = [{"event_type": kind, "start_day": days[1], "end_day": days[3]}]
    body = users_of(some, scenarios=[rows, []], attention=True)
    first = answers(web, "/v1/lumos/what-if", body)
    again = answers(web, "/v1/lumos/what-if", users_of(some[::-1], scenarios=[rows, []], attention=True))[::-1]
    for column, calendar in enumerate((None, rows, [])):
        full = predictor.predict([Request(user, calendar=calendar) for user in some], attention=True)
        for one, other, expected in zip(first, again, full, strict=True):
            for found in (one, other):
                answer = found["scenarios"][column - 1]["answer"] if column else found["baseline"]
                assert _close(answer, expected.as_dict()), (column, expected.user)
                sums = np.array(answer["attention"]).sum(axis=1)
                np.testing.assert_allclose(sums, 1.0, atol=1e-3)


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float):
        return bool(np.isclose(one, other, rtol=1e-4, atol=1e-5))
    return bool(one == other)


def test_kept_histories_are_bounded_and_those_of_requests_are_not_kept(tiny: Run) -> None:
    checkpoint, state = train(tiny), State.open(publish(tiny))
    unbounded = Lumos.load(checkpoint, state.rows, cache_bytes=1 << 30)
    users = state.users()[:6]
    unbounded.what_if([Request(user) for user in users], [[]])
    assert len(unbounded.memories) == 6
    small = Lumos.load(checkpoint, state.rows, cache_bytes=unbounded.memories.bytes // 2)
    small.what_if([Request(user) for user in users], [[]])
    assert len(small.memories) == 3
    assert small.memories.bytes <= unbounded.memories.bytes // 2
    before = unbounded.memories.bytes
    unbounded.what_if([Request("new", events=[])], [[]])
    assert unbounded.memories.bytes == before


def test_history_shows_what_the_model_reads(tiny: Run) -> None:
    web, predictor, users = served(tiny)
    (found,) = answers(web, "/v1/lumos/history", users_of(users[:1]), "histories")
    assert len(found["past"]) == predictor.info["history_days"]
    stored = State.open(publish(tiny)).rows(users[:1])[users[0]]
    cut = predictor.info["end_day"]
    active = {int(day) for day in stored.days if cut - len(found["past"]) <= day < cut}
    shown = {cut - len(found["past"]) + t for t, day in enumerate(found["past"]) if any(day["behaviours"].values())}
    assert shown == active
    # what is shown of the coming days, sent back as a calendar, changes nothing
    rows = [
        {"event_type": event["event_type"], "start_day": day["day"], "value": event["value"]}
        for day in found["coming"] for event in day["events"] for _ in range(event["count"])
    ]  # fmt: skip
    (same,) = answers(web, "/v1/lumos/what-if", users_of(users[:1], scenarios=[rows]))
    assert _close(same["scenarios"][0]["answer"], same["baseline"])


def test_stored_ids_are_found_by_their_beginning(tiny: Run) -> None:
    web, _, users = served(tiny)
    found = web.get("/v1/lumos/users", params={"prefix": users[0], "limit": 100}).json()["users"]
    assert found[0] == users[0]
    assert set(found) == {user for user in users if user.startswith(users[0])}
    assert web.get("/v1/lumos/users", params={"limit": 3}).json()["complete"] is False
    assert web.get("/v1/lumos/users", params={"prefix": "no such"}).json() == {"users": [], "complete": True}


def tell(live: Live, user: str) -> tuple[int, Any]:
    (reply,) = asyncio.run(live.reply("predict", [{"users": [{"user": user}]}]))
    return reply.status, json.loads(reply.body)


def test_what_is_published_is_taken_and_what_is_damaged_is_refused(tiny: Run, tmp_path: Path) -> None:
    checkpoint, old = train(tiny), publish(tiny)
    place = str(tmp_path / "latest.json")
    live = Live(Loader("lumos"), Target(checkpoint, old), place, again_s=0.5)
    user = State.open(old).users()[0]
    assert not asyncio.run(live.refresh())
    newer = str(tmp_path / "state")
    shutil.copytree(old, newer)
    point(place, state=newer)
    before = live._model
    assert asyncio.run(live.refresh())
    assert live.info()["state"] == newer
    assert live._model is not before
    assert tell(live, user)[0] == 200

    copy = tmp_path / "checkpoints" / Path(checkpoint).name
    shutil.copytree(checkpoint, copy)
    shutil.copytree(Path(checkpoint).parents[1] / "calendar", tmp_path / "calendar")
    weights = next(copy.glob("best/*/model.safetensors"))
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    point(place, checkpoint=str(copy))
    assert not asyncio.run(live.refresh())
    assert "model.safetensors" in live.info()["refused"]
    assert tell(live, user)[0] == 200
    # a replica that starts now falls back on what it was given
    started = Live(Loader("lumos"), Target(checkpoint, old), place)
    assert (started.info()["state"], "model.safetensors" in started.info()["refused"]) == (old, True)

    weights.write_bytes(intact)
    time.sleep(0.5)
    assert asyncio.run(live.refresh())
    assert live.info()["refused"] is None
    Path(place).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        asyncio.run(live.refresh())
    assert tell(live, user)[0] == 200


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "loop.json", "run.json", "manifest.json", "reference.safetensors"]
)
def test_a_checkpoint_with_a_pickle_inside_is_refused_and_not_executed(tiny: Run, tmp_path: Path, name: str) -> None:
    checkpoint = train(tiny)
    copy, mark = tmp_path / "checkpoints" / Path(checkpoint).name, tmp_path / "executed"
    shutil.copytree(checkpoint, copy)
    shutil.copytree(Path(checkpoint).parents[1] / "calendar", tmp_path / "calendar")
    bomb = pickle.dumps(Bomb(mark))
    for path in copy.rglob(name):
        path.write_bytes(bomb)
    for manifest in copy.glob("*/manifest.json") if name != "manifest.json" else ():
        # whoever can change the file can change its digest too
        plain = json.loads(manifest.read_text())
        for step in plain["steps"]:
            if name in step["files"]:
                step["files"][name] = {"size": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
        manifest.write_text(json.dumps(plain))
    with pytest.raises(UserError, match=r"not what it should be|not JSON|not safetensors"):
        Live(Loader("lumos"), Target(str(copy), publish(tiny)))
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()  # so it would have been seen


def test_requests_in_flight_keep_the_old_model(tmp_path: Path) -> None:
    entered, go = threading.Event(), threading.Event()

    def model(target: Target) -> Model:
        def answer(bodies: Any) -> list[Reply]:
            entered.set()
            assert go.wait(timeout=20)
            return [Reply(200, target.checkpoint.encode()) for _ in bodies]

        return Model({}, {"predict": answer})

    async def scenario() -> list[bytes]:
        live = Live(model, Target("/old"), str(tmp_path / "latest.json"))
        first = asyncio.create_task(live.reply("predict", [{}]))
        await asyncio.to_thread(entered.wait, 20)
        point(str(tmp_path / "latest.json"), checkpoint="/new")
        assert await live.refresh()
        go.set()
        return [(await first)[0].body, (await live.reply("predict", [{}]))[0].body]

    assert asyncio.run(scenario()) == [b"/old", b"/new"]


def test_publish_moves_the_pointer_of_its_run(tiny: Run, tmp_path: Path) -> None:
    place = pointer(tiny.root, tiny.name)
    state = publish(tiny)
    assert latest(place)["state"] == state
    publish(tiny, checkpoint=str(tmp_path / "some"))
    publish(tiny)
    assert latest(place) == {"state": state, "checkpoint": str(tmp_path / "some")}
    Path(place).unlink()
    assert latest(place) == {}
