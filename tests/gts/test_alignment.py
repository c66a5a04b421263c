import math

import numpy as np
import pytest
import torch

from lum_ray.gts.align_stage import BOS, AlignStage, vocabulary, word_table
from lum_ray.gts.alignment import (
    SMOOTHING,
    TASKS,
    contrastive,
    generation,
    groups_of,
    hard_negatives,
    matching,
)
from lum_ray.gts.behaviours import Behaviours
from lum_ray.stage import to_device
from tests.gts.world import inputs_of, rows_of, samples_of, tiny_config

NOBODY = torch.zeros(1, 2, 2, dtype=torch.bool)


def test_contrastive_of_two_by_hand() -> None:
    similarity = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    there = torch.ones(1, 2, dtype=torch.bool)

    def cross(own: float, other: float) -> float:
        log_z = math.log(math.exp(own) + math.exp(other))
        return (1 - SMOOTHING) * (log_z - own) + SMOOTHING * (log_z - other)

    rows, columns = cross(2, 0) + cross(1, 0), cross(2, 0) + cross(1, 0)
    assert contrastive(similarity, there, NOBODY).item() == pytest.approx((rows + columns) / 2)


def test_contrastive_counts_neither_the_absent_nor_the_same_text() -> None:
    similarity = torch.tensor([[[2.0, 9.0], [9.0, 1.0]]])
    same = torch.ones(1, 2, 2, dtype=torch.bool)
    assert contrastive(similarity, torch.ones(1, 2, dtype=torch.bool), same).item() == pytest.approx(0.0, abs=1e-5)
    alone = torch.tensor([[True, False]])
    assert contrastive(similarity, alone, NOBODY).item() == pytest.approx(0.0, abs=1e-5)


def test_hard_negatives_are_the_others_in_proportion() -> None:
    similarity = torch.zeros(1, 3, 3)
    similarity[0, 0] = torch.tensor([50.0, math.log(3.0), 0.0])  # others: 3/4, 1/4
    there, same = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, 3, dtype=torch.bool)
    picks = [hard_negatives(similarity, there, same, torch.full((1, 3), u))[0, 0].item() for u in (0.1, 0.7, 0.8)]
    assert picks == [1, 1, 2]
    lonely = torch.tensor([[True, False, False]])
    assert hard_negatives(similarity, lonely, same, torch.full((1, 3), 0.5))[0, 0].item() == 0


def test_matching_and_generation_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    loss = matching(logits, torch.tensor([True, False]), torch.tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx(-math.log(0.75) + 0.5 * math.log(2))
    words = torch.tensor([[BOS, 2, 0]])
    scores = torch.zeros(1, 3, 4)
    scores[0, 0, 2] = math.log(5.0)
    assert generation(scores, words, torch.tensor([True])).item() == pytest.approx(-math.log(5 / 8))


def test_words() -> None:
    known = vocabulary(["Red apple", "green Apple 3"])
    table = word_table(["Green apple", "unheard"], known, 4)
    assert [known[code] for code in table[0]] == ["<bos>", "green", "apple", "<eos>"]
    assert [known[code] for code in table[1]] == ["<bos>", "<unknown>", "<eos>", "<pad>"]


def made() -> tuple[AlignStage, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    config = tiny_config(align_group=8, window=2)
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=32, events=40)
    torch.manual_seed(0)
    stage = AlignStage(config, inputs, Behaviours(config, inputs, 1))
    train = stage.collate(rows, samples_of(rows, 120, step=1))
    held = stage.collate(rows, samples_of(rows, 135, step=2))
    device = torch.device("cpu")
    return stage, to_device(train, device), to_device(held, device)


def test_groups_are_a_function_of_user_and_step_alone() -> None:
    stage, _, _ = made()
    rows = rows_of(stage.inputs, users=12, events=40)
    whole = stage.collate(rows, samples_of(rows, 120, step=3))
    part = stage.collate(rows.take(np.array([4, 9])), samples_of(rows.take(np.array([4, 9])), 120, step=3))
    for name in whole:
        if name.endswith(("_BGK", "_BGT", "_BG", "_BGG")):
            assert np.array_equal(whole[name][[4, 9]], part[name]), name
    assert whole["counts_K"][0] == 12 * 8


@pytest.mark.parametrize("name", list(TASKS))
def test_each_task_lowers_its_own_held_out_loss(name: str) -> None:
    stage, train, held = made()
    task = TASKS[name]  # type: ignore[index]
    position = list(TASKS).index(name)

    def held_out() -> float:
        stage.module.eval()
        with torch.no_grad():
            value = float(task(stage.module, groups_of(held))) / float(held["counts_K"][position])
        stage.module.train()
        return value

    frozen = held_out()
    optimiser = torch.optim.Adam(stage.module.parameters(), lr=3e-3)
    for _ in range(25):
        optimiser.zero_grad()
        (task(stage.module, groups_of(train)) / train["counts_K"][position]).backward()
        optimiser.step()
    assert held_out() < 0.97 * frozen
