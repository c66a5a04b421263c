"""The engine: one optimiser step over all micro-batches and ranks; the only file that knows DeepSpeed.

Choices that are not obvious:
- Parameters, master weights and gradients are fp32; `bf16` is autocast around the loss. Checkpoints therefore do not
  depend on the precision, and small buffers (normalisation) keep their digits.
- The denominators of a step are the counts of the whole global batch, summed over ranks before the first forward pass.
  So the gradient is that of the global objective, whatever the world size and the number of micro-batches.
- Stage 0 clips here, on the device (torch's fused kernels); stages 1 to 3 clip inside DeepSpeed, over partitions.
- ZeRO 3 evaluates on gathered weights with its hooks taken off: ranks may then predict unequal shares of the users.

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
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from lum_ray.artifacts import UserError
from lum_ray.stage import Batch, to_device

T = TypeVar("T")
LossSums = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
NEVER = 10**9


@dataclass(frozen=True)
class EngineSettings:
    """How to optimise. `steps` is the length of the schedule; `ema` is a decay (0: off); `clip_norm` 0: no clipping."""

    steps: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    clip_norm: float = 1.0
    ema: float = 0.0
    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"


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


def learning_rate(settings: EngineSettings, step: int) -> float:
    """The rate of step `step` (0-based): linear warm-up, then a cosine that would be 0 at step `settings.steps`."""
    warmup = max(1, round(settings.warmup_share * settings.steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: asked for, or `auto` on a GPU that has it or a CPU with AMX (else it is emulated)."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


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
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._ema = [tensor.detach().clone() for tensor in self._local()] if settings.ema else None

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
    ) -> Engine:
        """Wrap `module` (trainable parameters fp32); joins the process group, or makes one of one process.

        `loss(batch) -> (sums_K, counts_K)` computes with `module`; `weight_decay` of a group multiplies the run's.
        Raises UserError where torch.distributed knows another rank or world size than the arguments say.
        """
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
        return cls(engine, module, settings, device, rank, world, owns_group)

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

    def save(self, folder: str) -> None:
        """Write what only resuming needs below `folder` (local): DeepSpeed's files and the averaged weights."""
        self._engine.save_checkpoint(folder, tag="engine", save_latest=False, exclude_frozen_parameters=True)
        if self._ema is not None and (self.rank == 0 or self.settings.zero_stage == 3):
            tensors = {str(index): tensor.contiguous() for index, tensor in enumerate(self._ema)}
            save_file(tensors, os.path.join(folder, "engine", f"ema-{self.rank}.safetensors"))

    def load(self, folder: str) -> None:
        """Take up what `save` wrote (same stage; same world size unless the stage is 0)."""
        loaded, _ = self._engine.load_checkpoint(
            folder, tag="engine", load_module_strict=False, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise UserError(f"{folder}/engine: expected DeepSpeed's checkpoint of stage {self.settings.zero_stage}")
        if self._ema is not None:
            owner = self.rank if self.settings.zero_stage == 3 else 0
            stored = load_file(os.path.join(folder, "engine", f"ema-{owner}.safetensors"))
            for index, tensor in enumerate(self._ema):
                tensor.copy_(stored[str(index)])

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


def gather_columns(columns: T) -> list[T] | None:
    """What every rank brought, in rank order, on rank 0; None on the others. Every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [columns]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(columns, gathered, dst=0)
    return gathered


def broadcast(value: T) -> T:
    """Rank 0's `value` on every rank. Every rank must call it; what the others bring is ignored."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    holder: list[Any] = [value]
    dist.broadcast_object_list(holder, src=0)
    result: T = holder[0]
    return result
