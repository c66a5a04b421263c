"""GTS-LUM on a planted world: how much of the Bayes oracle's recall its readings reach, with and without timestamps.

`python -m jobs.bench.gts_simulator [--root DIR] [--quick]`. What comes next depends on the last item and on the part of
the day; the oracle infers the user's favourites exactly, as far as her history tells them. Rows:

- `gts_simulator/<reading>/r10_share`: recall at 10 over the oracle's (bar .9 for `rerank`);
- `gts_simulator/without_timestamps/r10_share`: the same, trained without timestamps (clearly less is expected);
- `gts_simulator/oracle_without_time/r10_share`: what ignores time can reach at best;
- `gts_simulator/null/gain`: on the null world, ours minus popularity (its interval must hold 0 or lie below).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from jobs.bench.rows import emit, hardware, note
from lum_ray import presets
from lum_ray.artifacts import commit, digest, find, join, open_artifact
from lum_ray.config import Run, Source
from lum_ray.data.adapters import next_item_oracle
from lum_ray.data.adapters.next_item import Options
from lum_ray.data.loader import evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.evaluation.ranking import evaluate_rankings, read_rankings
from lum_ray.evaluation.ranking_baselines import targets_facts
from lum_ray.evaluation.ranking_files import ranking_table, targets_table, write_rankings, write_targets
from lum_ray.gts.collate import next_items
from lum_ray.steps.gts_evaluate import evaluate_gts
from lum_ray.steps.gts_prepare import prepare_gts
from lum_ray.steps.prepare import cut_plan

BAR = 0.9
ORACLES = {"oracle": True, "oracle_without_time": False}


def arm(run: Run, name: str, world: str = "signal", quick: bool = False, **section: Any) -> Run:
    """The preset with another world or model setting."""
    assert run.data.source is not None
    options = run.data.source.options | {"world": world} | ({"users": 300, "items": 120} if quick else {})
    train = dataclasses.replace(run.train, steps=20, validate_every=20, checkpoint_every=20) if quick else run.train
    short = {"align_steps": 4, "llm": "random", "keep_layers": None} if quick else {}
    return dataclasses.replace(
        run,
        name=f"{run.name}_{name}",
        data=dataclasses.replace(run.data, source=Source("next_item", options=options)),
        section=dataclasses.replace(run.section, **(short | section)),
        train=train,
    )


def oracle_lists(run: Run) -> str:
    """The artifact with the oracles' lists of the run's test cuts."""
    prepared = prepare_gts(run, note)
    assert run.data.source is not None
    options = Options.of(run.data.source.options)
    timelines, catalogue = Timelines.open(prepared.sequences.uri), prepared.catalogue
    plan = cut_plan(run, "test", timelines.end_day)
    name = digest("oracle", prepared.sequences.manifest["digest"], plan, run.section.retrieve)
    uri = join(run.root, "predictions", f"oracle-{name}")
    if find(uri) is not None:
        return uri
    trained = cut_plan(run, "train", timelines.end_day)
    for number, (rows, samples, _) in enumerate(
        evaluation_batches(timelines, plan, lambda rows, samples: {}, 256, 0, 1)
    ):
        begin, end = rows.span(samples.row, -(2**30), samples.cut)
        index = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
        offsets = np.concatenate([[0], np.cumsum(end - begin)])
        users = rows.user[samples.row]
        item, time_us = catalogue.index_of(rows.values[index, 0]), rows.values[index, 1]
        for model, with_time in ORACLES.items():
            scores = next_item_oracle.oracle_scores(options, users, offsets, item, time_us, with_time=with_time)
            order = np.argsort(-scores, axis=1, kind="stable")[:, : run.section.retrieve]
            found = np.take_along_axis(scores, order, axis=1).astype(np.float32)
            table = ranking_table(users, samples.cut, order, found, catalogue.ids, model, "baseline")
            write_rankings(uri, f"{number:05d}-{model}", table)
        target = next_items(rows, samples, catalogue.index_of, timelines.end_day)
        repeat, history = targets_facts(rows, samples, catalogue, target)
        seen = trained.ranges(rows)[1] > 0
        write_targets(
            uri,
            f"{number:05d}",
            targets_table(users, samples.cut, history, seen[samples.row], *target, repeat, catalogue.ids),
        )
    commit(uri, {"kind": "rankings", "digest": name, "models": list(ORACLES)})
    return uri


def scored(run: Run) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Recall at 10 of all models of the run's test, by (model, reading); ours is the reference of the gains."""
    found = evaluate_gts(run, note)
    parts = [join(run.root, "predictions", name) for name in open_artifact(found.uri).manifest["predictions"]]
    table = evaluate_rankings(read_rankings([*parts, oracle_lists(run)]), ours=(run.name, "retrieve"))
    return {
        (row["model"], row["reading"]): row
        for row in table.to_pylist()
        if row["subset"] == "all" and row["metric"] == "eval/recall_10"
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="runs/bench")
    parser.add_argument("--quick", action="store_true", help="tiny: a smoke test, its figures mean nothing")
    options = parser.parse_args(arguments)
    preset = dataclasses.replace(presets.gts_simulator(), root=options.root)
    machine, packages = hardware(), ("torch", "transformers")
    main_run = arm(preset, "full", quick=options.quick)
    found = scored(main_run)
    oracle = found["oracle", "baseline"]["value"]

    def row(what: str, value: Mapping[str, Any], run: Run, of: float = oracle) -> float:
        shown = {"name": run.name, "recall_10": value["value"], "oracle": of, "quick": options.quick}
        shares = (value["value"] / of, value["low"] / of, value["high"] / of)
        emit(f"gts_simulator/{what}/r10_share", shares[0], "share of the oracle", peer=f"oracle {of:.4f}",
             ratio=shares[0], low=shares[1], high=shares[2], run=shown, machine=machine, packages=packages)  # fmt: skip
        return float(shares[0])

    reached = 0.0
    for (model, reading), value in sorted(found.items()):
        share = row(reading if model == main_run.name else model, value, main_run)
        if (model, reading) == (main_run.name, "rerank"):
            reached = share
    without = arm(preset, "without_timestamps", quick=options.quick, timestamps="none")
    row("without_timestamps", scored(without)[without.name, "retrieve"], without)
    null = arm(preset, "null", "null", quick=options.quick)
    popularity = scored(null)["popularity", "baseline"]
    emit("gts_simulator/null/gain", popularity["gain"], "recall at 10", peer=f"popularity {popularity['value']:.4f}",
         low=popularity["gain_low"], high=popularity["gain_high"], run={"name": null.name, "quick": options.quick},
         machine=machine, packages=packages)  # fmt: skip
    met = reached >= BAR and popularity["gain_low"] <= 0
    note(f"R + P reaches {reached:.3f} of the oracle's recall at 10 (bar {BAR})")
    return 0 if met or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
