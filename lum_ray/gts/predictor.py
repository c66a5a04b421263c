"""GTS-LUM answering requests: raw events or a user id in, items out, best first; or the propensity of given items.

The tokenizer, the collate and the model are those of prepare, training and evaluation; a request differs only in where
its rows come from. `load_stage` is the one way from a checkpoint to a trained stage, for evaluate and predict as well.

Legend: R requests, N items, K places of a list, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from lum_ray import config as runs
from lum_ray import weights
from lum_ray.artifacts import UserError, checkpoint_record, find, join, read_bytes
from lum_ray.data.items import Catalogue
from lum_ray.data.rows import hash_strings
from lum_ray.gts.config import GtsConfig, GtsInputs
from lum_ray.gts.inference import Method, asked_logits, best, scores_by, user_embeddings, without_seen
from lum_ray.gts.inference import rerank as reranked
from lum_ray.gts.llm import digest as llm_digest
from lum_ray.gts.new_items import Assortment, NewItems
from lum_ray.gts.requests import FAR_FUTURE, History, Read, Request, RequestReader
from lum_ray.gts.semantic_ids import Tree
from lum_ray.gts.stage import GtsStage
from lum_ray.gts.tables import FittedTable
from lum_ray.stage import to_device

__all__ = ["Answer", "Asked", "Items", "Predictor", "Propensities", "Recommended", "Request", "load_stage", "record_of"]

BATCH = 128
"""Users of one forward pass."""
MOST_ASKED = 1000
"""Items that `score` reads for one user, a pass of the LLM each."""
RECORDED = ("run", "items", "tree", "fitted", "llm", "start_day", "end_day")
T = TypeVar("T")


class Recommended(NamedTuple):
    item: str
    text: str
    score: float


class Asked(NamedTuple):
    """`share`: the softmax of the logits over all the items that were asked about."""

    item: str
    text: str
    logit: float
    probability: float
    share: float


@dataclass(frozen=True)
class Answer:
    """`known`: whether anything is stored of the user or events were sent; `events`: of known items before the cut, of
    which none means that the items are those that are popular; `unknown_events`: those of items that nobody knows."""

    user: str
    cut_day: int | str
    known: bool
    events: int
    unknown_events: int
    items: list[Recommended]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "items": [item._asdict() for item in self.items]}


@dataclass(frozen=True)
class Propensities:
    """As `Answer`, for items that were asked about, in the order of the question."""

    user: str
    cut_day: int | str
    known: bool
    events: int
    unknown_events: int
    items: list[Asked]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "items": [item._asdict() for item in self.items]}


class Items(NamedTuple):
    """`embedding_NO` float32, of unit length: what reading R matches with user embeddings; `prior_N` float32: what the
    popularity of an item adds."""

    ids: tuple[str, ...]
    text: tuple[str, ...]
    embedding_NO: npt.NDArray[np.float32]
    prior_N: npt.NDArray[np.float32]


class Predictor:
    """A checkpoint, loaded. `load` never executes a pickle."""

    def __init__(
        self, assortment: Assortment, requests: RequestReader, info: Mapping[str, Any], device: torch.device
    ) -> None:
        self.assortment, self.requests, self.info, self.device = assortment, requests, info, device
        self._extended: tuple[str, Assortment] | None = None

    @classmethod
    def load(
        cls,
        uri: str,
        history_of: History | None = None,
        device: str = "auto",
        end_day: int | None = None,
        new_items: NewItems | None = None,
    ) -> Predictor:
        """The predictor of the checkpoint at `uri` (its best weights), over its items and `new_items` (by id; see
        `gts.new_items`).

        `history_of(user ids)` gives the stored rows of those that are known, up to `end_day` (exclusive; default: where
        the training data end), which is the default cut. Raises UserError for a checkpoint that is not there, is
        damaged, belongs to another model or was trained with the literal reading, and where its LLM cannot be had.
        """
        record, run = record_of(uri)
        if run.section.reading == "literal":
            raise UserError(
                f"{uri}: trained with gts.reading: literal, which has the answer in the question; train with `honest`"
            )
        root = uri.rstrip("/").rsplit("/", 2)[0]
        fitted, items, tree = (_artifact(root, name, record, uri) for name in ("fitted", "items", "tree"))
        inputs, catalogue, ids = _inputs(fitted), _catalogue(items), _tree(tree)
        if tuple(catalogue.ids) != inputs.items or len(ids) != inputs.count:
            raise UserError(f"{uri}: its items, tree and fitted statistics do not belong together; train anew")
        stage, step = load_stage(uri, inputs, device)
        table = _table(fitted)
        assortment = Assortment(stage, tuple(catalogue.text), ids, inputs, table)
        if new_items:
            assortment = assortment.add(new_items)
        known_until = int(record["end_day"] if end_day is None else end_day)
        info = {
            "name": run.name, "model": "gts", "step": step, "checkpoint": uri.rstrip("/").rsplit("/", 1)[-1],
            "items": len(assortment.ids), "start_day": int(record["start_day"]), "end_day": known_until,
            "event_columns": [run.data.events.time, run.data.events.item], "llm": record["llm"]["name"],
            "scores": run.section.reads_targets, "generates": run.section.generation,
        }  # fmt: skip
        reader = RequestReader(run, int(record["start_day"]), known_until, history_of)
        return cls(assortment, reader, info, next(stage.module.parameters()).device)

    def with_history(self, history_of: History | None, end_day: int | None) -> Predictor:
        """The same weights and items over other stored histories; see `load`."""
        known_until = self.requests.end_day if end_day is None else end_day
        reader = replace(self.requests, history_of=history_of, end_day=known_until)
        return Predictor(self.assortment, reader, {**self.info, "end_day": known_until}, self.device)

    @property
    def dated(self) -> bool:
        """Whether days are ISO dates in requests and answers, as in the run file (else day numbers)."""
        return self.requests.dated

    def recommend(
        self,
        requests: Sequence[Request],
        k: int = 10,
        seen_filter: bool = False,
        rerank: bool | int = False,
        method: Method = "retrieve",
        new_items: NewItems | None = None,
    ) -> list[Answer]:
        """For each request the `k` best items, or fewer where there are no more.

        `method`: "retrieve" matches the user's embedding with every item's (reading R); "generate" writes semantic IDs
        by beam search. `seen_filter` leaves out what the user had. `rerank` N puts the first N of that list in the
        order of reading P (True: as many as the run's `rerank`). Scores fall along a list, and are comparable within it
        alone. A user without an event of a known item gets what is popular: see `inference.scores_by`.
        Raises UserError naming the field of a request that cannot be answered.
        """
        depth = rerank if not isinstance(rerank, bool) else self._config.rerank if rerank else 0
        if k < 1 or depth < 0:
            raise UserError(f"k, rerank: expected at least 1 and 0, got {k} and {depth}")
        if method not in ("retrieve", "generate"):
            raise UserError(f"method: expected retrieve or generate, got {method!r}")
        if method == "generate" and not self._config.generation:
            raise UserError("method: this model was trained with gts.generation: false; use `retrieve`")
        if depth:
            self._check_reads_targets("rerank")
        goods = self._goods(new_items)
        read = self.requests.rows(requests)
        lists: list[list[Recommended]] = []
        batches = []
        for batch in self._batches(goods, read):
            scores = scores_by(goods.stage, batch, method)
            if seen_filter:
                scores = without_seen(scores, batch)
            items, values = best(scores, max(k, depth))
            if depth:
                items, values = reranked(goods.stage, batch, items, values, depth)
            for row, of in zip(items[:, :k].tolist(), values[:, :k].tolist(), strict=True):
                lists.append(
                    [Recommended(goods.ids[i], goods.text[i], v) for i, v in zip(row, of, strict=True) if i >= 0]
                )
            batches.append(batch)
        return [Answer(*facts, items) for facts, items in zip(self._facts(requests, read, batches), lists, strict=True)]

    def score(
        self, requests: Sequence[Request], items: Sequence[str], new_items: NewItems | None = None
    ) -> list[Propensities]:
        """The propensity of every one of `items` for each request: each is read in front of the history (reading P).

        Logits were trained by a softmax over candidates in front of the same history, so they say which of them
        follows: `share` is that softmax over `items`, `probability` the logit squashed into (0, 1), which orders the
        items of a user but is no calibrated frequency. For a user without an event it is the item's share of all
        events: see `inference.asked_logits`. Raises UserError for items that are not known, and as `recommend` does.
        """
        self._check_reads_targets("score")
        goods = self._goods(new_items)
        index = _places(goods, items)
        read = self.requests.rows(requests)
        found: list[list[Asked]] = []
        batches = []
        for batch in self._batches(goods, read):
            logits_RK = asked_logits(goods.stage, batch, index)
            with np.errstate(over="ignore"):
                probability_RK = np.clip(1 / (1 + np.exp(-logits_RK)), 1e-12, 1 - 1e-12)
            weight_RK = np.exp(logits_RK - logits_RK.max(axis=1, keepdims=True))
            share_RK = weight_RK / weight_RK.sum(axis=1, keepdims=True)
            for row in zip(logits_RK.tolist(), probability_RK.tolist(), share_RK.tolist(), strict=True):
                found.append([Asked(goods.ids[i], goods.text[i], *of) for i, *of in zip(index, *row, strict=True)])
            batches.append(batch)
        facts = self._facts(requests, read, batches)
        return [Propensities(*one, asked) for one, asked in zip(facts, found, strict=True)]

    def embed(self, requests: Sequence[Request], new_items: NewItems | None = None) -> npt.NDArray[np.float32]:
        """User embeddings (R, O) at each request's cut: what reading R matches with `items`."""
        goods = self._goods(new_items)
        read = self.requests.rows(requests)
        parts = [user_embeddings(goods.stage, batch) for batch in self._batches(goods, read)]
        return np.concatenate(parts).astype(np.float32)

    def items(self, new_items: NewItems | None = None) -> Items:
        """All items that can be recommended, with their embeddings (N, O)."""
        goods = self._goods(new_items)
        with torch.no_grad():
            module = goods.stage.module
            prior = module.prior.popular(module.constants["log_q_N"])
            found, added = (value.float().cpu().numpy() for value in (module.catalogue()[1], prior))
        return Items(goods.ids, goods.text, found, added)

    @property
    def _config(self) -> GtsConfig:
        return self.assortment.stage.config

    def _check_reads_targets(self, what: str) -> None:
        if not self._config.reads_targets:
            raise UserError(
                f"{what}: this model was trained without the reading of candidates (gts.target_position: "
                f"{self._config.target_position}, gts.propensity_share: {self._config.propensity_share}); use recommend"
            )

    def _goods(self, new_items: NewItems | None) -> Assortment:
        """The items of a call; those of the last call that brought any are kept."""
        if not new_items:
            return self.assortment
        key = repr(sorted((name, value) for name, value in new_items.items()))
        if self._extended is None or self._extended[0] != key:
            self._extended = (key, self.assortment.add(new_items))
        return self._extended[1]

    def _batches(self, goods: Assortment, read: Read) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(read.rows), BATCH):
            some = np.arange(start, min(start + BATCH, len(read.rows)))
            yield to_device(goods.stage.questions(*read.part(some)), self.device)

    def _facts(
        self, requests: Sequence[Request], read: Read, batches: Sequence[Mapping[str, torch.Tensor]]
    ) -> Iterator[tuple[str, int | str, bool, int, int]]:
        events, unknown = (
            [int(count) for batch in batches for count in batch[name].tolist()] for name in ("events_B", "unknown_B")
        )
        for i, request in enumerate(requests):
            cut = self.requests.shown(int(read.samples.cut[i]))
            yield request.user, cut, bool(read.known_R[i]), events[i], unknown[i]


def record_of(uri: str) -> tuple[dict[str, Any], runs.Run]:
    """run.json of the checkpoint at `uri`, and the run in it. Raises UserError for none, or another model's."""
    record = checkpoint_record(uri, ("gts",), RECORDED)
    return record, runs.read_run(record["run"], {"gts": GtsConfig})


def load_stage(uri: str, inputs: GtsInputs, device: str = "auto") -> tuple[GtsStage, int]:
    """The trained stage of the checkpoint at `uri` (its best weights, and their step) over the `inputs` that it was
    trained with.

    Its LLM is loaded by name and revision, and must have the weights that it had in training. Raises UserError.
    """
    record, run = record_of(uri)
    stage = GtsStage(run.section, inputs, FAR_FUTURE, run.train.seed)
    if llm_digest(stage.module.decoder) != record["llm"]["digest"]:
        raise UserError(
            f"{uri}: its LLM {record['llm']['name']} has other weights than in training; restore that revision"
        )
    frozen = {name for name, parameter in stage.module.named_parameters() if not parameter.requires_grad}
    trained = weights.load(uri)
    try:
        missing, unexpected = stage.module.load_state_dict(trained.tensors, strict=False)
    except RuntimeError as error:  # a tensor of another shape
        raise UserError(f"{uri}: of another shape than its run's model: {str(error).splitlines()[1].strip()}") from None
    wrong = [*(name for name in missing if name not in frozen), *unexpected]
    if wrong:
        raise UserError(f"{uri}: lacks or adds parameters of its run's model: {', '.join(wrong[:5])}")
    place = "cuda" if torch.cuda.is_available() else "cpu"
    stage.module.to(place if device == "auto" else device).eval()
    return stage, int(trained.loop["step"])


def _artifact(root: str, name: str, record: Mapping[str, Any], uri: str) -> str:
    """The artifact that the checkpoint names, beside it under the same root. Raises UserError."""
    place = join(root, name, str(record[name]))
    if find(place) is None:
        raise UserError(
            f"{uri}: was trained with {place}, which is not there; keep a checkpoint beside the artifacts of its root"
        )
    return place


def _read(place: str, how: Callable[[str], T]) -> T:
    """What `how` makes of the file. Raises UserError where it is missing or damaged."""
    try:
        return how(place)
    except FileNotFoundError:
        raise UserError(f"{place}: missing, though its artifact is complete; restore it, or prepare again") from None
    except (KeyError, TypeError, ValueError, SafetensorError, pa.ArrowInvalid) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: damaged ({told}); restore it, or remove its folder and prepare again") from None


def _inputs(folder: str) -> GtsInputs:
    arrays = _read(join(folder, "inputs.safetensors"), lambda place: load_arrays(read_bytes(place)))
    return _read(join(folder, "inputs.json"), lambda place: GtsInputs.from_parts(read_bytes(place).decode(), arrays))


def _catalogue(folder: str) -> Catalogue:
    return _read(
        join(folder, "items.parquet"),
        lambda place: Catalogue.from_table(pq.read_table(pa.BufferReader(read_bytes(place)))),
    )


def _tree(folder: str) -> Tree:
    return _read(join(folder, "tree.safetensors"), lambda place: Tree.from_arrays(load_arrays(read_bytes(place))))


def _table(folder: str) -> FittedTable:
    place = join(folder, "table.safetensors")
    return _read(place, lambda place: FittedTable.from_arrays(load_arrays(read_bytes(place))))


def _places(goods: Assortment, items: Sequence[str]) -> list[int]:
    """Where each of `items` is among the goods. Raises UserError for unknown ones, none, repeats and too many."""
    if isinstance(items, str) or not 1 <= len(items) <= MOST_ASKED:
        came = repr(items) if isinstance(items, str) else len(items)
        raise UserError(
            f"items: expected 1 to {MOST_ASKED} ids, got {came}; for the best of all of them ask `recommend`"
        )
    texts = [str(item) for item in items]
    again = sorted({item for item in texts if texts.count(item) > 1}) if len(set(texts)) < len(texts) else []
    if again:
        raise UserError(f"items: expected each once, got again: {', '.join(again[:5])}")
    index = goods.stage.inputs.index_of(hash_strings(texts).view(np.int64)).tolist()
    unknown = [item for item, place in zip(texts, index, strict=True) if place < 0]
    if unknown:
        raise UserError(
            f"items: {len(unknown)} are not in the catalogue of this model: {', '.join(unknown[:5])}; give their texts "
            "as new_items, or leave them out"
        )
    return [int(place) for place in index]
