"""Submit a step of a run to a Ray cluster, follow its log, and end with the job's own exit code.

A job is known by its run, its step and the step's options: its submissions are `<run>-<step>-<digest>-<n>`, n counting
from 1. Ray gives an id away once only, so that of two who submit one job at once the second joins the first. What a
failed or stopped submission had made is there as artifacts, and the next one goes on from it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import httpx
import requests
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import lum_ray
from jobs import placement
from lum_ray import config
from lum_ray.artifacts import UserError, digest
from tuning.spaces import BUILT_IN

STEPS = ("prepare", "train", "evaluate", "audit", "predict", "publish", "tune")
PACKAGES = ("lum_ray", "jobs", "tuning", "serve")
MOST_BYTES = 50 << 20
"""Of the working directory, before it is packed; Ray refuses archives of more than 100 MiB."""
STOP_WAIT_S = 120
"""How long a stopped job may take to save its state, before it is killed (Ray's own default is 3 s)."""
RECONNECT_S = 300.0
"""How long the cluster may be out of reach before following ends."""
POLL_S = 1.0
DRIVER_CPUS = 1

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A step of a resolved run, with the options that the step gets."""

    run: config.Run
    step: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.run.name}-{self.step}-{digest(config.dump(self.run), self.step, self.options)}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `exit_code` is its own, `result` the last line that it printed of what it made ("" if none)."""

    submission_id: str
    exit_code: int
    result: str


def connect(address: str) -> JobSubmissionClient:
    """The cluster's job server at `address` (`http://host:8265`), with RAY_AUTH_TOKEN as bearer token if it is set,
    else with the one that `ray start` has left in the home directory, if any.

    Raises UserError where nothing answers or the token is refused.
    """
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    left = Path.home() / ".ray/auth_token"
    token = os.environ.get("RAY_AUTH_TOKEN") or (left.read_text().strip() if left.is_file() else None)
    try:
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except (ConnectionError, requests.RequestException) as error:
        raise UserError(
            f"--address {address}: expected the dashboard of a Ray cluster, found none ({error}); on Kubernetes: "
            "kubectl port-forward service/<cluster>-head-svc 8265"
        ) from None
    except AuthenticationError as error:
        named = "RAY_AUTH_TOKEN" if "RAY_AUTH_TOKEN" in os.environ else str(left)
        got = f"the one in {named} was refused" if token else "RAY_AUTH_TOKEN is not set"
        raise UserError(f"--address {address}: the cluster wants a token, and {got}") from error


def run(
    job: Job, client: JobSubmissionClient, say: Say, cluster_file: str | None, again: bool, wait_s: float
) -> Outcome:
    """Submit the job, or join it, and follow it to its end. Ctrl-C ends the following alone (exit code 130)."""
    info = submit(job, client, say, cluster_file, again)
    submission_id = str(info.submission_id)
    if info.status.is_terminal():
        return _outcome(info, job, client.get_job_logs(submission_id))
    try:
        outcome = follow(client, job, submission_id, say, wait_s)
    except KeyboardInterrupt:
        say(f"{submission_id} goes on; the same command follows it again, and with --stop it ends")
        return Outcome(submission_id, 130, "")
    if outcome.exit_code:
        say(f"{submission_id} ended with exit code {outcome.exit_code}; the same command goes on from its artifacts")
    return outcome


def submit(
    job: Job, client: JobSubmissionClient, say: Say, cluster_file: str | None = None, again: bool = False
) -> JobDetails:
    """The job's running or finished submission, or a new one where there is none or the last one failed.

    `again` runs a finished one anew. `cluster_file` describes the cluster at its largest. Raises UserError, before
    anything is submitted, where the job could never be placed or its paths mean something else on the cluster.
    """
    if job.step not in STEPS:
        raise UserError(f"{job.step}: expected a step, one of {', '.join(STEPS)}")
    last = latest(client, job)
    if last is not None and not last.status.is_terminal():
        say(f"{last.submission_id} is {last.status.value.lower()} already: joining it")
        return last
    if last is not None and last.status == JobStatus.SUCCEEDED and not again:
        say(f"{last.submission_id} is finished; --again runs it anew, as after new events")
        return last
    placed, wanted = place(job, client, say, cluster_file)
    number = _number(job, last.submission_id) + 1 if last is not None else 1
    submission_id = f"{job.name}-{number}"
    with tempfile.TemporaryDirectory(prefix="lum-ray-submit-") as folder:
        pack(placed, folder)
        try:
            client.submit_job(
                entrypoint=shlex.join(["python", "-m", f"jobs.{job.step}", "run.yaml", *job.options]),
                submission_id=submission_id,
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {
                        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
                        "LUM_RAY_DRIVER_CPUS": str(DRIVER_CPUS),  # for lum_ray.training.fit
                    },
                },
                entrypoint_num_cpus=DRIVER_CPUS,
                entrypoint_num_gpus=wanted.driver_gpus or None,
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            say(f"{submission_id} was submitted by somebody else just now: joining it")
        else:
            say(f"submitted {submission_id}")
    return client.get_job_info(submission_id)


def place(
    job: Job, client: JobSubmissionClient, say: Say, cluster_file: str | None
) -> tuple[config.Run, placement.Needs]:
    """The run with `train.device` decided, and what its step needs. Raises UserError where that can never be had."""
    now = machines(client)
    most = placement.largest(cluster_file) if cluster_file else []
    run = job.run
    if (warning := placement.check_paths(run, max(now, most, key=len))) is not None:
        say(warning)
    gpus = run.train.device == "cuda" or (run.train.device == "auto" and any(machine.gpus for machine in [*now, *most]))
    wanted = placement.needs(run, job.step, gpus)
    lacking = placement.missing(wanted, now)
    if lacking and most:
        lacking = placement.missing(wanted, most)
        where = f"{cluster_file} describes at most {placement.describe(most)}"
    else:
        where = f"the cluster has {placement.describe(now)}; --cluster FILE says what its autoscaler may add"
    if lacking:
        raise UserError(
            f"{job.step}: can never be placed: it needs {lacking} ({where}). train.workers is {run.train.workers}, "
            f"each with one CPU{' and one GPU' if gpus else ''}, and the driver takes a CPU: set fewer, or add machines"
        )
    return replace(run, train=replace(run.train, device="cuda" if gpus else "cpu")), wanted


def machines(client: JobSubmissionClient) -> list[placement.Machine]:
    """The cluster's machines that are alive."""
    reply = httpx.get(
        f"{client.get_address()}/api/v0/nodes",
        params={"detail": "1", "limit": "10000"},
        headers=client._headers,  # the token, wherever Ray found it
        timeout=30.0,
    )
    reply.raise_for_status()
    return placement.alive(placement.nodes_of(reply.text))


def latest(client: JobSubmissionClient, job: Job) -> JobDetails | None:
    """The newest submission of the job, if there is one."""
    own = [item for item in client.list_jobs() if item.submission_id and _number(job, item.submission_id)]
    return max(own, key=lambda item: _number(job, item.submission_id), default=None)


def _number(job: Job, submission_id: str) -> int:
    found = re.fullmatch(re.escape(job.name) + r"-(\d+)", submission_id)
    return int(found[1]) if found else 0


def pack(run: config.Run, folder: str, most_bytes: int = MOST_BYTES) -> None:
    """Fill `folder` with the packages' sources, `run.yaml` and the file of its `tune.space`, if it is one.

    Raises UserError above `most_bytes`.
    """
    root = Path(lum_ray.__file__).parents[1]
    for name in PACKAGES:
        if (root / name).is_dir():
            shutil.copytree(root / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__", ".*"))
    if _is_file(run.tune.space):
        space = Path("spaces", os.path.basename(run.tune.space))
        Path(folder, space).parent.mkdir()
        shutil.copy(run.tune.space, Path(folder, space))
        run = replace(run, tune=replace(run.tune, space=str(space)))
    Path(folder, "run.yaml").write_text(yaml.safe_dump(config.dump(run), sort_keys=False), encoding="utf-8")
    sizes = {path: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    if sum(sizes.values()) > most_bytes:
        large = sorted(sizes, key=lambda path: -sizes[path])[:5]
        shown = ", ".join(f"{path.relative_to(folder)} {sizes[path] / 2**20:.1f} MiB" for path in large)
        raise UserError(
            f"the working directory has {sum(sizes.values()) / 2**20:.0f} MiB, at most {most_bytes / 2**20:.0f} are "
            f"sent with a job; data belong into the object store. The largest: {shown}"
        )


def _is_file(space: str) -> bool:
    return space not in BUILT_IN and os.path.isfile(space)


def follow(client: JobSubmissionClient, job: Job, submission_id: str, say: Say, wait_s: float) -> Outcome:
    """Write the job's log to stderr until it ends.

    Raises UserError where it is not started within `wait_s`, the cluster is out of reach for RECONNECT_S, or has
    forgotten the job. The job itself goes on then, and on KeyboardInterrupt.
    """
    log = _Log()
    reached_at = started_waiting_at = time.monotonic()
    said_at = -20.0
    while True:
        try:
            info = client.get_job_info(submission_id)
            reached_at = time.monotonic()
            if info.status == JobStatus.PENDING:
                waited = time.monotonic() - started_waiting_at
                if waited > wait_s:
                    raise UserError(
                        f"{submission_id}: not started after {wait_s:.0f} s ({info.message}); it stays queued: the "
                        "same command joins it, --stop ends it once it starts"
                    )
                if waited - said_at > 30:
                    say(f"waiting for a machine with room ({waited:.0f} s)")
                    said_at = waited
                time.sleep(POLL_S)
                continue
            asyncio.run(log.tail(client, submission_id))
            info = client.get_job_info(submission_id)
            if info.status.is_terminal():
                return _outcome(info, job, log.text_end)
        except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
            _give_up_after(reached_at, submission_id, error)
        except RuntimeError as error:
            if "does not exist" in str(error):
                raise UserError(
                    f"{submission_id}: the cluster has forgotten it (its head began anew without a fault-tolerant "
                    "GCS); the same command submits it anew, and it goes on from its artifacts"
                ) from error
            _give_up_after(reached_at, submission_id, error)
        time.sleep(POLL_S)


def _give_up_after(reached_at: float, submission_id: str, error: Exception) -> None:
    if time.monotonic() - reached_at > RECONNECT_S:
        raise UserError(
            f"{submission_id}: the cluster has been out of reach for {RECONNECT_S:.0f} s ({error}); the job may go on: "
            "the same command follows it again"
        ) from error


class _Log:
    """What has been written of a job's log; a new connection begins at its start, and only what is new is written."""

    def __init__(self) -> None:
        self.written = 0
        self.text_end = ""

    async def tail(self, client: JobSubmissionClient, submission_id: str) -> None:
        seen = 0
        async for lines in client.tail_job_logs(submission_id):
            new = lines[max(0, self.written - seen) :]
            seen += len(lines)
            if new:
                self.written += len(new)
                self.text_end = (self.text_end + new)[-20_000:]
                sys.stderr.write(new)
                sys.stderr.flush()


def _outcome(info: JobDetails, job: Job, text: str) -> Outcome:
    code = 0 if info.status == JobStatus.SUCCEEDED else (info.driver_exit_code or 1)
    return Outcome(str(info.submission_id), 128 - code if code < 0 else code, result_of(text, job.run.root))


def result_of(text: str, root: str) -> str:
    """The last line of a log that is a URI below the run's root, else its last line; it holds stdout and stderr."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    below = [line for line in lines if line.startswith(f"{root.rstrip('/')}/") and " " not in line]
    return (below or lines or [""])[-1]


def stop(client: JobSubmissionClient, job: Job, say: Say) -> None:
    """Ask the job's running submission to save its state and end, and wait until it has. Raises UserError if none.

    One that still waits for a machine cannot be taken back: Ray ends it when it starts.
    """
    last = latest(client, job)
    if last is None or last.status.is_terminal():
        raise UserError(f"{job.name}: --stop: no submission of this job is running")
    client.stop_job(str(last.submission_id))
    if last.status == JobStatus.PENDING:
        say(f"{last.submission_id} waits for a machine; it ends as soon as it has one")
        return
    say(f"stopping {last.submission_id}")
    deadline = time.monotonic() + STOP_WAIT_S + 30
    while not (status := client.get_job_status(str(last.submission_id))).is_terminal():
        if time.monotonic() > deadline:
            raise UserError(f"{last.submission_id}: still {status.value.lower()} {STOP_WAIT_S + 30} s after --stop")
        time.sleep(POLL_S)
    say(f"{last.submission_id} is {status.value.lower()}")


def options(arguments: Sequence[str] | None) -> tuple[str, ...]:
    """The options of a step, as they came after `--`. Raises UserError for those that the run itself decides, and for a
    space's file, which only the run takes along."""
    own = tuple(arguments or ())
    for option in own:
        if option.split("=")[0] in ("--root", "--set"):
            raise UserError(f"{option}: give it before `--`, so that the run and the job's name hold it")
    for option, value in zip(own, (*own[1:], "")):
        space = value if option == "--space" else option.removeprefix("--space=")
        if option.startswith("--space") and _is_file(space):
            raise UserError(f"--space {space}: a file of this machine; to send it along, give --set tune.space={space} "
                            "before `--`")  # fmt: skip
    return own
