"""One tokenizer: what is prepared, what is looked up by id and what a request brings are the same to the byte."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lum_ray.artifacts import UserError, join
from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Samples
from lum_ray.gts.predictor import Predictor, Request
from lum_ray.steps import open_predictor, prepare, train

DAYS_CUT = "2023-03-20"


@pytest.fixture(scope="module")
def predictor(tiny_gts: Run) -> Predictor:
    return open_predictor(tiny_gts)


@pytest.fixture(scope="module")
def users(predictor: Predictor) -> list[str]:
    return sorted(predictor.requests.history_of.__self__.users())  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def raw(tiny_gts: Run, users: list[str]) -> dict[str, dict[str, Any]]:
    """The raw events and profile of three users, as a client would send them, in reversed order."""
    folder = next((Path(tiny_gts.root) / "raw").iterdir())
    events = pq.read_table(folder / "events").to_pylist()
    profiles = {row["user"]: row for row in pq.read_table(folder / "profiles").to_pylist()}
    return {
        user: {
            "events": [
                {"time": row["time"].isoformat(), "item": row["item"]} for row in events[::-1] if row["user"] == user
            ],
            "profile": {"plan": profiles[user]["plan"]} if user in profiles else {},
        }
        for user in users[:3]
    }


@pytest.fixture(scope="module")
def bare(predictor: Predictor) -> Predictor:
    """The same model without any stored history."""
    reader = replace(predictor.requests, history_of=None)
    return Predictor(predictor.assortment, reader, predictor.info, predictor.device)


def scores_of(predictor: Predictor, requests: list[Request], **how: Any) -> np.ndarray[Any, Any]:
    """The scores (R, N) of the whole catalogue, by item."""
    size = len(predictor.items().ids)
    answers = predictor.recommend(requests, k=size, **how)
    return np.array([[one.score for one in sorted(answer.items)] for answer in answers])


def test_inline_events_give_the_same_bytes_as_prepare(
    tiny_gts: Run, predictor: Predictor, bare: Predictor, raw: dict[str, Any]
) -> None:
    timelines = Timelines.open(prepare(tiny_gts).sequences.uri)
    stage = predictor.assortment.stage
    for user, body in raw.items():
        inline = bare.requests.rows([Request(user, **body)])
        stored = predictor.requests.rows([Request(user)])
        again = predictor.requests.rows([Request(user, **body)])  # all of it sent once more changes nothing
        prepared = timelines.read([int(stored.rows.user_hash[0]) % timelines.buckets])
        prepared = prepared.take(np.flatnonzero(prepared.user == user))
        assert len(np.unique(prepared.days)) < len(prepared.days)
        expected = stage.questions(prepared, Samples(np.array([0]), np.array([timelines.end_day]), np.array([0])))
        for source in (inline, stored, again):
            arrays = stage.questions(source.rows, source.samples)
            assert list(arrays) == list(expected)
            for name, array in expected.items():
                assert array.dtype == arrays[name].dtype
                assert array.tobytes() == arrays[name].tobytes(), name
        by_id, by_events = Request(user), Request(user, **body)
        assert predictor.recommend([by_id], rerank=True)[0].items == bare.recommend([by_events], rerank=True)[0].items
        asked = list(predictor.items().ids[:3])
        assert predictor.score([by_id], asked)[0].items == bare.score([by_events], asked)[0].items


def test_an_answer_does_not_depend_on_the_batch(predictor: Predictor, users: list[str]) -> None:
    requests = [Request(user) for user in users[:5]]
    together = scores_of(predictor, requests)
    alone = np.concatenate([scores_of(predictor, [request]) for request in requests])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together.tobytes() == scores_of(predictor, requests).tobytes()
    embedding = predictor.embed(requests)
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(predictor.items().embedding_NO, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(embedding[4:], predictor.embed(requests[4:]), atol=1e-5)


def test_newer_events_join_what_is_stored_in_their_order(predictor: Predictor, users: list[str]) -> None:
    item = predictor.items().ids[0]
    before = predictor.requests.rows([Request(users[0])])
    late = {"time": "2023-03-29T09:00:00+02:00", "item": item}
    vague = {"time": "2023-03-28", "item": item}
    read = predictor.requests.rows([Request(users[0], events=[late, vague, late, {**vague, "item": "of nowhere"}])])
    assert len(read.rows.days) == len(before.rows.days) + 3
    assert read.rows.days[-3:].tolist() == [19444, 19444, 19445]
    assert read.rows.values[-1].tolist() == [before_hash(predictor, 0), 1_680_073_200_000_000, 120]
    assert read.samples.cut.tolist() == [19446]  # the day after all that is known
    answer = predictor.recommend([Request(users[0], events=[vague, {**vague, "item": "of nowhere"}])])[0]
    assert answer.events == len(before.rows.days) + 1
    assert answer.unknown_events == 1
    assert predictor.recommend([Request(users[0], DAYS_CUT)])[0].events == int((before.rows.days < 19436).sum())


def before_hash(predictor: Predictor, item: int) -> int:
    return int(predictor.assortment.stage.inputs.arrays["hash_N"][item])


def test_a_profile_replaces_what_is_stored(predictor: Predictor, users: list[str]) -> None:
    read = predictor.requests.rows([Request(users[0], profile={"plan": "of its own"}), Request(users[0], profile={})])
    assert read.rows.profile["plan"][0] == "of its own"
    assert read.rows.profile["plan"][1] != "of its own"


def test_the_lists(predictor: Predictor, users: list[str]) -> None:
    requests = [Request(user) for user in users[:4]]
    plain = predictor.recommend(requests, k=8)
    reranked = predictor.recommend(requests, k=8, rerank=4)
    seen = predictor.requests.rows(requests)
    for row, (one, other) in enumerate(zip(plain, reranked, strict=True)):
        assert one.known and one.user == users[row] and len(one.items) == 8
        assert [item.score for item in one.items] == sorted((item.score for item in one.items), reverse=True)
        assert one.items[0].text == predictor.assortment.text[predictor.assortment.ids.index(one.items[0].item)]
        head = [item.item for item in one.items[:4]]
        asked = predictor.score([requests[row]], head)[0].items
        assert all(0 < item.probability < 1 for item in asked)
        assert sum(item.share for item in asked) == pytest.approx(1)
        by_p = [item.item for item in sorted(asked, key=lambda item: -item.logit)]
        assert [item.item for item in other.items] == by_p + [item.item for item in one.items[4:]]
    for method in ("retrieve", "generate"):
        for answer in predictor.recommend(requests, k=120, seen_filter=True, method=method):  # type: ignore[arg-type]
            row = users.index(answer.user)
            begin, end = seen.rows.offsets[row : row + 2]
            had = predictor.assortment.stage.inputs.index_of(seen.rows.values[begin:end, 0])
            assert not {predictor.assortment.ids[item] for item in had} & {item.item for item in answer.items}


def test_a_cold_user_gets_what_is_popular(predictor: Predictor, users: list[str]) -> None:
    share = np.exp(predictor.assortment.stage.inputs.arrays["log_q_N"].astype(np.float64))
    popular = [predictor.assortment.ids[item] for item in np.argsort(-share, kind="stable")[:5]]
    lists: list[dict[str, Any]] = [{}, {"rerank": 3}, {"method": "generate"}, {"seen_filter": True}]
    requests = [Request("nobody"), Request(users[0]), Request("nobody", events=[]), Request(users[0], "2023-01-02")]
    for how in lists:
        nobody, warm, empty, early = predictor.recommend(requests, k=5, **how)
        assert (nobody.known, warm.known, empty.known, early.known) == (False, True, True, True)
        assert warm.events > 0 == nobody.events == empty.events == early.events
        for answer in (nobody, empty, early):
            assert [item.item for item in answer.items] == popular
            assert [item.score for item in answer.items] == pytest.approx(np.log(np.sort(share)[::-1][:5]).tolist())
        assert [item.item for item in warm.items] != popular
    asked = predictor.score([Request("nobody")], popular)[0].items
    assert [item.probability for item in asked] == pytest.approx(np.sort(share)[::-1][:5].tolist(), rel=1e-5)


def test_the_encoder_of_the_items_table_is_kept(tiny_gts: Run, predictor: Predictor) -> None:
    goods, catalogue = predictor.assortment, prepare(tiny_gts).catalogue
    again = goods.table.rows(catalogue.numbers, catalogue.categories)
    np.testing.assert_allclose(again, goods.fitted.arrays["table_NH"], atol=1e-5)


def test_new_items_without_a_fit(tiny_gts: Run, predictor: Predictor, users: list[str]) -> None:
    """Such an item is what the trained module makes of its text, its row and its path, with the graph hidden."""
    goods = predictor.assortment
    model = goods.stage.module.behaviours
    catalogue = prepare(tiny_gts).catalogue
    row = {"format": catalogue.categories["format"][3], "price": float(catalogue.numbers["price"][3])}
    new: dict[str, Any] = {"text alone": goods.text[3], "with a row": {"text": goods.text[3], **row}}
    more = goods.add(new)
    assert more.ids == (*goods.ids, *new)
    assert more.tree.paths_ND[-1].tolist() == goods.tree.assign(goods.fitted.arrays["text_NE"][3:4])[0].tolist()
    numbers = [sum(4**j for j in range(1, level + 1)) for level in range(2)]
    path = more.tree.paths_ND[-1]
    nodes = torch.tensor([[numbers[0] + path[0], numbers[1] + path[0] * 4 + path[1]]])
    for place, hidden in enumerate(([False, True, True], [False, True, False])):
        order = [("text", "graph", "table").index(name) for name in model.modalities]
        memory, known = model.memory(torch.tensor([3]), torch.tensor([hidden])[:, order])
        digit = int(more.tree.collision_N[len(goods.ids) + place])
        ids = model.nodes(nodes).sum(dim=1) + model.collisions(torch.tensor([min(digit, 15)]))
        assert model.qformer is not None
        gathered = model.qformer(memory, known, ids[:, None])[0].flatten(1)
        others = model.gathered(torch.arange(len(goods.ids)))
        fused = model(gathered, others, goods.stage.module.constants["chance_N"])
        made = more.stage.module.catalogue()[0][len(goods.ids) + place]
        torch.testing.assert_close(made, fused[0], atol=1e-4, rtol=1e-4)

    # what was there scores as before; the new ones are recommended, scored and read in histories
    requests = [Request(users[0]), Request("nobody")]
    before, after = (predictor.recommend(requests, k=199, new_items=given) for given in (None, new))
    for one, other in zip(before, after, strict=True):
        assert {item.item for item in other.items} - {item.item for item in one.items} == set(new)
        scores = {item.item: item.score for item in other.items}
        assert [scores[item.item] for item in one.items] == pytest.approx([item.score for item in one.items], abs=1e-5)
    assert set(new) == {item.item for item in after[1].items[-2:]}  # nobody had them: the least popular
    asked = predictor.score(requests, ["text alone", goods.ids[0]], new_items=new)[0].items
    assert asked[0].item == "text alone" and asked[0].text == goods.text[3]
    assert asked[1].logit == pytest.approx(predictor.score(requests, goods.ids[:2])[0].items[0].logit, abs=1e-5)
    event = {"time": "2023-03-26T12:00:00Z", "item": "text alone"}
    read, unread = (predictor.recommend([Request("x", events=[event])], new_items=given)[0] for given in (new, None))
    assert (read.events, read.unknown_events, unread.events, unread.unknown_events) == (1, 0, 0, 1)
    written = predictor.recommend(requests, k=199, method="generate", new_items=new)[0]
    assert set(new) <= {item.item for item in written.items}
    assert predictor.items(new).embedding_NO.shape == (len(goods.ids) + 2, 16)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("x", events=[{"time": "2023-03-01T10:00:00Z", "item": "i1"}] * 7 + [{"time": "1st", "item": "i1"}]),
         r"users\[1\]\.events\[7\]\.time: expected an ISO date or an ISO timestamp with a zone, got '1st'"),
        (Request("x", events=[{"time": "2023-03-01T10:00:00", "item": "i1"}]), r"events\[0\]\.time: .*has no zone"),
        (Request("x", events=[{"time": 1_679_000_000, "item": "i1"}]), r"events\[0\]\.time: expected a day before"),
        (Request("x", events=[{"item": "i1"}]), r"events\[0\]\.time: missing; every event holds time and item"),
        (Request("x", events=[{"time": "2023-03-01", "item": 1.5}]), r"\[0\]\.item: expected an item id, got 1.5"),
        (Request("x", "2023-03-01", events=[{"time": "2023-02-01", "item": "a"}, {"time": "2023-03-01", "item": "a"}]),
         r"users\[1\]\.events\[1\]\.time: expected a time before the cut, 2023-03-01"),
        (Request("x", "2022-12-01"), r"users\[1\]\.cut_day: expected a day from 2023-01-02 to"),
        (Request("x", profile={"plans": "a"}), r"users\[1\]\.profile\.plans: unknown; known are plan"),
        (Request(""), r"users\[1\]\.user: expected an id that is a text"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_named(predictor: Predictor, request_: Request, message: str) -> None:
    with pytest.raises(UserError, match=message):
        predictor.recommend([Request("fine"), request_])


def test_what_is_wrong_with_a_call_is_named(predictor: Predictor) -> None:
    ids = predictor.items().ids
    with pytest.raises(UserError, match=r"items: 6 are not in the catalogue of this model: q0, q1, q2, q3, q4; give"):
        predictor.score([Request("x")], [ids[0], *(f"q{i}" for i in range(6))])
    with pytest.raises(UserError, match=r"items: expected each once, got again: "):
        predictor.score([Request("x")], [ids[0], ids[0]])
    with pytest.raises(UserError, match="method: expected retrieve or generate, got 'guess'"):
        predictor.recommend([Request("x")], method="guess")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"new_items: 1 are in the catalogue already: {ids[0]}"):
        predictor.recommend([Request("x")], new_items={ids[0]: "a text"})
    with pytest.raises(UserError, match=r"new_items\.a\.prize: unknown; the items table's columns are price, format"):
        predictor.items({"a": {"text": "a", "prize": 1}})
    with pytest.raises(UserError, match=r"new_items\.a: expected an id with a text that is not empty"):
        predictor.items({"a": " "})


def test_a_checkpoint_that_cannot_be_used_is_refused(tiny_gts: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a checkpoint, found no run\.json"):
        Predictor.load(str(tmp_path / "none"))
    own = Path(train(tiny_gts))
    record = json.loads((own / "run.json").read_text())
    root = tmp_path / "root"
    for name in ("items", "tree", "fitted"):
        shutil.copytree(Path(tiny_gts.root) / name / record[name], root / name / record[name])
    place = root / "checkpoints" / own.name
    shutil.copytree(own, place)
    assert Predictor.load(str(place), device="cpu").info["end_day"] == record["end_day"]

    def with_record(**changes: Any) -> str:
        (place / "run.json").write_text(json.dumps(record | changes))
        return str(place)

    with pytest.raises(UserError, match="expected a checkpoint of gts, got one of 'lumos'"):
        Predictor.load(with_record(model="lumos"))
    with pytest.raises(UserError, match="its LLM random has other weights than in training"):
        Predictor.load(with_record(llm={**record["llm"], "digest": "0"}))
    with pytest.raises(UserError, match=r"was trained with .*/tree/0, which is not there"):
        Predictor.load(with_record(tree="0"))
    literal = json.loads(json.dumps(record["run"]))
    literal["gts"]["reading"] = "literal"
    with pytest.raises(UserError, match="literal, which has the answer in the question"):
        Predictor.load(with_record(run=literal))
    with_record()
    weights = root / "fitted" / record["fitted"] / "inputs.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"inputs\.safetensors: damaged"):
        Predictor.load(str(place))
    weights.write_bytes(whole)
    (place / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: not JSON"):
        Predictor.load(join(str(place)))
