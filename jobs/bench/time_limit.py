"""A benchmark's --max-minutes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def time_limit(minutes: float) -> Iterator[list[str]]:
    """Leave the block after so many minutes (0: never), as Ctrl-C would: training saves its state first.

    Yields a list; where the time was over it says so. For the main thread alone.
    """
    over: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        over.append(f"{minutes:g} minutes are over")
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, stop)
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.SIG_IGN:  # a shell starts what runs in the background so, and the limit would be ignored too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, minutes * 60)
    try:
        yield over
    except KeyboardInterrupt:
        if not over:
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGINT, interrupt)
