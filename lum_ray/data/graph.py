"""Edges between items from a table: what the graph embeddings are made of, beside what users take together.

Legend: M edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.artifacts import UserError
from lum_ray.config import Data, Graph
from lum_ray.data.items import BATCH_ROWS, Catalogue
from lum_ray.data.raw import RawFile, batches, raw_files
from lum_ray.data.rejects import REJECTS, Rejected, first_rejects, mask, readable
from lum_ray.data.rows import Int64, hash_strings
from lum_ray.data.schema import check_time, check_user, plain_column, require, wrong_type
from lum_ray.data.times import to_day
from lum_ray.data.windows import visible


@dataclass(frozen=True)
class Edges:
    """`pairs_M2` catalogue indices, the smaller first, each pair once; `weights_M` summed over its rows; `unknown` rows
    with an item that the catalogue does not have; `later` rows that were not known before the cut."""

    pairs_M2: Int64
    weights_M: npt.NDArray[np.float64]
    unknown: int
    later: int


def check_graph(uri: str, data: Data) -> list[RawFile]:
    """The graph's files, after checking columns and types. Raises UserError."""
    graph = _graph(data)
    files = raw_files(uri, "graph")
    for file in files:
        columns = {"source": graph.source, "target": graph.target, "weight": graph.weight, "known_at": graph.known_at}
        require(file, {f"data.graph.{key}": name for key, name in columns.items() if name})
        for name in (graph.source, graph.target):
            check_user(file, name)
        if graph.weight and not _is_number(file.schema.field(graph.weight).type):
            raise wrong_type(file, graph.weight, "numbers", "cast it, or leave data.graph.weight out: all edges alike")
        if graph.known_at:
            check_time(file, graph.known_at, data.time_zone)
    return files


def read_edges(uri: str, data: Data, catalogue: Catalogue, until_day: int) -> tuple[Edges, pa.Table]:
    """The edges known before `until_day`, and the rejects: a null end, a weight that is not finite or not above 0, a
    null `known_at`. An item with an edge to itself has none. Raises UserError for more rejects than
    `data.max_reject_share`."""
    graph, count = _graph(data), len(catalogue)
    columns = [name for name in (graph.source, graph.target, graph.weight, graph.known_at) if name]
    keys: list[Int64] = [np.zeros(0, np.int64)]
    weights: list[npt.NDArray[np.float64]] = [np.zeros(0)]
    rejects = [REJECTS.empty_table()]
    rows = unknown = later = 0
    for file in check_graph(uri, data):
        rows += file.rows
        for batch, first_row in batches(file.uri, list(dict.fromkeys(columns)), None, 0, BATCH_ROWS, file.overlay):
            rejected = Rejected(file.name, first_row, batch.num_rows)
            ends = [
                readable(pc.cast(plain_column(batch, name, file.name), pa.string()), rejected, name)
                for name in (graph.source, graph.target)
            ]
            for name, column in zip((graph.source, graph.target), ends, strict=True):
                rejected.add(mask(pc.is_null(column)), f"`{name}` is null")
            weight = np.ones(batch.num_rows)
            if graph.weight:
                given = pc.cast(plain_column(batch, graph.weight, file.name), pa.float64(), safe=False)
                weight = np.asarray(pc.fill_null(given, float("nan")).to_numpy(), np.float64)
                rejected.add(~(np.isfinite(weight) & (weight > 0)), f"`{graph.weight}` is not a number above 0", given)
            kept = ~rejected.bad
            if graph.known_at:
                day = to_day(batch[graph.known_at], data.time_zone)
                rejected.add(mask(pc.is_null(day)), f"`{graph.known_at}` is null")
                known = visible(pc.fill_null(day, 0).to_numpy(zero_copy_only=False), until_day)
                later += int((~rejected.bad & ~known).sum())
                kept = ~rejected.bad & known
            rejects.append(rejected.table())
            index = [
                catalogue.index_of(hash_strings(pc.fill_null(column, "").to_pylist()).view(np.int64)) for column in ends
            ]
            inside = (index[0] >= 0) & (index[1] >= 0)
            unknown += int((kept & ~inside).sum())
            kept &= inside & (index[0] != index[1])
            keys.append(np.minimum(*index)[kept] * count + np.maximum(*index)[kept])
            weights.append(weight[kept])
    bad = pa.concat_tables(rejects)
    if bad.num_rows > data.max_reject_share * rows:
        raise UserError(
            "\n".join(
                [
                    f"graph: {bad.num_rows} of {rows} rows break the schema, more than data.max_reject_share = "
                    f"{data.max_reject_share:.2%}; mend them at the source",
                    *first_rejects(bad),
                ]
            )
        )
    pairs, place = np.unique(np.concatenate(keys), return_inverse=True)
    total = np.asarray(np.bincount(place, np.concatenate(weights), len(pairs)), np.float64)
    return Edges(np.stack([pairs // count, pairs % count], axis=1), total, unknown, later), bad


def _graph(data: Data) -> Graph:
    if data.graph is None:
        raise UserError("data.graph: missing; name the columns of the edges, such as {path: edges/, source: a}")
    return data.graph


def _is_number(found: pa.DataType) -> bool:
    return bool(pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found))
