"""Closed-loop HTTP clients for the benchmark of serving: cheap enough that they do not slow what they measure.

Only addresses of this machine are asked.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Load:
    """What some clients saw: answers a second, CPU of the servers per answer, and latencies."""

    requests_per_s: float
    cpu_ms_per_request: float
    p50_ms: float
    p99_ms: float


def measure(url: str, bodies: Sequence[bytes], clients: int, seconds: float, warm_s: float, server_pid: int) -> Load:
    """`clients` ask in turn for `bodies` (POST `url`), each over one connection, its next when it has an answer.

    CPU is that of `server_pid` and all below it. A connection that the server closes between two requests, as HAProxy
    does where its replicas change, is opened anew. Raises RuntimeError for any answer that is not 200.
    """
    place = urlsplit(url)
    if place.hostname not in ("127.0.0.1", "::1", "localhost"):
        raise ValueError(f"{url}: only servers of this machine are asked")
    head = f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    requests = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
    return asyncio.run(_measure(place.hostname, place.port or 80, requests, clients, seconds, warm_s, server_pid))


async def _measure(
    host: str, port: int, requests: Sequence[bytes], clients: int, seconds: float, warm_s: float, server_pid: int
) -> Load:
    took_s: list[float] = []
    end = time.perf_counter() + warm_s + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        answered = False
        try:
            while (begin := time.perf_counter()) < end:
                writer.write(requests[number % len(requests)])
                try:
                    await _answer(reader)
                except asyncio.IncompleteReadError as error:
                    if error.partial or not answered:
                        raise
                    writer.close()
                    reader, writer = await asyncio.open_connection(host, port)
                    answered = False
                    continue
                answered = True
                number += clients
                took_s.append(time.perf_counter() - begin)
        finally:
            writer.close()

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    await asyncio.sleep(warm_s)
    took_s.clear()
    cpu, begin = cpu_s(server_pid), time.perf_counter()
    await asyncio.gather(*tasks)
    wall, used = time.perf_counter() - begin, cpu_s(server_pid) - cpu
    ordered = sorted(took_s)
    p50, p99 = (1000 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
    return Load(len(took_s) / wall, 1000 * used / len(took_s), p50, p99)


async def _answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    if b"content-length" not in fields:
        raise RuntimeError(f"expected an answer with its length, got {head[:200]!r}")
    body = await reader.readexactly(int(fields[b"content-length"]))
    if not head.split(b"\r\n", 1)[0].endswith(b"200 OK"):
        raise RuntimeError(f"expected 200, got {head[:60]!r} {body[:300]!r}")
    return body


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and of all that descend from it and live, with those of children that have ended."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)] = int(fields[1])
        used[int(entry.name)] = sum(map(int, fields[11:15])) / TICKS_PER_S
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return sum(used.get(one, 0.0) for one in below)
