"""A simulated population of any size, written shard by shard, whose probabilities are known (worlds.py, oracle.py).

Tables written:
- events: user, time (UTC, to the second; the run's time zone is UTC), kind, amount. On an active day 1 + Poisson(0.8)
  events of the kinds browse, search, message, play with amount 0, and with the spending level's probability one
  `purchase` with a log-normal amount in steps of 0.01 (0.01 at least).
- profiles: user, registered (date), age_group (a noisy sign of the weekly rhythm, null for one user in ten), country
  (noise).
- calendar: global rows, festivals known always, matches from 30 days before on.
- truth/: what runs must not read: parameters.json and, per shard, each user's archetype, level, cohort.

A shard's content depends on the options and its number only; memory is bounded by a block of 1,024 users.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from lum_ray.artifacts import UserError
from lum_ray.data.adapters.worlds import (
    DEMOGRAPHIC_MISSING,
    DEMOGRAPHICS,
    LOG_AMOUNT_SD,
    START_DAY,
    TREATED_COHORT,
    Array,
    Options,
    World,
    cohort_of,
    world_of,
)

BLOCK_USERS = 1024
KINDS = ("browse", "search", "message", "play", "purchase")
KIND_SHARES = (0.45, 0.25, 0.2, 0.1)
COUNTRIES = ("DE", "ES", "FR", "NL")
DAY_SECONDS = 86_400
EVENTS = pa.schema(
    [("user", pa.string()), ("time", pa.timestamp("us", "UTC")), ("kind", pa.string()), ("amount", pa.float64())]
)
PROFILES = pa.schema(
    [("user", pa.string()), ("registered", pa.date32()), ("age_group", pa.string()), ("country", pa.string())]
)
STATES = pa.schema([("user", pa.string()), ("archetype", pa.string()), ("level", pa.int32()), ("cohort", pa.string())])


def write(dest: str, filesystem: fs.FileSystem, path: str | None, options: Mapping[str, Any]) -> None:
    """Write events/, profiles/, calendar/ and truth/ under `dest`. `options`: see `worlds.Options`.

    Raises UserError for an unknown option, a value out of range, or a `path`.
    """
    if path is not None:
        raise UserError(f"simulator: expected no path, it reads nothing; got {path}; remove it from the run file")
    world = world_of(Options.of(options))
    for folder in ("events", "profiles", "calendar", "truth/states"):
        filesystem.create_dir(f"{dest}/{folder}", recursive=True)
    pq.write_table(_calendar(world), f"{dest}/calendar/0000.parquet", filesystem=filesystem, compression="zstd")
    with filesystem.open_output_stream(f"{dest}/truth/parameters.json") as stream:
        stream.write(json.dumps(world.to_json(), indent=1).encode())
    for shard in range(world.options.shards):
        write_shard(dest, filesystem, world, shard)


def write_shard(dest: str, filesystem: fs.FileSystem, world: World, shard: int) -> None:
    """Write one shard's files; shards may be written in any order or in parallel, the folders must be there."""
    name = f"{shard:05d}.parquet"
    with (
        pq.ParquetWriter(f"{dest}/events/{name}", EVENTS, filesystem=filesystem, compression="zstd") as events,
        pq.ParquetWriter(f"{dest}/profiles/{name}", PROFILES, filesystem=filesystem, compression="zstd") as profiles,
        pq.ParquetWriter(f"{dest}/truth/states/{name}", STATES, filesystem=filesystem, compression="zstd") as states,
    ):
        for block in _blocks(world, shard):
            for writer, table in zip((events, profiles, states), block, strict=True):
                writer.write_table(table)


def _blocks(world: World, shard: int) -> Iterator[tuple[pa.Table, pa.Table, pa.Table]]:
    options = world.options
    rng = np.random.default_rng([options.seed, 1, shard])
    p_TAD = np.stack([world.active(treated=False), world.active(treated=True)])
    end = (shard + 1) * options.users // options.shards
    for first in range(shard * options.users // options.shards, end, BLOCK_USERS):
        users = [f"u{number:09d}" for number in range(first, min(first + BLOCK_USERS, end))]
        yield _block(world, rng, users, p_TAD)


def _block(
    world: World, rng: np.random.Generator, users: list[str], p_TAD: Array
) -> tuple[pa.Table, pa.Table, pa.Table]:
    count, days = len(users), world.options.days
    archetype_N = rng.choice(len(world.prior), count, p=world.prior)
    level_N = rng.choice(len(world.level_share), count, p=world.level_share)
    registered_N = rng.choice(days, count, p=world.registration())
    cumulative_AG = np.cumsum(world.demographic, axis=1)
    group_N = np.minimum((rng.random(count)[:, None] >= cumulative_AG[archetype_N]).sum(1), len(DEMOGRAPHICS) - 1)
    missing_N = rng.random(count) < DEMOGRAPHIC_MISSING
    country_N = rng.integers(0, len(COUNTRIES), count)
    cohorts = [cohort_of(user, world.options.cohorts, world.options.salt) for user in users]
    treated_N = np.array([cohort == TREATED_COHORT for cohort in cohorts], np.int64)

    alive_ND = _alive_days(world, rng, archetype_N, registered_N)
    active_ND = alive_ND & (rng.random((count, days)) < p_TAD[treated_N, archetype_N])
    row_K, day_K = np.nonzero(active_ND)
    level_K = level_N[row_K]
    others_K = 1 + rng.poisson(0.8, len(row_K))
    buys_K = rng.random(len(row_K)) < world.purchase[level_K]
    amount_K = np.exp(world.log_amount[level_K] + LOG_AMOUNT_SD * rng.standard_normal(len(row_K)))
    amount_K = np.where(buys_K, np.maximum(np.round(amount_K, 2), 0.01), 0.0)

    # A user's day is its other events, then its purchase if there is one; the time of day is drawn for each.
    events_K = others_K + buys_K
    index_M = np.repeat(np.arange(len(row_K)), events_K)
    kind_M = rng.choice(len(KIND_SHARES), len(index_M), p=KIND_SHARES)
    amount_M = np.zeros(len(index_M))
    purchase = np.cumsum(events_K)[buys_K] - 1
    kind_M[purchase] = KINDS.index("purchase")
    amount_M[purchase] = amount_K[buys_K]
    second_M = (START_DAY + day_K[index_M]) * DAY_SECONDS + rng.integers(0, DAY_SECONDS, len(index_M))

    names = pa.array(users)
    events = pa.table(
        {
            "user": names.take(pa.array(row_K[index_M])),
            "time": pa.array(second_M * 1_000_000, pa.timestamp("us", "UTC")),
            "kind": pa.array(KINDS).take(pa.array(kind_M)),
            "amount": amount_M,
        },
        schema=EVENTS,
    )
    profiles = pa.table(
        {
            "user": names,
            "registered": pa.array((START_DAY + registered_N).astype(np.int32)).cast(pa.date32()),
            "age_group": pa.array(DEMOGRAPHICS).take(pa.array(group_N, mask=missing_N)),
            "country": pa.array(COUNTRIES).take(pa.array(country_N)),
        },
        schema=PROFILES,
    )
    archetypes = pa.array(world.archetypes).take(pa.array(archetype_N))
    states = pa.table(
        {"user": names, "archetype": archetypes, "level": level_N.astype(np.int32), "cohort": cohorts}, schema=STATES
    )
    return events, profiles, states


def _alive_days(
    world: World,
    rng: np.random.Generator,
    archetype_N: np.ndarray[Any, np.dtype[np.int64]],
    registered_N: np.ndarray[Any, np.dtype[np.int64]],
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each user is registered and alive on each day: alive on the day of registration, then a chain."""
    alive_ND = np.zeros((len(archetype_N), world.options.days), np.bool_)
    die_N, revive_N = world.die[archetype_N], world.revive[archetype_N]
    alive_N = np.zeros(len(archetype_N), np.bool_)
    for day in range(world.options.days):
        draw_N = rng.random(len(archetype_N))
        alive_N = np.where(alive_N, draw_N >= die_N, draw_N < revive_N) & (registered_N < day) | (registered_N == day)
        alive_ND[:, day] = alive_N
    return alive_ND


def _calendar(world: World) -> pa.Table:
    rows = world.calendar
    known = pa.array([row.known_at for row in rows], pa.int32()).cast(pa.date32())
    return pa.table(
        {
            "scope": pa.array(["global"] * len(rows), pa.string()),
            "key": pa.nulls(len(rows), pa.string()),
            "start_day": pa.array([row.start for row in rows], pa.int32()).cast(pa.date32()),
            "end_day": pa.array([row.end for row in rows], pa.int32()).cast(pa.date32()),
            "event_type": pa.array([row.event_type for row in rows], pa.string()),
            "value": pa.nulls(len(rows), pa.float64()),
            "known_at": known,
        }
    )
