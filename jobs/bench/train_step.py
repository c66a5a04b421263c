"""One training step of LUMOS on this machine's CPU: our fast form against the plain one, same weights, same batch.

    python -m jobs.bench.train_step [--quick] [--windows 4] [--repeats 5]

Rows: train_step/heads_tokenizer/ratio (tokenizer and heads, forward and backward, d 512, 360 days, 8 % active, shared
calendar) and train_step/lumos_paper/tokens_per_s (the whole step with AdamW). Exit code 1 if the losses of the two
forms differ by 1e-4 or more in any term.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from jobs.bench.lumos_batch import INPUTS, lumos_batch
from jobs.bench.rows import emit, hardware, note, spread
from lum_ray.lumos.config import LumosConfig
from lum_ray.lumos.model import Lumos
from lum_ray.lumos.tokens import Batch
from lum_ray.stage import to_device

TOLERANCE = 1e-4


def interleaved(forms: Sequence[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Seconds of each form, `repeats` times in turn, after one run of each outside the clock."""
    for form in forms:
        form()
    seconds: list[list[float]] = [[] for _ in forms]
    for _ in range(repeats):
        for form, samples in zip(forms, seconds, strict=True):
            begin = time.perf_counter()
            form()
            samples.append(time.perf_counter() - begin)
    return seconds


def heads_and_tokenizer(model: Lumos, batch: Batch, plain: bool) -> None:
    """Forward and backward of what the two forms compute differently most."""
    model.zero_grad(set_to_none=True)
    days = batch["history_event_BT"].shape[1]
    pad_BT = torch.arange(days) < batch["pads_B"][:, None]
    tokens_BTD = model.tokenizer(batch, batch["event_rows_ES"], pad_BT, plain)
    states = tokens_BTD[:, : model.config.future_days].flatten(0, 1)
    outputs = model.heads(states, 0, len(model.inputs.terms), plain)
    (tokens_BTD.mean() + outputs.mean()).backward()


def mean_losses(model: Lumos, batch: Batch, plain: bool) -> torch.Tensor:
    """The objective's terms (K,)."""
    sums_K, counts_K = model.loss(batch, plain)
    return sums_K / counts_K.clamp(min=1)


def train_step(model: Lumos, batch: Batch, optimiser: torch.optim.Optimizer, plain: bool) -> None:
    optimiser.zero_grad(set_to_none=True)
    mean_losses(model, batch, plain).sum().backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.train_step", description="One training step of LUMOS.")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small widths, few repeats")
    parser.add_argument("--windows", type=int, default=4, help="windows a batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each form")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    config = LumosConfig()
    if options.quick:
        config = replace(config, history_days=60, width=64, heads=4, encoder_layers=2, swiglu_width=64)
    windows, repeats = (2, 3) if options.quick else (options.windows, options.repeats)
    run = {
        "config": asdict(config),
        "windows": windows,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "quick": options.quick,
        "active_share": 0.08,
    }
    model = Lumos(config, INPUTS)
    batch = to_device(lumos_batch(config, windows, seed=0), torch.device("cpu"))
    with torch.no_grad():
        differences = (mean_losses(model, batch, False) - mean_losses(model, batch, True)).abs()
    difference = float(differences.max())
    note(f"largest loss difference between the fast and the plain form: {difference:.2e}")

    fast, plain = interleaved(
        [lambda: heads_and_tokenizer(model, batch, False), lambda: heads_and_tokenizer(model, batch, True)], repeats
    )
    ratios = [b / a for a, b in zip(fast, plain, strict=True)]
    ratio, low, high = spread(ratios)
    machine = hardware()
    emit(
        "train_step/heads_tokenizer/ratio",
        ratio,
        "x",
        peer="plain form",
        ratio=ratio,
        low=low,
        high=high,
        run=run | {"fast_s": spread(fast)[0], "plain_s": spread(plain)[0]},
        machine=machine,
        packages=("torch", "numpy"),
    )

    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    fast, plain = interleaved(
        [lambda: train_step(model, batch, optimiser, False), lambda: train_step(model, batch, optimiser, True)], repeats
    )
    tokens = windows * config.history_days
    value, low, high = spread([tokens / seconds for seconds in fast])
    emit(
        "train_step/lumos_paper/tokens_per_s",
        value,
        "tokens/s",
        peer="plain form",
        ratio=spread(plain)[0] / spread(fast)[0],
        low=low,
        high=high,
        run=run | {"loss_difference": difference},
        machine=machine,
        packages=("torch", "numpy"),
    )
    if not difference < TOLERANCE:
        worst = sorted(zip(differences.tolist(), model.inputs.terms, strict=True), reverse=True)[:5]
        note(f"expected differences under {TOLERANCE}, got " + ", ".join(f"{name}: {d:.2e}" for d, name in worst))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
