"""Open questions that a trained checkpoint answers: what inference costs, and what an irrelevant target does.

Both read the same test users in several ways; figures are means over users with paired intervals. CPU milliseconds are
of one thread, the collate included.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jobs.bench.ablations_gts import cell, number, verdict
from jobs.bench.rows import emit, hardware, note
from lum_ray.config import Run
from lum_ray.data.loader import evaluation_batches
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Int64, Rows, Samples, mix, share
from lum_ray.evaluation.bootstrap import Interval, interval, ratio_resamples, user_weights
from lum_ray.evaluation.ranking import basket_metrics, ranks_of
from lum_ray.gts.behaviours import node_numbers
from lum_ray.gts.collate import next_items
from lum_ray.gts.stage import GtsStage
from lum_ray.stage import Batch, to_device
from lum_ray.steps.gts_evaluate import trained_stage
from lum_ray.steps.gts_prepare import GtsPrepared, prepare_gts
from lum_ray.steps.gts_train import train_gts
from lum_ray.steps.prepare import cut_plan

Floats = npt.NDArray[np.float64]
PACKAGES = ("torch", "transformers", "numpy")
BATCH = 64
FIGURES = {"recall_10": "R@10", "ndcg_5": "NDCG@5"}
CANDIDATES = (5, 10, 20)
"""Items of R's list that P scores again."""
KINDS = ("random", "popular", "same_leaf", "context")
KIND_SALT = 23


@dataclass(frozen=True)
class Read:
    """One way to read n users who took something: figure -> (n,), and the CPU milliseconds of a user."""

    figures: Mapping[str, Floats]
    user_ms: float


@dataclass(frozen=True)
class Trained:
    """A run, what it reads, and its trained stage."""

    run: Run
    prepared: GtsPrepared
    stage: GtsStage

    @staticmethod
    def of(run: Run) -> Trained:
        """Trained where it is missing."""
        prepared = prepare_gts(run, note)
        return Trained(run, prepared, trained_stage(run, prepared, train_gts(run, note)))

    def batches(self, users: int) -> Iterator[tuple[Batch, tuple[Int64, Int64], Int64, float]]:
        """The test cut of at most `users` users: a batch, its targets, the users' hashes, and the seconds it took."""
        timelines = Timelines.open(self.prepared.sequences.uri)
        plan = cut_plan(self.run, "test", timelines.end_day)
        parts = evaluation_batches(timelines, plan, lambda *_: {}, BATCH, 0, 1, users, self.run.train.seed)
        # a bucket has few of them: together they fill their batches
        pieces = [(rows.take(samples.row), samples.cut) for rows, samples, _ in parts]
        rows, cuts = Rows.concat([piece for piece, _ in pieces]), np.concatenate([cut for _, cut in pieces])
        for begin in range(0, len(rows), BATCH):
            some = rows.take(np.arange(begin, min(begin + BATCH, len(rows))))
            count = len(some)
            samples = Samples(np.arange(count), cuts[begin : begin + count], np.zeros(count, np.int32))
            start = time.process_time()
            batch = to_device(self.stage.questions(some, samples), torch.device("cpu"))
            took = time.process_time() - start
            target = next_items(some, samples, self.stage.inputs.index_of, timelines.end_day)
            yield batch, target, some.user_hash.view(np.int64), took


def figures_of(scores_BN: npt.NDArray[Any], target: tuple[Int64, Int64]) -> dict[str, Floats]:
    """Of each sample that took something (n,)."""
    found = basket_metrics(ranks_of(scores_BN, target), target[0], len(scores_BN), scores_BN.shape[1], (5, 10))
    some = np.isin(np.arange(len(scores_BN)), target[0])
    return {name: found[f"eval/{name}"][some] for name in FIGURES}


def read(trained: Trained, users: int, score: Callable[[Batch], torch.Tensor]) -> Read:
    """Read the users by `score` (B, N)."""
    parts, seconds, count = [], 0.0, 0
    with torch.no_grad():
        for batch, target, _, took in trained.batches(users):
            start = time.process_time()
            scores = score(batch).float()
            seconds += took + time.process_time() - start
            count += len(scores)
            parts.append(figures_of(scores.numpy(), target))
    return Read({name: np.concatenate([part[name] for part in parts]) for name in FIGURES}, 1000 * seconds / count)


def retrieved(trained: Trained, users: int) -> Read:
    """By reading R alone."""
    return read(trained, users, trained.stage.scores)


def paired(value_n: Floats, base_n: Floats) -> Interval:
    """The mean gain over users, one row each, with its interval."""
    user, one = np.arange(len(value_n)), np.ones(len(value_n))
    weights = user_weights(len(value_n))
    gain, mine = (ratio_resamples((part, one), user, weights) for part in (base_n, value_n))
    return interval(mine - gain)


def reranked(stage: GtsStage, count: int) -> Callable[[Batch], torch.Tensor]:
    """R's scores with the best `count` items put in the order of P."""

    def score(batch: Batch) -> torch.Tensor:
        scores_BN = stage.scores(batch)
        items_BK = scores_BN.topk(count, dim=1).indices
        order = stage.propensities(batch, items_BK).argsort(dim=1).argsort(dim=1)
        above = scores_BN.max(dim=1, keepdim=True).values + 1 + order.to(scores_BN.dtype)
        return scores_BN.scatter(1, items_BK, above)

    return score


def in_eight_bits(trained: Trained) -> Trained:
    """The same with the decoder's linear layers in 8-bit weights (activations quantised as they come)."""
    from torch.ao.quantization import quantize_dynamic

    other = Trained.of(trained.run)
    decoder = quantize_dynamic(other.stage.module.decoder, {torch.nn.Linear}, dtype=torch.qint8)
    other.stage.module.decoder = decoder
    return other


def cost(dataset: str, run: Run, users: int, quick: bool) -> None:
    """Quality and CPU time a user: layers, tokens, 8-bit weights, and P behind R."""
    base = Trained.of(run)
    layers, tokens = run.section.keep_layers or 1, run.section.max_tokens
    arms: dict[str, Callable[[], Read]] = {f"retrieve_{tokens}_tokens": lambda: retrieved(base, users)}
    for length in (max(8, tokens // 4), tokens // 2, 2 * tokens):
        arms[f"{length}_tokens"] = lambda length=length: retrieved(shorter(base, length), users)
    arms["8_bit_weights"] = lambda: retrieved(in_eight_bits(base), users)
    for count in CANDIDATES[:1] if quick else CANDIDATES:
        arms[f"and_p_at_{count}"] = lambda count=count: read(base, users, reranked(base.stage, count))
    if run.section.llm != "random":
        section = dataclasses.replace(run.section, keep_layers=layers + 1)
        deeper = dataclasses.replace(run, section=section)
        arms[f"{layers + 1}_layers"] = lambda: retrieved(Trained.of(deeper), users)
    found: dict[str, Read] = {}
    for arm, make in arms.items():
        base.stage.config = dataclasses.replace(base.stage.config, max_tokens=tokens)
        found[arm] = make()
    first = next(iter(found.values()))
    note("\n| reading | CPU ms a user | " + " | ".join(FIGURES.values()) + " |\n|---|---|" + "---|" * len(FIGURES))
    for arm, one in found.items():
        cells = []
        for figure, title in FIGURES.items():
            gain = paired(one.figures[figure], first.figures[figure])
            cells.append(number(float(one.figures[figure].mean())) if one is first else cell(gain))
            row(f"cost/{dataset}/{arm}/{figure}_gain", gain, title, run, quick,
                {"users": len(one.figures[figure]), figure: float(one.figures[figure].mean()), "user_ms": one.user_ms,
                 "verdict": verdict(gain)}, one.user_ms / first.user_ms)  # fmt: skip
        note(f"| {arm.replace('_', ' ')} | {one.user_ms:.1f} | {' | '.join(cells)} |")


def shorter(trained: Trained, tokens: int) -> Trained:
    """The same with other histories: only the collate reads this setting."""
    trained.stage.config = dataclasses.replace(trained.stage.config, max_tokens=tokens)
    return trained


def irrelevant(dataset: str, run: Run, users: int, quick: bool) -> None:
    """What a target in front does that is not what comes next: can P tell it, and what is left of R's list?

    `wins`: the share of users for whom the true next item gets more than the irrelevant one, by P and by R's scores;
    `recall_10`: of reading R with this target in front, minus that without any (the true one: what it gives away).
    """
    trained = Trained.of(run)
    parts: dict[str, list[Floats]] = {}
    with torch.no_grad():
        for batch, target, hashes, _ in trained.batches(users):
            for name, values in _with_targets(trained, batch, target, hashes).items():
                parts.setdefault(name, []).append(values)
    found = {name: np.concatenate(values) for name, values in parts.items()}
    plain, half = found["none/recall_10"], np.full(len(found["none/recall_10"]), 0.5)
    shown = {"users": len(plain), "recall_10": float(plain.mean())}
    note("\n| target in front | P prefers the true item | R prefers it | R's scores move by | R@10 with it in front |")
    note(f"|---|---|---|---|---|\n| none | | | | {number(float(plain.mean()))} |")
    for kind in ("true", *KINDS):
        gain = paired(found[f"{kind}/recall_10"], plain)
        shown["scores_move"] = float(found[f"{kind}/moved"].mean())
        row(f"irrelevant/{dataset}/{kind}/recall_10_gain", gain, "R@10", run, quick, shown)
        cells = ["", ""]
        if kind != "true":
            wins = [paired(found[f"{kind}/{reading}_wins"], half) for reading in ("p", "r")]
            for reading, at in zip(("p", "r"), wins, strict=True):
                row(f"irrelevant/{dataset}/{kind}/{reading}_wins_gain", at, "share above one half", run, quick, shown)
            cells = [f"{0.5 + w.value:.3f} [{0.5 + w.low:.3f}, {0.5 + w.high:.3f}]".replace("0.", ".") for w in wins]
        moved = f"{100 * found[f'{kind}/moved'].mean():.2g} % of their spread"
        note(f"| {kind.replace('_', ' ')} | {cells[0]} | {cells[1]} | {moved} | {cell(gain)} |")


def _with_targets(
    trained: Trained, batch: Batch, target: tuple[Int64, Int64], hashes: Int64
) -> dict[str, npt.NDArray[np.float64]]:
    """`<kind>/<figure>` -> (n,) over the samples with a target."""
    stage = trained.stage
    module, count = stage.module, stage.inputs.count
    some, first = np.unique(target[0], return_index=True)
    truth_n = target[1][first]
    plain_BN = stage.scores(batch)
    wrong_BN = plain_BN.clone()
    wrong_BN[torch.from_numpy(target[0]), torch.from_numpy(target[1])] = -torch.inf
    chosen = {"true": truth_n, "context": wrong_BN.argmax(dim=1).numpy()[some]}
    draw = share(mix(hashes[some], KIND_SALT))
    taken = set(zip(target[0].tolist(), target[1].tolist(), strict=True))
    leaf_N = node_numbers(stage.inputs.arrays["paths_ND"], stage.config.branching)[:, -1]
    ways = {
        "random": lambda n: np.arange(count),
        "popular": lambda n: np.argsort(-stage.weight_N)[: max(2, count // 20)],
        "same_leaf": lambda n: np.flatnonzero(leaf_N == leaf_N[truth_n[n]]),
    }
    for kind, pool in ways.items():
        picked = []
        for n, sample in enumerate(some.tolist()):
            items = [item for item in pool(n).tolist() if (sample, item) not in taken]
            items = items or [item for item in range(count) if (sample, item) not in taken]  # alone in its leaf
            picked.append(items[int(draw[n] * len(items))])
        chosen[kind] = np.array(picked, np.int64)
    asked_BK = torch.zeros(len(plain_BN), 1 + len(KINDS), dtype=torch.long)
    for place, kind in enumerate(("true", *KINDS)):
        asked_BK[torch.from_numpy(some), place] = torch.from_numpy(chosen[kind])
    scored = {"p": stage.propensities(batch, asked_BK).numpy()[some], "r": plain_BN.gather(1, asked_BK).numpy()[some]}
    result = {"none/recall_10": figures_of(plain_BN.numpy(), target)["recall_10"]}
    fused_ND = module.catalogue()[0]
    x_BLD, rows = module.tokens(batch, fused_ND[batch["unique_U"]]), torch.arange(len(plain_BN))
    for place, kind in enumerate(("true", *KINDS)):
        state = module.last(batch, rows, module.read(batch, x_BLD, rows, 0, fused_ND[asked_BK[:, place]]), True)
        scores = stage.scores(batch, state_BD=state)
        result[f"{kind}/recall_10"] = figures_of(scores.numpy(), target)["recall_10"]
        moved_B = (scores - plain_BN).std(dim=1) / plain_BN.std(dim=1)
        result[f"{kind}/moved"] = moved_B.double().numpy()[some]
        for reading, values in scored.items():
            more, same = values[:, 0] > values[:, place], values[:, 0] == values[:, place]
            result[f"{kind}/{reading}_wins"] = more + 0.5 * same
    return result


def row(
    what: str, at: Interval, unit: str, run: Run, quick: bool, shown: Mapping[str, Any], ratio: float | None = None
) -> None:
    """Print one figure of a question."""
    about = {"name": run.name, "gts": dataclasses.asdict(run.section), "train": dataclasses.asdict(run.train),
             "quick": quick, **shown}  # fmt: skip
    emit(f"questions_gts/{what}", at.value, unit, ratio=ratio, low=at.low, high=at.high, run=about,
         machine=hardware(), packages=PACKAGES)  # fmt: skip
