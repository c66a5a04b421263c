"""Which trial is next and which is stopped, without Ray: the searcher and the pruner are asked as Tune asks them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.search import Searcher

from lum_ray import presets
from tuning.ledger import Ledger, Record, key_of
from tuning.pictures import Trials, heat_map
from tuning.report import _importance
from tuning.search import Pruner, Search
from tuning.spaces import Distribution, Space, choice, value_of

RUN = presets.gts_tiny()
METRIC = "eval/ndcg_10"
SPACE = Space("small", {"gts.slot_minutes": choice(15, 60, 240), "gts.depth": choice(1, 2)})


def search(place: Path, trials: int, space: Space = SPACE, deadline: float = math.inf) -> tuple[Search, list[Record]]:
    ended: list[Record] = []
    ledger = Ledger(str(place))
    return Search(RUN, space, ledger, METRIC, "max", trials, deadline, ended.append), ended


def finish(one: Search, trial_id: str, suggestion: Any, value: float) -> None:
    """As a trial does: it commits, then says so."""
    one.ledger.end(suggestion["key"], "finished", value=value, curve=[(4, value)])
    one.on_trial_complete(trial_id, {"state": "finished", "step": 8, METRIC: value})


def test_the_run_as_it_is_comes_first_and_a_finite_space_ends(tmp_path: Path) -> None:
    one, ended = search(tmp_path, trials=50)
    keys = []
    for number in range(6):
        found = one.suggest(str(number))
        assert isinstance(found, dict)
        assert not one.over()
        keys.append(found["key"])
        finish(one, str(number), found, number / 10)
    assert one.over() and search(tmp_path, trials=50)[0].over()
    assert keys[0] == key_of(RUN)
    assert len(set(keys)) == 6, "a trial came twice"
    assert one.suggest("6") == Searcher.FINISHED
    assert [record.number for record in ended] == list(range(6))
    assert sum(len(record.values) for record in ended[:1]) == 0


def test_a_new_process_goes_on_where_the_last_was_killed(tmp_path: Path) -> None:
    one, _ = search(tmp_path, trials=4)
    first, second, third = (one.suggest(name) for name in "abc")
    finish(one, "b", second, 0.3)
    # killed here: `first` and `third` were running
    again, _ = search(tmp_path, trials=4)
    resumed = [again.suggest(name) for name in "de"]
    assert resumed == [first, third]
    fourth = again.suggest("f")
    assert isinstance(fourth, dict) and fourth["key"] not in {found["key"] for found in (first, second, third)}  # type: ignore[index]
    assert again.suggest("g") == Searcher.FINISHED
    assert [trial.value for trial in again.study.trials if trial.state.name == "COMPLETE"] == [0.3]


def test_pruned_trials_are_kept_with_their_curve(tmp_path: Path) -> None:
    one, ended = search(tmp_path, trials=3)
    one.suggest("a")
    one.on_trial_result("a", {"step": 4, METRIC: 0.1})
    one.on_trial_complete("a", {"step": 8, METRIC: 0.2, "done": True})
    assert [(record.state, record.value, record.curve) for record in ended] == [("pruned", 0.2, ((4, 0.1), (8, 0.2)))]
    assert Ledger(str(tmp_path)).records()[0].state == "pruned"


def test_what_did_not_end_is_still_to_be_done(tmp_path: Path) -> None:
    one, ended = search(tmp_path, trials=2)
    one.suggest("a")
    one.on_trial_complete("a", {"state": "stopped", "step": 8, METRIC: math.nan})  # out of time
    one.suggest("b")
    one.on_trial_complete("b", error=True)  # crashed too often
    assert [record.message for record in ended] == ["crashed too often"]
    assert [record.state for record in Ledger(str(tmp_path)).records()] == ["unfinished"] * 2
    assert not one.over()


def test_nothing_starts_after_the_deadline(tmp_path: Path) -> None:
    one, _ = search(tmp_path, trials=3, deadline=0.0)
    assert one.suggest("a") == Searcher.FINISHED
    assert Ledger(str(tmp_path)).records() == []


def test_values_that_do_not_go_together_are_never_tried(tmp_path: Path) -> None:
    space = Space("heads", {"gts.width": choice(16, 18), "gts.heads": choice(2, 3)})
    one, _ = search(tmp_path, trials=9, space=space)
    found = []
    while (suggestion := one.suggest(str(len(found)))) != Searcher.FINISHED:
        assert isinstance(suggestion, dict)
        found.append(suggestion["key"])
        finish(one, str(len(found) - 1), suggestion, 0.1)
    assert len(found) == 3  # 16 and 2, 18 and 2, 18 and 3


@pytest.mark.parametrize(
    "values", [Distribution("int", low=1, high=2), choice(None, 1, 2)], ids=["outside the space", "in the space"]
)
def test_a_setting_may_be_null(tmp_path: Path, values: Distribution) -> None:
    assert RUN.section.keep_layers is None
    space = Space("null", {"gts.keep_layers": values, "gts.depth": choice(1, 2)})
    one, _ = search(tmp_path, trials=12, space=space)
    while (suggestion := one.suggest(str(len(one.known)))) != Searcher.FINISHED:
        assert isinstance(suggestion, dict)
        finish(one, str(len(one.known) - 1), suggestion, 0.1 * len(one.known))
    again, _ = search(tmp_path, trials=12, space=space)
    assert again.over()
    records = list(again.known.values())
    params = {r.key: {path: r.values.get(path, value_of(RUN, path)) for path in space.distributions} for r in records}
    found = {record.key: np.full(3, record.value) for record in records}
    trials = Trials(METRIC, 1, records, params, found, key_of(RUN))
    picture = heat_map(trials, "gts.keep_layers", "gts.depth")
    assert (
        picture is not None and f"Best at keep layers {params[records[-1].key]['gts.keep_layers']}" in picture.sentence
    )
    assert _importance(RUN, space, records, "max")


def test_optuna_learns_from_the_ledger(tmp_path: Path) -> None:
    space = Space("rate", {"train.learning_rate": Distribution("log", low=1e-4, high=1e-1)})
    one, _ = search(tmp_path, trials=24, space=space)
    rates = []
    for number in range(24):
        if number == 12:
            one, _ = search(tmp_path, trials=24, space=space)  # another process
        suggestion = one.suggest(str(number))
        assert isinstance(suggestion, dict)
        rate = one.known[suggestion["key"]].values.get("train.learning_rate", RUN.train.learning_rate)
        rates.append(abs(math.log10(rate) + 2.5))
        finish(one, str(number), suggestion, -rates[-1])
        assert one.over() == (number == 23)
    assert sum(rates[12:]) < 0.7 * sum(rates[:12])


def trial(name: str, steps: int = 8) -> Any:
    return SimpleNamespace(trial_id=name, config={"key": name, "steps": steps})


def test_what_falls_behind_is_stopped_but_the_run_as_it_is(tmp_path: Path) -> None:
    pruner = Pruner(METRIC, "max", 2, 8, "default", [])
    for name in ("default", "good", "bad", "late"):
        pruner.on_trial_add(None, trial(name))
    assert pruner.on_trial_result(None, trial("good"), {"step": 2, METRIC: 0.9}) == "CONTINUE"
    assert pruner.on_trial_result(None, trial("bad"), {"step": 2, METRIC: 0.1}) == "STOP"
    assert pruner.on_trial_result(None, trial("default"), {"step": 2, METRIC: 0.1}) == "CONTINUE"
    # its training is over: only its prediction files are missing
    assert pruner.on_trial_result(None, trial("late"), {"step": 8, METRIC: 0.0}) == "CONTINUE"
    assert pruner.on_trial_result(None, trial("late"), {"step": 8, METRIC: 0.0, "state": "finished"}) == "CONTINUE"


def test_the_pruner_knows_what_earlier_processes_saw() -> None:
    seen = [Record("a", 0, {}, "finished", 0.9, curve=((2, 0.8), (8, 0.9)))]
    pruner = Pruner(METRIC, "max", 2, 8, "default", seen)
    pruner.on_trial_add(None, trial("bad"))
    assert pruner.on_trial_result(None, trial("bad"), {"step": 2, METRIC: 0.1}) == "STOP"


def test_a_name_does_not_depend_on_how_it_is_trained() -> None:
    from lum_ray import catalog, config

    how = catalog.read_run(config.override(config.dump(RUN), ["root=x", "train.workers=2", "data.engine=local"]))
    other = catalog.read_run(config.override(config.dump(RUN), ["gts.depth=1"]))
    assert key_of(how) == key_of(RUN) != key_of(other)
