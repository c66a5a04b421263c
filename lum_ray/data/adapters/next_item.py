"""A planted world for GTS-LUM, whose next behaviour is known (next_item_oracle.py); the run's zone is Europe/Berlin.

Items lie in TOPICS x SUBTOPICS, which their texts say in words. A user's instants fall into parts of the day (PARTS),
each with a probability of its own, scaled by the user's level. In the world `signal` an instant's item comes
- with SUCCESSOR from the last instant: of its items one is drawn, l, and the part c of the day in which it lay gives
  the successor `successor[c, l]`, an item of another subtopic of l's topic: it with MAIN, else one of its subtopic;
- with FAVOURITE from the user's FAVOURITES favourites, drawn once, uniformly, with replacement;
- else (in the first instant SUCCESSOR too) by popularity.
An item that is no favourite comes with 0, 1 or 2 others of its subtopic, at the same time (COMPANIONS): a basket. In
the world `null` items come by popularity alone, with companions, whatever was before and whenever it is.

Tables written:
- events: user, time (UTC, to the second; local days from Monday 2023-01-02 on, over a change of the clock from 84 days
  on), item. Ordered by user, time, item.
- items: item, text, price (per topic log-normal, null for one in twenty), format (four in five the topic's own).
- profiles: user, plan (noise).

The content depends on the options without `shards`, which only says into how many files the users are split.
Suffixes: N items, T topics, S subtopics (of all topics), M items of a subtopic, C parts of the day, U users of a block,
D days, K instants of a user, I instants of a block, E events, F favourites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from lum_ray.artifacts import UserError

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TIME_ZONE = "Europe/Berlin"
START_DAY = (date(2023, 1, 2) - date(1970, 1, 1)).days
DAY_US = 86_400_000_000
BLOCK_USERS = 512

SUCCESSOR, FAVOURITE = 0.45, 0.25
MAIN = 0.6
FAVOURITES = 3
COMPANIONS = (0.75, 0.15, 0.1)
LEVELS = (0.6, 1.0, 1.4)

# name, weekend, first minute, minute after the last, P(an instant on such a day) at level 1. Parts that lie alike on
# weekdays and at weekends (night) are apart all the same: the hour alone does not tell the successor.
PARTS = (
    ("weekday morning rush hour", False, 420, 540, 0.20),
    ("weekday lunchtime", False, 720, 840, 0.16),
    ("weekday evening", False, 1140, 1320, 0.20),
    ("weekday night", False, 1320, 1440, 0.16),
    ("weekend late morning", True, 540, 720, 0.25),
    ("weekend afternoon", True, 840, 1020, 0.25),
    ("weekend night", True, 1320, 1440, 0.20),
)

# topic -> subtopic -> the nouns of its items
WORDS = {
    "cooking": {
        "baking bread": "oven flour dough loaf crust",
        "grilling meat": "steak barbecue charcoal sausage marinade",
        "vegetable soup": "broth carrot lentil pumpkin ladle",
        "sweet desserts": "chocolate pudding cream cake caramel",
        "fresh seafood": "salmon shrimp oyster lobster tuna",
    },
    "sport": {
        "football": "goalkeeper penalty striker stadium league",
        "tennis": "racket serve tournament volley court",
        "swimming": "pool freestyle goggles butterfly lane",
        "mountain biking": "trail helmet downhill pedal suspension",
        "marathon running": "finish pace sneaker stride kilometre",
    },
    "music": {
        "classical orchestra": "symphony violin conductor cello overture",
        "heavy rock": "guitar drummer riff amplifier anthem",
        "jazz": "saxophone trumpet improvisation swing quartet",
        "folk songs": "ballad fiddle banjo accordion verse",
        "electronic dance": "synthesizer beat club remix techno",
    },
    "travel": {
        "beach holiday": "sand ocean sunshine palm snorkel",
        "city weekend": "museum cathedral metro skyline cafe",
        "desert safari": "camel dune oasis jeep tent",
        "winter skiing": "slope snow chalet lift glacier",
        "river cruise": "boat cabin harbour canal deck",
    },
    "finance": {
        "stock market": "share dividend broker index rally",
        "home mortgage": "loan interest house lender deposit",
        "household budget": "saving bill expense spreadsheet income",
        "car insurance": "premium accident claim policy damage",
        "income tax": "return refund deduction declaration allowance",
    },
    "gardening": {
        "rose bushes": "blossom thorn pruning petal fragrance",
        "growing tomatoes": "greenhouse seedling harvest vine trellis",
        "lawn care": "mower grass sprinkler moss fertiliser",
        "fruit trees": "apple orchard cherry branch grafting",
        "indoor plants": "fern pot cactus windowsill orchid",
    },
    "health": {
        "better sleep": "pillow dream bedtime insomnia mattress",
        "yoga stretching": "pose breathing mat balance flexibility",
        "dental care": "tooth dentist floss gum brush",
        "back pain": "spine posture muscle massage physiotherapy",
        "healthy diet": "vitamin protein calorie fibre fasting",
    },
    "technology": {
        "smartphones": "camera battery screen charger app",
        "home computers": "keyboard processor laptop memory monitor",
        "video games": "console quest controller puzzle arcade",
        "space rockets": "satellite launch orbit astronaut engine",
        "electric cars": "motor charging range autopilot wheel",
    },
}
ADJECTIVES = ("simple", "classic", "modern", "little", "famous", "quick", "complete", "favourite")
FORMATS = ("recipe", "match", "album", "documentary", "podcast", "guide", "course", "review")
PLANS = ("basic", "family", "premium")
TOPICS, PER_TOPIC = len(WORDS), 5
SUBTOPICS = TOPICS * PER_TOPIC
MOST = SUBTOPICS * 5 * len(ADJECTIVES)

EVENTS = pa.schema([("user", pa.string()), ("time", pa.timestamp("us", "UTC")), ("item", pa.string())])
PROFILES = pa.schema([("user", pa.string()), ("plan", pa.string())])


@dataclass(frozen=True)
class Options:
    """Settings of the world.

    `users`, `shards`: size, and number of files. `days`: length from 2023-01-02 on; a user has 0.71 instants a day on
    average. `items`: size of the catalogue, a multiple of the 40 subtopics. `world`: `signal` or `null`.
    """

    users: int = 2000
    days: int = 84
    items: int = 200
    seed: int = 7
    shards: int = 4
    world: str = "signal"

    @staticmethod
    def of(options: Mapping[str, Any]) -> Options:
        """The settings of a run file. Raises UserError for an unknown name or a value out of range."""
        known = {item.name: type(item.default) for item in dataclasses.fields(Options)}
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise UserError(f"next_item: unknown options {unknown[:5]}; known: {sorted(known)}")
        for name, value in options.items():
            if not isinstance(value, known[name]) or isinstance(value, bool):
                raise UserError(f"next_item: option {name}: expected {known[name].__name__}, got {value!r}")
        result = Options(**options)
        fits = result.items % SUBTOPICS == 0 and 3 * SUBTOPICS <= result.items <= MOST
        for name, good, expected in (
            ("world", result.world in ("signal", "null"), "signal or null"),
            ("users", result.users >= 1, "at least 1"),
            ("days", result.days >= 14, "at least 14"),
            ("items", fits, f"a multiple of {SUBTOPICS} from {3 * SUBTOPICS} to {MOST}"),
            ("seed", result.seed >= 0, "at least 0"),
            ("shards", 1 <= result.shards <= result.users, "1 .. users"),
        ):
            if not good:
                raise UserError(f"next_item: option {name}: expected {expected}, got {getattr(result, name)!r}")
        return result


@dataclass(frozen=True)
class World:
    """What the options plant. Items are counted by subtopic here: item x is the (x % M)-th of subtopic x // M, and
    subtopic s is of topic s // PER_TOPIC; `catalogue` (N,) int64 says at which place of the sorted item ids x stands.

    `popularity` (N,) float64 sums to 1; `successor` (C, N) int64.
    """

    options: Options
    catalogue: Ints
    popularity: Array
    successor: Ints

    @property
    def members(self) -> int:
        """Items of a subtopic."""
        return self.options.items // SUBTOPICS

    def names(self) -> list[str]:
        """The ids of the items, as x counts them; sorted they are the catalogue."""
        return [f"i{place:05d}" for place in self.catalogue.tolist()]


def world_of(options: Options) -> World:
    """The world of these options; it does not depend on `users`, `days`, `shards` and `world`."""
    rng = np.random.default_rng([options.seed, 0])
    catalogue = rng.permutation(options.items)
    weight = (rng.permutation(options.items) + 10.0) ** -0.8
    members = options.items // SUBTOPICS
    successor_CSM = np.empty((len(PARTS), SUBTOPICS, members), np.int64)
    for part in range(len(PARTS)):
        for topic in range(TOPICS):
            # each subtopic's next on a ring is another subtopic, and each is the next of one
            ring = topic * PER_TOPIC + rng.permutation(PER_TOPIC)
            for subtopic, following in zip(ring, np.roll(ring, -1), strict=True):
                successor_CSM[part, subtopic] = following * members + rng.permutation(members)
    return World(options, catalogue, weight / weight.sum(), successor_CSM.reshape(len(PARTS), options.items))


def planted_favourites(options: Options, number_B: Ints) -> Ints:
    """The favourites (B, FAVOURITES) int64 of users by their number, as World counts items (an item may come again)."""
    found = np.empty((len(number_B), FAVOURITES), np.int64)
    block_B = number_B // BLOCK_USERS
    for block in np.unique(block_B).tolist():
        rng = np.random.default_rng([options.seed, 1, block])
        drawn = rng.integers(0, options.items, (BLOCK_USERS, FAVOURITES))
        found[block_B == block] = drawn[number_B[block_B == block] % BLOCK_USERS]
    return found


def user_names(first: int, end: int) -> list[str]:
    return [f"u{number:08d}" for number in range(first, end)]


def write(dest: str, filesystem: fs.FileSystem, path: str | None, options: Mapping[str, Any]) -> None:
    """Write events/, items/ and profiles/ under `dest`. `options`: see `Options`.

    Raises UserError for an unknown option, a value out of range, or a `path`.
    """
    if path is not None:
        raise UserError(f"next_item: expected no path, it reads nothing; got {path}; remove it from the run file")
    world = world_of(Options.of(options))
    users, shards = world.options.users, world.options.shards
    for folder in ("events", "items", "profiles"):
        filesystem.create_dir(f"{dest}/{folder}", recursive=True)
    pq.write_table(_items(world), f"{dest}/items/0000.parquet", filesystem=filesystem, compression="zstd")
    held: tuple[int, pa.Table, pa.Table] | None = None
    for shard in range(shards):
        first, end = shard * users // shards, (shard + 1) * users // shards
        name = f"{shard:05d}.parquet"
        with (
            pq.ParquetWriter(f"{dest}/events/{name}", EVENTS, filesystem=filesystem, compression="zstd") as events,
            pq.ParquetWriter(f"{dest}/profiles/{name}", PROFILES, filesystem=filesystem, compression="zstd") as people,
        ):
            # a block of users is always drawn as a whole, and may be split between files
            for block in range(first // BLOCK_USERS, (end - 1) // BLOCK_USERS + 1):
                if held is None or held[0] != block:
                    held = (block, *_block(world, block))
                start = block * BLOCK_USERS
                low, high = max(first, start) - start, min(end, start + BLOCK_USERS) - start
                row = held[1]["row"].to_numpy()
                inside = slice(*np.searchsorted(row, [low, high]).tolist())
                part = held[1].slice(inside.start, inside.stop - inside.start)
                events.write_table(part.drop_columns("row").cast(EVENTS))
                people.write_table(held[2].slice(low, high - low))


def _block(world: World, block: int) -> tuple[pa.Table, pa.Table]:
    """Events (with the user's row in the block) and profiles of a block of users."""
    rng = np.random.default_rng([world.options.seed, 2, block])
    names = pa.array(user_names(block * BLOCK_USERS, (block + 1) * BLOCK_USERS))
    plans = pa.array(PLANS).take(pa.array(rng.integers(0, len(PLANS), BLOCK_USERS)))
    row_I, part_I, second_I = _instants(world, rng)
    items_IX = _baskets(world, rng, block, row_I, part_I)
    # by place in the catalogue, so that the order tells nothing of what came first; -1 marks no item
    place_IX = np.sort(np.where(items_IX < 0, -1, world.catalogue[items_IX]), axis=1)
    instant_E, column_E = np.nonzero(place_IX >= 0)
    ids = pa.array(sorted(world.names()))
    local = pa.array(second_I[instant_E] * 1_000_000, pa.timestamp("us"))
    events = pa.table(
        {
            "row": row_I[instant_E],
            "user": names.take(pa.array(row_I[instant_E])),
            "time": pc.cast(pc.assume_timezone(local, TIME_ZONE), pa.timestamp("us", "UTC")),
            "item": ids.take(pa.array(place_IX[instant_E, column_E])),
        }
    )
    return events, pa.table({"user": names, "plan": plans}, schema=PROFILES)


def _instants(world: World, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """The user's row, the part of the day and the local second of each instant (I,), by user and time."""
    weekend_C = np.array([part[1] for part in PARTS])
    first_C, end_C = (np.array([part[place] for part in PARTS], np.int64) for place in (2, 3))
    rate_C = np.array([part[4] for part in PARTS])
    level_U = np.array(LEVELS)[rng.integers(0, len(LEVELS), BLOCK_USERS)]
    days = world.options.days
    weekend_D = np.arange(days) % 7 >= 5  # the first day is a Monday
    rate_UDC = level_U[:, None, None] * np.where(weekend_D[:, None] == weekend_C, rate_C, 0.0)
    # the parts of either kind of day are in order of time, so that these are too
    row_I, day_I, part_I = np.nonzero(rng.random(rate_UDC.shape) < rate_UDC)
    minutes_I = first_C[part_I] + rng.random(len(row_I)) * (end_C - first_C)[part_I]
    return row_I, part_I, (START_DAY + day_I) * 86_400 + (minutes_I * 60).astype(np.int64)


def _baskets(world: World, rng: np.random.Generator, block: int, row_I: Ints, part_I: Ints) -> Ints:
    """The items (I, 3) of each instant, as World counts them; -1: none."""
    count, members = len(row_I), world.members
    first_I = np.searchsorted(row_I, row_I)  # of the user's instants
    cause_I = rng.random(count)
    popular_I = np.minimum(
        np.searchsorted(np.cumsum(world.popularity), rng.random(count), "right"), len(world.catalogue) - 1
    )
    favourites_UF = planted_favourites(world.options, block * BLOCK_USERS + np.arange(BLOCK_USERS))
    favourite_I = favourites_UF[row_I, rng.integers(0, FAVOURITES, count)]
    which_I, main_I = rng.random(count), rng.random(count) < MAIN
    other_I = rng.integers(1, members, count)
    others_I = np.searchsorted(np.cumsum(COMPANIONS)[:-1], rng.random(count), "right")
    # two distinct steps round the subtopic, neither of them back to the item
    step_I = rng.integers(1, members, count)
    second_I = 1 + (step_I + rng.integers(0, members - 2, count)) % (members - 1)

    signal = world.options.world == "signal"
    follows_I = signal & (cause_I < SUCCESSOR) & (first_I < np.arange(count))
    favours_I = signal & (cause_I >= SUCCESSOR) & (cause_I < SUCCESSOR + FAVOURITE)
    others_I[favours_I] = 0
    items_IX = np.full((count, 3), -1, np.int64)
    items_IX[:, 0] = np.where(favours_I, favourite_I, popular_I)
    place_I = np.arange(count) - first_I
    by_place = np.argsort(place_I, kind="stable")
    # instant after instant, all users at once: a successor needs the basket before
    for instants in np.split(by_place, np.cumsum(np.bincount(place_I))[:-1]):
        now = instants[follows_I[instants]]
        drawn = (which_I[now] * (1 + others_I[now - 1])).astype(np.int64)
        target = world.successor[part_I[now - 1], items_IX[now - 1, drawn]]
        items_IX[now, 0] = np.where(main_I[now], target, _beside(target, other_I[now], members))
        item = items_IX[instants, 0]
        for column, step in ((1, step_I), (2, second_I)):
            beside = _beside(item, step[instants], members)
            items_IX[instants, column] = np.where(others_I[instants] >= column, beside, -1)
    return items_IX


def _beside(item: Ints, step: Ints, members: int) -> Ints:
    """The item that is `step` places on in the ring of the same subtopic."""
    return item // members * members + (item % members + step) % members


def _items(world: World) -> pa.Table:
    rng = np.random.default_rng([world.options.seed, 3])
    count, members = world.options.items, world.members
    topic_N = np.arange(count) // members // PER_TOPIC
    price_N = np.round(np.exp(rng.normal(2.0, 0.8, TOPICS)[topic_N] + 0.3 * rng.standard_normal(count)), 2)
    format_N = np.where(rng.random(count) < 0.8, topic_N, rng.integers(0, len(FORMATS), count))
    texts: list[str] = []
    for topic, subtopics in WORDS.items():
        for subtopic, nouns in subtopics.items():
            for place in range(members):
                noun = nouns.split()[place % 5]
                # one noun's items take the adjectives in turn
                adjective = ADJECTIVES[(place // 5 + place % 5 + len(texts) // members) % len(ADJECTIVES)]
                texts.append(f"{adjective} {noun}, {subtopic}, {topic}")
    order = pa.array(np.argsort(world.catalogue))
    table = pa.table(
        {
            "item": pa.array(world.names()),
            "text": pa.array(texts),
            "price": pa.array(price_N, mask=rng.random(count) < 0.05),
            "format": pa.array(FORMATS).take(pa.array(format_N)),
        }
    )
    return table.take(order)
