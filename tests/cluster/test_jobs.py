"""`lum-ray submit` against a real head: what it refuses, joins, follows, and returns."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs import submit
from lum_ray import catalog, config, presets
from lum_ray.artifacts import UserError
from lum_ray.weights import steps
from tests.cluster.nodes import Head

pytestmark = [pytest.mark.ray, pytest.mark.faults]  # a job takes 18 s to start
WAIT_S = 120.0


def tiny(root: Path, *assignments: str) -> config.Run:
    raw = config.override(config.dump(presets.lumos_tiny()), [f"root={root}", "data.engine=local", *assignments])
    return catalog.read_run(raw)


@pytest.fixture
def client(head: Head, monkeypatch: pytest.MonkeyPatch) -> JobSubmissionClient:
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    return submit.connect(head.address)


@pytest.fixture
def said() -> list[str]:
    return []


def test_two_who_submit_one_job_at_once_get_one_run_and_the_same_answer(
    client: JobSubmissionClient, head: Head, tmp_path: Path, capfd: pytest.CaptureFixture[str], said: list[str]
) -> None:
    job = submit.Job(tiny(tmp_path), "prepare")
    outcomes: list[submit.Outcome] = []
    start = threading.Barrier(2)

    def one() -> None:
        start.wait()
        outcomes.append(submit.run(job, submit.connect(head.address), said.append, None, False, WAIT_S))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = str(next((tmp_path / "timelines").iterdir()))
    assert outcomes == [submit.Outcome(f"{job.name}-1", 0, made)] * 2
    assert [item for item in said if "submitted lumos" in item] == [f"submitted {job.name}-1"]
    assert any("joining it" in item for item in said)
    assert "users: 200" in capfd.readouterr().err
    # once more: nothing runs, and the answer is the same
    begin = time.monotonic()
    assert submit.run(job, client, said.append, None, False, WAIT_S) == outcomes[0]
    assert time.monotonic() - begin < 5
    assert said[-1] == f"{job.name}-1 is finished; --again runs it anew, as after new events"


def test_the_exit_code_is_the_jobs_own_and_a_failed_job_is_submitted_anew(
    head: Head, client: JobSubmissionClient, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "jobs.cli", "submit", "lumos_tiny", "prepare", "--root", str(tmp_path),
        "--address", head.address, "--", "--nonsense",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "RAY_AUTH_TOKEN": head.token}
    )
    assert done.returncode == 2, done.stderr
    assert "No such option" in done.stderr and "-1 ended with exit code 2" in done.stderr
    assert done.stdout == ""
    run = catalog.read_run(config.override(config.dump(presets.lumos_tiny()), [f"root={tmp_path}"]))
    again = submit.Job(run, "prepare", ("--nonsense",))
    assert submit.submit(again, client, lambda text: None).submission_id == f"{again.name}-2"


def test_what_can_never_be_placed_is_refused_before_anything_is_submitted(
    client: JobSubmissionClient, tmp_path: Path, said: list[str]
) -> None:
    before = len(client.list_jobs())
    for assignments, text in [
        (["train.workers=9"], r"10 CPUs, of which there are 3 \(the cluster has 1 machine with 3 CPUs and 0 GPUs"),
        (["train.device=cuda"], "1 GPUs, each with a CPU on its machine, of which there are 0"),
    ]:
        with pytest.raises(UserError, match=text):
            submit.submit(submit.Job(tiny(tmp_path, *assignments), "train"), client, said.append)
    with pytest.raises(UserError, match=r"root: runs: expected s3://bucket/path, or an absolute path"):
        submit.submit(submit.Job(tiny(Path("runs")), "train"), client, said.append)
    assert len(client.list_jobs()) == before


def test_a_token_that_is_missing_or_wrong_is_said(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(UserError, match="the cluster wants a token, and RAY_AUTH_TOKEN is not set"):
        submit.connect(head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 48)
    with pytest.raises(UserError, match="the one in RAY_AUTH_TOKEN was refused"):
        submit.connect(head.address)


@pytest.fixture
def training(client: JobSubmissionClient, tmp_path: Path) -> Iterator[tuple[submit.Job, Path]]:
    """A long training that has been submitted and has written its first checkpoint."""
    job = submit.Job(
        tiny(tmp_path, "train.steps=4000", "train.checkpoint_every=5", "train.validate_every=2000"), "train"
    )
    submit.submit(job, client, lambda text: None)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        found = list((tmp_path / "checkpoints").glob("*/last")) if (tmp_path / "checkpoints").is_dir() else []
        if found and steps(str(found[0])):
            break
        time.sleep(0.5)
    else:
        raise TimeoutError(client.get_job_logs(f"{job.name}-1"))
    yield job, found[0]
    submit.stop(client, job, lambda text: None)


def test_a_stopped_training_saves_and_the_next_submission_goes_on(
    client: JobSubmissionClient, training: tuple[submit.Job, Path], said: list[str]
) -> None:
    job, last = training
    submit.stop(client, job, said.append)
    assert said == [f"stopping {job.name}-1", f"{job.name}-1 is stopped"]
    step = steps(str(last))[0].step
    info = submit.submit(job, client, said.append)
    assert info.submission_id == f"{job.name}-2"
    deadline = time.monotonic() + WAIT_S
    while f"resumed at step {step} of 4000" not in (log := client.get_job_logs(f"{job.name}-2")):
        assert time.monotonic() < deadline and not client.get_job_status(f"{job.name}-2").is_terminal(), log
        time.sleep(0.5)


def test_ctrl_c_detaches_and_the_job_goes_on(
    head: Head, client: JobSubmissionClient, training: tuple[submit.Job, Path], tmp_path: Path
) -> None:
    job, _ = training
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.dump(job.run)))
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "submit", str(file), "train", "--address", head.address],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "RAY_AUTH_TOKEN": head.token},
    )  # fmt: skip
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(3)]
    process.send_signal(2)
    rest = process.stderr.read()
    assert process.wait(30) == 130
    assert "joining it" in "".join(lines) and "goes on; the same command follows it again" in rest
    assert client.get_job_status(f"{job.name}-1") == JobStatus.RUNNING


def test_a_job_that_finds_no_room_is_not_waited_for_without_end(
    client: JobSubmissionClient, tmp_path: Path, said: list[str]
) -> None:
    other = client.submit_job(entrypoint="sleep 300", entrypoint_num_cpus=3)
    while client.get_job_status(other) != JobStatus.RUNNING:
        time.sleep(0.2)
    job = submit.Job(tiny(tmp_path), "publish")
    with pytest.raises(UserError, match=r"publish-\w+-1: not started after 3 s .*; it stays queued"):
        submit.run(job, client, said.append, None, False, 3.0)
    submit.stop(client, job, said.append)
    assert said[-1] == f"{job.name}-1 waits for a machine; it ends as soon as it has one"
    client.stop_job(other)
    deadline = time.monotonic() + WAIT_S
    while not (status := client.get_job_status(f"{job.name}-1")).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert status == JobStatus.STOPPED
    assert not list(tmp_path.iterdir())


def test_the_steps_of_rayjob_yaml_run_with_two_workers(client: JobSubmissionClient, tmp_path: Path) -> None:
    document = yaml.safe_load((Path(__file__).parents[2] / "cluster/rayjob.yaml").read_text())
    entrypoint = document["spec"]["entrypoint"].replace("/etc/lum-ray/", "").replace("device=cuda", "device=cpu")
    folder = tmp_path / "packed"
    submit.pack(tiny(tmp_path / "runs", "train.workers=2", "data.engine=auto"), str(folder))
    number = client.submit_job(
        entrypoint=entrypoint,
        runtime_env={"working_dir": str(folder)},
        entrypoint_num_cpus=document["spec"]["entrypointNumCpus"],
    )
    deadline = time.monotonic() + 240
    while not (status := client.get_job_status(number)).is_terminal() and time.monotonic() < deadline:
        time.sleep(1)
    log = client.get_job_logs(number)
    assert status == JobStatus.SUCCEEDED, log
    assert "2 worker(s)" in log and "already trained" in log
    made = {path.name for path in (tmp_path / "runs").iterdir()}
    assert {"timelines", "fitted", "checkpoints", "reports", "state"} <= made
