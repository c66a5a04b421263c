"""Baselines of next items: five simple rankings that write the same files as our models.

* `popularity`: how often all users took an item before the cut.
* `popularity_7d`: the same over the 7 days before the cut; ties by `popularity`.
* `repeat_last`: the items of the user's last instant, then of the one before, ...; then `popularity`.
* `most_frequent`: by the number of the user's instants with the item, ties by recency; then `popularity`.
* `text_knn`: by the cosine of an item's text embedding to the user's last items; `popularity` without a history.

Everything is as of each cut: events on or after the cut day enter nowhere, and popularity grows from cut to cut.
Remaining ties are broken by popularity and, last, by a hash of the item: never by its id, whose order may tell its age
or kind. A full order needs no tied scores: the score says what an item was ranked by, and where
items tie it is lowered by the smallest steps of float32, so that the pessimistic ranks of the evaluation are the places
of the list.

Memory is bounded: `Popularity` is a table of (day, item), samples are worked on in chunks, and steps call
`baseline_rankings` bucket by bucket. No loop over users.

Source: FIELD.md, section 3. Legend: B samples, N items of the catalogue, K places, E width of an embedding, A events of
rows, S (sample, item) pairs of histories, P (day, item) pairs of the popularity table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lum_ray.artifacts import UserError
from lum_ray.data.rows import Int64, Rows, Samples, expand, mix
from lum_ray.data.times import NO_TIME
from lum_ray.evaluation.metrics import Floats

BASELINES: Final = ("popularity", "popularity_7d", "repeat_last", "most_frequent", "text_knn")
DEPTH: Final = 200
RECENT_DAYS: Final = 7
LAST_ITEMS: Final = 10
"""How many of the user's last distinct items `text_knn` looks at."""
_EARLIEST = np.iinfo(np.int32).min
_TIE_SALT = 48_611
_COSINE_STEPS = (
    1 << 15
)  # cosines that are nearer than this step are a tie: products differ in their last bits by machine
_CHUNK = 1 << 24  # about how many numbers a chunk of samples may need at once


class Catalogue(Protocol):
    """What is read of a catalogue (`lum_ray.data.items`)."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def hash_N(self) -> Int64: ...  # noqa: N802

    def index_of(self, hashes: Int64) -> Int64:
        """Positions of items by their hash, -1 where unknown."""
        ...


@dataclass(frozen=True)
class Popularity:
    """How many events each item had on each day, over all users: P pairs sorted by (day, item)."""

    day_P: Int64
    item_P: Int64
    count_P: Int64
    tie_N: Int64  # place of each item in the order by hash

    @staticmethod
    def count(buckets: Iterable[Rows], catalogue: Catalogue) -> Popularity:
        """From all users' rows, bucket by bucket. Events of unknown items are passed over."""
        hashes = mix(catalogue.hash_N, _TIE_SALT)
        tie = np.empty(len(hashes), np.int64)
        tie[np.argsort(hashes, kind="stable")] = np.arange(len(hashes))
        size = max(1, len(hashes))
        keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for rows in buckets:
            item = np.asarray(catalogue.index_of(rows.values[:, 0]), np.int64)
            found, number = np.unique((rows.days.astype(np.int64) * size + item)[item >= 0], return_counts=True)
            keys, place = np.unique(np.concatenate([keys, found]), return_inverse=True)
            counts = np.bincount(place, np.concatenate([counts, number]), len(keys)).astype(np.int64)
        return Popularity(keys // size, keys % size, counts, tie)

    def before(self, cut: int, days: int | None = None) -> Int64:
        """(N,) events of each item on days before the cut, on the last `days` of them if given."""
        begin = 0 if days is None else int(np.searchsorted(self.day_P, cut - days))
        part = slice(begin, int(np.searchsorted(self.day_P, cut)))
        return np.bincount(self.item_P[part], self.count_P[part], len(self.tie_N)).astype(np.int64)


@dataclass(frozen=True)
class _Seen:
    """The distinct known items of each sample's history, S pairs sorted by (sample, item)."""

    sample_S: Int64
    item_S: Int64
    count_S: Int64  # instants with the item
    since_S: Int64  # instants since it was last taken: 1 in the last instant


def targets_facts(
    rows: Rows, samples: Samples, catalogue: Catalogue, targets: tuple[Int64, Int64]
) -> tuple[NDArray[np.bool_], Int64]:
    """What a targets file says of T targets (sample (T,), item (T,)): `repeat` (T,), and `history` (B,), all events
    before the cut.
    """
    begin, end = rows.span(samples.row, _EARLIEST, samples.cut)
    seen, size = _seen(rows, samples, catalogue), max(1, len(catalogue.ids))
    repeat = np.isin(targets[0] * size + targets[1], seen.sample_S * size + seen.item_S)
    return repeat, end - begin


def baseline_rankings(
    rows: Rows,
    samples: Samples,
    catalogue: Catalogue,
    popularity: Popularity,
    name: str,
    depth: int = DEPTH,
    seen_filter: bool = False,
    embeddings_NE: NDArray[np.floating] | None = None,
    last_items: int = LAST_ITEMS,
    pooling: Literal["max", "mean"] = "max",
) -> tuple[Int64, NDArray[np.float32]]:
    """The first K = min(depth, N) items of each sample: positions in the catalogue (B, K) and scores (B, K), falling.

    Scores: the share of the most popular item's events; above that 1 + 1 / (instants since the item) in `repeat_last`,
    instants with the item in `most_frequent`; 1 + cosine in `text_knn`.

    `rows`: one row per event, values item hash, UTC microseconds, minutes ahead of UTC. With `seen_filter` the items of
    the sample's history are left out; a short list ends in positions of -1 with NaN. `text_knn` needs `embeddings_NE`
    (any scale) and takes the `max` or the `mean` cosine to the user's `last_items` last distinct items.

    Raises UserError for an unknown name, and embeddings that are missing, not finite or not of the catalogue's length.
    """
    size = len(catalogue.ids)
    if name not in BASELINES:
        raise UserError(f"baseline: expected one of {', '.join(BASELINES)}, got {name!r}")
    if len(popularity.tie_N) != size:
        raise UserError(
            f"popularity: expected {size} items as in the catalogue, got {len(popularity.tie_N)}; count anew"
        )
    units_NE = _units(embeddings_NE, size) if name == "text_knn" else np.zeros((size, 0), np.float32)
    items = np.full((len(samples), min(depth, size)), -1, np.int64)
    scores = np.full(items.shape, np.nan, np.float32)
    for part in _chunks(rows, samples, size):
        chosen = Samples(samples.row[part], samples.cut[part], samples.draw[part])
        seen = _seen(rows, chosen, catalogue)
        # one sortable number for each (sample, item): what the baseline goes by, then the place in its base order
        place_CN, base_CN, cut_B = _orders(popularity, chosen, RECENT_DAYS if name == "popularity_7d" else None)
        key_BN = (size - 1 - place_CN)[cut_B]
        score_BN = base_CN[cut_B]
        pair = seen.sample_S, seen.item_S
        if name in ("repeat_last", "most_frequent"):
            popular_S = place_CN[cut_B[seen.sample_S], seen.item_S]
            order = _own_order(seen, popular_S, by_count=name == "most_frequent")
            own = np.empty(len(order), np.int64)
            own[order] = np.arange(len(order))[::-1]
            key_BN[pair] = size + own
            score_BN[pair] = seen.count_S if name == "most_frequent" else 1 + 1 / seen.since_S
        elif name == "text_knn":
            popular_S = place_CN[cut_B[seen.sample_S], seen.item_S]
            cosine_BN, known_B = _cosines(units_NE, seen, popular_S, len(chosen), last_items, pooling)
            steps_BN = np.maximum(np.rint((1 + cosine_BN) * _COSINE_STEPS), 1).astype(np.int64)
            key_BN[known_B] += (steps_BN * size)[known_B]
            score_BN[known_B] = steps_BN[known_B] / _COSINE_STEPS
        if seen_filter:
            key_BN[pair] = -1
        items[part], scores[part] = _best(key_BN, score_BN, items.shape[1])
    return items, scores


def _chunks(rows: Rows, samples: Samples, size: int) -> Iterator[slice]:
    """Slices of the samples that need about `_CHUNK` numbers each."""
    begin, end = rows.span(samples.row, _EARLIEST, samples.cut)
    total = np.cumsum(4 * size + 8 * (end - begin))
    start = 0
    while start < len(samples):
        used = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, used + _CHUNK, side="right")))
        yield slice(start, stop)
        start = stop


def _seen(rows: Rows, samples: Samples, catalogue: Catalogue) -> _Seen:
    item_A = np.asarray(catalogue.index_of(rows.values[:, 0]), np.int64)
    new = np.zeros(len(item_A), np.bool_)
    new[rows.offsets[:-1][np.diff(rows.offsets) > 0]] = True
    for column in (rows.days, rows.values[:, 1], rows.values[:, 2] == NO_TIME):
        new[1:] |= column[1:] != column[:-1]
    instant_A = np.cumsum(new)

    sample, event = expand(*rows.span(samples.row, _EARLIEST, samples.cut))
    known = item_A[event] >= 0
    sample, event = sample[known], event[known]
    item, instant = item_A[event], instant_A[event]
    last = np.zeros(len(samples), np.int64)
    np.maximum.at(last, sample, instant)
    order = np.lexsort((instant, item, sample))
    sample, item, instant = sample[order], item[order], instant[order]
    first = np.concatenate([[True], (np.diff(sample) != 0) | (np.diff(item) != 0)])[: len(order)]
    apart = first | np.concatenate([[True], np.diff(instant) != 0])[: len(order)]
    start = np.flatnonzero(first)
    final = np.append(start[1:], len(order))[: len(start)] - 1
    count = np.bincount(np.cumsum(first) - 1, apart, len(start)).astype(np.int64)
    return _Seen(sample[start], item[start], count, last[sample[start]] - instant[final] + 1)


def _orders(popularity: Popularity, samples: Samples, days: int | None) -> tuple[Int64, Floats, Int64]:
    """By popularity at each of C distinct cuts: the place of each item (C, N), 0 the most popular; its share of the
    most popular one's events (C, N), between 0 and 1; and which cut each sample has (B,).
    """
    cuts, cut_B = np.unique(samples.cut, return_inverse=True)
    place = np.empty((len(cuts), len(popularity.tie_N)), np.int64)
    share = np.empty(place.shape)
    for c, cut in enumerate(cuts.tolist()):
        every = popularity.before(cut)
        counts = every if days is None else popularity.before(cut, days)
        place[c, np.lexsort((popularity.tie_N, -every, -counts))] = np.arange(place.shape[1])
        share[c] = (counts + 1) / (counts.max(initial=0) + 2)
    return place, share, cut_B


def _own_order(seen: _Seen, popular_S: Int64, by_count: bool) -> Int64:
    """The pairs in the order of the user's own items, best first within a sample."""
    keys = (popular_S, seen.since_S, -seen.count_S) if by_count else (popular_S, seen.since_S)
    return np.lexsort((*keys, seen.sample_S))


def _cosines(
    units_NE: NDArray[np.float32], seen: _Seen, popular_S: Int64, samples: int, last_items: int, pooling: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The cosine of each item to the sample's last items (B, N), and which samples have any (B,)."""
    order = _own_order(seen, popular_S, by_count=False)
    sample, item = seen.sample_S[order], seen.item_S[order]
    start = np.searchsorted(sample, np.arange(samples))
    number = np.minimum(np.searchsorted(sample, np.arange(samples), side="right") - start, last_items)
    result = np.full((samples, len(units_NE)), -np.inf if pooling == "max" else 0.0, np.float32)
    for back in range(int(number.max(initial=0))):
        have = np.flatnonzero(number > back)
        similar = units_NE[item[start[have] + back]] @ units_NE.T
        result[have] = np.maximum(result[have], similar) if pooling == "max" else result[have] + similar
    if pooling == "mean":
        result /= np.maximum(number, 1)[:, None]
    return np.where(number[:, None] > 0, result, 0).astype(np.float32), number > 0


def _units(embeddings_NE: NDArray[np.floating] | None, size: int) -> NDArray[np.float32]:
    if embeddings_NE is None:
        raise UserError("text_knn: expected embeddings of the items' texts, got none; pass embeddings_NE")
    values = np.asarray(embeddings_NE, np.float32)
    if values.ndim != 2 or len(values) != size:
        raise UserError(f"text_knn: expected embeddings of shape ({size}, width) as the catalogue, got {values.shape}")
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        raise UserError(f"text_knn: expected finite embeddings, {len(wrong)} are not: items {wrong[:5].tolist()}")
    length = np.linalg.norm(values, axis=1, keepdims=True)
    units: NDArray[np.float32] = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
    return units


def _best(key_BN: Int64, score_BN: Floats, places: int) -> tuple[Int64, NDArray[np.float32]]:
    """The items of the largest keys, best first, and their scores, falling strictly; a negative key is no item."""
    size = key_BN.shape[1]
    top = np.argpartition(key_BN, size - places, axis=1)[:, size - places :] if places < size else None
    top_key = key_BN if top is None else np.take_along_axis(key_BN, top, axis=1)
    order = np.argsort(-top_key, axis=1, kind="stable")
    items = order if top is None else np.take_along_axis(top, order, axis=1)
    ranked = np.take_along_axis(score_BN, items, axis=1).astype(np.float32)
    missing = np.take_along_axis(top_key, order, axis=1) < 0
    return np.where(missing, -1, items), np.where(missing, np.nan, _strict(ranked)).astype(np.float32)


def _strict(scores_BK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores lowered by as few steps of float32 as make them fall strictly along K. They are kept above 0 by the
    callers: about 0 the steps are numbers so small that some machines read them as 0.
    """
    # float32 as integers in the order of the numbers: for negative ones the bits count downwards
    bits = (scores_BK + np.float32(0)).view(np.int32).astype(np.int64)
    ordered = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    places = np.arange(scores_BK.shape[1])
    ordered = np.minimum.accumulate(ordered + places, axis=1) - places
    back = np.where(ordered < 0, -ordered | 0x80000000, ordered).astype(np.uint32)
    return np.asarray(back.view(np.float32))
