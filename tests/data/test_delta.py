from __future__ import annotations

import base64
import datetime
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from lum_ray import artifacts
from lum_ray.artifacts import Artifact, UserError, digest, join, storage
from lum_ray.config import Behaviour, Data, Events, Profiles
from lum_ray.data import delta
from lum_ray.data.prepare import prepare_timelines
from lum_ray.data.raw import RawTables, raw_files
from lum_ray.data.schema import check_events, read_events
from tests.data.increments import GTS, LUMOS, events, same_rows

BEHAVIOURS = (Behaviour("active", "binary", "count()"), Behaviour("spend", "continuous", "sum(price)", 0.01))


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.faults)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where tables and artifacts go: any URI that `storage` knows."""
    return str(request.getfixturevalue("s3_root")) if request.param == "s3" else str(tmp_path)


def write(uri: str, table: pa.Table, **options: Any) -> DeltaTable:
    write_deltalake(uri, table, storage_options=dict(storage(uri).options), **options)
    return table_at(uri)


def table_at(uri: str) -> DeltaTable:
    return DeltaTable(uri, storage_options=dict(storage(uri).options))


def read(uri: str) -> pa.Table:
    place = storage(uri)
    return pq.read_table(place.path, filesystem=place.filesystem)


def data(**changes: Any) -> Data:
    return Data(**({"behaviours": BEHAVIOURS, "events": Events(item="item"), "max_reject_share": 0.01} | changes))


class Made:
    """Artifacts of the Delta table `uri`, under `root`."""

    def __init__(self, root: str, uri: str, settings: Data | None = None) -> None:
        self.root, self.uri, self.said, self.data = root, uri, list[str](), settings or data()

    def prepare(self, version: int | None = None, folder: str = "made", tokenizer: Any = LUMOS) -> Artifact:
        version = delta.pin(self.uri, version, None, "data.events")
        tables = RawTables(f"{self.uri}@v{version}")
        prints = {"events": delta.table_print(tables.events), "profiles": None}
        uri = join(self.root, folder, digest(prints, tokenizer.columns))
        lineage = digest(tokenizer.columns, self.data.late_days)
        return prepare_timelines(
            self.data, tables, uri, tokenizer, "local", prints, lineage=lineage, log=self.said.append
        )

    def rebuild(self, version: int | None = None, tokenizer: Any = LUMOS) -> Artifact:
        """As if nothing were there; every call in a folder of its own."""
        return self.prepare(version, f"rebuilt-{len(self.said)}-{version}-{len(tokenizer.columns)}", tokenizer)


def plain(root: str, name: str, table: pa.Table) -> Artifact:
    """The artifact of the same rows in a folder of parquet files."""
    artifacts.write_table(join(root, name, "a.parquet"), table)
    uri = join(root, "plain", digest(name))
    tables = RawTables(join(root, name))
    return prepare_timelines(data(), tables, uri, LUMOS, "local", {"events": []}, lineage=name)


def test_a_table_is_read_at_any_version_like_its_rows(root: str) -> None:
    uri, rows = join(root, "t"), [events(200, seed, 0, 30) for seed in range(3)]
    for index, table in enumerate(rows):
        write(uri, table, mode="append")
        same_rows(Made(root, uri).rebuild(index), plain(root, f"e{index}", pa.concat_tables(rows[: index + 1])))
    names = [file.name for file in raw_files(f"{uri}@v1", "events")]
    assert len(names) == 2 and all(name.startswith("events/part-") for name in names)
    assert delta.table_print(uri) == delta.table_print(f"{uri}@v2") != delta.table_print(f"{uri}@v1")


def test_partition_columns_come_from_the_log(root: str) -> None:
    uri, table = join(root, "t"), events(300, 0, 0, 10)
    towns = ["a b", "50%/x", "Zürich"]
    table = table.append_column("town", pa.array([towns[n % 3] for n in range(300)]))
    days = pa.array(np.arange(300) % 10, pa.int32())
    table = table.append_column("day", days).append_column("since", days.cast(pa.date32()))
    write(uri, table, partition_by=["town", "since"])
    files = raw_files(uri, "events")
    behaviours = (Behaviour("towns", "count", "n_unique(town)"), *BEHAVIOURS)
    settings = data(behaviours=behaviours, events=Events(time="since"))
    tables = [
        one.cast(
            pa.schema(
                [(name, pa.string() if name in ("user", "town") else one[name].type) for name in one.column_names]
            )
        )
        for file in files
        for one in read_events(file.uri, settings, file.name, overlay=file.overlay)[0]
    ]
    found = pa.concat_tables(tables).sort_by(
        [("user", "ascending"), ("day", "ascending"), ("town", "ascending"), ("price", "ascending")]
    )
    expected = table.select(["user", "day", "price", "town"]).sort_by(
        [("user", "ascending"), ("day", "ascending"), ("town", "ascending"), ("price", "ascending")]
    )
    assert found.select(expected.column_names).equals(expected)
    assert files[0].schema.field("since").type == pa.date32() and len(files) == 30
    # the partition tells the days: what is outside is not opened
    said: list[str] = []
    kept = check_events(uri, replace(settings, start=3, end=6), said.append)
    assert len(kept) == 9 and said == ["events: 21 of 30 files hold no day from data.start to data.end: not read"]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("string", "", None),
        ("integer", "7", 7),
        ("boolean", "true", True),
        ("date", "2024-02-29", datetime.date(2024, 2, 29)),
        ("timestamp", "2024-01-01 10:00:00", datetime.datetime(2024, 1, 1, 10, tzinfo=datetime.UTC)),
        ("timestamp", "2024-01-01T10:00:00.5Z", datetime.datetime(2024, 1, 1, 10, 0, 0, 500000, datetime.UTC)),
        ("timestamp_ntz", "2024-01-01 10:00:00.000001", datetime.datetime(2024, 1, 1, 10, 0, 0, 1)),
        ("decimal(10,2)", "1.50", 1.5),
    ],
)
def test_partition_values_are_parsed(kind: str, text: str, expected: Any) -> None:
    assert delta.constant(kind, text).as_py() == expected


def test_columns_that_older_files_lack_are_null(root: str) -> None:
    uri = join(root, "t")
    old, new = events(100, 0, 0, 20), events(100, 1, 10, 30)
    write(uri, old.drop_columns(["price"]))
    write(uri, new, mode="append", schema_mode="merge")
    null = old.set_column(2, "price", pa.nulls(100, pa.float64()))
    same_rows(Made(root, uri).rebuild(), plain(root, "e", pa.concat_tables([null, new])))


def test_widened_types_are_read_file_by_file(root: str) -> None:
    uri = join(root, "t")
    old, new = events(100, 0, 0, 20), events(100, 1, 10, 30)
    whole = [table.set_column(2, "price", pa.array(np.arange(100), kind)) for table, kind in
             ((old, pa.int32()), (new, pa.int64()))]  # fmt: skip
    write(uri, whole[0])
    # what a writer with the feature leaves behind: the table's type is wider than an older file's
    wide = join(root, "wide")
    write(wide, whole[1])
    log = json_lines(wide, 0)
    meta = next(line for line in log if "metaData" in line)
    (add,) = (line["add"] for line in log if "add" in line)
    artifacts.write_bytes(join(uri, add["path"]), artifacts.read_bytes(join(wide, add["path"])))
    commit(uri, 1, [{"protocol": needs("typeWidening")}, meta, {"add": add}])
    joined = pa.concat_tables(whole, promote_options="permissive")
    same_rows(Made(root, uri).rebuild(), plain(root, "e", joined))


def json_lines(uri: str, version: int) -> list[dict[str, Any]]:
    text = artifacts.read_bytes(join(uri, "_delta_log", f"{version:020d}.json")).decode()
    return [json.loads(line) for line in text.splitlines() if line]


def commit(uri: str, version: int, actions: list[dict[str, Any]]) -> None:
    lines = [json.dumps(action) for action in ({"commitInfo": {"timestamp": 1, "operation": "TEST"}}, *actions)]
    artifacts.write_bytes(join(uri, "_delta_log", f"{version:020d}.json"), "\n".join(lines).encode())


def delete_rows(uri: str, version: int, rows: list[int]) -> None:
    """Commit a deletion vector of `rows` for the table's only file, as Spark does (a roaring bitmap, inline)."""
    (add,) = (line["add"] for line in json_lines(uri, 0) if "add" in line)
    array = struct.pack("<II", 12346, 1) + struct.pack("<HH", 0, len(rows) - 1) + struct.pack("<I", 16)
    raw = struct.pack("<IQI", 1681511377, 1, 0) + array + np.array(rows, "<u2").tobytes()
    vector = {"storageType": "i", "pathOrInlineDv": z85(raw), "sizeInBytes": len(raw), "cardinality": len(rows)}
    remove = {key: add[key] for key in ("path", "partitionValues", "size")}
    commit(
        uri,
        version,
        [
            {"protocol": needs("deletionVectors")},
            {"remove": {**remove, "deletionTimestamp": 1, "dataChange": True, "extendedFileMetadata": True}},
            {"add": {**add, "deletionVector": vector}},
        ],
    )


def z85(raw: bytes) -> str:
    """The alphabet that Delta uses, from that of the standard library."""
    ours = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
    theirs = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
    return base64.b85encode(raw + bytes(-len(raw) % 4)).decode().translate(str.maketrans(theirs, ours))


def test_deleted_rows_are_left_out_and_the_others_keep_their_numbers(root: str) -> None:
    uri, table = join(root, "t"), events(100, 0, 0, 20)
    prices = table["price"].to_pylist()
    prices[3], prices[50] = float("nan"), float("nan")
    write(uri, table.set_column(2, "price", pa.array(prices)))
    gone = [0, 3, 17, 99]
    before = Made(root, uri, data(max_reject_share=0.05)).rebuild(0, GTS)
    delete_rows(uri, 1, gone)
    made = Made(root, uri, data(max_reject_share=0.05))
    made.prepare(0)
    found = made.prepare()
    assert made.said[0].endswith("the events' version 1 took rows away or changed them")
    rejects = read(join(found.uri, "rejects", "0000.parquet")).to_pylist()
    assert [(row["row"], row["reason"]) for row in rejects] == [(50, "`price` is not a finite number")]
    assert (found.manifest["rows_in"], found.manifest["events"]) == (96, 95)
    kept = [row for row in range(100) if row not in (*gone, 50)]
    same_rows(found, plain(root, "e", table.take(kept)))
    # counts and items, too
    assert sum(file.rows for file in raw_files(uri, "items")) == 96
    assert before.manifest["events"] == 100


def test_an_increment_reads_only_the_files_since(root: str) -> None:
    uri = join(root, "t")
    write(uri, events(400, 0, 0, 30))
    made = Made(root, uri)
    first = made.prepare()
    write(uri, events(30, 1, 25, 31), mode="append")
    write(uri, events(40, 2, 29, 32), mode="append")
    # OPTIMIZE writes old and new rows into one file, and neither adds nor removes any
    table_at(uri).optimize.compact()
    found = made.prepare()
    assert made.said == [f"continuing {first.manifest['digest']}: 2 new files of events, 70 rows"]
    same_rows(found, made.rebuild())
    # the newest that fits is continued, from its version on
    write(uri, events(20, 3, 30, 33), mode="append")
    last = made.prepare()
    assert made.said[-1] == f"continuing {found.manifest['digest']}: 1 new files of events, 20 rows"
    same_rows(last, made.rebuild())
    same_rows(made.prepare(0), first)


def test_late_events_of_a_later_version_are_rejected(root: str) -> None:
    uri = join(root, "t")
    write(uri, events(400, 0, 0, 30))
    made = Made(root, uri, data(max_reject_share=0.5))
    made.prepare()
    write(uri, events(5, 1, 10, 11), mode="append")
    write(uri, events(20, 2, 25, 31), mode="append")
    found = made.prepare()
    rejects = read(join(found.uri, "rejects", "0000.parquet"))
    assert set(rejects["reason"].to_pylist()) == {
        "comes more than data.late_days = 7 days before the end of what was known"
    }
    assert set(rejects["value"].to_pylist()) == {"20"}
    assert rejects.num_rows == 5 and found.manifest["rows_rejected"] == 5


def test_versions_that_changed_rows_or_lost_their_log_mean_a_rebuild(root: str) -> None:
    uri = join(root, "t")
    write(uri, events(400, 0, 0, 30))
    made = Made(root, uri)
    made.prepare()
    write(uri, events(30, 1, 25, 31), mode="append")
    made.prepare()
    table_at(uri).delete("user = 'user-1'")
    same_rows(made.prepare(), made.rebuild())
    assert "version 2 took rows away or changed them" in made.said[-1]
    # a compacted file that VACUUM removed since cannot be read any more
    write(uri, events(10, 3, 30, 33), mode="append")
    table = table_at(uri)
    table.optimize.compact()
    table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    same_rows(made.prepare(), made.rebuild())
    assert "which came since, was compacted and then removed by VACUUM" in made.said[-1]
    # so can what the log has forgotten
    write(uri, events(10, 2, 30, 32), mode="append")
    table = table_at(uri)
    table.create_checkpoint()
    log = storage(join(uri, "_delta_log", f"{table.version():020d}.json"))
    log.filesystem.delete_file(log.path)
    made.prepare()
    assert made.said[-1].startswith("full rebuild") and "is not in the log any more" in made.said[-1]


def test_statistics_leave_files_out_by_date(root: str) -> None:
    uri = join(root, "t")
    for month in range(4):
        write(uri, events(50, month, 30 * month, 30 * month + 30), mode="append")
    said: list[str] = []
    kept = check_events(uri, data(start=35, end="1970-03-02"), said.append)
    assert len(kept) == 1 and said == ["events: 3 of 4 files hold no day from data.start to data.end: not read"]
    assert len(check_events(uri, data(start=29))) == 4 and len(check_events(uri, data(start=30))) == 3
    # midnight in another zone
    evening = events(1, 0).set_column(1, "time", pa.array([29 * 86_400 + 20 * 3600], pa.timestamp("s", "UTC")))
    write(uri, evening, mode="append")
    assert len(check_events(uri, data(start=30))) == 3
    assert len(check_events(uri, data(start=30, time_zone="Asia/Tokyo"))) == 4
    with pytest.raises(UserError, match=r"none of its 5 files holds a day of data\.start, 500"):
        check_events(uri, data(start=500))


def test_what_cannot_be_read_is_refused_with_the_reason(root: str) -> None:
    uri = join(root, "t")
    write(uri, events(50, 0, 0, 30))
    write(uri, events(50, 1, 0, 30), mode="append")
    with pytest.raises(UserError, match=r"cannot read this Delta table at version 7 .* newest version is 1"):
        delta.table_print(f"{uri}@v7")
    for timestamp, message in (
        ("1990-01-01T00:00:00Z", "no version as of 1990-01-01"),
        ("yesterday", "expected an ISO time"),
    ):
        with pytest.raises(UserError, match=rf"data.events.*{message}"):
            delta.pin(uri, None, timestamp, "data.events")
    with pytest.raises(UserError, match=r"data.events.path: .*: expected a Delta table"):
        delta.pin(join(root, "nothing"), 1, None, "data.events")
    with pytest.raises(UserError, match="names a version itself"):
        delta.pin(f"{uri}@v1", 1, None, "data.events")
    assert delta.pin(uri, None, "2999-01-01T00:00:00Z", "data.events") == 1 == delta.pin(uri, None, None, "data.events")
    assert delta.pin(join(root, "nothing"), None, None, "data.events") is None
    file = delta.read_table(uri).files[0]
    artifacts.storage(file.uri).filesystem.delete_file(artifacts.storage(file.uri).path)
    with pytest.raises(UserError, match=r"version 1 of .*t names this file, but VACUUM"):
        raw_files(f"{uri}@v1", "events")
    with pytest.raises(ValueError, match="expected a version or a timestamp, got both"):
        Events(version=1, timestamp="2024-01-01")


def needs(*features: str) -> dict[str, Any]:
    return {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features, "writerFeatures": features}


@pytest.mark.parametrize(
    ("protocol", "mode", "message"),
    [
        ({"minReaderVersion": 2, "minWriterVersion": 5}, "name", "uses column mapping"),
        (needs("columnMapping"), "id", "uses column mapping"),
        (needs("variantType"), None, "needs readers that know variantType"),
        (needs("later"), None, "cannot read this Delta table"),
    ],
)
def test_features_that_are_not_read_are_refused(
    root: str, protocol: dict[str, Any], mode: str | None, message: str
) -> None:
    configuration = {"delta.columnMapping.mode": mode} if mode else {}
    uri = join(root, "t")
    write(uri, events(50, 0, 0, 30))
    meta = next(line["metaData"] for line in json_lines(uri, 0) if "metaData" in line)
    schema = json.loads(meta["schemaString"])
    for index, field in enumerate(schema["fields"]):
        names = {"delta.columnMapping.id": index + 1, "delta.columnMapping.physicalName": field["name"]}
        field["metadata"] = names if configuration else {}
    changed = {**meta, "schemaString": json.dumps(schema), "configuration": configuration}
    commit(uri, 1, [{"protocol": protocol}, {"metaData": changed}])
    with pytest.raises(UserError, match=message):
        raw_files(uri, "events")


def test_profiles_may_be_a_table(root: str) -> None:
    uri = join(root, "p")
    write(
        uri, pa.table({"user": ["user-0", "user-1"], "age": [1.0, 2.0], "town": ["Ulm", "Bonn"]}), partition_by=["town"]
    )
    settings = data(profiles=Profiles(numbers=("age",), categories=("town",)))
    artifacts.write_table(join(root, "e", "a.parquet"), events(200, 0, 0, 30))
    tables = RawTables(join(root, "e"), f"{uri}@v0")
    made = prepare_timelines(settings, tables, join(root, "made", "a"), LUMOS, "local")
    stored = pa.concat_tables([read(join(made.uri, "profiles", file["name"])) for file in made.manifest["profiles"]])
    assert sorted(zip(*(stored[name].to_pylist() for name in ("user", "age", "town")), strict=True)) == [
        ("user-0", 1.0, "Ulm"),
        ("user-1", 2.0, "Bonn"),
    ]
