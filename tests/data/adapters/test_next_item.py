from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from lum_ray.artifacts import UserError
from lum_ray.data.adapters import ADAPTERS, VERSIONS, next_item, write_source
from lum_ray.data.adapters.next_item import DAY_US, FAVOURITE, MAIN, PARTS, START_DAY, SUCCESSOR, Options, world_of
from lum_ray.data.adapters.next_item_oracle import oracle_scores, part_shares

COMPANIONS = next_item.COMPANIONS
LOCAL = fs.LocalFileSystem()
OPTIONS = {"users": 2000, "days": 84, "items": 200, "seed": 3, "shards": 2}
Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Written:
    """Events by user and time: the user's number, the item's place in the catalogue, UTC time, local day and part."""

    options: Options
    user: Ints
    item: Ints
    time: Ints
    day: Ints
    part: Ints

    def before(self, cut: Ints) -> tuple[Ints, Ints, Ints]:
        """Offsets, items and times of what each user did before her cut."""
        seen = self.day < cut[self.user]
        counts = np.bincount(self.user[seen], minlength=self.options.users)
        return np.concatenate([[0], np.cumsum(counts)]), self.item[seen], self.time[seen]

    def first_after(self, cut: Ints) -> npt.NDArray[np.bool_]:
        """Whether each item (users, items) is in the user's first instant from the cut on."""
        ahead = self.day >= cut[self.user]
        first = np.full(self.options.users, np.iinfo(np.int64).max)
        np.minimum.at(first, self.user[ahead], self.time[ahead])
        target = ahead & (self.time == first[self.user])
        result = np.zeros((self.options.users, self.options.items), np.bool_)
        result[self.user[target], self.item[target]] = True
        return result

    def instants(self) -> tuple[Ints, Ints, Ints]:
        """The items (events,) as the world counts them, and the first event and the size of each instant."""
        begins = np.concatenate([[True], (np.diff(self.user) != 0) | (np.diff(self.time) != 0)])
        start = np.flatnonzero(begins)
        x = np.argsort(world_of(self.options).catalogue)[self.item]
        return x, start, np.diff(np.append(start, len(x)))

    def pairs(self) -> tuple[Ints, Ints, Ints]:
        """An instant of one item and the next: (item, part of the day, next item or -1 where that is a basket)."""
        x, start, size = self.instants()
        first, second = start[:-1], start[1:]
        use = (size[:-1] == 1) & (self.user[first] == self.user[second])
        return x[first[use]], self.part[first[use]], np.where(size[1:] == 1, x[second], -1)[use]


def write(dest: Path, **options: Any) -> Written:
    next_item.write(str(dest), LOCAL, None, options)
    events = pq.read_table(dest / "events")
    local = pc.local_timestamp(events["time"].cast(pa.timestamp("us", "Europe/Berlin"))).cast(pa.int64()).to_numpy()
    minute, weekend = local % DAY_US // 60_000_000, (local // DAY_US + 3) % 7 >= 5
    inside = [(weekend == part[1]) & (minute >= part[2]) & (minute < part[3]) for part in PARTS]
    assert (np.sum(inside, axis=0) == 1).all()  # in local time, on both sides of the change of the clock
    return Written(
        Options.of(options),
        np.array([int(user[1:]) for user in events["user"].to_pylist()]),
        np.array([int(item[1:]) for item in events["item"].to_pylist()]),
        events["time"].cast(pa.int64()).to_numpy(),
        local // DAY_US,
        np.argmax(inside, axis=0),
    )


@pytest.fixture(scope="module")
def signal(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("signal"), **OPTIONS)


@pytest.fixture(scope="module")
def null(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("null"), **OPTIONS, world="null")


def cuts_of(options: Options) -> Ints:
    """One cut a user, in the last two weeks, on all days of the week."""
    return START_DAY + options.days - 14 + np.arange(options.users) % 7


def scores_of(data: Written, cut: Ints, **how: Any) -> Array:
    return oracle_scores(data.options, next_item.user_names(0, data.options.users), *data.before(cut), **how)


def recall(scores: Array, target: npt.NDArray[np.bool_], k: int) -> Array:
    """Share of each user's targets among the k best, ties broken against us."""
    order = np.sort(scores, axis=1)
    rank = scores.shape[1] - np.array([np.searchsorted(o, s, "left") for o, s in zip(order, scores, strict=True)])
    known = target.any(1)
    return ((rank <= k) & target).sum(1)[known] / target.sum(1)[known]


def files(dest: Path) -> dict[str, bytes]:
    return {str(path.relative_to(dest)): path.read_bytes() for path in sorted(dest.rglob("*")) if path.is_file()}


def test_same_options_same_bytes_and_shards_only_split(tmp_path: Path) -> None:
    options = {"users": 1100, "days": 14, "items": 120}  # three blocks of users
    for name, extra in (("a", {}), ("b", {}), ("one", {"shards": 1}), ("five", {"shards": 5}), ("other", {"seed": 8})):
        next_item.write(str(tmp_path / name), LOCAL, None, options | extra)
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "other")
    for table in ("events", "profiles", "items"):
        whole = pq.read_table(tmp_path / "one" / table)
        assert whole.equals(pq.read_table(tmp_path / "five" / table))
        assert whole.equals(pq.read_table(tmp_path / "a" / table))
    assert len(files(tmp_path / "five")) == 11
    # more users or days of training data, or the null world, keep the catalogue and the successors
    world = world_of(Options.of(options))
    again = world_of(replace(world.options, users=5, days=90, world="null"))
    assert (world.successor == again.successor).all()


def test_the_texts_and_columns_tell_the_topic(tmp_path: Path) -> None:
    data = write(tmp_path, users=60, days=28, items=1600)
    items = pq.read_table(tmp_path / "items")
    assert items["item"].to_pylist() == sorted(items["item"].to_pylist())
    texts = items["text"].to_pylist()
    assert len(set(texts)) == 1600
    topic = np.array([text.rsplit(", ", 1)[1] for text in texts])
    subtopic = np.array([text.split(", ")[1] for text in texts])
    by_world = subtopic[world_of(data.options).catalogue].reshape(40, 40)
    assert (by_world == by_world[:, :1]).all()
    assert len(set(by_world[:, 0])) == 40
    assert (topic[:30] != topic[0]).any()  # neighbours by id are not of a topic
    formats, price = items["format"].to_numpy(), items["price"].to_numpy()
    assert 0.01 < np.isnan(price).mean() < 0.1
    between = 0.0
    for name in np.unique(topic):
        assert np.unique(formats[topic == name], return_counts=True)[1].max() > 0.7 * 200
        between += (np.nanmean(np.log(price[topic == name])) - np.nanmean(np.log(price))) ** 2 / 8
    assert between > 0.3 * np.nanvar(np.log(price))
    # what comes at one time is distinct, and of one subtopic
    baskets: dict[tuple[int, int], list[int]] = {}
    for user, time, item in zip(data.user.tolist(), data.time.tolist(), data.item.tolist(), strict=True):
        baskets.setdefault((user, time), []).append(item)
    several = [basket for basket in baskets.values() if len(basket) > 1]
    assert len(several) / len(baskets) == pytest.approx((1 - FAVOURITE) * (1 - COMPANIONS[0]), abs=0.04)
    assert all(len(set(basket)) == len(basket) and len(set(subtopic[basket])) == 1 for basket in several)


def test_what_follows_is_as_planted(signal: Written) -> None:
    world = world_of(signal.options)
    last, part, following = signal.pairs()
    # by hand: a single item that is the successor of the hour, by succession, as a favourite (one in N), by popularity
    target = world.successor[part, last]
    rest = 1 - SUCCESSOR - FAVOURITE
    p = COMPANIONS[0] * (SUCCESSOR * MAIN + rest * world.popularity[target]) + FAVOURITE / signal.options.items
    hit = following == target
    for place in range(len(PARTS)):
        mine = part == place
        error = np.sqrt((p[mine] * (1 - p[mine])).sum()) / mine.sum()
        assert abs(hit[mine].mean() - p[mine].mean()) < 4 * error, PARTS[place]
        # by the map of another part of the day the same pairs fit far worse
        wrong = world.successor[(place + 1) % len(PARTS), last[mine]]
        assert (following[mine] == wrong).mean() < 0.3 * p[mine].mean()
    pairs, counts = np.unique(np.stack([last, part]), axis=1, return_counts=True)
    often = np.argsort(-counts)[:50]
    assert counts[often].min() > 50
    for x, place in pairs[:, often].T:
        mine = (last == x) & (part == place)
        p_here = p[mine][0]
        assert abs(hit[mine].mean() - p_here) < 4 * np.sqrt(p_here * (1 - p_here) / mine.sum()), (x, place)
    # the rest of the succession: another item of the successor's subtopic
    members = world.members
    beside = (following // members == target // members) & ~hit
    mates = world.popularity.reshape(-1, members).sum(1)[target // members] - world.popularity[target]
    p = COMPANIONS[0] * (SUCCESSOR * (1 - MAIN) + rest * mates) + FAVOURITE * (members - 1) / signal.options.items
    assert abs(beside.mean() - p.mean()) < 4 * np.sqrt((p * (1 - p)).sum()) / len(p)


def test_a_basket_is_followed_from_any_of_its_items(signal: Written) -> None:
    world = world_of(signal.options)
    x, start, size = signal.instants()
    part, user = signal.part[start], signal.user[start]
    hits, expected = [], []
    for k in np.flatnonzero((size[:-2] == 1) & (size[1:-1] > 1) & (size[2:] == 1) & (user[:-2] == user[2:])):
        # the item that began the basket, most likely: that is not to matter
        began = world.successor[part[k], x[start[k]]]
        if began in x[start[k + 1] : start[k + 2]]:
            target = world.successor[part[k + 1], began]
            beside = (size[k + 1] - 1) * (1 - MAIN) / (world.members - 1)
            p = SUCCESSOR * (MAIN + beside) / size[k + 1] + (1 - SUCCESSOR - FAVOURITE) * world.popularity[target]
            expected.append(COMPANIONS[0] * p + FAVOURITE / signal.options.items)
            hits.append(x[start[k + 2]] == target)
    # given that the next instant is no basket
    p_single = COMPANIONS[0] * (1 - FAVOURITE) + FAVOURITE
    p = np.array(expected) / p_single
    assert len(p) > 2000
    assert abs(np.mean(hits) - p.mean()) < 4 * np.sqrt((p * (1 - p)).sum()) / len(p)


def dependence(data: Written) -> dict[str, float]:
    """How far next items lie from independence of what was before, in standard errors."""
    world = world_of(data.options)
    last, part, following = data.pairs()
    last, part, following = last[following >= 0], part[following >= 0], following[following >= 0]
    topic = np.arange(data.options.items) // world.members // next_item.PER_TOPIC
    topic_share = np.bincount(topic, world.popularity)
    morning = np.bincount(topic[following[part == 0]], minlength=len(topic_share))
    spread = morning.sum() * topic_share
    chi_square = ((morning - spread) ** 2 / spread).sum()
    result = {"topics in the morning": (chi_square - len(spread) + 1) / np.sqrt(2 * len(spread) - 2)}
    for name, hit, p in (
        ("successor", following == world.successor[part, last], world.popularity[world.successor[part, last]]),
        ("same topic", topic[following] == topic[last], topic_share[topic[last]]),
        ("repeat", following == last, world.popularity[last]),
    ):
        result[name] = (hit.sum() - p.sum()) / np.sqrt((p * (1 - p)).sum())
    return result


def test_nothing_depends_on_history_in_the_null_world(signal: Written, null: Written) -> None:
    found = dependence(null)
    assert all(abs(value) < 4 for value in found.values()), found
    planted = dependence(signal)
    assert all(planted[name] > 20 for name in ("successor", "same topic", "repeat")), planted
    # nor do users differ: the variance of an item's count over users is that of independent draws
    counts = np.zeros((2000, 200))
    np.add.at(counts, (null.user, null.item), 1.0)
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    assert ((counts - expected) ** 2 / expected).mean() == pytest.approx(1, abs=0.02)
    cut = cuts_of(null.options)
    scores = scores_of(null, cut)
    assert (scores == scores[0]).all()
    target = null.first_after(cut)[:, np.argsort(-scores[0])]
    for tenth, p in zip(np.split(target, 10, axis=1), np.split(-np.sort(-scores[0]), 10), strict=True):
        assert abs(tenth.any(1)[target.any(1)].mean() - p.sum()) < 0.05  # baskets: an item more at most


@pytest.mark.parametrize("favourites", ["planted", "inferred"])
@pytest.mark.parametrize("with_time", [True, False])
def test_the_oracle_is_calibrated(signal: Written, favourites: str, with_time: bool) -> None:
    cut = cuts_of(signal.options)
    target = signal.first_after(cut)
    known = target.any(1)
    p = scores_of(signal, cut, favourites=favourites, with_time=with_time)
    assert np.allclose(p.sum(1), 1 + (1 - FAVOURITE) * (COMPANIONS[1] + 2 * COMPANIONS[2]))
    p, y = p[known].ravel(), target[known].ravel()
    place = np.searchsorted([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3], p)
    for index in np.unique(place):
        mine = place == index
        error = np.sqrt((p[mine] * (1 - p[mine])).sum()) / mine.sum()
        # items of a basket come together, which widens the error a little
        assert abs(p[mine].mean() - y[mine].mean()) < 5 * error, (index, p[mine].mean(), y[mine].mean(), error)


def test_inferred_favourites_by_brute_force() -> None:
    options = Options(users=3, items=120)
    world = world_of(options)
    x = np.array([5, 5, 40, 41, 5, 77, 40])  # two of them, 40 and 41, at one time
    day = START_DAY * DAY_US + 3_600_000_000 * np.array([7, 12, 19, 19, 24 + 7, 24 + 12, 48 + 7])
    part = [0, 1, 2, 2, 0, 1, 0]
    likelihood = np.ones((120, 120, 120))
    a, b, c = (np.arange(120).reshape(shape) for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)))
    for place, before in ((0, []), (1, [0]), (4, [2, 3]), (5, [4]), (6, [5])):
        rest = (1 - FAVOURITE - (SUCCESSOR if before else 0)) * world.popularity[x[place]]
        for event in before:
            to = world.successor[part[event], x[event]]
            inside = to // 3 == x[place] // 3
            share = MAIN if to == x[place] else (1 - MAIN) / 2 if inside else 0.0
            rest += SUCCESSOR * share / len(before)
        likelihood *= COMPANIONS[0] * rest + FAVOURITE / 3 * sum((f == x[place]).astype(float) for f in (a, b, c))
    expected = 3 * likelihood.sum((1, 2)) / likelihood.sum()
    history = (["u00000001"], np.array([0, 7]), world.catalogue[x], day)
    first = oracle_scores(options, *history)[0, world.catalogue]
    second = oracle_scores(options, *history, favourites="planted")[0, world.catalogue]
    mine = np.bincount(next_item.planted_favourites(options, np.array([1]))[0], minlength=120)
    assert first - second == pytest.approx(FAVOURITE / next_item.FAVOURITES * (expected - mine), abs=1e-12)
    # a long history stays a number: what came 3,000 times is all three favourites for certain
    weekly = START_DAY * DAY_US + 23_400_000_000 + 7 * DAY_US * np.arange(3000)
    long = oracle_scores(options, ["u00000001"], np.array([0, 3000]), np.full(3000, 9), weekly)
    assert long[0, 9] > FAVOURITE * 0.9
    assert np.isfinite(long).all()
    # without a history: popularity, and favourites as they are drawn
    none = oracle_scores(options, ["u00000000"], np.array([0, 0]), np.array([], int), np.array([], int))[0]
    p, group = (1 - FAVOURITE) * world.popularity, (1 - FAVOURITE) * world.popularity.reshape(-1, 3).sum(1).repeat(3)
    by_hand = FAVOURITE / 120 + p + (COMPANIONS[1] + 2 * COMPANIONS[2]) / 2 * (group - p)
    assert none[world.catalogue] == pytest.approx(by_hand, abs=1e-12)


def test_time_is_worth_much(signal: Written) -> None:
    cut = cuts_of(signal.options)
    target = signal.first_after(cut)
    _, item, _ = signal.before(cut)
    seen = signal.day < cut[signal.user]
    popular = np.bincount(item, minlength=200).astype(float)
    frequent = np.zeros((2000, 200))
    np.add.at(frequent, (signal.user[seen], item), 1.0)
    models = {
        "planted": scores_of(signal, cut, favourites="planted"),
        "inferred": scores_of(signal, cut),
        "no time": scores_of(signal, cut, with_time=False),
        "frequent": frequent + popular / popular.sum() / 2,
        "popular": np.broadcast_to(popular, frequent.shape),
    }
    at_1, at_10 = ({name: recall(scores, target, k) for name, scores in models.items()} for k in (1, 10))
    assert at_10["planted"].mean() >= at_10["inferred"].mean() > 0.65
    # each step is far outside the error of the paired difference
    for better, worse in itertools.pairwise(("inferred", "no time", "frequent", "popular")):
        difference = at_10[better] - at_10[worse]
        assert difference.mean() > 8 * difference.std() / np.sqrt(len(difference)), (better, worse)
    assert at_1["inferred"].mean() > 1.7 * at_1["no time"].mean()


def test_shares_of_the_parts_of_the_day(signal: Written) -> None:
    everywhere, last = part_shares()
    # every user counts alike in the shares; in the data the busy count more, which changes nothing in `everywhere`
    new = np.concatenate([[True], (np.diff(signal.user) != 0) | (np.diff(signal.time) != 0)])
    assert np.bincount(signal.part[new]) / new.sum() == pytest.approx(everywhere, abs=0.005)
    cut = cuts_of(signal.options)
    seen = signal.day < cut[signal.user]
    final = np.zeros(2000, np.int64)
    final[signal.user[seen]] = signal.part[seen]
    error = np.sqrt(last * (1 - last) / 2000)
    assert (np.abs(np.bincount(final) / 2000 - last) < 4 * error).all()
    # who has no time scores by the mixture, here after a first item (a Monday or a Saturday)
    days = [START_DAY + 5 * part[1] for part in PARTS]
    times = [day * DAY_US + (part[2] - 60) * 60_000_000 for day, part in zip(days, PARTS, strict=True)]
    by_part = [scores_after(9, time, with_time=True) for time in times]
    assert scores_after(9, times[0], with_time=False) == pytest.approx(np.average(by_part, axis=0, weights=last))


def scores_after(item: int, time: int, with_time: bool) -> Array:
    options = Options.of(OPTIONS)
    history = (np.array([0, 1]), np.array([item]), np.array([time]))
    return oracle_scores(options, ["u00000000"], *history, with_time=with_time)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 1}, r"unknown options \['speed'\]; known: \['days', "),
        ({"world": "yearly"}, "world: expected signal or null, got 'yearly'"),
        ({"users": 2.5}, r"users: expected int, got 2\.5"),
        ({"users": True}, "users: expected int, got True"),
        ({"users": 2, "shards": 3}, "shards: expected 1 .. users"),
        ({"items": 210}, "items: expected a multiple of 40 from 120 to 1600, got 210"),
        ({"items": 80}, "items: expected a multiple of 40"),
        ({"days": 3}, "days: expected at least 14"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_source("next_item", str(tmp_path), LOCAL, None, options)


def test_a_path_is_refused(tmp_path: Path) -> None:
    assert VERSIONS["next_item"] == 1
    assert ADAPTERS["next_item"] == next_item.__name__
    with pytest.raises(UserError, match="expected no path"):
        write_source("next_item", str(tmp_path), LOCAL, "somewhere", {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"users": ["u00000009"]}, r"\['u00000009'\] are no users of this world, which has 3"),
        ({"offsets": np.array([0, 3])}, "expected 2 offsets from 0 to the number of events"),
        ({"item": np.array([0, 200])}, r"expected places in a catalogue of 200 items, got \[200\]"),
        ({"time_us": np.array([DAY_US * START_DAY + 12 * 3_600_000_000, 0])}, r"ascending times.*u00000001"),
        ({"time_us": np.array([0, 0])}, "times without a part of the day"),
    ],
)
def test_another_worlds_history_is_refused(changed: dict[str, Any], message: str) -> None:
    time = DAY_US * START_DAY + 12 * 3_600_000_000
    right = {
        "users": ["u00000001"],
        "offsets": np.array([0, 2]),
        "item": np.array([0, 1]),
        "time_us": np.array([time, time]),
    }
    assert oracle_scores(Options(users=3), **right).shape == (1, 200)
    with pytest.raises(UserError, match=message):
        oracle_scores(Options(users=3), **(right | changed))
