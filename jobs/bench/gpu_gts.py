"""How fast one accelerator trains GTS-LUM's Phase II, and answers what P asks: the figures of `jobs.bench.gpu`.

The decoder has TinyLlama's shape and random weights, frozen, in bf16 on a GPU; gradients go through it to its inputs,
without activation checkpointing; fused AdamW on what trains. A token is what the decoder reads: prefixes and pads
count, and a history that P reads once for each of its K candidates counts K times.

Legend: B histories, K candidates, T tokens, S = T + K, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jobs.bench.accelerator import fitting, peak, timed
from jobs.bench.gts_batch import DAYS, gts_inputs, gts_rows
from jobs.bench.rows import emit, note, spread
from lum_ray.gts.config import PREFIX, GtsConfig, GtsInputs
from lum_ray.gts.llm import load
from lum_ray.gts.stage import GtsStage
from lum_ray.stage import Batch, to_device

GOAL, FLOOR = 115_000, 85_000
"""Tokens per second of one H100 that are aimed at, and below which something is wrong."""
PACKAGES = ("torch", "numpy", "transformers")


@dataclass(frozen=True)
class Settings:
    """What the command line says. `fast`: bf16 and real sizes; else fp32 and tiny ones."""

    llm: str
    windows: int
    items: int
    candidates: int
    steps: int
    blocks: int
    warmup: int
    fast: bool
    compiled: bool
    device: torch.device
    machine: str


def flops_per_token(decoder: torch.nn.Module, length: int) -> int:
    """Floating-point operations of a training step for each token that the frozen decoder reads: 4 N + 12 l T A.

    With N numbers in its matrices, l layers, T tokens in a sequence and A = heads * width of a head: forward 2 N for
    the matrices and 4 T A a layer for attention (causal attention counted in full); backward, to the inputs only, 2 N
    and 8 T A a layer. Where weights train it is 6 N; a frozen decoder has no gradients of weights. What trains around
    it (Q-Former, projections, heads) and element-wise work are left out.
    """
    shape: Any = decoder.config
    numbers = sum(parameter.numel() for parameter in decoder.parameters() if parameter.dim() == 2)
    attended = shape.num_attention_heads * (
        getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    )
    return int(4 * numbers + 12 * shape.num_hidden_layers * length * attended)


def config_of(settings: Settings, **changes: Any) -> GtsConfig:
    """The paper's model, or one for a smoke test."""
    config = GtsConfig(llm=settings.llm)
    if not settings.fast:
        config = replace(
            config, max_tokens=48, width=16, heads=2, layers=2, queries=2, negatives=16, output_width=16, graph_width=8,
            table_width=8, branching=3, depth=2,
        )  # fmt: skip
    return replace(config, **changes)


def bf16_decoder(decoder: Any) -> None:
    """Weights and inputs of the frozen decoder in bf16. Its table of frequencies is no weight and stays fp32."""
    for parameter in decoder.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)

    def cast(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].to(torch.bfloat16)}

    decoder.register_forward_pre_hook(cast, with_kwargs=True)


def train_step(stage: GtsStage, batches: Sequence[Batch], fast: bool) -> Callable[[int], object]:
    """A training step of Phase II in plain torch."""
    groups = [{**group, "weight_decay": 0.01 * group["weight_decay"]} for group in stage.trainable()]
    optimiser = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def step(index: int) -> object:
        batch = batches[index % len(batches)]
        with torch.autocast(batch["length_B"].device.type, torch.bfloat16, enabled=fast):
            sums_K, counts_K = stage.loss(batch)
        (sums_K / counts_K.clamp(min=1)).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return sums_K

    return step


@torch.no_grad()
def propensities_from_cache(stage: GtsStage, batch: Batch, items_BK: Tensor) -> Tensor:
    """What `GtsStage.propensities` gives (B, K) for a target at the end, without repeats, from one pass a history.

    A causal decoder reads the history alike whatever comes behind it, so its keys and values are kept. The K candidates
    follow as K tokens of one sequence, all at the position behind the history's last token; each sees the history
    (without its pads) and itself.
    """
    module = stage.module
    fused_ND = module.catalogue()[0]
    x_BLD = module.tokens(batch, fused_ND[batch["unique_U"]])
    count, width = items_BK.shape
    rows = torch.arange(count, device=x_BLD.device)
    x_BTD = torch.cat([module.prefix(batch, rows, 1, None), x_BLD], dim=1)
    kept = module.decoder(inputs_embeds=x_BTD, use_cache=True).past_key_values
    candidates_BKD = fused_ND[items_BK]
    end_B = PREFIX + batch["length_B"]
    history_BT = torch.arange(x_BTD.shape[1], device=rows.device) < end_B[:, None]
    own_KK = torch.eye(width, dtype=torch.bool, device=rows.device)
    history_BKT = history_BT[:, None].expand(-1, width, -1)
    sight_BKS = torch.cat([history_BKT, own_KK.expand(count, -1, -1)], dim=2)
    asked_BKD = (candidates_BKD + module.target).to(x_BTD.dtype)
    found = module.decoder(
        inputs_embeds=asked_BKD,
        attention_mask=sight_BKS[:, None],
        position_ids=end_B[:, None].expand(-1, width),
        past_key_values=kept,
        use_cache=True,
    )
    every = torch.arange(width, device=rows.device).expand(count, -1)
    ends = module.ends((found.last_hidden_state, asked_BKD), rows[:, None].expand(-1, width), every)
    return module.follows(ends, candidates_BKD) + module.prior.popular(module.constants["log_q_N"])[items_BK]


class Figures:
    """Measures and prints the rows. The decoder is made once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        config = config_of(settings)
        self.inputs: GtsInputs = gts_inputs(config, settings.items, text_width=1024 if settings.fast else 32)
        note(f"gts: making {settings.llm}")
        llm = load(config)
        self.llm = replace(llm, decoder=llm.decoder.to(settings.device))
        if settings.fast:
            bf16_decoder(self.llm.decoder)
        if settings.compiled:
            for layer in self.llm.decoder.layers:  # type: ignore[union-attr]
                layer.compile()  # one layer's code serves all of them
        self.size = sum(parameter.numel() for parameter in self.llm.decoder.parameters())

    def stage(self, config: GtsConfig) -> GtsStage:
        torch.manual_seed(0)
        stage = GtsStage(config, self.inputs, DAYS, llm=self.llm)
        stage.module.to(self.settings.device)
        return stage

    def row(self, figure: str, config: GtsConfig, values: Sequence[float], unit: str, **more: Any) -> None:
        value, low, high = spread(values)
        settings = self.settings
        run = {
            "config": asdict(config),
            "items": settings.items,
            "decoder_parameters": self.size,
            "engine": "torch",
            "tiny": not settings.fast,
            "precision": "bf16" if settings.fast else "fp32",
            "compiled": settings.compiled,
            **more,
        }
        emit(f"gpu/gts/{figure}", value, unit, low=low, high=high, run=run, machine=settings.machine, packages=PACKAGES)

    def training(self) -> None:
        """Rows `tokens_per_s` and, where the chip is known, `mfu`."""
        settings = self.settings
        config = config_of(settings)
        stage = self.stage(config)
        trained = sum(parameter.numel() for group in stage.trainable() for parameter in group["params"])
        note(f"gts: {self.size / 1e6:.0f} M frozen and {trained / 1e6:.1f} M trained parameters, training")
        facts: dict[str, Any] = {}

        def train(windows: int) -> list[float]:
            torch.compiler.reset()
            arrays = [stage.collate(*gts_rows(config, self.inputs, windows, seed)) for seed in range(4)]
            asked = len(arrays[0]["asked_sample_P"])
            passes = windows - asked + asked * config.candidates
            length = PREFIX + min(batch["kind_BL"].shape[1] for batch in arrays)
            # each history that P reads has its pads K times, so the share is that of the histories
            pads = sum(float((batch["kind_BL"] == 0).mean()) for batch in arrays) / len(arrays)
            facts.update(windows=windows, passes=passes, tokens_a_pass=length, pad_share=pads * (1 - PREFIX / length))
            batches = [to_device(batch, settings.device) for batch in arrays]
            step = train_step(stage, batches, settings.fast)
            return timed(step, settings.steps, settings.blocks, settings.warmup, settings.device)

        _, seconds = fitting(settings.windows, train)
        flops = flops_per_token(self.llm.decoder, facts["tokens_a_pass"])
        rates = [facts["passes"] * facts["tokens_a_pass"] / s for s in seconds]
        more = {**facts, "trained_parameters": trained, "flops_per_token": flops}
        goals = {"goal_of_one_h100": GOAL, "floor_of_one_h100": FLOOR}
        self.row("tokens_per_s", config, rates, "tokens/s", **more, **goals)
        top = peak(settings.device)
        if top is not None:
            self.row("mfu", config, [rate * flops / top for rate in rates], "share", **more, peak_flops=top)

    def pairs(self) -> None:
        """Rows `pairs_per_s/front` (a pass for each candidate) and `/end` (a pass for each history)."""
        settings = self.settings
        steps = max(1, settings.steps // 5)  # one step asks K times as much as it would of reading R
        for position in ("front", "end"):
            config = config_of(settings, target_position=position, repeats=False)
            stage = self.stage(config)
            stage.module.eval()
            note(f"gts: pairs, target at the {position}")
            rows, samples = gts_rows(config, self.inputs, settings.windows, 0)
            batch = to_device(stage.questions(rows, samples), settings.device)
            items_BK = torch.arange(settings.windows * settings.candidates, device=settings.device)
            items_BK = (items_BK % settings.items).view(settings.windows, settings.candidates)

            def rate(
                ask: Callable[[GtsStage, Batch, Tensor], Tensor],
                stage: GtsStage = stage,
                batch: Batch = batch,
                items_BK: Tensor = items_BK,
            ) -> list[float]:
                def step(index: int) -> Tensor:
                    with torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.fast):
                        return ask(stage, batch, items_BK)

                seconds = timed(step, steps, settings.blocks, 1, settings.device)
                return [items_BK.numel() / s for s in seconds]

            more = {"histories": settings.windows, "candidates": settings.candidates}
            passes = rate(GtsStage.propensities)
            if position == "front":
                self.row("pairs_per_s/front", config, passes, "pairs/s", **more, reuses_history=False)
                continue
            without = spread(passes)[0]
            cached = rate(propensities_from_cache)
            self.row("pairs_per_s/end", config, cached, "pairs/s", **more, reuses_history=True, without_reuse=without)


def measure(settings: Settings) -> None:
    """Print all rows."""
    figures = Figures(settings)
    figures.training()
    figures.pairs()
