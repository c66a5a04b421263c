"""The loader: the global steps are a function of (seed, step) alone; ranks split them, resuming finds them again."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lum_ray.artifacts import UserError
from lum_ray.data.loader import LANES, Arrays, Loader, Schedule, Step, micro_batch_count
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples, mix, share
from lum_ray.data.windows import CutPlan, history

PLAN = CutPlan(from_day=110, until_day=150, every_days=3, min_history_days=5)


def collate(rows: Rows, samples: Samples) -> Arrays:
    """Histories of 20 days, and enough to say whose they are."""
    sample, position, index = history(rows, samples, 20)
    x_STU = np.zeros((len(samples), 20, rows.values.shape[1]), np.int64)
    x_STU[sample, position] = rows.values[index]
    return {
        "x": x_STU,
        "hash": rows.user_hash[samples.row],
        "cut": samples.cut,
        "draw": samples.draw,
        "age": rows.profile["age"][samples.row].astype(float),
        "row_hash": rows.user_hash,
    }


def make_loader(uri: str, plan: CutPlan = PLAN, rank: int = 0, world: int = 1, **changes: Any) -> Loader:
    how = {"collate": collate, "batch": 32, "micro_batch": 8, "draws": 1, "seed": 1, "rank": rank, "world": world}
    return Loader(Timelines.open(uri), plan, **(how | changes))


def take(loader: Loader, steps: int) -> list[Step]:
    found = list(itertools.islice(loader, steps))
    loader.close()
    return found


def content(steps: list[Step]) -> list[list[dict[str, tuple[str, tuple[int, ...], bytes]]]]:
    """All arrays of the steps to the byte."""
    return [
        [{name: (str(a.dtype), a.shape, a.tobytes()) for name, a in micro.items()} for micro in step.micro_batches]
        for step in steps
    ]


def samples_of(steps: list[Step]) -> list[tuple[int, ...]]:
    """(hash, cut, draw) of every sample of the steps, sorted."""
    return sorted(
        sample
        for step in steps
        for micro in step.micro_batches
        for sample in zip(micro["hash"].tolist(), micro["cut"].tolist(), micro["draw"].tolist(), strict=True)
    )


def users_of(steps: list[Step]) -> list[int]:
    return [int(key) for step in steps for micro in step.micro_batches for key in micro["row_hash"]]


lane_sizes = st.lists(st.integers(0, 40), min_size=LANES, max_size=LANES).filter(any).map(np.array)


@settings(max_examples=40)
@given(lane_sizes, st.integers(0, 9), st.data())
def test_places_of_an_epoch_equal_the_merge_of_all_lanes(sizes: np.ndarray, epoch: int, data: st.DataObject) -> None:
    phases = share(mix(1, epoch, np.arange(LANES))).tolist()
    keys = sorted(((i + phases[lane]) / int(n), lane) for lane, n in enumerate(sizes) for i in range(n))
    place = data.draw(st.integers(0, len(keys)))
    expected = np.bincount([lane for _, lane in keys[:place]], minlength=LANES)
    assert Schedule(sizes, 8, 1).before(epoch, place).tolist() == expected.tolist()


@settings(max_examples=40)
@given(lane_sizes, st.integers(1, 400), st.integers(0, 50))
def test_a_step_has_exactly_its_batch_and_steps_join(sizes: np.ndarray, batch: int, step: int) -> None:
    schedule = Schedule(sizes, batch, 1)
    pieces, following = schedule.pieces(step), schedule.pieces(step + 1)
    assert sum(int((end - begin).sum()) for _, begin, end in pieces) == batch
    assert all(np.all(end >= begin) for _, begin, end in pieces)
    for (_, _, end), (_, begin, _) in itertools.pairwise(pieces):
        assert end.tolist() == sizes.tolist()
        assert not begin.any()
    (epoch, _, end), (next_epoch, begin, _) = pieces[-1], following[0]
    assert (begin.tolist(), next_epoch) == (end.tolist(), epoch) or (not begin.any() and next_epoch == epoch + 1)


def test_places_of_a_huge_epoch_cost_nothing() -> None:
    schedule = Schedule(np.arange(LANES) * 10**8 + 1, 4096, 1)
    for place in (0, 1, 12_345_678_901, schedule.rows - 1, schedule.rows):
        assert int(schedule.before(0, place).sum()) == place
    start = time.perf_counter()
    schedule.pieces(40_000_000)
    assert time.perf_counter() - start < 0.5


def test_lanes_give_their_share_to_every_step() -> None:
    sizes = mix(1, np.arange(LANES)).astype(np.int64) % 500 + 1000
    for step in range(50):
        for _, begin, end in Schedule(sizes, 640, 1).pieces(step):
            quota = sizes * (end - begin).sum() / sizes.sum()
            assert np.abs(end - begin - quota).max() < 2


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_split_the_steps_of_one_rank(stored: str, ranks: int) -> None:
    steps = 24
    alone = take(make_loader(stored, draws=2), steps)
    split = [take(make_loader(stored, draws=2, rank=rank, world=ranks), steps) for rank in range(ranks)]
    for index in range(steps):
        parts = [steps[index] for steps in split]
        assert samples_of(parts) == samples_of(alone[index : index + 1])
        assert len(users_of(parts)) == 32
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert {(part.index, part.epoch) for part in parts} == {(index, alone[index].epoch)}
        for part in parts:
            sizes = [len(micro["row_hash"]) for micro in part.micro_batches]
            assert max(sizes) <= 8
            assert max(sizes) - min(sizes) <= 1
    lanes = [{key % LANES for key in users_of(steps)} for steps in split]
    assert all(not one & other for one, other in itertools.combinations(lanes, 2))


def test_micro_batches_are_what_the_fullest_rank_needs() -> None:
    sizes = np.zeros(LANES, np.int64)
    sizes[[0, 1, 2]] = 10, 1, 4
    pieces = Schedule(sizes, 15, 1).pieces(0)
    assert [micro_batch_count(pieces, world, 4) for world in (1, 2, 3, 64)] == [4, 4, 3, 3]


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_row_comes_once_an_epoch(stored: str, ranks: int) -> None:
    epochs = 3
    every = Timelines.open(stored).read(range(64)).user_hash.tolist()
    assert len(every) == 300
    loaders = [make_loader(stored, rank=rank, world=ranks, batch=50) for rank in range(ranks)]
    assert loaders[0].steps_per_epoch == 6
    found = [key for loader in loaders for key in users_of(take(loader, 6 * epochs))]
    assert Counter(found) == dict.fromkeys(every, epochs)


def test_the_order_changes_with_the_epoch_and_the_seed(stored: str) -> None:
    steps = take(make_loader(stored, batch=50), 12)
    first, second = users_of(steps[:6]), users_of(steps[6:])
    other = users_of(take(make_loader(stored, batch=50, seed=2), 6))
    assert sorted(first) == sorted(second) == sorted(other)
    for one, two in itertools.combinations((first, second, other), 2):
        assert np.mean(np.array(one) == np.array(two)) < 0.1
        within = [[[key for key in order if key % LANES == lane] for order in (one, two)] for lane in range(LANES)]
        assert np.mean([mine == theirs for mine, theirs in within]) < 0.4


def test_small_lanes_meet_others_each_epoch() -> None:
    """64 lanes of one row: a step's rows must not be the same company in every epoch."""
    schedule = Schedule(np.ones(LANES, np.int64), 8, 1)
    companies = {tuple(np.flatnonzero(end - begin)) for s in range(80) for _, begin, end in schedule.pieces(s)}
    assert len(companies) == 80


def test_windows_change_from_epoch_to_epoch(stored: str) -> None:
    steps = take(make_loader(stored, batch=50), 12)
    first, second = ({key: cut for key, cut, _ in samples_of(part)} for part in (steps[:6], steps[6:]))
    assert first.keys() == second.keys()
    assert 0.02 < np.mean([first[key] == second[key] for key in first]) < 0.5


def test_a_step_that_straddles_epochs_draws_each_row_in_its_own_epoch(stored: str) -> None:
    """Steps of 50 and of 60 rows cut the same order: the same samples after 300 and after 600 rows."""
    for rows in (300, 600):
        assert samples_of(take(make_loader(stored, batch=50), rows // 50)) == samples_of(
            take(make_loader(stored, batch=60), rows // 60)
        )
    straddling = take(make_loader(stored, batch=70), 30)
    assert samples_of(straddling) == samples_of(take(make_loader(stored, batch=50), 42))


@pytest.mark.parametrize("cache_mib", [0, 256])
@pytest.mark.parametrize("ranks", [1, 3])
def test_resuming_gives_the_bytes_of_the_uninterrupted_stream(stored: str, ranks: int, cache_mib: int) -> None:
    rank = ranks - 1
    whole = content(take(make_loader(stored, rank=rank, world=ranks, draws=2), 25))
    for start in (0, 1, 8, 9, 10, 19):
        loader = make_loader(stored, rank=rank, world=ranks, draws=2, cache_mib=cache_mib)
        assert content(take(loader.seek(start), 5)) == whole[start : start + 5]
        assert loader.position == start + 5
    loader = make_loader(stored, rank=rank, world=ranks, draws=2, cache_mib=cache_mib)
    for start in (20, 3):
        assert content(list(itertools.islice(loader.seek(start), 2))) == whole[start : start + 2]
    loader.close()


def test_parts_give_the_bytes_of_their_merger(
    stored: str, world: Any, write: Callable[..., str], tmp_path: Path
) -> None:
    parts = write(tmp_path / "parts", world, splits=(131,))
    assert content(take(make_loader(parts), 12)) == content(take(make_loader(stored), 12))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_an_epoch_reads_each_byte_at_most_1_2_times(
    make: Any, write: Callable[..., str], tmp_path: Path, ranks: int
) -> None:
    uri = write(tmp_path / "big", make(users=1000, end_day=130), log2_buckets=7)
    files = list(Path(uri).rglob("*.parquet"))
    size = sum(path.stat().st_size for path in files)
    footers = sum(pq.read_metadata(path).serialized_size for path in files)
    made = []

    def counting(rows: Rows, samples: Samples) -> Arrays:
        made.append(len(rows))
        return {}

    def read_by(step: int) -> int:
        """Bytes after `step` steps over all ranks, once the steps that are prefetched beyond are made too."""
        for loader in loaders:
            made.clear()
            taken = list(itertools.islice(loader, step - loader.position - 2))
            while len(made) < len(taken) + (2 if step == 10 else 0):
                time.sleep(0.01)
        return sum(loader.stats.bytes_read for loader in loaders)

    how = {"collate": counting, "cache_mib": 0, "batch": 100, "micro_batch": 100, "world": ranks}
    loaders = [make_loader(uri, rank=rank, **how) for rank in range(ranks)]
    first = read_by(10)
    assert sum(loader.stats.rows_read for loader in loaders) == 1000
    assert first <= size + (ranks - 1) * footers  # each rank needs the footers, once a run
    second = read_by(20) - first
    assert 0.5 * (size - footers) < second <= 1.2 * size
    for loader in loaders:
        loader.close()


def test_rows_that_fit_the_cache_are_read_once(stored: str) -> None:
    loader = make_loader(stored, batch=50)
    take(loader, 30)
    assert loader.stats.rows_read == 300


def test_rows_without_a_cut_leave_their_place_empty_and_are_counted(stored: str) -> None:
    plan = CutPlan(from_day=157, until_day=159, every_days=1, min_history_days=0)
    rows = Timelines.open(stored).read(range(64))
    barred = int((plan.ranges(rows)[1] == 0).sum())
    assert 0 < barred < 300
    loader = make_loader(stored, plan, batch=50, draws=3)
    steps = take(loader, 6)
    assert sum(step.rows_without_cut for step in steps) == loader.stats.rows_without_cut == barred
    assert len(samples_of(steps)) == 3 * (300 - barred)
    assert len(users_of(steps)) == 300
    nobody = take(make_loader(stored, CutPlan(900, 900, 1, 0), batch=50), 2)
    assert samples_of(nobody) == []
    assert len(users_of(nobody)) == 100


@pytest.mark.parametrize("cache_mib", [0, 256])
def test_a_tiny_data_set_repeats_over_epochs(
    make: Any, write: Callable[..., str], tmp_path: Path, cache_mib: int
) -> None:
    uri = write(tmp_path / "tiny", make(users=3))
    loader = make_loader(uri, batch=8, cache_mib=cache_mib)
    assert loader.steps_per_epoch == 1
    steps = take(loader, 3)
    assert [step.epoch for step in steps] == [0, 2, 5]
    assert all(len(users_of([step])) == 8 for step in steps)
    assert set(Counter(users_of(steps)).values()) == {8}
    whole = samples_of(steps)
    ranks = [take(make_loader(uri, batch=8, rank=rank, world=5, cache_mib=cache_mib), 3) for rank in range(5)]
    assert samples_of([step for part in ranks for step in part]) == whole
    assert any(len(micro["hash"]) == 0 for part in ranks for step in part for micro in step.micro_batches)
    for part in zip(*ranks, strict=True):
        assert len({len(step.micro_batches) for step in part}) == 1


class BrokenError(Exception):
    pass


def test_an_exception_in_the_thread_reaches_the_consumer_and_no_step_is_passed_over(stored: str) -> None:
    calls = itertools.count()
    broken = True

    def failing(rows: Rows, samples: Samples) -> Arrays:
        if next(calls) == 5 and broken:
            raise BrokenError("row 7")
        return collate(rows, samples)

    loader = make_loader(stored, collate=failing, micro_batch=16)
    assert len(list(itertools.islice(loader, 2))) == 2
    for _ in range(2):
        with pytest.raises(BrokenError, match="row 7"):
            next(loader)
        assert loader.position == 2
    broken = False
    assert content(take(loader.seek(2), 1)) == content(take(make_loader(stored, micro_batch=16), 3))[2:]


def test_a_stop_iteration_in_collate_does_not_end_the_stream_silently(stored: str) -> None:
    loader = make_loader(stored, collate=lambda rows, samples: next(iter([])))
    with pytest.raises(RuntimeError, match="collate raised StopIteration"):
        list(loader)
    loader.close()


def test_a_missing_file_reaches_the_consumer(world: Any, write: Callable[..., str], tmp_path: Path) -> None:
    loader = make_loader(write(tmp_path / "t", world))
    (tmp_path / "t" / "part-100-160" / "0000.parquet").unlink()
    with pytest.raises(UserError, match="it is not there"):
        next(loader)
    loader.close()


def test_prefetch_is_bounded_and_in_one_other_thread(stored: str) -> None:
    threads: list[int] = []

    def watching(rows: Rows, samples: Samples) -> Arrays:
        threads.append(threading.get_ident())
        return collate(rows, samples)

    loader = make_loader(stored, collate=watching, micro_batch=32, prefetch=3)
    next(loader)
    while len(threads) < 4:  # the step that was taken and three more
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(threads) == 4
    assert set(threads) != {threading.get_ident()}
    assert len(set(threads)) == 1
    loader.close()


def test_close_ends_the_thread_and_waits_no_longer_than_asked(stored: str) -> None:
    before = set(threading.enumerate())
    loader = make_loader(stored)
    next(loader)
    assert set(threading.enumerate()) - before
    loader.close()
    loader.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert not set(threading.enumerate()) - before

    entered, release = threading.Event(), threading.Event()

    calls = itertools.count()

    def stuck(rows: Rows, samples: Samples) -> Arrays:
        if next(calls):
            entered.set()
            release.wait(20)
        return {}

    loader = make_loader(stored, collate=stuck, micro_batch=32)
    next(loader)
    assert entered.wait(10)
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"still at work 0\.2 s after close"):
        loader.close(timeout_s=0.2)
    assert time.perf_counter() - start < 5
    release.set()


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"micro_batch": 0}, {"draws": 0}, {"prefetch": 0}, {"rank": 1}])
def test_impossible_sizes_are_refused_by_name(stored: str, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_loader(stored, **wrong)


def test_more_ranks_than_lanes_are_refused(stored: str) -> None:
    with pytest.raises(UserError, match=r"at most 64 workers.*got 65"):
        make_loader(stored, world=65)
