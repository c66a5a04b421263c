"""A deployed application and requests that schemathesis makes of the schema that it publishes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from lum_ray.config import Run
from lum_ray.data.state import State
from lum_ray.steps import publish, train
from serve.access import OPEN, new_token
from serve.app import Endpoint, run

MUTATED, FITTING = 1000, 300
DEADLINE = "X-Deadline-Ms"


def check(response: requests.Response, case: Any) -> None:
    told = (
        f"{case.method} {case.formatted_path} {case.query} {case.headers} {str(case.body)[:500]}: {response.text[:500]}"
    )
    for inside in ("Traceback", 'File "', "site-packages"):
        assert inside not in response.text, told
    # who allows a millisecond gets 504, as the schema says
    assert response.status_code < 500 or (response.status_code == 504 and DEADLINE in (case.headers or {})), told
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"code", "message", "field"}, told


@pytest.mark.ray
@pytest.mark.faults
def test_mutated_requests_are_refused_and_show_nothing_of_the_inside(
    ray_session: None, trained: Endpoint, tiny_gts: Run, tmp_path: Path
) -> None:
    token, line = new_token("test")
    (tmp_path / "tokens").write_text(line)
    gts = Endpoint(train(tiny_gts), publish(tiny_gts))
    assert trained.state and gts.state
    known = [State.open(trained.state).users()[0], State.open(gts.state).users()[0]]
    server = run([replace(trained, serve=replace(trained.serve, tokens=str(tmp_path / "tokens"))), gts], port=0)
    headers = {"Authorization": f"Bearer {token}"}
    statuses: dict[GenerationMode, Counter[int]] = {mode: Counter() for mode in GenerationMode}
    try:
        document = httpx.get(f"{server.url}/openapi.json", headers=headers).json()
        operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
        assert {operation.path for operation in operations} == set(document["paths"])
        for operation in operations:
            refused = requests.request(operation.method, server.url + operation.path, json={}, timeout=30)
            assert (refused.status_code == 401) == (operation.path not in OPEN), operation.path
        asked = [operation for operation in operations if operation.path not in OPEN]
        for mode, total in ((GenerationMode.NEGATIVE, MUTATED), (GenerationMode.POSITIVE, FITTING)):
            for number, operation in enumerate(asked):
                few = settings(
                    max_examples=-(-total // len(asked)), database=None, deadline=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )  # fmt: skip

                @few
                @seed(number)
                @given(case=operation.as_strategy(generation_mode=mode))
                def send(case: Any, mode: GenerationMode = mode) -> None:
                    if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
                        for user in case.body.get("users", ()):  # one that the model has something to say of
                            user["user"] = known["/gts/" in case.path]
                    response = case.call(base_url=server.url, headers=headers, timeout=60)
                    statuses[mode][response.status_code] += 1
                    check(response, case)
                    if sum(statuses[mode].values()) % 10 == 0:
                        assert case.call(base_url=server.url, timeout=60).status_code == 401

                send()
    finally:
        server.stop()
        print({str(mode): dict(sorted(found.items())) for mode, found in statuses.items()})
    assert sum(statuses[GenerationMode.NEGATIVE].values()) >= MUTATED
