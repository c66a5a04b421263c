"""A driver of prepare in a process of its own, to be killed: `python -m tests.data.prepare_driver EVENTS PROFILES URI`.

Prints `go` before it starts and `done` after; what a user can mend goes to stderr, with the exit code 1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from lum_ray.artifacts import UserError
from lum_ray.config import Behaviour, Data, Profiles
from lum_ray.data import buckets
from lum_ray.data.prepare import Tokenizer, prepare_timelines
from lum_ray.data.raw import RawTables
from lum_ray.lumos import timelines

DATA = Data(
    behaviours=(
        Behaviour("active", "binary", "count()"),
        Behaviour("spend", "continuous", "sum(price)", 0.01, "active"),
        Behaviour("shops", "count", "n_unique(shop)"),
    ),
    profiles=Profiles(numbers=("age",), categories=("town",)),
    max_reject_share=0.01,
)
TASK_S = 0.02
"""What every map and merge takes at least, so that there is a middle to be killed in."""


def prepare(events: str, profiles: str, uri: str, engine: Any = "local") -> None:
    """About 25 tasks."""

    # local functions, so that they travel to Ray's workers by value
    def partial(table: pa.Table, behaviours: Sequence[Any]) -> pa.Table:
        time.sleep(TASK_S)
        return timelines.partial(table, behaviours)

    def merge(states: Sequence[pa.Table], behaviours: Sequence[Any]) -> pa.Table:
        time.sleep(TASK_S)
        return timelines.merge(states, behaviours)

    file_rows, buckets.FILE_ROWS = buckets.FILE_ROWS, 400
    try:
        tokenizer = Tokenizer(partial, merge, timelines.TOKENIZER_VERSION)
        prepare_timelines(DATA, RawTables(events, profiles), uri, tokenizer, engine, ["print"], block_rows=200)
    finally:
        buckets.FILE_ROWS = file_rows


if __name__ == "__main__":
    print("go", flush=True)
    try:
        prepare(*sys.argv[1:4])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    print("done", flush=True)
