"""prepare for GTS-LUM: raw tables to sequences, items with their text embeddings, the ID tree and fitted statistics."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from lum_ray.artifacts import (
    Artifact,
    UserError,
    commit,
    digest,
    find,
    fingerprint,
    join,
    read_bytes,
    write_bytes,
    write_table,
)
from lum_ray.config import Run
from lum_ray.data import prepare as data_prepare
from lum_ray.data.context import holiday_rows
from lum_ray.data.graph import read_edges
from lum_ray.data.items import Catalogue, read_items, unknown_items
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Int64, Rows
from lum_ray.data.schema import check_events
from lum_ray.data.windows import came_before
from lum_ray.gts import sequences as tokenizer
from lum_ray.gts.config import GtsConfig, GtsInputs
from lum_ray.gts.encoders import attraction, embed_texts
from lum_ray.gts.fitting import Statistics, fit_inputs, fit_profiles, fit_tree, statistics
from lum_ray.gts.semantic_ids import Tree, build_tree
from lum_ray.gts.tables import FittedTable
from lum_ray.gts.tree_quality import quality
from lum_ray.steps.prepare import Log, columns_of, cut_plan, find_or_build, fit_until, raw_items, raw_tables, silent

FITTED_VERSION = 4
HOLIDAYS_AHEAD_DAYS = 366


@dataclass(frozen=True)
class GtsPrepared:
    """What GTS-LUM reads: four artifacts."""

    sequences: Artifact
    items: Artifact
    tree: Artifact
    fitted: Artifact

    @property
    def uri(self) -> str:
        """That of the sequences."""
        return self.sequences.uri

    @cached_property
    def inputs(self) -> GtsInputs:
        text = read_bytes(join(self.fitted.uri, "inputs.json")).decode()
        return GtsInputs.from_parts(text, load_arrays(read_bytes(join(self.fitted.uri, "inputs.safetensors"))))

    @cached_property
    def catalogue(self) -> Catalogue:
        return Catalogue.from_table(pq.read_table(pa.BufferReader(read_bytes(join(self.items.uri, "items.parquet")))))

    def texts(self) -> npt.NDArray[np.float32]:
        """The items' text embeddings (N, E), of unit length."""
        text_NE: npt.NDArray[np.float32] = load_arrays(read_bytes(join(self.items.uri, "texts.safetensors")))["text_NE"]
        return text_NE

    def table(self) -> FittedTable:
        """The encoder of the items table."""
        return FittedTable.from_arrays(load_arrays(read_bytes(join(self.fitted.uri, "table.safetensors"))))


def prepare_sequences(run: Run, log: Log = silent) -> tuple[Artifact, Artifact]:
    """Find or build the items and the sequences of a run alone: what an earlier model needs of newer data.

    Raises UserError for whatever is wrong with the run or its tables.
    """
    tables, prints = raw_tables(run, log)
    items_uri, items_print = raw_items(run, log)
    items = _items(run, items_uri, items_print, log)
    catalogue = GtsPrepared(items, items, items, items).catalogue
    return items, _sequences(run, tables, prints, catalogue, log)


def prepare_gts(run: Run, log: Log = silent) -> GtsPrepared:
    """Find or build the sequences, the items, the tree and the fitted statistics of a run.

    Raises UserError for whatever is wrong with the run or its tables.
    """
    items, sequences = prepare_sequences(run, log)
    catalogue = GtsPrepared(items, items, items, items).catalogue
    timelines = Timelines.open(sequences.uri)
    until = fit_until(run, timelines.end_day)
    found: list[Statistics] = []

    def counted() -> Statistics:
        if not found:
            found.append(statistics(_training_rows(run, timelines), catalogue.index_of, len(catalogue), until))
        return found[0]

    tree = _tree(run, items, sequences, until, counted, catalogue, log)
    fitted = _fitted(run, items, sequences, tree, until, counted, catalogue, log)
    return GtsPrepared(sequences, items, tree, fitted)


def graph_edges(
    run: Run, catalogue: Catalogue, found: Statistics, until: int, log: Log
) -> tuple[Int64, npt.NDArray[np.float64]]:
    """The edges that Node2Vec walks on: what users take together, by how much more than chance; a table's; or both."""
    graph, count = run.data.graph, len(catalogue)
    edges, weights = np.zeros((0, 2), np.int64), np.zeros(0)
    if graph is not None and graph.co_occurrence:
        edges, weights = attraction(found.edges_M2, found.weights_M, count)
    if graph is None or graph.path is None:
        return edges, weights
    given, rejects = read_edges(graph.path, run.data, catalogue, until)
    log(
        f"graph: {len(given.pairs_M2):,} edges; left out: {given.unknown:,} rows of unknown items, {given.later:,} not "
        f"known before the cut, {rejects.num_rows:,} rejected"
    )
    return np.concatenate([edges, given.pairs_M2]), np.concatenate([weights, given.weights_M])


def _items(run: Run, uri: str, print_of: Any, log: Log) -> Artifact:
    """The catalogue and its texts' embeddings; they know nothing of time."""
    assert run.data.items is not None
    shape = columns_of(run.data.items)
    name = digest("items", shape, print_of, run.section.text_encoder, run.data.max_reject_share)
    place = join(run.root, "items", name)
    if (there := find(place)) is not None:
        return there
    catalogue, rejects = read_items(uri, run.data)
    log(f"embedding the texts of {len(catalogue):,} items with {run.section.text_encoder}")
    vectors = embed_texts(catalogue.text, run.section.text_encoder)
    write_table(join(place, "items.parquet"), catalogue.to_table())
    write_bytes(join(place, "texts.safetensors"), save_arrays({"text_NE": np.ascontiguousarray(vectors)}))
    if rejects.num_rows:
        write_table(join(place, "rejects", "items.parquet"), rejects)
        log(f"{rejects.num_rows:,} rows of the items are left out or mended, see {join(place, 'rejects')}")
    return commit(place, {"kind": "items", "digest": name, "items": len(catalogue), "rejected": rejects.num_rows,
                          "text_encoder": run.section.text_encoder, "text_width": int(vectors.shape[1])})  # fmt: skip


def _sequences(run: Run, tables: Any, prints: Any, catalogue: Catalogue, log: Log) -> Artifact:
    data = run.data
    files = check_events(tables.events, replace(data, behaviours=()), log)
    made_by = data_prepare.Tokenizer(
        tokenizer.partial, tokenizer.merge, tokenizer.TOKENIZER_VERSION, tokenizer.COLUMNS, tokenizer.merge
    )
    shape = [data.events.user, data.events.time, data.events.id, data.events.item, data.time_zone, data.start, data.end]

    def report() -> None:
        missing = unknown_items(files, replace(data, behaviours=()), catalogue)
        if missing.events:
            log(
                f"{missing.events:,} events ({missing.share:.1%}) are of items that the catalogue does not have, such "
                f"as {', '.join(missing.items)}: no model reads them"
            )

    return find_or_build(run, "sequences", made_by, shape, tables, prints, files, log, report)


def _training_rows(run: Run, timelines: Timelines) -> Iterator[Rows]:
    """The users of the train plan who came before its end, bucket by bucket."""
    plan = cut_plan(run, "train", timelines.end_day)
    for bucket in np.flatnonzero(timelines.bucket_users).tolist():
        rows = timelines.read([bucket])
        rows = rows.take(np.flatnonzero(plan.users(rows)))
        yield rows.take(came_before(rows, fit_until(run, timelines.end_day)))


def _tree(
    run: Run, items: Artifact, sequences: Artifact, until: int, counted: Any, catalogue: Catalogue, log: Log
) -> Artifact:
    section: GtsConfig = run.section
    shape = [section.ids, section.branching, section.depth, section.neighbours, section.affinity, run.seed]
    plan = cut_plan(run, "train", int(sequences.manifest["end_day"]))
    name = digest("tree", FITTED_VERSION, shape, items.manifest["digest"], sequences.manifest["digest"], until, plan)
    uri = join(run.root, "tree", name)
    if (there := find(uri)) is not None:
        return there
    found: Statistics = counted()
    known = found.count_N > 0
    log(f"building the ID tree of {int(known.sum()):,} items ({len(catalogue) - int(known.sum()):,} more are assigned)")
    text_NE = GtsPrepared(items, items, items, items).texts()
    tree = fit_tree(section, text_NE, known, run.seed)
    write_bytes(join(uri, "tree.safetensors"), save_arrays(tree.to_arrays()))
    return commit(uri, {"kind": "tree", "digest": name, "until_day": until, "items": int(known.sum())})


def open_tree(artifact: Artifact) -> Tree:
    return Tree.from_arrays(load_arrays(read_bytes(join(artifact.uri, "tree.safetensors"))))


def _fitted(
    run: Run,
    items: Artifact,
    sequences: Artifact,
    tree: Artifact,
    until: int,
    counted: Any,
    catalogue: Catalogue,
    log: Log,
) -> Artifact:
    section: GtsConfig = run.section
    profiles = run.data.profiles
    named = (profiles.numbers, profiles.categories) if profiles else ((), ())
    country = run.data.calendar.holidays if run.data.calendar else None
    graph = run.data.graph
    edges = [graph, fingerprint(graph.path) if graph and graph.path else None]
    shape = [section.graph_width, section.table_width, section.text_tokens, country, named, edges, run.seed]
    name = digest("fitted", FITTED_VERSION, tree.manifest["digest"], shape)
    uri = join(run.root, "fitted", name)
    if (there := find(uri)) is not None:
        return there
    log("fitting the graph's and the tables' embeddings")
    timelines = Timelines.open(sequences.uri)
    found: Statistics = counted()
    text_NE, ids = GtsPrepared(items, items, items, items).texts(), open_tree(tree)
    inputs, table = fit_inputs(
        section,
        catalogue.ids,
        catalogue.text,
        catalogue.hash_N,
        catalogue.numbers,
        catalogue.categories,
        text_NE,
        ids,
        found,
        graph_edges(run, catalogue, found, until, log),
        fit_profiles(_training_rows(run, timelines), *named, until),
        _holidays(country, timelines.start_day, timelines.end_day),
        run.seed,
    )
    write_bytes(join(uri, "inputs.json"), inputs.to_json().encode())
    arrays = {key: np.ascontiguousarray(value) for key, value in inputs.arrays.items()}
    write_bytes(join(uri, "inputs.safetensors"), save_arrays(arrays))
    write_bytes(join(uri, "table.safetensors"), save_arrays(table.to_arrays()))
    log("judging the ID tree against random IDs")
    vectors = (inputs.arrays["graph_NG"], inputs.arrays["graph_known_N"])
    figures = quality(ids, text_NE, found.edges_M2, found.weights_M, node2vec=vectors, refit=_refit(section))
    if figures.get("warning"):
        log(f"warning: {figures['warning']}")
    return commit(uri, {"kind": "fitted", "digest": name, "until_day": until, "tree": tree.manifest["digest"],
                        "quality": figures})  # fmt: skip


def _refit(section: GtsConfig) -> Any:
    """The tree again, of other items or with another seed, to see how stable it is; None for random IDs."""
    if section.ids == "random":
        return None
    shape = (section.branching, section.depth, section.neighbours, section.affinity)
    return lambda embeddings, seed: build_tree(embeddings, *shape, seed)


def _holidays(country: str | None, first_day: int, end_day: int) -> Int64:
    """The public holidays of the data's days and the year after, as sorted day numbers."""
    if country is None:
        return np.zeros(0, np.int64)
    days = holiday_rows(country, first_day, end_day + HOLIDAYS_AHEAD_DAYS)["start_day"].to_pylist()
    numbers = [(d - datetime.date(1970, 1, 1)).days if isinstance(d, datetime.date) else int(d) for d in days]
    return np.array(sorted(set(numbers)), np.int64)


def describe_gts(prepared: GtsPrepared) -> dict[str, Any]:
    """What prepare found, in a few figures."""
    manifest = prepared.sequences.manifest
    return {
        "users": manifest["users"],
        "events": manifest["active_days"],
        "rows_in": manifest["rows_in"],
        "rows_rejected": manifest["rows_rejected"],
        "rows_forgotten": manifest.get("rows_forgotten", 0),
        "bytes_per_event": round(manifest["bytes"] / max(1, manifest["active_days"]), 2),
        "items": prepared.items.manifest["items"],
        **{f"tree_{name}": value for name, value in prepared.fitted.manifest["quality"].items()},
    }


__all__ = ["GtsPrepared", "UserError", "describe_gts", "open_tree", "prepare_gts", "prepare_sequences"]
