"""A deployed application and requests that schemathesis makes of the schema that it publishes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
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


def each(operation: Any, mode: GenerationMode, count: int, send: Callable[[Any], None]) -> None:
    """`send` so many requests of this operation, the same ones every time."""

    @seed(0)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        send(case)

    one()


def ask(url: str, token: str, known: Sequence[str]) -> dict[str, Counter[int]]:
    """Requests that break the schema, and some that keep it; how often each status came."""
    headers = {"Authorization": f"Bearer {token}"}
    document = httpx.get(f"{url}/openapi.json", headers=headers).json()
    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert {operation.path for operation in operations} == set(document["paths"])
    for operation in operations:
        refused = requests.request(operation.method, url + operation.path, json={}, timeout=30)
        assert (refused.status_code == 401) == (operation.path not in OPEN), operation.path
    statuses: dict[str, Counter[int]] = {"mutated": Counter(), "fitting": Counter(), "without a token": Counter()}

    def mutated(case: Any) -> None:
        response = case.call(base_url=url, headers=headers, timeout=60)
        statuses["mutated"][response.status_code] += 1
        check(response, case)
        if statuses["mutated"].total() % 10 == 0:
            response = case.call(base_url=url, timeout=60)
            statuses["without a token"][response.status_code] += 1
            check(response, case)

    def fitting(case: Any) -> None:
        if isinstance(case.body, dict):
            for user in case.body["users"]:  # one that the model has something to say of
                user["user"] = known["/gts/" in case.path]
        response = case.call(base_url=url, headers=headers, timeout=60)
        statuses["fitting"][response.status_code] += 1
        check(response, case)

    asked = [operation for operation in operations if operation.path not in OPEN]
    for operation in asked:
        each(operation, GenerationMode.NEGATIVE, 1 + MUTATED // len(asked), mutated)
        each(operation, GenerationMode.POSITIVE, 1 + FITTING // len(asked), fitting)
    return statuses


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
    try:
        statuses = ask(server.url, token, known)
    finally:
        server.stop()
    print({name: dict(sorted(found.items())) for name, found in statuses.items()})
    assert statuses["mutated"].total() >= MUTATED
    assert set(statuses["without a token"]) == {401}
    assert statuses["fitting"][200]
