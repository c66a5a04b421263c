"""How users are spread over buckets, files and row groups, and the files of the shuffle in between.

bucket = hash(user) mod 2^k. File i of a folder holds the buckets [i, i + 1) * 2^k / files, so that a file can be made
from every block's slice i alone. Everything that shapes a file follows from the number of rows of the raw tables, not
from blocks, workers or the order of files. Shapes: A rows of (user, day), N users.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from lum_ray.artifacts import storage, write_bytes
from lum_ray.data.rows import UInt64, hash_strings

MIN_LOG2_BUCKETS = 6
BUCKET_USERS = 4096
EVENTS_PER_USER = 32
FILE_ROWS = 1 << 21
MAX_FILES = 4096


def choose_log2_buckets(event_rows: int, profile_rows: int) -> int:
    """k: about 4096 users a bucket, at least 64 buckets.

    The number of users is not known before the events are read: it is taken as the larger of the number of profiles and
    a 32nd of the number of events, which the files' footers tell.
    """
    users = max(profile_rows, event_rows // EVENTS_PER_USER)
    return max(MIN_LOG2_BUCKETS, (max(users // BUCKET_USERS, 1) - 1).bit_length())


def choose_files(event_rows: int, log2_buckets: int) -> int:
    """Files of a folder (a power of two): about two million events behind each, which bounds the memory of a merge."""
    return int(min(1 << (max(event_rows // FILE_ROWS, 1) - 1).bit_length(), 1 << log2_buckets, MAX_FILES))


def user_runs(user: pa.Array) -> npt.NDArray[np.int64]:
    """Where each run of equal users begins in a sorted column (A,)."""
    if len(user) == 0:
        return np.empty(0, np.int64)
    new = pc.not_equal(user[1:], user[:-1]).to_numpy(zero_copy_only=False)
    return np.flatnonzero(np.concatenate([[True], new])).astype(np.int64)


def by_file(user: pa.ChunkedArray, log2_buckets: int, files: int) -> pa.DictionaryArray:
    """The same users with a dictionary in the order of the files that they belong to.

    What is grouped in the order of such a dictionary needs no other order for `scatter`.
    """
    encoded = user.combine_chunks().dictionary_encode()
    # numpy sorts 16 bits by radix; there are at most 4096 files
    order = np.argsort(_file_of(encoded.dictionary, log2_buckets, files).astype(np.uint16), kind="stable")
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    codes = place[encoded.indices.to_numpy(zero_copy_only=False)]
    return pa.DictionaryArray.from_arrays(pa.array(codes), encoded.dictionary.take(pa.array(order)))


def _file_of(names: pa.Array, log2_buckets: int, files: int) -> npt.NDArray[np.int64]:
    bucket = bucket_of(hash_strings(names), log2_buckets)
    return bucket.astype(np.int64) * files >> log2_buckets


def _slices(user: pa.Array, log2_buckets: int, files: int) -> npt.NDArray[np.int64]:
    encoded = user.dictionary_encode()
    chosen: npt.NDArray[np.int64] = _file_of(encoded.dictionary, log2_buckets, files)[
        encoded.indices.to_numpy(zero_copy_only=False)
    ]
    return chosen


def bucket_of(user_hash: UInt64, log2_buckets: int) -> npt.NDArray[np.int32]:
    """The bucket of each user hash."""
    return (user_hash & np.uint64((1 << log2_buckets) - 1)).astype(np.int32)


NARROW = ((1 << 7, pa.int8()), (1 << 15, pa.int16()), (1 << 31, pa.int32()))


def narrowed(table: pa.Table) -> pa.Table:
    """Columns of int64, and lists of them, in the fewest bytes that hold them: most daily numbers are small."""
    for place, column in enumerate(table.columns):
        listed = pa.types.is_list(column.type)
        if (column.type.value_type if listed else column.type) != pa.int64():
            continue
        bounds = pc.min_max(pc.list_flatten(column) if listed else column).as_py()
        least, most = bounds["min"] or 0, bounds["max"] or 0
        narrow = next((kind for limit, kind in NARROW if -limit <= least and most < limit), None)
        if narrow is not None:
            column = column.cast(pa.list_(narrow) if listed else narrow, safe=False)
            table = table.set_column(place, table.column_names[place], column)
    return table


def scatter(uri: str, tables: Sequence[pa.Table], log2_buckets: int, files: int) -> None:
    """Write `tables` (they have `user`) as one Arrow file whose record batch i holds the rows that belong to file i."""
    parts, slices = [], []
    for table in tables:
        user = table["user"].combine_chunks() if table.num_rows else pa.array([], pa.string())
        slices.append(_slices(user, log2_buckets, files))
        # written out: a file has one dictionary, which every reader of a slice would have to read
        parts.append(
            table.set_column(table.column_names.index("user"), "user", pa.chunked_array([user.cast(pa.string())]))
        )
    joined = pa.concat_tables(parts, promote_options="permissive")
    file_of = np.concatenate(slices)
    order = np.argsort(file_of.astype(np.uint16), kind="stable")
    table = joined.combine_chunks().take(pa.array(order)).combine_chunks()
    bounds = np.searchsorted(file_of[order], np.arange(files + 1))
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        for begin, end in itertools.pairwise(bounds.tolist()):
            columns = [column.combine_chunks() for column in table.slice(begin, end - begin).columns]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=table.schema))
    write_bytes(uri, sink.getvalue())


def gather(uris: Sequence[str], index: int) -> pa.Table:
    """The rows that belong to file `index`, of all `scatter`ed files. Raises FileNotFoundError."""
    tables = []
    for uri in uris:
        place = storage(uri)
        with place.filesystem.open_input_file(place.path) as stream, pa.ipc.open_file(stream) as reader:
            tables.append(pa.Table.from_batches([reader.get_batch(index)]))
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def write_states(uri: str, states: pa.Table) -> None:
    """Write the states of a final file's users for the next increment."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, states.schema, options=options) as writer:
        writer.write_table(states.combine_chunks())
    write_bytes(uri, sink.getvalue().to_pybytes())


def gather_states(sources: Sequence[tuple[str, bool]], index: int, log2_buckets: int, files: int) -> pa.Table:
    """The rows that belong to file `index` of `files`, of files that `write_states` wrote.

    `sources`: their URIs, and whether all their users are of that file. Raises FileNotFoundError.
    """
    tables = []
    for uri, whole in sources:
        place = storage(uri)
        with place.filesystem.open_input_file(place.path) as stream, pa.ipc.open_file(stream) as reader:
            table = reader.read_all().combine_chunks()
        tables.append(
            table
            if whole
            else table.filter(pa.array(_slices(table["user"].combine_chunks(), log2_buckets, files) == index))
        )
    return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})


def timelines_of(daily: pa.Table, log2_buckets: int) -> pa.Table:
    """A daily table (user, day, integers; A rows sorted by (user, day)) as one row per user (N), in bucket order.

    Columns: bucket, user, user_hash, days list<int32>, one list<int64> per behaviour. Sorted by (bucket, hash, user).
    """
    daily = daily.combine_chunks()
    user, starts = daily["user"].combine_chunks(), user_runs(daily["user"].combine_chunks())
    names = user.take(pa.array(starts))
    user_hash = hash_strings(names)
    lengths = np.diff(np.append(starts, daily.num_rows))
    order = _bucket_order(user_hash, log2_buckets)
    # the active days of the users, in the users' new order
    ends = np.cumsum(lengths[order])
    shift = np.repeat(starts[order] - (ends - lengths[order]), lengths[order])
    active = pa.array(np.arange(daily.num_rows) + shift)
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    columns: dict[str, Any] = _user_columns(names, user_hash, order, log2_buckets)
    for name in daily.column_names[1:]:
        values = daily[name].combine_chunks().take(active)
        columns["days" if name == "day" else name] = pa.ListArray.from_arrays(offsets, values)
    return pa.table(columns)


def bucketed(table: pa.Table, log2_buckets: int) -> pa.Table:
    """A table of one row per user with bucket, user and user_hash in front, sorted by (bucket, hash, user)."""
    table = table.sort_by("user").combine_chunks()
    names = table["user"].combine_chunks()
    user_hash = hash_strings(names)
    order = _bucket_order(user_hash, log2_buckets)
    rest = table.drop_columns(["user"]).take(pa.array(order))
    columns = dict(zip(rest.column_names, rest.columns, strict=True))
    return pa.table(_user_columns(names, user_hash, order, log2_buckets) | columns)


def _bucket_order(user_hash: UInt64, log2_buckets: int) -> npt.NDArray[np.int64]:
    """Sorts users that are in the order of their names by (bucket, hash, name): lexsort is stable."""
    return np.lexsort((user_hash, bucket_of(user_hash, log2_buckets))).astype(np.int64)


def _user_columns(
    names: pa.Array, user_hash: UInt64, order: npt.NDArray[np.int64], log2_buckets: int
) -> dict[str, Any]:
    return {
        "bucket": pa.array(bucket_of(user_hash[order], log2_buckets), pa.int32()),
        "user": names.take(pa.array(order)),
        "user_hash": pa.array(user_hash[order], pa.uint64()),
    }


def write_buckets(uri: str, table: pa.Table) -> tuple[list[dict[str, int]], int]:
    """Write a table sorted by `bucket` as parquet, one bucket a row group.

    Returns (the manifest's row_groups, the size in bytes).
    """
    buckets, counts = np.unique(table["bucket"].to_numpy(), return_counts=True)
    packed = [name for name in table.column_names if _is_packed(table[name])]
    encoding = {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in packed}
    rest = [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in table.schema
        if field.name not in (*packed, "user", "user_hash")
    ]
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", use_dictionary=rest, column_encoding=encoding, write_statistics=False
    ) as writer:
        begin = 0
        for count in counts.tolist():
            writer.write_table(table.slice(begin, count), row_group_size=count)
            begin += count
    content = sink.getvalue()
    write_bytes(uri, content)
    groups = [{"bucket": bucket, "rows": rows} for bucket, rows in zip(buckets.tolist(), counts.tolist(), strict=True)]
    return groups, len(content)


def _is_packed(column: pa.ChunkedArray) -> bool:
    """Whether it holds lists of whole numbers that span less than 32 bits: such as days and amounts, which are written
    and read faster packed than by way of a dictionary. Hashes of items are not."""
    if not (pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type)):
        return False
    bounds = pc.min_max(pc.list_flatten(column)).as_py()
    return bounds["min"] is None or bounds["max"] - bounds["min"] < 1 << 32
