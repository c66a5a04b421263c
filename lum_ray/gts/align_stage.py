"""Phase I as the training loop sees it: collate, loss, trainable.

A sample gives two groups of its own: `align_group` items drawn from the catalogue, and the windows of its user's newest
behaviours. Both are functions of (seed, step, user, cut), so the step does not depend on the number of workers.

Legend: B samples, G in a group, K behaviours in a window, T words, N items.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lum_ray.data.rows import Rows, Samples, mix, share
from lum_ray.gts.alignment import TASKS, Aligner, groups_of
from lum_ray.gts.behaviours import Behaviours, hidden_modalities
from lum_ray.gts.collate import BEHAVIOUR, DESCRIPTOR, token_arrays
from lum_ray.gts.config import GtsConfig, GtsInputs
from lum_ray.gts.intervals import DESCRIPTORS, descriptor_text
from lum_ray.nn import matrices_decay
from lum_ray.stage import Arrays, Batch

Int64 = npt.NDArray[np.int64]
PAD_WORD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unknown>")
ITEM_WORDS, DESCRIPTOR_WORDS = 6, 5
"""Words of an item and of a descriptor in a narrative, at most."""


def split_words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, in order."""
    return re.findall(r"\w+", text.lower())


def vocabulary(texts: Sequence[str]) -> tuple[str, ...]:
    """SPECIAL, then every word of the texts and of the time descriptors, sorted."""
    names = [*texts, *(descriptor_text(code) for code in range(DESCRIPTORS))]
    return (*SPECIAL, *sorted({word for text in names for word in split_words(text)}))


def word_table(texts: Sequence[str], known: Sequence[str], length: int) -> Int64:
    """(n, length): BOS, the words' numbers, EOS where there is room, 0 behind."""
    number = {word: index for index, word in enumerate(known)}
    table = np.zeros((len(texts), length), np.int64)
    for row, text in enumerate(texts):
        codes = [BOS, *(number.get(word, UNKNOWN) for word in split_words(text)), EOS][:length]
        table[row, : len(codes)] = codes
    return table


class AlignStage:
    """Terms: the run's `align_tasks`, in order."""

    def __init__(self, config: GtsConfig, inputs: GtsInputs, behaviours: Behaviours, seed: int = 0) -> None:
        self.config, self.inputs, self.seed = config, inputs, seed
        self.module = Aligner(config, inputs, behaviours)
        self.terms = tuple(config.align_tasks)
        named = [descriptor_text(code) for code in range(DESCRIPTORS)]
        self.descriptor_words = word_table(named, inputs.vocabulary, DESCRIPTOR_WORDS + 1)[:, 1:]
        self.descriptor_words[self.descriptor_words == EOS] = PAD_WORD

    def collate(self, rows: Rows, samples: Samples) -> Arrays:
        """The groups of `samples`; see `lum_ray.gts.alignment` for the arrays."""
        groups = {"behaviour": self._items(rows, samples), "window": self._windows(rows, samples)}
        batch: Arrays = {"tokens": np.array(0, np.int64), "user": rows.user[samples.row]}
        counts = []
        modalities = len(self.module.behaviours.modalities)
        for level, (items, words) in groups.items():
            there = np.any(items >= 0, axis=2)
            same = np.all(words[:, :, None] == words[:, None], axis=3)
            key = (self.seed, samples.step, rows.user_hash[samples.row][:, None], np.arange(items.shape[1]))
            batch |= {
                f"{level}_items_BGK": items,
                f"{level}_hidden_BGKM": hidden_modalities(items, modalities, self.seed, samples.step),
                f"{level}_words_BGT": words,
                f"{level}_there_BG": there,
                f"{level}_same_BGG": same,
                f"{level}_draw_BG": share(mix(*key, 5)).astype(np.float32),
            }
            counts += [float(there.sum())] * 3
            batch["tokens"] = batch["tokens"] + there.sum()
        by_task = dict(zip(TASKS, counts, strict=True))
        batch["counts_K"] = np.array([by_task[name] for name in self.terms], np.float64)
        return batch

    def _items(self, rows: Rows, samples: Samples) -> tuple[Int64, Int64]:
        """Distinct items of the catalogue for each sample, (B, G, 1) and their words (B, G, T)."""
        count = self.inputs.count
        size = min(self.config.align_group, count)
        users = rows.user_hash[samples.row][:, None]
        drawn = mix(self.seed, samples.step, users, samples.cut[:, None], np.arange(2 * size + 8)) % np.uint64(count)
        items = np.full((len(samples), size), -1, np.int64)
        for row, found in enumerate(drawn.astype(np.int64)):
            distinct = found[np.sort(np.unique(found, return_index=True)[1])][:size]
            items[row, : len(distinct)] = distinct
        words = self.inputs.arrays["words_NT"][np.maximum(items, 0)]
        return items[:, :, None], np.where(items[:, :, None] >= 0, words, PAD_WORD)

    def _windows(self, rows: Rows, samples: Samples) -> tuple[Int64, Int64]:
        """Windows of K behaviours in a row, newest last, (B, G, K), and their narratives (B, G, T)."""
        window = self.config.window
        size = max(2, self.config.align_group // window)
        tokens = token_arrays(
            rows, samples, self.inputs.index_of, self.inputs.arrays["holidays"], self.config.slot_minutes,
            size * window * 3,
        )  # fmt: skip
        items = np.full((len(samples), size * window), -1, np.int64)
        codes = np.zeros((len(samples), size * window), np.int64)
        opens = np.zeros((len(samples), size * window), np.bool_)
        for row in range(len(samples)):
            at = np.flatnonzero(tokens["kind_BL"][row] == BEHAVIOUR)[-size * window :]
            at = at[len(at) % window :]
            group, of_group = tokens["group_BL"][row, at], tokens["descriptor_BL"][row]
            items[row, : len(at)] = tokens["item_BL"][row, at]
            codes[row, : len(at)] = of_group[tokens["kind_BL"][row] == DESCRIPTOR][group]
            opens[row, : len(at)] = np.diff(group, prepend=-1) != 0
        shape = (len(samples), size, window)
        items, codes, opens = items.reshape(shape), codes.reshape(shape), opens.reshape(shape)
        opens[:, :, 0] = True
        return items, self.narrative(items, codes, opens)

    def narrative(self, items_BGK: Int64, codes_BGK: Int64, opens_BGK: npt.NDArray[np.bool_]) -> Int64:
        """What happened in each window, in words (B, G, 2 T): "wednesday morning rush hour milk bread thursday ...".

        Source: GTS-LUM, sequence-level texts; the template is ours.
        """
        there = items_BGK >= 0
        item = self.inputs.arrays["words_NT"][np.maximum(items_BGK, 0)][..., 1:-1]
        item = np.where(item == EOS, PAD_WORD, item)
        # the last words of an item's text are the most specific ones
        item = np.take_along_axis(item, np.argsort(item == PAD_WORD, axis=-1, kind="stable"), axis=-1)
        kept = (item > 0).sum(axis=-1, keepdims=True)
        start = np.maximum(kept - ITEM_WORDS, 0)
        place = np.minimum(start + np.arange(ITEM_WORDS), item.shape[-1] - 1)
        item = np.where(start + np.arange(ITEM_WORDS) < kept, np.take_along_axis(item, place, axis=-1), PAD_WORD)
        time = np.where((opens_BGK & there)[..., None], self.descriptor_words[codes_BGK], PAD_WORD)
        words = np.concatenate([time, np.where(there[..., None], item, PAD_WORD)], axis=-1)
        flat = words.reshape(*words.shape[:2], words.shape[2] * words.shape[3])
        flat = np.take_along_axis(flat, np.argsort(flat == PAD_WORD, axis=-1, kind="stable"), axis=-1)
        bos = np.where(np.any(there, axis=2)[..., None], BOS, PAD_WORD)
        return np.concatenate([bos, flat], axis=-1)[..., : 2 * self.config.text_tokens].astype(np.int64)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sums, counts) of the run's tasks."""
        nothing = self.module.log_scale.sum() * 0.0
        groups = groups_of(batch)
        sums = [TASKS[name](self.module, groups) + nothing for name in self.terms]
        return torch.stack(sums), batch["counts_K"]

    def trainable(self) -> list[dict[str, Any]]:
        return matrices_decay(self.module)
