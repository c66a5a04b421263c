"""Dashboards and alarms ask only for metrics that a running Ray with our training and serving exports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.cluster.nodes import Head

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"\bray_(?!io_)[a-z0-9_]+")
WAIT_S = 240.0


def listed() -> tuple[set[str], set[str]]:
    """The committed names: those of every machine, those of machines with a GPU."""
    everywhere, gpu = (ROOT / "cluster/metrics.txt").read_text().split("# GPU\n")
    return {line for line in everywhere.splitlines() if not line.startswith("#")}, set(gpu.split())


def asked() -> set[str]:
    board = json.loads((ROOT / "cluster/grafana/lum_ray.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    queries += [item["query"] for item in board["templating"]["list"]]
    rules = yaml.safe_load((ROOT / "cluster/alerts.yaml").read_text())
    queries += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    found = {name for query in queries for name in NAME.findall(query)}
    return {re.sub(r"_(bucket|sum|count)$", "", name) if name not in set().union(*listed()) else name for name in found}


def test_what_is_asked_for_is_what_is_listed() -> None:
    everywhere, gpu = listed()
    assert asked() == everywhere | gpu


def test_gpu_metrics_are_those_of_the_installed_ray() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    assert {name.removeprefix("ray_") for name in listed()[1]} <= set(METRICS_GAUGES)


def test_every_alarm_is_in_the_runbook() -> None:
    rules = yaml.safe_load((ROOT / "cluster/alerts.yaml").read_text())
    names = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    runbook = (ROOT / "cluster/RUNBOOK.md").read_text()
    assert len(names) >= 8 and [name for name in names if f"`{name}`" not in runbook] == []


@pytest.mark.ray
@pytest.mark.faults
def test_a_running_ray_exports_what_is_listed(head: Head) -> None:
    wanted = listed()[0]
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.exporter"], cwd=ROOT, env=head.environment, stderr=subprocess.DEVNULL
    )
    seen: set[str] = set()
    try:
        deadline = time.monotonic() + WAIT_S
        while wanted - seen and time.monotonic() < deadline:
            time.sleep(1)
            # a figure is there only once after it was set, so what was seen before counts
            seen |= set(re.findall(r"^# TYPE (\S+)", httpx.get(head.metrics).text, re.M))
    finally:
        driver.terminate()
        driver.wait(30)
    assert wanted - seen == set()
