"""What is sent with a job, what it is called, and what is read from its log; the rest is in tests/cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.submit import STEPS, Job, connect, options, pack, result_of
from lum_ray import catalog, config, presets
from lum_ray.artifacts import UserError
from tuning.spaces import load_space


def tiny(*assignments: str) -> config.Run:
    return catalog.read_run(config.override(config.dump(presets.lumos_tiny()), ["root=s3://b/runs", *assignments]))


def test_what_is_sent_is_small_and_runs_by_itself(tmp_path: Path) -> None:
    run = tiny("train.steps=7")
    pack(run, str(tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5 << 20
    assert {path.relative_to(tmp_path).parts[0] for path in files} <= {"lum_ray", "jobs", "serve", "tuning", "run.yaml"}
    assert not [path for path in files if path.suffix == ".pyc"]
    assert catalog.load_run(str(tmp_path / "run.yaml")) == run
    script = "import lum_ray, jobs.cli, serve; print(lum_ray.__file__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(tmp_path / "lum_ray/__init__.py"), done.stderr


def test_the_file_of_a_space_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, sent = tmp_path / "mine.yaml", tmp_path / "sent"
    file.write_text("train.learning_rate: {log: [0.001, 0.01]}\n")
    sent.mkdir()
    pack(tiny(f"tune.space={file}"), str(sent))
    file.unlink()
    monkeypatch.chdir(sent)  # where a job runs
    there = catalog.load_run("run.yaml")
    assert load_space(there.tune.space, there).name == "mine"


def test_a_file_that_would_stay_here_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.touch()
    for given in (["--space", str(file)], ["--trials", "3", f"--space={file}"]):
        with pytest.raises(UserError, match=f"a file of this machine; .* --set tune.space={file} before `--`"):
            options(given)
    assert options(["--space", "quick"]) == ("--space", "quick")


def test_what_is_too_large_is_refused_with_what_is_large(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has \d+ MiB, at most 0 are sent with a job.*The largest: \S+ 0\.\d MiB, "):
        pack(tiny(), str(tmp_path), most_bytes=1000)


def test_a_job_is_named_by_what_it_does() -> None:
    names = {
        Job(tiny(), "train").name,
        Job(tiny(), "evaluate").name,
        Job(tiny("train.steps=7"), "train").name,
        Job(tiny("root=s3://b/other"), "train").name,
        Job(tiny(), "train", ("--fresh",)).name,
    }
    assert len(names) == 5
    assert Job(tiny(), "train").name in names


def test_each_step_is_a_module_of_its_own() -> None:
    there = [step for step in STEPS if (Path(__file__).parents[2] / f"jobs/{step}.py").exists()]
    assert set(STEPS) - set(there) <= {"tune"}


def test_the_result_is_the_last_uri_below_the_root() -> None:
    log = "· training\ns3://b/runs/checkpoints/a-1\nWARNING: process group was not destroyed\n"
    assert result_of(log, "s3://b/runs") == "s3://b/runs/checkpoints/a-1"
    assert result_of("s3://elsewhere/events\n\n", "s3://b/runs") == "s3://elsewhere/events"
    assert result_of("", "s3://b/runs") == ""


def test_the_run_is_said_before_the_options() -> None:
    assert options(["--cut", "300"]) == ("--cut", "300")
    with pytest.raises(UserError, match=r"--set=train.steps=3: give it before `--`"):
        options(["--set=train.steps=3"])


def test_nothing_at_the_address_is_said() -> None:
    with pytest.raises(UserError, match=r"--address http://127.0.0.1:9: expected the dashboard of a Ray cluster"):
        connect("http://127.0.0.1:9")
