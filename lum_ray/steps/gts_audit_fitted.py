"""The leak battery on what GTS-LUM was trained with: a training batch, the fitted statistics, the holidays.

Source: FIELD.md, section 3. Legend: B samples, N items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Int64, Rows
from lum_ray.evaluation import audit
from lum_ray.evaluation.audit import Check
from lum_ray.gts.config import GtsInputs
from lum_ray.gts.fitting import Statistics, fit_inputs, fit_profiles, fit_tree, statistics
from lum_ray.gts.semantic_ids import Tree
from lum_ray.gts.stage import GtsStage
from lum_ray.gts.tables import FittedTable
from lum_ray.steps.audit_rows import Cases, differing, training_cases, with_future
from lum_ray.steps.gts_prepare import GtsPrepared, graph_edges, open_tree
from lum_ray.steps.prepare import cut_plan, fit_until, silent

BATCH = 64
REFIT_ITEMS = 5_000
"""Of at most so many items all is fitted again without the later events, of more the counts alone."""
ROUNDED = ("graph_NG", "table_NH", "paths_ND", "collision_N", "tree.", "table.")
"""Names of what a long computation in floating point gives, which another machine may end elsewhere."""


def training_checks(run: Run, stage: GtsStage, timelines: Timelines) -> list[Check]:
    """A training batch: it reads nothing from the train cut on, and most of its negatives are kept."""
    until = fit_until(run, timelines.end_day)
    cases = training_cases(timelines, cut_plan(run, "train", timelines.end_day), run.train.seed, run.train.batch)
    trained = GtsStage(stage.config, stage.inputs, until, run.train.seed, stage.module)
    batch = trained.collate(cases.rows, cases.samples)
    without = cases.truncated(np.full(len(cases), until))
    same = differing(batch, trained.collate(without.rows, without.samples))
    return [
        audit.identical("training batch", f"events from day {until} on removed: its arrays", same, len(batch)),
        audit.kept_share("kept negatives", "(query, candidate) pairs of a training batch that are not masked",
                         len(batch["masked_query_X"]), len(batch["candidate_C"]) * len(batch["query_sample_R"])),
    ]  # fmt: skip


def fitted_checks(run: Run, prepared: GtsPrepared, stage: GtsStage, timelines: Timelines) -> list[Check]:
    """No item born after the train cut shaped the tree, the graph or the counts; nor did any later event."""
    until, inputs, catalogue = fit_until(run, timelines.end_day), stage.inputs, prepared.catalogue
    full = np.flatnonzero(timelines.bucket_users).tolist()
    plan = cut_plan(run, "train", timelines.end_day)

    def before(bucket: int) -> Rows:
        rows = timelines.read([bucket])
        rows = rows.take(np.flatnonzero(plan.users(rows)))
        return with_future(rows, np.full(len(rows), until), None)

    first_N = np.full(len(catalogue), 2**62, np.int64)
    for bucket in full:
        rows = timelines.read([bucket])
        item = catalogue.index_of(rows.values[:, 0])
        np.minimum.at(first_N, item[item >= 0], rows.days[item >= 0].astype(np.int64))
    late_N = first_N >= until
    found = statistics(map(before, full), catalogue.index_of, len(catalogue), until)
    arrays = inputs.arrays
    # a graph of the run's own may know an item before anybody has it
    walked_N = (
        arrays["graph_known_N"] if run.data.graph is None or run.data.graph.path is None else np.zeros_like(late_N)
    )
    wrong = np.flatnonzero(late_N & ((arrays["count_N"] > 0) | walked_N))
    assigned = int(prepared.tree.manifest["items"])
    differ = [catalogue.ids[item] for item in wrong.tolist()]
    if run.section.ids == "spectral" and assigned != int((found.count_N > 0).sum()):
        differ.append(f"tree built of {assigned} items, {int((found.count_N > 0).sum())} were there")
    checks = [
        audit.identical("no item born later", "items first had from the train cut on: counts, graph, tree", differ,
                        int(late_N.sum()), f" ({int(late_N.sum())} of {len(catalogue)} items came later)")
    ]  # fmt: skip
    name, compared = "fitted before the cut", f"fitted again without the events from day {until} on"
    profiles = run.data.profiles
    named = (profiles.numbers, profiles.categories) if profiles else ((), ())
    if len(catalogue) > REFIT_ITEMS:
        same = {"count_N": found.count_N}
    else:
        same = _fit(run, prepared, stage, found, fit_profiles(map(before, full), *named, until))
    kept = {key: value for key, value in prepared_arrays(prepared, stage).items() if key in same}
    wrong_names = [key for key in differing(kept, same) if not _rounded(kept[key], same[key])]
    if wrong_names and all(key.startswith(ROUNDED) for key in wrong_names):
        # prepared on a machine that rounds otherwise, or a leak: a fit of all events on this one tells
        own = [timelines.read([bucket]) for bucket in full]
        rows_of = [rows.take(np.flatnonzero(plan.users(rows))) for rows in own]
        every = statistics(rows_of, catalogue.index_of, len(catalogue), until)
        wrong_names = differing(_fit(run, prepared, stage, every, fit_profiles(rows_of, *named, until)), same)
    return [*checks, audit.identical(name, compared, wrong_names, len(kept))]


def prepared_arrays(prepared: GtsPrepared, stage: GtsStage) -> dict[str, Any]:
    """All that was fitted, the tree and the encoder of the items table among it."""
    return _named(stage.inputs, open_tree(prepared.tree), prepared.table())


def _named(inputs: GtsInputs, tree: Tree, table: FittedTable) -> dict[str, Any]:
    others = {"tree": tree.to_arrays(), "table": table.to_arrays()}
    return inputs.arrays | {f"{part}.{key}": value for part, arrays in others.items() for key, value in arrays.items()}


def _rounded(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Whether two arrays of fractions differ in their last digits alone."""
    return one.dtype.kind == "f" and one.shape == other.shape and np.allclose(one, other, rtol=1e-5, atol=1e-6)


def _fit(run: Run, prepared: GtsPrepared, stage: GtsStage, found: Statistics, profiles: Any) -> dict[str, Any]:
    catalogue, text_NE = prepared.catalogue, prepared.texts()
    tree = fit_tree(run.section, text_NE, found.count_N > 0, run.seed)
    edges = graph_edges(run, catalogue, found, fit_until(run, int(prepared.sequences.manifest["end_day"])), silent)
    inputs, table = fit_inputs(
        run.section, catalogue.ids, catalogue.text, catalogue.hash_N, catalogue.numbers, catalogue.categories, text_NE,
        tree, found, edges, profiles, stage.inputs.arrays["holidays"], run.seed,
    )  # fmt: skip
    return _named(inputs, tree, table)


def holiday_check(stage: GtsStage, cases: Cases, score: Callable[[GtsStage, Cases], npt.NDArray[Any]]) -> Check:
    """Holidays are known ahead, and only those before the cut are read: every coming day may become one.

    `score` gives the scores of a run's reading R.
    """
    name, compared = "calendar", "every day from the cut on made a holiday: scores"
    holidays = stage.inputs.arrays["holidays"]
    if not len(holidays):
        return audit.not_applicable(name, compared, "the run has no holidays")
    cut_B, change, control = cases.samples.cut.astype(np.int64), 0.0, 0.0
    for cut in np.unique(cut_B).tolist():
        for start in range(0, int((cut_B == cut).sum()), BATCH):
            some = cases.take(np.flatnonzero(cut_B == cut)[start : start + BATCH])
            before = score(stage, some)
            ahead, behind = np.arange(cut, cut + 400), np.arange(cut - 400, cut)
            moved = [_with_holidays(stage, np.union1d(holidays, days)) for days in (ahead, behind)]
            first, second = (audit.largest_change(before, score(other, some)) for other in moved)
            change, control = max(change, first), max(control, second)
    return audit.unchanged(name, compared, change, control)


def _with_holidays(stage: GtsStage, days: Int64) -> GtsStage:
    inputs = replace(stage.inputs, arrays={**stage.inputs.arrays, "holidays": days})
    return GtsStage(stage.config, inputs, stage.until_day, stage.seed, stage.module)
