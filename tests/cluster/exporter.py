"""`python -m tests.cluster.exporter`: a driver that trains a toy and answers requests, until it is killed.

What it and its cluster export is what dashboards and alerts may ask for.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import httpx
import ray
from ray import serve

from lum_ray.config import Train
from lum_ray.training.fit import fit
from lum_ray.training.loop import Worker, train_loop
from tests.cluster.nodes import free_ports
from tests.training.toy import ToyLoader, ToyStage


@serve.deployment(max_ongoing_requests=5, autoscaling_config={"min_replicas": 1, "max_replicas": 1})
class Answer:
    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.01)
    async def _many(self, requests: list[Any]) -> list[str]:
        return ["fine" for _ in requests]

    async def __call__(self, request: Any) -> str:
        if request.query_params.get("fail"):
            raise ValueError("asked to fail")
        return str(await self._many(request))


def loop(worker: Worker) -> dict[str, Any]:
    settings = Train(steps=4, checkpoint_every=4, validate_every=2, keep_best="eval/loss")
    place = tempfile.mkdtemp()
    return train_loop(ToyStage(0.2), ToyLoader(), lambda module: {"eval/loss": 1.0}, settings, place, worker, 1)


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    fit(loop, name="toy")
    (port,) = free_ports(1)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(Answer.options(ray_actor_options={"num_cpus": 0.1}).bind(), name="toy", route_prefix="/")
    while True:
        httpx.get(f"http://127.0.0.1:{port}/")
        httpx.get(f"http://127.0.0.1:{port}/?fail=1")
        time.sleep(0.2)
