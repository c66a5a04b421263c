"""The `lum-ray` command: the steps of a run, one sub-command each.

The last line on stdout is the URI of what was made; everything else that is said goes to stderr. Exit codes: 0 done,
1 the user can mend it, 2 wrong usage; 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lum_ray import catalog, config, presets
from lum_ray.artifacts import UserError, join

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(stderr=True)
if not console.is_terminal:
    console.width = max(console.width, 140)  # a log file has room for the table of metrics

RunFile = Annotated[str, typer.Argument(metavar="RUN", help="a run file, or the name of a preset")]
Root = Annotated[str | None, typer.Option("--root", help="where artifacts go: a folder or s3://bucket/path")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=v", help="override one field; repeatable")]

Checkpoint = Annotated[
    str | None, typer.Option(metavar="URI", help="an earlier checkpoint, instead of training on the newest data")
]

HEADLINE = {"binary": "eval/roc_auc", "continuous": "eval/wmape", "count": "eval/wmape"}


def main() -> None:
    """Run the command; errors that the user can mend are one message, without a trace."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    try:
        app(standalone_mode=True)
    except UserError as error:
        console.print(f"[bold red]error[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from the last checkpoint")
        sys.exit(130)


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def load(run: str, root: str | None, assignments: list[str] | None) -> config.Run:
    """The run of a file or a preset's name, with overrides."""
    extra = [*(assignments or []), *([f"root={root}"] if root else [])]
    if run in presets.PRESETS and not os.path.exists(run):
        return catalog.read_run(config.override(config.dump(presets.PRESETS[run]()), extra))
    return catalog.load_run(run, extra)


def say(text: str) -> None:
    """What the steps report, on stderr."""
    console.print(f"[dim]·[/] {_plain(text)}", highlight=False, soft_wrap=True)


def done(uri: str) -> None:
    """The last line on stdout."""
    print(uri, flush=True)


@app.command()
def init(preset: Annotated[str, typer.Argument(help=", ".join(presets.PRESETS))]) -> None:
    """Write a preset as a commented run file to stdout."""
    from jobs.run_file import commented

    if preset not in presets.PRESETS:
        raise UserError(f"{preset}: no such preset; there are {', '.join(presets.PRESETS)}")
    print(commented(presets.PRESETS[preset]()), end="")


@app.command()
def validate(run: RunFile, root: Root = None, set_: Set = None) -> None:
    """Check a run file and the schema of its tables, without building anything but the raw tables of a source."""
    from lum_ray.data.context import check_calendar, check_profiles
    from lum_ray.data.items import read_items, unknown_items
    from lum_ray.data.schema import check_events
    from lum_ray.steps.prepare import raw_items, raw_tables

    loaded = load(run, root, set_)
    tables, _ = raw_tables(loaded, say)
    files = check_events(tables.events, loaded.data)
    say(f"events: {len(files)} files, {sum(file.rows for file in files):,} rows")
    if tables.profiles:
        say(f"profiles: {sum(file.rows for file in check_profiles(tables.profiles, loaded.data)):,} rows")
    if tables.calendar and loaded.data.calendar:
        say(f"calendar: {sum(file.rows for file in check_calendar(tables.calendar, loaded.data)):,} rows")
    if loaded.model == "gts":
        catalogue, rejects = read_items(raw_items(loaded, say)[0], loaded.data)
        say(f"items: {len(catalogue):,}, {rejects.num_rows:,} rows left out or mended")
        missing = unknown_items(files, loaded.data, catalogue)
        say(f"events of items that the catalogue does not have: {missing.events:,} {', '.join(missing.items)}")
    done(tables.events)


@app.command()
def prepare(run: RunFile, root: Root = None, set_: Set = None) -> None:
    """Turn the raw tables into what the model reads: timelines and calendar, or sequences, items and their ID tree."""
    from lum_ray.steps import describe
    from lum_ray.steps import prepare as step

    loaded = load(run, root, set_)
    prepared = step(loaded, say)
    for name, value in describe(loaded, prepared).items():
        say(f"{name.replace('_', ' ')}: {value:,}" if isinstance(value, int) else f"{name.replace('_', ' ')}: {value}")
    done(prepared.uri)


@app.command()
def train(
    run: RunFile, root: Root = None, set_: Set = None, fresh: Annotated[bool, typer.Option(help="train anew")] = False
) -> None:
    """Train, or go on where training was stopped; a finished run is returned as it is."""
    from lum_ray.steps import train as step

    done(step(load(run, root, set_), say, fresh))


@app.command()
def evaluate(
    run: RunFile,
    root: Root = None,
    set_: Set = None,
    max_users: Annotated[int | None, typer.Option(help="a stable sample of the test users")] = None,
    lightgbm: Annotated[bool, typer.Option(help="put it beside LightGBM with hand-made features instead")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="with --lightgbm: train so many seeds, average them too")] = 1,
    by_cohort: Annotated[
        str | None, typer.Option(metavar="URI", help="compare the cohorts of these predictions")
    ] = None,
) -> None:
    """Score the model beside the baselines on the test cuts and write the report; or compare cohorts."""
    from lum_ray.steps import evaluate as step
    from lum_ray.steps.evaluate import by_cohort as compare

    if lightgbm and (max_users is not None or by_cohort):
        raise UserError("--lightgbm: scores all test users; leave out --max-users and --by-cohort")
    if seeds > 1 and not lightgbm:
        raise UserError(f"--seeds {seeds}: only --lightgbm trains several; add it, or leave --seeds out")
    loaded = load(run, root, set_)
    if loaded.model != "lumos" and (lightgbm or by_cohort):
        raise UserError(f"--lightgbm and --by-cohort are for runs of LUMOS, {loaded.name} is one of GTS-LUM")
    if by_cohort:
        print_cohorts(compare(loaded, by_cohort, say))
        done(by_cohort)
        return
    if lightgbm:
        from lum_ray.steps.contest import contest, with_seed

        own = [loaded.train.seed + k for k in range(seeds)]
        peers = contest(with_seed(loaded, own[0]), say, seeds=own)
        print_metrics(loaded, peers.table)
        done(join(peers.uri, "report.html"))
        return
    found = step(loaded, say, max_users)
    (print_metrics if loaded.model == "lumos" else print_rankings)(loaded, found.table)
    done(join(found.uri, "report.html"))


@app.command()
def audit(
    run: RunFile,
    root: Root = None,
    set_: Set = None,
    max_users: Annotated[int, typer.Option(min=2, help="a stable sample of the test users")] = 200,
) -> None:
    """Look for leaks from the future: what must not change a forecast is changed. Exit code 1 if a check is LEAKY."""
    from lum_ray.steps.audit import audit as step

    found = step(load(run, root, set_), say, max_users)
    print_audit(found.checks)
    if found.leaky:
        console.print(f"[bold red]LEAKY[/] {_plain(', '.join(found.leaky))}", highlight=False, soft_wrap=True)
    done(found.uri)
    raise typer.Exit(1 if found.leaky else 0)


@app.command()
def predict(
    run: RunFile,
    root: Root = None,
    set_: Set = None,
    cut: Annotated[
        str | None, typer.Option(help="first predicted day: a date or a day number; default: after the data")
    ] = None,
    cohorts: Annotated[str, typer.Option(help="shares such as treatment:0.5,control:0.5")] = "",
    salt: Annotated[str, typer.Option(help="another salt is another assignment")] = "lum_ray",
    checkpoint: Checkpoint = None,
    reading: Annotated[
        list[str] | None, typer.Option(help="GTS-LUM: retrieve (default), rerank or generate; repeatable")
    ] = None,
    k: Annotated[int | None, typer.Option("-k", help="GTS-LUM: items a list; default: gts.retrieve")] = None,
    unseen: Annotated[bool, typer.Option("--unseen", help="GTS-LUM: leave out what a user had")] = False,
) -> None:
    """Predict every user's coming days, or what comes next, into parquet files; with stable cohorts where asked."""
    from lum_ray.steps import predict as step

    loaded = load(run, root, set_)
    day: int | str | None = int(cut) if cut is not None and cut.lstrip("-").isdigit() else cut
    lists: dict[str, Any] = {}
    if loaded.model == "gts":
        lists = {"readings": reading or ["retrieve"], "k": k, "seen_filter": unseen}
    elif reading or k is not None or unseen:
        raise UserError(f"--reading, -k and --unseen are for runs of GTS-LUM, {loaded.name} is one of LUMOS")
    done(step(loaded, say, day, shares(cohorts), salt, checkpoint, **lists))


@app.command()
def label(
    run: RunFile,
    labels: Annotated[str, typer.Option(help="parquet: user, cut_day, until_day, task, label (0, 1 or null)")],
    root: Root = None,
    set_: Set = None,
    checkpoint: Checkpoint = None,
    reading: Annotated[str, typer.Option(help="linear, recency, front, end or none")] = "linear",
) -> None:
    """Fit a head for labels of users on a trained GTS-LUM, and predict the rest of the table."""
    from lum_ray.steps.gts_labels import label_gts

    loaded = load(run, root, set_)
    if loaded.model != "gts":
        raise UserError(f"label: expected a run of GTS-LUM, {loaded.name} is one of LUMOS, whose targets are its own")
    done(label_gts(loaded, labels, say, reading, checkpoint))


def shares(text: str) -> dict[str, float]:
    """`a:0.5,b:0.5` as a table. Raises UserError for another form."""
    result = {}
    for part in text.split(",") if text else []:
        name, _, value = part.partition(":")
        try:
            result[name.strip()] = float(value)
        except ValueError:
            raise UserError(
                f"--cohorts {text}: expected shares such as treatment:0.5,control:0.5, got {part!r}"
            ) from None
    return result


@app.command()
def publish(run: RunFile, root: Root = None, set_: Set = None) -> None:
    """Write the snapshot of histories that `serve` looks users up in."""
    from lum_ray.steps import publish as step

    done(step(load(run, root, set_), say))


@app.command()
def serve(run: RunFile, root: Root = None, set_: Set = None, checkpoint: Checkpoint = None) -> None:
    """Serve the run's model over HTTP (trains and publishes what is missing) until Ctrl-C."""
    from lum_ray.steps import publish as step_publish
    from lum_ray.steps import train as step_train
    from lum_ray.steps.session import start_ray
    from serve.app import run as start_server
    from serve.app import until_signal

    loaded = load(run, root, set_)
    if loaded.model != "lumos":
        raise UserError(
            f"serve: {loaded.name} is a run of GTS-LUM, which has no endpoint yet; `lum-ray predict` writes its lists"
        )
    weights, state = checkpoint or step_train(loaded, say), step_publish(loaded, say)
    start_ray()
    server = start_server(weights, state, loaded.serve)
    say(f"serving at {server.url}, its description at {server.url}/docs; Ctrl-C ends it")
    done(server.url)
    until_signal(server)


@app.command()
def demo(
    root: Annotated[str, typer.Option("--root")] = "runs",
    only: Annotated[str | None, typer.Option(help="one of the two models: lumos or gts")] = None,
    set_: Set = None,
) -> None:
    """The whole path on a year of real household shopping, with both models: prepare, train, evaluate, answer."""
    from jobs.demo import run_gts_demo, run_lumos_demo

    demos = {"lumos": ("lumos_demo", run_lumos_demo), "gts": ("gts_demo", run_gts_demo)}
    if only is not None and only not in demos:
        raise UserError(f"--only {only}: expected lumos or gts")
    if set_ and only is None:
        raise UserError("--set: say which model it is for, with --only lumos or --only gts")
    for name, (preset, run_demo) in demos.items():
        if only in (None, name):
            run_demo(load(preset, root, set_), say)


@app.command()
def doctor() -> None:
    """What this machine has: packages, devices, and whether a Ray session starts."""
    from jobs.doctor import report

    table = Table("what", "found", "note", box=None)
    bad = False
    for what, found, note, fine in report():
        table.add_row(what, found if fine else f"[red]{found}[/]", note)
        bad |= not fine
    console.print(table)
    raise typer.Exit(1 if bad else 0)


def print_metrics(run: config.Run, table: Any) -> None:
    """The headline metric of every task, a column a model, on stderr."""
    from lum_ray.steps.train import tasks_of

    found = {(row["task"], row["metric"], row["model"]): row for row in table.to_pylist()}
    models = sorted({model for _, _, model in found}, key=lambda name: (name != run.name, name))
    shown = Table("task", "metric", *models, box=None, header_style="bold")
    tasks = tasks_of(run)
    shown_tasks = {task for task, _, _ in found}
    for task in sorted(shown_tasks, key=lambda name: (HEADLINE[tasks[name].kind], not tasks[name].horizon, name)):
        metric = HEADLINE[tasks[task].kind]
        rows = [found.get((task, metric, model)) for model in models]
        values = [row["value"] for row in rows if row]
        best = (max if metric == "eval/roc_auc" else min)(values) if values else None
        cells = [
            "-" if row is None else f"[{'bold' if row['value'] == best else 'default'}]{row['value']:.4f}[/]"
            + (f" [dim]{row['low']:.3f}–{row['high']:.3f}[/]" if model == run.name else "")
            for row, model in zip(rows, models, strict=True)
        ]  # fmt: skip
        shown.add_row(task, metric.removeprefix("eval/"), *cells)
    console.print(shown)


RANKINGS = ("recall_5", "recall_10", "recall_50", "recall_200", "ndcg_5", "ndcg_10", "mrr")


def print_rankings(run: config.Run, table: Any) -> None:
    """The headline metrics of every model and reading over all test baskets, on stderr; best first by MRR."""
    rows = table.to_pylist()
    found = {(row["model"], row["reading"], row["subset"], row["metric"].removeprefix("eval/")): row for row in rows}
    who = sorted({key[:2] for key in found}, key=lambda key: -found[(*key, "all", "mrr")]["value"])
    extra = [("repeat", "recall_10"), ("explore", "recall_10")]
    shown = Table(
        "model", *RANKINGS, *(f"{subset} {metric}" for subset, metric in extra), box=None, header_style="bold"
    )
    for key in who:
        cells = []
        for subset, metric in [*(("all", metric) for metric in RANKINGS), *extra]:
            row = found.get((*key, subset, metric))
            interval = f" [dim]{row['low']:.3f}–{row['high']:.3f}[/]" if row and metric == "recall_10" else ""
            cells.append("-" if row is None else f"{row['value']:.4f}{interval}")
        name = f"{key[0]}: {key[1]}" if key[1] != "baseline" else key[0]
        shown.add_row(f"[bold]{name}[/]" if key[0] == run.name else name, *cells)
    console.print(shown)
    ceiling = next(
        (row["value"] for row in rows if row["metric"] == "eval/recall_ceiling_5" and row["subset"] == "all"), None
    )
    if ceiling is not None:
        say(f"ceiling of recall_5: {ceiling:.4f} (baskets have more than five items)")


def print_audit(checks: Any) -> None:
    """The leak battery, a row a check, on stderr."""
    colour = {"ok": "green", "LEAKY": "bold red", "not applicable": "dim"}
    shown = Table("check", "what was compared", "figure", "bar", "verdict", box=None, header_style="bold")
    for check in checks:
        cells = map(_plain, (check.name, check.compared, check.figure, check.bar))
        shown.add_row(*cells, f"[{colour[check.verdict]}]{check.verdict}[/]")
    console.print(shown)


def print_cohorts(table: Any) -> None:
    """Treatment minus control of each task, on stderr."""
    shown = Table("task", "estimate", "difference", "95 %", "treated", "control", box=None, header_style="bold")
    for row in table.to_pylist():
        name = row["estimate"].removeprefix("eval/cohort_")
        shown.add_row(row["task"], name, f"{row['value']:+.4f}", f"{row['low']:+.4f} to {row['high']:+.4f}",
                      str(row["n_treatment"]), str(row["n_control"]))  # fmt: skip
    console.print(shown)


command: Callable[..., Any] = typer.main.get_command(app)

if __name__ == "__main__":
    main()
