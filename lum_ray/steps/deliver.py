"""deliver: a batch of predictions into a Delta table, where other jobs look for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lum_ray.artifacts import UserError, join, list_files, open_artifact, storage
from lum_ray.steps.prepare import Log, silent

BATCH_ROWS = 1 << 17


def deliver(predictions: str, uri: str, log: Log = silent) -> int:
    """Write the predictions (of LUMOS or GTS-LUM) of the folder `predictions` to the Delta table `uri`.

    The table is made if it is not there. It has the columns of the files and, as provenance, `checkpoint` (its name,
    which ends with its digest) and `prediction` (the digest of the folder), and is partitioned by `cut_day`. What the
    same checkpoint predicted for the same `cut_day` earlier is replaced in the same commit, so a batch that is written
    twice is there once. Returns the table's version. Raises UserError for a table of other columns, and where somebody
    else wrote the same rows at that moment.
    """
    import deltalake
    from deltalake.exceptions import CommitFailedError, DeltaError

    manifest = open_artifact(predictions).manifest
    folder = "rankings" if manifest.get("model") == "gts" else "predictions"
    files = list_files(join(predictions, folder), ".parquet")
    values = {"checkpoint": str(manifest["checkpoint"]), "prediction": str(manifest["digest"])}
    checkpoint = values["checkpoint"].replace("'", "''")
    schema = _with(pa.RecordBatch.from_pylist([], _schema(files[0])), values).schema
    reader = pa.RecordBatchReader.from_batches(schema, _batches(files, values))
    place = uri if "://" in uri else os.path.abspath(uri)
    options = dict(storage(uri).options)
    replaced = f"cut_day = {int(manifest['cut_day'])} AND checkpoint = '{checkpoint}'"
    there = deltalake.DeltaTable.is_deltatable(place, storage_options=options)
    try:
        deltalake.write_deltalake(
            place,
            reader,
            partition_by=["cut_day"],
            mode="overwrite" if there else "append",
            predicate=replaced if there else None,
            storage_options=options,
        )
        version = int(deltalake.DeltaTable(place, storage_options=options).version())
    except CommitFailedError as error:
        raise UserError(
            f"{uri}: somebody else wrote predictions of this checkpoint and day at the same time ({error}); run again"
        ) from None
    except DeltaError as error:
        raise UserError(
            f"{uri}: expected a Delta table with the columns {', '.join(schema.names)}, partitioned by cut_day, or "
            f"none ({' '.join(str(error).split())[:200]}); give another URI"
        ) from None
    log(f"version {version} of {uri} holds {manifest['rows']:,} rows of {values['checkpoint']}")
    return version


def _batches(files: list[str], values: dict[str, str]) -> Iterator[pa.RecordBatch]:
    for uri in files:
        path, filesystem = _open(uri)
        with filesystem.open_input_file(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(BATCH_ROWS):
                yield _with(batch, values)


def _schema(uri: str) -> pa.Schema:
    path, filesystem = _open(uri)
    return pq.read_schema(path, filesystem=filesystem)


def _open(uri: str) -> tuple[str, Any]:
    place = storage(uri)
    return place.path, place.filesystem


def _with(batch: pa.RecordBatch, values: dict[str, str]) -> pa.RecordBatch:
    for name, value in values.items():
        batch = batch.append_column(name, pa.repeat(value, batch.num_rows))
    return batch
