"""Labels of users on the tiny planted world: a head finds what the histories hold, and nothing of what comes later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lum_ray.artifacts import UserError, join
from lum_ray.config import Run, day_number
from lum_ray.data.reader import Timelines
from lum_ray.gts.predictor import Predictor
from lum_ray.gts.questions import Questions
from lum_ray.steps import gts_labels, prepare, train
from lum_ray.steps.gts_labels import label_gts, read_labels

FIT, TEST = day_number("2023-03-11"), day_number("2023-03-18")
CUTS = (FIT - 40, FIT - 20, FIT, TEST)
LATE, COIN = "was last seen in the evening", "heads"


@pytest.fixture(scope="module")
def rows(tiny_gts: Run) -> list[dict[str, Any]]:
    """One task that the history tells, and one that nothing does; the last cut's labels are unknown."""
    timelines = Timelines.open(prepare(tiny_gts).sequences.uri)
    everyone = timelines.read(np.flatnonzero(timelines.bucket_users).tolist())
    generator, result = np.random.default_rng(0), list[dict[str, Any]]()
    for row, user in enumerate(everyone.user.tolist()):
        begin, end = everyone.offsets[row : row + 2]
        days, values = everyone.days[begin:end], everyone.values[begin:end]
        for cut in CUTS:
            before = np.flatnonzero(days < cut)
            late = len(before) > 0 and (values[before[-1], 1] // 60_000_000 + values[before[-1], 2]) % 1440 >= 1080
            known = {LATE: float(late), COIN: float(generator.random() < 0.5)}
            for task, label in known.items():
                shown = None if cut == TEST and task == COIN else label
                result.append({"user": user, "cut_day": cut, "until_day": cut + 7, "task": task, "label": shown})
    return result


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), folder / "labels.parquet")
    return str(folder)


def test_linear_ranks_what_the_history_tells_and_a_coin_it_cannot(
    tiny_gts: Run, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    said: list[str] = []
    uri = label_gts(tiny_gts, written(tmp_path, rows), said.append)
    table = pq.read_table(join(uri, "labels.parquet")).to_pandas()
    assert len(table) == len(rows) and table.p.between(0, 1).all()
    test = table[table.part == "test"]
    assert set(test.cut_day) == {TEST}
    assert test[test.task == COIN].label.isna().all()
    late = test[test.task == LATE]
    yes, no = late[late.label == 1].p, late[late.label == 0].p
    assert (yes.to_numpy()[:, None] > no.to_numpy()).mean() > 0.65
    assert any("log loss" in line for line in said)
    assert label_gts(tiny_gts, str(tmp_path), said.append) == uri
    assert said[-1] == "already predicted"


def test_recency_knows_how_long_ago_the_last_event_was(
    tiny_gts: Run, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    timelines = Timelines.open(prepare(tiny_gts).sequences.uri)
    everyone = timelines.read(np.flatnonzero(timelines.bucket_users).tolist())
    place = {user: at for at, user in enumerate(everyone.user.tolist())}
    row, cut = np.array([place[one["user"]] for one in rows]), np.array([one["cut_day"] for one in rows], np.int64)
    facts = np.expm1(gts_labels.recency_facts(everyone, row, cut)).round().astype(int)
    assert (facts[:, 0] >= 1).all() and (facts[:, 0] <= facts[:, 2]).all()
    away = [{**one, "label": float(days > np.median(facts[:, 0]))} for one, days in zip(rows, facts[:, 0], strict=True)
            if one["task"] == COIN]  # fmt: skip
    found = {}
    for reading in ("linear", "recency"):
        uri = label_gts(tiny_gts, written(tmp_path, away), reading=reading)
        table = pq.read_table(join(uri, "labels.parquet")).to_pandas()
        test = table[table.part == "test"]
        found[reading] = ((test.p > 0.5) == (test.label == 1)).mean()
    assert found["recency"] > max(0.85, found["linear"])


def test_what_is_known_later_and_later_labels_shape_nothing(
    tiny_gts: Run, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Other labels on the test cut, and one whose label is known only after the fit, change no probability."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    late = {"user": rows[0]["user"], "cut_day": FIT - 1, "until_day": FIT + 6, "task": LATE, "label": 1.0}
    other = [{**row, "label": 1.0} if row["cut_day"] == TEST else row for row in rows]
    tables = [
        pq.read_table(join(label_gts(tiny_gts, written(*of)), "labels.parquet"))
        for of in ((one, rows), (two, [*other, late]))
    ]
    np.testing.assert_array_equal(tables[0]["p"].to_numpy(), tables[1]["p"].to_numpy()[:-1])
    assert tables[1]["part"][-1].as_py() is None and np.isnan(tables[1]["p"][-1].as_py())


@pytest.mark.parametrize("reading", ["front", "end", "none"])
def test_questions_start_from_the_rate_and_learn(
    reading: str, tiny_gts: Run, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gts_labels, "STEPS", 8)
    monkeypatch.setattr(gts_labels, "HEAD_STEPS", 40)
    said: list[str] = []
    before = {name: value.clone() for name, value in Predictor.load(train(tiny_gts)).assortment.stage.module
              .state_dict().items()}  # fmt: skip
    uri = label_gts(tiny_gts, written(tmp_path, rows), said.append, reading)
    table = pq.read_table(join(uri, "labels.parquet")).to_pandas()
    assert table.p.between(0, 1).all() and table.p.nunique() > 10
    losses = [float(line.split("log loss ")[1].split()[0]) for line in said if "log loss" in line]
    assert losses and min(losses) < np.log(2) + 0.05
    after = Predictor.load(train(tiny_gts)).assortment.stage.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_question_reaches_the_state_and_only_the_question_is_trained(tiny_gts: Run) -> None:
    from lum_ray.data.rows import Samples
    from lum_ray.stage import to_device

    stage = Predictor.load(train(tiny_gts)).assortment.stage
    timelines = Timelines.open(prepare(tiny_gts).sequences.uri)
    some = timelines.read(np.flatnonzero(timelines.bucket_users).tolist()).take(np.arange(3))
    samples = Samples(np.arange(3), np.full(3, TEST, np.int32), np.zeros(3, np.int32))
    batch = to_device(stage.questions(some, samples), torch.device("cpu"))
    started = stage.module.catalogue()[0][:2]
    sample, question = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    for position in ("front", "end", "none"):
        questions = Questions(stage.module, started, torch.tensor([0.25, 0.5]), position)  # type: ignore[arg-type]
        states = questions.states(batch, sample, question)
        assert torch.equal(states[0], states[1]) == (position == "none")
        logits = questions.logits(states, question)
        np.testing.assert_allclose(logits.detach(), [np.log(1 / 3), 0, 0], atol=1e-6)
        trained = [name for name, value in questions.named_parameters() if value.requires_grad]
        assert not any("decoder" in name for name in trained)
        assert ("vectors_QD" in trained) == (position != "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2.0}, "column label: expected 0, 1 or null, 1 rows"),
        ({"until_day": CUTS[0]}, "column until_day: expected a day after cut_day"),
        ({"user": None}, "column user: expected a value in each row, 1 are null"),
    ],
)
def test_a_wrong_table_is_refused(
    change: dict[str, Any], message: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_labels(written(tmp_path, [{**rows[0], **change}, *rows[1:]]), FIT, TEST)


def test_what_cannot_be_fitted_is_refused(tiny_gts: Run, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one row a .user, cut_day, task., 1 come again"):
        read_labels(written(tmp_path, [*rows, rows[0]]), FIT, TEST)
    with pytest.raises(UserError, match="reading: expected linear, recency, front, end, none"):
        label_gts(tiny_gts, str(tmp_path), reading="middle")
    with pytest.raises(UserError, match="users have no row in the data: nobody"):
        label_gts(tiny_gts, written(tmp_path, [{**rows[0], "user": "nobody"}, *rows[1:]]))
    same = [{**row, "label": 1.0} if row["task"] == COIN else row for row in rows]
    with pytest.raises(UserError, match=r"labels of 0 and of 1 .* not so: heads"):
        label_gts(tiny_gts, written(tmp_path, same))
    bare = [{name: value for name, value in row.items() if name != "until_day"} for row in rows]
    with pytest.raises(UserError, match="missing: until_day"):
        read_labels(written(tmp_path, bare), FIT, TEST)
