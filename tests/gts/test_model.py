import dataclasses

import numpy as np
import pytest
import torch

from lum_ray.gts.config import PREFIX
from lum_ray.gts.intervals import DESCRIPTORS, descriptor_text
from lum_ray.gts.stage import GtsStage
from lum_ray.stage import to_device
from tests.gts.world import inputs_of, rows_of, samples_of, tiny_config

CPU = torch.device("cpu")


def made(**changes: object) -> tuple[GtsStage, dict[str, torch.Tensor]]:
    config = tiny_config(**changes)
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=8, events=30)
    torch.manual_seed(1)
    stage = GtsStage(config, inputs, 140)
    stage.module.eval()
    return stage, to_device(stage.questions(rows, samples_of(rows)), CPU)


def hidden(stage: GtsStage, batch: dict[str, torch.Tensor], target: int) -> torch.Tensor:
    module = stage.module
    fused = module.catalogue()[0]
    x = module.tokens(batch, fused[batch["unique_U"]])
    rows = torch.arange(len(x))
    with torch.no_grad():
        return module.read(batch, x, rows, 1, fused[torch.full((len(x),), target)])[0]


@pytest.mark.parametrize("position", ["front", "end"])
def test_where_a_target_reaches(position: str) -> None:
    """Source: GTS-LUM, target-aware modelling: in front, every later state sees it; at the end, only the last."""
    stage, batch = made(target_position=position)
    one, two = hidden(stage, batch, 3), hidden(stage, batch, 4)
    for row, length in enumerate(batch["length_B"].tolist()):
        changed = (one[row] - two[row]).abs().amax(dim=1) > 1e-6
        if position == "front":
            assert changed[1 : PREFIX + length].all() and not changed[0]  # the task stands before it
        else:
            assert changed[PREFIX + length] and not changed[: PREFIX + length].any()


def test_without_a_target_reading_p_is_never_trained() -> None:
    config = tiny_config(target_position="none")
    inputs = inputs_of(config=config)
    rows = rows_of(inputs)
    batch = GtsStage(config, inputs, 140).collate(rows, samples_of(rows))
    assert len(batch["asked_sample_P"]) == 0 and len(batch["query_sample_R"]) > 0


def test_p_starts_from_what_r_knows_and_does_not_train_it() -> None:
    config = tiny_config(propensity_share=1.0)
    inputs = inputs_of(config=config)
    rows = rows_of(inputs)
    stage = GtsStage(config, inputs, 140)
    batch = to_device(stage.collate(rows, samples_of(rows)), CPU)
    assert len(batch["asked_sample_P"]) > 0
    torch.nn.init.normal_(stage.module.user_out.weight)
    torch.nn.init.normal_(stage.module.propensity.out.weight)  # type: ignore[union-attr]
    stage.module.losses(batch)[1].backward()  # type: ignore[no-untyped-call]
    matches = [*stage.module.user_out.parameters(), *stage.module.item_out.parameters(), stage.module.log_scale]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in matches)
    assert stage.module.target.grad is not None and stage.module.target.grad.any()
    assert stage.module.behaviours.project.weight.grad.any()  # type: ignore[union-attr]


def test_a_part_of_the_day_is_alike_on_all_weekdays() -> None:
    """What is learned of Monday evening holds on Tuesday evening, and less on Monday at lunchtime."""
    stage, _ = made()
    moods = stage.module.moods(stage.module.constants["words_ND"])  # type: ignore[misc]
    code = {descriptor_text(code): code for code in range(DESCRIPTORS)}
    monday, tuesday = moods[code["Monday evening"]], moods[code["Tuesday evening"]]
    lunch = moods[code["Wednesday lunchtime"]]
    assert torch.cosine_similarity(monday, tuesday, dim=0) > torch.cosine_similarity(monday, lunch, dim=0) + 0.2


def test_pads_never_change_a_score() -> None:
    stage, batch = made()
    scores = stage.scores(batch)
    more = {
        name: torch.nn.functional.pad(value, (0, 7)) if name.endswith("_BL") else value for name, value in batch.items()
    }
    more["group_BL"][:, -7:] = -1
    assert torch.allclose(scores, stage.scores(more), atol=1e-5)


def test_permuting_users_permutes_scores() -> None:
    config = tiny_config()
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=8)
    stage = GtsStage(config, inputs, 140)
    stage.module.eval()
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])
    plain = stage.scores(to_device(stage.questions(rows, samples_of(rows)), CPU))
    moved = rows.take(order)
    assert torch.allclose(
        plain[order], stage.scores(to_device(stage.questions(moved, samples_of(moved)), CPU)), atol=1e-5
    )


def test_no_event_after_the_cut_changes_a_score() -> None:
    config = tiny_config()
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=8, events=40)
    stage = GtsStage(config, inputs, 140)
    stage.module.eval()
    later = rows.values.copy()
    later[rows.days >= 125, 0] = inputs.arrays["hash_N"][0]
    changed = dataclasses.replace(rows, values=later)
    batches = [to_device(stage.questions(part, samples_of(part)), CPU) for part in (rows, changed)]
    assert torch.equal(stage.scores(batches[0]), stage.scores(batches[1]))


def test_the_llm_stays_frozen_and_out_of_the_optimiser() -> None:
    config = tiny_config()
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=8)
    stage = GtsStage(config, inputs, 140)
    before = [parameter.clone() for parameter in stage.module.decoder.parameters()]
    own = {id(parameter) for parameter in stage.module.decoder.parameters()}
    groups = stage.trainable()
    assert not own & {id(parameter) for group in groups for parameter in group["params"]}
    optimiser = torch.optim.AdamW([p for group in groups for p in group["params"]], lr=0.1)
    sums, _ = stage.loss(to_device(stage.collate(rows, samples_of(rows)), CPU))
    sums.sum().backward()
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, stage.module.decoder.parameters(), strict=True))


def test_full_fine_tuning_and_lora_train_the_llm() -> None:
    for tune in ("full", "lora"):
        stage, _ = made(tune=tune)
        trained = {id(p) for group in stage.trainable() for p in group["params"]}
        own = [name for name, p in stage.module.decoder.named_parameters() if id(p) in trained]
        assert own and (tune == "full" or all("lora" in name for name in own))


def test_one_batch_can_be_learned_by_heart() -> None:
    config = tiny_config(dense=False, repeats=False, propensity_share=0.4)
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=10, events=30)
    torch.manual_seed(0)
    stage = GtsStage(config, inputs, 140)
    batch = to_device(stage.collate(rows, samples_of(rows)), CPU)
    optimiser = torch.optim.Adam([p for group in stage.trainable() for p in group["params"]], lr=1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        sums, counts = stage.loss(batch)
        means = sums / counts.clamp(min=1)
        means.sum().backward()
        optimiser.step()
    assert means[0] < 0.1 and means[1] < 0.1 and means[2] < 0.4, means


@pytest.mark.parametrize("how", ["full", "text", "component", "position", "none"])
def test_what_each_timestamp_arm_can_tell(how: str) -> None:
    """The same items in the same groups at other hours: neither `none` nor the groups' numbers can tell."""
    config = tiny_config(timestamps=how)
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=6, events=30)
    stage = GtsStage(config, inputs, 140)
    stage.module.eval()
    moved = rows.values.copy()
    moved[:, 1] += 3 * 3_600_000_000 * (np.arange(len(moved)) % 2)
    ordered = moved.copy()
    for start, stop in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        part = slice(int(start), int(stop))
        ordered[part, 1] = np.sort(moved[part, 1])
    days = (ordered[:, 1] // 86_400_000_000).astype(np.int32)
    other = dataclasses.replace(rows, values=ordered, days=days)
    one, two = (
        stage.user_states(to_device(stage.questions(part, samples_of(part, 141)), CPU)) for part in (rows, other)
    )
    assert torch.allclose(one, two, atol=1e-6) == (how in ("none", "position"))
