"""GTS-LUM's section of a run file, and what the model must know of the data.

Defaults are the paper's where it gives them, and HLLM's, whose settings it took over, where it does not (Source:
GTS-LUM, method and appendix; FIELD); what goes beyond it says `Departs:`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

from lum_ray.data.rows import HashIndex

Modality = Literal["text", "graph", "table"]
AlignTask = Literal[
    "behaviour_contrastive",
    "behaviour_matching",
    "behaviour_generation",
    "sequence_contrastive",
    "sequence_matching",
    "sequence_generation",
]
ALIGN_TASKS: tuple[AlignTask, ...] = get_args(AlignTask)
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class GtsConfig:
    """`gts:` of a run file. Raises ValueError that names the field for an impossible value."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    text_encoder: str = "BAAI/bge-m3"
    """A Hugging Face id, a local path, or `minilm` (all-MiniLM-L6-v2 from its package, offline)."""
    ids: Literal["spectral", "random"] = "spectral"
    """Semantic IDs by spectral clustering of the texts; `random` is the control."""
    branching: int = 8
    depth: int = 3
    neighbours: int = 10
    """Of the kNN graph that is clustered."""
    affinity: Literal["connectivity", "gaussian"] = "connectivity"
    slot_minutes: int = 15
    max_tokens: int = 240
    """Of a sequence, its prefix included; the newest behaviours are kept."""
    timestamps: Literal["full", "text", "component", "position", "none"] = "full"
    """full: a semantic descriptor in front of each slot's behaviours, [SEP] behind, a shared time ID; text: the
    descriptor as the frozen mean of its words' embeddings, no ID; component: slot of day and gap added to each
    behaviour; position: the number of the slot in the sequence added; none. Source: GTS-LUM, timestamp ablation."""
    modalities: tuple[Modality, ...] = ("text", "graph", "table")
    graph_width: int = 64
    table_width: int = 64
    fusion: Literal["qformer", "mlp", "text"] = "qformer"
    """How a behaviour's modalities become its one token; `mlp`: concatenated, `text`: the text embedding alone."""
    width: int = 256
    heads: int = 4
    layers: int = 4
    queries: int = 8
    dropout: float = 0.0

    llm: str = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    """A Hugging Face id, a local path, `smollm2` (converted from its package at install), or `random` (tests)."""
    revision: str | None = None
    keep_layers: int | None = None
    """The first so many decoder layers of the LLM; None: all."""
    tune: Literal["frozen", "lora", "full"] = "frozen"
    """Departs: `lora` and `full` train the LLM too."""
    lora_rank: int = 8

    target_position: Literal["front", "end", "none"] = "front"
    reading: Literal["honest", "literal"] = "honest"
    """honest, Departs: reading R never holds the target, reading P holds candidates in front of the same history;
    `literal` trains and scores with the true target in the prefix: it LEAKS, and is there only to show it."""
    propensity_share: float = 0.5
    """Samples that are read as P (the others as R): prefix dropout."""
    candidates: int = 4
    """In front of one history in training of P, the true one included."""
    negatives: int = 512
    dense: bool = True
    """Departs: R is supervised at the end of every slot of a sequence, which a causal decoder allows, not only at its
    end."""
    repeats: bool = True
    """Departs: the scores of R and P add a learned function of how often and how long ago the user had the item, over
    her whole history; attention over a few slots cannot count a year."""
    output_width: int = 128
    generation: bool = True
    """Whether the head that writes the semantic ID, level by level, is trained."""

    align_steps: int = 2000
    """Of Phase I; 0 leaves it out."""
    align_tasks: tuple[AlignTask, ...] = ALIGN_TASKS
    align_group: int = 32
    """Behaviours that are told apart in one contrastive group."""
    window: int = 4
    """K: behaviours in a window of the sequence-level tasks."""
    text_tokens: int = 24
    """Of an item's text or a window's narrative, at most, in Phase I."""

    retrieve: int = 200
    """Items that R hands over."""
    rerank: int = 20
    """Of these, how many P scores again."""

    def __post_init__(self) -> None:
        positive = ("branching", "depth", "neighbours", "slot_minutes", "width", "heads", "layers", "queries",
                    "output_width", "negatives", "align_group", "window", "text_tokens", "retrieve",
                    "lora_rank")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.branching < 2:
            raise ValueError(f"branching: expected at least 2, got {self.branching}")
        if 1440 % self.slot_minutes:
            raise ValueError(f"slot_minutes: expected a divisor of 1440 such as 15, 30 or 60, got {self.slot_minutes}")
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width {self.width}, got {self.heads}")
        if self.max_tokens < PREFIX + 4:
            raise ValueError(f"max_tokens: expected at least {PREFIX + 4}, got {self.max_tokens}")
        if self.candidates < 2:
            raise ValueError(f"candidates: expected at least 2 (a true one and another), got {self.candidates}")
        if not 0.0 <= self.propensity_share <= 1.0:
            raise ValueError(f"propensity_share: expected 0 to 1, got {self.propensity_share}")
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities: expected at least one, each once, got {list(self.modalities)}")
        if self.fusion == "text" and "text" not in self.modalities:
            raise ValueError("fusion: `text` needs `text` among the modalities")
        if self.reading == "literal" and self.target_position == "none":
            raise ValueError(
                "reading: `literal` puts the target in the prefix, so target_position must be front or end"
            )
        if self.keep_layers is not None and self.keep_layers < 1:
            raise ValueError(f"keep_layers: expected at least 1, or none for all, got {self.keep_layers}")

    @property
    def reads_targets(self) -> bool:
        """Whether P is trained at all."""
        return self.target_position != "none" and self.reading == "honest" and self.propensity_share > 0

    @property
    def slots(self) -> int:
        """Codes of the time of day: one a slot, and one for what has no time of day."""
        return 1440 // self.slot_minutes + 1

    future_days: ClassVar[int] = 1
    """Days after a cut that a sample looks at without being masked; see `next_items` for where a target may lie."""


PREFIX = 3
"""Places in front of the behaviours: task, target (or its absence), profile."""


@dataclass(frozen=True)
class GtsInputs:
    """What is fitted before the train cut: shapes and, apart, arrays. N items, E text, G graph, H table width, P the
    profile's, D levels.

    Arrays: `hash_N`, `text_NE`, `graph_NG`, `graph_known_N`, `table_NH`, `paths_ND`,
    `collision_N`, `log_q_N` (log share of each item among the training events, smoothed), `words_NT` (the text in the
    compact vocabulary, 0 pads), `profile_scale` (mean and deviation of each number), `holidays` (sorted days).
    """

    items: tuple[str, ...]
    vocabulary: tuple[str, ...]
    profile_numbers: tuple[str, ...]
    profile_categories: tuple[str, ...]
    profile_values: tuple[tuple[str, ...], ...]
    arrays: Arrays

    @property
    def count(self) -> int:
        return len(self.items)

    @property
    def profile_width(self) -> int:
        """Numbers with their missing flags, and one place for each known value of a category."""
        return 2 * len(self.profile_numbers) + sum(len(known) for known in self.profile_values)

    def index_of(self, hashes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The catalogue index of item hashes, -1 where unknown."""
        return self._places.of(hashes)

    @cached_property
    def _places(self) -> HashIndex:
        return HashIndex(self.arrays["hash_N"])

    def to_json(self) -> str:
        """All but the arrays."""
        return json.dumps({item.name: getattr(self, item.name) for item in fields(self) if item.name != "arrays"})

    @staticmethod
    def from_parts(text: str, arrays: Mapping[str, npt.NDArray[Any]]) -> GtsInputs:
        plain = {name: _tuples(value) for name, value in json.loads(text).items()}
        return GtsInputs(arrays=dict(arrays), **plain)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
