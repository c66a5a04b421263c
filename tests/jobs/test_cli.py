"""The command: what goes to stdout, exit codes, messages without a trace."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.cohorts import shares
from jobs.run_file import commented
from lum_ray import catalog, presets
from lum_ray.artifacts import UserError
from lum_ray.config import Run
from serve.access import read_tokens


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        capture_output=True, text=True, timeout=240, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_init_writes_a_file_that_is_the_preset(name: str) -> None:
    text = commented(presets.PRESETS[name]())
    assert text.count("# ") > 15
    assert catalog.read_run(yaml.safe_load(text)) == presets.PRESETS[name]()


def test_the_last_line_on_stdout_is_the_uri(tiny: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(commented(tiny))
    done = command("prepare", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {str(path) for path in (Path(tiny.root) / "timelines").iterdir()}
    assert "users: 200" in done.stderr
    job = subprocess.run([sys.executable, "-m", "jobs.train", str(file)], capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, job.stderr
    assert job.stdout.strip().startswith(f"{tiny.root}/checkpoints/lumos_tiny-")


def test_errors_are_one_message_and_exit_code_one(tmp_path: Path) -> None:
    done = command("train", str(tmp_path / "no.yaml"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no such run file; write one with `lum-ray init" in done.stderr
    assert "Traceback" not in done.stderr
    done = command("validate", "lumos_tiny", "--root", str(tmp_path), "--set", "lumos.widht=3")
    assert done.returncode == 1
    assert "lumos.widht: unknown key; did you mean `width`?" in done.stderr


def test_ctrl_c_says_that_the_command_goes_on(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "jobs.cli", "train", "lumos_tiny", "--root", str(tmp_path),
             "--set", "train.steps=100000", "--set", "data.engine=local"]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any("train: step" in line for line in process.stderr)  # its loop listens, whatever CI's shell ignores
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, said.splitlines()[-1]) == (
        130, "stopped; the same command goes on from the last checkpoint",
    )  # fmt: skip


def test_wrong_usage_is_exit_code_two() -> None:
    assert command("trian").returncode == 2


def test_shares() -> None:
    assert shares("treatment:0.5,control:0.5") == {"treatment": 0.5, "control": 0.5}
    assert shares("") == {}
    with pytest.raises(UserError, match="expected shares such as"):
        shares("treatment=0.5")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lightgbm", "--max-users", "9"), "leave out --max-users and --by-cohort"),
        (("--seeds", "3"), "only --lightgbm trains several"),
    ],
)
def test_options_that_do_not_go_together_are_refused_and_not_ignored(words: tuple[str, ...], said: str) -> None:
    done = command("evaluate", "lumos_tiny", *words)
    assert done.returncode == 1
    assert said in done.stderr


def test_lists_of_items_by_any_reading(tiny_gts: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(commented(tiny_gts))
    done = command("predict", str(file), "--reading", "retrieve", "--reading", "rerank", "-k", "3", "--unseen")
    assert done.returncode == 0, done.stderr
    table = pq.read_table(f"{done.stdout.strip()}/rankings")
    assert set(table["reading"].to_pylist()) == {"retrieve", "rerank"} and set(table["rank"].to_pylist()) == {1, 2, 3}
    assert all(table["seen_filter"].to_pylist())
    refused = command("predict", "lumos_tiny", "--root", str(tmp_path), "-k", "3")
    assert refused.returncode == 1 and "--reading, -k and --unseen are for runs of GTS-LUM" in refused.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--with", "gts_demo"), "expected a run of the other model"),
        (("--set", "serve.host=0.0.0.0"), "there are no tokens"),
        (("--set", "serve.tokens=nothing"), "serve.tokens: nothing: no such file"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_trained(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    done = command("serve", "gts_tiny", "--root", str(tmp_path), *words)
    assert done.returncode == 1 and said in done.stderr
    assert not list(tmp_path.iterdir())


def test_labels_are_for_the_model_that_has_heads_for_them(tmp_path: Path) -> None:
    done = command("label", "lumos_tiny", "--labels", "nowhere", "--root", str(tmp_path))
    assert done.returncode == 1 and "label: expected a run of GTS-LUM" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_token_is_shown_beside_the_line_that_is_stored(tmp_path: Path) -> None:
    done = command("token", "shop")
    place = tmp_path / "tokens"
    place.write_text(done.stdout)
    token = done.stderr.split()[-1]
    assert token not in done.stdout
    assert [(one.name, one.sha256) for one in read_tokens(str(place))] == [
        ("shop", hashlib.sha256(token.encode()).hexdigest())
    ]
