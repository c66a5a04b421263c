"""What the benchmark of serving puts in the place of our deployments: a model that costs nothing, and Ray Serve as its
guide has it."""

# no `from __future__ import annotations`: FastAPI could not read those of a class that travels to a replica

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Response
from ray import serve

from serve.types import Body, PredictRequest, Reply, StatusResponse, encode

INFO = {"name": "null", "checkpoint": "null", "step": 0, "model": "lumos", "behaviours": [], "event_types": [],
        "history_days": 0, "future_days": 7, "end_day": 0}  # fmt: skip


class Null:
    """A model that has its answer before it is asked: seven days of eight behaviours."""

    def __init__(self) -> None:
        behaviours = {f"behaviour_{k}": {"p": 0.123456, "mean": 1.234567, "low": 0.1, "high": 9.9} for k in range(8)}
        days = [{"day": day, "behaviours": behaviours} for day in range(7)]
        stamp = {name: INFO[name] for name in ("name", "checkpoint", "step")}
        answer = {"user": "u", "cut_day": 0, "days": days, "horizons": {}}
        self._reply = Reply(200, encode({"model": stamp, "answers": [answer]}))

    async def info(self) -> Mapping[str, Any]:
        return INFO

    async def replies(self, method: str, bodies: Sequence[Body]) -> list[Reply]:
        return [self._reply] * len(bodies)


class DefaultModel:
    """Our predictor in a deployment with `@serve.batch` as it comes: 10 calls, 10 ms."""

    def __init__(self, checkpoint: str, state: str) -> None:
        from serve.live import Loader, Target

        self._model = Loader("lumos")(Target(checkpoint, state))

    @serve.batch
    async def predict(self, bodies: list[Body]) -> list[Reply]:
        return self._model.methods["predict"](bodies)


web = FastAPI()


@serve.deployment
@serve.ingress(web)
class DefaultIngress:
    def __init__(self, model: Any) -> None:
        self._model = model

    @web.post("/v1/lumos/predict")
    async def predict(self, request: PredictRequest) -> Response:
        reply = await self._model.predict.remote(request.model_dump(exclude_unset=True))
        return Response(reply.body, reply.status, media_type="application/json")

    @web.get("/readyz")
    async def readyz(self) -> StatusResponse:
        return StatusResponse(status="ready")


def default(checkpoint: str, state: str) -> serve.Application:
    """One ingress in front of one model."""
    return DefaultIngress.bind(serve.deployment(DefaultModel).bind(checkpoint, state))
