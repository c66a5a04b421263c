"""One tokenizer: what is prepared, what is looked up by id and what a request brings are the same to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lum_ray.artifacts import UserError, join
from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Samples
from lum_ray.data.state import State
from lum_ray.lumos.predictor import Answer, Predictor, Request
from lum_ray.steps import open_predictor, prepare, publish, train

CUT = "2024-11-15"


@pytest.fixture(scope="module")
def predictor(tiny: Run) -> Predictor:
    return open_predictor(tiny)


@pytest.fixture(scope="module")
def raw(tiny: Run) -> dict[str, dict[str, Any]]:
    """The raw events and profile of two users, as a client would send them."""
    folder = next((Path(tiny.root) / "raw").iterdir())
    events = pq.read_table(folder / "events").to_pylist()
    profiles = {row["user"]: row for row in pq.read_table(folder / "profiles").to_pylist()}
    users = sorted({row["user"] for row in events})[:2]
    return {
        user: {
            "events": [
                {name: value.isoformat() if name == "time" else value for name, value in row.items() if name != "user"}
                for row in events
                if row["user"] == user and row["time"].isoformat() < CUT
            ],
            "profile": {
                name: value.isoformat() if name == "registered" else value
                for name, value in profiles[user].items()
                if name in ("registered", "country", "age_group")
            },
        }
        for user in users
    }


def without_state(predictor: Predictor) -> Predictor:
    reader = replace(predictor.requests, history_of=None)
    return Predictor(predictor.stage, reader, predictor.info, predictor.nearness, predictor.device)


def same(one: Answer, other: Answer, tolerance: float = 0.0) -> None:
    left, right = list(numbers(one.as_dict())), list(numbers(other.as_dict()))
    assert len(left) > 20
    np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value


def test_inline_events_give_the_same_bytes_as_prepare(tiny: Run, predictor: Predictor, raw: dict[str, Any]) -> None:
    timelines = Timelines.open(prepare(tiny).timelines.uri)
    for user, body in raw.items():
        stored = predictor.requests.history_of([user])[user]  # type: ignore[misc]
        bucket = int(stored.user_hash[0]) % (1 << 6)
        prepared = timelines.read([bucket])
        prepared = prepared.take(np.flatnonzero(prepared.user == user))
        bare = without_state(predictor)
        inline, samples = bare.requests.rows([Request(user, CUT, events=body["events"], profile=body["profile"])])
        expected = bare.stage.collate(prepared, Samples(np.array([0]), samples.cut, samples.draw))
        for source in (inline, stored):
            arrays = bare.stage.collate(source, samples)
            for name, array in expected.items():
                if name in ("daily_BCFV", "horizon_BCH", "counts_K"):
                    continue  # a request has no outcomes
                assert array.dtype == arrays[name].dtype
                assert array.tobytes() == arrays[name].tobytes() or name == "user", name
        same(predictor.predict([Request(user, CUT)])[0], bare.predict([Request(user, CUT, **body)])[0])


def test_an_answer_does_not_depend_on_the_batch(predictor: Predictor) -> None:
    users = predictor.requests.history_of.__self__.users()[:5]  # type: ignore[union-attr]
    together = predictor.predict([Request(user) for user in users])
    for user, answer in zip(users, together, strict=True):
        same(answer, predictor.predict([Request(user)])[0], 1e-5)
    same(together[0], predictor.predict([Request(user) for user in users])[0])


def test_days_behaviours_and_intervals(tiny: Run, predictor: Predictor) -> None:
    user = predictor.requests.history_of.__self__.users()[0]  # type: ignore[union-attr]
    answer = predictor.predict([Request(user)])[0]
    assert [day["day"] for day in answer.days] == [f"2025-01-{d:02d}" for d in range(1, 8)]
    assert answer.cut_day == "2025-01-01"
    for day in answer.days:
        assert list(day["behaviours"]) == [item.name for item in tiny.data.behaviours]
        assert 0 < day["behaviours"]["active"]["p"] < 1
        amount = day["behaviours"]["amount"]
        assert amount["low"] <= amount["median"] <= amount["high"]
    assert set(answer.horizons) == {"active_any_7", "amount_sum_7"}
    assert predictor.embed([Request(user)]).shape == (1, tiny.section.width)


def test_newer_inline_events_join_what_is_stored(predictor: Predictor) -> None:
    user = predictor.requests.history_of.__self__.users()[0]  # type: ignore[union-attr]
    event = {"time": "2025-01-02T10:00:00+00:00", "kind": "purchase", "amount": 12.5}
    rows, samples = predictor.requests.rows([Request(user, "2025-01-04", events=[event])])
    before, _ = predictor.requests.rows([Request(user)])
    assert len(rows.days) == len(before.days) + 1
    assert rows.values[-1].tolist() == [1, 1, 0, 1250, 1, 1]
    assert samples.cut.tolist() == [20092]


def test_what_if_moves_the_changed_day_and_no_other(predictor: Predictor) -> None:
    user = predictor.requests.history_of.__self__.users()[0]  # type: ignore[union-attr]
    day = predictor.predict([Request(user)])[0].days[2]["day"]
    row = {"event_type": "festival", "start_day": day}
    found = predictor.what_if([Request(user, calendar=[])], [[row], [], [{**row, "value": 1000.0}]])[0]
    moved = found.scenarios[0]["difference"]["days"]
    assert abs(moved[2]["behaviours"]["active"]) > 1e-6
    for place in (0, 1, 3, 4, 5, 6):
        assert moved[place]["behaviours"]["active"] == pytest.approx(0, abs=1e-6)
    same(found.baseline, found.scenarios[1]["answer"], 1e-6)
    assert found.scenarios[1]["nearer_share"] == 0.0
    assert not found.scenarios[1]["out_of_range"]
    assert found.scenarios[2]["nearer_share"] == 1.0
    assert found.scenarios[2]["out_of_range"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("nobody"), r"users\[0\]\.user: 'nobody' is not known; send her events"),
        (Request("x", "15.11.2024", events=[]), r"users\[0\]\.cut_day: expected a day number or an ISO date"),
        (
            Request("x", CUT, events=[{"kind": "a", "amount": 1.0}]),
            r"events\[0\]\.time: expected an ISO date .* got None",
        ),
        (
            Request("x", CUT, events=[{"time": "2024-11-15T00:00:00+00:00", "kind": "a", "amount": 1.0}]),
            r"events\[0\]\.time: expected a time before the cut, 2024-11-15, got 2024-11-15T00:00:00",
        ),
        (
            Request("x", CUT, events=[{"time": "2024-11-01", "kind": "a"}]),
            r"events\[0\]\.amount: missing; every event holds",
        ),
        (
            Request("x", CUT, events=[{"time": "2024-11-01", "kind": "a", "amount": 0.001}]),
            r"users\[0\]\.events\[0\]: amount: sum\(amount\) is finer than the resolution 0\.01, got 0\.001",
        ),
        (
            Request("x", CUT, events=[{"time": "2024-11-01", "kind": "a", "amount": float("nan")}]),
            r"users\[0\]\.events\[0\]: `amount` is not a finite number, got nan",
        ),
        (
            Request("x", CUT, events=[{"time": "2024-11-01", "kind": 3, "amount": 1.0}]),
            r"users\[0\]\.events\[0\]\.kind: expected a value of type string, got 3",
        ),
        (
            Request("x", CUT, events=[{"time": 2**40, "kind": "a", "amount": 1.0}]),
            r"events\[0\]\.time: expected a day number",
        ),
        (Request("x", 2_900_000, events=[]), r"users\[0\]\.cut_day: expected a day from 2022-01-01 to 2026-01-02"),
        (Request("x", CUT, events=[], profile={"contry": "DE"}), r"users\[0\]\.profile\.contry: unknown; known are"),
        (
            Request("x", CUT, events=[], calendar=[{"event_type": "sale", "start_day": CUT}]),
            r"users\[0\]\.calendar\[0\]\.event_type: expected one of festival, match, got 'sale'",
        ),
        (
            Request("x", CUT, events=[], calendar=[{"event_type": "match", "start_day": "2024-11-01"}]),
            r"users\[0\]\.calendar\[0\]\.end_day: expected a day from 2024-11-15 on",
        ),
    ],
)
def test_a_request_that_cannot_be_answered_names_its_field(
    predictor: Predictor, request_: Request, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        predictor.predict([request_])


def test_days_after_the_stored_history_are_not_taken_for_idle(predictor: Predictor) -> None:
    user = predictor.requests.history_of.__self__.users()[0]  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"users\[0\]\.cut_day: her stored history ends before 2025-01-01"):
        predictor.predict([Request(user, "2025-02-01")])
    assert predictor.predict([Request(user, "2025-02-01", events=[])])[0].cut_day == "2025-02-01"


def test_a_user_without_events_is_answered(predictor: Predictor) -> None:
    answer = predictor.predict([Request("newcomer", CUT, events=[])])[0]
    assert 0 < answer.days[0]["behaviours"]["active"]["p"] < 1


def test_events_before_the_first_day_of_the_window_change_nothing(predictor: Predictor, raw: dict[str, Any]) -> None:
    user, body = next(iter(raw.items()))
    old = {"time": "2022-01-02T10:00:00+00:00", "kind": "purchase", "amount": 99.0}
    bare = without_state(predictor)
    one = bare.predict([Request(user, CUT, events=[*body["events"], old], profile=body["profile"])])[0]
    same(one, bare.predict([Request(user, CUT, events=body["events"], profile=body["profile"])])[0])


def test_a_damaged_or_foreign_checkpoint_is_refused(tiny: Run, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(UserError, match=r"found no run\.json"):
        Predictor.load(str(tmp_path))
    source = Path(train(tiny))
    copy = tmp_path / "root" / "checkpoints" / "copy"
    shutil.copytree(source, copy)
    shutil.copytree(Path(tiny.root) / "calendar", tmp_path / "root" / "calendar")
    assert Predictor.load(str(copy)).info["step"] > 0
    for weights in copy.glob("best/*/model.safetensors"):
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    with pytest.raises(UserError, match="no intact checkpoint"):
        Predictor.load(str(copy))
    record = (copy / "run.json").read_text().replace('"model": "lumos"', '"model": "gts"', 1)
    (copy / "run.json").write_text(record)
    with pytest.raises(UserError, match="expected a checkpoint of lumos, got one of 'gts'"):
        Predictor.load(str(copy))


def test_the_state_of_a_run_holds_every_user(tiny: Run) -> None:
    state = State.open(publish(tiny))
    assert len(state.users()) == prepare(tiny).timelines.manifest["users"]
    assert state.uri.startswith(join(tiny.root, "state"))
