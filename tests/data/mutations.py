"""Raw tables that are broken at random, and what must become of them; a process of its own, fed with seeds.

Each seed makes small tables, breaks them in one way, and prepares them. The end must be a committed artifact with rows
in = rows used + rows rejected, whose rejects are the rows that an independent reading finds wrong and whose values are
those of a plain Python aggregation of the others; or a UserError that names a file and shows no data. One line of JSON
on stdout for each seed: {"seed", "how", "end"} or with "wrong". A crash or a hang ends the process without its line.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import shutil
import sys
import tempfile
import traceback
import zoneinfo
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lum_ray.artifacts import UserError
from lum_ray.config import Behaviour, Calendar, Data, Events, Profiles
from lum_ray.data.calendar import prepare_calendar
from lum_ray.data.prepare import Tokenizer, prepare_timelines
from lum_ray.data.raw import RawTables
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import hash_strings
from lum_ray.gts import sequences
from lum_ray.lumos.timelines import TOKENIZER_VERSION, merge, partial

SECRET = "zqx"
"""Is in every text that is data, and must be in no message."""
USER = "u-"
"""IDs may be in messages."""
BEHAVIOURS = (
    Behaviour("active", "binary", "count()"),
    Behaviour("visits", "count", "count()"),
    Behaviour("spend", "continuous", "sum(price)", 0.01),
    Behaviour("most", "continuous", "max(price)", 0.01),
    Behaviour("items", "count", "sum(count)"),
    Behaviour("dear", "binary", "any(price > 2)"),
    Behaviour("kinds", "count", "n_unique(kind)"),
)
NAMES = ("user", "time", "price", "count", "kind")
UNITS = {"date": 1, "s": 86_400, "ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}
Random = np.random.Generator
Change = Callable[[pa.Table, Random], pa.Table]


def events(random: Random, rows: int, time: str) -> pa.Table:
    """Events of a few users over 50 days; `time`: day, date or a unit of timestamps."""
    day = random.integers(100, 150, rows)
    if time == "day":
        when = pa.array(day, pa.int32())
    elif time == "date":
        when = pa.array(day, pa.int32()).cast(pa.date32())
    else:
        inside = random.integers(0, 86_400, rows)
        when = pa.array((day * 86_400 + inside) * (UNITS[time] // 86_400)).cast(pa.timestamp(time, "UTC"))
    return pa.table(
        {
            "user": [f"{USER}{number}" for number in random.integers(0, 9, rows)],
            "time": when,
            "price": random.integers(0, 500, rows) / 100,
            "count": random.integers(0, 5, rows),
            "kind": [f"{SECRET}{number}" for number in random.integers(0, 4, rows)],
        }
    )


# --- what is done to values: some cells of a column become others ---


def _put(table: pa.Table, random: Random, name: str, value: Any) -> pa.Table:
    cells = table[name].to_pylist()
    for place in random.choice(len(cells), max(1, len(cells) // 7), replace=False):
        cells[place] = value
    return table.set_column(table.column_names.index(name), name, pa.array(cells, table.schema.field(name).type))


def _numbers(table: pa.Table, random: Random, name: str, numbers: list[int]) -> pa.Table:
    """The column as integers of 64 bits, some of them replaced, back in its type."""
    kind = table.schema.field(name).type
    wide = table[name].combine_chunks().cast(pa.int64() if not pa.types.is_date32(kind) else pa.int32())
    cells = np.array(wide.to_numpy(), np.int64)
    for place in random.choice(len(cells), max(1, len(cells) // 7), replace=False):
        cells[place] = numbers[int(random.integers(len(numbers)))]
    if pa.types.is_timestamp(kind) and kind.unit == "s":  # parquet has none, milliseconds must hold it
        column = pa.array(cells // 2000).cast(kind)
    elif pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
        column = pa.array(cells).cast(kind)
    elif pa.types.is_date32(kind):
        column = pa.array(np.clip(cells, -(2**31), 2**31 - 1).astype(np.int32)).cast(kind)
    else:
        column = pa.array(cells)
    return table.set_column(table.column_names.index(name), name, column)


def _typed(name: str, kind: pa.DataType) -> Change:
    def change(table: pa.Table, random: Random) -> pa.Table:
        column = table[name].combine_chunks()
        if pa.types.is_string(column.type) and not pa.types.is_large_string(kind) and not pa.types.is_string_view(kind):
            column = pa.array([int(text.strip(f"{USER}{SECRET}")) for text in column.to_pylist()])
        return table.set_column(table.column_names.index(name), name, column.cast(kind, safe=False))

    return change


FAR = [
    2**62,
    -(2**62),
    2**63 - 1,
    -(2**63) + 1,
    2**31,
    -(2**31) - 1,
    -1,
    0,
    253_402_500_000 * 10**6,
    -62_135_700_000 * 10**6,
]
VALUES: dict[str, Change] = {
    **{f"null {name}": lambda t, r, n=name: _put(t, r, n, None) for name in ("user", "time", "price", "count", "kind")},
    **{
        f"price {value}": lambda t, r, v=value: _put(t, r, "price", v)
        for value in (math.nan, math.inf, -math.inf, 1.005, 1e300, -5.25, 2.9e12, 2.81475e12, 5e-324, -0.0)
    },
    "empty user": lambda t, r: _put(t, r, "user", ""),
    "strange users": lambda t, r: _put(
        t, r, "user", ["\x00", "a\x00", "ü" * 9, "\U0001f600", " ", "a\nb"][r.integers(6)]
    ),
    "long user": lambda t, r: _put(t, r, "user", USER * int(r.integers(1000, 400_000))),
    "long kind": lambda t, r: _put(t, r, "kind", SECRET * 100_000),
    "far times": lambda t, r: _numbers(t, r, "time", FAR),
    "negative days": lambda t, r: _numbers(t, r, "time", [-5 * UNITS["us"], -1, -86_400, -719_163]),
    "far counts": lambda t, r: _numbers(t, r, "count", [2**48, 2**48 + 1, -(2**48), 2**62, -(2**63) + 1]),
}
SCHEMA: dict[str, Change] = {
    **{f"no {name}": lambda t, r, n=name: t.drop_columns([n]) for name in ("user", "time", "price", "kind")},
    **{
        f"renamed {name}": lambda t, r, n=name: t.rename_columns([c if c != n else c.upper() for c in t.column_names])
        for name in ("user", "time", "price")
    },
    "user int64": _typed("user", pa.int64()),
    "user uint8": _typed("user", pa.uint8()),
    "user uint64": lambda t, r: t.set_column(0, "user", pa.array(r.integers(0, 9, len(t)).astype(np.uint64) + 2**63)),
    "user large": _typed("user", pa.large_string()),
    "user view": _typed("user", pa.string_view()),
    "user dictionary": lambda t, r: t.set_column(0, "user", t["user"].dictionary_encode()),
    "user bytes": lambda t, r: t.set_column(0, "user", t["user"].cast(pa.binary())),
    "user float": _typed("user", pa.float64()),
    "user list": lambda t, r: t.set_column(0, "user", pa.array([[text] for text in t["user"].to_pylist()])),
    "user invalid": lambda t, r: _invalid(t, r, "user"),
    "kind invalid": lambda t, r: _invalid(t, r, "kind"),
    "kind dictionary": lambda t, r: t.set_column(4, "kind", t["kind"].dictionary_encode()),
    "kind null": lambda t, r: t.set_column(4, "kind", pa.nulls(len(t))),
    "kind struct": lambda t, r: t.set_column(4, "kind", pa.array([{"a": text} for text in t["kind"].to_pylist()])),
    "price decimal": _typed("price", pa.decimal128(12, 2)),
    "price wide decimal": _typed("price", pa.decimal256(40, 3)),
    "price float32": _typed("price", pa.float32()),
    "price half": _typed("price", pa.float16()),
    "price text": lambda t, r: t.set_column(2, "price", t["price"].cast(pa.string())),
    "price null": lambda t, r: t.set_column(2, "price", pa.nulls(len(t))),
    "price struct": lambda t, r: t.set_column(2, "price", pa.array([{"x": value} for value in t["price"].to_pylist()])),
    "price bool": _typed("price", pa.bool_()),
    "price int": _typed("price", pa.int16()),
    "count uint64": lambda t, r: t.set_column(3, "count", pa.array(r.integers(0, 9, len(t)).astype(np.uint64) + 2**63)),
    "count int8": _typed("count", pa.int8()),
    "count float": _typed("count", pa.float64()),
    "time text": lambda t, r: t.set_column(1, "time", t["time"].cast(pa.string())),
    "time float": lambda t, r: t.set_column(1, "time", pa.array(r.random(len(t)))),
    "time null": lambda t, r: t.set_column(1, "time", pa.nulls(len(t))),
    "time of day": lambda t, r: t.set_column(1, "time", pa.array(r.integers(0, 9, len(t))).cast(pa.time64("us"))),
    "time uint64": lambda t, r: t.set_column(1, "time", pa.array(r.integers(0, 9, len(t)).astype(np.uint64) + 2**63)),
    "time date64": lambda t, r: _numbers(
        t.set_column(1, "time", pa.array(r.integers(100, 150, len(t)) * 86_400_000).cast(pa.date64())),
        r, "time", [86_400_000 * 2**31, -86_400_000 * 2**31, 86_400_000 * -5],
    ),
    "no zone": lambda t, r: t.set_column(1, "time", pa.array(r.integers(0, 9, len(t))).cast(pa.timestamp("us"))),
    "twice a column": lambda t, r: t.append_column("price", t["price"]),
    "twice the user": lambda t, r: t.append_column("user", t["user"]),
    "columns turned round": lambda t, r: t.select(t.column_names[::-1]),
    "more columns": lambda t, r: t.append_column("deep", pa.array([[{"a": [1]}]] * len(t))),
    "no columns": lambda t, r: t.select([]),
    "no rows": lambda t, r: t.slice(0, 0),
}  # fmt: skip


def _invalid(table: pa.Table, random: Random, name: str) -> pa.Table:
    cells: list[bytes] = [text.encode() for text in table[name].to_pylist()]
    for place in random.choice(len(cells), 3, replace=False):
        cells[place] = [b"\xff\xfe", b"a\xc3", b"\xed\xa0\x80"][random.integers(3)]
    array = pa.array(cells, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(array), array.buffers())
    return table.set_column(table.column_names.index(name), name, text)


# --- what is done to files ---


def _flip(content: bytes, random: Random) -> bytes:
    found = bytearray(content)
    for place in random.integers(0, len(found), int(random.integers(1, 9))):
        found[place] ^= 1 << int(random.integers(8))
    return bytes(found)


def _page(content: bytes, random: Random) -> bytes:
    start, size = int(random.integers(0, len(content))), int(random.integers(1, 600))
    return content[:start] + b"\x00" * len(content[start : start + size]) + content[start + size :]


def _insert(content: bytes, random: Random) -> bytes:
    start = int(random.integers(0, len(content)))
    return content[:start] + random.bytes(int(random.integers(1, 50))) + content[start:]


def _drop(content: bytes, random: Random) -> bytes:
    start = int(random.integers(0, len(content)))
    return content[:start] + content[start + int(random.integers(1, 50)) :]


BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    "flip": _flip,
    "flip the footer": lambda c, r: c[:-700] + _flip(c[-700:], r),
    "cut": lambda c, r: c[: int(r.integers(0, len(c)))],
    "cut the head": lambda c, r: c[int(r.integers(1, len(c))) :],
    "insert": _insert,
    "drop": _drop,
    "zero a page": _page,
    "random": lambda c, r: r.bytes(len(c)),
    "magic alone": lambda c, r: b"PAR1" + r.bytes(int(r.integers(0, 99))) + b"PAR1",
    "empty": lambda c, r: b"",
    "text": lambda c, r: f"{SECRET},1,2\n".encode() * 30,
}


def _folder(folder: Path, random: Random) -> None:
    (folder / "1.parquet").rename(folder / "one")
    (folder / "1.parquet").mkdir()
    (folder / "one").rename(folder / "1.parquet" / "deep.parquet")


def _none(folder: Path, random: Random) -> None:
    for path in folder.iterdir():
        path.unlink()


STRUCTURE: dict[str, Callable[[Path, Random], object]] = {
    "the same file twice": lambda f, r: shutil.copy(f / "0.parquet", f / "again.parquet"),
    "a folder": _folder,
    "an empty folder": lambda f, r: (f / "x.parquet").mkdir(),
    "hidden files": lambda f, r: [(f / name).write_bytes(b"x") for name in (".hidden.parquet", "_SUCCESS")],
    "a hidden folder": lambda f, r: [(f / "_work").mkdir(), (f / "_work" / "0.parquet").write_bytes(b"x")],
    "other files": lambda f, r: [(f / name).write_bytes(b"x") for name in ("notes.txt", "0.crc", "data.csv")],
    "a file less": lambda f, r: (f / "1.parquet").unlink(),
    "no files": _none,
    "only text": lambda f, r: [_none(f, r), (f / "notes.txt").write_bytes(b"x")],
    "a broken link": lambda f, r: (f / "link.parquet").symlink_to(f / "nowhere"),
    "a name": lambda f, r: (f / "1.parquet").rename(f / "ein Name mit ü, % und #.parquet"),
}
KINDS: dict[str, dict[str, Any]] = {"bytes": BYTES, "schema": SCHEMA, "values": VALUES, "structure": STRUCTURE}


# --- the case ---


def case(seed: int, place: Path, engine: str = "local") -> dict[str, Any]:
    """Run one seed in the folder `place`. Raises AssertionError where its end is wrong, and whatever escapes."""
    random = np.random.default_rng(seed)
    time = ("day", "date", "s", "ms", "us", "ns")[random.integers(6)]
    zone = ("UTC", "Europe/Berlin", "America/New_York")[random.integers(3)]
    tables = [events(random, int(random.integers(20, 60)), time) for _ in range(3)]
    kind = ("bytes", "schema", "values", "structure")[random.choice(4, p=[0.3, 0.3, 0.3, 0.1])]
    how = sorted(KINDS[kind])[random.integers(len(KINDS[kind]))]
    change = KINDS[kind][how]
    every = random.random() < 0.3  # all files, not only one
    target = ("events", "profiles", "calendar", "sequences")[random.choice(4, p=[0.6, 0.15, 0.1, 0.15])]
    folder = place / target
    folder.mkdir(parents=True)
    for number, table in enumerate(tables):
        hit = every or number == 1
        if target == "profiles":  # one row a user
            names = pa.array([f"{USER}{number * 100 + row}" for row in range(len(table))])
            table = table.set_column(0, "user", names)
        if hit and kind in ("schema", "values"):
            table = change(table, random)
        pq.write_table(
            as_calendar(table) if target == "calendar" else table, folder / f"{number}.parquet",
            row_group_size=int(random.integers(5, 70)), use_dictionary=bool(random.random() < 0.5),
            compression=("zstd", "none", "snappy")[random.integers(3)],
        )  # fmt: skip
        if hit and kind == "bytes":
            content = (folder / f"{number}.parquet").read_bytes()
            (folder / f"{number}.parquet").write_bytes(change(content, random))
    if kind == "structure":
        change(folder, random)
    about = {"seed": seed, "how": f"{target}: {kind}: {how}, {time}, {zone}, {'all' if every else 'one'}"}
    share = float(random.choice([0.0, 1.0], p=[0.2, 0.8]))
    data = Data(behaviours=BEHAVIOURS, time_zone=zone, max_reject_share=share)
    try:
        artifact = PREPARE[target](data, folder, place, engine, int(random.integers(10, 200)))
    except UserError as error:
        text = str(error)
        names = [path.name for path in folder.resolve().rglob("*")]
        called = "events" if target == "sequences" else target
        assert str(folder) in text or any(f"{called}/{name}" in text for name in names), f"names no file: {text}"
        assert SECRET not in text, f"shows data: {text}"
        return about | {"end": "error", "text": text[:300]}
    CHECK[target](folder, artifact, zone)
    return about | {"end": "artifact", "rejected": artifact.manifest["rows_rejected"]}


def as_calendar(table: pa.Table) -> pa.Table:
    """The table's columns under the names of a calendar: every row a user's campaign of one day."""
    names = {"user": "key", "time": "start_day", "kind": "event_type", "price": "value"}
    table = table.rename_columns([names.get(name, name) for name in table.column_names])
    if "start_day" in table.column_names and table.column_names.count("start_day") == 1:
        table = table.append_column("end_day", table["start_day"])
    return table.append_column("scope", pa.repeat("user", len(table))) if table.column_names else table


def _timelines(data: Data, folder: Path, place: Path, engine: Any, block_rows: int) -> Any:
    made_by = Tokenizer(partial, merge, TOKENIZER_VERSION)
    return prepare_timelines(
        data, RawTables(str(folder)), str(place / "root" / "0123456789ab"), made_by, engine, block_rows=block_rows
    )


def _sequences(data: Data, folder: Path, place: Path, engine: Any, block_rows: int) -> Any:
    made_by = Tokenizer(sequences.partial, sequences.merge, sequences.TOKENIZER_VERSION, sequences.COLUMNS)
    data = replace(data, events=Events(item="kind"), behaviours=())
    # rejects and messages name the table `events`
    folder.rename(place / "events")
    folder.symlink_to(place / "events")
    return prepare_timelines(
        data, RawTables(str(folder)), str(place / "root" / "0123456789ab"), made_by, engine, block_rows=block_rows
    )


def _profiles(data: Data, folder: Path, place: Path, engine: Any, block_rows: int) -> Any:
    data = replace(data, profiles=Profiles(registered="time", numbers=("price", "count"), categories=("kind",)))
    (place / "some").mkdir()
    pq.write_table(events(np.random.default_rng(1), 30, "day"), place / "some" / "0.parquet")
    made_by = Tokenizer(partial, merge, TOKENIZER_VERSION)
    tables = RawTables(str(place / "some"), str(folder))
    return prepare_timelines(data, tables, str(place / "root" / "0123456789ab"), made_by, engine, block_rows=block_rows)


def _calendar(data: Data, folder: Path, place: Path, engine: Any, block_rows: int) -> Any:
    data = replace(data, calendar=Calendar())
    return prepare_calendar(data, RawTables("", None, str(folder)), str(place / "root" / "0123456789ab"), 0, 100)


PREPARE = {"events": _timelines, "profiles": _profiles, "calendar": _calendar, "sequences": _sequences}


def read_raw(folder: Path, names: tuple[str, ...] = NAMES) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(path below the folder, row number, row) of all raw rows."""
    for file in sorted(folder.rglob("*.parquet")):
        below = file.relative_to(folder)
        if not any(part[0] in "._" for part in below.parts) and file.is_file():
            for number, row in enumerate(plain_rows(file, names)):
                yield str(below), number, row


def read_rejects(artifact: Any) -> dict[tuple[str, int], list[str]]:
    """The reasons of the rejects by file and row."""
    path = Path(artifact.uri) / "rejects"
    found: dict[tuple[str, int], list[str]] = {}
    for row in pq.read_table(path).to_pylist() if path.exists() else ():
        assert SECRET not in row["reason"], row["reason"]
        found.setdefault((row["file"], row["row"]), []).append(row["reason"])
    assert sum(map(len, found.values())) == artifact.manifest["rows_rejected"]
    return found


def rounded(row: Any) -> Any:
    """A row with its numbers to 14 digits: Arrow's cast of decimals may be one bit away from the nearest float."""
    cells = [float(f"{cell:.14g}") if isinstance(cell, (int, float)) else cell for cell in row]
    return tuple(cells)


def check_profiles(folder: Path, artifact: Any, zone: str) -> None:
    """Compare the profiles of an artifact with a plain reading."""
    rejects, expected, rows_in = read_rejects(artifact), {}, 0
    for below, number, row in read_raw(folder):
        rows_in += 1
        day = day_of(row["time"], zone)
        bad = row["user"] is None or any(isinstance(row[name], bytes) for name in ("user", "kind"))
        bad |= row["time"] is not None and day is None
        numbers = {name: row[name] for name in ("price", "count")}
        infinite = any(value is not None and math.isinf(value) for value in numbers.values())
        reasons = rejects.get((f"profiles/{below}", number), [])
        edge = row["time"] is not None and row["time"][1] == "ns" and abs(row["time"][0]) > 2**63 - 1 - UNITS["ns"]
        if edge and reasons:
            continue
        assert bool(reasons) == (bad or infinite), (below, number, row, reasons)
        if not bad:
            clean = {
                name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()
            }
            assert row["user"] not in expected
            expected[row["user"]] = clean | {"registered": day, "kind": row["kind"]}
    assert artifact.manifest["rows_in"] == rows_in + 30
    found = pq.read_table(Path(artifact.uri) / "profiles").to_pylist() if expected else []
    names = ("price", "count", "registered", "kind")
    assert {row["user"]: rounded(row[name] for name in names) for row in found} == {
        user: rounded(row[name] for name in names) for user, row in expected.items()
    }


def check_calendar(folder: Path, artifact: Any, zone: str) -> None:
    """Compare a calendar with a plain reading."""
    rejects, expected, rows_in = read_rejects(artifact), [], 0
    for below, number, row in read_raw(folder, ("key", "start_day", "value", "count", "event_type")):
        rows_in += 1
        day = day_of(row["time"], zone)
        edge = row["time"] is not None and row["time"][1] == "ns" and abs(row["time"][0]) > 2**63 - 1 - UNITS["ns"]
        bad = day is None or any(row[name] is None or isinstance(row[name], bytes) for name in ("user", "kind"))
        bad |= row["price"] is not None and not math.isfinite(row["price"])
        gone = (f"calendar/{below}", number) in rejects
        assert gone == bad or edge, (below, number, row)
        if not gone:
            expected.append(("user", row["user"], day, day, row["kind"], row["price"], None))
    found = pq.read_table(Path(artifact.uri) / "0000.parquet").to_pylist()
    assert sorted(repr(rounded(tuple(row.values()))) for row in found) == sorted(map(repr, map(rounded, expected)))
    assert artifact.manifest["rows_in"] == rows_in == len(found) + artifact.manifest["rows_rejected"]


def check_sequences(folder: Path, artifact: Any, zone: str) -> None:
    """Compare sequences with a plain reading: each (user, instant, item) once."""
    rejects, expected, rows_in = read_rejects(artifact), set(), 0
    for below, number, row in read_raw(folder):
        rows_in += 1
        day = day_of(row["time"], zone)
        bad = day is None or any(row[name] is None or isinstance(row[name], bytes) for name in ("user", "kind"))
        edge = row["time"] is not None and row["time"][1] == "ns" and abs(row["time"][0]) > 2**63 - 1 - UNITS["ns"]
        gone = (f"events/{below}", number) in rejects
        assert gone == bad or edge, (below, number, row)
        if not gone:
            time, unit = row["time"]
            micros = day * UNITS["us"] if unit in ("number", "date") else time * UNITS["us"] // UNITS[unit]
            item = int(hash_strings([str(row["kind"])]).view(np.int64)[0])
            expected.add((row["user"], day, item, micros))
    assert artifact.manifest["rows_in"] == rows_in == artifact.manifest["events"] + len(rejects)
    timelines = Timelines.open(artifact.uri)
    rows = timelines.read(range(timelines.buckets))
    users = np.repeat(rows.user, np.diff(rows.offsets))
    found = [(user, int(day), int(value[0]), int(value[1])) for user, day, value in zip(users, rows.days, rows.values)]
    assert len(found) == len(set(found)) and set(found) == expected


def check_events(folder: Path, artifact: Any, zone: str) -> None:
    """Compare timelines with a plain reading."""
    manifest, rejects = artifact.manifest, read_rejects(artifact)
    days: dict[tuple[str, int], list[dict[str, Any]]] = {}
    rows_in = 0
    for below, number, row in read_raw(folder):
        rows_in += 1
        day = day_of(row["time"], zone)
        bad, gone = is_bad(row, day), (f"events/{below}", number) in rejects
        assert gone in bad, f"{below} row {number}: {row}, rejected: {gone}"
        if not gone:
            days.setdefault((row["user"], day), []).append(row)
    assert manifest["rows_in"] == rows_in == manifest["events"] + manifest["rows_rejected"], manifest
    timelines = Timelines.open(artifact.uri)
    rows = timelines.read(range(timelines.buckets))
    found = {}
    for index, user in enumerate(rows.user):
        for place in range(rows.offsets[index], rows.offsets[index + 1]):
            found[user, int(rows.days[place])] = rows.values[place].tolist()
    assert found == {key: aggregated(group) for key, group in days.items()}


CHECK = {"events": check_events, "profiles": check_profiles, "calendar": check_calendar, "sequences": check_sequences}


def plain_rows(file: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows as Python values; times as (number, unit) and strings decoded only where they are text."""
    table = pq.ParquetFile(file).read()
    # where nobody reads a column it may be missing, or be there twice
    nothing = pa.chunked_array([pa.nulls(len(table))])
    columns = {
        own: table.column(table.column_names.index(name)) if name in table.column_names else nothing
        for own, name in zip(NAMES, names, strict=True)
    }
    kind = columns["time"].type
    unit = kind.unit if pa.types.is_timestamp(kind) else "number" if pa.types.is_integer(kind) else "date"
    wide = pa.int32() if pa.types.is_date32(kind) else kind if pa.types.is_integer(kind) else pa.int64()
    times = columns["time"].cast(wide).to_pylist()
    if pa.types.is_date64(kind):
        times = [None if time is None else time // 86_400_000 for time in times]
    users = [user if user is None or isinstance(user, bytes) else str(user) for user in _texts(columns["user"])]
    price = [_price(value, columns["price"].type) for value in columns["price"].to_pylist()]
    kinds = _texts(columns["kind"])
    counts = columns["count"].to_pylist()
    return [
        {"user": u, "time": None if t is None else (t, unit), "price": p, "count": c, "kind": k}
        for u, t, p, c, k in zip(users, times, price, counts, kinds, strict=True)
    ]


def _texts(column: pa.ChunkedArray) -> list[Any]:
    """Values, or bytes where a string is no UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not pa.types.is_string(column.type):
        return column.to_pylist()
    found = []
    for value in column.cast(pa.binary()).to_pylist():
        try:
            found.append(None if value is None else value.decode())
        except UnicodeDecodeError:
            found.append(value)
    return found


def _price(value: Any, kind: pa.DataType) -> float | None:
    if value is None or not isinstance(value, (float, int, decimal.Decimal)):
        return None
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        shortest = np.format_float_scientific(np.float32(value), unique=True)
        digits = len(shortest.split("e")[0].replace(".", "").strip("-0"))
        return float(shortest) if math.isfinite(value) and digits <= 7 else float(value)
    return float(value)


def day_of(time: tuple[int, str] | None, zone: str) -> int | None:
    """The local day; None where there is none, or it lies out of the years 1 to 9999 or of 100,000,000 days."""
    if time is None:
        return None
    number, unit = time
    if unit == "number":
        return number if abs(number) <= 100_000_000 else None
    try:
        at = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=number * 86_400 // UNITS[unit])
        if unit != "date":
            at = at.replace(tzinfo=datetime.UTC).astimezone(zoneinfo.ZoneInfo(zone))
        return (at.date() - datetime.date(1970, 1, 1)).days
    except OverflowError:
        return None


def is_bad(row: dict[str, Any], day: int | None) -> tuple[bool, ...]:
    """Whether a row must be rejected: (True,), (False,), or both where the borderline is not ours to draw."""
    numbers = [row["price"], row["count"]]
    if any(isinstance(row[name], bytes) for name in ("user", "kind")):
        return (True,)
    if row["time"] is not None and row["time"][1] == "ns" and abs(row["time"][0]) > 2**63 - 1 - UNITS["ns"]:
        return (True, False)  # a day is left at the ends of 64 bits for the offset of the zone
    if row["user"] is None or row["time"] is None or day is None:
        return (True,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        return (True,)
    if row["price"] is not None:
        units = row["price"] / 0.01
        if abs(units) > 2**48 or abs(units - round(units)) > min(0.25, 1e-6 + 1e-12 * abs(units)):
            return (True,)
    if row["count"] is not None and (abs(row["count"]) > 2**48 or row["count"] != int(row["count"])):
        return (True,)
    return (False,)


def aggregated(rows: list[dict[str, Any]]) -> list[int]:
    """The behaviours of a user's day."""
    prices = [row["price"] for row in rows if row["price"] is not None]
    units = [round(price / 0.01) for price in prices]
    kinds = {row["kind"] for row in rows if row["kind"] is not None}
    counts = sum(int(row["count"]) for row in rows if row["count"] is not None)
    return [1, len(rows), sum(units), max(units, default=0), counts, int(any(p > 2 for p in prices)), len(kinds)]


# --- Delta tables ---


def _log(change: Callable[[bytes, Random], bytes]) -> Callable[[Path, Random], None]:
    def broken(folder: Path, random: Random) -> None:
        logs = sorted((folder / "_delta_log").glob("*.json"))
        log = logs[random.integers(len(logs))]
        log.write_bytes(change(log.read_bytes(), random))

    return broken


def _actions(change: Callable[[dict[str, Any], Random], dict[str, Any] | None]) -> Callable[[Path, Random], None]:
    """Change (None: drop) the add actions of a log file."""

    def broken(folder: Path, random: Random) -> None:
        logs = sorted((folder / "_delta_log").glob("*.json"))
        log = logs[random.integers(len(logs))]
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        kept = [changed for line in lines if (changed := change(line, random) if "add" in line else line) is not None]
        log.write_text("\n".join(map(json.dumps, kept)))

    return broken


def _stats(text: str) -> Callable[[Path, Random], None]:
    return _actions(lambda line, random: {"add": line["add"] | {"stats": text}})


def _data_file(change: Callable[[Path, Random], object]) -> Callable[[Path, Random], None]:
    def broken(folder: Path, random: Random) -> None:
        files = sorted(folder.glob("*.parquet"))
        change(files[random.integers(len(files))], random)

    return broken


def _checkpoint(change: Callable[[Path, Random], object]) -> Callable[[Path, Random], None]:
    def broken(folder: Path, random: Random) -> None:
        import deltalake

        deltalake.DeltaTable(folder).create_checkpoint()
        change(next((folder / "_delta_log").glob("*.checkpoint.parquet")), random)

    return broken


def _no_early_logs(folder: Path, random: Random) -> None:
    (folder / "_delta_log" / f"{0:020d}.json").unlink()


DELTA: dict[str, Callable[[Path, Random], object]] = {
    **{f"log {name}": _log(change) for name, change in BYTES.items()},
    **{
        f"data {name}": _data_file(lambda f, r, c=change: f.write_bytes(c(f.read_bytes(), r)))
        for name, change in BYTES.items()
    },
    "log without a version": lambda f, r: (f / "_delta_log" / f"{1:020d}.json").unlink(),
    "log without its beginning": _no_early_logs,
    "no log": lambda f, r: [path.unlink() for path in (f / "_delta_log").iterdir()],
    "an action less": _actions(lambda line, r: None),
    "an action without a path": _actions(
        lambda line, r: {"add": {k: v for k, v in line["add"].items() if k != "path"}}
    ),
    "another size": _actions(lambda line, r: {"add": line["add"] | {"size": 7}}),
    "another path": _actions(lambda line, r: {"add": line["add"] | {"path": "nowhere.parquet"}}),
    "stats: none": _stats(""),
    "stats: no JSON": _stats("{"),
    "stats: a list": _stats("[]"),
    "stats: wrong numbers": _stats(
        '{"numRecords": 1, "minValues": {"time": 1}, "maxValues": {"time": 1}, "nullCount": {}}'
    ),
    "stats: wrong types": _stats('{"numRecords": "x", "minValues": {"time": "x"}, "maxValues": 3}'),
    "a data file less": _data_file(lambda f, r: f.unlink()),
    "a data file more": lambda f, r: shutil.copy(next(f.glob("*.parquet")), f / "stray.parquet"),
    "the newest version taken away": lambda f, r: sorted((f / "_delta_log").glob("*.json"))[-1].unlink(),
    "checkpoint cut": _checkpoint(lambda f, r: f.write_bytes(f.read_bytes()[: int(r.integers(0, 900))])),
    "checkpoint flip": _checkpoint(lambda f, r: f.write_bytes(_flip(f.read_bytes(), r))),
    "checkpoint gone": _checkpoint(lambda f, r: f.unlink()),
    "checkpoint pointer": _checkpoint(lambda f, r: (f.parent / "_last_checkpoint").write_bytes(r.bytes(30))),
}


def delta_case(seed: int, place: Path, engine: str = "local") -> dict[str, Any]:
    """As `case`, of events in a Delta table of three versions. What its log says is what must be read: an independent
    reading takes the files of `deltalake` where it opens the table, whatever was done to it."""
    import deltalake

    random = np.random.default_rng(seed)
    time, zone = ("day", "date", "us")[random.integers(3)], ("UTC", "Europe/Berlin")[random.integers(2)]
    folder = place / "events"
    for _ in range(3):
        deltalake.write_deltalake(folder, events(random, int(random.integers(20, 60)), time), mode="append")
    how = sorted(DELTA)[random.integers(len(DELTA))]
    DELTA[how](folder, random)
    about = {"seed": seed, "how": f"delta: {how}, {time}, {zone}"}
    data = Data(behaviours=BEHAVIOURS, time_zone=zone, max_reject_share=1.0)
    try:
        artifact = _timelines(data, folder, place, engine, int(random.integers(10, 200)))
    except UserError as error:
        text = str(error)
        names = [path.name for path in folder.rglob("*")]
        assert str(folder) in text or any(f"events/{name}" in text for name in names), f"names no file: {text}"
        return about | {"end": "error", "text": text[:300]}
    # the files that the table has now, alone in a folder, by the names that the rejects have
    (place / "plain").mkdir()
    for uri in deltalake.DeltaTable(folder).file_uris():
        name = Path(uri.removeprefix("file://")).name
        shutil.copy(folder / name, place / "plain" / name)
    check_events(place / "plain", artifact, zone)
    return about | {"end": "artifact", "rejected": artifact.manifest["rows_rejected"]}


def main() -> None:
    """Answer the seeds on stdin until it is closed. Arguments: the engine and the kind of table."""
    engine, table = [*sys.argv[1:], *("local", "folder")[len(sys.argv) - 1 :]]
    sys.stdout = sys.stderr  # Ray's words are no answers
    if engine == "ray":
        from lum_ray.steps.session import start_ray

        start_ray()
    for line in sys.stdin:
        seed = int(line)
        with tempfile.TemporaryDirectory() as place:
            try:
                found = (delta_case if table == "delta" else case)(seed, Path(place), engine)
            except BaseException as error:
                found = {
                    "seed": seed,
                    "wrong": f"{type(error).__name__}: {error}"[:2000],
                    "trace": traceback.format_exc()[-3000:],
                }
        print(json.dumps(found), flush=True, file=sys.__stdout__)


if __name__ == "__main__":
    main()
