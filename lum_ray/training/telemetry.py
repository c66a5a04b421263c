"""Where the metrics of a run go: `metrics.jsonl` beside the checkpoint, TensorBoard, the progress line on stderr.

A resumed run cuts away the lines after the step that it resumes from, so that the file ends up equal to that of an
uninterrupted run, save for the fields that read a clock (`is_wall_clock`).

Shapes: K objective terms.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lum_ray.artifacts import join, read_bytes, storage, upload, write_bytes
from lum_ray.training.engine import Engine, Outcome

METRICS, BOARD = "metrics.jsonl", "tensorboard"
LINE_EVERY_S = 30.0


def is_wall_clock(name: str) -> bool:
    """Whether a metric depends on the clock, and so differs between a resumed and an uninterrupted run."""
    return name.startswith("time/") or name.endswith(("_per_s", "_s"))


def read_metrics(uri: str) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line that was cut off by a crash is left out."""
    try:
        text = read_bytes(join(uri, METRICS)).decode()
    except FileNotFoundError:
        return []
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


class Telemetry:
    """Writes metrics of rank 0. `resumed` is the number of steps done before (0: a new run, whose file is new)."""

    def __init__(self, uri: str, resumed: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.uri = uri
        self._lines = [json.dumps(line) for line in read_metrics(uri) if line["step"] <= resumed]
        self._place = storage(join(uri, METRICS))
        self._write_lines()
        # TensorBoard appends to its file, which an object store cannot: there it is written here, and copied
        self._copied = None if self._place.is_local else tempfile.TemporaryDirectory(prefix="lum-ray-tensorboard-")
        folder = self._copied.name if self._copied else storage(join(uri, BOARD)).path
        self._board = SummaryWriter(folder, purge_step=resumed + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for `step` (the number of steps done)."""
        line = json.dumps({"step": step, **metrics})
        if self._place.is_local:
            with open(self._place.path, "a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        else:
            self._lines.append(line)
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Make what was written last: an object store gets the whole files anew (a checkpoint calls this)."""
        if self._copied is None:
            return
        self._write_lines()
        self._board.flush()
        for name in os.listdir(self._copied.name):
            upload(os.path.join(self._copied.name, name), join(self.uri, BOARD, name))

    def _write_lines(self) -> None:
        write_bytes(join(self.uri, METRICS), "".join(line + "\n" for line in self._lines).encode())

    def close(self) -> None:
        self.flush()
        self._board.close()
        if self._copied:
            self._copied.cleanup()


class ProgressLine:
    """Steps done and the newest figures on stderr: a bar in a terminal, else a line every 30 s."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self._total, self._shown, self._text = total, shown, ""
        self._printed_at = time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if shown and console.is_terminal:
            text = TextColumn("{task.fields[text]}")
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text)
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("train", total=total, completed=done, text="")

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        if metrics:
            shown = [name for name in metrics if name.startswith(("train/loss", "train/tokens", "eval/"))]
            shown = [name for name in shown if not name.startswith("train/loss_")][:4]
            self._text = "  ".join(f"{name} {metrics[name]:.4g}" for name in shown)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text)
        elif self._shown and time.monotonic() - self._printed_at > LINE_EVERY_S:
            self._printed_at = time.monotonic()
            print(f"train: step {step} of {self._total}  {self._text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line of its own that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)


class Window:
    """The averages since the last line of the log. Sums are this rank's until `fold`."""

    def __init__(self, terms: Sequence[str], device: torch.device) -> None:
        self.terms, self.device = terms, device
        self.clear()

    def clear(self) -> None:
        self.steps, self.wait_s, self.started_at = 0, 0.0, time.monotonic()
        self.clock_steps, self.clock_tokens = 0, 0.0
        self.counts_K = torch.zeros(len(self.terms), dtype=torch.float64, device=self.device)
        self.sums = torch.zeros(len(self.terms) + 1, dtype=torch.float64, device=self.device)

    def add(self, outcome: Outcome, tokens: float, wait_s: float) -> None:
        self.steps += 1
        self.clock_steps += 1
        self.clock_tokens += tokens
        self.wait_s += wait_s
        self.counts_K += outcome.counts_K
        self.sums[:-1] += outcome.sums_K
        self.sums[-1] += outcome.objective

    def fold(self, engine: Engine) -> dict[str, Any]:
        """Bring the sums of all ranks to rank 0 (the others start from 0), and give them as plain values."""
        total = engine.reduce(self.sums)
        self.sums = total.clone() if engine.rank == 0 else torch.zeros_like(total)
        return {"steps": self.steps, "counts": self.counts_K.tolist(), "sums": total.tolist()}

    def restore(self, plain: Mapping[str, Any], rank: int) -> None:
        self.steps = plain["steps"]
        self.counts_K += torch.tensor(plain["counts"], dtype=torch.float64, device=self.device)
        if rank == 0:
            self.sums += torch.tensor(plain["sums"], dtype=torch.float64, device=self.device)

    def line(self, engine: Engine) -> dict[str, float]:
        """The averages as metrics; every rank must call it. Tokens per second are those of all ranks."""
        clock = torch.tensor([self.clock_tokens], dtype=torch.float64, device=self.device)
        *sums, objective, tokens = engine.reduce(torch.cat([self.sums, clock])).tolist()
        seconds = max(time.monotonic() - self.started_at, 1e-9)
        result = {"train/loss": objective / self.steps}
        for name, total, count in zip(self.terms, sums, self.counts_K.tolist(), strict=True):
            if count > 0:
                result[f"train/loss_{name}"] = total / count
        if tokens:
            result["train/tokens_per_s"] = tokens / seconds
        result["data/wait_s"] = self.wait_s / max(1, self.clock_steps)
        result["time/step_s"] = seconds / max(1, self.clock_steps)
        return result
