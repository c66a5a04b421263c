"""Collate and predict: nothing after the cut reaches an input, several cuts of a window are the single ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples
from lum_ray.lumos.stage import Floats, LumosStage
from lum_ray.stage import Arrays, to_device
from lum_ray.steps import prepare
from lum_ray.steps.prepare import Prepared

INPUTS = ("values_AU", "slot_A", "pads_B", "numbers_BN", "categories_BG", "event_rows_ES", "history_event_BT",
          "future_event_BCX", "visible_BC")  # fmt: skip
END = 20089


@pytest.fixture(scope="module")
def prepared(tiny: Run) -> Prepared:
    return prepare(tiny)


@pytest.fixture(scope="module")
def rows(prepared: Prepared) -> Rows:
    return Timelines.open(prepared.timelines.uri).read(range(8))


def stage_of(tiny: Run, prepared: Prepared, until_day: int = END, cuts: int = 1, **changes: object) -> LumosStage:
    torch.manual_seed(0)
    section = dataclasses.replace(tiny.section, **changes)
    return LumosStage(section, prepared.inputs, prepared.calendar_table, until_day, 28, cuts)


def samples_of(rows: Rows, cut: int) -> Samples:
    row = np.flatnonzero(rows.first_day + 40 < cut)
    return Samples(row, np.full(len(row), cut, np.int32), np.zeros(len(row), np.int32))


def test_no_event_at_or_after_the_cut_changes_an_input(tiny: Run, prepared: Prepared, rows: Rows) -> None:
    cut = 20000
    stage, samples = stage_of(tiny, prepared), samples_of(rows, cut)
    before = stage.collate(rows, samples)
    values = rows.values.copy()
    values[rows.days >= cut] += 7
    after = stage.collate(dataclasses.replace(rows, values=values), samples)
    assert any(rows.days >= cut)
    for name in INPUTS:
        assert before[name].tobytes() == after[name].tobytes(), name
    assert before["daily_BCFV"].tobytes() != after["daily_BCFV"].tobytes()


def test_no_target_reaches_until_day(tiny: Run, prepared: Prepared, rows: Rows) -> None:
    samples = samples_of(rows, 20000)
    free, bound = (stage_of(tiny, prepared, until).collate(rows, samples) for until in (END, 20003))
    assert not np.isnan(free["daily_BCFV"]).any()
    assert np.isnan(bound["daily_BCFV"][:, :, 3:]).all()
    assert not np.isnan(bound["daily_BCFV"][:, :, :3]).any()
    assert np.isnan(bound["horizon_BCH"]).all()
    assert bound["counts_K"][0] == 3 * len(samples)


def test_several_cuts_of_a_window_are_the_single_cuts(tiny: Run, prepared: Prepared, rows: Rows) -> None:
    dense = stage_of(tiny, prepared, cuts=3, causal=True, cuts_per_window=3, cut_stride_days=5)
    single = LumosStage(dense.config, dense.inputs, prepared.calendar_table, END, 28, 1, dense.module)
    samples = samples_of(rows, 20000)
    many = dense.collate(rows, samples)
    assert many["visible_BC"][0].tolist() == [18, 23, 28]
    for column, cut in enumerate((19990, 19995, 20000)):
        one = single.collate(rows, Samples(samples.row, np.full(len(samples), cut, np.int32), samples.draw))
        np.testing.assert_array_equal(many["daily_BCFV"][:, column], one["daily_BCFV"][:, 0])
        np.testing.assert_array_equal(
            many["event_rows_ES"][many["future_event_BCX"][:, column]],
            one["event_rows_ES"][one["future_event_BCX"][:, 0]],
        )


def test_shuffled_future_events_leave_the_past_and_the_weekdays(tiny: Run, prepared: Prepared, rows: Rows) -> None:
    right, wrong = (stage_of(tiny, prepared, future_events=how) for how in (True, "shuffled"))
    rhythm, differs = right.inputs.rhythm_width, 0
    for cut in range(19980, 20010, 7):
        known, told = (stage.collate(rows, samples_of(rows, cut)) for stage in (right, wrong))

        def of(batch: Arrays, name: str) -> Floats:
            return np.asarray(batch["event_rows_ES"][batch[name]])

        assert np.array_equal(of(known, "history_event_BT"), of(told, "history_event_BT"))
        ahead, moved = of(known, "future_event_BCX"), of(told, "future_event_BCX")
        assert np.array_equal(ahead[..., :rhythm], moved[..., :rhythm])
        differs += not np.array_equal(ahead, moved)
    assert differs > 2
    # a what-if is told what it asks for
    batches = [stage.collate(rows, samples_of(rows, 20000), [right.calendar]) for stage in (right, wrong)]
    assert batches[0]["event_rows_ES"].tobytes() == batches[1]["event_rows_ES"].tobytes()


def test_a_cut_too_early_for_the_user_is_not_supervised(tiny: Run, prepared: Prepared, rows: Rows) -> None:
    stage = stage_of(tiny, prepared, cuts=2, causal=True, cuts_per_window=2, cut_stride_days=20)
    young = dataclasses.replace(rows, first_day=np.full(len(rows), 19960, np.int32))
    batch = stage.collate(young, Samples(np.arange(4), np.full(4, 20000, np.int32), np.zeros(4, np.int32)))
    assert batch["valid_BC"].tolist() == [[False, True]] * 4
    assert np.isnan(batch["daily_BCFV"][:, 0]).all()
    assert batch["pads_B"].tolist() == [0] * 4
    assert (
        stage.collate(young, Samples(np.arange(1), np.full(1, 19970, np.int32), np.zeros(1, np.int32)))["pads_B"] == 18
    )


def test_an_empty_micro_batch_has_no_count_but_a_gradient(tiny: Run, prepared: Prepared, rows: Rows) -> None:
    stage = stage_of(tiny, prepared)
    nothing = Samples(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))
    arrays = stage.collate(rows.take(np.zeros(0, np.int64)), nothing)
    assert arrays["counts_K"].sum() == 0
    assert arrays["tokens"] == 0
    sums, counts = stage.loss(to_device(arrays, torch.device("cpu")))
    assert counts.sum() == 0
    sums.sum().backward()
    grads = [p.grad for p in stage.module.parameters() if p.grad is not None]
    assert grads
    assert all(float(g.abs().sum()) == 0 for g in grads)


def test_counts_of_collate_are_those_of_the_loss(tiny: Run, prepared: Prepared, rows: Rows) -> None:
    stage = stage_of(tiny, prepared)
    arrays = stage.collate(rows, samples_of(rows, 20000))
    _, counts = stage.loss(to_device(arrays, torch.device("cpu")))
    np.testing.assert_array_equal(arrays["counts_K"], counts.numpy())


def test_permuting_users_permutes_predictions(tiny: Run, prepared: Prepared, rows: Rows) -> None:
    stage, samples = stage_of(tiny, prepared), samples_of(rows, 20000)
    stage.module.eval()
    order = np.random.default_rng(0).permutation(len(samples))
    shuffled = Samples(samples.row[order], samples.cut[order], samples.draw[order])
    with torch.no_grad():
        one, other = (
            stage.predict(to_device(stage.collate(rows, chosen), torch.device("cpu"))) for chosen in (samples, shuffled)
        )
    width = len(one["p"]) // len(samples)
    np.testing.assert_allclose(
        one["p"].reshape(-1, width)[order], other["p"].reshape(-1, width), atol=1e-6, equal_nan=True
    )


def test_prediction_rows_hold_raw_units(tiny: Run, prepared: Prepared, rows: Rows) -> None:
    stage, samples = stage_of(tiny, prepared), samples_of(rows, 20000)
    arrays = stage.collate(rows, samples)
    found = stage.predict(to_device(arrays, torch.device("cpu")))
    amount = stage.terms.index("amount")
    chosen = (found["term"] == amount) & (found["offset"] == 2)
    np.testing.assert_allclose(found["y"][chosen], arrays["daily_BCFV"][:, 0, 2, amount] * 0.01)
    over = found["term"] == stage.terms.index("amount_sum_7")
    assert (found["offset"][over] == 0).all()
    assert over.sum() == len(samples)
