"""Imports that must not happen, seen in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("ray", "deepspeed", "pydantic", "polars", "pandas", "sklearn", "yaml", "rich", "typer", "fastapi")
FITTING = ("sentence_transformers", "gensim", "scipy", "gguf")


def run_without(blocked: tuple[str, ...], modules: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    script = f"""
import importlib, importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
for name in {modules!r}:
    importlib.import_module(name)
print("fine")
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_a_bare_gpu_machine_runs_models_loader_and_benchmark() -> None:
    modules = (
        "lum_ray.nn",
        "lum_ray.stage",
        "lum_ray.weights",
        "lum_ray.lumos.model",
        "lum_ray.lumos.stage",
        "lum_ray.lumos.fitting",
        "lum_ray.lumos.timelines",
        "lum_ray.lumos.predictor",
        "lum_ray.gts.model",
        "lum_ray.gts.stage",
        "lum_ray.gts.align_stage",
        "lum_ray.gts.collate",
        "lum_ray.gts.inference",
        "lum_ray.data.loader",
        "jobs.bench.gpu",
    )
    done = run_without((*HEAVY, *FITTING), modules)
    assert done.stdout == "fine\n", done.stderr[-800:]


def test_the_block_works() -> None:
    assert "blocked: ray" in run_without(("ray",), ("lum_ray.training.fit",)).stderr


@pytest.mark.parametrize(
    "module",
    [
        "lum_ray",
        "lum_ray.lumos.model",
        "lum_ray.lumos.predictor",
        "lum_ray.gts.model",
        "lum_ray.gts.stage",
        "lum_ray.gts.fitting",
        "lum_ray.catalog",
    ],
)
def test_importing_a_model_imports_neither_ray_nor_deepspeed(module: str) -> None:
    script = f"import {module}, sys; print([n for n in ('ray', 'deepspeed') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"
