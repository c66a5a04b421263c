"""The leak battery on a trained run of GTS-LUM: what `evaluation/audit` judges is measured here.

A run of the literal reading is scored as its authors would score it, with the true target in the prefix; the table
says what comes of that. Source: FIELD.md, sections 2 and 3.

Legend: B samples, N items, T targets (sample, item), K items of a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Int64, mix
from lum_ray.evaluation import audit
from lum_ray.evaluation.audit import Check
from lum_ray.evaluation.metrics import Floats
from lum_ray.evaluation.ranking import basket_metrics, ranks_of
from lum_ray.evaluation.ranking_baselines import Catalogue, Popularity, baseline_rankings
from lum_ray.gts.collate import next_items
from lum_ray.gts.inference import best, generate, rerank
from lum_ray.gts.stage import GtsStage
from lum_ray.stage import to_device
from lum_ray.steps.audit_rows import Cases, with_future
from lum_ray.steps.gts_audit_fitted import fitted_checks, holiday_check, training_checks
from lum_ray.steps.gts_prepare import GtsPrepared
from lum_ray.steps.prepare import Log

BATCH = 64
BEAM = 64
CONSTANTS = ("popularity", "popularity_7d")
CUTOFFS = (1, 10)
RECALL, HITS, NDCG = "eval/recall_10", "eval/recall_1", "eval/ndcg_10"
PREFIX_PASSES = 20_000
"""How many (sample, candidate) pairs of the literal reading are scored with the candidate in front."""
TARGET_SALT, ITEM_SALT = 61, 67
Metrics = dict[str, Floats]


@dataclass(frozen=True)
class Labels:
    """What follows each of B samples: `item[offsets[b] : offsets[b + 1]]`, catalogue indices; there may be none."""

    offsets: Int64
    item: Int64

    @staticmethod
    def of(stage: GtsStage, cases: Cases) -> Labels:
        """The items at the first instant on or after each cut."""
        sample, item = next_items(cases.rows, cases.samples, stage.inputs.index_of, 2**31 - 1)
        counts = np.bincount(sample, minlength=len(cases))
        return Labels(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), item)

    def one_each(self, cases: Cases) -> Labels:
        """One of each sample's items, by hash of the user and the cut."""
        counts = np.diff(self.offsets)
        drawn = mix(TARGET_SALT, cases.rows.user_hash, cases.samples.cut)
        place = self.offsets[:-1] + (drawn % np.maximum(counts, 1).astype(np.uint64)).astype(np.int64)
        some = counts > 0
        return Labels(np.concatenate([[0], np.cumsum(some)]).astype(np.int64), self.item[place[some]])

    def first(self) -> Int64:
        """(B,) the first item of each sample, -1 where there is none."""
        some = np.diff(self.offsets) > 0
        result = np.full(len(some), -1, np.int64)
        result[some] = self.item[self.offsets[:-1][some]]
        return result

    def metrics(self, scores_XN: Any, of_X: Int64) -> Metrics:
        """Metrics (X,) of scores (X, N), row x judged by the items of sample `of_X[x]` (-1: not judged, NaN)."""
        counts = np.where(of_X >= 0, np.diff(self.offsets)[of_X], 0)
        row = np.repeat(np.arange(len(of_X)), counts)
        inside = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
        item = self.item[self.offsets[of_X[row]] + inside]
        ranks = ranks_of(np.asarray(scores_XN, np.float32), (row, item))
        return basket_metrics(ranks, row, len(of_X), scores_XN.shape[1], CUTOFFS)


def gts_checks(run: Run, prepared: GtsPrepared, stage: GtsStage, cases: Cases, log: Log) -> list[Check]:
    """The table of a trained run over `cases`, samples of its test plan. `stage` is in evaluation mode."""
    timelines = Timelines.open(prepared.sequences.uri)
    log(f"scoring {len(cases):,} cuts of {len(np.unique(cases.user)):,} users as they are and as they must not matter")
    checks = unchanged_checks(stage, cases)
    full = np.flatnonzero(timelines.bucket_users).tolist()
    popularity = Popularity.count((timelines.read([bucket]) for bucket in full), prepared.catalogue)
    constants = constant_rankings(stage, cases, prepared.catalogue, popularity)
    checks += shuffle_checks(stage, cases, constants)
    checks.append(candidate_check(stage, cases, log))
    checks += null_checks(run, stage, cases, constants)
    checks += training_checks(run, stage, timelines)
    log("fitting again without the events from the train cut on")
    checks += fitted_checks(run, prepared, stage, timelines)
    return [*checks, holiday_check(stage, cases, lambda other, some: _readings(other, some, None)[0][0])]


# the two readings, as a run is evaluated


def scores_of(stage: GtsStage, batch: Mapping[str, torch.Tensor], front_B: Int64 | None = None) -> torch.Tensor:
    """Reading R (B, N); with `front_B` (-1: nothing) as the literal reading, those items in the prefix."""
    with torch.no_grad():
        plain = stage.scores(batch)
        if front_B is None or (front_B < 0).all():
            return plain
        device = plain.device
        front = torch.from_numpy(np.maximum(front_B, 0)).to(device)
        return torch.where(torch.from_numpy(front_B >= 0).to(device)[:, None], stage.scores(batch, front), plain)


def batch_of(stage: GtsStage, cases: Cases) -> dict[str, torch.Tensor]:
    return to_device(stage.questions(cases.rows, cases.samples), next(stage.module.parameters()).device)


def front_of(stage: GtsStage, cases: Cases) -> Int64 | None:
    """What the run puts in the prefix of reading R: nothing, or in the literal reading a true target (B,)."""
    if stage.config.reading != "literal":
        return None
    return Labels.of(stage, cases).one_each(cases).first()


# what must not move a score


def unchanged_checks(stage: GtsStage, cases: Cases) -> list[Check]:
    """Swapped labels, and everything after the cut removed: the scores of R, and of P for R's list, stay to the bit."""
    others = cases.strangers()

    def another(values: Int64) -> Int64:
        item = stage.inputs.index_of(values[:, 0])
        shift = 1 + mix(ITEM_SALT, values[:, 0]) % np.uint64(max(stage.inputs.count - 1, 1))
        found = values.copy()
        found[:, 0] = stage.inputs.arrays["hash_N"][(np.maximum(item, 0) + shift.astype(np.int64)) % stage.inputs.count]
        return found

    cut = cases.samples.cut.astype(np.int64)
    worlds = {
        "swap labels": (cases.with_rows(with_future(cases.rows, cut, others, another)),
                        "events from the cut on replaced by other users' times and other items"),
        "truncate": (cases.truncated(), "everything from the cut on removed"),
    }  # fmt: skip
    control = cases.take(np.where(others >= 0, others, np.arange(len(cases))))
    moved = {(name, reading): 0.0 for name in (*worlds, "control") for reading in "RP"}
    for part in cases.parts(BATCH):
        before, items = _readings(stage, cases.take(part), None)
        for name, world in {**{name: world for name, (world, _) in worlds.items()}, "control": control}.items():
            after, _ = _readings(stage, world.take(part), items)
            for reading, one, other in zip("RP", before, after, strict=True):
                moved[name, reading] = max(moved[name, reading], audit.largest_change(one, other))
    prefix = ", the true target in front" if stage.config.reading == "literal" else ""
    checks = []
    for name, (_, compared) in worlds.items():
        checks.append(
            audit.unchanged(f"{name} (R)", f"{compared}{prefix}: scores", moved[name, "R"], moved["control", "R"])
        )
        if stage.config.reads_targets:
            asked = f"{compared}: P's scores of R's list"
            checks.append(audit.unchanged(f"{name} (P)", asked, moved[name, "P"], moved["control", "P"]))
    return checks


def _readings(stage: GtsStage, cases: Cases, items_BK: Int64 | None) -> tuple[tuple[Any, Any], Int64 | None]:
    """R's scores (B, N), P's of the first items of R's list (B, K) or of `items_BK`, and these items."""
    batch = batch_of(stage, cases)
    scores = scores_of(stage, batch, front_of(stage, cases))
    if not stage.config.reads_targets:
        return (scores.cpu().numpy(), np.zeros(0)), None
    if items_BK is None:
        items_BK = best(scores, stage.config.rerank)[0]
    logits = stage.propensities(batch, torch.from_numpy(items_BK).to(scores.device))
    return (scores.cpu().numpy(), logits.cpu().numpy()), items_BK


# what must fall to popularity


def constant_rankings(stage: GtsStage, cases: Cases, catalogue: Catalogue, popularity: Popularity) -> Metrics:
    """Metrics (B,) of the rankings that know no user, as `<name> <metric>`."""
    labels, found = _labels(stage, cases), []
    for part in cases.parts(BATCH):
        some = cases.take(part)
        row: Metrics = {}
        for name in CONSTANTS:
            items, values = baseline_rankings(some.rows, some.samples, catalogue, popularity, name, stage.inputs.count)
            scores = np.full(items.shape, -np.inf, np.float32)
            np.put_along_axis(scores, items, values, axis=1)
            row |= {f"{name} {metric}": value for metric, value in labels.metrics(scores, part).items()}
        found.append(row)
    return _joined(found)


def _labels(stage: GtsStage, cases: Cases) -> Labels:
    """What a run's rankings are judged by: all targets, or in the literal reading the one that stands in front."""
    labels = Labels.of(stage, cases)
    return labels.one_each(cases) if stage.config.reading == "literal" else labels


def _constant(constants: Metrics, metric: str) -> tuple[str, Floats]:
    return audit.best_constant({name: constants[f"{name} {metric}"] for name in CONSTANTS})


def shuffle_checks(stage: GtsStage, cases: Cases, constants: Metrics) -> list[Check]:
    """Each label is judged by a stranger's history: R falls to popularity, and what P gains on R is gone."""
    labels, strangers = _labels(stage, cases), cases.strangers()
    of = np.full(len(cases), -1, np.int64)  # whose label a history is given to
    of[strangers[strangers >= 0]] = np.flatnonzero(strangers >= 0)
    literal = stage.config.reading == "literal"
    first, found = labels.first(), []
    for part in cases.parts(BATCH):
        batch = batch_of(stage, cases.take(part))
        row: Metrics = {}
        for kind, whose in (("own", part), ("shuffled", of[part])):
            front = np.where(whose >= 0, first[whose], -1) if literal else None
            scores = scores_of(stage, batch, front)
            row |= {f"{kind} R {name}": value for name, value in labels.metrics(scores.cpu().numpy(), whose).items()}
            if stage.config.reads_targets:
                listed = _reranked(stage, batch, scores)
                row |= {f"{kind} P {name}": value for name, value in labels.metrics(listed, whose).items()}
        found.append(row)
    whole = _joined(found)
    back = np.where(strangers >= 0, strangers, 0)  # the row in which a label's stranger was scored
    shuffled = {
        name: np.where(strangers >= 0, value[back], np.nan) if name.startswith("shuffled") else value
        for name, value in whole.items()
    }
    name, constant = _constant(constants, RECALL)
    own = float(np.nanmean(shuffled[f"own R {RECALL}"])) if len(labels.item) else float("nan")
    note = f"; own history {own:.3f}"
    compared = "label of one user, history of another"
    if literal:
        note += f"; R@1 {_mean(shuffled[f'own R {HITS}'])} own, {_mean(shuffled[f'shuffled R {HITS}'])} shuffled"
        compared += ", the true target in front"
    checks = [
        audit.no_gain("shuffle histories (R)", compared, "R@10", shuffled[f"shuffled R {RECALL}"], constant,
                      cases.user, name, note)
    ]  # fmt: skip
    if stage.config.reads_targets:
        kinds = ("own", "shuffled")
        pairs = [(shuffled[f"{kind} R {NDCG}"], shuffled[f"{kind} P {NDCG}"]) for kind in kinds]
        checks.append(
            audit.no_rerank_gain("shuffle histories (P)", compared, "NDCG@10", pairs[0], pairs[1],
                                 _constant(constants, NDCG)[1], cases.user)
        )  # fmt: skip
    return checks


def _mean(values: Floats) -> str:
    return f"{np.nanmean(values):.3f}" if not np.isnan(values).all() else "-"


def _reranked(stage: GtsStage, batch: Mapping[str, torch.Tensor], scores_BN: torch.Tensor) -> Floats:
    """R's list with its head in P's order, as scores of the whole catalogue (B, N)."""
    items, values = best(scores_BN, max(stage.config.rerank, max(CUTOFFS)))
    items, values = rerank(stage, batch, items, values, stage.config.rerank)
    found = np.full(scores_BN.shape, -np.inf, np.float32)
    np.put_along_axis(found, items, values, axis=1)
    return found  # type: ignore[return-value]


def candidate_check(stage: GtsStage, cases: Cases, log: Log) -> Check:
    """The literal reading, each item scored with itself in front: what is left when the target is not known."""
    name, count = "every candidate as prefix", stage.inputs.count
    compared = "the true target in front, against each candidate in front of its own score"
    if stage.config.reading != "literal":
        return audit.not_applicable(name, compared, "no target is ever in R's prefix")
    if count > PREFIX_PASSES // 8:
        return audit.not_applicable(name, compared, f"needs a pass for each of {count:,} items")
    some = cases.take(np.arange(min(len(cases), BATCH, PREFIX_PASSES // count)))
    log(f"scoring each of {count:,} candidates in front of {len(some)} histories")
    labels, batch, everyone = _labels(stage, some), batch_of(stage, some), np.arange(len(some))
    true = labels.metrics(scores_of(stage, batch, labels.first()).cpu().numpy(), everyone)
    with torch.no_grad():
        own = [stage.scores(batch, batch["length_B"].new_full((len(some),), item))[:, item] for item in range(count)]
    each = labels.metrics(torch.stack(own, dim=1).cpu().numpy(), everyone)
    note = f"; R@10 {_mean(true[RECALL])} and {_mean(each[RECALL])}"
    return audit.no_gain(name, compared, "R@1", true[HITS], each[HITS], some.user, "every candidate", note)


# a world without any signal


def null_checks(run: Run, stage: GtsStage, cases: Cases, constants: Metrics) -> list[Check]:
    """In the null world no list beats the best constant ranking."""
    name, compared = "null world", "lists of a world in which items come by popularity alone"
    source = run.data.source
    if source is None or source.options.get("world") != "null":
        return [audit.not_applicable(name, compared, "data.source is no simulator with world: null")]
    return null_world(stage, cases, constants)


def null_world(stage: GtsStage, cases: Cases, constants: Metrics) -> list[Check]:
    """R, P's reranking and the generated IDs against the best constant ranking, as `constant_rankings` gave it."""
    labels, found = _labels(stage, cases), []
    for part in cases.parts(BATCH):
        some = cases.take(part)
        batch = batch_of(stage, some)
        scores = scores_of(stage, batch, front_of(stage, some))
        lists = {"R": scores.cpu().numpy()}
        if stage.config.reads_targets:
            lists["P"] = _reranked(stage, batch, scores)
        if stage.config.generation:
            with torch.no_grad():
                lists["generated"] = generate(stage, stage.user_states(batch), BEAM).cpu().numpy()
        found.append({reading: labels.metrics(list_BN, part)[RECALL] for reading, list_BN in lists.items()})
    best_name, constant = _constant(constants, RECALL)
    compared = "lists of a world in which items come by popularity alone"
    return [
        audit.no_gain(f"null world ({reading})", compared, "R@10", value, constant, cases.user, best_name)
        for reading, value in _joined(found).items()
    ]


def _joined(parts: Sequence[Metrics]) -> Metrics:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
