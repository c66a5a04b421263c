"""Rankings of several models over the same baskets: from files to ranks of targets, and to the table of metrics.

A folder holds `rankings/*.parquet` (what models put in front of a user at a cut) and `targets/*.parquet` (what the user
then took); evaluation reads nothing else. Source: DESIGN.md, section 3 (Prediction files); FIELD.md, section 3.

Choices that are not obvious:
* A list lies in one file. So a file is checked and reduced to the ranks of its targets before the next is opened, and
  the lists of all models never are in memory together.
* Ranks are pessimistic: of tied scores, the items that are no targets come first (see `tied_ranks`). The order that a
  file gives to tied items says nothing, and an order by item id would raise NDCG by a fifth.
* A list made with the seen-filter (`seen_filter`: the user's earlier items were taken out of the catalogue before it
  was ranked) is a list of its own. A list of 200 that was filtered afterwards would hold too few items, or none.
* A metric is a mean over baskets. Users are resampled, not baskets, with the same weights for all models, so that
  differences are paired (see `bootstrap`).

Legend: n rows of one file, B baskets (a user at a cut), T targets (all baskets together), N items or users, M metrics,
R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lum_ray.artifacts import UserError, join, list_files
from lum_ray.evaluation import bootstrap
from lum_ray.evaluation.bootstrap import Weights
from lum_ray.evaluation.metrics import Floats, Ints
from lum_ray.evaluation.ranking_files import (
    RANKING_SCHEMA,
    READINGS,
    TARGETS_SCHEMA,
    Baskets,
    Bool,
    ListKey,
    Lists,
    label,
    pairs,
    ranking_table,
    read_table,
    read_targets,
    refuse,
    sorted_lists,
    targets_table,
    write_rankings,
    write_targets,
)

__all__ = [
    "CUTOFFS",
    "MISSED",
    "RANKING_SCHEMA",
    "READINGS",
    "TABLE",
    "TARGETS_SCHEMA",
    "Baskets",
    "ListKey",
    "Rankings",
    "basket_metrics",
    "evaluate_rankings",
    "ranking_table",
    "ranks_of",
    "read_rankings",
    "read_targets",
    "targets_table",
    "tied_ranks",
    "write_rankings",
    "write_targets",
]

CUTOFFS: Final = (5, 10, 50, 200)
MISSED: Final = int(np.iinfo(np.int32).max)
"""The rank of a target that a list does not hold, or holds with a score of NaN."""
HISTORIES: Final = ((1, 5), (6, 20), (21, 100), (101, None))
"""Groups of baskets by the number of events before the cut."""
TABLE: Final = pa.schema(
    [
        ("model", pa.string()),
        ("reading", pa.string()),
        ("subset", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),
        ("users", pa.int64()),
        ("seeds", pa.int32()),
        ("seed_sd", pa.float64()),
        ("gain", pa.float64()),
        ("gain_low", pa.float64()),
        ("gain_high", pa.float64()),
    ]
)
"""One row a (model, reading, subset, metric): a mean over `n` baskets with its 95 % interval over users; `gain` = value
of `ours` minus this value, paired (null for `ours` itself and where none was named); `seed_sd` is null for one seed.
"""
_BLOCK = 1 << 22  # numbers worked on at once


@dataclass(frozen=True)
class Rankings:
    """Checked lists of several models over the same baskets, as the rank of each target in each list."""

    baskets: Baskets
    ranks: Mapping[ListKey, Ints]  # (T,) pessimistic, MISSED where the list does not hold the target
    depths: Mapping[ListKey, int]  # places of the longest list

    def seeds(self, model: str, reading: str, seen_filter: bool) -> list[int]:
        """Seeds of which there are such lists."""
        return sorted(key.seed for key in self.ranks if key[:2] == (model, reading) and key.seen_filter == seen_filter)


def read_rankings(folders: str | Sequence[str]) -> Rankings:
    """Read and check folders of rankings and targets, several models together.

    Raises UserError as `write_rankings` and `write_targets` do, over all files, and where folders differ in their
    targets, a list lies in two files, a list is missing (with the seen-filter only baskets with a new item need one),
    or a list with the seen-filter holds an item seen before. Lists of a (user, cut) without targets count nowhere.
    """
    places = [folders] if isinstance(folders, str) else list(folders)
    if not places:
        raise UserError("rankings: expected at least one folder, got none")
    baskets = read_targets(places[0])
    for place in places[1:]:
        _same_targets(baskets, read_targets(place), places[0], place)
    ranks: dict[ListKey, Ints] = {}
    found: dict[ListKey, Bool] = {}
    depths: dict[ListKey, int] = {}
    for file in [file for place in places for file in list_files(join(place, "rankings"), ".parquet")]:
        _join(baskets, sorted_lists(read_table(file, RANKING_SCHEMA), file), file, ranks, found, depths)
    if not ranks:
        raise UserError(f"{', '.join(places)}: expected ranking files (rankings/*.parquet) with rows, found none")
    with_new = np.bincount(baskets.basket_T[~baskets.repeat_T], minlength=len(baskets)) > 0
    for key, there in sorted(found.items()):
        lost = np.flatnonzero(~there & (with_new if key.seen_filter else True))
        if len(lost):
            refuse(label(key), f"a list for each of {len(baskets)} (user, cut) with targets", "have none",
                    pairs(baskets, lost), "rank all of them, or compare models over the same cuts")  # fmt: skip
        seen = np.flatnonzero(baskets.repeat_T & (ranks[key] < MISSED)) if key.seen_filter else np.zeros(0, np.int64)
        if len(seen):
            refuse(label(key), "no item of the history in a list with the seen-filter", "targets are repeats",
                    pairs(baskets, baskets.basket_T[seen], baskets.item_T[seen]), "rank unseen items only")  # fmt: skip
    return Rankings(baskets, dict(sorted(ranks.items())), depths)


def tied_ranks(scores: NDArray[np.floating], start: Bool, target: Bool) -> Ints:
    """(m,) the pessimistic rank of each row that `target` (n,) marks, of lists one after the other from `start` on.

    Scores do not rise within a list. Rows of one score are a block, and its targets count as the last rows of it: every
    tied item that is no target is held against each of them, while the targets take different places. MISSED for
    NaN and -inf. Ties across the end of a cut list are the writer's to break.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    index = np.arange(len(scores))
    new_block = start | np.concatenate([[True], scores[1:] != scores[:-1]])
    block_end = np.append(np.flatnonzero(new_block)[1:], len(scores))[np.cumsum(new_block) - 1]  # one past the block
    before = np.concatenate([[0], np.cumsum(target)])
    first = np.maximum.accumulate(np.where(start, index, 0))
    after_it = before[block_end] - before[index + 1]  # targets of the block below this row
    return np.where(scores > -np.inf, block_end - after_it - first, MISSED)[target].astype(np.int64)


def _same_targets(one: Baskets, other: Baskets, one_place: str, other_place: str) -> None:
    def rows(baskets: Baskets) -> set[tuple[str, int, str, bool, int, bool]]:
        b = baskets.basket_T
        columns = (
            baskets.users[baskets.user_B[b]], baskets.cut_B[b], baskets.items[baskets.item_T],
            baskets.repeat_T, baskets.history_B[b], baskets.seen_user_B[b],
        )  # fmt: skip
        return set(zip(*(column.tolist() for column in columns), strict=True))

    ours, theirs = rows(one), rows(other)
    if ours == theirs:
        return
    shown = [f"{row} only in {one_place}" for row in sorted(ours - theirs)]
    shown += [f"{row} only in {other_place}" for row in sorted(theirs - ours)]
    refuse("targets (user, cut_day, item, repeat, history, seen_user)", "the same in all folders", "rows differ",
            shown, "rank all models for the same cuts of the same data")  # fmt: skip


def _join(
    baskets: Baskets,
    lists: Lists,
    where: str,
    ranks: dict[ListKey, Ints],
    found: dict[ListKey, Bool],
    depths: dict[ListKey, int],
) -> None:
    """Add the ranks of a file's targets to `ranks`, and which baskets had a list to `found`."""
    user_of, item_of = (
        pc.fill_null(pc.index_in(pa.array(theirs, pa.string()), value_set=pa.array(ours, pa.string())), -1)
        .to_numpy(zero_copy_only=False)
        .astype(np.int64)
        for theirs, ours in ((lists.users, baskets.users), (lists.items, baskets.items))
    )
    user, item = user_of[lists.user], item_of[lists.item]
    pair_B = (baskets.user_B << 32) + (baskets.cut_B + (1 << 31))
    pair = (user << 32) + (lists.cut + (1 << 31))
    basket = np.minimum(np.searchsorted(pair_B, pair), len(pair_B) - 1)
    stray = (user < 0) | (pair_B[basket] != pair)
    key_T = baskets.basket_T * len(baskets.items) + baskets.item_T
    wanted = basket * len(baskets.items) + item
    at = np.minimum(np.searchsorted(key_T, wanted), len(key_T) - 1)
    target = ~stray & (item >= 0) & (key_T[at] == wanted)
    place = tied_ranks(lists.score, lists.start, target)
    lengths = np.diff(np.append(np.flatnonzero(lists.start), len(lists.start)))
    first_key, first_basket = lists.key[lists.start], np.where(stray, -1, basket)[lists.start]
    for number, key in enumerate(lists.keys):
        ranks.setdefault(key, np.full(len(key_T), MISSED, np.int64))
        there = found.setdefault(key, np.zeros(len(baskets), np.bool_))
        own = first_basket[(first_key == number) & (first_basket >= 0)]
        again = own[there[own]]
        if len(again):
            refuse(f"{where}: {label(key)}", "each list in one file", "come again", pairs(baskets, again),
                    "remove the files of an earlier run")  # fmt: skip
        there[own] = True
        depths[key] = max(depths.get(key, 0), int(lengths[first_key == number].max(initial=0)))
        chosen = lists.key[target] == number
        ranks[key][at[target][chosen]] = place[chosen]


def ranks_of(scores_BN: NDArray[np.floating], targets: tuple[Ints, Ints], pessimistic: bool = True) -> Ints:
    """(T,) the rank, from 1, of each target (basket (T,), item (T,)) among all N items of its basket.

    Pessimistic: the number of scores that are at least the target's, so a tie counts against it; optimistic: one more
    than the number of scores above it. Either way targets of one basket that tie with each other take different places:
    each counts the other tied targets that come before it in `targets`, and none after it. NaN counts as the lowest
    score, tied with all other NaN.
    """
    basket_T, item_T = (np.asarray(part, np.int64) for part in targets)
    result = np.empty(len(basket_T), np.int64)
    step = max(1, _BLOCK // max(1, scores_BN.shape[1]))
    own_T = np.empty(len(basket_T), scores_BN.dtype)
    for begin in range(0, len(basket_T), step):
        part = slice(begin, begin + step)
        rows = np.nan_to_num(scores_BN[basket_T[part]], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        own = rows[np.arange(len(rows)), item_T[part]]
        own_T[part] = own
        above = rows >= own[:, None] if pessimistic else rows > own[:, None]
        result[part] = above.sum(axis=1)
    # the targets of a basket with one score, in the order in which they came
    order = np.lexsort((np.arange(len(own_T)), own_T, basket_T))
    new = np.concatenate([[True], (np.diff(basket_T[order]) != 0) | (own_T[order][1:] != own_T[order][:-1])])
    first = np.flatnonzero(new[: len(order)])
    group = np.cumsum(new[: len(order)]) - 1
    place = np.arange(len(order)) - first[group]
    size = np.diff(np.append(first, len(order)))[group]
    result[order] += place + 1 - size if pessimistic else place + 1
    return result


def basket_metrics(
    ranks_T: Ints, basket_T: Ints, baskets: int, depth: int, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, Floats]:
    """Metrics of each basket (B,), NaN where it has no target; their means are the metrics of a model.

    For each K of `cutoffs` up to `depth`, the length of the lists: `eval/recall_K` = hits / targets; `eval/hit_rate_K`:
    any hit; `eval/ndcg_K`: binary gains, ideal with min(K, targets) hits; `eval/recall_ceiling_K` = min(K, targets) /
    targets, what no list can exceed; `eval/reranked_ceiling_K`: recall if all targets of the whole list came first.
    `eval/mrr`: 1 / rank of the first hit, 0 without one. `eval/retrieved`: share of targets in the whole list.
    """
    count = np.bincount(basket_T, minlength=baskets).astype(np.float64)
    size = np.where(count > 0, count, np.nan)

    def per_basket(values_T: NDArray[np.generic]) -> Floats:
        return np.asarray(np.bincount(basket_T, values_T, baskets), np.float64)

    listed = per_basket(ranks_T < MISSED)
    discount_T = 1 / np.log2(1.0 + ranks_T)
    best = np.zeros(baskets)
    np.maximum.at(best, basket_T, np.where(ranks_T < MISSED, 1.0 / ranks_T, 0.0))
    result = {"eval/mrr": np.where(count > 0, best, np.nan), "eval/retrieved": listed / size}
    for k in [k for k in cutoffs if k <= depth]:
        hit_T = ranks_T <= k
        hits = per_basket(hit_T)
        possible = np.minimum(k, count).astype(np.int64)
        ideal = np.concatenate([[np.nan], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])[possible]
        result[f"eval/recall_{k}"] = hits / size
        result[f"eval/recall_ceiling_{k}"] = possible / size
        result[f"eval/reranked_ceiling_{k}"] = np.minimum(k, listed) / size
        result[f"eval/hit_rate_{k}"] = np.where(count > 0, hits > 0, np.nan)
        result[f"eval/ndcg_{k}"] = per_basket(np.where(hit_T, discount_T, 0.0)) / ideal
    return result


def evaluate_rankings(
    rankings: Rankings,
    ours: tuple[str, str] | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
    resamples: int = 200,
    seed: int = 0,
) -> pa.Table:
    """The table of metrics (schema `TABLE`) of all (model, reading), by subset of targets or baskets.

    Subsets: `all`; `repeat`: targets that the user had before; `explore`: new targets, in lists with the seen-filter
    (left out for a model without such lists); `explore, seen items listed`: new targets, in the lists of `all`;
    `history 1 to 5`, ...: baskets by events before the cut; `seen users`, `unseen users`: were they in training?
    A subset without a target is left out, and so is a K beyond a model's longest list. `ours`: (model, reading).
    Several seeds of a model are averaged, resample by resample. Raises UserError where `ours` has no lists.
    """
    baskets = rankings.baskets
    known = sorted({(key.model, key.reading) for key in rankings.ranks})
    if ours is not None and ours not in known:
        raise UserError(f"ours: expected one of {', '.join(map(str, known))}, got {ours}")
    weights = bootstrap.user_weights(len(baskets.users), resamples, seed)
    rows: list[dict[str, object]] = []
    for subset, (target_T, seen_filter) in _subsets(baskets).items():
        scored = {
            who: runs
            for who in known
            if (runs := _runs(rankings, who, target_T, seen_filter, cutoffs, weights)) and target_T.any()
        }
        inside = np.unique(baskets.basket_T[target_T])
        about = {"subset": subset, "n": len(inside), "users": len(np.unique(baskets.user_B[inside]))}
        reference = {} if ours is None or ours not in scored else _averages(scored[ours])
        for (model, reading), runs in scored.items():
            for metric, values in _averages(runs).items():
                at = bootstrap.interval(values)
                points = [float(run[metric][0]) for run in runs]
                row = {"model": model, "reading": reading, "metric": metric, **about, "seeds": len(runs)}
                row |= {"value": at.value, "low": at.low, "high": at.high}
                row["seed_sd"] = float(np.std(points, ddof=1)) if len(points) > 1 else None
                if (model, reading) != ours and metric in reference:
                    gain = bootstrap.interval(reference[metric] - values)
                    row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
                rows.append(row)
    return pa.Table.from_pylist(rows, schema=TABLE)


def _subsets(baskets: Baskets) -> dict[str, tuple[Bool, bool]]:
    """Name -> (which targets count (T,), whether the lists are those with the seen-filter)."""
    history_T = baskets.history_B[baskets.basket_T]
    seen_T = baskets.seen_user_B[baskets.basket_T]
    result = {
        "all": (np.ones(len(history_T), np.bool_), False),
        "repeat": (baskets.repeat_T, False),
        "explore": (~baskets.repeat_T, True),
        "explore, seen items listed": (~baskets.repeat_T, False),
        "history 0": (history_T == 0, False),
    }
    for low, high in HISTORIES:
        name = f"history {low} to {high}" if high else f"history more than {low - 1}"
        result[name] = ((history_T >= low) & (history_T <= (high or MISSED)), False)
    return result | {"seen users": (seen_T, False), "unseen users": (~seen_T, False)}


def _runs(
    rankings: Rankings,
    who: tuple[str, str],
    target_T: Bool,
    seen_filter: bool,
    cutoffs: Sequence[int],
    weights: Weights,
) -> list[dict[str, Floats]]:
    """For each seed, metric -> (R + 1,) its mean over the baskets with a target of the subset."""
    baskets, result = rankings.baskets, []
    keys = [ListKey(*who, run, seen_filter) for run in rankings.seeds(*who, seen_filter)]
    # a K beyond the lists of one seed is left out for all, so that each metric averages all seeds
    depth = min((rankings.depths[key] for key in keys), default=0)
    for key in keys:
        found = basket_metrics(rankings.ranks[key][target_T], baskets.basket_T[target_T], len(baskets), depth, cutoffs)
        means = _mean_resamples(np.stack(list(found.values()), axis=1), baskets.user_B, weights)
        result.append(dict(zip(found, means.T, strict=True)))
    return result


def _averages(runs: list[dict[str, Floats]]) -> dict[str, Floats]:
    return {metric: np.asarray(np.mean([run[metric] for run in runs], axis=0)) for metric in runs[0]}


def _mean_resamples(values_BM: Floats, user_B: Ints, weights: Weights) -> Floats:
    """(R + 1, M) the mean of each column over baskets that are no NaN, which are the same for all columns."""
    counted = ~np.isnan(values_BM[:, 0])
    user, users = user_B[counted], weights.shape[1]
    columns = [*values_BM[counted].T, np.ones(len(user))]
    sums = np.stack([np.bincount(user, column, users) for column in columns], axis=1)
    step = max(1, _BLOCK // max(1, users))
    totals = np.concatenate(
        [weights[begin : begin + step].astype(np.float64) @ sums for begin in range(0, len(weights), step)]
    )
    below = totals[:, -1:]
    result: Floats = np.divide(totals[:, :-1], below, out=np.full(totals[:, :-1].shape, np.nan), where=below > 0)
    return result
