"""The `lum-ray` command: the steps of a run, one sub-command each.

The last line on stdout is the URI of what was made; everything else that is said goes to stderr. Exit codes: 0 done,
1 the user can mend it, 2 wrong usage; 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from jobs.cohorts import shares
from jobs.printing import (
    console,
    done,
    plain,
    print_audit,
    print_cohorts,
    print_forgotten,
    print_metrics,
    print_rankings,
    say,
)
from lum_ray import catalog, config, presets
from lum_ray.artifacts import UserError, join

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

RunFile = Annotated[str, typer.Argument(metavar="RUN", help="a run file, or the name of a preset")]
Root = Annotated[str | None, typer.Option("--root", help="where artifacts go: a folder or s3://bucket/path")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=v", help="override one field; repeatable")]

Checkpoint = Annotated[
    str | None, typer.Option(metavar="URI", help="an earlier checkpoint, instead of training on the newest data")
]
STOPPED = "stopped; the same command goes on from the last checkpoint"


def main() -> None:
    """Run the command; errors that the user can mend are one message, without a trace."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    try:
        app(standalone_mode=True)
    except UserError as error:
        console.print(f"[bold red]error[/] {plain(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as end:
        # of `submit` the job's own: it says itself what becomes of that
        if end.code in (128 + signal.SIGINT, 128 + signal.SIGTERM) and sys.argv[1:2] != ["submit"]:
            console.print(STOPPED)
        raise


def load(run: str, root: str | None, assignments: list[str] | None) -> config.Run:
    """The run of a file or a preset's name, with overrides, and with the versions of its Delta tables pinned."""
    extra = [*(assignments or []), *([f"root={root}"] if root else [])]
    if run in presets.PRESETS and not os.path.exists(run):
        loaded = catalog.read_run(config.override(config.dump(presets.PRESETS[run]()), extra))
    else:
        loaded = catalog.load_run(run, extra)
    from lum_ray.steps.prepare import pinned

    return pinned(loaded, say)


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
    from jobs.validate import check

    done(check(load(run, root, set_), say))


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
def compact(run: RunFile, root: Root = None, set_: Set = None) -> None:
    """Merge the parts that days of increments have left into one, and free what nobody needs any more."""
    from lum_ray.steps import compact as step

    done(step(load(run, root, set_), say))


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
def tune(
    run: RunFile,
    root: Root = None,
    set_: Set = None,
    space: Annotated[
        str | None, typer.Option(help="quick, lumos_shape, gts_shape, gts_grid, or a YAML file; default: tune.space")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="in all, those of earlier calls included; default: tune.trials")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="wall time, such as 2h; the same command goes on")] = None,
) -> None:
    """Search settings, of the shape of the data too, and write the best as a run file; resumes after any stop."""
    from tuning.sweep import seconds
    from tuning.sweep import tune as search

    named = {"tune.space": space, "tune.trials": trials}
    extra = [f"{path}={value}" for path, value in named.items() if value is not None]
    limit = seconds(budget) if budget is not None else None
    done(search(load(run, root, [*(set_ or []), *extra]), say, limit))


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
        console.print(f"[bold red]LEAKY[/] {plain(', '.join(found.leaky))}", highlight=False, soft_wrap=True)
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
    delta: Annotated[str | None, typer.Option(metavar="URI", help="a Delta table that takes the rows, too")] = None,
) -> None:
    """Predict every user's coming days, or what comes next, into parquet files; with stable cohorts where asked."""
    from lum_ray.steps import predict as step
    from lum_ray.steps.deliver import deliver

    loaded = load(run, root, set_)
    day: int | str | None = int(cut) if cut is not None and cut.lstrip("-").isdigit() else cut
    lists: dict[str, Any] = {}
    if loaded.model == "gts":
        lists = {"readings": reading or ["retrieve"], "k": k, "seen_filter": unseen}
    elif reading or k is not None or unseen:
        raise UserError(f"--reading, -k and --unseen are for runs of GTS-LUM, {loaded.name} is one of LUMOS")
    predicted = step(loaded, say, day, shares(cohorts), salt, checkpoint, **lists)
    if delta is not None:
        deliver(predicted, delta, say)
    done(predicted)


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


@app.command()
def publish(run: RunFile, root: Root = None, set_: Set = None, checkpoint: Checkpoint = None) -> None:
    """Write the snapshot of histories that `serve` looks users up in; servers of the run take it within seconds.

    With --checkpoint they take that too.
    """
    from lum_ray.steps import publish as step

    done(step(load(run, root, set_), say, checkpoint))


@app.command()
def forget(
    run: RunFile, users: Annotated[list[str], typer.Argument(metavar="USER...")], root: Root = None, set_: Set = None
) -> None:
    """Take users out of everything under the root, keep them out, and prove it. Exit code 1 if the proof fails."""
    from lum_ray.data.forgotten import FOLDER
    from lum_ray.steps import forget as step

    loaded = load(run, root, set_)
    found = step(loaded, users, say)
    print_forgotten(found)
    done(join(loaded.root, FOLDER))


@app.command()
def serve(
    run: RunFile,
    root: Root = None,
    set_: Set = None,
    checkpoint: Checkpoint = None,
    beside: Annotated[str | None, typer.Option("--with", metavar="RUN", help="a run of the other model")] = None,
) -> None:
    """Serve the run's model over HTTP (trains and publishes what is missing) until Ctrl-C."""
    from serve.access import LOOPBACK, check_exposure, read_tokens
    from serve.environment import optimise

    loaded = load(run, root, set_)
    runs = [loaded, *([load(beside, root, None)] if beside else [])]
    check_exposure(loaded.serve.host, loaded.serve.tokens, loaded.serve.allow_anonymous)
    if loaded.serve.tokens:
        read_tokens(loaded.serve.tokens)
    if len({one.model for one in runs}) < len(runs):
        raise UserError(f"--with {beside}: expected a run of the other model, got a second one of {loaded.model}")
    optimise(haproxy=loaded.serve.host not in LOOPBACK)
    from lum_ray.data.state import pointer
    from lum_ray.steps import publish as step_publish
    from lum_ray.steps import train as step_train
    from lum_ray.steps.session import start_ray
    from serve.app import Endpoint, until_signal
    from serve.app import run as start_server

    endpoints = []
    for one, given in zip(runs, [checkpoint, None], strict=False):
        weights = given or step_train(one, say)
        state = step_publish(one, say, weights)
        endpoints.append(Endpoint(weights, state, pointer(one.root, one.name), serve=one.serve))
    start_ray()
    server = start_server(endpoints)
    say(f"serving at {server.url}, with a page to try it; its description is at {server.url}/docs; Ctrl-C ends it")
    done(server.url)
    until_signal(server)


@app.command()
def submit(
    run: RunFile,
    step: Annotated[
        str, typer.Argument(metavar="STEP", help="prepare, train, evaluate, audit, predict, publish, tune")
    ],
    options: Annotated[list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="options of the step")] = None,
    root: Root = None,
    set_: Set = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="the cluster's dashboard")
    ] = "http://127.0.0.1:8265",
    cluster: Annotated[
        str | None, typer.Option(metavar="FILE", help="the cluster's manifest or `ray up` file: what it may grow to")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="run a finished job anew")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="stop the running job; it saves its state")] = False,
    wait_s: Annotated[float, typer.Option(min=1, help="how long it may wait for a machine")] = 1800.0,
) -> None:
    """Run a step on a Ray cluster and follow it; Ctrl-C only stops following. The exit code is the job's own."""
    from jobs import submit as jobs_submit

    job = jobs_submit.Job(load(run, root, set_), step, jobs_submit.options(options))
    if stop:
        jobs_submit.stop(jobs_submit.connect(address), job, say)
        return
    outcome = jobs_submit.run(job, jobs_submit.connect(address), say, cluster, again, wait_s)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)
    done(outcome.result)


@app.command()
def token(name: Annotated[str, typer.Argument(help="who will hold it")]) -> None:
    """Make a bearer token: it is shown once, on stderr; the line to store where serve.tokens points goes to stdout."""
    from serve.access import new_token

    secret, line = new_token(name)
    say(f"the token of {name}, shown only now: {secret}")
    print(line)


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


command: Callable[..., Any] = typer.main.get_command(app)

if __name__ == "__main__":
    main()
