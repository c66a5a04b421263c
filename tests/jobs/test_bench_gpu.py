from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jobs.bench import accelerator, gpu, gpu_gts
from jobs.bench.gts_batch import gts_inputs, gts_rows
from jobs.bench.lumos_batch import INPUTS, lumos_batch
from jobs.bench.rows import KEYS
from lum_ray.gts.config import PREFIX
from lum_ray.gts.llm import load, states
from lum_ray.gts.stage import GtsStage
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
    assert accelerator.peak(torch.device("cuda")) == expected
    assert accelerator.peak(torch.device("cpu")) is None


def test_batches_are_halved_until_they_fit() -> None:
    tried: list[int] = []

    def attempt(windows: int) -> list[float]:
        tried.append(windows)
        if windows > 100:
            raise torch.cuda.OutOfMemoryError
        return [1.0]

    assert accelerator.fitting(512, attempt) == (64, [1.0])
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


GTS = gpu_gts.Settings(
    llm="random", windows=8, items=60, candidates=3, steps=1, blocks=1, warmup=0, fast=False, compiled=False,
    device=torch.device("cpu"), machine="here",
)  # fmt: skip


def test_gts_runs_tiny_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--model", "gts", "--quick", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["what"] for row in rows] == [
        "gpu/gts/tokens_per_s",
        "gpu/gts/pairs_per_s/front",
        "gpu/gts/pairs_per_s/end",
    ]
    assert all(tuple(row) == KEYS and row["run"]["tiny"] for row in rows)
    assert all(row["low"] <= row["value"] <= row["high"] and row["low"] > 0 for row in rows)
    training = rows[0]["run"]
    assert training["passes"] == 4 + 4 * training["config"]["candidates"]  # half of 8 histories are read as P
    assert (training["goal_of_one_h100"], training["floor_of_one_h100"]) == (115_000, 85_000)


def test_the_flops_of_a_frozen_decoder_are_those_that_torch_counts() -> None:
    decoder = load(gpu_gts.config_of(GTS)).decoder
    x = torch.randn(3, 20, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        states(decoder, x).sum().backward()
    assert counter.get_total_flops() == 3 * 20 * gpu_gts.flops_per_token(decoder, 20)


def test_made_up_histories_fill_the_sequence_and_have_one_shape() -> None:
    config = gpu_gts.config_of(replace(GTS, fast=True))
    inputs = gts_inputs(config, 500, text_width=8)
    stage = GtsStage(replace(config, width=16, queries=2), inputs, 180)
    for seed in range(2):
        batch = stage.collate(*gts_rows(config, inputs, 8, seed))
        assert len(batch["asked_sample_P"]) == 4 and len(set(batch["query_sample_R"].tolist())) == 4
        assert batch["length_B"].min() > 220 and batch["kind_BL"].shape[1] <= 240 - PREFIX


def test_one_pass_a_history_gives_the_scores_of_a_pass_a_candidate() -> None:
    config = gpu_gts.config_of(GTS, target_position="end", repeats=False)
    inputs = gts_inputs(config, 60, text_width=8)
    stage = GtsStage(config, inputs, 180)
    stage.module.eval()
    batch = to_device(stage.questions(*gts_rows(config, inputs, 6, 0)), torch.device("cpu"))
    assert len(set(batch["length_B"].tolist())) > 1  # so that some histories have pads in front of the candidates
    items_BK = torch.arange(24).view(6, 4)
    expected = stage.propensities(batch, items_BK)
    assert expected.std() > 1e-2
    torch.testing.assert_close(gpu_gts.propensities_from_cache(stage, batch, items_BK), expected, atol=1e-4, rtol=1e-4)
