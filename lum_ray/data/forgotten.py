"""Users who asked to be forgotten: a tombstone each, `<root>/forgotten/<hash>.json`, named by the user's 64-bit hash.

What is prepared leaves them out, even though the source still has them. A tombstone does not change the digest of an
artifact: `forget` has taken the user out of what is there, so that an artifact is the same whether it was rewritten or
is built anew, and no work is done again. The days that the data cover are those of all users, so that they stay too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from lum_ray.artifacts import join, storage
from lum_ray.data.rows import hash_strings

FOLDER = "forgotten"


def tombstone(root: str, user_hash: int) -> str:
    """The URI of a user's tombstone, there or not."""
    return join(root, FOLDER, f"{user_hash:016x}.json")


def forgotten_users(root: str) -> tuple[int, ...]:
    """The hashes (see `hash_strings`) of the users who are forgotten under `root`, ascending: a listing, no reads."""
    place = storage(join(root, FOLDER))
    found = place.filesystem.get_file_info(fs.FileSelector(place.path, allow_not_found=True))
    return tuple(sorted(int(item.base_name[:-5], 16) for item in found if item.base_name.endswith(".json")))


def without(table: pa.Table, forgotten: Sequence[int], column: str = "user") -> pa.Table:
    """The rows of `table` whose user (null: nobody's) is not forgotten."""
    if not forgotten or table.num_rows == 0:
        return table
    encoded = table[column].combine_chunks().dictionary_encode()
    gone = np.isin(hash_strings(encoded.dictionary.to_pylist()), np.array(forgotten, np.uint64))
    names = encoded.dictionary.filter(pa.array(gone))
    return table.filter(pc.invert(pc.is_in(table[column], value_set=names))) if len(names) else table


def without_theirs(calendar: pa.Table, forgotten: Sequence[int]) -> pa.Table:
    """The rows of `calendar` (CALENDAR) that are not about a forgotten user alone."""
    return without(calendar.append_column("user", calendar_user(calendar)), forgotten).drop_columns(["user"])


def calendar_user(calendar: pa.Table) -> pa.ChunkedArray:
    """Whose each row of a calendar is, null for a segment's and for everyone's."""
    return pc.if_else(pc.equal(calendar["scope"], "user"), calendar["key"], pa.scalar(None, pa.string()))
