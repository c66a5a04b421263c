"""A model in other processes, as `serve.ingress.create_app` asks for it: in batches, and no more than it can take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.batching import Batcher
from serve.ingress import UnavailableError
from serve.types import Body, Reply

log = logging.getLogger("lum_ray.serve")
BATCHES_IN_FLIGHT = 8
"""From one ingress replica to one model. What waits beyond them makes the next ones larger."""
BATCHES_HELD = 2
"""By all ingress replicas for each replica of a model: more would only wait there."""
COUNT_S = 2.0
ATTEMPTS, RETRY_S = 3, 0.1


class Remote:
    """A model's deployment as one ingress sees it: calls go in batches, and again where a replica dies.

    Every call only reads, so that to ask twice does no harm. A replica shall have one batch at work and one that waits:
    this ingress holds its `share` of that, and sends the rest away.
    """

    def __init__(self, handle: DeploymentHandle, max_batch: int, timeout_s: float, share: float = 1.0) -> None:
        self._handle, self._timeout_s = handle, timeout_s
        self._room = BATCHES_HELD * max_batch * share
        self._batcher = Batcher(self._replies, max_batch, BATCHES_IN_FLIGHT, self._room)
        self._watching: asyncio.Task[None] | None = None

    async def _watch(self) -> None:
        """Hold as much as the replicas that are running can take."""
        while True:
            try:
                status = await asyncio.to_thread(serve.status)
                states = status.applications[self._handle.app_name].deployments[self._handle.deployment_name]
                self._batcher.room = self._room * max(1, states.replica_states.get("RUNNING", 0))
            except Exception:
                log.exception("%s: cannot count its replicas; for as many as before", self._handle.deployment_name)
            await asyncio.sleep(COUNT_S)

    async def info(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._try("info")
        return found

    async def call(self, method: str, body: Body) -> Reply:
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        return await self._batcher.call(method, body)

    async def _replies(self, method: str, bodies: Sequence[Body]) -> list[Reply]:
        # each call has a deadline of its own; this one is for what nobody waits for any more
        async with asyncio.timeout(self._timeout_s):
            found: list[Reply] = await self._try("replies", method, list(bodies))
            return found

    async def _try(self, method: str, *arguments: Any) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except RayActorError as error:  # the replica died, with what it was asked
                if attempt == ATTEMPTS:
                    raise UnavailableError(str(error).splitlines()[0]) from error
                await asyncio.sleep(RETRY_S * attempt)
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise UnavailableError(str(error).splitlines()[0]) from error
