"""The report: every section says its sentence or why it is missing; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lum_ray.evaluation import baselines, pictures, protocol, strata
from lum_ray.evaluation.attention import Attention, attention_masses
from lum_ray.evaluation.metrics import reliability
from lum_ray.evaluation.pictures import WhatIf
from lum_ray.evaluation.predictions import check
from lum_ray.evaluation.protocol import TABLE
from lum_ray.evaluation.report import ReportFacts, metric_tables, render, write_report
from tests.evaluation.small_world import SETTING, TASKS, splits

OURS, PEER = "recency_frequency_logistic", "same_weekday"


def attention() -> Attention:
    """Uniform but for the last 14 days (2x), the final 349 days before the cut (5x) for future day 4."""
    weights = np.ones((7, 364))
    weights[:, -14:] = 2
    weights[3, 15] = 50
    return Attention(
        weights / weights.sum(axis=1, keepdims=True),
        ((15, "final"), (360, "final"), (90, "sale")),
        ((),) * 3 + (("final",),) + ((),) * 3,
    )


@pytest.fixture(scope="module")
def facts() -> ReportFacts:
    predicted = check(pa.concat_tables(baselines.predict_baselines(SETTING, *splits()).values()), TASKS)
    cohorts = pa.table(
        {"user": predicted.users.tolist(), "cohort": ["treatment", "control"] * (len(predicted.users) // 2)}
    )
    binary = [name for name, task in TASKS.items() if task.kind == "binary"]
    steps = range(0, 400, 2)
    return ReportFacts(
        title="A run <on> test data",
        ours=OURS,
        summary=(("model", "tiny & quick"),),
        metrics=protocol.evaluate(predicted, TASKS, ours=OURS, resamples=50),
        curves=(
            *({"step": s, "train/loss": 2 - s / 400} for s in steps),
            {"step": 100, "eval/loss": 1.9, "eval/roc_auc": 0.7},
            {"step": 300, "eval/loss": 1.5, "eval/roc_auc": 0.81},
        ),
        calibration=tuple(
            reliability(b, predicted.outcomes[b].y, predicted.forecasts[b, OURS, 0]["p"]) for b in binary
        ),
        attention=attention(),
        what_if=WhatIf("spend", "USD", "a sale on Friday", ("Thu", "Fri"), (10.0, 20.0), (10.0, 26.0)),
        pad_share=0.083,
        data=(("users", "300"),),
        cohorts=protocol.by_cohort(predicted, cohorts, TASKS, OURS, resamples=50),
        strata=strata.compare(predicted, TASKS, [strata.by_activity(splits()[1], 0)], OURS, PEER, resamples=50),
        peer=PEER,
        calendar_worth=strata.calendar_worth(predicted, TASKS, {OURS: PEER}, resamples=50),
    )


def test_an_average_of_our_seeds_is_no_rival_of_ours() -> None:
    def row(model: str, value: float) -> dict[str, object]:
        known = {"model": model, "task": "active", "metric": "eval/roc_auc", "n": 9, "seeds": 1}
        gains = {} if model == "ours" else {"gain": 0.8 - value, "gain_low": 0.79 - value, "gain_high": 0.81 - value}
        return known | {"value": value, "low": value, "high": value} | gains

    table = pa.Table.from_pylist([row("ours", 0.8), row("ours_average", 0.82), row("peer", 0.7)], schema=TABLE)
    (shown,) = metric_tables(table, "ours", ("ours_average",))
    assert shown.sentence.startswith("ours is best in 1 of 1 tasks") and "speaks for ours in 1" in shown.sentence
    assert shown.models == ("ours", "ours_average", "peer")
    (rivals,) = metric_tables(table, "ours")
    assert rivals.sentence.startswith("ours is best in 0 of 1 tasks")


def test_each_section_has_its_sentence(facts: ReportFacts, tmp_path: Path) -> None:
    path = tmp_path / "reports" / "report.html"
    assert write_report(str(path), facts) == str(path)
    text = unescape(path.read_text())
    for sentence in (
        "the training loss went from",
        "the validation AUC was best at step 300, with .810",
        "Between days 1 and 7 the AUC of active with recency_frequency_logistic",
        "Not drawn, at .5 by construction: constant.",
        "The largest gap of any bin is",
        "attention peaks 349 days before the cut, a day of final, at",
        "on the last 14 days (1.9 times the uniform share)",
        "on the earlier events of the same kind",
        "on the same season, a year earlier",
        "changes by +6 USD (+20.0 %), most on Fri (+6)",
        "8.3 % of the input tokens are pads",
        "minus the prediction",
        "recency_frequency_logistic is best in",
        "In active, recency_frequency_logistic is better than same_weekday in",
        "active_any_7: AUC in all groups",
        "recency_frequency_logistic is better with the calendar in",
        "tiny & quick",
    ):
        assert sentence in text, sentence
    assert "<h1>A run &lt;on&gt; test data</h1>" in path.read_text()
    assert "Not shown" not in text and "Not drawn: no group" not in text
    assert path.stat().st_size < 3_000_000


def test_nothing_comes_from_outside(facts: ReportFacts) -> None:
    text = render(facts)
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert not re.search(r"https?://|<script|@import|url\(", text)
    images = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)
    assert len(images) == 6 + 3  # a forest plot for each of three headline tasks
    for image in images:
        svg = base64.b64decode(image).decode()
        ET.fromstring(svg)
        linked = [link for link in re.findall(r"(?:href|src)=\"([^\"]*)\"", svg) if not link.startswith(("#", "data:"))]
        assert linked == []


def test_an_empty_run_announces_what_is_missing() -> None:
    text = unescape(render(ReportFacts("Nothing", "lumos", no_attention="no yearly event in the data")))
    for reason in (
        "no summary was given",
        "no predictions were evaluated",
        "no training log was given",
        "no binary task with a prediction for each day was evaluated",
        "no binary task was evaluated",
        "no yearly event in the data",
        "no scenario was asked for",
        "no cohorts were assigned",
        "no peer was compared group by group",
        "no model was compared with itself without the calendar",
        "no data facts were given",
        "The share of pads was not measured.",
    ):
        assert reason in text, reason
    assert "<img" not in text


def test_a_contest_opens_with_its_outcome(facts: ReportFacts) -> None:
    def places(text: str) -> list[int]:
        return [text.index(f'id="{name}"') for name in ("metrics", "strata", "calendar", "curves", "cohorts")]

    order = places(render(facts))
    assert order == sorted(order)
    metrics, contest, calendar, curves, cohorts = places(render(ReportFacts("One model", "lumos")))
    assert metrics < curves < contest < calendar < cohorts


def test_groups_that_cannot_be_compared_are_listed(facts: ReportFacts) -> None:
    assert facts.strata is not None
    small = [row for row in facts.strata.to_pylist() if row["gain"] is None]
    text = render(ReportFacts("t", OURS, peer=PEER, strata=pa.Table.from_pylist(small, schema=strata.STRATA)))
    assert "Not drawn: no group of any task" in text
    assert "too few" in text and "<img" not in text


def test_the_best_of_a_row_is_marked(facts: ReportFacts) -> None:
    assert facts.metrics is not None
    tables = {table.heading: table for table in metric_tables(facts.metrics, OURS)}
    rows = facts.metrics.to_pylist()
    for heading, metric, best in (
        ("AUC of each day, averaged over the days", "eval/roc_auc", max),
        ("Brier score", "eval/brier", min),
    ):
        table = tables[heading]
        assert table.models[0] == OURS
        for task, _, cells in table.rows:
            values = {row["model"]: row["value"] for row in rows if (row["task"], row["metric"]) == (task, metric)}
            marked = [model for model, cell in zip(table.models, cells, strict=True) if cell.best]
            assert [values[model] for model in marked] == [best(values.values())]


def test_attention_masses_by_hand() -> None:
    last, same, season = attention_masses(attention())
    assert last.uniform == 14 / 364
    plain, event = 350 + 28, 350 + 28 + 49
    assert last.share == pytest.approx((6 * 28 / plain + 28 / event) / 7)
    assert same.share == pytest.approx(50 / event)  # the final 4 days before the cut is recency, not memory
    assert same.uniform == pytest.approx(1 / 364)
    assert season.share == pytest.approx(season_by_hand(), rel=1e-9)


def season_by_hand() -> float:
    weights, total = attention().weights, 0.0
    for day in range(7):
        total += sum(weights[day, t] for t in range(364) if 358 <= 364 - t + day <= 372)
    return total / 7


def test_attention_says_what_it_cannot_measure() -> None:
    uniform = np.full((7, 112), 1 / 112)
    _, same, season = attention_masses(Attention(uniform))
    assert same.absent == "no event on the future days"
    assert "does not reach a year back" in season.absent
    assert "no peak" in pictures.attention_map(Attention(uniform)).sentence
    assert (
        "Not measured: earlier events of the same kind"
        in pictures.attention_mass(attention_masses(Attention(uniform))).sentence
    )
    _, same, _ = attention_masses(Attention(uniform, ((3, "sale"),), (("final",),) * 7))
    assert same.absent == "no event of the same kind earlier in the history"
    with pytest.raises(ValueError, match="rows that sum to 1"):
        Attention(uniform * 2)
    with pytest.raises(ValueError, match=r"positions 0\.\.111"):
        Attention(uniform, ((112, "sale"),))
