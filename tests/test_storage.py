"""Stores against a real S3 server: what works there, what is said where it does not, and a server that goes away."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import deltalake
import pyarrow as pa
import pytest

from lum_ray import artifacts
from lum_ray.artifacts import UserError, join, storage
from tests import s3

ROOT = Path(__file__).parents[1]


def test_files_on_s3_are_as_local_ones(s3_root: str, tmp_path: Path) -> None:
    for root in (s3_root, str(tmp_path)):
        artifacts.write_json(join(root, "t", "a.json"), {"a": 1})
        artifacts.write_json(join(root, "t", "a.json"), {"a": 2})
        artifacts.write_bytes(join(root, "t", "deep", "b.bin"), b"12")
        artifacts.write_bytes(join(root, "t", "_hidden"), b"")
        assert artifacts.read_json(join(root, "t", "a.json")) == {"a": 2}
        assert artifacts.list_files(join(root, "t")) == [f"{root}/t/a.json", f"{root}/t/deep/b.bin"]
        assert artifacts.list_files(join(root, "t"), ".bin") == [f"{root}/t/deep/b.bin"]
        before = artifacts.fingerprint(join(root, "t"))
        assert [row[:2] for row in before] == [["a.json", 12], ["deep/b.bin", 2]]
        assert artifacts.fingerprint(join(root, "t")) == before
        artifacts.write_bytes(join(root, "t", "deep", "b.bin"), b"21")
        assert artifacts.fingerprint(join(root, "t")) != before
        artifacts.remove(join(root, "t"))
        artifacts.remove(join(root, "t"))
        with pytest.raises(FileNotFoundError):
            artifacts.read_bytes(join(root, "t", "a.json"))
        with pytest.raises(UserError, match="found nothing"):
            artifacts.list_files(join(root, "t"))


def test_an_etag_is_the_content_whenever_it_was_written(s3_root: str) -> None:
    artifacts.write_bytes(join(s3_root, "a", "x"), b"same")
    artifacts.write_bytes(join(s3_root, "b", "x"), b"same")
    assert artifacts.fingerprint(join(s3_root, "a")) == artifacts.fingerprint(join(s3_root, "b"))


def test_large_files_go_in_pieces(s3_root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1 << 20) * 24)
    for uri in (join(s3_root, "large"), str(tmp_path / "deep" / "large")):
        artifacts.upload(str(source), uri)
        artifacts.download(uri, str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["large"]


def test_the_first_committer_wins_on_s3_too(s3_root: str) -> None:
    """Two processes, each a thread for each of 8 artifacts: all get the manifest of the one that won."""
    program = (
        "import sys, json, threading\n"
        "from lum_ray import artifacts\n"
        "root, me = sys.argv[1:]\n"
        "input()\n"
        "won = {}\n"
        "def race(i): won[i] = artifacts.commit(f'{root}/{i}', {'by': me}).manifest['by']\n"
        "threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(json.dumps([won[i] for i in range(8)]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, s3_root, name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
        )
        for name in ("one", "other")
    ]  # fmt: skip
    time.sleep(1.0)
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert said[0] == said[1]
    assert len(said[0]) > 20


@pytest.mark.parametrize(
    ("variables", "uri", "message"),
    [
        ({}, "s3://no-such-bucket/x", r"s3://no-such-bucket: expected a bucket, http://\S+ has none of that name"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "s3://lum-ray/x", r"refuses access \(the key 'nobody'\)"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "s3://lum-ray/x", r"refuses access .*check AWS_ACCESS_KEY_ID"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "s3://lum-ray/x",
            r"s3://lum-ray/x\S*: no good answer from http://127\.0\.0\.1:9 in \d s of trying: .*LUM_RAY_S3_RETRY_S",
        ),
        ({"AWS_ENDPOINT_URL": "127.0.0.1"}, "s3://lum-ray/x", r"AWS_ENDPOINT_URL: expected http://host:port"),
        ({"LUM_RAY_S3_RETRY_S": "soon"}, "s3://lum-ray/x", "LUM_RAY_S3_RETRY_S: expected seconds such as 60"),
        ({}, "gs://bucket/x", "expected a local path or s3://bucket/path, got the scheme 'gs'"),
        ({}, "s3://", "got no bucket"),
    ],
)
def test_what_is_wrong_with_a_store_is_said(
    s3_server: s3.Server, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], uri: str, message: str
) -> None:
    monkeypatch.setenv("LUM_RAY_S3_RETRY_S", "1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    started_at = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        artifacts.find(uri) if uri != "s3://" else storage(uri)
    assert time.monotonic() - started_at < 5
    assert "not-a-secret" not in str(caught.value)


def test_a_root_that_cannot_be_reached_is_one_line_on_the_command_line(s3_server: s3.Server) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "jobs.cli", "validate", "lumos_tiny", "--root", "s3://lum-ray/nowhere"]
    done = subprocess.run(
        command, env=environment | {"LUM_RAY_S3_RETRY_S": "0.5"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    assert "no good answer from http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_all_three_clients_work_over_tls(s3_server: s3.Server, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.tls_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    artifacts.write_bytes(join(s3_root, "x"), b"over tls")
    assert artifacts.read_bytes(join(s3_root, "x")) == b"over tls"
    assert artifacts.commit(join(s3_root, "c"), {"a": 1}) == artifacts.commit(join(s3_root, "c"), {"a": 2})
    assert len(artifacts.fingerprint(join(s3_root, "c"))) == 1
    write_delta(join(s3_root, "delta"))
    monkeypatch.setenv("LUM_RAY_S3_RETRY_S", "0.5")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/etc/ssl/certs/ca-certificates.crt")
    with pytest.raises(UserError, match="certificate"):
        artifacts.read_bytes(join(s3_root, "x"))


def write_delta(uri: str) -> int:
    options = dict(storage(uri).options)
    deltalake.write_deltalake(uri, pa.table({"a": [1]}), storage_options=options, mode="append")
    return int(deltalake.DeltaTable(uri, storage_options=options).version())


def test_a_server_that_goes_away_and_comes_back_is_waited_for(s3_server: s3.Server, s3_root: str) -> None:
    """Every kind of request is made while the server is down; all succeed once it is there again."""
    large = os.urandom(1 << 20) * 12
    artifacts.write_bytes(join(s3_root, "read"), large)
    artifacts.commit(join(s3_root, "old"), {"by": "before"})
    write_delta(join(s3_root, "delta"))
    found: dict[str, object] = {}
    work = {
        "read": lambda: artifacts.read_bytes(join(s3_root, "read")) == large,
        "write": lambda: artifacts.write_bytes(join(s3_root, "write"), large),
        "missing": lambda: artifacts.find(join(s3_root, "none")),
        "commit": lambda: artifacts.commit(join(s3_root, "new"), {"by": "me"}).manifest["by"],
        "lost": lambda: artifacts.commit(join(s3_root, "old"), {"by": "me"}).manifest["by"],
        "print": lambda: len(artifacts.fingerprint(join(s3_root, "old"))),
        "delta": lambda: write_delta(join(s3_root, "delta")),
    }

    def run(name: str) -> None:
        try:
            found[name] = work[name]()
        except BaseException as error:
            found[name] = error

    s3_server.kill()
    threads = [threading.Thread(target=run, args=(name,)) for name in work]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    assert not found
    s3_server.start()
    for thread in threads:
        thread.join(timeout=90)
    assert found == {
        "read": True, "write": None, "missing": None, "commit": "me", "lost": "before", "print": 1, "delta": 1,
    }  # fmt: skip
    assert artifacts.read_bytes(join(s3_root, "write")) == large
