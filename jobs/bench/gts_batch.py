"""Made-up fitted inputs and users of GTS-LUM for the benchmarks: a catalogue with Zipf's popularity, long histories.

Legend: N items, E text, G graph, H table width, D levels, A events.
"""

from __future__ import annotations

import numpy as np

from lum_ray.data.rows import Rows, Samples, hash_strings, mix, share
from lum_ray.gts.config import GtsConfig, GtsInputs
from lum_ray.gts.stage import READING_SALT

CUT, DAYS = 150, 180
MINUTE_US = 60_000_000
BASKETS, LARGEST_BASKET = 110, 7
"""Of a user: more than 240 tokens hold before the cut, and something comes behind it."""


def gts_inputs(config: GtsConfig, count: int, seed: int = 0, text_width: int = 1024) -> GtsInputs:
    """The fitted inputs of `count` items with random embeddings, as wide as BGE-M3's."""
    rng = np.random.default_rng(seed)
    items = tuple(f"item{index:06d}" for index in range(count))
    hash_N = hash_strings(list(items)).view(np.int64)
    leaves = config.branching**config.depth
    leaf_N = rng.permutation(count) % leaves
    place_D = config.branching ** np.arange(config.depth)[::-1]
    weight_N = rng.permutation(1.0 / (10 + np.arange(count)))
    return GtsInputs(
        items=items,
        vocabulary=(),
        profile_numbers=("age",),
        profile_categories=("city",),
        profile_values=(("a", "b"),),
        arrays={
            "hash_N": hash_N,
            "text_NE": rng.normal(size=(count, text_width)).astype(np.float32),
            "graph_NG": rng.normal(size=(count, config.graph_width)).astype(np.float32),
            "graph_known_N": rng.random(count) < 0.9,
            "table_NH": rng.normal(size=(count, config.table_width)).astype(np.float32),
            "paths_ND": (leaf_N[:, None] // place_D % config.branching).astype(np.int64),
            "collision_N": (np.arange(count) // leaves).astype(np.int64),
            "count_N": np.ones(len(weight_N), np.int64),
            "log_q_N": np.log(weight_N / weight_N.sum()).astype(np.float32),
            "words_NT": np.zeros((count, config.text_tokens), np.int64),
            "profile_scale": np.array([[40.0, 10.0]]),
            "holidays": np.arange(0, DAYS, 30),
        },
    )


def gts_rows(config: GtsConfig, inputs: GtsInputs, windows: int, seed: int) -> tuple[Rows, Samples]:
    """`windows` users with one cut each. Of the users, the share that training reads as P is exactly the run's, so that
    what the decoder reads has one shape for every `seed`."""
    rng = np.random.default_rng(seed)
    names = _users(round(windows * config.propensity_share), windows, config.propensity_share, seed)
    size_M = rng.integers(1, LARGEST_BASKET + 1, windows * BASKETS)
    minute_M = np.sort(rng.integers(0, DAYS * 288, (windows, BASKETS)) * 5, axis=1).ravel()
    user_A = np.repeat(np.arange(windows).repeat(BASKETS), size_M)
    weight_N = np.exp(inputs.arrays["log_q_N"].astype(np.float64))
    item_A = np.searchsorted(np.cumsum(weight_N), rng.random(len(user_A)) * weight_N.sum()).clip(max=inputs.count - 1)
    key_A3 = np.unique(np.stack([user_A, np.repeat(minute_M, size_M), item_A], axis=1), axis=0)
    user_A, minute_A, item_A = key_A3.T
    rows = Rows(
        user=np.array(names, np.object_),
        user_hash=hash_strings(names),
        offsets=np.searchsorted(user_A, np.arange(windows + 1)).astype(np.int64),
        days=(minute_A // 1440).astype(np.int32),
        values=np.stack([inputs.arrays["hash_N"][item_A], minute_A * MINUTE_US, np.zeros_like(minute_A)], axis=1),
        first_day=np.zeros(windows, np.int32),
        end_day=np.full(windows, DAYS, np.int32),
        segment=np.full(windows, "", np.object_),
        profile={"age": rng.normal(40, 10, windows), "city": np.array(["a", "b"], np.object_)[np.arange(windows) % 2]},
    )
    samples = Samples(np.arange(windows), np.full(windows, CUT, np.int32), np.zeros(windows, np.int32), seed)
    return rows, samples


def _users(asked: int, windows: int, share_of_p: float, seed: int) -> list[str]:
    """Names of `windows` users, of whom a stage of seed 0 reads `asked` as P."""
    names = [f"user{seed}_{index}" for index in range(20 * windows + 200)]
    asks = share(mix(0, READING_SALT, hash_strings(names), np.int32(CUT), np.int32(0))) < share_of_p
    return [names[i] for i in sorted([*np.flatnonzero(asks)[:asked], *np.flatnonzero(~asks)[: windows - asked]])]
