"""One actor that prepares data shapes for the trials of a search: each once, while those who need it wait.

It takes no CPU of Ray's: a trial that waits leaves its own idle, and nothing here asks Ray for more, so two cores
suffice. For the same reason it prepares with the local engine (the bytes are the same): tasks of Ray Data would wait
for CPUs that waiting trials hold. What all shapes share was prepared by the driver before, with the run's own engine.
Shapes are built one after the other, since two of them may share an artifact that is not there yet.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

import ray

from lum_ray import catalog, steps

LEASE_S = 120.0


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, concurrency_groups={"build": 1, "lease": 4})
class Shapes:
    """Prepares, and lends what only one trial at a time may train: Phase I, which trials of one shape share."""

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self.lease_s = lease_s
        self.leases: dict[str, tuple[str, float]] = {}

    @ray.method(concurrency_group="build")
    def prepare(self, plain: str) -> None:
        """Find or build what the run (JSON) reads. Raises UserError."""
        run = catalog.read_run(json.loads(plain))
        steps.prepare(replace(run, data=replace(run.data, engine="local")))

    @ray.method(concurrency_group="lease")
    def lease(self, what: str, who: str) -> bool:
        """Whether `who` has `what` for the next `lease_s` seconds, if it was free or hers; a dead trial's runs out."""
        holder, until = self.leases.get(what, (who, 0.0))
        if holder != who and time.monotonic() < until:
            return False
        self.leases[what] = who, time.monotonic() + self.lease_s
        return True
