"""Where the metrics of a run go: `metrics.jsonl` beside the checkpoint, TensorBoard, the progress line on stderr.

A resumed run cuts away the lines after the step that it resumes from, so that the file ends up equal to that of an
uninterrupted run, save for the fields that read a clock (`is_wall_clock`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lum_ray.artifacts import join, read_bytes, storage, write_bytes

METRICS = "metrics.jsonl"
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
    """Writes metrics of rank 0. `resumed` is the number of steps done before (0: a new run, whose file starts empty)."""

    def __init__(self, uri: str, resumed: int) -> None:
        self.uri, self.notes = uri, list[str]()
        self._lines = [json.dumps(line) for line in read_metrics(uri) if line["step"] <= resumed]
        self._place = storage(join(uri, METRICS))
        self.flush(whole=True)
        self._file = open(self._place.path, "a", encoding="utf-8") if self._place.is_local else None
        self._board: Any = None
        if self._place.is_local:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(storage(join(uri, "tensorboard")).path, purge_step=resumed + 1)  # type: ignore[no-untyped-call]
        else:
            self.notes.append(f"{uri}: no TensorBoard files in an object store; see {METRICS}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for `step` (the number of steps done)."""
        line = json.dumps({"step": step, **metrics})
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def flush(self, whole: bool = False) -> None:
        """Make what was written last: an object store gets the whole file anew (a checkpoint calls this)."""
        if whole or self._file is None:
            write_bytes(join(self.uri, METRICS), "".join(line + "\n" for line in self._lines).encode())

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


class ProgressLine:
    """Steps done and the newest figures on stderr: a bar in a terminal, else a line every 30 s. Silent if not `shown`."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self._total, self._shown, self._text = total, shown, ""
        self._printed_at = time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if shown and console.is_terminal:
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("train", total=total, completed=done, text="")

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        if metrics:
            known = {name: value for name, value in metrics.items() if name in ("train/loss", "train/tokens_per_s") or name.startswith("eval/")}
            self._text = "  ".join(f"{name} {value:.4g}" for name, value in list(known.items())[:4])
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
