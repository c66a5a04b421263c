"""Items that came after the fit: a text is enough to recommend and to score them, and nothing is fitted again.

A new item has its text's embedding and, by it, an ID in the tree. It has no place in the graph of behaviours, and a row
of the table only where its columns are given: a modality that is not known is hidden from the Q-Former, as training
hides modalities at random. Its popularity is that of an item that nobody had.

Legend: N items of the fit, M new items, D width of the LLM.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lum_ray.artifacts import UserError
from lum_ray.data.requests import text_of
from lum_ray.data.rows import hash_strings
from lum_ray.gts.behaviours import COLLISIONS, COLUMNS, Behaviours, node_numbers
from lum_ray.gts.config import GtsInputs
from lum_ray.gts.encoders import embed_texts
from lum_ray.gts.fitting import SMOOTHING
from lum_ray.gts.semantic_ids import Tree
from lum_ray.gts.stage import GtsStage
from lum_ray.gts.tables import FittedTable
from lum_ray.nn import Constants

NewItems = Mapping[str, str | Mapping[str, Any]]
"""By id: the text, or {"text": ...} beside columns of the items table (`data.items.numbers`, `data.items.categories`).
What is left out of a row is null; without any column the item has no row."""
EMBEDDED = ("text_NE", "graph_NG", "graph_known_N", "table_NH", "words_NT")
"""The arrays of `GtsInputs` that only making tokens of items reads: what was added does without."""


@dataclass(frozen=True)
class Assortment:
    """What can be recommended: a stage over N items, their texts, the tree that gives new items an ID, what was fitted
    (the same whatever was added), and the encoder of the items table."""

    stage: GtsStage
    text: tuple[str, ...]
    tree: Tree
    fitted: GtsInputs
    table: FittedTable

    @property
    def ids(self) -> tuple[str, ...]:
        return self.stage.inputs.items

    def add(self, given: NewItems) -> Assortment:
        """This assortment and the items of `given`, behind the others; what the old ones score does not change.

        Raises UserError for ids that are there already, empty texts and unknown columns.
        """
        inputs, module = self.stage.inputs, self.stage.module
        texts, attributes = _checked(given, inputs, (*self.table.layout.numbers, *self.table.layout.categories))
        text_ME = embed_texts(list(texts.values()), self.stage.config.text_encoder)
        tree = self.tree.with_items(text_ME)
        paths_MD, collision_M = tree.paths_ND[inputs.count :], tree.collision_N[inputs.count :]
        with torch.no_grad():
            fused_ND, items_NO = module.catalogue()
            part = self._behaviours(texts, attributes, text_ME, paths_MD, collision_M).to(fused_ND.device)
            own, chance_N = module.behaviours, module.constants["chance_N"]
            fitted_NF = own.gathered(torch.arange(len(chance_N), device=fused_ND.device))
            fused_MD = part(part.gathered(torch.arange(len(texts), device=fused_ND.device)), fitted_NF, chance_N)
            catalogue = torch.cat([fused_ND, fused_MD]), torch.cat([items_NO, module.item(fused_MD)])
        hashes = hash_strings(list(texts)).view(np.int64)
        hash_N = np.concatenate([inputs.arrays["hash_N"], hashes])
        often = self.fitted.arrays["count_N"] + SMOOTHING
        log_q = np.full(len(texts), np.log(SMOOTHING / often.sum()), np.float32)
        arrays = {name: value for name, value in inputs.arrays.items() if name not in EMBEDDED} | {
            "hash_N": hash_N,
            "paths_ND": tree.paths_ND,
            "collision_N": tree.collision_N,
            "count_N": np.concatenate([inputs.arrays["count_N"], np.zeros(len(texts), np.int64)]),
            "log_q_N": np.concatenate([inputs.arrays["log_q_N"], log_q]),
        }
        more = replace(inputs, items=(*inputs.items, *texts), arrays=arrays)
        twin = copy.copy(module)  # shares every weight; only its items are others
        twin._modules = dict(module._modules)
        log_q_N = torch.from_numpy(more.arrays["log_q_N"]).to(fused_ND.device)
        twin.constants = Constants(dict(module.constants.named_buffers()) | {"log_q_N": log_q_N}, persistent=False)
        twin.inputs, twin._catalogue = more, catalogue
        stage = GtsStage(self.stage.config, more, self.stage.until_day, self.stage.seed, twin)
        return replace(self, stage=stage, text=(*self.text, *texts.values()), tree=tree)

    def _behaviours(
        self,
        texts: Mapping[str, str],
        attributes: Mapping[str, Mapping[str, Any]],
        text_ME: npt.NDArray[np.float32],
        paths_MD: npt.NDArray[np.int64],
        collision_M: npt.NDArray[np.int64],
    ) -> Behaviours:
        """The trained module that makes tokens of items, over the new items alone."""
        own, arrays = self.stage.module.behaviours, self.fitted.arrays
        branching = self.stage.config.branching
        count, place = len(texts), {name: index for index, name in enumerate(texts)}
        vectors: dict[str, npt.NDArray[np.float32]] = {"text": text_ME}
        known: dict[str, npt.NDArray[np.bool_]] = {"text": np.ones(count, np.bool_)}
        for name in own.modalities:
            if name != "text":
                vectors[name] = np.zeros((count, arrays[COLUMNS[name]].shape[1]), np.float32)
                known[name] = np.zeros(count, np.bool_)
        if attributes and "table" in own.modalities:
            rows = [place[name] for name in attributes]
            vectors["table"][rows] = _table_rows(self.table, attributes)
            known["table"][rows] = True
        constants: dict[str, torch.Tensor] = {
            name: torch.from_numpy(np.asarray(vectors[name] / _size(arrays[COLUMNS[name]]), np.float32))
            for name in own.modalities
        }
        constants |= {
            "known_NM": torch.from_numpy(np.stack([known[name] for name in own.modalities], axis=1)),
            "nodes_NL": torch.from_numpy(node_numbers(paths_MD, branching)),
            "digits_NL": torch.from_numpy(paths_MD),
            "collision_N": torch.from_numpy(np.minimum(collision_M, COLLISIONS - 1)),
        }
        part = copy.copy(own)
        part._modules = dict(own._modules)  # so that the constants below are the copy's alone
        part.constants = Constants(constants, persistent=False)
        return part


def _table_rows(table: FittedTable, given: Mapping[str, Mapping[str, Any]]) -> npt.NDArray[np.float32]:
    """The vectors (M, H) of items with columns. Raises UserError for one that is no number."""
    numbers, categories = {}, {}
    for name in table.layout.numbers:
        try:
            column = [float("nan") if row.get(name) is None else float(row[name]) for row in given.values()]
        except (TypeError, ValueError):
            bad = next(key for key, row in given.items() if not isinstance(row.get(name), (int, float, type(None))))
            raise UserError(f"new_items.{bad}.{name}: expected a number, got {given[bad][name]!r}") from None
        numbers[name] = np.where(np.isfinite(column), column, np.nan)
    for name in table.layout.categories:
        categories[name] = np.array([text_of(row.get(name)) for row in given.values()], np.object_)
    return table.rows(numbers, categories)


def _size(values_NE: npt.NDArray[Any]) -> float:
    """By what `Behaviours` divides the fitted vectors of a modality."""
    return float(np.sqrt(np.square(values_NE, dtype=np.float64).mean())) or 1.0


def _checked(
    given: NewItems, inputs: GtsInputs, columns: Sequence[str]
) -> tuple[dict[str, str], dict[str, Mapping[str, Any]]]:
    """Texts by id, and the columns of those that have any. Raises UserError."""
    texts: dict[str, str] = {}
    attributes: dict[str, Mapping[str, Any]] = {}
    for name, value in given.items():
        row = {"text": value} if isinstance(value, str) else value
        text = row.get("text") if isinstance(row, Mapping) else None
        if not isinstance(name, str) or not name or not isinstance(text, str) or not text.strip():
            raise UserError(f"new_items.{name}: expected an id with a text that is not empty, got {value!r}")
        texts[name] = text.strip()
        own = {key: column for key, column in row.items() if key != "text"}
        unknown = sorted(set(own) - set(columns))
        if unknown:
            known = ", ".join(columns) or "none"
            raise UserError(f"new_items.{name}.{unknown[0]}: unknown; the items table's columns are {known}")
        if own:
            attributes[name] = own
    index = inputs.index_of(hash_strings(list(texts)).view(np.int64))
    there = [name for name, place in zip(texts, index.tolist(), strict=True) if place >= 0]
    if there:
        raise UserError(
            f"new_items: {len(there)} are in the catalogue already: {', '.join(there[:5])}; leave them out (a new text "
            "needs a new id, or `lum-ray prepare`)"
        )
    return texts, attributes
