"""Run files are read strictly, and every refusal names its dotted path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lum_ray import catalog, config, presets
from lum_ray.artifacts import UserError
from lum_ray.config import Graph, Items


def plain(**changes: Any) -> dict[str, Any]:
    return config.dump(presets.lumos_tiny()) | changes


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_a_preset_survives_its_own_file(name: str) -> None:
    run = presets.PRESETS[name]()
    assert run.name == name
    assert catalog.read_run(yaml.safe_load(yaml.safe_dump(config.dump(run)))) == run


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lumos.histroy_days=3", r"lumos\.histroy_days: unknown key; did you mean `history_days`\?"),
        ("lumos.history_days=many", r"lumos\.history_days: .*integer, got 'many'"),
        ("lumos.history_days=0", r"lumos: history_days: expected at least 1, got 0"),
        ("lumos.future_events=often", r"lumos\.future_events: .*'shuffled', got 'often'"),
        ("lumos.width=17", r"lumos: width: expected a multiple of heads"),
        ("train.batch=0", r"train: batch: expected at least 1, got 0"),
        ("train.workers=65", r"train: workers: the loader has 64 lanes"),
        (
            "data.behaviours.0.kind=binry",
            r"data\.behaviours\.0\.kind: .*'binary', 'continuous' or 'count', got 'binry'",
        ),
        ("data.behaviours.0.resolution=-1", r"data\.behaviours\.0: resolution: expected a positive number"),
        ("data.behaviours.1.name=active", r"data: behaviours: names must be distinct, these come twice: active"),
        ("data.horizons.0.over=sum", r"horizons: active_sum_7: use `any` over a binary behaviour"),
        ("dta=3", r"dta: unknown key; did you mean `data`\?"),
        ("name=a/b", r"name: expected letters"),
        ("split.validate_from=null", r"split: validate_from: missing"),
        ("data.behaviours=[]", r"data: horizons: active_any_7: use `any` over a binary behaviour.*\(it is None\)"),
        ("data.items={text: []}", r"data\.items: text: expected at least one column"),
        ("data.items={txt: [a]}", r"data\.items\.txt: unknown key; did you mean `text`\?"),
        ("data.graph={wieght: a}", r"data\.graph\.wieght: unknown key; did you mean `weight`\?"),
        ("data.derived=[{name: x, when: never}]", r"data\.derived\.0: expected 'no X in the next N days'"),
    ],
)
def test_what_is_wrong_is_named(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        catalog.read_run(config.override(plain(), [assignment]))


def test_at_most_five_offenders() -> None:
    raw = plain()
    raw["train"] = {f"wrong_{i}": i for i in range(9)}
    with pytest.raises(UserError) as refused:
        catalog.read_run(raw)
    assert len(str(refused.value).splitlines()) == 6
    assert str(refused.value).endswith("... and 4 more")


def test_override_sets_nested_values_list_items_and_reads_yaml() -> None:
    raw = {"a": {"b": 1}, "c": [{"d": 1}, {"d": 2}]}
    assert config.override(raw, ["a.b=[1, x]", "c.1.d=2.5", "e.f=null"]) == {
        "a": {"b": [1, "x"]},
        "c": [{"d": 1}, {"d": 2.5}],
        "e": {"f": None},
    }
    assert raw["a"] == {"b": 1}
    with pytest.raises(UserError, match=r"expected a\.b=value"):
        config.override(raw, ["a.b"])
    with pytest.raises(UserError, match="expected a list index from 0 to 1, got '7'"):
        config.override(raw, ["c.7.d=1"])


def test_load_names_a_missing_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run file; write one with `lum-ray init"):
        catalog.load_run(str(tmp_path / "no.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,\nb: 2")
    with pytest.raises(UserError, match=r"not YAML: .*line"):
        catalog.load_run(str(broken))


def test_exactly_one_model_section() -> None:
    raw = plain()
    del raw["lumos"]
    with pytest.raises(UserError, match="exactly one model section of lumos, gts, got none"):
        catalog.read_run(raw)


@dataclass(frozen=True)
class _Gts:
    width: int = 8


def test_each_model_says_what_it_needs_of_the_data() -> None:
    raw = plain()
    raw["data"] |= {"behaviours": [], "derived": [], "horizons": []}
    with pytest.raises(UserError, match=r"^data: behaviours: expected at least one binary behaviour, such as"):
        catalog.read_run(raw)
    del raw["lumos"]
    raw |= {"gts": {}}
    with pytest.raises(UserError, match=r"^data\.events\.item: missing; GTS-LUM reads the item of each event"):
        config.read_run(raw, {"gts": _Gts})
    raw["data"]["events"]["item"] = "product_id"
    with pytest.raises(UserError, match=r"^data\.items: missing; GTS-LUM needs a table of the items"):
        config.read_run(raw, {"gts": _Gts})
    raw["data"]["items"] = {"text": ["title", "kind"]}
    raw["data"]["graph"] = {"co_occurrence": False}
    run = config.read_run(raw, {"gts": _Gts})
    assert run.data.items == Items(text=("title", "kind")) and run.data.graph == Graph(co_occurrence=False)
    assert config.read_run(config.dump(run), {"gts": _Gts}) == run


def test_day_number() -> None:
    assert config.day_number("1970-01-11") == 10
    assert config.day_number(-3) == -3
    with pytest.raises(UserError, match="ISO date"):
        config.day_number("11.01.1970")
