"""Where users are in the files of a root: what `forget` rewrites by, and what it proves with.

A table's rows are a user's by its columns `user`, `user_hash` and, in calendars, `key` of scope `user`. Any other place
with her ID is a mention: a string of a table, a word of a text, bytes of anything else (unpacked first). An ID that is
short or made of digits alone is found in places that have nothing to do with her (an item, a count, a weight): in a
table that is a namesake, which is listed and left; texts and weights are not searched for it, only reports. A file's
content decides whether it is a table, not its name, since a job that was killed leaves temporary files behind.
"""

from __future__ import annotations

import contextlib
import gzip
import html
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
from pyarrow import fs

from lum_ray.artifacts import storage
from lum_ray.data.forgotten import calendar_user
from lum_ray.data.rows import hash_strings

CHUNK_BYTES = 1 << 24
DISTINCT_LENGTH = 5
TEXTS = (".json", ".jsonl", ".html", ".csv", ".txt", ".md", ".yaml", ".yml", ".log")


@dataclass(frozen=True)
class Sought:
    """The users that are looked for."""

    users: tuple[str, ...]

    @cached_property
    def hashes(self) -> tuple[int, ...]:
        """Their 64-bit hashes."""
        return tuple(hash_strings(list(self.users)).tolist())

    @cached_property
    def distinct(self) -> tuple[str, ...]:
        """Those of them whose ID is not found by chance."""
        return tuple(user for user in self.users if len(user.encode()) >= DISTINCT_LENGTH and not user.isdigit())

    def word(self, users: Sequence[str]) -> str:
        """A regular expression (of `re` and of Arrow) for any of the IDs, as such or in JSON, as a word of its own."""
        forms = {form for user in users for form in (user, json.dumps(user)[1:-1])}
        escaped = sorted(re.sub(r"([^\w\s])", r"\\\1", form) for form in forms)
        return rf"(?:^|[^0-9A-Za-z_])(?:{'|'.join(escaped)})(?:$|[^0-9A-Za-z_])"


@dataclass(frozen=True)
class Trace:
    """What a file holds: `rows` of the users (`held` where even a dictionary does), the places of their IDs elsewhere,
    and the places of namesakes."""

    rows: int = 0
    held: bool = False
    mentions: tuple[str, ...] = ()
    namesakes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.held or bool(self.mentions)


def files_below(uri: str) -> list[str]:
    """The URIs of all files below a folder, hidden and temporary ones too, sorted."""
    place = storage(uri)
    found = place.filesystem.get_file_info(fs.FileSelector(place.path, recursive=True, allow_not_found=True))
    start = len(place.path.rstrip("/")) + 1
    return sorted(f"{uri.rstrip('/')}/{item.path[start:]}" for item in found if item.type == fs.FileType.File)


def theirs(table: pa.Table, sought: Sought) -> npt.NDArray[np.bool_]:
    """Which rows (N,) of a table are of the users."""
    mine = np.zeros(table.num_rows, np.bool_)
    names = set(table.column_names)
    if {"scope", "key"} <= names:
        mine |= _equal(calendar_user(table), sought)
    if "user" in names:
        mine |= _equal(table["user"], sought)
    if "user_hash" in names:
        stored = table["user_hash"].combine_chunks().cast(pa.uint64()).to_numpy(zero_copy_only=False)
        mine |= np.isin(stored, np.array(sought.hashes, np.uint64))
    return mine


def look(uri: str, sought: Sought) -> Trace:
    """What the file at `uri` holds of the users. Raises FileNotFoundError."""
    place = storage(uri)
    with place.filesystem.open_input_file(place.path) as stream:
        start = bytes(stream.read(8))
    try:
        if start.startswith((b"PAR1", b"ARROW1")):
            return _of_tables(tables_of(uri, _may_name), sought)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        return Trace(mentions=(f"cannot be read ({type(error).__name__}): nothing can be proved of it",))
    return Trace(mentions=_of_bytes(uri, start, sought))


def tables_of(uri: str, wanted: Callable[[pa.Field], bool] = lambda field: True) -> Iterator[pa.Table]:
    """The row groups of a parquet file, or the record batches of an Arrow file, one by one; the `wanted` columns."""
    place, parquet = storage(uri), starts_as_parquet(uri)
    with place.filesystem.open_input_file(place.path) as stream:
        if parquet:
            file = pq.ParquetFile(stream)
            names = [field.name for field in file.schema_arrow if wanted(field)]
            yield from (file.read_row_group(index, columns=names) for index in range(file.metadata.num_row_groups))
        else:
            reader = pa.ipc.open_file(stream)
            names = [field.name for field in reader.schema if wanted(field)]
            for index in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(index)]).select(names)


def _may_name(field: pa.Field) -> bool:
    """Whether a column can hold an ID or the hash of one: all but flat and listed numbers."""
    kind = field.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return field.name in ("user", "user_hash") or not pa.types.is_primitive(kind)


def starts_as_parquet(uri: str) -> bool:
    """Whether a table's file is parquet (else an Arrow file)."""
    place = storage(uri)
    with place.filesystem.open_input_file(place.path) as stream:
        return bytes(stream.read(4)) == b"PAR1"


def _of_tables(tables: Iterator[pa.Table], sought: Sought) -> Trace:
    rows, held, mentions, namesakes = 0, False, dict[str, None](), dict[str, None]()
    for table in tables:
        mine = theirs(table, sought)
        rows += int(mine.sum())
        others = table.filter(pa.array(~mine)) if mine.any() else table
        for name in table.column_names:
            for values in _strings(table[name]) if name == "user" else ():
                held |= bool(_equal(values, sought).any())
            for values in _strings(others[name]) if name != "user" else ():
                hits = [one for one in sought.users if pc.any(pc.equal(values, one)).as_py()]
                if sought.distinct and not set(hits) & set(sought.distinct):
                    found = pc.match_substring_regex(values, sought.word(sought.distinct))
                    hits += sought.distinct[:1] if pc.any(found).as_py() else ()
                if hits:
                    (mentions if set(hits) & set(sought.distinct) else namesakes)[f"column {name}"] = None
    return Trace(rows, held or rows > 0, tuple(mentions), tuple(namesakes))


def _strings(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    """The distinct strings in a column, however deep, and in its dictionaries even where no row has them."""
    for chunk in column.chunks:
        yield from _leaves(chunk)


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    kind = array.type
    if pa.types.is_dictionary(kind):
        yield from _leaves(array.dictionary)
    elif pa.types.is_struct(kind):
        for index in range(kind.num_fields):
            yield from _leaves(array.field(index))
    elif pa.types.is_map(kind):
        yield from _leaves(array.keys)
        yield from _leaves(array.items)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _leaves(array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        yield pc.unique(array.cast(pa.string())).drop_null()
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        texts = [value.decode(errors="replace") for value in pc.unique(array).drop_null().to_pylist()]
        yield pa.array(texts, pa.string())


def _equal(values: pa.ChunkedArray | pa.Array, sought: Sought) -> npt.NDArray[np.bool_]:
    found = pc.is_in(values.cast(pa.string()), value_set=pa.array(sought.users, pa.string()))
    return np.asarray(found.to_numpy(zero_copy_only=False) if isinstance(found, pa.Array) else found.to_numpy(), bool)


def _of_bytes(uri: str, start: bytes, sought: Sought) -> tuple[str, ...]:
    """Where the IDs (of those that are distinct; in a report, which can be made again, of all) and hashes are."""
    text = uri.endswith(TEXTS)
    users = sought.users if uri.endswith(".html") else sought.distinct
    words = re.compile(sought.word(users).encode()) if users and text else None
    needles = [] if text else [user.encode() for user in users]
    needles += [number.to_bytes(8, "little") for number in sought.hashes]
    for content in _contents(uri, start):
        content = html.unescape(content.decode(errors="replace")).encode() if uri.endswith(".html") else content
        if (words is not None and words.search(content)) or any(needle in content for needle in needles):
            return ("its text" if text else "its bytes",)
    return ()


def _contents(uri: str, start: bytes) -> Iterator[bytes]:
    """The bytes of a file: whole where they are packed or a text, else in overlapping chunks."""
    place = storage(uri)
    with place.filesystem.open_input_file(place.path) as stream:
        if start.startswith(b"PK\x03\x04"):
            content = bytes(stream.read())
            yield content
            with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(content)) as packed:
                yield from (packed.read(name) for name in packed.namelist())
        elif start.startswith(b"\x1f\x8b"):
            yield gzip.decompress(stream.read())
        elif start.startswith(b"\x28\xb5\x2f\xfd"):
            yield pa.input_stream(stream, compression="zstd").read()
        elif uri.endswith(TEXTS):
            yield bytes(stream.read())
        else:
            tail = b""
            while chunk := bytes(stream.read(CHUNK_BYTES)):
                yield tail + chunk
                tail = chunk[-1024:]
