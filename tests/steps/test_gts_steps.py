"""GTS-LUM from raw tables to a report, on the planted world with a tiny random Llama."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lum_ray import catalog, config, presets
from lum_ray.artifacts import UserError, join, open_artifact, read_bytes, read_json
from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.gts.llm import load
from lum_ray.steps import describe, evaluate, prepare, train
from lum_ray.steps.gts_evaluate import trained_stage
from lum_ray.steps.gts_prepare import prepare_gts
from lum_ray.steps.prepare import fit_until
from lum_ray.weights import load as load_weights


def test_what_is_fitted_ends_before_the_cut(tiny_gts: Run) -> None:
    prepared = prepare_gts(tiny_gts)
    timelines = Timelines.open(prepared.sequences.uri)
    until = fit_until(tiny_gts, timelines.end_day)
    assert prepared.fitted.manifest["until_day"] == until == prepared.tree.manifest["until_day"]
    inputs, counts = prepared.inputs, np.zeros(len(prepared.catalogue), np.int64)
    for bucket in np.flatnonzero(timelines.bucket_users).tolist():
        rows = timelines.read([bucket])
        item = inputs.index_of(rows.values[:, 0])[rows.days < until]
        counts += np.bincount(item, minlength=len(counts))
    assert np.array_equal(inputs.arrays["count_N"], counts) and counts.sum() > 0
    assert prepared.tree.manifest["items"] == int((counts > 0).sum())
    facts = describe(tiny_gts, prepared)
    assert facts["items"] == len(inputs.items) == 120 and facts["events"] == prepared.sequences.manifest["active_days"]


def test_the_checkpoint_names_the_llm_and_does_not_hold_it(tiny_gts: Run) -> None:
    uri = train(tiny_gts)  # a finished run is returned as it is
    record = read_json(join(uri, "run.json"))
    assert record["llm"]["name"] == "random" and len(record["llm"]["digest"]) == 12
    assert record["aligned"] and open_artifact(join(tiny_gts.root, "checkpoints", record["aligned"]))
    tensors = load_weights(uri).tensors
    assert tensors and not [name for name in tensors if name.startswith("decoder.")]
    prepared = prepare_gts(tiny_gts)
    other = json.loads(json.dumps(record)) | {"llm": record["llm"] | {"digest": "0" * 12}}
    Path(uri, "run.json").write_text(json.dumps(other))
    try:
        with pytest.raises(UserError, match="its LLM random has other weights"):
            trained_stage(tiny_gts, prepared, uri)
    finally:
        Path(uri, "run.json").write_text(json.dumps(record))
    assert load(tiny_gts.section).width == trained_stage(tiny_gts, prepared, uri).module.width


def test_evaluate_writes_files_and_a_report(tiny_gts: Run) -> None:
    found = evaluate(tiny_gts)
    rows = found.table.to_pylist()
    readings = {(row["model"], row["reading"]) for row in rows}
    assert {("gts_tiny", name) for name in ("retrieve", "rerank", "generate")} < readings
    assert {model for model, reading in readings if reading == "baseline"} == {
        "popularity", "popularity_7d", "repeat_last", "most_frequent", "text_knn"}  # fmt: skip
    assert all(np.isfinite(row["value"]) and 0 <= row["value"] <= 1 for row in rows if row["subset"] == "all")
    page = read_bytes(join(found.uri, "report.html")).decode()
    assert "Tuesday" in page or "Monday" in page  # a user's slots with their descriptors
    assert evaluate(tiny_gts).uri == found.uri
    lists = Path(tiny_gts.root, "predictions", open_artifact(found.uri).manifest["predictions"][0], "rankings")
    table = pq.read_table(lists)
    assert set(table["reading"].to_pylist()) == {"retrieve", "rerank", "generate"}


def test_bad_input_is_named_before_anything_starts(tmp_path: Path) -> None:
    def run(*assignments: str) -> Run:
        return catalog.read_run(config.override(config.dump(presets.gts_tiny()), [f"root={tmp_path}", *assignments]))

    with pytest.raises(UserError, match="slot_minutes: expected a divisor of 1440"):
        run("gts.slot_minutes=7")
    with pytest.raises(UserError, match=r"data\.events\.item: missing"):
        run("data.events.item=null")
    with pytest.raises(UserError, match=r"data\.items: missing"):
        run("data.items=null")
    with pytest.raises(UserError, match="missing column `title`"):
        prepare(run("data.items.text=[title]"))
    with pytest.raises(UserError, match=r"gts.text_encoder: ./nowhere.: expected a folder"):
        prepare(run("gts.text_encoder=/nowhere"))


def test_a_catalogue_of_one_and_a_user_with_one_event(tmp_path: Path) -> None:
    """The smallest input that can be prepared, trained and ranked."""
    import datetime as dt

    import pyarrow as pa

    times = [dt.datetime(2023, 3, 1, 8, tzinfo=dt.UTC), dt.datetime(2023, 3, 12, 8, tzinfo=dt.UTC),
             dt.datetime(2023, 3, 19, 8, tzinfo=dt.UTC)]  # fmt: skip
    users = ["a"] * 3 + ["b", "b"] + ["c"]
    for name, table in (
        ("events", {"user": users, "time": [*times, *times[1:], times[0]], "item": ["x"] * 6}),
        ("items", {"item": ["x"], "text": ["the only one"]}),
    ):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(table), tmp_path / name / "0.parquet")
    base = presets.gts_tiny()
    data = dataclasses.replace(
        base.data, source=None, profiles=None,
        events=dataclasses.replace(base.data.events, path=str(tmp_path / "events")),
        items=config.Items(path=str(tmp_path / "items")),
    )  # fmt: skip
    section = dataclasses.replace(base.section, align_steps=1)
    settings = dataclasses.replace(base.train, steps=2, validate_every=2, checkpoint_every=2, batch=2)
    found = evaluate(dataclasses.replace(base, data=data, section=section, train=settings, root=str(tmp_path / "runs")))
    values = {row["metric"]: row["value"] for row in found.table.to_pylist() if row["reading"] == "retrieve"}
    assert values["eval/mrr"] == 1.0
