"""The decoder that reads the sequences: a Llama without its vocabulary, frozen unless the run says otherwise.

Only decoder layers and the last norm are kept: behaviours come in as embeddings, so the table of words is read once
for the starts of descriptors and tasks, and left behind. A frozen LLM is never in the optimiser nor in a checkpoint,
which names it by id, revision and digest. The first `keep_layers` layers alone are read from disk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lum_ray.artifacts import UserError
from lum_ray.data.rows import hash_strings, mix, share
from lum_ray.gts.config import GtsConfig
from lum_ray.gts.local_weights import FOLDERS, local_weights, place_of

RANDOM: dict[str, dict[str, Any]] = {
    "random": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1},
    "random-small": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "num_key_value_heads": 4},
    "random-tinyllama": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                         "num_attention_heads": 32, "num_key_value_heads": 4},
}  # fmt: skip
"""Llamas with random weights, by name: a tiny one for tests, a small one to try things on, one of TinyLlama's shape for
benchmarks."""
PROBES, PROBE_TOKENS, SINK = 8, 32, 4
"""Sequences and tokens of `state_scale`; the first places, which attention may use as a sink, are left out."""
MEND = (
    "give the folder of a Llama (config.json, model.safetensors, tokenizer), or `smollm2`, which "
    "`python -m jobs.weights` makes"
)


@dataclass(frozen=True)
class Llm:
    """`decoder` maps embeddings (B, L, D) to states (B, L, D); `rms` is the size of a word's embedding."""

    decoder: nn.Module
    width: int
    rms: float
    words_VD: Tensor | None
    tokenizer: Any

    def mean_of_words(self, texts: Sequence[str]) -> Tensor:
        """The mean embedding of each text's words (n, D) float32. A random Llama has a random one for each word."""
        if self.words_VD is None:
            return torch.stack([self._random_words(text.split()).mean(dim=0) for text in texts])
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        none = self.words_VD.new_zeros(self.width)
        return torch.stack([self.words_VD[torch.tensor(row)].mean(dim=0) if row else none for row in rows])

    def _random_words(self, words: list[str]) -> Tensor:
        numbers = share(mix(hash_strings(words)[:, None], np.arange(self.width)))
        return torch.from_numpy((2 * numbers - 1).astype(np.float32)) * (math.sqrt(3) * self.rms)


def load(config: GtsConfig) -> Llm:
    """The LLM of the run, with its words. Raises UserError where it cannot be had or is no Llama."""
    from transformers import AutoConfig, LlamaConfig, LlamaModel

    decoder: Any
    if config.llm in RANDOM:
        shape = RANDOM[config.llm] | ({"num_hidden_layers": config.keep_layers} if config.keep_layers else {})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            # the usual .02 leaves a narrow, frozen network without any effect on what passes through it
            spread = 1 / math.sqrt(shape["hidden_size"])
            decoder = LlamaModel(LlamaConfig(vocab_size=8, initializer_range=spread, **shape))
        rms, words, tokenizer = 1.0, None, None
    else:
        place = _place(config)
        try:
            found = AutoConfig.from_pretrained(place, revision=config.revision)
        except (OSError, ValueError) as error:
            raise UserError(
                f"gts.llm: {config.llm}: cannot be loaded ({' '.join(str(error).split())[:200]}); {MEND}"
            ) from None
        if found.model_type != "llama":
            raise UserError(f"gts.llm: {config.llm}: expected a Llama, got a model of type {found.model_type!r}")
        layers = config.keep_layers or found.num_hidden_layers
        if layers > found.num_hidden_layers:
            raise UserError(
                f"gts.keep_layers: {config.llm} has {found.num_hidden_layers} layers, so expected at most that, "
                f"got {layers}"
            )
        found.num_hidden_layers = layers
        decoder = _quietly(LlamaModel, place, found, config.revision)
        tokenizer = _tokenizer(place, config.revision)
        words = decoder.get_input_embeddings().weight.detach().float().clone()
        rms = float(words.square().mean().sqrt())
    decoder.embed_tokens = nn.Identity()
    decoder.config.use_cache = False
    return Llm(_tuned(decoder, config), decoder.config.hidden_size, rms, words, tokenizer)


def _place(config: GtsConfig) -> str:
    if config.llm in FOLDERS:
        return local_weights(config.llm)
    return place_of(config.llm, "gts.llm", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", MEND, config.revision)


def _quietly(kind: Any, place: str, found: Any, revision: str | None) -> Any:
    """Load without the library's lines about the layers that are left out on purpose."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(place, config=found, revision=revision, dtype=torch.float32)
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _tokenizer(place: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, revision=revision)


def _tuned(decoder: nn.Module, config: GtsConfig) -> nn.Module:
    """The decoder with what may train of it: nothing, low-rank additions (peft), or everything."""
    decoder.requires_grad_(config.tune == "full")
    if config.tune != "lora":
        return decoder
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("gts.tune: lora needs the package peft; install it with `pip install peft`") from None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=["q_proj", "v_proj"])
        tuned: nn.Module = get_peft_model(decoder, settings)
        return tuned


def digest(decoder: nn.Module) -> str:
    """SHA-256 (12 hex digits) of the frozen parameters, by name: what a checkpoint's LLM must be again."""
    found = hashlib.sha256()
    for name, parameter in sorted(decoder.named_parameters()):
        if not parameter.requires_grad:
            found.update(name.encode())
            found.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def state_scale(decoder: nn.Module, width: int, size: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation (D,) of each number of the last states, over random sequences with tokens of this `size`.

    In trained LLMs a few numbers are tens of times larger than the others, whatever is read (Source: Sun et al. 2024,
    Massive Activations in Large Language Models). A head over the raw state would follow these alone for long.
    """
    generator = torch.Generator().manual_seed(0)
    x_BLD = size * torch.randn(PROBES, PROBE_TOKENS, width, generator=generator)
    training = decoder.training
    with torch.no_grad():
        found = states(decoder.eval(), x_BLD)[:, SINK:].flatten(0, 1)
    decoder.train(training)
    return found.mean(dim=0), found.std(dim=0) + 1e-6


def states(decoder: nn.Module, x_BLD: Tensor) -> Tensor:
    """The decoder's last states (B, L, D) of embeddings whose pads are all on the right: causal attention never looks
    at them, so no mask is needed."""
    return decoder(inputs_embeds=x_BLD, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
