"""A TorchTrainer that grows and shrinks with the room that is there.

Ray Train 2.60 takes all CPUs and GPUs of a machine for its own, also those that the job's driver, Serve or other jobs
hold. It would ask for a group that never fits, for ever. Here what is held by others does not count.
"""

from __future__ import annotations

from typing import Any

from ray._private.state import available_resources_per_node
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ScalingDecision


class Room(ElasticScalingPolicy):  # type: ignore[misc]
    """As many workers as there is room for."""

    _own = 0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._own = 0
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._own = worker_group_state.num_workers
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        free = super()._count_possible_workers(available_resources_per_node())
        return min(int(super()._count_possible_workers(reserved_resources)), self._own + int(free))


class ElasticTrainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer for a `num_workers` of (least, most)."""

    def _initialize_and_run_controller(self, **controller: Any) -> Result:
        return super()._initialize_and_run_controller(**{**controller, "scaling_policy": Room(self.scaling_config)})
