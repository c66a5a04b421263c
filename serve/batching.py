"""Calls that arrive concurrently, as batches. Knows nothing of HTTP beyond a status, and nothing of Ray."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from lum_ray.artifacts import UserError
from serve.types import Body, Reply, error_reply

T = TypeVar("T")
OVERLOADED = error_reply(503, "overloaded", "a whole batch is waiting already; try again later")


class _Waiting(NamedTuple):
    method: str
    body: Body
    reply: asyncio.Future[Reply]


class Batcher:
    """Calls that wait while `in_flight` batches are under way go into the next one, with others of the same method.

    There is no timer: a call that finds a place goes at once, and the busier it is, the larger the batches get.
    `run(method, bodies)` gives a reply for each body; what it raises, each call of the batch raises. `most` bounds the
    work that waits (`work`), and so that of a batch, but a larger call may wait alone; what comes beyond is sent away,
    so that what is taken is answered soon. Belongs to one event loop.
    """

    def __init__(self, run: Callable[[str, list[Body]], Awaitable[list[Reply]]], most: int, in_flight: int = 1) -> None:
        self._run, self._most, self._free = run, most, in_flight
        self._waiting: list[_Waiting] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def call(self, method: str, body: Body) -> Reply:
        """The reply to one call, OVERLOADED at once where too much waits. A caller that is cancelled leaves the
        queue, and no batch waits for it."""
        if not self.takes(work(body)):
            return OVERLOADED
        waiting = _Waiting(method, body, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._start()
        return await waiting.reply

    def takes(self, size: int) -> bool:
        """Whether so much work, in one call or several, may wait."""
        ahead = sum(work(waiting.body) for waiting in self._waiting if not waiting.reply.done())
        return not ahead or ahead + size <= self._most

    def _start(self) -> None:
        while self._free and (batch := self._next()):
            self._free -= 1
            task = asyncio.get_running_loop().create_task(self._answer(batch))
            self._tasks.add(task)  # the loop itself holds a task by a weak reference only
            task.add_done_callback(self._tasks.discard)

    def _next(self) -> list[_Waiting]:
        """The call that has waited longest, and all others of its method: what waits fits into a batch."""
        waiting = [one for one in self._waiting if not one.reply.done()]  # the others have given up
        batch = [one for one in waiting if one.method == waiting[0].method]
        self._waiting = [one for one in waiting if one.method != waiting[0].method]
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        try:
            replies = await self._run(batch[0].method, [waiting.body for waiting in batch])
            for waiting, reply in zip(batch, replies, strict=True):
                if not waiting.reply.done():
                    waiting.reply.set_result(reply)
        except BaseException as error:
            for waiting in batch:
                if not waiting.reply.done():
                    waiting.reply.set_exception(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._free += 1
            self._start()


def work(body: Body) -> int:
    """How many predictions a call asks for: users, times scenarios or items."""
    times = 1 + len(body.get("scenarios", ())) + len(body.get("items", ()))
    return len(body.get("users", (None,))) * times


def merged(calls: Sequence[Sequence[Any]], run: Callable[[Sequence[Any]], list[T]]) -> list[list[T] | UserError]:
    """`run` on the requests of all calls at once: for each call its part of the results, or its own error.

    A call that the merged batch is refused for is run again alone, so that its error counts its own users and shows
    nobody else's, and the others are run without it.
    """
    outcomes: dict[int, list[T] | UserError] = {}

    def alone(i: int) -> None:
        try:
            outcomes[i] = run(calls[i])
        except UserError as error:
            outcomes[i] = error

    left = list(range(len(calls)))
    while len(left) > 1:
        try:
            results = run([request for i in left for request in calls[i]])
        except UserError as error:
            named = {int(index) for index in re.findall(r"users\[(\d+)\]", str(error))}
            owner = [i for i in left for _ in calls[i]]
            culprits = {owner[index] for index in named if index < len(owner)} or set(left)
            for i in culprits:
                alone(i)
            left = [i for i in left if i not in culprits]
            continue
        start = 0
        for i in left:
            outcomes[i] = results[start : start + len(calls[i])]
            start += len(calls[i])
        left = []
    for i in left:
        alone(i)
    return [outcomes[i] for i in range(len(calls))]
