import numpy as np
import pytest
import torch

from lum_ray.gts.align_stage import AlignStage
from lum_ray.gts.behaviours import Behaviours
from lum_ray.gts.config import GtsInputs
from lum_ray.gts.inference import best, generate, rerank, without_seen
from lum_ray.gts.prior import repeat_features
from lum_ray.gts.stage import GtsStage
from lum_ray.stage import Stage, to_device
from tests.gts.world import inputs_of, rows_of, samples_of, tiny_config

CPU = torch.device("cpu")


def gradients(stage: Stage, parts: list[dict[str, np.ndarray]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # type: ignore[type-arg]
    """Loss and gradients of a step over micro-batches: global sums over global counts."""
    counts = torch.from_numpy(sum(part["counts_K"] for part in parts))
    stage.module.zero_grad()
    total = torch.zeros(())
    for part in parts:
        sums, _ = stage.loss(to_device(part, CPU))
        loss = (sums / counts.clamp(min=1)).sum()
        loss.backward()
        total = total + loss.detach()
    found = {name: p.grad.clone() for name, p in stage.module.named_parameters() if p.grad is not None}
    return total, found


@pytest.mark.parametrize("phase", [1, 2])
def test_two_ranks_equal_one_with_the_double_batch(phase: int) -> None:
    """The negatives, readings, positives and hidden modalities of a step are the same however its rows are dealt out;
    a rank may even bring none."""
    config = tiny_config()
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=12, events=30)
    torch.manual_seed(0)
    stage: Stage = GtsStage(config, inputs, 140)
    if phase == 1:
        stage = AlignStage(config, inputs, Behaviours(config, inputs, 1))
    stage.module.train()
    dealt = [np.arange(0, 5), np.arange(5, 12), np.zeros(0, np.int64)]
    whole = [stage.collate(rows, samples_of(rows, step=3))]
    parts = [stage.collate(rows.take(some), samples_of(rows.take(some), step=3)) for some in dealt]
    one, grads = gradients(stage, whole)
    two, also = gradients(stage, parts)
    assert one.item() == pytest.approx(two.item(), rel=1e-5)
    for name, value in grads.items():
        assert (value - also[name]).norm() <= 1e-5 * max(1.0, float(value.norm())), name
    other = stage.collate(rows, samples_of(rows, step=4))
    assert float(gradients(stage, [other])[0]) != pytest.approx(one.item(), rel=1e-4)  # another step is another draw


def test_no_target_is_among_its_own_negatives() -> None:
    config = tiny_config()
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=12, events=30)
    stage = GtsStage(config, inputs, 140)
    batch = stage.collate(rows, samples_of(rows))
    candidates = batch["unique_U"][batch["candidate_C"]]
    masked = set(zip(batch["masked_query_X"].tolist(), candidates[batch["masked_column_X"] - 1].tolist(), strict=True))
    for query, place in enumerate(batch["positive_R"].tolist()):
        item = int(batch["unique_U"][place])
        assert item not in candidates or (query, item) in masked
    # the asked candidates are distinct, and only the first is a target
    asked = batch["unique_U"][batch["asked_PK"]]
    assert all(len(set(row)) == config.candidates for row in asked.tolist())


def test_negatives_are_a_function_of_seed_and_step() -> None:
    config = tiny_config(negatives=64)
    stage = GtsStage(config, inputs_of(config=config), 140)
    assert np.array_equal(stage.negatives(5), stage.negatives(5))
    assert not np.array_equal(stage.negatives(5), stage.negatives(6))
    drawn = np.concatenate([stage.negatives(step) for step in range(300)])
    often = np.bincount(drawn, minlength=30) / 300
    expected = 1 - (1 - stage.weight_N / stage.weight_N.sum()) ** 64
    assert np.abs(often - expected).max() < 0.12  # four standard errors of .03


def test_reading_r_knows_nothing_of_the_labels() -> None:
    config = tiny_config()
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=8, events=30)
    stage = GtsStage(config, inputs, 140)
    names = set(stage.questions(rows, samples_of(rows)))
    assert not {name for name in names if "positive" in name or "target" in name or "literal" in name}


def test_lists() -> None:
    config = tiny_config()
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=8, events=30)
    stage = GtsStage(config, inputs, 140)
    stage.module.eval()
    batch = to_device(stage.questions(rows, samples_of(rows)), CPU)
    scores = stage.scores(batch)
    items, values = best(scores, 10)
    assert items.shape == (8, 10) and (np.diff(values) <= 0).all()
    again, falling = rerank(stage, batch, items, values, 4)
    assert np.array_equal(np.sort(again, axis=1), np.sort(items, axis=1)) and np.array_equal(again[:, 4:], items[:, 4:])
    assert (np.diff(falling) <= 0).all()
    logits = stage.propensities(batch, torch.from_numpy(again[:, :4].copy()))
    assert (logits.diff(dim=1) <= 1e-5).all()
    filtered, _ = best(without_seen(scores, batch), 30)
    seen = set(zip(batch["had_sample_S"].tolist(), batch["had_item_S"].tolist(), strict=True))
    for row, items_of in enumerate(filtered.tolist()):
        kept = [item for item in items_of if item >= 0]
        assert len(kept) == 30 - sum(row == sample for sample, _ in seen)
        assert not any((row, item) in seen for item in kept)


def test_a_wide_beam_finds_the_exhaustive_probabilities() -> None:
    """All leaves in the beam: the items' probabilities are those of the product over levels, and add up to 1."""
    config = tiny_config()
    inputs: GtsInputs = inputs_of(config=config)
    stage = GtsStage(config, inputs, 140)
    torch.nn.init.normal_(stage.module.prefixes.weight)
    state = torch.randn(3, 64)
    scores = generate(stage, state, beam=9)
    assert torch.allclose(scores.exp().sum(dim=1), torch.ones(3), atol=1e-5)
    items = torch.arange(inputs.count)
    for row in range(3):
        levels = stage.module.generate(state[row].expand(inputs.count, -1), items)
        paths = stage.module.behaviours.constants["digits_NL"]
        leaf = sum(level.log_softmax(-1).gather(1, paths[:, i : i + 1])[:, 0] for i, level in enumerate(levels))
        share = torch.from_numpy(np.exp(inputs.arrays["log_q_N"].astype(np.float64)))
        code = paths[:, 0] * 3 + paths[:, 1]
        within = share / torch.zeros(9, dtype=torch.float64).index_add(0, code, share)[code]
        assert torch.allclose(scores[row], (leaf + within.log().float()), atol=1e-4)
    narrow = generate(stage, state, beam=1)
    assert (torch.isfinite(narrow).sum(dim=1) <= 4).all()


def test_repeat_features_by_hand() -> None:
    recent = np.array([[1, 1, 1, 1], [0, 1, 3, 3]])
    found = repeat_features(np.array([1, 3]), np.array([1, 4]), np.array([4, 6]), recent, np.array([-2.0, -3.0]))
    logs = np.log([[2, 2, 2, 2], [1, 2, 4, 4]])
    expected = [[np.log(2), 0.0, np.log(0.25), -2.0, *logs[0]], [np.log(4), np.log(4), np.log(0.5), -3.0, *logs[1]]]
    assert found == pytest.approx(np.array(expected), abs=1e-6)


def test_before_training_scores_are_most_frequent_then_popular() -> None:
    config = tiny_config()
    inputs = inputs_of(config=config)
    rows = rows_of(inputs, users=8, events=40)
    stage = GtsStage(config, inputs, 140)
    stage.module.eval()
    torch.nn.init.zeros_(stage.module.user_out.weight)
    torch.nn.init.zeros_(stage.module.user_out.bias)
    batch = to_device(stage.questions(rows, samples_of(rows)), CPU)
    scores = stage.scores(batch).detach()
    log_q = torch.from_numpy(inputs.arrays["log_q_N"])
    had = torch.zeros_like(scores, dtype=torch.bool).index_put(
        (batch["had_sample_S"], batch["had_item_S"]), torch.tensor(True)
    )
    assert torch.allclose(scores[~had], log_q.expand_as(scores)[~had])
    share = batch["had_SF"][:, 2] - 0.1 * batch["had_SF"][:, 1] - 2.0
    assert torch.allclose(scores[batch["had_sample_S"], batch["had_item_S"]], share, atol=1e-5)
