"""The training loop: steps, log, validation, checkpoints; killed at any step, it goes on as if it had not been.

Choices that are not obvious:
- The random state of a step is a function of (seed, step, rank), set anew before each step. So dropout after a resume
  is that of the uninterrupted run, and validation cannot disturb it.
- The averages that are open at a checkpoint are stored with it, so that the next line of the log is the same too.
- On a GPU nothing waits for the device between two lines of the log; a NaN is then found at the next line, but its step
  is named, and it never reaches a checkpoint.

Shapes: K objective terms.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from lum_ray.artifacts import UserError, join, write_json
from lum_ray.config import Train
from lum_ray.stage import Stage
from lum_ray.training.checkpoint import STATE, Resumed, Writer, resume
from lum_ray.training.collectives import broadcast, gather_columns
from lum_ray.training.engine import Engine, Outcome
from lum_ray.training.saved import Saved
from lum_ray.training.settings import EngineSettings, uses_bf16
from lum_ray.training.telemetry import ProgressLine, Telemetry, Window
from lum_ray.weights import MODEL

Arrays = Mapping[str, npt.NDArray[Any]]
Metrics = dict[str, float]
Validation = Callable[[torch.nn.Module], Mapping[str, float]]
DIVERGED = "diverged.json"
"""Beside the checkpoint: the step whose loss was not finite, and its users."""
LOWER_IS_BETTER = ("loss", "wmape")


CPU = torch.device("cpu")


class DivergedError(UserError):
    """The objective or its gradient is not finite. Every rank raises it at the same step."""


class StoppedError(Exception):
    """The run was asked to stop (`Worker.stop`), and has saved its state: the same call goes on from there."""


class LoaderStep(Protocol):
    """One rank's share of a global step. `index` counts steps from 0."""

    @property
    def index(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def micro_batches(self) -> Sequence[Arrays]: ...


class Loader(Protocol):
    """`seek(n)` gives the steps from number n (0-based) on; each rank gets the same number of micro-batches a step."""

    def seek(self, step: int) -> Iterable[LoaderStep]: ...


@dataclass(frozen=True)
class Worker:
    """A process of the run. `report` hears of every validation and of the end, on every rank, with the same figures;
    `log` hears on rank 0 of every line of the log.

    `stop` is asked before each step; as soon as one rank's says yes, all finish the step, save it, and raise
    `StoppedError`.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    report: Callable[[Mapping[str, float]], None] = lambda metrics: None
    log: Callable[[Mapping[str, float]], None] = lambda metrics: None
    stop: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Watch:
    """Who looks on while a run trains: a search, which prunes and has a budget.

    `report` hears of each validation in the process of a run of one worker; the group of a run of several is watched by
    `callbacks` of Ray Train. `stop`: see `Worker`; it travels to the workers.
    """

    report: Callable[[Mapping[str, float]], None] | None = None
    stop: Callable[[], bool] | None = None
    callbacks: tuple[Any, ...] = ()

    def unheard(self) -> Watch:
        """The same for a phase whose figures say nothing about the whole."""
        return Watch(lambda metrics: None, self.stop)


@dataclass
class _Progress:
    """What a resumed run must know beside the weights; `best_value` is None before the first validation."""

    step: int = 0
    best_value: float | None = None
    best_step: int = 0
    without_gain: int = 0
    metrics: Metrics = field(default_factory=dict)
    finished: bool = False
    stopped_early: bool = False


def lower_is_better(name: str) -> bool:
    """Whether a validation's metric is an error: its first word says so (`eval/loss`, `eval/wmape_<behaviour>`)."""
    return name.removeprefix("eval/").split("_")[0] in LOWER_IS_BETTER


def train_loop(
    stage: Stage,
    loader: Loader,
    validation: Validation | None,
    settings: Train,
    place: str,
    worker: Worker | None = None,
    log_every: int = 10,
) -> dict[str, Any]:
    """Train `stage` to `settings.steps`, going on from `<place>/last` if it is there.

    `validation(module)` runs on every rank each `validate_every` steps and after the last; rank 0's metrics count.
    With `patience` n the run stops after n validations in a row without a new best `keep_best`. Without a validation
    the best weights are the last. Returns step, best_step, best_value, metrics, stopped_early, resumed_from, uri, the
    same on every rank. Ctrl-C and SIGTERM finish the step and save it, then raise KeyboardInterrupt or SystemExit(143);
    `worker.stop` does so with `StoppedError`.
    Raises UserError where the objective is not finite (`DivergedError`), `keep_best` is not among the metrics, or the
    checkpoint cannot be resumed.
    """
    worker = worker or Worker()
    resumed = resume(place)
    found = resumed.step if resumed else 0
    if (agreed := broadcast(found)) != found:
        raise RuntimeError(f"{place}: rank 0 resumes at step {agreed}, rank {worker.rank} at {found}")
    torch.manual_seed(settings.seed)
    optimise = _engine_settings(settings)
    engine = Engine.start(
        stage.module, stage.trainable(), stage.loss, optimise, worker.device, worker.rank, worker.world,
        _saved(place, resumed),
    )  # fmt: skip
    try:
        return _Run(stage, loader, validation, settings, place, worker, engine, log_every).run(resumed)
    finally:
        engine.close()


def _saved(place: str, resumed: Resumed | None) -> Saved | None:
    """What the engine goes on from; None where there is nothing to go on with."""
    if resumed is None or resumed.loop["progress"]["finished"]:
        return None
    path = os.path.join(resumed.folder, STATE)
    if not os.path.exists(path):
        raise UserError(f"{place}: a checkpoint of an earlier version of lum_ray; train anew with --fresh")
    return Saved(resumed.step, load_file(os.path.join(resumed.folder, MODEL)), load_file(path))


def _engine_settings(settings: Train) -> EngineSettings:
    return EngineSettings(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_share=settings.warmup_share,
        clip_norm=settings.clip_norm,
        ema=settings.ema,
        zero_stage=settings.zero_stage,
        precision=settings.precision,
    )


class _Run:
    def __init__(
        self,
        stage: Stage,
        loader: Loader,
        validation: Validation | None,
        settings: Train,
        place: str,
        worker: Worker,
        engine: Engine,
        log_every: int,
    ) -> None:
        self.stage, self.loader, self.validation, self.settings = stage, loader, validation, settings
        self.place, self.worker, self.engine, self.log_every = place, worker, engine, log_every
        self.progress = _Progress()
        self.window = Window(stage.terms, worker.device)
        self.writer = Writer(place, secrets.token_hex(3))
        self.unchecked: list[tuple[int, Outcome, list[str]]] = []
        self.norm = math.nan

    def run(self, resumed: Resumed | None) -> dict[str, Any]:
        if resumed is not None:
            self.progress = _Progress(**resumed.loop["progress"])
            if not self.progress.finished:
                self.window.restore(resumed.loop["window"], self.worker.rank)
            resumed.release()
        start = self.progress.step
        if not self.progress.finished:
            with contextlib.ExitStack() as stack:
                line = stack.enter_context(ProgressLine(self.settings.steps, start, self.worker.rank == 0))
                received = stack.enter_context(_signals())
                telemetry = None
                if self.worker.rank == 0:
                    telemetry = stack.enter_context(contextlib.closing(Telemetry(self.place, start)))
                for note in resumed.notes if resumed else ():
                    line.note(note)
                if start:
                    line.note(f"resumed at step {start} of {self.settings.steps}")
                if self.worker.rank == 0:
                    stack.callback(self.writer.close)
                self._steps(telemetry, line, received)
        return {
            "uri": self.place,
            "step": self.progress.step,
            "best_step": self.progress.best_step,
            "best_value": self.progress.best_value,
            "metrics": self.progress.metrics,
            "stopped_early": self.progress.stopped_early,
            "resumed_from": start,
        }

    def _steps(self, telemetry: Telemetry | None, line: ProgressLine, received: list[int]) -> None:
        settings, progress = self.settings, self.progress
        iterator = iter(self.loader.seek(progress.step))
        try:
            while not progress.finished:
                asked = bool(received) or (self.worker.stop is not None and self.worker.stop())
                votes = self._step(iterator, asked)
                done = progress.step
                final = done == settings.steps
                logs = final or done % self.log_every == 0
                validates = self.validation is not None and (final or done % settings.validate_every == 0)
                saves = final or done % settings.checkpoint_every == 0
                if logs or validates or saves or self.worker.device.type == "cpu":
                    self._check_finite()
                # Reading the votes waits for the device: on a GPU only where the loop waits anyway.
                watched = self.worker.device.type == "cpu" or logs or self.worker.world == 1
                stop = watched and (asked or bool(received) if self.worker.world == 1 else votes.item() > 0)
                metrics: Metrics = self._logged() if logs else {}
                best = self._validate(metrics) if validates else False
                progress.finished = final or progress.stopped_early
                if metrics and telemetry is not None:
                    telemetry.write(done, metrics)
                    self.worker.log({"train/step": done, **metrics})
                line.show(done, metrics)
                best = best or (final and self.validation is None)
                saves = saves or stop or progress.finished
                if saves or best:
                    self._save(last=saves, best=best)
                    if telemetry is not None:
                        telemetry.flush()
                if validates or progress.finished:
                    self.worker.report({"step": done, **metrics})
                if stop and not progress.finished:
                    self.writer.join()
                    if signal.SIGTERM in received:
                        raise SystemExit(128 + signal.SIGTERM)
                    if self.worker.stop is not None and not received:
                        raise StoppedError(f"{self.place}: stopped at step {done} of {settings.steps}")
                    raise KeyboardInterrupt
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def _step(self, iterator: Iterator[LoaderStep], stop: bool) -> torch.Tensor:
        waiting_since = time.monotonic()
        step = next(iterator)
        wait_s = time.monotonic() - waiting_since
        if step.index != self.progress.step:
            raise RuntimeError(f"the loader gave step {step.index} where {self.progress.step} was due")
        self.stage.module.train()
        torch.manual_seed(_stream(self.settings.seed, step.index, self.worker.rank))
        outcome = self.engine.step(step.index, step.micro_batches, stop)
        tokens = float(sum(np.sum(batch["tokens"]) for batch in step.micro_batches if "tokens" in batch))
        self.window.add(outcome, tokens, wait_s)
        self.progress.step += 1
        self.unchecked.append((self.progress.step, outcome, _users(step.micro_batches)))
        return outcome.votes

    def _check_finite(self) -> None:
        """Raises DivergedError on all ranks alike: the norm is the global gradient's, the objectives are summed."""
        figures = torch.stack([torch.stack([o.gradient_norm.double(), o.objective]) for _, o, _ in self.unchecked])
        figures[:, 1] = self.engine.reduce(figures[:, 1].clone())
        for (step, outcome, users), (norm, objective) in zip(self.unchecked, figures.tolist(), strict=True):
            self.norm = norm
            if math.isfinite(norm) and math.isfinite(objective):
                continue
            sums = self.engine.reduce(outcome.sums_K.clone()).tolist()
            terms = [name for name, value in zip(self.stage.terms, sums, strict=True) if not math.isfinite(value)]
            where = ", ".join(terms[:5]) if terms else "none of the terms, only the gradient"
            finite = bool(torch.isfinite(outcome.sums_K).all())
            bad = broadcast([user for part in gather_columns([] if finite else users) or [] for user in part]) or users
            whose = f"; the batch's first users: {', '.join(bad[:5])}, all of them in {DIVERGED}" if bad else ""
            if self.worker.rank == 0:
                write_json(join(self.place, DIVERGED), {"step": step, "terms": terms, "users": bad})
            raise DivergedError(
                f"step {step}: the loss is {objective:g} and the gradient's norm {norm:g} (not finite: {where}){whose}"
                "; look for extreme values in these users' data, or lower train.learning_rate"
            )
        self.unchecked.clear()

    def _logged(self) -> Metrics:
        metrics = self.window.line(self.engine)
        metrics["train/learning_rate"] = self.engine.rate(self.progress.step - 1)
        metrics["train/grad_norm"] = self.norm
        self.window.clear()
        return metrics

    def _validate(self, metrics: Metrics) -> bool:
        """Add the validation's metrics; True if they are the best so far."""
        assert self.validation is not None
        started_at = time.monotonic()
        with self.engine.evaluation() as module:
            found = broadcast({name: float(value) for name, value in self.validation(module).items()})
        metrics |= found
        metrics["time/validate_s"] = time.monotonic() - started_at
        progress, name = self.progress, self.settings.keep_best
        progress.metrics = found
        if name not in found:
            known = ", ".join(sorted(found)) or "no metrics"
            raise UserError(f"train.keep_best: expected one of {known}, got '{name}'")
        sign = -1.0 if lower_is_better(name) else 1.0
        held = progress.best_value
        # A NaN (say, of one class only) is the best only as long as there is nothing else.
        if held is None or math.isnan(held) or sign * found[name] > sign * held:
            progress.best_value, progress.best_step, progress.without_gain = found[name], progress.step, 0
            return True
        progress.without_gain += 1
        spent = 0 < self.settings.patience <= progress.without_gain
        progress.stopped_early = spent and progress.step < self.settings.steps
        return False

    def _save(self, last: bool, best: bool) -> None:
        self.writer.join()
        weights = self.engine.weights()
        loop = {
            "step": self.progress.step,
            "loader": {"step": self.progress.step},
            "rng": {"seed": self.settings.seed, "rule": "a function of (seed, step, rank)"},
            "world": self.worker.world,
            "zero_stage": self.settings.zero_stage,
            "precision": "bf16" if uses_bf16(self.settings.precision, self.worker.device) else "fp32",
            "progress": vars(self.progress).copy(),
            "window": self.window.fold(self.engine),
        }
        state = self.engine.state() if last else None
        if self.worker.rank == 0:
            self.writer.save(self.progress.step, weights, loop, state, best)


def _stream(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _users(micro_batches: Sequence[Arrays]) -> list[str]:
    return [str(user) for batch in micro_batches if "user" in batch for user in batch["user"]]


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The stop signals received so far; a second Ctrl-C ends at once. Only the main thread can listen."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
