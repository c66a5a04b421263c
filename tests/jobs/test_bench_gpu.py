from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jobs.bench import gpu
from jobs.bench.lumos_batch import INPUTS, lumos_batch
from jobs.bench.rows import KEYS
from lum_ray.lumos.config import LumosConfig
from lum_ray.lumos.model import Lumos
from lum_ray.stage import to_device
from tests.lumos.batches import INPUTS as MIXED
from tests.lumos.batches import arrays, tensors

SMALL = LumosConfig(history_days=24, width=32, heads=4, encoder_layers=2, swiglu_width=40, embed_width=16)


@pytest.mark.parametrize(
    ("changes", "mixed"),
    [
        ({}, False),
        ({"pad": "zero", "static": False, "embed_layers": 2, "decoder_layers": 2}, False),
        ({"decoder_self_attention": True}, True),
        ({"causal": True, "cuts_per_window": 3, "continuous": "lognormal"}, True),
    ],
)
def test_the_flop_formula_counts_what_torch_counts(changes: dict[str, Any], mixed: bool) -> None:
    config = replace(SMALL, **changes)
    inputs = MIXED if mixed else INPUTS
    batch = tensors(arrays(config)) if mixed else to_device(lumos_batch(config, 3, 0), torch.device("cpu"))
    model = Lumos(config, inputs)
    formula = gpu.forward_flops(
        config, inputs, len(batch["slot_A"]), len(batch["event_rows_ES"]), 3, config.cuts_per_window
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(batch)
    assert counter.get_total_flops() == formula
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(batch)[0].sum().backward()
    assert 2.8 * formula < counter.get_total_flops() < 3.05 * formula


def test_flops_per_token_are_those_of_the_papers_sizes() -> None:
    for width, millions in ((512, 86), (1365, 134), (2048, 172)):
        config = LumosConfig(swiglu_width=width)
        flops = 3 * gpu.forward_flops(config, INPUTS, 256 * 29, 367, 256) / (256 * 360)
        assert abs(flops / 1e6 - millions) < 0.05 * millions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Unknown", None),
    ],
)
def test_the_peak_is_looked_up_by_the_chips_name(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu.peak(torch.device("cuda")) == expected
    assert gpu.peak(torch.device("cpu")) is None


def test_batches_are_halved_until_they_fit() -> None:
    tried: list[int] = []

    def attempt(windows: int) -> list[float]:
        tried.append(windows)
        if windows > 100:
            raise torch.cuda.OutOfMemoryError
        return [1.0]

    assert gpu.fitting(512, attempt) == (64, [1.0])
    assert tried == [512, 256, 128, 64]


def test_it_runs_tiny_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--model", "lumos", "--quick", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["what"] for row in rows] == [
        "gpu/lumos_wide/tokens_per_s",
        "gpu/lumos_wide/users_per_s",
        "gpu/lumos_paper/tokens_per_s",
    ]
    assert all(tuple(row) == KEYS for row in rows)
    assert all(row["low"] <= row["value"] <= row["high"] and row["low"] > 0 for row in rows)
    assert all(row["run"]["tiny"] for row in rows)
