"""Which Llama is read, how much of it, and what is said where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lum_ray.artifacts import UserError
from lum_ray.gts.llm import digest, load, state_scale, states
from tests.gts.world import tiny_config

WORDS = {"<unk>": 0, "monday": 1, "morning": 2, "rush": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local Llama of three layers with its tokenizer, as a user would have one."""
    place = str(tmp_path_factory.mktemp("llama"))
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    LlamaForCausalLM(shape).save_pretrained(place)
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(place)
    return place


def test_the_first_layers_of_a_local_llama(folder: str) -> None:
    whole, first = load(tiny_config(llm=folder)), load(tiny_config(llm=folder, keep_layers=1))
    assert (len(whole.decoder.layers), len(first.decoder.layers)) == (3, 1)  # type: ignore[arg-type]
    pairs = zip(whole.decoder.layers[0].parameters(), first.decoder.layers[0].parameters(), strict=True)  # type: ignore[index]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(parameter.requires_grad for parameter in whole.decoder.parameters())
    assert (
        digest(whole.decoder) != digest(first.decoder) == digest(load(tiny_config(llm=folder, keep_layers=1)).decoder)
    )
    x = torch.randn(1, 4, 16)
    longer = torch.cat([x, torch.randn(1, 3, 16)], dim=1)
    assert torch.allclose(states(whole.decoder, x), states(whole.decoder, longer)[:, :4], atol=1e-6)  # pads behind


def test_words_are_the_mean_of_the_embeddings(folder: str) -> None:
    llm = load(tiny_config(llm=folder))
    assert llm.words_VD is not None and llm.rms == pytest.approx(float(llm.words_VD.square().mean().sqrt()))
    found = llm.mean_of_words(["monday morning", "rush", ""])
    assert torch.allclose(found[0], llm.words_VD[[1, 2]].mean(dim=0)) and torch.equal(found[1], llm.words_VD[3])
    assert torch.equal(found[2], torch.zeros(16))


def test_a_random_llama_is_the_same_each_time_and_disturbs_no_draw() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    one = load(tiny_config())
    assert torch.equal(torch.randn(3), expected)
    assert digest(one.decoder) == digest(load(tiny_config()).decoder)
    assert torch.equal(one.mean_of_words(["a", "b"]), load(tiny_config()).mean_of_words(["a", "b"]))


def test_a_random_llama_says_the_same_of_the_same_word() -> None:
    llm = load(tiny_config())
    monday, tuesday, both = llm.mean_of_words(["Monday", "Tuesday", "Monday Tuesday"])
    assert torch.allclose(both, (monday + tuesday) / 2) and not torch.allclose(monday, tuesday)


def test_the_size_of_states_is_measured_number_by_number() -> None:
    """A number that the norm makes fifty times as large, as trained LLMs do, is as wide as the others once scaled."""
    llm = load(tiny_config())
    decoder = llm.decoder.train()
    with torch.no_grad():
        decoder.norm.weight[3] = 50.0  # type: ignore[union-attr, operator, index]
    center, spread = state_scale(decoder, llm.width, llm.rms)
    assert decoder.training and spread[3] > 20 * spread.median()
    x = torch.randn(64, 24, llm.width, generator=torch.Generator().manual_seed(1)) * llm.rms
    with torch.no_grad():
        scaled = ((states(decoder, x)[:, 4:] - center) / spread).flatten(0, 1)
    assert scaled.mean(dim=0).abs().max() < 0.3
    assert scaled.std(dim=0).min() > 0.7 and scaled.std(dim=0).max() < 1.4


def test_what_cannot_be_read_is_named(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gts\.keep_layers: .* has 3 layers, so expected at most that, got 4"):
        load(tiny_config(llm=folder, keep_layers=4))
    with pytest.raises(UserError, match=r"gts\.llm: '/nowhere/llama': expected a folder that is there.*jobs\.weights"):
        load(tiny_config(llm="/nowhere/llama"))
    GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="expected a Llama, got a model of type 'gpt2'"):
        load(tiny_config(llm=str(tmp_path)))
