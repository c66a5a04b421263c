"""Baselines rank as worked out by hand, see nothing from the cut on, and do not depend on buckets, chunks or ids."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lum_ray.artifacts import UserError
from lum_ray.data.rows import Int64, Rows, Samples, hash_strings
from lum_ray.evaluation import ranking, ranking_baselines
from lum_ray.evaluation.ranking_baselines import BASELINES, Popularity, baseline_rankings, targets_facts

NO_TIME = -32768
DAY_US = 86_400_000_000
Event = tuple[str, int, int, str]  # user, day, minute of the day (NO_TIME: none), item


@dataclass(frozen=True)
class Items:
    """A catalogue as far as the baselines read it."""

    ids: list[str]

    @property
    def hash_N(self) -> Int64:  # noqa: N802
        return hash_strings(self.ids).view(np.int64)

    def index_of(self, hashes: Int64) -> Int64:
        order = np.argsort(self.hash_N)
        place = np.minimum(np.searchsorted(self.hash_N[order], hashes), len(order) - 1)
        return np.where(self.hash_N[order][place] == hashes, order[place], -1)


def world(users: list[str], events: list[Event]) -> Rows:
    """Rows with one row an event, in the order of the sequences artifact."""
    days, values, lengths = [], [], []
    for user in users:
        own = [event for event in events if event[0] == user]
        ordered = sorted(own, key=lambda event: (event[1], event[2] == NO_TIME, event[2]))
        lengths.append(len(own))
        for _, day, minute, item in ordered:
            time = day * DAY_US + (0 if minute == NO_TIME else minute * 60_000_000)
            offset = NO_TIME if minute == NO_TIME else 0
            days.append(day)
            values.append([int(hash_strings([item]).view(np.int64)[0]), time, offset])
    size = len(users)
    return Rows(
        user=np.array(users, object),
        user_hash=hash_strings(users),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        days=np.array(days, np.int32),
        values=np.array(values, np.int64).reshape(-1, 3),
        first_day=np.zeros(size, np.int32),
        end_day=np.full(size, 1000, np.int32),
        segment=np.array([""] * size, object),
        profile={},
    )


def cuts(rows: Rows, *days: int) -> Samples:
    row = np.repeat(np.arange(len(rows)), len(days))
    return Samples(row, np.tile(np.array(days, np.int32), len(rows)), np.zeros(len(row), np.int32))


CATALOGUE = Items(["apple", "bread", "cake", "date", "egg"])
# Events before day 20: egg 4, bread 3, apple 2, cake 1, date 0; of the last 7 days: bread 2, apple 1, cake 1, egg 1
EVENTS: list[Event] = [
    ("ann", 3, 600, "egg"),
    ("ann", 3, 600, "bread"),
    ("ann", 9, 60, "egg"),
    ("ann", 14, 60, "apple"),
    ("ann", 14, 700, "bread"),
    ("ann", 14, NO_TIME, "cake"),
    ("ann", 20, 5, "date"),
    ("bob", 2, 5, "egg"),
    ("bob", 2, 5, "apple"),
    ("bob", 2, 5, "unheard of"),
    ("bob", 15, 5, "egg"),
    ("bob", 16, 5, "bread"),
    ("cat", 25, 5, "date"),
]
USERS = ["ann", "bob", "cat"]


def ranked(name: str, cut: int = 20, **options: object) -> dict[str, list[str]]:
    rows = world(USERS, EVENTS)
    popularity = Popularity.count([rows], CATALOGUE)
    items, scores = baseline_rankings(rows, cuts(rows, cut), CATALOGUE, popularity, name, **options)  # type: ignore[arg-type]
    for row, values in zip(items, scores, strict=True):
        assert (np.diff(values[row >= 0]) < 0).all() and (values[row >= 0] > 1e-30).all()
        assert np.isnan(values[row < 0]).all()
    return {user: [CATALOGUE.ids[i] for i in row if i >= 0] for user, row in zip(USERS, items, strict=True)}


def test_popularity_by_hand() -> None:
    assert set(map(tuple, ranked("popularity").values())) == {("egg", "bread", "apple", "cake", "date")}
    # days 13 to 19: bread 2, then apple, cake and egg 1 each, ordered by what they had in all
    assert ranked("popularity_7d")["cat"] == ["bread", "egg", "apple", "cake", "date"]
    assert ranked("popularity", depth=2)["ann"] == ["egg", "bread"]
    assert ranked("popularity", 21)["ann"][-2:] == sorted(["cake", "date"], key=tie)
    assert ranked("popularity", 3)["bob"][:2] == sorted(["egg", "apple"], key=tie)


def tie(item: str) -> int:
    popularity = Popularity.count([world([], [])], CATALOGUE)
    return int(popularity.tie_N[CATALOGUE.ids.index(item)])


def test_own_items_by_hand() -> None:
    # ann's instants: (egg, bread), egg, apple, bread, cake; the day-granular cake comes last
    assert ranked("repeat_last")["ann"] == ["cake", "bread", "apple", "egg", "date"]
    assert ranked("most_frequent")["ann"] == ["bread", "egg", "cake", "apple", "date"]
    # bob's: (egg, apple), egg, bread
    assert ranked("repeat_last")["bob"] == ["bread", "egg", "apple", "cake", "date"]
    assert ranked("most_frequent")["bob"] == ["egg", "bread", "apple", "cake", "date"]
    for name in BASELINES[:4]:
        assert ranked(name)["cat"] == ranked("popularity_7d" if name == "popularity_7d" else "popularity")["cat"]


def test_the_seen_filter_leaves_out_the_history() -> None:
    for name in BASELINES[:4]:
        assert ranked(name, seen_filter=True)["ann"] == ["date"]
        assert sorted(ranked(name, seen_filter=True)["bob"]) == ["cake", "date"]
        assert len(ranked(name, seen_filter=True)["cat"]) == 5


def test_text_neighbours_by_hand() -> None:
    # apple and date point the same way, egg at right angles; cake is between egg and bread
    embeddings = np.array([[1, 0, 0], [0, 0, 2], [0, 1, 1], [3, 0, 0], [0, 1, 0]], float)
    one = {"embeddings_NE": embeddings, "last_items": 1}
    assert ranked("text_knn", **one)["ann"] == ["cake", "egg", "bread", "apple", "date"]  # her last item is cake
    assert ranked("text_knn", seen_filter=True, **one)["ann"] == ["date"]
    bob = ranked("text_knn", **one)["bob"]  # bread; the three that are at right angles follow by popularity
    assert bob == ["bread", "cake", "egg", "apple", "date"]
    two = {"embeddings_NE": embeddings, "last_items": 2}
    assert ranked("text_knn", **two)["bob"] == ["egg", "bread", "cake", "apple", "date"]  # bread and egg: a tie at 1
    assert ranked("text_knn", pooling="mean", **two)["bob"] == ["cake", "egg", "bread", "apple", "date"]
    assert ranked("text_knn", **one)["cat"] == ranked("popularity")["cat"]


@st.composite
def small_worlds(draw: st.DrawFn) -> list[Event]:
    event = st.tuples(st.sampled_from(USERS), st.integers(0, 30), st.sampled_from([NO_TIME, 0, 7]),
                      st.sampled_from([*CATALOGUE.ids, "unheard of"]))  # fmt: skip
    return draw(st.lists(event, max_size=40, unique=True))


EMBEDDINGS = np.random.default_rng(0).normal(size=(5, 3))


@settings(deadline=None, max_examples=40)
@given(small_worlds(), st.integers(0, 31), st.booleans(), st.randoms())
def test_nothing_from_the_cut_on_and_nothing_else_of_the_input_matters(
    events: list[Event], cut: int, seen_filter: bool, random: object
) -> None:
    def rank(events: list[Event], users: list[str], pieces: int = 1) -> dict[str, dict[str, list[object]]]:
        rows = world(users, events)
        parts = [rows.take(np.arange(part, len(rows), pieces)) for part in range(pieces)]
        popularity = Popularity.count(parts, CATALOGUE)
        result: dict[str, dict[str, list[object]]] = {}
        for name in BASELINES:
            for part in parts:
                items, scores = baseline_rankings(
                    part, cuts(part, cut), CATALOGUE, popularity, name, 4, seen_filter, EMBEDDINGS, 2
                )
                for user, found, values in zip(part.user, items, scores, strict=True):
                    shown = np.where(np.isnan(values), -9, values).tolist()
                    result.setdefault(name, {})[user] = [found.tolist(), shown]
        return result

    expected = rank(events, USERS)
    assert rank([event for event in events if event[1] < cut], USERS) == expected
    assert rank(events, USERS[::-1]) == expected
    assert rank(events, USERS, pieces=3) == expected
    own = {user: {CATALOGUE.ids.index(e[3]) for e in events if e[0] == user and e[1] < cut and e[3] in CATALOGUE.ids}
           for user in USERS}  # fmt: skip
    for name in BASELINES:
        for user in USERS:
            items = [i for i in expected[name][user][0] if i >= 0]  # type: ignore[attr-defined]
            assert len(set(items)) == len(items) == (min(4, 5 - len(own[user])) if seen_filter else 4)
            if seen_filter:
                assert not own[user] & set(items)
            elif name in ("repeat_last", "most_frequent"):
                assert set(items[: len(own[user])]) <= own[user]


def test_chunks_do_not_change_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = world(USERS, EVENTS)
    popularity, samples = Popularity.count([rows], CATALOGUE), cuts(rows, 3, 15, 20, 26)
    for name in BASELINES:
        whole = baseline_rankings(rows, samples, CATALOGUE, popularity, name, embeddings_NE=EMBEDDINGS)
        with monkeypatch.context() as patch:
            patch.setattr(ranking_baselines, "_CHUNK", 70)
            pieces = baseline_rankings(rows, samples, CATALOGUE, popularity, name, embeddings_NE=EMBEDDINGS)
        np.testing.assert_array_equal(whole[0], pieces[0])
        np.testing.assert_array_equal(whole[1], pieces[1])


def test_ties_do_not_follow_the_ids() -> None:
    """Of items that nobody took, the order is a hash's: the same whatever stands beside them in the catalogue."""
    names = [f"item {n:03d}" for n in range(300)]
    rows = world(["ann"], [("ann", 1, 0, names[0])])
    order = {}
    for ids in (names, names[100:]):
        catalogue = Items(ids)
        popularity = Popularity.count([rows], catalogue)
        items = baseline_rankings(rows, cuts(rows, 5), catalogue, popularity, "popularity", 300)[0][0]
        order[len(ids)] = [ids[i] for i in items if ids[i] >= "item 100"]
    assert order[300] == order[200]
    places = np.array([int(name[-3:]) for name in order[200]])
    assert abs(np.corrcoef(places, np.arange(200))[0, 1]) < 0.2


def test_scores_fall_by_the_smallest_steps_and_keep_their_meaning() -> None:
    scores = np.array([[3.0, 3.0, 3.0, 2.0, 2.0, -1.0, -1.0]], np.float32)
    fallen = ranking_baselines._strict(scores)
    assert (np.diff(fallen[0]) < 0).all()
    np.testing.assert_allclose(fallen, scores, rtol=1e-6)
    assert fallen[0, 0] == 3 and fallen[0, 3] == 2 and fallen[0, 5] == -1
    assert fallen[0, 1] == np.nextafter(np.float32(3), np.float32(0))
    assert fallen[0, 6] == np.nextafter(np.float32(-1), np.float32(-2))


def test_facts_of_targets_and_a_round_through_files(tmp_path: object) -> None:
    rows = world(USERS, EVENTS)
    samples = cuts(rows, 20)
    target = np.array([0, 1, 1]), np.array([3, 0, 2])  # ann: date; bob: apple, cake
    repeat, history = targets_facts(rows, samples, CATALOGUE, target)
    assert repeat.tolist() == [False, True, False]
    assert history.tolist() == [6, 6 - 1, 0]  # bob's unknown item is an event too
    users = rows.user[samples.row]
    folder, popularity = str(tmp_path), Popularity.count([rows], CATALOGUE)
    ranking.write_targets(folder, "0", ranking.targets_table(
        users, samples.cut, history, np.array([True, True, False]), *target, repeat, CATALOGUE.ids))  # fmt: skip
    for name in BASELINES[:4]:
        for seen_filter in (False, True):
            found = baseline_rankings(rows, samples, CATALOGUE, popularity, name, 5, seen_filter)
            table = ranking.ranking_table(users, samples.cut, *found, CATALOGUE.ids, name, "baseline", 0, seen_filter)
            ranking.write_rankings(folder, f"{name}-{seen_filter}", table)
    read = ranking.read_rankings(folder)
    assert read.ranks["repeat_last", "baseline", 0, False].tolist() == [5, 3, 4]  # the places in the lists above
    assert read.ranks["repeat_last", "baseline", 0, True].tolist() == [1, ranking.MISSED, 1]


def test_wrong_input_is_refused() -> None:
    rows = world(USERS, EVENTS)
    popularity, samples = Popularity.count([rows], CATALOGUE), cuts(rows, 20)
    with pytest.raises(UserError, match=r"expected one of popularity, .* got 'newest'"):
        baseline_rankings(rows, samples, CATALOGUE, popularity, "newest")
    with pytest.raises(UserError, match="expected embeddings of the items' texts, got none"):
        baseline_rankings(rows, samples, CATALOGUE, popularity, "text_knn")
    with pytest.raises(UserError, match=r"of shape \(5, width\) as the catalogue, got \(4, 3\)"):
        baseline_rankings(rows, samples, CATALOGUE, popularity, "text_knn", embeddings_NE=np.zeros((4, 3)))
    broken = np.full((5, 3), np.nan)
    with pytest.raises(UserError, match=r"5 are not: items \[0, 1, 2, 3, 4\]"):
        baseline_rankings(rows, samples, CATALOGUE, popularity, "text_knn", embeddings_NE=broken)
    with pytest.raises(UserError, match="expected 5 items as in the catalogue, got 4"):
        other = replace(popularity, tie_N=popularity.tie_N[:4])
        baseline_rankings(rows, samples, CATALOGUE, other, "popularity")
