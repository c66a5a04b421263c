"""The arms of GTS-LUM's ablations: what each changes, and what the paper says of it.

The first arm of an ablation is its base, the paper's choice; the others change it in one respect and see the same
histories in the same order for as many steps. All bases are the same settings, so one checkpoint serves them all.

- `target/none` has no reading P: where the others' reranked lists are asked for, it hands over what R retrieved.
- `fusion/mlp` and `fusion/text` have no Q-Former, so Phase I, which aligns it, is left out for them too. `phase_1/none`
  tells how much of a difference is Phase I's.
- `tune` has no statement: the paper keeps the LLM frozen and does not say what training it would give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lum_ray.config import Run
from lum_ray.gts.config import ALIGN_TASKS
from lum_ray.presets.gts import gts_demo, gts_simulator, gts_tiny

Fields = Mapping[str, Any]
"""Fields of `GtsConfig` and their values."""
DATASETS = ("complete_journey", "simulator")
TINY = ("branching", "depth", "max_tokens", "width", "heads", "layers", "queries", "llm", "keep_layers", "negatives",
        "output_width", "align_steps", "align_group", "graph_width", "table_width", "retrieve", "rerank")  # fmt: skip
"""Fields that --quick takes from the preset `gts_tiny`."""
SMALL: dict[str, Fields] = {
    "simulator": {"align_steps": 24, "propensity_share": 0.0},
    "complete_journey": {"max_tokens": 64, "keep_layers": 1, "candidates": 2, "propensity_share": 0.125,
                         "align_steps": 24, "rerank": 4},
}  # fmt: skip
"""What --small changes: shorter phases, and on the planted world no reading P but in the ablation of the target: P's
few candidates make most of the gradient's noise, and half of the time."""
SMALL_TRAIN: dict[str, Fields] = {
    "simulator": {"steps": 220, "batch": 32, "micro_batch": 32},
    "complete_journey": {"steps": 300, "batch": 16, "micro_batch": 16},
}
SMALL_USERS, SMALL_VALIDATION = 0.3, 128
"""Share of the test's users, and users of a validation. An arm takes one to two minutes of one core."""


def _each(name: str, *values: str) -> dict[str, Fields]:
    """Arms named by the value that they set."""
    return {value: {name: value} for value in values}


ABLATIONS: dict[str, dict[str, Fields]] = {
    "timestamps": _each("timestamps", "full", "none", "text", "component", "position"),
    # the share is the presets' own: --small has none
    "target": {where: {"target_position": where, "propensity_share": 0.25} for where in ("front", "none", "end")},
    "modalities": {
        "all": {"modalities": ("text", "graph", "table")},
        "text": {"modalities": ("text",)},
        "text_graph": {"modalities": ("text", "graph")},
        "text_table": {"modalities": ("text", "table")},
    },
    "fusion": _each("fusion", "qformer", "mlp", "text"),
    "ids": _each("ids", "spectral", "random"),
    "tune": _each("tune", "frozen", "lora", "full"),
    "phase_1": {
        "all": {"align_tasks": ALIGN_TASKS},
        **{f"without_{task}": {"align_tasks": tuple(t for t in ALIGN_TASKS if t != task)} for task in ALIGN_TASKS},
        "240_steps": {"align_steps": 240},
        "none": {"align_steps": 0},
    },
}


@dataclass(frozen=True)
class Figure:
    """A mean over the test's baskets, by the columns of the table of metrics that name it, and its title."""

    reading: str
    subset: str
    metric: str
    title: str


FIGURES: dict[str, Figure] = {
    "recall_10": Figure("retrieve", "all", "eval/recall_10", "R@10"),
    "ndcg_5": Figure("retrieve", "all", "eval/ndcg_5", "NDCG@5"),
    "explore_recall_10": Figure("retrieve", "explore", "eval/recall_10", "new items, R@10"),
    "rerank_recall_10": Figure("rerank", "all", "eval/recall_10", "R + P, R@10"),
    "rerank_ndcg_5": Figure("rerank", "all", "eval/ndcg_5", "R + P, NDCG@5"),
}
"""Of reading R, and of what P makes of R's list. P reranks no list with the seen-filter, so new items are R's alone."""


@dataclass(frozen=True)
class Statement:
    """What the paper says: each of `arms` has less of `figure` than the ablation's base."""

    text: str
    ablation: str
    arms: tuple[str, ...]
    figure: str = "recall_10"


def _others(ablation: str) -> tuple[str, ...]:
    return tuple(ABLATIONS[ablation])[1:]


STATEMENTS = (
    Statement("full timestamps are best", "timestamps", _others("timestamps")),
    Statement("the target in front is best", "target", _others("target"), "rerank_ndcg_5"),
    Statement("all modalities together are best", "modalities", _others("modalities")),
    Statement("the Q-Former fuses best", "fusion", _others("fusion")),
    Statement("spectral IDs are better than random ones", "ids", _others("ids")),
    Statement("each of the six alignment tasks helps", "phase_1", tuple(f"without_{task}" for task in ALIGN_TASKS)),
    Statement("aligning in Phase I helps", "phase_1", ("none",)),
)


def base_run(dataset: str, root: str, steps: int | None = None, quick: bool = False, small: bool = False) -> Run:
    """The run that every arm starts from: the dataset's preset, trained for `steps` (the preset's where None).

    `small`: see `SMALL`; `quick`: a smoke test.
    """
    run = gts_demo() if dataset == "complete_journey" else gts_simulator()
    default = SMALL_TRAIN[dataset]["steps"] if small else run.train.steps
    steps = steps or (2 if quick else default)
    every = min(run.train.validate_every, steps)
    train = dataclasses.replace(run.train, steps=steps, validate_every=every, checkpoint_every=every)
    data, section, split = dataclasses.replace(run.data, engine="local"), run.section, run.split
    if small:
        section = dataclasses.replace(section, **SMALL[dataset])
        # validated once, at the end: the last weights of every arm are its best
        once = {"steps": steps, "validate_every": steps, "checkpoint_every": steps, "validate_users": SMALL_VALIDATION}
        train = dataclasses.replace(train, **(dict(SMALL_TRAIN[dataset]) | once))
        split = dataclasses.replace(split, test=dataclasses.replace(split.test, users=(0.0, SMALL_USERS)))
    if quick:
        tiny = gts_tiny()
        section = dataclasses.replace(section, **{name: getattr(tiny.section, name) for name in TINY})
        train = dataclasses.replace(train, batch=8, micro_batch=8, validate_users=16)
        if dataset == "simulator":
            data = dataclasses.replace(data, source=tiny.data.source)
        else:
            split = dataclasses.replace(split, test=dataclasses.replace(split.test, users=(0.0, 0.05)))
    return dataclasses.replace(
        run, name=f"ablations_gts_{dataset}", root=root, data=data, split=split, section=section, train=train
    )
