"""Lists and embeddings of every user are what the predictor answers one by one; lanes go on where they were stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lum_ray.artifacts import UserError, open_artifact
from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.data.state import State
from lum_ray.gts.predictor import Predictor, Request
from lum_ray.steps import open_predictor, predict, prepare, publish, train
from lum_ray.steps.gts_predict import predict_gts
from lum_ray.steps.predict import assign

CUT = "2023-03-20"
ALL = ("retrieve", "rerank", "generate")


@pytest.fixture(scope="module")
def predictor(tiny_gts: Run) -> Predictor:
    return open_predictor(tiny_gts)


def lists_of(table: pa.Table, reading: str) -> dict[str, list[tuple[str, float]]]:
    rows = [row for row in table.to_pylist() if row["reading"] == reading]
    found: dict[str, list[tuple[str, float]]] = {}
    for row in sorted(rows, key=lambda row: (row["user"], row["rank"])):
        found.setdefault(row["user"], []).append((row["item"], row["score"]))
    return found


def test_the_state_holds_sequences_as_they_were_prepared(tiny_gts: Run) -> None:
    state, timelines = State.open(publish(tiny_gts)), Timelines.open(prepare(tiny_gts).sequences.uri)
    rows = timelines.read(np.flatnonzero(timelines.bucket_users).tolist())
    assert state.end_day == timelines.end_day
    assert sorted(state.users()) == sorted(rows.user) and len(rows) == 60
    found = state.rows(rows.user.tolist())
    for place, user in enumerate(rows.user):
        own = rows.take(np.array([place]))
        assert len(np.unique(own.days)) < len(own.days)  # days come again, each with its own item and time
        for name in ("user_hash", "offsets", "days", "values", "first_day", "end_day"):
            one, other = getattr(own, name), getattr(found[user], name)
            assert one.dtype == other.dtype and one.tobytes() == other.tobytes(), name
        assert {name: column.tolist() for name, column in own.profile.items()} == {
            name: column.tolist() for name, column in found[user].profile.items()
        }


def test_files_hold_what_the_predictor_answers(tiny_gts: Run, predictor: Predictor) -> None:
    uri = predict_gts(tiny_gts, readings=ALL, k=6)
    manifest, table = open_artifact(uri).manifest, pq.read_table(f"{uri}/rankings")
    assert table.num_rows == manifest["rows"] == 60 * 6 * 3
    assert set(table["cut_day"].to_pylist()) == {predictor.info["end_day"]}
    users = sorted(predictor.requests.history_of.__self__.users())  # type: ignore[union-attr]
    requests = [Request(user) for user in users]
    answers = {
        "retrieve": predictor.recommend(requests, k=6),
        "rerank": predictor.recommend(requests, k=6, rerank=True),
        "generate": predictor.recommend(requests, k=6, method="generate"),
    }
    for reading, expected in answers.items():
        found = lists_of(table, reading)
        assert sorted(found) == users
        for answer in expected:
            scores = [score for _, score in found[answer.user]]
            assert scores == pytest.approx([item.score for item in answer.items], abs=1e-5)
    embedded = pq.read_table(f"{uri}/users.parquet").sort_by("user")
    assert embedded["user"].to_pylist() == users
    assert embedded.schema.field("embedding").type == pa.list_(pa.float32())
    users_RO = np.array(embedded["embedding"].to_pylist())
    np.testing.assert_allclose(users_RO, predictor.embed(requests), atol=1e-5)
    items = pq.read_table(f"{uri}/items.parquet")
    assert (tuple(items["item"].to_pylist()), tuple(items["text"].to_pylist())) == predictor.items()[:2]

    # of items that she never had, the dot product of the exported embeddings and the prior are the score
    apart = predict_gts(tiny_gts, k=3, seen_filter=True)
    scale, ids = open_artifact(apart).manifest["scale"], items["item"].to_pylist()
    items_NO, prior = np.array(items["embedding"].to_pylist()), items["prior"].to_pylist()
    for row, pairs in enumerate(lists_of(pq.read_table(f"{apart}/rankings"), "retrieve").values()):
        places = [ids.index(item) for item, _ in pairs]
        dots = [scale * float(users_RO[row] @ items_NO[place]) + prior[place] for place in places]
        assert [score for _, score in pairs] == pytest.approx(dots, abs=1e-4)


def test_a_stopped_job_goes_on(tiny_gts: Run) -> None:
    said: list[str] = []
    uri = predict(tiny_gts, said.append, CUT)
    assert predict(tiny_gts, said.append, CUT) == uri and said[-1] == "already predicted"
    files = sorted(Path(uri, "rankings").iterdir())
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    manifest = Path(uri, "manifest.json")
    whole = manifest.read_bytes()
    manifest.unlink()
    files[1].unlink()
    assert predict(tiny_gts, cut_day=CUT) == uri
    assert manifest.read_bytes() == whole
    for file, (content, time) in before.items():
        assert file.read_bytes() == content
        assert (file.stat().st_mtime_ns == time) == (file != files[1])


def test_an_earlier_cut_has_the_users_of_then_and_cohorts(tiny_gts: Run) -> None:
    first = int(prepare(tiny_gts).sequences.manifest["first_day"])
    uri = predict(tiny_gts, cut_day=first + 2, cohorts={"treatment": 0.5, "control": 0.5}, checkpoint=train(tiny_gts))
    timelines = Timelines.open(prepare(tiny_gts).sequences.uri)
    rows = timelines.read(np.flatnonzero(timelines.bucket_users).tolist())
    there = sorted(rows.user[rows.first_day < first + 2])
    assert 0 < len(there) < 60
    assert sorted(set(pq.read_table(f"{uri}/rankings")["user"].to_pylist())) == there
    cohorts = pq.read_table(f"{uri}/cohorts.parquet").to_pylist()
    assert sorted(row["user"] for row in cohorts) == there
    assert [row["cohort"] for row in cohorts] == assign(
        [row["user"] for row in cohorts], {"treatment": 0.5, "control": 0.5}, "lum_ray"
    )


def test_what_cannot_be_predicted_is_said(tiny_gts: Run) -> None:
    with pytest.raises(UserError, match="--cut 2030-01-01: expected a day after the data's first"):
        predict(tiny_gts, cut_day="2030-01-01")
    with pytest.raises(UserError, match="readings: expected of retrieve, rerank, generate and k from 1"):
        predict_gts(tiny_gts, readings=("guess",))
    with pytest.raises(UserError, match=r"--cohorts a:0\.5: expected shares above 0 that sum to 1"):
        predict(tiny_gts, cohorts={"a": 0.5})


@pytest.mark.ray
def test_ray_writes_the_same_files(tiny_gts: Run, ray_session: None) -> None:
    from lum_ray import catalog, config

    local = predict(tiny_gts, cut_day=CUT)
    kept = lists_of(pq.read_table(f"{local}/rankings"), "retrieve")
    names = sorted(file.name for file in Path(local, "rankings").iterdir())
    for file in (*Path(local, "rankings").iterdir(), Path(local, "manifest.json")):
        file.unlink()
    spread = catalog.read_run(config.override(config.dump(tiny_gts), ["data.engine=ray"]))
    assert predict(spread, cut_day=CUT, checkpoint=train(tiny_gts)) == local
    assert sorted(file.name for file in Path(local, "rankings").iterdir()) == names
    found = lists_of(pq.read_table(f"{local}/rankings"), "retrieve")
    assert list(found) == list(kept)
    for user, pairs in found.items():  # Ray's workers have threads of their own, so sums differ in the last bits
        assert [score for _, score in pairs] == pytest.approx([score for _, score in kept[user]], abs=1e-5)
