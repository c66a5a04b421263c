"""The exact Bayes forecast of a simulated world: what nobody who sees only the history and the calendar can beat.

Filters over (archetype x alive/dormant) with the known parameters: registration day, age group and the active days
before the cut are the evidence about activity; purchases and amounts before the cut, independent of them, are the
evidence about the spending level. A user's cohort counts as known; before the treatment window it says nothing.

Suffixes: N users, A archetypes, S states (alive, dormant), D days of the world, C cuts, J days ahead, L levels.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from lum_ray.artifacts import UserError
from lum_ray.data.adapters.worlds import (
    ANNOUNCE_DAYS,
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

ANY_DAYS = 7
BLOCK_USERS = 1024


@dataclass(frozen=True)
class Forecast:
    """Exact forecasts and outcomes. Users not registered before the cut, and outcomes after the data's end, are NaN.

    Shapes (N, C, J) and (N, C), by user, cut and day ahead. `p_active`: P(active on day cut + j). `p_any`: P(active on
    any of the next 7 days). `p_purchase`: P(purchase that day). `amount`: expected spend of that day. `y_*`: what
    happened.
    """

    user: list[str]
    cut: list[int]
    p_active: Array
    p_any: Array
    p_purchase: Array
    amount: Array
    y_active: Array
    y_any: Array
    y_purchase: Array
    y_amount: Array

    def as_predictions(self, model: str = "oracle") -> pa.Table:
        """Rows of a prediction file for the behaviours active, purchase, amount and active_any_7 (day = cut day)."""
        users, cuts, ahead = self.p_active.shape
        shape = (users, cuts, ahead)
        user_NCJ = np.broadcast_to(np.arange(users)[:, None, None], shape)
        cut_NCJ = np.broadcast_to(np.array(self.cut)[None, :, None], shape)
        day_NCJ = cut_NCJ + np.arange(ahead)
        tables = []
        for behaviour, p, mean, y, day in (
            ("active", self.p_active, self.p_active, self.y_active, day_NCJ),
            ("purchase", self.p_purchase, self.p_purchase, self.y_purchase, day_NCJ),
            ("amount", self.p_purchase, self.amount, self.y_amount, day_NCJ),
            (
                f"active_any_{ANY_DAYS}",
                self.p_any[..., None],
                self.p_any[..., None],
                self.y_any[..., None],
                cut_NCJ[..., :1],
            ),
        ):
            keep = ~np.isnan(p)
            count = int(keep.sum())
            index = user_NCJ[..., : p.shape[2]][keep]
            blank = np.full(count, np.nan, np.float32)
            tables.append(
                pa.table(
                    {
                        "user": pa.array(self.user, pa.string()).take(pa.array(index)),
                        "cut_day": cut_NCJ[..., : p.shape[2]][keep].astype(np.int32),
                        "day": day[keep].astype(np.int32),
                        "behaviour": pa.array([behaviour] * count, pa.string()),
                        "p": p[keep].astype(np.float32),
                        "mean": mean[keep].astype(np.float32),
                        "median": blank,
                        "low": blank,
                        "high": blank,
                        "least_mape": blank,
                        "y": y[keep],
                        "model": pa.array([model] * count, pa.string()),
                        "seed": np.zeros(count, np.int32),
                    }
                )
            )
        return pa.concat_tables(tables)


def read_world(dest: str, filesystem: fs.FileSystem) -> World:
    """The world that `simulator.write` wrote to `dest`. Raises UserError where there is none or another version's."""
    name = f"{dest}/truth/parameters.json"
    if filesystem.get_file_info(name).type != fs.FileType.File:
        raise UserError(f"{name}: expected the truth of a simulated world, found nothing; write it with the simulator")
    with filesystem.open_input_stream(name) as stream:
        stored = json.loads(stream.read())
    world = world_of(Options.of(stored["options"]))
    if not np.allclose(stored["base"], world.base, rtol=1e-9) or stored["archetypes"] != list(world.archetypes):
        raise UserError(f"{name}: these parameters are another version's; write the world again with this version")
    return world


def oracle(
    dest: str, filesystem: fs.FileSystem, cuts: Sequence[int], future_days: int, users: Collection[str] | None = None
) -> Forecast:
    """Forecast `future_days` from each cut for `users` (None: all), in the order of the files.

    Raises UserError for a cut outside the world, or a horizon beyond what the calendar announces.
    """
    world = read_world(dest, filesystem)
    wrong = [cut for cut in cuts if not START_DAY < cut <= world.end_day]
    if wrong or not cuts:
        raise UserError(f"oracle: expected cuts in {START_DAY + 1} .. {world.end_day}, got {wrong[:5]}")
    if not 1 <= future_days <= ANNOUNCE_DAYS:
        raise UserError(
            f"oracle: expected future_days in 1 .. {ANNOUNCE_DAYS}, got {future_days} (matches are announced then)"
        )
    wanted = None if users is None else pa.array(sorted(users), pa.string())
    blocks = []
    for shard in range(world.options.shards):
        name = f"{shard:05d}.parquet"
        profiles = pq.read_table(f"{dest}/profiles/{name}", filesystem=filesystem)
        events = pq.read_table(f"{dest}/events/{name}", filesystem=filesystem)
        if wanted is not None:
            profiles = profiles.filter(pc.is_in(profiles["user"], wanted))
            events = events.filter(pc.is_in(events["user"], wanted))
        for first in range(0, profiles.num_rows, BLOCK_USERS):
            blocks.append(_forecast(world, profiles.slice(first, BLOCK_USERS), events, list(cuts), future_days))
    if not blocks:
        raise UserError(
            f"oracle: none of the {0 if wanted is None else len(wanted)} users asked for is in {dest}/profiles"
        )
    arrays = {
        name: np.concatenate([getattr(block, name) for block in blocks])
        for name in Forecast.__dataclass_fields__
        if name not in ("user", "cut")
    }
    return Forecast([user for block in blocks for user in block.user], list(cuts), **arrays)


def _forecast(world: World, profiles: pa.Table, events: pa.Table, cut_C: list[int], future_days: int) -> Forecast:
    user_N = profiles["user"].to_pylist()
    active_ND, amount_ND = _history(world, profiles["user"].combine_chunks(), events)
    registered_N = profiles["registered"].cast(pa.int32()).to_numpy() - START_DAY
    treated_N = np.array(
        [cohort_of(user, world.options.cohorts, world.options.salt) == TREATED_COHORT for user in user_N], np.int64
    )
    prior_NA = _archetype_prior(world, profiles)
    belief_NCAS = _filter(world, active_ND, registered_N, treated_N, prior_NA, cut_C)
    p_active_NCJ, p_any_NC = _ahead(world, belief_NCAS, treated_N, cut_C, future_days)
    level_NCL = _level_posterior(world, active_ND, amount_ND, cut_C)
    rate_NC = level_NCL @ world.purchase
    spend_NC = level_NCL @ (world.purchase * np.exp(world.log_amount + LOG_AMOUNT_SD**2 / 2))
    unknown_NC = registered_N[:, None] >= np.array(cut_C)[None, :] - START_DAY
    p_active_NCJ[unknown_NC] = np.nan
    p_any_NC[unknown_NC] = np.nan
    y_active_NCJ = _outcomes(active_ND.astype(np.float64), cut_C, future_days)
    y_any_NC = _outcomes(active_ND.astype(np.float64), cut_C, ANY_DAYS).max(axis=2)  # NaN where a day is unknown
    return Forecast(
        user=user_N,
        cut=cut_C,
        p_active=p_active_NCJ,
        p_any=p_any_NC,
        p_purchase=p_active_NCJ * rate_NC[..., None],
        amount=p_active_NCJ * spend_NC[..., None],
        y_active=y_active_NCJ,
        y_any=y_any_NC,
        y_purchase=_outcomes((amount_ND > 0).astype(np.float64), cut_C, future_days),
        y_amount=_outcomes(amount_ND, cut_C, future_days),
    )


def _history(world: World, users: pa.Array, events: pa.Table) -> tuple[npt.NDArray[np.bool_], Array]:
    row = pc.index_in(events["user"], value_set=users)
    mine = pc.is_valid(row)
    row_M = row.filter(mine).to_numpy()
    day_M = events["time"].filter(mine).cast(pa.int64()).to_numpy() // 86_400_000_000 - START_DAY
    active_ND = np.zeros((len(users), world.options.days), np.bool_)
    amount_ND = np.zeros((len(users), world.options.days))
    active_ND[row_M, day_M] = True
    np.add.at(amount_ND, (row_M, day_M), events["amount"].filter(mine).to_numpy())
    return active_ND, amount_ND


def _archetype_prior(world: World, profiles: pa.Table) -> Array:
    """P(archetype | age group); an unknown age group says nothing."""
    group = pc.index_in(profiles["age_group"], value_set=pa.array(DEMOGRAPHICS))
    group_N = group.fill_null(-1).to_numpy()
    likelihood_NA = np.where(group_N[:, None] < 0, 1.0, world.demographic.T[np.maximum(group_N, 0)])
    joint_NA = likelihood_NA * world.prior
    return np.asarray(joint_NA / joint_NA.sum(1, keepdims=True), np.float64)


def _step(world: World, alive_NA: Array, dormant_NA: Array) -> tuple[Array, Array]:
    die_NA, revive_NA = alive_NA * world.die, dormant_NA * world.revive
    return alive_NA - die_NA + revive_NA, dormant_NA - revive_NA + die_NA


def _filter(
    world: World,
    active_ND: npt.NDArray[np.bool_],
    registered_N: npt.NDArray[Any],
    treated_N: npt.NDArray[np.int64],
    prior_NA: Array,
    cut_C: list[int],
) -> Array:
    """P(archetype, state on the cut day | everything before it), for each cut."""
    p_DTA = np.stack([world.active(False).T, world.active(True).T], axis=1)
    alive_NA, dormant_NA = prior_NA.copy(), np.zeros_like(prior_NA)
    belief_NCAS = np.empty((len(prior_NA), len(cut_C), prior_NA.shape[1], 2))
    places: dict[int, list[int]] = {}
    for c, cut in enumerate(cut_C):
        places.setdefault(cut - START_DAY, []).append(c)
    for day in range(max(places) + 1):
        for c in places.get(day, []):
            belief_NCAS[:, c, :, 0], belief_NCAS[:, c, :, 1] = alive_NA, dormant_NA
        if day == world.options.days:
            break
        p_NA = p_DTA[day][treated_N]
        active_N1 = active_ND[:, day, None]
        seen_alive_NA = alive_NA * np.where(active_N1, p_NA, 1 - p_NA)
        seen_dormant_NA = np.where(active_N1, 0.0, dormant_NA)
        total_N1 = (seen_alive_NA + seen_dormant_NA).sum(1, keepdims=True)
        next_alive_NA, next_dormant_NA = _step(world, seen_alive_NA / total_N1, seen_dormant_NA / total_N1)
        registered_N1 = (registered_N <= day)[:, None]
        alive_NA = np.where(registered_N1, next_alive_NA, alive_NA)
        dormant_NA = np.where(registered_N1, next_dormant_NA, dormant_NA)
    return belief_NCAS


def _ahead(
    world: World, belief_NCAS: Array, treated_N: npt.NDArray[np.int64], cut_C: list[int], future_days: int
) -> tuple[Array, Array]:
    """P(active) per day ahead, and P(active on any of the next 7 days); NaN after the world's end."""
    p_DTA = np.stack([world.active(False).T, world.active(True).T], axis=1)
    p_active_NCJ = np.full((*belief_NCAS.shape[:2], future_days), np.nan)
    p_any_NC = np.full(belief_NCAS.shape[:2], np.nan)
    for c, cut in enumerate(cut_C):
        alive_NA, dormant_NA = belief_NCAS[:, c, :, 0], belief_NCAS[:, c, :, 1]
        quiet_alive_NA, quiet_dormant_NA = alive_NA, dormant_NA
        for j in range(min(max(future_days, ANY_DAYS), world.end_day - cut)):
            p_NA = p_DTA[cut - START_DAY + j][treated_N]
            if j < future_days:
                p_active_NCJ[:, c, j] = (alive_NA * p_NA).sum(1)
            alive_NA, dormant_NA = _step(world, alive_NA, dormant_NA)
            quiet_alive_NA, quiet_dormant_NA = _step(world, quiet_alive_NA * (1 - p_NA), quiet_dormant_NA)
            if j == ANY_DAYS - 1:
                p_any_NC[:, c] = 1 - (quiet_alive_NA + quiet_dormant_NA).sum(1)
    return p_active_NCJ, p_any_NC


def _level_posterior(world: World, active_ND: npt.NDArray[np.bool_], amount_ND: Array, cut_C: list[int]) -> Array:
    """P(spending level | purchases before each cut); amounts by their density, the rounding to 0.01 is neglected."""
    bought_ND = amount_ND > 0
    log_amount_ND = np.log(np.where(bought_ND, amount_ND, 1.0))
    result_NCL = np.empty((len(active_ND), len(cut_C), len(world.level_share)))
    for level, share in enumerate(world.level_share):
        rate, mean = world.purchase[level], world.log_amount[level]
        density_ND = np.log(rate) - 0.5 * ((log_amount_ND - mean) / LOG_AMOUNT_SD) ** 2
        score_ND = np.where(bought_ND, density_ND, np.where(active_ND, np.log(1 - rate), 0.0))
        before_ND = np.concatenate([np.zeros((len(score_ND), 1)), np.cumsum(score_ND, axis=1)], axis=1)
        result_NCL[:, :, level] = np.log(share) + before_ND[:, np.array(cut_C) - START_DAY]
    result_NCL = np.exp(result_NCL - result_NCL.max(2, keepdims=True))
    return np.asarray(result_NCL / result_NCL.sum(2, keepdims=True), np.float64)


def _outcomes(value_ND: Array, cut_C: list[int], future_days: int) -> Array:
    padded_ND = np.concatenate([value_ND, np.full((len(value_ND), future_days), np.nan)], axis=1)
    return padded_ND[:, np.array(cut_C)[:, None] - START_DAY + np.arange(future_days)]
