"""The open questions' experiments: their arms, what they spoil, and one tiny run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.bench import questions_gts
from jobs.bench.question_labels_gts import ACCEPTS, CUTS, GONE, REDEEMS, write_labels
from jobs.bench.question_readings_gts import KINDS, paired
from jobs.bench.questions_gts import SPOILS, TEXT_ALONE, NoiseBench, half_missing, noisy, question_run, shuffled
from jobs.bench.rows import KEYS
from lum_ray import catalog, config
from lum_ray.config import day_number
from lum_ray.steps.gts_prepare import prepare_gts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("questions"))


@pytest.mark.parametrize("dataset", questions_gts.DATASETS)
def test_runs_are_read_strictly_and_labels_fit_between_the_days_of_the_split(dataset: str) -> None:
    run = question_run(dataset, "nowhere")
    assert catalog.read_run(config.dump(run)) == run
    if dataset == "complete_journey":
        fit, test = day_number(run.split.validate_from or 0), day_number(run.split.test.from_day or 0)
        cuts = [day_number(cut) for cut in CUTS]
        assert [cut + 28 <= fit for cut in cuts] == [True, True, True, False, False]
        assert fit <= cuts[3] and cuts[3] + 28 <= test <= cuts[4]


def test_one_tiny_run_prints_its_rows_alone_on_stdout(capsys: pytest.CaptureFixture[str], root: str) -> None:
    assert questions_gts.main(["--quick", "--only", "irrelevant,cost", "--root", root]) == 0
    found = capsys.readouterr()
    rows = {row["what"]: row for row in map(json.loads, found.out.splitlines())}
    assert all(tuple(row) == KEYS and row["low"] <= row["value"] <= row["high"] for row in rows.values())
    for kind in KINDS:
        assert -0.5 <= rows[f"questions_gts/irrelevant/simulator/{kind}/p_wins_gain"]["value"] <= 0.5
    # the best wrong item by R's scores: R cannot prefer the true one often
    assert rows["questions_gts/irrelevant/simulator/context/r_wins_gain"]["value"] < 0
    cost = {what.split("/")[3]: row for what, row in rows.items() if what.endswith("cost") or "/cost/" in what}
    assert {"retrieve_48_tokens", "12_tokens", "24_tokens", "96_tokens", "8_bit_weights", "and_p_at_5"} == set(cost)
    assert cost["retrieve_48_tokens"]["value"] == 0
    assert cost["and_p_at_5"]["ratio"] > 1  # P reads five histories more
    assert found.err.count("Phase II") == 1
    assert "| context | ." in found.err


def test_noise_goes_where_it_is_said(root: str) -> None:
    rng = np.random.default_rng(0)
    values, known = (
        rng.normal(size=(400, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32),
        np.arange(400) % 4 > 0,
    )
    spoiled, still = noisy(0.5)(values, known, rng)
    assert np.array_equal(spoiled[~known], values[~known]) and np.array_equal(still, known)
    np.testing.assert_allclose((spoiled - values)[known].std(axis=0), 0.5 * values[known].std(axis=0), rtol=0.15)
    spoiled, still = shuffled(values, known, rng)
    assert not np.array_equal(spoiled, values) and np.array_equal(np.sort(spoiled, 0), np.sort(values, 0))
    assert still.sum() == known.sum()
    spoiled, still = half_missing(values, known, rng)
    assert (spoiled == values).all(axis=1).mean() == 0.5 and not (still & ~known).any() and 0 < still.sum() < 200

    bench = NoiseBench("simulator", root, quick=True, arms={"business_embeddings": TEXT_ALONE})
    plain, other = (bench.run_of("business_embeddings", arm) for arm in ("all", "shuffled"))
    assert next(iter(SPOILS)) == "text" and bench.run_of("business_embeddings", "text").section.modalities == ("text",)
    assert plain.root == root and other.root != root and other.section == plain.section
    mine, theirs = prepare_gts(plain), prepare_gts(other)
    assert mine.fitted.manifest["digest"] != theirs.fitted.manifest["digest"]  # no checkpoint is shared
    for name in ("text_NE", "paths_ND", "log_q_N"):
        np.testing.assert_array_equal(mine.inputs.arrays[name], theirs.inputs.arrays[name])
    for name in ("graph_NG", "table_NH"):
        one, two = mine.inputs.arrays[name], theirs.inputs.arrays[name]
        assert not np.array_equal(one, two) and np.array_equal(np.sort(one, 0), np.sort(two, 0))


def test_labels_say_what_happened_after_the_cut(tmp_path: Path) -> None:
    run = question_run("complete_journey", str(tmp_path))
    table = pq.read_table(Path(write_labels(run, 40)) / "labels.parquet").to_pandas()
    assert set(table.task) == {GONE, REDEEMS, ACCEPTS} and set(table.label) == {0.0, 1.0}
    assert table.user.nunique() <= 40 and (table.until_day > table.cut_day).all()
    assert not table.duplicated(["user", "cut_day", "task"]).any()
    wide = table[table.task != ACCEPTS].pivot(index=["user", "cut_day"], columns="task", values="label")
    assert not ((wide[GONE] == 1) & (wide[REDEEMS] == 1)).any()  # nobody redeems a coupon without a purchase


def test_gains_are_paired() -> None:
    one = np.array([0.0, 1.0] * 20)
    assert paired(one, one).low == paired(one, one).high == 0
    gain = paired(np.ones(40), one)
    assert gain.value == 0.5 and 0.3 < gain.low < 0.5 < gain.high < 0.7


@pytest.mark.parametrize("wrong", [["--only", "costs"], ["--users", "0"]])
def test_what_there_is_not_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        questions_gts.main(wrong)
    assert f"{wrong[0]}: expected" in capsys.readouterr().err
