"""More than a server can take: it serves what it can as quickly as ever, sends the rest away at once, and grows."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import httpx
import numpy as np
import psutil
import pytest
from ray import serve

from lum_ray.data.state import State
from serve.app import NAME, Endpoint, Server, run

SECONDS, TIMES = 60.0, 3
USERS = 128  # of a call: the model has more to do than HTTP, as in a server whose model is at its limit
PATH = "/v1/lumos/predict"


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[Server]:
    server = run([endpoint], port=0)
    try:
        yield server
    finally:
        server.stop()


def body_of(endpoint: Endpoint) -> bytes:
    assert endpoint.state
    users = State.open(endpoint.state).users()
    return json.dumps({"users": [{"user": users[i % len(users)]} for i in range(USERS)]}).encode()


@dataclass
class Seen:
    """Latencies in seconds by status, and what was no answer."""

    took_s: dict[int, list[float]] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)

    def p99_s(self, *statuses: int) -> float:
        return float(np.quantile(np.concatenate([self.took_s.get(status, []) for status in statuses]), 0.99))

    def counts(self) -> dict[int, int]:
        return {status: len(took_s) for status, took_s in sorted(self.took_s.items())}


async def ask(client: httpx.AsyncClient, body: bytes, seen: Seen) -> None:
    begin = time.perf_counter()
    try:
        response = await client.post(PATH, content=body, headers={"Content-Type": "application/json"})
        seen.took_s.setdefault(response.status_code, []).append(time.perf_counter() - begin)
    except httpx.TransportError as error:
        seen.lost[repr(error)] += 1


async def in_turn(client: httpx.AsyncClient, body: bytes, seconds: float, clients: int = 1) -> Seen:
    """What `clients` see that ask without a pause."""
    seen, end = Seen(), time.perf_counter() + seconds

    async def one() -> None:
        while time.perf_counter() < end:
            await ask(client, body, seen)

    await asyncio.gather(*(one() for _ in range(clients)))
    return seen


async def at_a_rate(client: httpx.AsyncClient, body: bytes, seconds: float, per_s: float) -> Seen:
    """What is seen where requests come at a rate, whether or not the earlier ones are answered."""
    seen, begin = Seen(), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(int(seconds * per_s)):
            await asyncio.sleep(max(0.0, begin + number / per_s - time.perf_counter()))
            group.create_task(ask(client, body, seen))
    return seen


def memory_mib() -> float:
    """Resident memory of the replicas and proxies of this session."""
    resident = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(("ray::ServeReplica", "ray::ProxyActor")):
                resident += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return resident / 2**20


@pytest.mark.ray
@pytest.mark.faults
def test_three_times_what_it_can_take(ray_session: None, trained: Endpoint) -> None:
    endpoint = replace(trained, serve=replace(trained.serve, ingress_replicas=2))
    body = body_of(endpoint)

    async def scenario(url: str) -> tuple[Seen, float, Seen, list[float], Seen]:
        async with httpx.AsyncClient(base_url=url, timeout=30.0, limits=httpx.Limits(max_connections=None)) as client:
            await in_turn(client, body, 3)
            alone = await in_turn(client, body, 15)
            # one is at work and one waits
            capacity = len((await in_turn(client, body, 10, clients=2)).took_s[200]) / 10
            memory = [memory_mib()]

            async def watch() -> None:
                while True:
                    await asyncio.sleep(5)
                    memory.append(memory_mib())

            watching = asyncio.create_task(watch())
            overloaded = await at_a_rate(client, body, SECONDS, TIMES * capacity)
            watching.cancel()
            await asyncio.sleep(5)
            after = await in_turn(client, body, 5)
        return alone, capacity, overloaded, memory, after

    with serving(endpoint) as server:
        alone, capacity, overloaded, memory, after = asyncio.run(scenario(server.url))
    print(
        f"alone: p99 {1000 * alone.p99_s(200):.0f} ms; capacity {capacity:.1f} requests/s; "
        f"at {TIMES} times for {SECONDS:.0f} s: {overloaded.counts()}, lost {dict(overloaded.lost)}, "
        f"p99 of accepted {1000 * overloaded.p99_s(200):.0f} ms, "
        f"of refused {1000 * overloaded.p99_s(429, 503):.0f} ms; "
        f"memory {', '.join(f'{one:.0f}' for one in memory)} MiB; after: p99 {1000 * after.p99_s(200):.0f} ms"
    )
    assert set(overloaded.took_s) <= {200, 429, 503}
    assert not overloaded.lost
    assert len(overloaded.took_s[200]) >= 0.7 * capacity * SECONDS  # what is refused costs little
    assert overloaded.p99_s(200) <= 3 * alone.p99_s(200)
    assert overloaded.p99_s(429, 503) <= alone.p99_s(200)
    assert max(memory) <= memory[0] + 128
    assert set(after.took_s) == {200}
    assert after.p99_s(200) <= 1.5 * alone.p99_s(200)


@pytest.mark.ray
@pytest.mark.faults
def test_it_grows_and_shrinks_with_the_load(ray_session: None, trained: Endpoint) -> None:
    settings = replace(trained.serve, max_replicas=2, upscale_delay_s=3.0, downscale_delay_s=10.0)
    endpoint = replace(trained, serve=settings)
    body = body_of(endpoint)
    begin = time.monotonic()
    changes: list[tuple[float, dict[str, int]]] = []

    def replicas() -> dict[str, int]:
        states = serve.status().applications[NAME].deployments["lumos"].replica_states
        found = {str(getattr(state, "value", state)): count for state, count in states.items()}
        if not changes or changes[-1][1] != found:
            changes.append((time.monotonic() - begin, found))
        return found

    async def until(url: str, running: int, clients: int) -> Seen:
        seen, done = Seen(), asyncio.Event()

        async def client_of(client: httpx.AsyncClient) -> None:
            while not done.is_set():
                await ask(client, body, seen)
                await asyncio.sleep(0.05)

        async with httpx.AsyncClient(base_url=url, timeout=60.0) as client, asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client_of(client))
            deadline = time.monotonic() + 120
            while await asyncio.to_thread(replicas) != {"RUNNING": running}:
                assert time.monotonic() < deadline, (running, changes)
                await asyncio.sleep(0.5)
            done.set()
        return seen

    with serving(endpoint) as server:
        asyncio.run(until(server.url, 1, 0))
        up = asyncio.run(until(server.url, 2, 4))
        asyncio.run(until(server.url, 1, 0))
        again = asyncio.run(until(server.url, 1, 1))
    told = ", ".join(f"{at_s:.0f} s {found}" for at_s, found in changes)
    print(f"replicas of the model: {told}; answers while it grew: {up.counts()}")
    assert set(up.took_s) <= {200, 503} and not up.lost
    assert set(again.took_s) <= {200} and not again.lost
