"""The model that answers now, and its replacement while it answers: a newer snapshot of histories, a newer checkpoint.

What is published last is written in a pointer (`lum_ray.data.state.latest`), which every replica looks at now and then.
What is wrong with it is found before anything is replaced, so that the old model answers on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from lum_ray.artifacts import UserError
from lum_ray.data.state import State, latest
from serve.batching import Batcher
from serve.models import Model, gts_model, lumos_model
from serve.types import Body, Reply

log = logging.getLogger("lum_ray.serve")
T = TypeVar("T")


class Target(NamedTuple):
    """What is to be served: URIs of a checkpoint and of a snapshot of histories (None: users with events only)."""

    checkpoint: str
    state: str | None = None

    def newest(self, pointer: str | None) -> Target:
        """What the pointer says, and for the rest this."""
        found = latest(pointer) if pointer else {}
        return Target(found.get("checkpoint") or self.checkpoint, found.get("state") or self.state)


class _Refused(NamedTuple):
    target: Target
    message: str
    at_s: float


class Loader:
    """Makes models of targets; where only the snapshot is another, the loaded weights stay.

    `cache_bytes`: of encoded histories, for what-if (LUMOS).
    """

    def __init__(self, kind: str, cache_bytes: int = 0) -> None:
        self._kind, self._cache_bytes = kind, cache_bytes
        self._loaded: tuple[str, Any] | None = None

    def __call__(self, target: Target) -> Model:
        """Raises UserError for what is not there, damaged, or of another model."""
        state = State.open(target.state) if target.state else None
        history_of, end_day = (state.rows, state.end_day) if state else (None, None)
        if self._loaded is not None and self._loaded[0] == target.checkpoint:
            predictor = self._loaded[1].with_history(history_of, end_day)
        elif self._kind == "gts":
            from lum_ray.gts.predictor import Predictor as Gts

            predictor = Gts.load(target.checkpoint, history_of, end_day=end_day)
        else:
            from lum_ray.lumos.predictor import Predictor as Lumos

            predictor = Lumos.load(target.checkpoint, history_of, end_day=end_day, cache_bytes=self._cache_bytes)
        find = state.find if state else None
        model = gts_model(predictor, find) if self._kind == "gts" else lumos_model(predictor, end_day, find)
        # what cannot be read, or does not fit the model, is found now rather than by the first request
        for reply in model.methods["embed"]([{"users": [{"user": user} for user in find("", 1)[0]]}] if find else []):
            if reply.status != 200:
                raise UserError(f"{target.state}: {target.checkpoint} cannot read it: {reply.body.decode()}")
        self._loaded = (target.checkpoint, predictor)
        return model


class Live:
    """Replies from the newest model that could be loaded; each batch from one of them, wholly.

    All predictions run in one thread, so that the event loop stays free for health checks and no two batches share
    the processor; a new model is loaded in another.
    """

    def __init__(
        self, load: Callable[[Target], Model], target: Target, pointer: str | None = None, again_s: float = 60.0
    ) -> None:
        """Loads what the pointer says, or else `target`. Raises UserError where neither can be."""
        self._load, self._target, self._pointer, self._again_s = load, target, pointer, again_s
        self._refused: _Refused | None = None
        self._now = target.newest(pointer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        try:
            self._model = load(self._now)
        except UserError as error:
            if self._now == target:
                raise
            self._refuse(self._now, error)
            self._now, self._model = target, load(target)

    def info(self) -> Mapping[str, Any]:
        refused = self._refused.message if self._refused else None
        return {**self._model.info, "state": self._now.state, "refused": refused}

    async def reply(self, method: str, bodies: list[Body]) -> list[Reply]:
        """One reply a body, in order."""
        run = self._model.methods[method]
        return await self._in_thread(lambda: run(bodies))

    async def refresh(self) -> bool:
        """Take what the pointer says, if it says something else; whether the model is another now.

        What is refused is told (`info`), and tried again when the pointer changes or `again_s` have passed.
        """
        target = await asyncio.to_thread(self._target.newest, self._pointer)
        if target == self._now:
            self._refused = None
            return False
        refused = self._refused
        if refused and refused.target == target and time.monotonic() < refused.at_s + self._again_s:
            return False
        try:
            model = await asyncio.to_thread(self._load, target)
        except UserError as error:
            self._refuse(target, error)
            return False
        self._now, self._model, self._refused = target, model, None
        log.info("serving %s with %s", target.checkpoint, target.state)
        return True

    async def watch(self, every_s: float) -> None:
        """Refresh for ever. A pointer that cannot be read for now, or a failure to load, is logged, and tried again."""
        while self._pointer:
            await asyncio.sleep(every_s)
            try:
                await self.refresh()
            except Exception:
                log.exception("%s: cannot be taken; serving what there is", self._pointer)

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _refuse(self, target: Target, error: UserError) -> None:
        self._refused = _Refused(target, str(error), time.monotonic())
        log.error("refused, serving what there is: %s", error)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class Local:
    """A model in this process, as `serve.ingress.create_app` asks for it, without Ray."""

    def __init__(self, live: Live, max_batch: int = 64) -> None:
        self._live = live
        self._max_batch = max_batch
        self._batchers: dict[asyncio.AbstractEventLoop, Batcher] = {}

    async def info(self) -> Mapping[str, Any]:
        return self._live.info()

    async def call(self, method: str, body: Body) -> Reply:
        loop = asyncio.get_running_loop()
        if loop not in self._batchers:
            self._batchers[loop] = Batcher(self._live.reply, self._max_batch)
        return await self._batchers[loop].call(method, body)
