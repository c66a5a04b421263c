"""GTS-LUM against RecTools' SASRec, BERT4Rec and HSTU and the simple rankings, on the baskets of the test cut.

    python -m jobs.bench.quality_gts --dataset complete_journey|ml-100k [--root DIR] [--peers PYTHON] [--path FOLDER]
        [--only sasrec,bert4rec,hstu] [--seeds N] [--epochs N] [--peer-minutes M] [--set a.b=v] [--quick]

Rows `quality_gts/<dataset>/...`: `{r5,r10,ndcg5}_gain`: recall at 5 and 10 and NDCG at 5 of what ours retrieves, minus
those of the best of all peers and baselines on that metric (`peer` names it), with the paired 95 % interval over
users; `explore_{r5,r10,ndcg5}_gain`: the same over items that are new to the user, in lists without seen items. Nobody
rates a film twice, so of ml-100k only these compare like with like: without the seen-filter ours gains by having
learned that nothing comes again, which a peer is not told.

The peers train on the very events that ours may train on (those before the run's `validate_from`), in an environment of
their own (`make peers`; see rectools_peer.py), and make their lists from the users' whole histories before the test
cut. Where a peer has no list, or a short one (it knows no item that came after its training), popularity at the cut
fills it up. Several seeds of ours are averaged; a peer has one.

ml-100k is read from the package recbole in the peers' environment, or from --path.

Every model's lists are an artifact under --root (a local folder), so that a second call computes what is missing. Exit
code 1: the lower end of r5_gain (ml-100k: explore_r5_gain) is not above 0, or a peer was left out because its time was
over.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from jobs.bench import rectools_peer
from jobs.bench.gts_peers import Contest, peer_lists, recbole_folder
from jobs.bench.rows import emit, hardware, note
from lum_ray import catalog, config, presets
from lum_ray.artifacts import join, open_artifact
from lum_ray.config import Run
from lum_ray.evaluation.ranking import evaluate_rankings, read_rankings
from lum_ray.steps.contest import with_seed
from lum_ray.steps.gts_evaluate import evaluate_gts

DATASETS = ("complete_journey", "ml-100k")
EPOCHS = {"complete_journey": 2, "ml-100k": 20}
"""Of a peer: about five minutes of one core."""
METRICS = {"r5": "eval/recall_5", "r10": "eval/recall_10", "ndcg5": "eval/ndcg_5"}
SUBSETS = {"": "all", "explore_": "explore"}
BARS = {"complete_journey": "r5_gain", "ml-100k": "explore_r5_gain"}
"""The figure whose interval must lie above 0."""
READING = "retrieve"


def contest_run(dataset: str, root: str, path: str | None, quick: bool) -> Run:
    """The run of a dataset over the artifacts under `root`; `quick`: tiny, to see that it works."""
    run = presets.gts_demo() if dataset == "complete_journey" else presets.gts_ml_100k()
    data, section, train = run.data, run.section, run.train
    assert data.source is not None
    source = dataclasses.replace(data.source, path=path if path is not None else data.source.path)
    if quick:
        section = dataclasses.replace(section, llm="random", keep_layers=None, width=16, heads=2, layers=1, queries=2,
                                      branching=4, depth=2, negatives=16, output_width=16, align_steps=2,
                                      align_group=4, graph_width=8, table_width=8, rerank=4)  # fmt: skip
        train = dataclasses.replace(train, steps=4, batch=8, micro_batch=8, validate_every=4, checkpoint_every=4,
                                    validate_users=50)  # fmt: skip
    data = dataclasses.replace(data, source=source, engine="local")
    return dataclasses.replace(run, root=root, data=data, section=section, train=train)


def our_lists(run: Run, seeds: int) -> list[str]:
    """The artifacts with the lists of ours, seed by seed, and of the baselines, once."""
    parts: list[str] = []
    for seed in range(seeds):
        found = evaluate_gts(with_seed(run, seed), note)
        note(f"report: {found.uri}/report.html")
        names = open_artifact(found.uri).manifest["predictions"]
        # the baselines are the second part, and the same for every seed
        parts += [join(run.root, "predictions", name) for name in (names if seed == 0 else names[:1])]
    return parts


def gains(table: pa.Table, ours: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Figure -> (the row of ours, the row of the best of all others on that metric); without those that have no row."""
    rows, result = table.to_pylist(), {}
    for prefix, subset in SUBSETS.items():
        for figure, metric in METRICS.items():
            some = [row for row in rows if row["subset"] == subset and row["metric"] == metric]
            own = [row for row in some if (row["model"], row["reading"]) == (ours, READING)]
            others = [row for row in some if row["model"] != ours]
            if own and others:
                result[f"{prefix}{figure}_gain"] = own[0], max(others, key=lambda row: float(row["value"]))
    return result


def shown(table: pa.Table) -> str:
    """A small table of all models, by recall at 5."""
    columns = [(subset, metric) for subset in SUBSETS.values() for metric in METRICS.values()]
    values: dict[str, dict[tuple[str, str], float]] = {}
    for row in table.to_pylist():
        who = row["model"] if row["reading"] == "baseline" else f"{row['model']} ({row['reading']})"
        values.setdefault(who, {})[row["subset"], row["metric"]] = row["value"]
    titles = [f"{prefix}{figure}" for prefix in SUBSETS for figure in METRICS]
    wide = max(map(len, values))
    lines = [" " * wide + "".join(f"{title:>15}" for title in titles)]
    for who, own in sorted(values.items(), key=lambda pair: -pair[1].get(columns[0], 0.0)):
        figures = [f"{own[column]:>15.4f}" if column in own else f"{'-':>15}" for column in columns]
        lines.append(f"{who:<{wide}}{''.join(figures)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="complete_journey")
    parser.add_argument("--root", default="runs/bench", help="where the artifacts are")
    parser.add_argument("--peers", default=".venv-peers/bin/python", help="the Python of `make peers`")
    parser.add_argument("--path", help="the dataset's folder (default: the installed package's)")
    parser.add_argument("--only", default=",".join(rectools_peer.MODELS), help="the peers, with commas between")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to N - 1 of our model (default: 1)")
    parser.add_argument("--epochs", type=int, help=f"of each peer (default: {EPOCHS})")
    parser.add_argument("--peer-minutes", type=float, default=30.0, help="at most, for each peer")
    parser.add_argument("--set", action="append", default=[], help="another value of the preset's run: gts.fusion=mlp")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a tiny model, one epoch, no bar")
    options = parser.parse_args(arguments)
    chosen = [model for model in options.only.split(",") if model]
    if unknown := sorted(set(chosen) - set(rectools_peer.MODELS)):
        parser.error(f"--only: expected some of {', '.join(rectools_peer.MODELS)}, got {', '.join(unknown[:5])}")
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    if not os.path.isfile(options.peers):
        parser.error(f"--peers: expected the Python of the peers' environment, found no {options.peers}; `make peers`")
    path = options.path
    if path is None and options.dataset == "ml-100k":
        path = recbole_folder(options.peers)
    run = contest_run(options.dataset, options.root, path, options.quick)
    run = catalog.read_run(config.override(config.dump(run), options.set))
    epochs = options.epochs or (1 if options.quick else EPOCHS[options.dataset])

    contest = Contest.of(run)
    made = {model: peer_lists(contest, options.peers, model, epochs, options.peer_minutes) for model in chosen}
    parts = [*our_lists(run, options.seeds), *(uri for uri in made.values() if uri is not None)]
    table = evaluate_rankings(read_rankings(parts), ours=(run.name, READING))
    note(shown(table))
    found = gains(table, run.name)
    for what, (own, best) in found.items():
        about = {"name": run.name, "ours": own["value"], "low": own["low"], "high": own["high"], "n": own["n"],
                 "users": own["users"], "seeds": own["seeds"], "seed_sd": own["seed_sd"], "peers": chosen,
                 "peer_epochs": epochs, "set": options.set, "quick": options.quick}  # fmt: skip
        emit(f"quality_gts/{options.dataset}/{what}", best["gain"], METRICS[what.split("_")[-2]].removeprefix("eval/"),
             peer=f"{best['model']} {best['value']:.4f}", ratio=own["value"] / best["value"] if best["value"] else None,
             low=best["gain_low"], high=best["gain_high"], run=about, machine=hardware(),
             packages=("torch", "transformers", "numpy"))  # fmt: skip
    left_out = [model for model, uri in made.items() if uri is None]
    _, bar = found[BARS[options.dataset]]
    met = bar["gain_low"] > 0 and not left_out
    if not met:
        why = f"; left out: {', '.join(left_out)}" if left_out else ""
        gain = f"{bar['gain']:+.4f} [{bar['gain_low']:+.4f}, {bar['gain_high']:+.4f}] over {bar['model']}"
        note(f"missed: {BARS[options.dataset]} {gain}{why}")
    return 0 if met or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
