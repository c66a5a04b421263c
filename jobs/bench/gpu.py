"""How fast one accelerator trains and runs a model, and what share of the chip's arithmetic that is.

    python -m jobs.bench.gpu --model lumos [--engine torch|deepspeed] [--windows 1024] [--quick]
    python -m jobs.bench.gpu --model gts [--windows 64] [--items 10000] [--compile] [--quick]

On CUDA: bf16 autocast, torch.compile with static shapes, fused AdamW; several batches that lie on the device, so that
no loader is measured. On a CPU, or with --quick, the same in fp32 with tiny sizes and without compiling: a smoke test.
Rows: gpu/lumos_{wide,paper}/tokens_per_s and .../mfu (training), gpu/lumos_wide/users_per_s (prediction);
gpu/gts/tokens_per_s and /mfu (Phase II), gpu/gts/pairs_per_s/{front,end} (a target and a history): `gpu_gts.py`.
A token of LUMOS is a calendar day inside a window that the encoder reads; pads count, their share of the batch is in
`run`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from jobs.bench import gpu_gts
from jobs.bench.accelerator import fitting, peak, timed
from jobs.bench.lumos_batch import INPUTS, lumos_batch
from jobs.bench.rows import emit, hardware, note, spread
from lum_ray.lumos.config import Inputs, LumosConfig
from lum_ray.lumos.model import Lumos
from lum_ray.lumos.tokens import CATEGORY_WIDTH, Batch
from lum_ray.stage import Arrays, to_device

PRESETS = {"lumos_wide": LumosConfig(swiglu_width=1365), "lumos_paper": LumosConfig(swiglu_width=512)}
PACKAGES = ("torch", "numpy", "deepspeed")


def forward_flops(config: LumosConfig, inputs: Inputs, active: int, events: int, windows: int, cuts: int = 1) -> int:
    """Floating-point operations of one forward pass of the fast form, two for each multiply-add of its matrix products
    (element-wise work is left out, causal attention counted in full).

    A = `active` days, E = `events` distinct rows, B = `windows`, C = `cuts`, others as in lum_ray/lumos/model.py:
        tokenizer  (A + 2)(U e + (l - 1) e^2 + e D) + E (S e + (l - 1) e^2 + e D)
                   + B (W e + (l - 1) e^2 + e D) + B T D^2
        encoder    layers * B T (4 D^2 + 3 D f + 2 T D)
        decoder    layers * (B T 2 D^2 + B C Q (2 D^2 + 3 D f + 2 T D)); with self-attention + B C Q (4 D^2 + 2 Q D)
        queries    E (S e + (l - 1) e^2 + e D)
        heads      B C (F V + H)(2 D^2 + P D)
    with e = embed width, l = embed layers, f = SwiGLU width, W = width of the static attributes. Training: three times.
    """
    width, embed, hidden, history = config.width, config.embedding, config.swiglu_width, config.history_days
    deeper, days = (config.embed_layers - 1) * embed**2, windows * config.history_days
    horizons, asked = len(inputs.horizons), windows * cuts
    queries = config.future_days + horizons
    static = 2 * len(inputs.numbers) + CATEGORY_WIDTH * len(inputs.categories) if config.static else 0
    event_rows = events * (inputs.event_width * embed + deeper + embed * width)
    tokenizer = (active + 2) * (len(inputs.behaviours) * embed + deeper + embed * width) + event_rows
    tokenizer += windows * (static * embed + deeper + embed * width) if static else 0
    tokenizer += days * width**2
    encoder = config.encoder_layers * days * (4 * width**2 + 3 * width * hidden + 2 * history * width)
    per_query = 2 * width**2 + 3 * width * hidden + 2 * history * width
    per_query += 4 * width**2 + 2 * queries * width if config.decoder_self_attention else 0
    decoder = config.decoder_layers * (days * 2 * width**2 + asked * queries * per_query)
    outputs = 2 if config.continuous == "lognormal" and not all(inputs.binary) else 1
    heads = asked * (config.future_days * inputs.daily + horizons) * (2 * width**2 + outputs * width)
    return 2 * (tokenizer + encoder + decoder + event_rows + heads)


def tiny(config: LumosConfig) -> LumosConfig:
    """The same model for a smoke test."""
    narrow = config.swiglu_width // 16
    return replace(config, history_days=24, width=32, heads=4, encoder_layers=2, embed_width=16, swiglu_width=narrow)


def torch_step(
    model: Lumos, batches: Sequence[Batch], fast: bool, compiled: bool, device: torch.device
) -> Callable[[int], object]:
    """A training step in plain torch."""
    objective = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    groups = [{**group, "weight_decay": 0.01 * group["weight_decay"]} for group in model.parameter_groups()]
    optimiser = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def step(index: int) -> object:
        batch = batches[index % len(batches)]
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            sums_K, counts_K = objective(batch)
        (sums_K / counts_K.clamp(min=1)).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return sums_K

    return step


def deepspeed_step(
    model: Lumos, arrays: Sequence[Arrays], fast: bool, compiled: bool, device: torch.device
) -> Callable[[int], object]:
    """The step of our own engine, its copy of each batch to the device included."""
    from lum_ray.training.engine import Engine
    from lum_ray.training.settings import EngineSettings

    loss = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    settings = EngineSettings(steps=10_000, learning_rate=1e-4, precision="bf16" if fast else "fp32")
    engine = Engine.start(model, model.parameter_groups(), loss, settings, device)
    return lambda index: engine.step(index, [arrays[index % len(arrays)]])


def predict_step(
    model: Lumos, batches: Sequence[Batch], fast: bool, compiled: bool, device: torch.device
) -> Callable[[int], object]:
    """A prediction of every behaviour, day and interval."""
    forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward

    def step(index: int) -> object:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=fast):
            return model.objective.read(forward(batches[index % len(batches)]))

    return step


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.gpu", description="A model on one accelerator.")
    parser.add_argument("--model", choices=("lumos", "gts"), default="lumos")
    parser.add_argument("--engine", choices=("torch", "deepspeed"), default="torch", help="lumos: what makes a step")
    parser.add_argument("--windows", type=int, help="windows a batch, 1024 or (gts) 64; halved until they fit")
    parser.add_argument("--llm", help="gts: the frozen decoder; random-tinyllama, or random for a smoke test")
    parser.add_argument("--items", type=int, default=10_000, help="gts: items of the catalogue")
    parser.add_argument("--candidates", type=int, default=20, help="gts: candidates of a history, for pairs_per_s")
    parser.add_argument("--steps", type=int, default=10, help="steps a block")
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks; the median is the value")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="lumos: do not compile")
    parser.add_argument("--compile", action="store_true", help="gts: compile the decoder's layers")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, fp32, nothing compiled")
    options = parser.parse_args(arguments)
    if options.model == "gts" and options.engine != "torch":
        parser.error("--engine deepspeed: lumos only")
    device = torch.device(options.device)
    fast = device.type == "cuda" and not options.quick
    compiled = fast and not options.eager
    windows = options.windows or (1024 if options.model == "lumos" else 64)
    windows, steps, blocks, warmup = (windows, options.steps, options.blocks, 5) if fast else (8, 2, 3, 1)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    machine, top = hardware(accelerator), peak(device)
    if options.model == "gts":
        items, candidates = (options.items, options.candidates) if fast else (60, 3)
        llm = options.llm or ("random-tinyllama" if fast else "random")
        gpu_gts.measure(
            gpu_gts.Settings(
                llm, windows, items, candidates, steps, blocks, warmup, fast, fast and options.compile, device, machine
            )
        )
        return 0

    def report(
        name: str, figure: str, config: LumosConfig, used: int, values: Sequence[float], unit: str, **more: Any
    ) -> None:
        value, low, high = spread(values)
        run = {
            "config": asdict(config),
            "windows": used,
            "engine": options.engine,
            "tiny": not fast,
            "precision": "bf16" if fast else "fp32",
            "compiled": compiled,
            **more,
        }
        emit(f"gpu/{name}/{figure}", value, unit, low=low, high=high, run=run, machine=machine, packages=PACKAGES)

    for name, preset in PRESETS.items():
        config = preset if fast else tiny(preset)
        torch.manual_seed(0)
        model = Lumos(config, INPUTS).to(device)
        size = sum(p.numel() for p in model.parameters())

        def train(count: int, model: Lumos = model, config: LumosConfig = config) -> list[float]:
            torch.compiler.reset()
            arrays = [lumos_batch(config, count, seed) for seed in range(4)]
            if options.engine == "deepspeed":
                step = deepspeed_step(model, arrays, fast, compiled, device)
            else:
                step = torch_step(model, [to_device(a, device) for a in arrays], fast, compiled, device)
            return timed(step, steps, blocks, warmup, device)

        note(f"{name}: {size / 1e6:.1f} M parameters, training")
        used, seconds = fitting(windows, train)
        first = lumos_batch(config, used, 0)
        flops = 3 * forward_flops(config, INPUTS, len(first["slot_A"]), len(first["event_rows_ES"]), used)
        tokens = used * config.history_days
        more = {
            "parameters": size,
            "flops_per_token": flops / tokens,
            "pad_share": float(first["pads_B"].sum() / tokens),
        }
        report(name, "tokens_per_s", config, used, [tokens / s for s in seconds], "tokens/s", **more)
        if top is not None:
            report(name, "mfu", config, used, [flops / s / top for s in seconds], "share", **more, peak_flops=top)
        if name != "lumos_wide":
            continue

        def predict(count: int, model: Lumos = model, config: LumosConfig = config) -> list[float]:
            torch.compiler.reset()
            batches = [to_device(lumos_batch(config, count, seed), device) for seed in range(2)]
            return timed(predict_step(model, batches, fast, compiled, device), steps, blocks, warmup, device)

        note(f"{name}: predicting")
        model.eval()
        used, seconds = fitting(windows, predict)
        report(name, "users_per_s", config, used, [used / s for s in seconds], "users/s", parameters=size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
