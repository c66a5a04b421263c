"""The engine: one optimiser step over all micro-batches and ranks; the only file that knows DeepSpeed.

Choices that are not obvious:
- Parameters, master weights and gradients are fp32; `bf16` is autocast around the loss. Checkpoints therefore do not
  depend on the precision, and small buffers (normalisation) keep their digits.
- The denominators of a step are the counts of the whole global batch, summed over ranks before the first forward pass.
  So the gradient is that of the global objective, whatever the world size and the number of micro-batches.
- Stage 0 clips here, on the device (torch's fused kernels); stages 1 to 3 clip inside DeepSpeed, over partitions.
- ZeRO 3 evaluates on gathered weights with its hooks taken off: ranks may then predict unequal shares of the users.
- What resuming needs is gathered to whole tensors by name, not kept as DeepSpeed's own files: those are pickles, one a
  rank, and can be taken up by the same world size and stage only.

Shapes: K objective terms.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from lum_ray.artifacts import UserError
from lum_ray.stage import Batch, to_device
from lum_ray.training.saved import MOMENTS, Saved, take_up
from lum_ray.training.settings import EngineSettings, learning_rate, uses_bf16

LossSums = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
NEVER = 10**9


@dataclass(frozen=True)
class Outcome:
    """What a step gives, as tensors on the device (reading one waits for the device).

    `sums_K` (float64) are this rank's sums, `counts_K` (float64) those of the global batch, `objective` this rank's
    part of the step's objective, `gradient_norm` that of the global gradient before clipping, `votes` the number of
    ranks that asked to stop.
    """

    sums_K: torch.Tensor
    counts_K: torch.Tensor
    objective: torch.Tensor
    gradient_norm: torch.Tensor
    votes: torch.Tensor


class _Objective(torch.nn.Module):
    """The module and its loss as one forward pass, so that DeepSpeed's hooks see every use of a parameter."""

    def __init__(self, module: torch.nn.Module, loss: LossSums, device: torch.device, bf16: bool) -> None:
        super().__init__()
        self.module = module
        self.loss, self.device_type, self.bf16 = loss, device.type, bf16

    def forward(self, batch: Batch, weight_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            sums_K, _ = self.loss(batch)
        sums_K = sums_K.float()
        return (sums_K * weight_K).sum(), sums_K.detach()


class Engine:
    """DeepSpeed around a module. Build it with `Engine.start`; every rank calls every method but `rate`."""

    def __init__(
        self,
        deepspeed_engine: Any,
        module: torch.nn.Module,
        settings: EngineSettings,
        device: torch.device,
        rank: int,
        world: int,
        owns_group: bool,
    ) -> None:
        self.module, self.settings, self.device, self.rank, self.world = module, settings, device, rank, world
        self.bf16 = uses_bf16(settings.precision, device)
        self._engine = deepspeed_engine
        self._owns_group = owns_group
        self._named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._parameters = list(self._named.values())
        self._ema = [tensor.detach().clone() for tensor in self._local()] if settings.ema else None
        self._moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    @classmethod
    def start(
        cls,
        module: torch.nn.Module,
        parameter_groups: Sequence[Mapping[str, Any]],
        loss: LossSums,
        settings: EngineSettings,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        saved: Saved | None = None,
    ) -> Engine:
        """Wrap `module` (trainable parameters fp32); joins the process group, or makes one of one process.

        `loss(batch) -> (sums_K, counts_K)` computes with `module`; `weight_decay` of a group multiplies the run's.
        `saved` goes on from there, whatever the stage, the world size and the precision that it was saved at.
        Raises UserError where torch.distributed knows another rank or world size than the arguments say, or `saved` is
        of another model.
        """
        if saved is not None:
            # before DeepSpeed makes its own copies of them
            take_up(module, saved, bool(settings.ema))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        deepspeed = _import_deepspeed(device)
        owns_group = _join(deepspeed, device, rank, world)
        groups = [
            {**group, "weight_decay": settings.weight_decay * float(group.get("weight_decay", 1.0))}
            for group in parameter_groups
            if len(group["params"])
        ]
        bf16 = uses_bf16(settings.precision, device)
        objective = _Objective(module, loss, device, bf16).to(device)
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=device.type in ("cpu", "cuda"))
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=_config(settings), dist_init_required=False
        )
        wrapped = cls(engine, module, settings, device, rank, world, owns_group)
        wrapped._make_moments(saved.steps if saved is not None else 0)
        if saved is not None:
            wrapped._restore(saved)
        return wrapped

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (0-based)."""
        return learning_rate(self.settings, step)

    def step(self, step: int, micro_batches: Sequence[Mapping[str, npt.NDArray[Any]]], stop: bool = False) -> Outcome:
        """One update (the `step`-th, 0-based) from this rank's micro-batches, each with `counts_K`.

        The objective is the sum over terms of (global sum) / (global count), terms with a global count of 0 left out.
        Every rank must bring the same number of micro-batches, at least one; they may be empty.
        """
        own_K = np.sum([np.asarray(batch["counts_K"], np.float64) for batch in micro_batches], axis=0)
        total = self.reduce(torch.tensor([*own_K, float(stop)], dtype=torch.float64))
        counts_K = total[:-1]
        # DeepSpeed averages gradients over ranks; the factor `world` makes it the sum that the objective needs.
        weight_K = torch.where(counts_K > 0, 1.0 / counts_K.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        scaled_K = (weight_K * self.world).float()
        sums_K = torch.zeros_like(counts_K)
        for position, arrays in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(position == len(micro_batches) - 1)
            loss, part_K = self._engine(to_device(arrays, self.device), scaled_K)
            self._engine.backward(loss, scale_wrt_gas=False)
            sums_K += part_K
        norm = self._clip() if self.settings.zero_stage == 0 else None
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self._engine.step()
        if norm is None:
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        if self._ema is not None:
            # The early average must not be dominated by the initial weights.
            decay = min(self.settings.ema, (1.0 + step) / (10.0 + step))
            torch._foreach_lerp_(self._ema, self._local(), 1.0 - decay)
        return Outcome(sums_K, counts_K, (sums_K * weight_K).sum(), norm, total[-1])

    def _clip(self) -> torch.Tensor:
        clip = self.settings.clip_norm or math.inf
        return torch.nn.utils.clip_grad_norm_(self._parameters, clip).detach()

    def _local(self) -> list[torch.Tensor]:
        """What this rank holds of each trainable parameter: all of it, or its partition (ZeRO 3)."""
        if self.settings.zero_stage == 3:
            return [parameter.ds_tensor.data for parameter in self._parameters]  # type: ignore[attr-defined]
        return [parameter.data for parameter in self._parameters]

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over ranks, on the device."""
        values = values.to(self.device)
        if self.world > 1:
            dist.all_reduce(values)
        return values

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[torch.nn.Module]:
        """The module ready to predict: evaluation mode, no gradients, the averaged weights where `ema` is on."""
        kept = [(tensor, tensor.clone()) for tensor in self._local()] if self._ema is not None else []
        for (tensor, _), value in zip(kept, self._ema or (), strict=True):
            tensor.copy_(value)
        training = self.module.training
        self.module.eval()
        try:
            with (
                self._gathered(),
                torch.no_grad(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
            ):
                yield self.module
        finally:
            self.module.train(training)
            for tensor, value in kept:
                tensor.copy_(value)

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        if self.settings.zero_stage < 3:
            yield
            return
        import deepspeed

        offload = self._engine.optimizer.parameter_offload
        for parameter in self.module.parameters():
            parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
                yield
        finally:
            offload._register_deepspeed_module(offload.module)

    def weights(self) -> dict[str, torch.Tensor]:
        """Trainable parameters and persistent buffers by name, complete, fp32, on the CPU (averaged where `ema` is on).

        Every rank must call it; ranks other than 0 get an empty dictionary.
        """
        frozen = {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}
        with self.evaluation():
            if self.rank:
                return {}
            return {
                name: tensor.detach().to("cpu", copy=True).contiguous()
                for name, tensor in self.module.state_dict().items()
                if name not in frozen
            }

    def state(self) -> dict[str, torch.Tensor]:
        """What resuming needs beside `weights`, as whole tensors (fp32, on the CPU): `exp_avg/<name>`,
        `exp_avg_sq/<name>`, and `parameter/<name>` where `weights` are averages.

        Every rank must call it; ranks other than 0 get an empty dictionary.
        """
        keys: tuple[str, ...] = (*MOMENTS, *(("parameter",) if self._ema is not None else ()))
        tensors = {}
        for name, parameter in self._named.items():
            for key in keys:
                whole = self._whole(parameter, key)
                if self.rank == 0:
                    tensors[f"{key}/{name}"] = whole.detach().to("cpu", copy=True).contiguous()
        return tensors

    def _whole(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """A parameter or one of its moments, gathered from the ranks that hold parts of it."""
        if self.settings.zero_stage == 0:
            return parameter if key == "parameter" else torch.as_tensor(self._moments[parameter][key])
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key == "parameter":
            return torch.as_tensor(safe_get_full_fp32_param(parameter))
        return torch.as_tensor(safe_get_full_optimizer_state(parameter, key))

    def _make_moments(self, steps: int) -> None:
        """Zero moments after `steps` updates, as torch makes them at its first step.

        Of stages 1 and 2 DeepSpeed then finds them; left to itself it looks for all groups' after the first one's step.
        """
        stage, optimizer = self.settings.zero_stage, self._engine.optimizer
        if stage == 0:
            self._moments, owners = optimizer.state, self._parameters
        else:
            self._moments = optimizer.optimizer.state
            owners = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        for owner in owners:
            done = torch.full((), float(steps), device=owner.device)
            self._moments[owner] = {"step": done, **{key: torch.zeros_like(owner).detach() for key in MOMENTS}}
        if stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()

    def _restore(self, saved: Saved) -> None:
        """Set the moments and the averages; the parameters were in the module when DeepSpeed took it."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for name, parameter in self._named.items():
            for key in MOMENTS:
                value = saved.state[f"{key}/{name}"].to(self.device)
                if self.settings.zero_stage == 0:
                    self._moments[parameter][key].copy_(value)
                elif self.settings.zero_stage < 3:
                    safe_set_full_optimizer_state(parameter, value, key)
                else:
                    safe_set_local_optimizer_state(parameter, self._part(parameter, value), key)
        for name, average in zip(self._named, self._ema or (), strict=False):
            average.copy_(self._part(self._named[name], saved.weights[name].to(self.device)))

    def _part(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """What this rank holds of `whole`, a value of the parameter: see `_local`."""
        if self.settings.zero_stage < 3:
            return whole
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = torch.nn.functional.pad(whole.flatten(), (0, size * self.world - whole.numel()))
        return padded[size * self.rank : size * (self.rank + 1)]

    def close(self) -> None:
        """Release DeepSpeed's hooks and, where `start` made it, the process group."""
        self._engine.destroy()
        if self._owns_group:
            _leave()


def _config(settings: EngineSettings) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip_norm if settings.zero_stage else 0.0,
        "steps_per_print": NEVER,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"tag_validation": "IGNORE"},
        # Threshold 0: every parameter is partitioned alike, so that a rank's average covers exactly its partitions.
        "zero_optimization": {"stage": settings.zero_stage, "stage3_param_persistence_threshold": 0},
    }


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls the old names of two collectives at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with _silent_stderr():
        import deepspeed

    if device.type == "cpu":
        # Otherwise DeepSpeed compiles a shared-memory extension for minutes; a killed build hangs the next one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """At its import DeepSpeed asks the linker for libraries of extensions that we never use; the linker's complaints go
    past Python to the file descriptor. Python's own exceptions are not touched."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _join(deepspeed: Any, device: torch.device, rank: int, world: int) -> bool:
    """Make sure that there is a process group; True if it was made here (one process, no network)."""
    if not 0 <= rank < world:
        raise UserError(f"rank: expected 0 to {world - 1}, got {rank}")
    made = not dist.is_initialized()
    if made and world > 1:
        raise UserError(f"{world} ranks need a process group (Ray Train makes one), but torch.distributed has none")
    if made:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if (dist.get_rank(), dist.get_world_size()) != (rank, world):
        raise UserError(
            f"torch.distributed has rank {dist.get_rank()} of {dist.get_world_size()}, the run says {rank} of {world}"
        )
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return made


def _leave() -> None:
    import deepspeed

    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
