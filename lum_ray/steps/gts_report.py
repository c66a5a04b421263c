"""The report of a GTS-LUM evaluation: what the pictures show, gathered from the artifacts and the trained model."""

from __future__ import annotations

import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lum_ray.artifacts import commit, digest, find, join, write_table
from lum_ray.config import Run
from lum_ray.data.loader import evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.evaluation.ranking_report import (
    Neighbours,
    NextBasket,
    RankingFacts,
    Slot,
    TimeLine,
    TreeFacts,
    write_ranking_report,
)
from lum_ray.gts.collate import BEHAVIOUR, DESCRIPTOR, next_items
from lum_ray.gts.inference import best
from lum_ray.gts.intervals import descriptor_text
from lum_ray.gts.stage import GtsStage
from lum_ray.stage import Arrays, to_device
from lum_ray.steps.gts_prepare import GtsPrepared
from lum_ray.steps.prepare import Log, cut_plan

NEAREST, SHOWN_ITEMS, SHOWN_NEXT = 5, 8, 10


def report(
    run: Run, prepared: GtsPrepared, stage: GtsStage, table: pa.Table, parts: list[str], summary: dict[str, str],
    log: Log,
) -> str:  # fmt: skip
    """Write the report's folder and return its URI; `parts` are the prediction artifacts behind `table`."""
    name = digest("ranking report", 1, [part.rsplit("/", 1)[-1] for part in parts])
    uri = join(run.root, "reports", f"{run.name}-{name}")
    if find(uri) is not None:
        return uri
    log("drawing the report")
    catalogue = prepared.catalogue
    line, why = _time_line(run, prepared, stage)
    facts = RankingFacts(
        title=run.name,
        ours=(run.name, "retrieve"),
        summary=tuple(summary.items()),
        metrics=table,
        tree=TreeFacts(stage.inputs.arrays["paths_ND"], catalogue.text, stage.inputs.arrays["count_N"]),
        neighbours=_neighbours(stage, catalogue.text),
        time_line=line,
        no_time_line=why,
        data=tuple(_data(prepared)),
    )
    write_table(join(uri, "metrics.parquet"), table)
    write_ranking_report(join(uri, "report.html"), facts)
    commit(uri, {"kind": "report", "digest": name, "predictions": [part.rsplit("/", 1)[-1] for part in parts]})
    return uri


def _data(prepared: GtsPrepared) -> list[tuple[str, str]]:
    manifest, quality = prepared.sequences.manifest, prepared.fitted.manifest["quality"]
    lines = [
        ("users", f"{manifest['users']:,}"),
        ("events", f"{manifest['active_days']:,}"),
        ("rows rejected", f"{manifest['rows_rejected']:,} of {manifest['rows_in']:,}"),
        ("items", f"{prepared.items.manifest['items']:,}"),
        ("leaves of the ID tree", f"{quality['leaves']:,}, the largest with {quality['largest_leaf']:,} items"),
        ("items that share their leaf", f"{quality['colliding_share']:.1%}"),
        ("balance of the first level", f"{quality['balance']:.2f}"),
    ]
    for evidence, levels in quality["against_random"].items():
        leaf = levels["leaf"]
        lines.append((f"{evidence} within a leaf", f"{leaf['value']:.3f}, random IDs {leaf['random']:.3f}"))
    if quality.get("warning"):
        lines.append(("warning", quality["warning"]))
    return lines


def _neighbours(stage: GtsStage, texts: list[str]) -> tuple[Neighbours, ...]:
    """The items had most often, with their nearest in the embedding that R matches and in the text's."""
    arrays = stage.inputs.arrays
    fused = stage.module.catalogue()[1].cpu().numpy()
    spaces = [_units(fused), _units(arrays["text_NE"])]
    chosen = np.argsort(-arrays["count_N"], kind="stable")[:SHOWN_ITEMS]
    found = []
    for item in chosen.tolist():
        near = []
        for space in spaces:
            cosine = space @ space[item]
            cosine[item] = -2.0
            order = np.argsort(-cosine, kind="stable")[:NEAREST]
            near.append(tuple((texts[other], float(cosine[other])) for other in order.tolist()))
        found.append(Neighbours(texts[item], *near))
    return tuple(found)


def _units(x_NE: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(x_NE / np.maximum(np.linalg.norm(x_NE, axis=1, keepdims=True), 1e-9))


def _time_line(run: Run, prepared: GtsPrepared, stage: GtsStage) -> tuple[TimeLine | None, str]:
    """The test user with the most slots in the model's sequence, what came next and what the model expected."""
    timelines = Timelines.open(prepared.sequences.uri)
    plan, device = cut_plan(run, "test", timelines.end_day), next(stage.module.parameters()).device
    for rows, samples, arrays in evaluation_batches(timelines, plan, stage.questions, 64, 0, 1):
        target = next_items(rows, samples, stage.inputs.index_of, timelines.end_day)
        with_next = np.isin(np.arange(len(samples)), target[0])
        if not with_next.any():
            continue
        row = int(np.argmax(np.where(with_next, arrays["last_group_B"], -1)))
        items, _ = best(stage.scores(to_device(arrays, device)), SHOWN_NEXT)
        texts = prepared.catalogue.ids
        taken = tuple(texts[item] for item in target[1][target[0] == row].tolist())
        ranked = tuple(texts[item] for item in items[row].tolist() if item >= 0)
        slots = _slots(stage, rows, samples, arrays, row, texts)
        return TimeLine(str(rows.user[samples.row[row]]), slots, NextBasket(taken, ranked)), ""
    return None, "no test user has an event after the cut"


def _slots(
    stage: GtsStage, rows: Rows, samples: Samples, arrays: Arrays, row: int, texts: list[str]
) -> tuple[Slot, ...]:
    """The slots of one sample's sequence; their days are read from the user's newest events."""
    kind, group = arrays["kind_BL"][row], arrays["group_BL"][row]
    items = np.where(kind == BEHAVIOUR, arrays["unique_U"][arrays["place_BL"][row]], -1)
    begin, end = rows.span(samples.row[row : row + 1], -(2**30), samples.cut[row : row + 1])
    known = np.flatnonzero(stage.inputs.index_of(rows.values[begin[0] : end[0], 0]) >= 0) + begin[0]
    days = rows.days[known[-int((kind == BEHAVIOUR).sum()) :]]
    first = np.unique(group[kind == BEHAVIOUR], return_index=True)[1]
    made = []
    for number in range(int(group.max()) + 1):
        inside = group == number
        code = int(arrays["slot_BL"][row][inside][0])
        day = datetime.date(1970, 1, 1) + datetime.timedelta(days=int(days[first[number]]))
        time: datetime.date = day
        if code < stage.config.slots - 1:
            midnight = datetime.datetime.combine(day, datetime.time())
            time = midnight + datetime.timedelta(minutes=code * stage.config.slot_minutes)
        descriptor = arrays["descriptor_BL"][row][inside & (kind == DESCRIPTOR)]
        words = descriptor_text(int(descriptor[0])) if len(descriptor) else ""
        made.append(Slot(time, words, tuple(texts[item] for item in items[inside & (kind == BEHAVIOUR)].tolist())))
    return tuple(made)
