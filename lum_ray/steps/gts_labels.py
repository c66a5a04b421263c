"""Labels of users (gone for 28 days, redeemed a coupon) by a trained GTS-LUM: a head is fitted, the model is not.

`linear`: logistic regression on the user embedding. `recency`: the same, beside what no token says: how long before the
cut the last event lies, how many there were, and over how long. `front`, `end`, `none`: the label's name is a question
in the history's prefix, behind the history, or nowhere, see `lum_ray.gts.questions`.

What is labelled before `split.validate_from` trains, what lies between it and the first test day chooses (the
regression's penalty, the best step), what comes later is only predicted, and so is every row without a label. A label
counts where it was known: its `until_day` must not lie behind the end of its part, or the row is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from lum_ray import weights
from lum_ray.artifacts import UserError, commit, digest, find, fingerprint, join, list_files, write_table
from lum_ray.config import Run
from lum_ray.data.raw import open_parquet
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Int64, Rows, Samples
from lum_ray.gts.inference import user_embeddings
from lum_ray.gts.predictor import BATCH, Predictor
from lum_ray.gts.questions import Position, Questions
from lum_ray.gts.stage import GtsStage
from lum_ray.stage import Batch, to_device
from lum_ray.steps.gts_prepare import prepare_sequences
from lum_ray.steps.gts_train import train_gts
from lum_ray.steps.prepare import Log, fit_until, select_until, silent

VERSION = 1
Reading = Literal["linear", "recency", "front", "end", "none"]
COLUMNS = ("user", "cut_day", "until_day", "task", "label")
PARTS = ("train", "validate", "test")
PENALTIES = (0.001, 0.01, 0.1, 1.0)
"""Inverse strengths of the regression's penalty; without labels to choose by, the third."""
STEPS, STEP_BATCH, VALIDATIONS, LEARNING_RATE = 200, 16, 4, 1e-3
HEAD_STEPS = 400
"""Of a head on states that are computed once."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Labels:
    """S rows: the label (NaN: unknown) of a task for a user, seen from a cut; `part` -1 is in none."""

    tasks: tuple[str, ...]
    user: npt.NDArray[np.object_]
    cut: Int64
    task: Int64
    label: Floats
    part: Int64

    def known(self, part: str, task: int | None = None) -> Int64:
        """The rows of a part that have a label."""
        some = (self.part == PARTS.index(part)) & ~np.isnan(self.label)
        return np.flatnonzero(some if task is None else some & (self.task == task))


def label_gts(run: Run, labels: str, log: Log = silent, reading: str = "linear", checkpoint: str | None = None) -> str:
    """Fit a head for each task of the table at `labels`, predict all of its rows, and return the folder's URI.

    `labels`: parquet with user, cut_day (the first day that the model does not see), until_day (the first day on which
    the label is known), both dates or day numbers, task (a short text, read as the question), label (0, 1 or null).
    The folder holds `labels.parquet` (user, cut_day, task, part, label, p). `checkpoint` takes an earlier model.
    Raises UserError for a table that is not so, users that are not known, and a task without both labels in training.
    """
    if reading not in get_args(Reading):
        raise UserError(f"reading: expected {', '.join(get_args(Reading))}, got {reading!r}")
    if run.split.validate_from is None:
        raise UserError("split.validate_from: labels are split in time, so it must be set in the run file")
    _, sequences = prepare_sequences(run, log)
    end_day = int(sequences.manifest["end_day"])
    checkpoint = (checkpoint or train_gts(run, log)).rstrip("/")
    days = fit_until(run, end_day), select_until(run, end_day)
    shape = [VERSION, sequences.manifest["digest"], weights.fingerprint(checkpoint), fingerprint(labels), days, reading]
    name = digest("gts labels", shape, run.seed)
    uri = join(run.root, "predictions", f"{run.name}-labels-{name}")
    if find(uri) is not None:
        log("already predicted")
        return uri
    read = read_labels(labels, *days)
    lost = int((read.part < 0).sum())
    log(f"{len(read.label):,} labels of {len(read.tasks)} tasks, {lost:,} left out: known too late for their part")
    rows = _rows_of(Timelines.open(sequences.uri), set(read.user.tolist()))
    place = {user: index for index, user in enumerate(rows.user.tolist())}
    unknown = sorted({user for user in read.user.tolist() if user not in place})
    if unknown:
        raise UserError(f"{labels}: {len(unknown)} users have no row in the data: {', '.join(unknown[:5])}; leave out")
    row = np.array([place[user] for user in read.user.tolist()], np.int64)
    _check_trainable(read, labels)
    predictor = Predictor.load(checkpoint)
    asked = _Asked(predictor.assortment.stage, rows, row, read)
    if reading in ("linear", "recency"):
        probability = linear(asked, reading == "recency", log)
    else:
        probability = _questions(predictor, asked, cast(Position, reading), run.seed, log)
    table = pa.table({
        "user": pa.array(read.user, pa.string()),
        "cut_day": pa.array(read.cut, pa.int32()),
        "task": pa.array([read.tasks[task] for task in read.task.tolist()], pa.string()),
        "part": pa.array([PARTS[part] if part >= 0 else None for part in read.part.tolist()], pa.string()),
        "label": pa.array(read.label, pa.float64(), from_pandas=True),
        "p": pa.array(probability, pa.float64()),
    })  # fmt: skip
    write_table(join(uri, "labels.parquet"), table)
    commit(uri, {"kind": "labels", "digest": name, "checkpoint": checkpoint.rsplit("/", 1)[-1], "reading": reading,
                 "tasks": list(read.tasks), "rows": len(table)})  # fmt: skip
    return uri


def read_labels(uri: str, fit_day: int, test_day: int) -> Labels:
    """The table at `uri`, its rows' parts by day. Raises UserError naming the column, with at most five offenders."""
    tables = []
    for file in list_files(uri, ".parquet"):
        table = open_parquet(file).read()
        if missing := [name for name in COLUMNS if name not in table.column_names]:
            raise UserError(f"{file}: expected the columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}")
        tables.append(table.select(COLUMNS))
    if not tables:
        raise UserError(f"{uri}: expected parquet files with labels, found none")
    table = pa.concat_tables(tables, promote_options="permissive")
    for name in COLUMNS[:-1]:
        if table[name].null_count:
            raise UserError(f"{uri}: column {name}: expected a value in each row, {table[name].null_count} are null")
    try:
        cut, until = (table[name].cast(pa.int32()).to_numpy().astype(np.int64) for name in ("cut_day", "until_day"))
        label = pc.fill_null(table["label"].cast(pa.float64()), float("nan")).to_numpy()
        user = np.array(table["user"].cast(pa.string()).to_pylist(), np.object_)
        named = table["task"].cast(pa.string()).to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{uri}: expected days or day numbers, texts and labels of 0, 1 or null: {error}") from error
    tasks = tuple(sorted(set(named)))
    task = np.array([tasks.index(name) for name in named], np.int64)
    _refuse(uri, "label", "0, 1 or null", ~(np.isnan(label) | (label == 0) | (label == 1)), user, label)
    _refuse(uri, "until_day", "a day after cut_day", until <= cut, user, until)
    keys = list(zip(user.tolist(), cut.tolist(), task.tolist(), strict=True))
    if len(set(keys)) < len(keys):
        raise UserError(f"{uri}: expected one row a (user, cut_day, task), {len(keys) - len(set(keys))} come again")
    part = np.full(len(cut), -1, np.int64)
    part[until <= fit_day] = 0
    part[(cut >= fit_day) & (until <= test_day)] = 1
    part[cut >= test_day] = 2
    return Labels(tasks, user, cut, task, label, part)


def _refuse(uri: str, column: str, expected: str, wrong: npt.NDArray[np.bool_], user: Any, value: Any) -> None:
    if wrong.any():
        shown = ", ".join(f"{user[at]}: {value[at]:g}" for at in np.flatnonzero(wrong)[:5].tolist())
        raise UserError(f"{uri}: column {column}: expected {expected}, {int(wrong.sum())} rows are not so: {shown}")


def _check_trainable(labels: Labels, uri: str) -> None:
    found = {name: set(labels.label[labels.known("train", at)].tolist()) for at, name in enumerate(labels.tasks)}
    if lacking := [name for name, values in found.items() if len(values) < 2]:
        raise UserError(
            f"{uri}: expected labels of 0 and of 1 that are known before split.validate_from; not so: "
            f"{', '.join(lacking[:5])}; give earlier cuts, or move split.validate_from"
        )


def _rows_of(timelines: Timelines, users: set[str]) -> Rows:
    """The histories of `users`, which must fit in memory; the others are read and let go of, bucket by bucket."""
    parts = [timelines.read([])]
    for bucket in np.flatnonzero(timelines.bucket_users).tolist():
        rows = timelines.read([bucket])
        parts.append(rows.take(np.array([at for at, user in enumerate(rows.user.tolist()) if user in users], np.int64)))
    return Rows.concat(parts)


@dataclass(frozen=True)
class _Asked:
    """The labels with their users' histories: `row` (S,) is each label's in `rows`."""

    stage: GtsStage
    rows: Rows
    row: Int64
    labels: Labels

    def batch(self, some: Int64) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """The histories of the labels at `some`, each (user, cut) once; each label's place among them; its task."""
        pairs, sample = np.unique(np.stack([self.row[some], self.labels.cut[some]]), axis=1, return_inverse=True)
        chosen, row = np.unique(pairs[0], return_inverse=True)
        samples = Samples(row.astype(np.int64), pairs[1].astype(np.int32), np.zeros(pairs.shape[1], np.int32))
        device = next(self.stage.module.parameters()).device
        batch = to_device(self.stage.questions(self.rows.take(chosen), samples), device)
        place, task = (torch.from_numpy(np.asarray(of, np.int64).ravel()) for of in (sample, self.labels.task[some]))
        return batch, place.to(device), task.to(device)

    def batches(self, rows: Int64, size: int = BATCH) -> Iterator[tuple[Int64, Batch, torch.Tensor, torch.Tensor]]:
        """All of `rows`, those of a user together, so that a history is read once where it can be."""
        ordered = rows[np.lexsort((self.labels.cut[rows], self.row[rows]))]
        for start in range(0, len(ordered), size):
            some = ordered[start : start + size]
            yield some, *self.batch(some)

    @property
    def asked(self) -> Int64:
        """All rows that are in a part."""
        return np.flatnonzero(self.labels.part >= 0)


def recency_facts(rows: Rows, row: Int64, cut: Int64) -> Floats:
    """Logs of the days since the last event before the cut, of the events, and of the days since the first (S, 3)."""
    begin, end = rows.span(row, np.iinfo(np.int32).min, cut)
    observed = np.maximum(cut - rows.first_day[row], 0)
    last = cut - rows.days[np.maximum(end - 1, 0)] if len(rows.days) else observed
    since = np.where(end > begin, last, observed)
    return np.log1p(np.stack([since, end - begin, observed], axis=1).astype(np.float64))


def linear(asked: _Asked, with_facts: bool, log: Log = silent) -> Floats:
    """P(yes) (S,), NaN for rows in no part: for each task a logistic regression on the user embeddings of the training
    cuts, its penalty chosen by the log loss on the validation cuts. `with_facts`: beside `recency_facts`."""
    labels = asked.labels
    found = np.zeros((len(labels.label), asked.stage.config.output_width))
    for some, batch, place, _ in asked.batches(asked.asked):
        found[some] = user_embeddings(asked.stage, batch)[place.cpu().numpy()]
    if with_facts:
        found = np.concatenate([found, recency_facts(asked.rows, asked.row, labels.cut)], axis=1)
    result = np.full(len(labels.label), np.nan)
    for task, name in enumerate(labels.tasks):
        train, validate = labels.known("train", task), labels.known("validate", task)
        fitted = {
            penalty: make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000)).fit(
                found[train], labels.label[train]
            )
            for penalty in (PENALTIES if len(validate) else PENALTIES[2:3])
        }
        losses = {
            penalty: log_loss(labels.label[validate], model.predict_proba(found[validate])[:, 1])
            for penalty, model in fitted.items() if len(validate)
        }  # fmt: skip
        chosen = min(losses, key=losses.__getitem__) if losses else PENALTIES[2]
        own = asked.asked[labels.task[asked.asked] == task]
        result[own] = fitted[chosen].predict_proba(found[own])[:, 1]
        log(f"{name}: C {chosen:g}" + (f", log loss {losses[chosen]:.4f} on validation" if losses else ""))
    return result


def log_loss(label: Floats, probability: Floats) -> float:
    """Mean negative log-likelihood; NaN of nothing."""
    if not len(label):
        return float("nan")
    p = np.clip(probability, 1e-7, 1 - 1e-7)
    return float(-(label * np.log(p) + (1 - label) * np.log(1 - p)).mean())


def _questions(predictor: Predictor, asked: _Asked, position: Position, seed: int, log: Log) -> Floats:
    """P(yes) (S,), NaN for rows in no part: the tasks as questions, see `lum_ray.gts.questions`."""
    labels, module = asked.labels, asked.stage.module
    goods = predictor.assortment.add({f"question: {name}": name for name in labels.tasks})
    started_QD = goods.stage.module.catalogue()[0][-len(labels.tasks) :]
    rates = [labels.label[labels.known("train", task)].mean() for task in range(len(labels.tasks))]
    torch.manual_seed(seed)
    questions = Questions(module, started_QD, torch.tensor(rates, device=started_QD.device), position)
    questions.to(started_QD.device)
    (_cached if position == "none" else _stepwise)(questions, asked, np.random.default_rng(seed), log)
    return _answers(questions, asked, asked.asked)


@torch.no_grad()
def _answers(questions: Questions, asked: _Asked, rows: Int64) -> Floats:
    result = np.full(len(asked.labels.label), np.nan)
    for some, batch, place, task in asked.batches(rows):
        found = questions.logits(questions.states(batch, place, task), task)
        result[some] = torch.sigmoid(found.double()).cpu().numpy()
    return result


def _drawn(labels: Labels, generator: np.random.Generator, size: int) -> Int64:
    """Training rows, as many of each task."""
    tasks = generator.integers(0, len(labels.tasks), size)
    return np.array([generator.choice(labels.known("train", int(task))) for task in tasks], np.int64)


def _stepwise(questions: Questions, asked: _Asked, generator: np.random.Generator, log: Log) -> None:
    """Train vectors and head through the frozen LLM; the best of a few validations is kept."""
    labels = asked.labels
    validate = labels.known("validate")
    validate = generator.permutation(validate)[:512]
    optimiser = torch.optim.AdamW(questions.parameters(), lr=LEARNING_RATE)
    best, kept = float("inf"), _copied(questions)
    for step in range(1, STEPS + 1):
        some = _drawn(labels, generator, STEP_BATCH)
        batch, place, task = asked.batch(some)
        target = torch.from_numpy(labels.label[some]).to(task.device).float()
        loss = F.binary_cross_entropy_with_logits(questions.logits(questions.states(batch, place, task), task), target)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step % max(1, STEPS // VALIDATIONS) == 0 and len(validate):
            found = log_loss(labels.label[validate], _answers(questions, asked, validate)[validate])
            log(f"step {step} of {STEPS}: log loss {found:.4f} on validation")
            if found < best:
                best, kept = found, _copied(questions)
    if len(validate):
        questions.load_state_dict(kept)


def _cached(questions: Questions, asked: _Asked, generator: np.random.Generator, log: Log) -> None:
    """The states know no question, so they are computed once, and the heads trained on them."""
    labels = asked.labels
    rows = np.sort(np.concatenate([labels.known("train"), labels.known("validate")]))
    states = torch.zeros(len(rows), questions.state_width)
    with torch.no_grad():
        for some, batch, place, task in asked.batches(rows):
            states[torch.from_numpy(np.searchsorted(rows, some))] = questions.states(batch, place, task).float().cpu()
    states = states.to(questions.odds_Q.device)
    validate = labels.known("validate")
    optimiser = torch.optim.AdamW(questions.parameters(), lr=LEARNING_RATE)
    best, kept = float("inf"), _copied(questions)

    def logits(some: Int64) -> torch.Tensor:
        at = torch.from_numpy(np.searchsorted(rows, some)).to(states.device)
        return questions.logits(states[at], torch.from_numpy(labels.task[some]).to(states.device))

    for step in range(1, HEAD_STEPS + 1):
        some = _drawn(labels, generator, 4 * STEP_BATCH)
        target = torch.from_numpy(labels.label[some]).to(states.device).float()
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(logits(some), target).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step % (HEAD_STEPS // 20) == 0 and len(validate):
            with torch.no_grad():
                found = torch.sigmoid(logits(validate).double()).cpu().numpy()
            if (now := log_loss(labels.label[validate], found)) < best:
                best, kept = now, _copied(questions)
    if len(validate):
        log(f"heads: log loss {best:.4f} on validation")
        questions.load_state_dict(kept)


def _copied(questions: Questions) -> Mapping[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in questions.state_dict().items()}
