"""The memory of a process tree and of its Ray session: summed PSS, in which a shared page counts once."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

GIB = 2**30


class PeakMemory:
    """Samples within a `with` block, every `every_s`; `bytes` is the largest sum that was seen.

    Counted: this process, all below it, and whatever runs for the Ray session `session` (a folder's name, which stands
    in the command lines of its processes); left out: the processes `without` and what is below them. Linux only.
    """

    def __init__(self, session: str = "", without: Collection[int] = (), every_s: float = 0.25) -> None:
        self.bytes = 0
        self._session, self._without, self._every_s = session, frozenset(without), every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, sum(pss(pid) for pid in self._processes()))
            if self._over.wait(self._every_s):
                return

    def _processes(self) -> set[int]:
        below: dict[int, list[int]] = {}
        found: set[int] = set()
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                status, command = _read(f"/proc/{entry}/stat"), _read(f"/proc/{entry}/cmdline")
                if status:
                    below.setdefault(int(status.rsplit(")", 1)[1].split()[1]), []).append(int(entry))
                if self._session and self._session in command:
                    found.add(int(entry))
        waiting = [os.getpid(), *found]
        found = set()
        while waiting:
            pid = waiting.pop()
            if pid not in self._without and pid not in found:
                found.add(pid)
                waiting += below.get(pid, [])
        return found


def pss(pid: int) -> int:
    """A process's proportional set size in bytes, 0 where it is gone."""
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is another user's
        return ""
