"""A small made-up world for the tests of GTS-LUM: a catalogue, its fitted inputs and users' rows."""

from __future__ import annotations

import numpy as np

from lum_ray.data.rows import Rows, Samples, hash_strings
from lum_ray.gts.align_stage import vocabulary, word_table
from lum_ray.gts.config import GtsConfig, GtsInputs

WORDS = ("red", "green", "blue", "round", "square", "small", "large", "apple", "pear", "plum", "fig", "nut")
MINUTE = 60_000_000


def tiny_config(**changes: object) -> GtsConfig:
    """Small enough for a test."""
    base: dict[str, object] = {
        "text_encoder": "minilm", "branching": 3, "depth": 2, "slot_minutes": 15, "max_tokens": 40, "width": 16,
        "heads": 2, "layers": 2, "queries": 2, "llm": "random", "candidates": 3, "negatives": 16, "output_width": 16,
        "align_group": 8, "window": 2, "text_tokens": 8, "retrieve": 10, "rerank": 4, "graph_width": 8,
        "table_width": 4,
    }  # fmt: skip
    return GtsConfig(**(base | changes))  # type: ignore[arg-type]


def inputs_of(count: int = 30, seed: int = 0, config: GtsConfig | None = None) -> GtsInputs:
    """Fitted inputs of `count` items with random embeddings."""
    config = config or tiny_config()
    rng = np.random.default_rng(seed)
    items = tuple(f"item{index:03d}" for index in range(count))
    texts = [f"{WORDS[i % 7]} {WORDS[7 + i % 5]} {i}" for i in range(count)]
    known = vocabulary(texts)
    hashes = hash_strings(list(items)).view(np.int64)
    paths = np.stack(
        [(np.arange(count) // config.branching**level) % config.branching for level in range(config.depth)]
    )
    weight = rng.dirichlet(np.ones(count))
    return GtsInputs(
        items=items,
        vocabulary=known,
        profile_numbers=("age",),
        profile_categories=("city",),
        profile_values=(("a", "b"),),
        arrays={
            "hash_N": hashes,
            "text_NE": rng.normal(size=(count, 12)).astype(np.float32),
            "graph_NG": rng.normal(size=(count, 8)).astype(np.float32),
            "graph_known_N": np.arange(count) % 5 > 0,
            "table_NH": rng.normal(size=(count, 4)).astype(np.float32),
            "paths_ND": paths.T[:, ::-1].astype(np.int64).copy(),
            "collision_N": (np.arange(count) // config.branching**config.depth).astype(np.int64),
            "count_N": np.ceil(1000 * weight).astype(np.int64),
            "log_q_N": np.log(0.9 * weight + 0.1 / count).astype(np.float32),
            "words_NT": word_table(texts, known, config.text_tokens),
            "profile_scale": np.array([[40.0, 10.0]]),
            "holidays": np.zeros(0, np.int64),
        },
    )


def rows_of(inputs: GtsInputs, users: int = 6, events: int = 24, seed: int = 0, days: int = 40) -> Rows:
    """Users with up to `events` events each over `days` days from day 100 on, some at the same instant."""
    rng = np.random.default_rng(seed)
    day, values, offsets = [], [], [0]
    for _ in range(users):
        count = int(rng.integers(1, events + 1))
        minute = np.sort(rng.integers(0, days * 288, count)) * 5
        item = rng.integers(0, inputs.count, count)
        key = np.unique(np.stack([minute, item], axis=1), axis=0)
        day.append(100 + key[:, 0] // 1440)
        values.append(
            np.stack(
                [inputs.arrays["hash_N"][key[:, 1]], (100 * 1440 + key[:, 0]) * MINUTE, np.zeros(len(key), np.int64)],
                axis=1,
            )
        )
        offsets.append(offsets[-1] + len(key))
    names = np.array([f"user{index}" for index in range(users)], np.object_)
    return Rows(
        user=names,
        user_hash=hash_strings(names.tolist()),
        offsets=np.array(offsets, np.int64),
        days=np.concatenate(day).astype(np.int32),
        values=np.concatenate(values).astype(np.int64),
        first_day=np.array([d[0] for d in day], np.int32),
        end_day=np.full(users, 100 + days, np.int32),
        segment=np.full(users, "", np.object_),
        profile={
            "age": rng.normal(40, 10, users),
            "city": np.array([None if i % 3 == 2 else "ab"[i % 2] for i in range(users)], np.object_),
        },
    )


def samples_of(rows: Rows, cut: int = 125, step: int = 0) -> Samples:
    """One cut of every row."""
    count = len(rows)
    return Samples(np.arange(count), np.full(count, cut, np.int32), np.zeros(count, np.int32), step)
