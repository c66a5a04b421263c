"""Calls that arrive concurrently, as batches. Knows nothing of HTTP beyond a status, and nothing of Ray."""

from __future__ import annotations

import asyncio
import math
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from lum_ray.artifacts import UserError
from serve.types import Body, Reply, error_reply

T = TypeVar("T")
OVERLOADED = error_reply(503, "overloaded", "the model has enough to do; try again later")


class _Waiting(NamedTuple):
    method: str
    body: Body
    reply: asyncio.Future[Reply]


class Batcher:
    """Calls that wait while `in_flight` batches are under way go into the next one, with others of the same method.

    There is no timer: a call that finds a place goes at once, and the busier it is, the larger the batches get.
    `run(method, bodies)` gives a reply for each body; what it raises, each call of the batch raises. `most` bounds the
    work of a batch (`work`), but a larger call goes alone. A call is sent away where what waits or is
    under way (a call counts as one batch at most) has reached `room`, so that what is taken is answered soon; below it
    any call is taken, so that small ones do not shut out a large one. Belongs to one event loop.
    """

    def __init__(
        self,
        run: Callable[[str, list[Body]], Awaitable[list[Reply]]],
        most: int,
        in_flight: int = 1,
        room: float = math.inf,
    ) -> None:
        self.room = room
        self._run, self._most, self._free, self._under_way = run, most, in_flight, 0
        self._waiting: deque[_Waiting] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    async def call(self, method: str, body: Body) -> Reply:
        """The reply to one call, OVERLOADED at once where there is no room. A caller that is cancelled leaves the
        queue, and no batch waits for it."""
        held = self._under_way + self._held(waiting for waiting in self._waiting if not waiting.reply.done())
        if held >= self.room:
            return OVERLOADED
        waiting = _Waiting(method, body, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._start()
        return await waiting.reply

    def _held(self, calls: Iterable[_Waiting]) -> int:
        return sum(min(work(waiting.body), self._most) for waiting in calls)

    def _start(self) -> None:
        while self._free and (batch := self._next()):
            self._free -= 1
            self._under_way += self._held(batch)
            task = asyncio.get_running_loop().create_task(self._answer(batch))
            self._tasks.add(task)  # the loop itself holds a task by a weak reference only
            task.add_done_callback(self._tasks.discard)

    def _next(self) -> list[_Waiting]:
        """The call that has waited longest, and as many of its method as fit beside it."""
        batch: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        total = 0
        for waiting in self._waiting:
            if waiting.reply.done():  # given up
                continue
            size = work(waiting.body)
            if not batch or (waiting.method == batch[0].method and total + size <= self._most):
                batch.append(waiting)
                total += size
            else:
                left.append(waiting)
        self._waiting = left
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
            self._under_way -= self._held(batch)
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
