"""The search: Ray Tune over trials of a run, resumable from its ledger, with a budget of wall time.

`<root>/tune/<name>-<digest>/`: `trials/` (the ledger), and once trials have finished `report.html`, `best_run.yaml` and
`trials.json`. The digest covers the run, its data, the space and the metric; not trials, budget or machines, so that
the same command with more of them goes on.
"""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray import tune as ray_tune
from ray.tune.schedulers import FIFOScheduler

from lum_ray import config, steps
from lum_ray.artifacts import UserError, digest, join, storage
from lum_ray.config import Run
from lum_ray.steps.prepare import Log, silent
from lum_ray.steps.session import start_ray
from tuning.ledger import Ledger, Record, key_of
from tuning.objective import metric_of
from tuning.report import conclude
from tuning.search import Pruner, Search
from tuning.shapes import Shapes
from tuning.spaces import Space, load_space
from tuning.trial import Job, checkpoint_of, plain, run_trial

VERSION = 1
MAX_CRASHES = 5
WAITING_BYTES = 200_000_000
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command like any other
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}


def seconds(text: str) -> float:
    """A duration such as `2h`, `1h30m`, `90m` or `45s` in seconds. Raises UserError."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    total = sum(float(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1)) if part) if found else 0.0
    if total <= 0:
        raise UserError(f"--budget {text}: expected a duration such as 2h, 1h30m, 90m or 45s")
    return total


def tune(run: Run, log: Log = silent, budget_s: float | None = None) -> str:
    """Search as the run's `tune` section says, or go on with it, and return the search's URI.

    `budget_s` bounds the wall time: trials that run then are stopped at a checkpoint, and the same call goes on. Raises
    UserError for whatever is wrong with the run, the space, the metric or the machines, before anything is prepared.
    """
    began_at = time.time()
    metric, mode = metric_of(run)
    space = load_space(run.tune.space, run)
    given = run.root
    root = storage(given).path if storage(given).is_local else given
    run = replace(run, root=root)  # trials may run in other folders
    base = space.base(run)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    start_ray()
    parallel, resources = places(base)
    prepared = steps.prepare(base, log)
    shape = [VERSION, checkpoint_of(base, prepared).rsplit("/", 1)[-1], space.shape(), metric]
    uri = join(root, "tune", f"{run.name}-{space.name}-{digest(shape)}")
    ledger = Ledger(uri)
    before = ledger.records()
    over = sum(record.state != "unfinished" for record in before)
    if before:
        log(f"{over} of {run.tune.trials} trials are over, {len(before) - over} go on")
    deadline = began_at + budget_s if budget_s is not None else float("inf")
    row = rows(metric, mode, run.tune.trials, before, log)
    search = Search(run, space, ledger, metric, mode, run.tune.trials, deadline, row)
    if not search.over():
        log(f"searching {', '.join(space.distributions)} by {metric}: {parallel} trials at once, each with {resources}")
        scheduler = _scheduler(run, base, space, metric, mode, before)
        crashes = _run(search, scheduler, base, ledger, metric, deadline, parallel, resources)
        for crash in crashes[:5]:
            log(f"a trial crashed {MAX_CRASHES} times and stays unfinished: {str(crash).strip().splitlines()[-1]}")
        if crashes and not any(record.state != "unfinished" for record in ledger.records()):
            raise crashes[0]
    records = ledger.records()
    if not any(record.state == "finished" for record in records):
        messages = [f"{record.key}: {record.message}" for record in records if record.state == "failed"]
        if len(messages) == len(records) and messages:
            raise UserError("all trials failed:\n" + "\n".join(messages[:5]))
        log("no trial has finished yet; the same command goes on, with more --budget")
        return uri
    whole = search.over()
    if whole and len(records) < run.tune.trials:
        log(f"all combinations of {space.name} are tried: {len(records)} trials")
    conclude(run, given, space, metric, mode, uri, records, whole, log)
    return uri


def places(run: Run) -> tuple[int, dict[str, float]]:
    """(trials at once, what Ray holds for each). Raises UserError where the machines have less than is asked for."""
    return share(run, machines(run.train.device))


def machines(device: str) -> list[tuple[int, int]]:
    """(CPUs, GPUs) of each machine that are there for trials: without the CPUs of a submitted job's driver, and without
    GPUs where `device` is the CPU."""
    own, found = ray.get_runtime_context().get_node_id(), []
    for node in ray.nodes():
        if node["Alive"]:
            held = int(os.environ.get("LUM_RAY_DRIVER_CPUS", "0")) if node["NodeID"] == own else 0  # see training.fit
            cards = 0 if device == "cpu" else int(node["Resources"].get("GPU", 0))
            found.append((max(0, int(node["Resources"].get("CPU", 0)) - held), cards))
    return found


def share(run: Run, found: list[tuple[int, int]]) -> tuple[int, dict[str, float]]:
    """As `places`, of machines with these (CPUs, GPUs). What Ray holds for a trial must fit on one of them."""
    on_gpus = run.train.device == "cuda" or any(cards for _, cards in found)

    def room(cpus: int) -> int:
        return sum(min(own // cpus, cards) if on_gpus else own // cpus for own, cards in found)

    workers, asked = run.train.workers, run.tune.parallel
    most = room(1) // workers
    if most < (asked or 1):
        raise UserError(
            f"{'tune.parallel' if most else 'train.workers'}: {asked or 1} trials at once of {workers} workers need "
            f"{(asked or 1) * workers} CPUs{', each with a GPU on its machine' if on_gpus else ''}; beside the driver "
            f"the session has {sum(cpus for cpus, _ in found)} CPUs and {sum(cards for _, cards in found)} GPUs; ask "
            "for less, or add machines"
        )
    parallel = asked or most
    if workers > 1:
        # the trial itself only waits for its workers, which take all the CPUs; Tune refuses a trial that takes nothing
        return parallel, {"memory": float(WAITING_BYTES)}
    cpus = max(cpus for cpus in range(1, 1 + max(own for own, _ in found)) if room(cpus) >= parallel)
    return parallel, {"CPU": float(cpus), **({"GPU": 1.0} if on_gpus else {})}


def _scheduler(run: Run, base: Run, space: Space, metric: str, mode: str, records: list[Record]) -> Any:
    steps_of = space.distributions.get("train.steps")
    longest = int(max(steps_of.probes())) if steps_of else base.train.steps
    if not run.tune.prune or base.train.validate_every >= longest:
        return FIFOScheduler()
    return Pruner(metric, mode, base.train.validate_every, longest, key_of(base), records)


def _run(
    search: Search,
    scheduler: Any,
    base: Run,
    ledger: Ledger,
    metric: str,
    deadline: float,
    parallel: int,
    resources: dict[str, float],
) -> list[BaseException]:
    """Run the search, and return what trials crashed with."""
    shapes = Shapes.remote()
    job = Job(json.dumps(config.dump(base)), ledger.uri, metric, deadline, os.getcwd())

    def trial(config: dict[str, Any]) -> dict[str, Any]:
        return run_trial(config, job, shapes)

    # Tune's own files are of no use later, see `ledger`; without checkpoints of Tune's no worker reads them either
    with tempfile.TemporaryDirectory(prefix="lum-ray-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trial, ray_tune.PlacementGroupFactory([resources])),
            tune_config=ray_tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=parallel,
                # the next trial takes over the process: Python, torch and Ray are imported once
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray_tune.RunConfig(
                name="search",
                storage_path=scratch,
                verbose=0,
                failure_config=ray_tune.FailureConfig(max_failures=MAX_CRASHES),
            ),
        )
        try:
            crashes = [plain(error) for error in tuner.fit().errors]
        except SystemExit as stop:  # of SIGTERM; out of Ray's own waiting it comes with code 1
            raise SystemExit(128 + signal.SIGTERM) from stop
    ray.kill(shapes)
    return crashes


def rows(metric: str, mode: str, trials: int, before: list[Record], log: Log) -> Callable[[Record], None]:
    """What prints a row of the progress table whenever a trial is over."""
    sign, began_at = (1 if mode == "max" else -1), time.monotonic()
    values = [record.value for record in before if record.state == "finished" and record.value is not None]
    done = [sum(record.state != "unfinished" for record in before)]

    def row(record: Record) -> None:
        done[0] += 1
        if record.state == "finished" and record.value is not None:
            values.append(record.value)
        best = max(values, key=lambda value: sign * value) if values else None
        shown = "  ".join(f"{path.rsplit('.', 1)[-1]} {short(value)}" for path, value in record.values.items())
        log(
            f"{done[0]:>3}/{trials}  #{record.number:<3} {record.state:<10} {metric.removeprefix('eval/')} "
            f"{short(record.value):>7}  best {short(best):>7}  {record.train_s:5.0f} s  "
            f"{time.monotonic() - began_at:6.0f} s in all  {shown or 'the run as it is'}  {record.message}".rstrip()
        )

    return row


def short(value: Any) -> str:
    """A number in four figures, anything else as it is."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
