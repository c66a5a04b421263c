"""The columns of ranking and target files, and the checks of one file: what is written is checked like what is read.

Legend: n rows of one file, B baskets (a user at a cut), T targets (all baskets together), K places of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lum_ray.artifacts import UserError, join, list_files, storage, write_table
from lum_ray.evaluation.metrics import Ints

RANKING_SCHEMA: Final = pa.schema(
    [
        ("user", pa.string()),
        ("cut_day", pa.int32()),
        ("rank", pa.int32()),
        ("item", pa.string()),
        ("score", pa.float32()),
        ("reading", pa.string()),
        ("model", pa.string()),
        ("seed", pa.int32()),
        ("seen_filter", pa.bool_()),
    ]
)
"""One row a (user, cut, place): `rank` counts from 1, scores do not rise with it, NaN comes last and is never a hit."""
TARGETS_SCHEMA: Final = pa.schema(
    [
        ("user", pa.string()),
        ("cut_day", pa.int32()),
        ("item", pa.string()),
        ("repeat", pa.bool_()),
        ("history", pa.int32()),
        ("seen_user", pa.bool_()),
    ]
)
"""One row a (user, cut, item taken): `repeat`: the item is in the user's history before the cut; `history`: events
before the cut; `seen_user`: the user was in training. The last two are the same in all rows of a (user, cut)."""
READINGS: Final = ("retrieve", "rerank", "generate", "baseline")
MISSED: Final = int(np.iinfo(np.int32).max)
"""The rank of a target that a list does not hold, or holds with a score of NaN."""
_DEFAULTS: Final = {"seen_filter": False}  # columns that a file may lack
_MOST_OFFENDERS = 5
_LARGEST = 1 << 62

Bool = NDArray[np.bool_]
Texts = NDArray[np.object_]


class ListKey(NamedTuple):
    """Which lists belong together."""

    model: str
    reading: str
    seed: int
    seen_filter: bool


@dataclass(frozen=True)
class Baskets:
    """What the users took: B baskets sorted by (user, cut), T targets sorted by (basket, item)."""

    users: Texts  # (N,) sorted
    user_B: Ints  # index into users
    cut_B: Ints
    history_B: Ints
    seen_user_B: Bool
    items: Texts  # (I,) sorted, the items that are a target at all
    basket_T: Ints
    item_T: Ints  # index into items
    repeat_T: Bool

    def __len__(self) -> int:
        return len(self.user_B)


def ranking_table(
    users_B: Sequence[str] | Texts,
    cut_B: NDArray[np.integer],
    items_BK: NDArray[np.integer],
    scores_BK: NDArray[np.floating],
    ids: Sequence[str],
    model: str,
    reading: str,
    seed: int = 0,
    seen_filter: bool = False,
) -> pa.Table:
    """The rows (schema `RANKING_SCHEMA`) of B lists, best first; `items_BK` index `ids`, -1 fills up short lists."""
    basket, place = np.nonzero(np.asarray(items_BK) >= 0)
    rows = len(basket)
    columns = {
        "user": pa.array(list(users_B), pa.string()).take(pa.array(basket)),
        "cut_day": np.asarray(cut_B, np.int32)[basket],
        "rank": (place + 1).astype(np.int32),
        "item": pa.array(ids, pa.string()).take(pa.array(items_BK[basket, place])),
        "score": np.asarray(scores_BK, np.float32)[basket, place],
        "reading": pa.repeat(pa.scalar(reading, pa.string()), rows),
        "model": pa.repeat(pa.scalar(model, pa.string()), rows),
        "seed": np.full(rows, seed, np.int32),
        "seen_filter": np.full(rows, seen_filter),
    }
    return pa.table(columns, schema=RANKING_SCHEMA)


def targets_table(
    users_B: Sequence[str] | Texts,
    cut_B: NDArray[np.integer],
    history_B: NDArray[np.integer],
    seen_user_B: Bool,
    basket_T: Ints,
    item_T: Ints,
    repeat_T: Bool,
    ids: Sequence[str],
) -> pa.Table:
    """The rows (schema `TARGETS_SCHEMA`) of T targets; `basket_T` index the arrays (B,), `item_T` index `ids`."""
    columns = {
        "user": pa.array(list(users_B), pa.string()).take(pa.array(basket_T)),
        "cut_day": np.asarray(cut_B, np.int32)[basket_T],
        "item": pa.array(ids, pa.string()).take(pa.array(item_T)),
        "repeat": repeat_T,
        "history": np.asarray(history_B, np.int32)[basket_T],
        "seen_user": seen_user_B[basket_T],
    }
    return pa.table(columns, schema=TARGETS_SCHEMA)


def write_rankings(folder: str, part: str, table: pa.Table) -> str:
    """Check the lists and write them as `<folder>/rankings/<part>.parquet`; returns its URI.

    Raises UserError, with at most five offenders, for missing and unknown columns, nulls, unknown readings, a rank or
    an item that comes twice in a list, gaps in its ranks, and scores that rise with the rank (a number after NaN, too).
    """
    uri = join(folder, "rankings", f"{part}.parquet")
    table = _conform(table, RANKING_SCHEMA, uri)
    sorted_lists(table, uri)
    write_table(uri, table)
    return uri


def write_targets(folder: str, part: str, table: pa.Table) -> str:
    """Check the targets and write them as `<folder>/targets/<part>.parquet`; returns its URI.

    Raises UserError, with at most five offenders, for missing and unknown columns, nulls, targets that come twice,
    repeats without a history, and a (user, cut) with two histories or both seen and unseen.
    """
    uri = join(folder, "targets", f"{part}.parquet")
    table = _conform(table, TARGETS_SCHEMA, uri)
    baskets_of(table, uri)
    write_table(uri, table)
    return uri


def read_targets(folder: str) -> Baskets:
    """The baskets of a folder. Raises UserError as `write_targets` does, over all files, and where there is none."""
    uri = join(folder, "targets")
    files = list_files(uri, ".parquet")
    if not files:
        raise UserError(f"{uri}: expected target files (*.parquet), found none; run `lum-ray evaluate` first")
    found = baskets_of(pa.concat_tables([read_table(file, TARGETS_SCHEMA) for file in files]), uri)
    if not len(found):
        raise UserError(f"{uri}: expected targets, its files hold no row; choose cuts after which users take something")
    return found


@dataclass(frozen=True)
class Lists:
    """The rows of a file, sorted by (list, rank)."""

    keys: list[ListKey]
    users: list[str]
    items: list[str]
    key: Ints
    user: Ints
    cut: Ints
    item: Ints
    score: NDArray[np.float32]
    start: Bool  # where a list begins


def read_table(uri: str, schema: pa.Schema) -> pa.Table:
    place = storage(uri)
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    with place.filesystem.open_input_file(place.path) as source:
        try:
            table = pq.ParquetFile(source, read_dictionary=texts).read()
        except pa.ArrowInvalid as error:
            raise UserError(f"{uri}: expected a whole parquet file: {error}; write the rankings again") from error
    return _conform(table, schema, uri)


def _conform(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The table with the columns of the schema, texts as dictionaries. Raises UserError."""
    for name, value in _DEFAULTS.items():
        if name in schema.names and name not in table.column_names:
            table = table.append_column(name, pa.repeat(pa.scalar(value, schema.field(name).type), len(table)))
    missing = [name for name in schema.names if name not in table.column_names]
    unknown = [name for name in table.column_names if name not in schema.names]
    if missing or unknown:
        raise UserError(
            f"{where}: expected exactly the columns {', '.join(schema.names)}; "
            f"missing: {_list(missing)}; unknown: {_list(unknown)}"
        )
    coded = [
        field.with_type(pa.dictionary(pa.int32(), pa.string())) if pa.types.is_string(field.type) else field
        for field in schema
    ]
    try:
        table = table.select(schema.names).cast(pa.schema(coded))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise UserError(f"{where}: a column has not the type of {schema.names}: {error}") from error
    for name in schema.names:
        if table[name].null_count:
            raise UserError(f"{where}: column {name}: expected a value in each row, {table[name].null_count} are null")
    return table


def _codes(column: pa.ChunkedArray) -> tuple[list[str], Ints]:
    """Sorted distinct values, and each row's index into them."""
    encoded = column.unify_dictionaries().combine_chunks()
    order = pc.array_sort_indices(encoded.dictionary).to_numpy()
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return encoded.dictionary.take(pa.array(order)).to_pylist(), place[encoded.indices.to_numpy(zero_copy_only=False)]


def _whole(column: pa.ChunkedArray) -> Ints:
    return np.asarray(column.to_numpy()).astype(np.int64)


def sorted_lists(table: pa.Table, where: str) -> Lists:
    """The rows of a table that conforms, sorted by (list, rank). Raises UserError as `write_rankings` says."""
    users, user = _codes(table["user"])
    items, item = _codes(table["item"])
    models, model = _codes(table["model"])
    readings, reading = _codes(table["reading"])
    unknown = sorted(set(readings) - set(READINGS))
    if unknown:
        raise UserError(f"{where}: column reading: expected one of {', '.join(READINGS)}, got {_list(unknown)}")
    cut, rank, seed, seen = (_whole(table[name]) for name in ("cut_day", "rank", "seed", "seen_filter"))
    score = np.asarray(table["score"].to_numpy(), np.float32)
    seeds, seed_code = np.unique(seed, return_inverse=True)
    code = ((model * len(readings) + reading) * len(seeds) + seed_code) * 2 + seen
    distinct, key = np.unique(code, return_inverse=True)
    keys = []
    for number in distinct.tolist():
        rest, seen_filter = divmod(number, 2)
        rest, which_seed = divmod(rest, len(seeds))
        which_model, which_reading = divmod(rest, len(readings))
        keys.append(ListKey(models[which_model], readings[which_reading], int(seeds[which_seed]), bool(seen_filter)))

    cuts, cut_code = np.unique(cut, return_inverse=True)
    which = (key * len(users) + user) * len(cuts) + cut_code
    widest = max(int(rank.max(initial=0)) + 1, len(items))
    if len(keys) * len(users) * len(cuts) * widest >= _LARGEST:
        raise UserError(f"{where}: too many users, cuts and places for one file; write a file for each bucket of users")

    def stop(expected: str, came: str, rows: Ints, mend: str) -> NoReturn:
        shown = [
            f"({users[user[i]]}, {cut[i]}, {rank[i]}, {items[item[i]]}, {score[i]:.4g}) of {label(keys[key[i]])}"
            for i in rows[: _MOST_OFFENDERS + 1].tolist()
        ]
        refuse(f"{where}: (user, cut_day, rank, item, score)", expected, came, shown, mend, len(rows))

    low = np.flatnonzero(rank < 1)
    if len(low):
        stop("ranks from 1", "rows lie below", low, "count places from 1")
    sort_key = which * widest + rank
    order = np.argsort(sort_key, kind="stable")
    same = np.flatnonzero(np.diff(sort_key[order]) == 0) + 1
    if len(same):
        stop("each (user, cut, rank) once a list", "come again", order[same], "write each list once")
    listed = which[order]
    start = np.concatenate([[True], listed[1:] != listed[:-1]])[: len(order)]
    index = np.arange(len(order))
    place = index - np.maximum.accumulate(np.where(start, index, 0)) + 1
    gap = np.flatnonzero(rank[order] != place)
    if len(gap):
        stop("ranks 1, 2, 3, ... in each list", "rows follow a gap", order[gap], "write lists without gaps")
    by_item = np.argsort(which * widest + item, kind="stable")
    twice = np.flatnonzero(np.diff((which * widest + item)[by_item]) == 0) + 1
    if len(twice):
        stop("each (user, cut, item) once a list", "come again", by_item[twice], "rank distinct items")
    ordered = np.where(np.isnan(score), -np.inf, score)[order]
    rises = np.flatnonzero((ordered[1:] > ordered[:-1]) & ~start[1:]) + 1
    if len(rises):
        stop("scores that do not rise with the rank, NaN last", "rows do", order[rises], "sort by score before ranking")
    return Lists(keys, users, items, key[order], user[order], cut[order], item[order], score[order], start)


def baskets_of(table: pa.Table, where: str) -> Baskets:
    """The baskets of a table that conforms. Raises UserError as `write_targets` says."""
    users, user = _codes(table["user"])
    items, item = _codes(table["item"])
    cut, history, seen = (_whole(table[name]) for name in ("cut_day", "history", "seen_user"))
    repeat = np.asarray(table["repeat"].to_numpy(), np.bool_)
    order = np.lexsort((item, cut, user))
    user, cut, item, history, seen = (part[order] for part in (user, cut, item, history, seen))
    repeat = repeat[order]
    new = np.concatenate([[True], (np.diff(user) != 0) | (np.diff(cut) != 0)])[: len(user)]
    basket = (np.cumsum(new) - 1).astype(np.int64)
    found = Baskets(
        np.array(users, object), user[new], cut[new], history[new], seen[new] > 0, np.array(items, object), basket,
        item, repeat,
    )  # fmt: skip

    def stop(expected: str, came: str, rows: Ints, mend: str) -> NoReturn:
        refuse(f"{where}: (user, cut_day, item)", expected, came, pairs(found, basket[rows], item[rows]), mend)

    twice = np.flatnonzero(~new[1:] & (item[1:] == item[:-1])) + 1
    if len(twice):
        stop("each target once", "come again", twice, "an item of a basket is one target")
    unlike = np.flatnonzero((history != history[new][basket]) | (seen != seen[new][basket]))
    if len(unlike):
        stop("one history and one seen_user a (user, cut)", "rows differ", unlike, "write a basket in one go")
    wrong = np.flatnonzero((history < 0) | (repeat & (history == 0)))
    if len(wrong):
        stop("a history of 0 or more events, above 0 for repeats", "rows do not fit", wrong, "count visible events")
    return found


def label(key: ListKey) -> str:
    return f"{key.model} ({key.reading}, seed {key.seed}{', seen-filter' if key.seen_filter else ''})"


def pairs(baskets: Baskets, basket: Ints, item: Ints | None = None) -> list[str]:
    users = baskets.users[baskets.user_B[basket]]
    columns = [users.tolist(), baskets.cut_B[basket].tolist()]
    if item is not None:
        columns.append(baskets.items[item].tolist())
    return [f"({', '.join(str(part) for part in row)})" for row in zip(*columns, strict=True)]


def refuse(where: str, expected: str, came: str, shown: Sequence[str], mend: str, count: int | None = None) -> NoReturn:
    raise UserError(f"{where}: expected {expected}, {count or len(shown)} {came}: {_list(shown)}; {mend}")


def _list(items: Sequence[str]) -> str:
    return (", ".join(items[:_MOST_OFFENDERS]) or "none") + (", ..." if len(items) > _MOST_OFFENDERS else "")
