"""GTS-LUM's Phase II as the training loop sees it: collate, loss, trainable; and what `inference` asks of it.

The negatives are a function of (seed, step) alone, the same on all ranks and in all micro-batches of a step; the
reading of a sample, and the one target of a basket that is its positive, of (seed, user, cut). So a step is the same
whatever the number of workers.

Legend: B samples, L tokens, U unique items, N catalogue, R queries, C candidates, P samples read as P, K candidates in
front, S seen pairs, X masked pairs.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lum_ray.data.rows import Rows, Samples, mix, share
from lum_ray.gts.behaviours import hidden_modalities
from lum_ray.gts.collate import dense_targets, next_items, seen_items, token_arrays
from lum_ray.gts.config import PREFIX, GtsConfig, GtsInputs
from lum_ray.gts.llm import Llm
from lum_ray.gts.model import TERMS, Gts
from lum_ray.gts.prior import FEATURES, negative_chance, repeat_features
from lum_ray.gts.profiles import profile_rows
from lum_ray.gts.queries import POSITIVE_SALT, Queries, end_tokens, unique_places
from lum_ray.nn import matrices_decay
from lum_ray.stage import Arrays, Batch

Int64 = npt.NDArray[np.int64]
READING_SALT, CANDIDATE_SALT, NEGATIVE_SALT = 7, 13, 17


class GtsStage:
    """`until_day`: no target at or after it is used."""

    def __init__(
        self,
        config: GtsConfig,
        inputs: GtsInputs,
        until_day: int,
        seed: int = 0,
        module: Gts | None = None,
        llm: Llm | None = None,
    ) -> None:
        self.config, self.inputs, self.until_day, self.seed = config, inputs, until_day, seed
        self.module: Gts = module if module is not None else Gts(config, inputs, llm)
        self.terms = TERMS
        self.weight_N = np.exp(inputs.arrays["log_q_N"].astype(np.float64))
        self.cumulative_N = np.cumsum(self.weight_N)

    # what a batch holds

    def collate(self, rows: Rows, samples: Samples) -> Arrays:
        """The batch of `samples` for training; see `lum_ray.gts.model` for its arrays."""
        batch = self.sequences(rows, samples)
        config = self.config
        users = rows.user_hash[samples.row]
        asks = np.zeros(len(samples), np.bool_)
        if config.reads_targets:
            asks = share(mix(self.seed, READING_SALT, users, samples.cut, samples.draw)) < config.propensity_share
        target_row, target_item = next_items(rows, samples, self.inputs.index_of, self.until_day)
        last = batch["last_group_B"]
        rows_T, groups_T, items_T = target_row, last[target_row], target_item
        if config.dense and config.reading == "honest":
            more = dense_targets(rows, samples, self.inputs.index_of, config.slot_minutes, batch)
            rows_T, groups_T, items_T = (
                np.concatenate([one, two]) for one, two in zip((rows_T, groups_T, items_T), more, strict=True)
            )
        reads = ~asks[rows_T]
        queries = Queries.of(rows_T[reads], groups_T[reads], items_T[reads], self.seed, users, samples)
        candidate_items = self.negatives(samples.step)
        asked = self._asked(rows, samples, batch, np.flatnonzero(asks), target_row, target_item)
        literal = None
        if config.reading == "literal":
            literal = np.full(len(samples), -1, np.int64)
            literal[queries.sample] = queries.positive
        extra = [candidate_items, queries.positive, asked["asked_items_PK"].ravel()]
        unique_U, places = unique_places([batch["item_BL"], *extra, *([literal] if literal is not None else [])])
        batch["place_BL"] = np.where(batch["item_BL"] >= 0, places(batch.pop("item_BL")), 0)
        chance_U = negative_chance(self.weight_N[unique_U], config.negatives)
        seen = self._seen(rows, samples, batch, queries, candidate_items)
        count = len(queries.sample)
        counts = [count, len(asked["asked_sample_P"]), count if config.generation else 0]
        if literal is not None:
            batch["literal_B"] = places(literal)
        return {
            **batch,
            "unique_U": unique_U,
            "hidden_UM": hidden_modalities(unique_U, len(self.module.behaviours.modalities), self.seed, samples.step),
            "query_sample_R": queries.sample,
            "query_token_R": end_tokens(batch["group_BL"], queries),
            "positive_R": places(queries.positive),
            "candidate_C": places(candidate_items),
            "log_chance_U": np.log(np.maximum(chance_U, 1e-12)).astype(np.float32),
            **queries.masked(candidate_items),
            **seen,
            "asked_sample_P": asked["asked_sample_P"],
            "asked_PK": places(asked["asked_items_PK"]),
            **{name: asked[name] for name in ("asked_log_chance_PK", "asked_seen_PKF", "asked_known_PK")},
            "counts_K": np.array(counts, np.float64),
            "tokens": np.array(int(batch["length_B"].sum() + PREFIX * len(samples)), np.int64),
            "user": rows.user[samples.row],
        }

    def sequences(self, rows: Rows, samples: Samples) -> Arrays:
        """The histories of `samples` as tokens, no longer than the longest of them, and the users' table rows."""
        config = self.config
        found = token_arrays(
            rows, samples, self.inputs.index_of, self.inputs.arrays["holidays"], config.slot_minutes,
            config.max_tokens - PREFIX, layout="none" if config.timestamps in ("none", "component", "position")
            else "full",
        )  # fmt: skip
        length = max(int(found["length_B"].max(initial=0)), 1)
        batch: Arrays = {name: value[:, :length] if name.endswith("_BL") else value for name, value in found.items()}
        batch["last_group_B"] = batch["group_BL"].max(axis=1, initial=-1)
        batch["profile_BP"] = profile_rows(self.inputs, rows, samples.row, samples.cut)
        return batch

    def negatives(self, step: int) -> Int64:
        """Catalogue items drawn for a step, by their share of the training events, each once, ascending (C,)."""
        return np.unique(self._popular(share(mix(self.seed, NEGATIVE_SALT, step, np.arange(self.config.negatives)))))

    def _popular(self, uniform: npt.NDArray[np.float64]) -> Int64:
        """The items at these places (0 .. 1) of the catalogue laid out by share of the training events."""
        drawn = np.searchsorted(self.cumulative_N, uniform * self.cumulative_N[-1])
        return np.asarray(np.minimum(drawn, self.inputs.count - 1), np.int64)

    def _seen(self, rows: Rows, samples: Samples, batch: Arrays, queries: Queries, candidate_items: Int64) -> Arrays:
        """What each query's user had before, of its positive (column 0) and of the candidates (1 + c)."""
        nothing: Arrays = {
            "seen_query_S": np.zeros(0, np.int64),
            "seen_column_S": np.zeros(0, np.int64),
            "seen_SF": np.zeros((0, FEATURES), np.float32),
        }
        if not self.config.repeats or not len(queries.sample):
            return nothing
        wanted = np.union1d(candidate_items, queries.positive)
        groups: Literal["last", "all"] = "all" if self.config.dense else "last"
        found = seen_items(rows, samples, self.inputs.index_of, self.config.slot_minutes, batch, groups, wanted)
        query = queries.find(found["query_sample_S"], found["query_group_S"])
        item = found["item_S"]
        features = self._features(found)
        asked = query >= 0
        own = asked & (item == queries.positive[np.maximum(query, 0)])
        column = np.searchsorted(candidate_items, item)
        among = asked & (candidate_items[np.minimum(column, len(candidate_items) - 1)] == item)
        return {
            "seen_query_S": np.concatenate([query[own], query[among]]),
            "seen_column_S": np.concatenate([np.zeros(int(own.sum()), np.int64), 1 + column[among]]),
            "seen_SF": np.concatenate([features[own], features[among]]),
        }

    def _features(self, found: dict[str, Int64]) -> npt.NDArray[np.float32]:
        """The repeat features (S, F) of what `seen_items` found."""
        log_q = self.inputs.arrays["log_q_N"][found["item_S"]]
        return repeat_features(found["count_S"], found["since_S"], found["instants_S"], found["recent_SW"], log_q)

    def _had(self, rows: Rows, samples: Samples, batch: Arrays) -> Arrays:
        """What each user had before the cut: `had_sample_S`, `had_item_S`, `had_SF`."""
        found = seen_items(rows, samples, self.inputs.index_of, self.config.slot_minutes, batch, "last")
        return {
            "had_sample_S": found["query_sample_S"],
            "had_item_S": found["item_S"],
            "had_SF": self._features(found),
        }

    def _asked(
        self, rows: Rows, samples: Samples, batch: Arrays, asking: Int64, target_row: Int64, target_item: Int64
    ) -> Arrays:
        """For each sample that is read as P: one of its targets, and K - 1 others that are none of them.

        Half of the others are items that the user had, where there are some: these are what retrieval hands over. The
        chance of being asked is corrected for, so that P, too, learns the distribution of what comes next.
        """
        users, width = rows.user_hash[samples.row], self.config.candidates
        had = self._had(rows, samples, batch)
        picked, chances = list[Int64](), list[npt.NDArray[np.float64]]()
        kept = list[int]()
        for sample in asking.tolist():
            truth = target_item[target_row == sample]
            if not len(truth):
                continue
            key = (self.seed, users[sample], samples.cut[sample], samples.draw[sample], samples.step)
            before = had["had_item_S"][had["had_sample_S"] == sample]
            own = np.setdiff1d(before, truth)
            half = (width - 1) // 2 if len(own) else 0
            draw = share(mix(*key, CANDIDATE_SALT, np.arange(8 * width)))
            mine = own[(draw[:half] * len(own)).astype(np.int64)]
            others = self._popular(draw[half:])
            found = np.concatenate([mine, others[~np.isin(others, truth)]])
            found = found[np.sort(np.unique(found, return_index=True)[1])][: width - 1]
            if len(found) < width - 1:
                continue  # a catalogue without enough other items
            positive = truth[int(mix(*key, POSITIVE_SALT) % np.uint64(len(truth)))]
            items = np.concatenate([[positive], found])
            chance = (width - 1 - half) * self.weight_N[items]
            chances.append(chance + half / max(len(own), 1) * np.isin(items, before))
            picked.append(items)
            kept.append(sample)
        samples_P, items_PK = np.array(kept, np.int64), np.array(picked, np.int64).reshape(-1, width)
        features, known = pair_features(had, samples_P, items_PK, self.inputs.count)
        return {
            "asked_sample_P": samples_P,
            "asked_items_PK": items_PK,
            "asked_log_chance_PK": np.log(np.array(chances).reshape(-1, width)).astype(np.float32),
            "asked_seen_PKF": features,
            "asked_known_PK": known,
        }

    # the loop's view

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sums, counts) of retrieval, propensity and generation."""
        return self.module.losses(batch), batch["counts_K"]

    def trainable(self) -> list[dict[str, Any]]:
        """The model's parameter groups; what is frozen is in none."""
        return matrices_decay(self.module)

    def questions(self, rows: Rows, samples: Samples) -> Arrays:
        """The batch that `scores` and `rerank` read: histories, and what each user had before. No target is in it."""
        batch = self.sequences(rows, samples)
        had = self._had(rows, samples, batch)
        unique_U, places = unique_places([batch["item_BL"]])
        item = batch.pop("item_BL")
        return {**batch, **had, "unique_U": unique_U, "place_BL": np.where(item >= 0, places(item), 0)}

    def scores(
        self, batch: Batch, literal: torch.Tensor | None = None, state_BD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Reading R: scores (B, N) of the whole catalogue. `literal` (B,) items in front: LEAKS, see config.
        `state_BD`: the `user_states`, if they are there already."""
        module = self.module
        users_BO = module.user(self.user_states(batch, literal) if state_BD is None else state_BD)
        popular_N = module.prior.popular(module.constants["log_q_N"])
        scores_BN = module.scale() * users_BO @ module.catalogue()[1].T + popular_N
        if self.config.repeats and len(batch["had_sample_S"]):
            at = (batch["had_sample_S"], batch["had_item_S"])
            scores_BN = scores_BN.index_put(at, module.prior.repeated(batch["had_SF"]), accumulate=True)
        return scores_BN

    def user_states(self, batch: Batch, literal: torch.Tensor | None = None) -> torch.Tensor:
        """The last state of each history under reading R (B, D)."""
        module = self.module
        fused_ND = module.catalogue()[0]
        x_BLD = module.tokens(batch, fused_ND[batch["unique_U"]])
        rows = torch.arange(len(x_BLD), device=x_BLD.device)
        target = None if literal is None else fused_ND[literal]
        return module.last(batch, rows, module.read(batch, x_BLD, rows, 0, target), literal is not None)

    @torch.no_grad()
    def propensities(self, batch: Batch, items_BK: torch.Tensor, at_once: int = 256) -> torch.Tensor:
        """Reading P: the logit (B, K) of each catalogue item in front of its sample's history."""
        module = self.module
        fused_ND = module.catalogue()[0]
        x_BLD = module.tokens(batch, fused_ND[batch["unique_U"]])
        count, width = items_BK.shape
        rows = torch.arange(count, device=items_BK.device).repeat_interleave(width)
        flat = items_BK.flatten()
        parts = []
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            candidates = fused_ND[flat[start : start + at_once]]
            found = module.read(batch, x_BLD, some, 1, candidates)
            parts.append(module.follows(module.last(batch, some, found, True), candidates))
        logits = torch.cat(parts).view(count, width) + module.prior.popular(module.constants["log_q_N"])[items_BK]
        if not self.config.repeats:
            return logits
        had = {name: batch[name].cpu().numpy() for name in ("had_sample_S", "had_item_S", "had_SF")}
        features, known = pair_features(had, np.arange(count), items_BK.cpu().numpy(), self.inputs.count)
        place = logits.device
        return logits + module.prior.repeated(torch.from_numpy(features).to(place)) * torch.from_numpy(known).to(place)


def pair_features(
    had: Arrays, sample_P: Int64, items_PK: Int64, count: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The repeat features (P, K, F) of (sample, item) pairs, and whether the user had the item (P, K) as 0 or 1."""
    keys = had["had_sample_S"].astype(np.int64) * count + had["had_item_S"]
    if not len(keys):
        return np.zeros((*items_PK.shape, FEATURES), np.float32), np.zeros(items_PK.shape, np.float32)
    order = np.argsort(keys, kind="stable")
    wanted = (sample_P[:, None] * count + items_PK).ravel()
    place = np.minimum(np.searchsorted(keys[order], wanted), len(order) - 1)
    known = keys[order][place] == wanted
    values = np.where(known[:, None], had["had_SF"][order][place], 0.0)
    return (
        values.reshape(*items_PK.shape, FEATURES).astype(np.float32),
        known.reshape(items_PK.shape).astype(np.float32),
    )
