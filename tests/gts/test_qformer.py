import pytest
import torch

from lum_ray.gts.qformer import QFormer, hidden


def make(sight: str = "apart") -> tuple[QFormer, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    former = QFormer(16, 2, 4, 3).eval()
    parts = {
        "memory_BMD": torch.randn(2, 3, 16),
        "known_BM": torch.tensor([[True, True, False], [False, False, False]]),
        "ids_BJD": torch.randn(2, 1, 16),
        "text_BTD": torch.randn(2, 5, 16),
        "words_BT": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
    }
    return former, parts


def test_an_unknown_modality_is_never_read() -> None:
    former, parts = make()
    before, _ = former(parts["memory_BMD"], parts["known_BM"], parts["ids_BJD"])
    other = parts["memory_BMD"].clone()
    other[0, 2] = 99.0
    other[1] = -99.0
    after, _ = former(other, parts["known_BM"], parts["ids_BJD"])
    assert torch.equal(before, after)
    other[0, 0] += 1.0
    assert not torch.allclose(before[0], former(other, parts["known_BM"], parts["ids_BJD"])[0][0])


def test_pads_of_the_text_change_nothing() -> None:
    former, parts = make()
    for sight in ("apart", "both", "causal"):
        queries, text = former(**parts, sight=sight)
        other = parts | {"text_BTD": parts["text_BTD"].clone()}
        other["text_BTD"][1, 3:] = 7.0
        changed, also = former(**other, sight=sight)
        assert torch.allclose(queries, changed, atol=1e-6)
        assert torch.allclose(text[1, :3], also[1, :3], atol=1e-6)


@pytest.mark.parametrize("sight", ["apart", "both", "causal"])
def test_who_sees_whom(sight: str) -> None:
    former, parts = make()
    queries, text = former(**parts, sight=sight)
    later_word = parts | {"text_BTD": parts["text_BTD"].clone()}
    later_word["text_BTD"][0, 3] = torch.randn(16)
    q1, t1 = former(**later_word, sight=sight)
    assert torch.allclose(queries[0], q1[0], atol=1e-6) == (sight != "both")
    # the word before it sees it only where all see all (or, apart, where the text is bidirectional)
    assert torch.allclose(text[0, 2], t1[0, 2], atol=1e-6) == (sight == "causal")
    other_id = parts | {"ids_BJD": torch.randn(2, 1, 16)}
    _, t2 = former(**other_id, sight=sight)
    assert torch.allclose(text[0], t2[0], atol=1e-6) == (sight == "apart")


def test_the_bias_of_a_causal_text_by_hand() -> None:
    bias = hidden(torch.tensor([[True, True, False]]), 1, "causal")[0]
    seen = (bias == 0).int().tolist()
    assert seen == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]


def test_a_row_without_any_modality_is_finite_and_has_gradients() -> None:
    former, parts = make()
    queries, _ = former(parts["memory_BMD"], parts["known_BM"], parts["ids_BJD"])
    queries[1].sum().backward()
    assert torch.isfinite(former.queries_QD.grad).all() and former.queries_QD.grad.abs().sum() > 0
