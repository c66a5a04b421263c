from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from lum_ray.artifacts import UserError
from lum_ray.data.adapters import simulator
from lum_ray.data.adapters.worlds import START_DAY, Options, cohort_of, world_of

LOCAL = fs.LocalFileSystem()


def write(dest: Path, **options: Any) -> Path:
    simulator.write(str(dest), LOCAL, None, options)
    return dest


def files(dest: Path) -> dict[str, bytes]:
    return {str(path.relative_to(dest)): path.read_bytes() for path in sorted(dest.rglob("*")) if path.is_file()}


def test_same_options_same_bytes_and_shards_stand_alone(tmp_path: Path) -> None:
    first = files(write(tmp_path / "a", users=90, shards=3, days=400))
    assert first == files(write(tmp_path / "b", users=90, shards=3, days=400))
    assert first != files(write(tmp_path / "c", users=90, shards=3, days=400, seed=8))
    again = tmp_path / "again"
    for folder in ("events", "profiles", "truth/states"):
        (again / folder).mkdir(parents=True)
    simulator.write_shard(str(again), LOCAL, world_of(Options(users=90, shards=3, days=400)), 2)
    alone = files(again)
    assert len(alone) == 3
    assert all(first[name] == content for name, content in alone.items())


def test_tables(tmp_path: Path) -> None:
    dest = write(tmp_path, users=300, shards=2, days=800)
    events = pq.read_table(dest / "events").to_pandas()
    profiles = pq.read_table(dest / "profiles").to_pandas()
    assert len(profiles) == 300 == profiles["user"].nunique()
    assert profiles["age_group"].isna().mean() < 0.2
    day = events["time"].dt.tz_localize(None).to_numpy().astype("datetime64[D]").astype(int)
    assert day.min() >= START_DAY
    assert day.max() < START_DAY + 800
    registered = profiles.set_index("user")["registered"].to_numpy().astype("datetime64[D]").astype(int)
    assert (day >= registered[profiles.set_index("user").index.get_indexer(events["user"])]).all()
    amount = events["amount"].to_numpy()
    assert ((amount > 0) == (events["kind"] == "purchase")).all()
    assert np.abs(amount * 100 - np.round(amount * 100)).max() < 1e-6
    rows = pq.read_table(dest / "calendar").to_pylist()
    festivals = [row for row in rows if row["event_type"] == "festival"]
    assert [(row["start_day"].month, row["start_day"].day) for row in festivals] == [(11, 20)] * 4
    matches = [row for row in rows if row["event_type"] == "match"]
    assert {(row["start_day"] - row["known_at"]).days for row in matches} == {30}
    assert len({(b["start_day"] - a["start_day"]).days for a, b in itertools.pairwise(matches)}) > 3


@pytest.mark.parametrize("world", ["signal", "yearly", "null"])
def test_share_of_active_days_is_the_one_asked_for(tmp_path: Path, world: str) -> None:
    dest = write(tmp_path, users=1500, shards=1, days=400, world=world, activity=0.1)
    events = pq.read_table(dest / "events")
    profiles = pq.read_table(dest / "profiles")
    day = events["time"].cast(pa.int64()).to_numpy() // 86_400_000_000
    user = events["user"].combine_chunks().dictionary_encode().indices.to_numpy()
    active = len(np.unique(user * 100_000 + day))
    possible = (START_DAY + 400 - profiles["registered"].cast(pa.int32()).to_numpy()).sum()
    # Users differ: the standard error comes from their number, about 0.1 per user in the worlds with archetypes.
    assert active / possible == pytest.approx(0.1, abs=4 * 0.1 / np.sqrt(1500))


def test_festival_lifts_the_sensitive_only(tmp_path: Path) -> None:
    world = world_of(Options(days=400))
    p_AD = world.active()
    start = next(row.start for row in world.calendar if row.event_type == "festival") - START_DAY
    for archetype, p_D in zip(world.archetypes, p_AD, strict=True):
        odds = p_D / (1 - p_D)
        lift = odds[start] / odds[start + 14]
        if "match" not in archetype:
            assert (lift > 4) == ("festival" in archetype), archetype


def test_planted_effect_lies_in_its_interval(tmp_path: Path) -> None:
    options = {"users": 6000, "shards": 2, "days": 200, "treatment_odds": 2.0, "treatment_days": 14}
    dest = write(tmp_path, **options)
    world = world_of(Options.of(options))
    events, profiles = pq.read_table(dest / "events"), pq.read_table(dest / "profiles")
    day = events["time"].cast(pa.int64()).to_numpy() // 86_400_000_000
    users = profiles["user"].to_pylist()
    number = np.array([int(user[1:]) for user in users])
    assert (number == np.arange(6000)).all()
    row = np.char.lstrip(np.array(events["user"].to_pylist()), "u").astype(int)
    inside = np.unique(np.stack([row, day])[:, day >= world.treatment_from], axis=1)
    days = np.bincount(inside[0], minlength=6000)
    known = profiles["registered"].cast(pa.int32()).to_numpy() < world.treatment_from
    treated = np.array([cohort_of(user, world.options.cohorts, world.options.salt) == "treatment" for user in users])
    truth = world.planted_effect()
    for name, value in (("active_days", days.astype(float)), ("active_any", (days > 0).astype(float))):
        groups = [value[known & (treated == arm)] for arm in (True, False)]
        error = np.sqrt(sum(group.var() / len(group) for group in groups))
        assert groups[0].mean() - groups[1].mean() == pytest.approx(truth[name], abs=4 * error), name
        assert truth[name] > 3 * error, name  # the test can tell the effect from none
    assert world_of(Options()).planted_effect() == {"active_days": 0.0, "active_any": 0.0}


def test_cohorts_follow_the_hash() -> None:
    shares = {"treatment": 0.3, "control": 0.7}
    names = [cohort_of(f"u{number}", shares, "s") for number in range(4000)]
    assert names.count("treatment") / 4000 == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 4000))
    assert names != [cohort_of(f"u{number}", shares, "t") for number in range(4000)]
    # The rule as documented; changing it would reassign running experiments.
    u = int(hashlib.sha256(b"s:u1").hexdigest()[:16], 16) / 2**64
    assert cohort_of("u1", shares, "s") == ("treatment" if u < 0.3 else "control")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 1}, "unknown options \['speed'\]"),
        ({"world": "flat"}, "world: expected one of"),
        ({"users": "many"}, "users: expected int, got 'many'"),
        ({"users": 2, "shards": 3}, "shards: expected 1 .. users"),
        ({"activity": 0.9}, "activity: expected"),
        ({"cohorts": {"treatment": 0.5}}, "cohorts: expected shares that sum to 1"),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path, **options)


def test_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected no path"):
        simulator.write(str(tmp_path), LOCAL, "somewhere", {})
