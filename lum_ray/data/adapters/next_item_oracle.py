"""The exact Bayes ranking of a planted world (next_item.py): P(item is in a user's next instant | the history).

Everything comes from the options, by the code that makes the world; nothing is estimated from data. When the next
instant will be is not known, nor does it matter: what comes next depends on the last instant.

A user's favourites are latent. `planted` knows them, which nobody who sees only the data can; `inferred` has their
exact posterior, and is what nobody who sees only the data can beat. With c_i of a user's F favourites equal to i, the
history's likelihood is a product over items of g_i(c_i): an instant with one item i is a_k(i) + FAVOURITE c_i / F,
where a_k is the rest, which the instant before tells, and a basket says nothing of favourites. The prior is
multinomial, so that sums over favourites are coefficients of products of polynomials sum_c g_i(c) z^c / (c! N^c).

Without time the parts of the day have the shares with which the world plants them: over all instants and, for the last
instant, before the start of a day. The order of a user's items says a little more about the hour, which is left out: a
filter over the hidden hours gains 0.004 in R@10 (default options, planted favourites).

Suffixes: B users, N items (places in the catalogue), E events, I instants, C parts of the day, F favourites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lum_ray.artifacts import UserError
from lum_ray.data.adapters.next_item import (
    COMPANIONS,
    DAY_US,
    FAVOURITE,
    FAVOURITES,
    LEVELS,
    MAIN,
    PARTS,
    SUCCESSOR,
    TIME_ZONE,
    Array,
    Ints,
    Options,
    World,
    planted_favourites,
    user_names,
    world_of,
)

BLOCK = 256


def oracle_scores(
    options: Options,
    users: Sequence[str],
    offsets: npt.NDArray[np.integer],
    item: npt.NDArray[np.integer],
    time_us: npt.NDArray[np.integer],
    *,
    favourites: Literal["planted", "inferred"] = "inferred",
    with_time: bool = True,
) -> Array:
    """P(item is in the next instant) (B, N) float64, by place in the catalogue. See the top of the file.

    `users` (B,): ids as in the tables. The events that user b has had are offsets[b] .. offsets[b + 1] - 1 of `item`
    (E,), places in the catalogue, and `time_us` (E,), UTC microseconds since 1970, ascending within a user; there may
    be none. A row sums to the expected size of a basket. Raises UserError for another world's users, items or times.
    """
    world = world_of(options)
    offsets_B, item_E, time_E = (np.asarray(values, np.int64) for values in (offsets, item, time_us))
    part_E = _checked(world, users, offsets_B, item_E, time_E)
    scores_BN = np.empty((len(users), options.items))
    for first in range(0, len(users), BLOCK):
        rows = slice(first, min(first + BLOCK, len(users)))
        events = slice(int(offsets_B[rows.start]), int(offsets_B[rows.stop]))
        planted = None
        if favourites == "planted":
            planted = planted_favourites(options, np.array([int(user[1:]) for user in users[rows]], np.int64))
        scores_BN[rows] = _scores(
            world,
            offsets_B[rows.start : rows.stop + 1] - offsets_B[rows.start],
            np.argsort(world.catalogue)[item_E[events]],
            time_E[events],
            part_E[events],
            planted,
            with_time,
        )
    # from the world's count of the items to the catalogue's
    result = np.empty_like(scores_BN)
    result[:, world.catalogue] = scores_BN
    return result


def part_shares() -> tuple[Array, Array]:
    """Shares (C,) of the parts of the day: over all instants, and of the last instant before a day's start.

    Users of all levels and days of the week count alike.
    """
    parts = np.arange(len(PARTS))
    weekend_C, rate_C = np.array([part[1] for part in PARTS]), np.array([part[4] for part in PARTS])
    everywhere_C = rate_C * np.where(weekend_C, 2, 5)
    last_C = np.zeros(len(PARTS))
    for level in LEVELS:
        for weekday in range(7):
            silent = 1.0
            for back in range(1, 200):
                for part in parts[weekend_C == ((weekday - back) % 7 >= 5)][::-1]:
                    last_C[part] += silent * rate_C[part] * level
                    silent *= 1 - rate_C[part] * level
    return everywhere_C / everywhere_C.sum(), last_C / last_C.sum()


def _checked(world: World, users: Sequence[str], offsets_B: Ints, item_E: Ints, time_E: Ints) -> Ints:
    """The part of the day of each event (E,)."""
    options = world.options
    known = set(user_names(0, options.users))
    strange = [user for user in users if user not in known]
    if strange:
        raise UserError(f"oracle: {strange[:5]} are no users of this world, which has {options.users}; check `options`")
    if offsets_B.shape != (len(users) + 1,) or not len(item_E) == len(time_E) == offsets_B[-1] or offsets_B[0]:
        raise UserError(
            f"oracle: expected {len(users) + 1} offsets from 0 to the number of events, got {offsets_B[:5].tolist()} "
            f"for {len(item_E)} items and {len(time_E)} times"
        )
    wrong = item_E[(item_E < 0) | (item_E >= options.items)]
    if len(wrong):
        raise UserError(f"oracle: expected places in a catalogue of {options.items} items, got {wrong[:5].tolist()}")
    row_E = np.repeat(np.arange(len(users)), np.diff(offsets_B))
    back = np.flatnonzero((np.diff(time_E) < 0) & (np.diff(row_E) == 0))
    if len(back):
        raise UserError(
            f"oracle: expected ascending times, they go back at {sorted({users[r] for r in row_E[back]})[:5]}"
        )
    local = pc.local_timestamp(pa.array(time_E, pa.timestamp("us", TIME_ZONE))).cast(pa.int64()).to_numpy()
    weekend_E, minute_E = (local // DAY_US + 3) % 7 >= 5, local % DAY_US // 60_000_000
    part_E = np.full(len(time_E), -1, np.int64)
    for part, (_, weekend, first, end, _) in enumerate(PARTS):
        part_E[(weekend_E == weekend) & (minute_E >= first) & (minute_E < end)] = part
    if (part_E < 0).any():
        raise UserError(f"oracle: times without a part of the day: {time_E[part_E < 0][:5].tolist()}; check `options`")
    return part_E


def _scores(
    world: World,
    offsets_B: Ints,
    item_E: Ints,
    time_E: Ints,
    part_E: Ints,
    planted_BF: Ints | None,
    with_time: bool,
) -> Array:
    """The scores (B, N) of a block of users, items as World counts them."""
    users, items, members = len(offsets_B) - 1, world.options.items, world.members
    row_E = np.repeat(np.arange(users), np.diff(offsets_B))
    if world.options.world == "null":
        return np.broadcast_to(_with_companions(world, world.popularity), (users, items))
    begins_E = np.ones(len(item_E), np.bool_)
    begins_E[1:] = (np.diff(row_E) != 0) | (np.diff(time_E) != 0)
    instant_E = np.cumsum(begins_E) - 1
    size_I = np.bincount(instant_E)
    # the last instant of each user tells the successors
    last_B = np.full(users, -1)
    last_B[row_E] = instant_E
    in_last = np.flatnonzero(instant_E == last_B[row_E])
    weights_LC = _part_weights(part_E[in_last], with_time, 1) / size_I[instant_E[in_last], None]
    to_BN = np.zeros((users, items))
    for part in range(len(PARTS)):
        np.add.at(to_BN, (row_E[in_last], world.successor[part, item_E[in_last]]), weights_LC[:, part])
    successors_BN = _spread(to_BN, members)
    rest = np.where(last_B < 0, 1 - FAVOURITE, 1 - FAVOURITE - SUCCESSOR)
    scores_BN = _with_companions(world, SUCCESSOR * successors_BN + rest[:, None] * world.popularity)
    if planted_BF is None:
        counts_BN = _posterior(world, row_E, item_E, instant_E, size_I, part_E, users, with_time)
    else:
        counts_BN = np.zeros((users, items))
        np.add.at(counts_BN, (np.arange(users)[:, None], planted_BF), 1.0)
    return np.asarray(scores_BN + FAVOURITE / FAVOURITES * counts_BN, np.float64)


def _part_weights(part_E: Ints, with_time: bool, shares: Literal[0, 1]) -> Array:
    """P(part of the day) (E, C) for who knows the time, or only the shares of parts."""
    if with_time:
        return np.eye(len(PARTS))[part_E]
    return np.broadcast_to(part_shares()[shares], (len(part_E), len(PARTS)))


def _spread(to_BN: Array, members: int) -> Array:
    """From P(target) to P(item): the target with MAIN, else another of its subtopic."""
    other = (1 - MAIN) / (members - 1)
    return (MAIN - other) * to_BN + other * _of_subtopic(to_BN, members)


def _of_subtopic(p_BN: Array, members: int) -> Array:
    return np.repeat(p_BN.reshape(*p_BN.shape[:-1], -1, members).sum(-1), members, axis=-1)


def _with_companions(world: World, p_BN: Array) -> Array:
    """From P(the basket's first item) to P(in the basket)."""
    expected = sum(count * share for count, share in enumerate(COMPANIONS))
    return p_BN + expected / (world.members - 1) * (_of_subtopic(p_BN, world.members) - p_BN)


def _posterior(
    world: World,
    row_E: Ints,
    item_E: Ints,
    instant_E: Ints,
    size_I: Ints,
    part_E: Ints,
    users: int,
    with_time: bool,
) -> Array:
    """E[how many of a user's favourites are the item | history] (B, N)."""
    items, members = world.options.items, world.members
    first_I = np.searchsorted(instant_E, np.arange(len(size_I)))  # an instant's first event, and its only one if single
    row_I, item_I = row_E[first_I], item_E[first_I]
    follows_I = np.zeros(len(size_I), np.bool_)
    follows_I[1:] = row_I[1:] == row_I[:-1]
    # P(the single item of an instant follows from the instant before), summed over that one's events
    weights_EC = _part_weights(part_E, with_time, 0) / size_I[instant_E, None]
    next_E = np.minimum(instant_E + 1, len(size_I) - 1)
    has_next_E = (instant_E + 1 < len(size_I)) & follows_I[next_E]
    other = (1 - MAIN) / (members - 1)
    p_E = np.zeros(len(item_E))
    for part in range(len(PARTS)):
        target_E = world.successor[part, item_E]
        near_E = target_E // members == item_I[next_E] // members
        p_E += weights_EC[:, part] * np.where(target_E == item_I[next_E], MAIN, other * near_E)
    from_last_I = np.bincount(next_E[has_next_E], p_E[has_next_E], minlength=len(size_I))
    popular_I = np.where(follows_I, 1 - FAVOURITE - SUCCESSOR, 1 - FAVOURITE) * world.popularity[item_I]
    rest_I = COMPANIONS[0] * (SUCCESSOR * from_last_I + popular_I)

    # logs of the polynomials' coefficients (N, B, F + 1): products over many instants do not fit a float64
    single = size_I == 1
    log_p = np.empty((items, users, FAVOURITES + 1))
    for count in range(FAVOURITES + 1):
        gain_I = np.log1p(FAVOURITE * count / FAVOURITES / rest_I[single])
        evidence = np.bincount(item_I[single] * users + row_I[single], gain_I, minlength=items * users)
        log_p[:, :, count] = evidence.reshape(items, users) - math.lgamma(count + 1) - count * math.log(items)
    # the product of all others' polynomials, as that of those before and those after
    before = np.full_like(log_p, -np.inf)
    before[0, :, 0] = 0.0
    after = before[::-1].copy()
    for place in range(1, items):
        before[place] = _times(before[place - 1], log_p[place - 1])
        after[items - 1 - place] = _times(after[items - place], log_p[items - place])
    others = _times(before, after)
    joint = log_p + others[..., ::-1]
    p_NBF = np.exp(joint - joint.max(-1, keepdims=True))
    counts_NB = (p_NBF * np.arange(FAVOURITES + 1)).sum(-1) / p_NBF.sum(-1)
    return np.asarray(counts_NB.T, np.float64)


def _times(a: Array, b: Array) -> Array:
    """The product of polynomials up to degree F, all as logs of coefficients (..., F + 1)."""
    product = np.full_like(a, -np.inf)
    for degree in range(FAVOURITES + 1):
        for left in range(degree + 1):
            product[..., degree] = np.logaddexp(product[..., degree], a[..., left] + b[..., degree - left])
    return product
