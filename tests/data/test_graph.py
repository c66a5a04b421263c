from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lum_ray.artifacts import UserError
from lum_ray.config import Data, Events, Graph, Items
from lum_ray.data.graph import read_edges
from lum_ray.data.items import Catalogue
from lum_ray.data.rows import hash_strings

IDS = ["a", "b", "c", "d"]
CATALOGUE = Catalogue(IDS, hash_strings(IDS).view(np.int64), IDS, {}, {})


def data(**graph: object) -> Data:
    named = {"source": "from", "target": "to", "weight": "w", "known_at": "day"} | graph
    return Data(events=Events(item="item"), items=Items(), graph=Graph(**named), max_reject_share=0.5)  # type: ignore[arg-type]


def written(folder: Path, **changes: object) -> str:
    columns = {
        "from": ["b", "a", "d", "a", "x", "c"],
        "to": ["a", "b", "d", "c", "a", "d"],
        "w": [1.0, 2.0, 5.0, 3.0, 1.0, 7.0],
        "day": [1, 2, 3, 4, 5, 10],
    } | changes
    pq.write_table(pa.table(columns), folder / "edges.parquet")
    return str(folder)


def test_edges_of_both_directions_add_up_and_later_ones_are_left_out(tmp_path: Path) -> None:
    edges, rejects = read_edges(written(tmp_path), data(), CATALOGUE, 10)
    assert edges.pairs_M2.tolist() == [[0, 1], [0, 2]]
    assert edges.weights_M.tolist() == [3.0, 3.0]
    assert (edges.unknown, edges.later, rejects.num_rows) == (1, 1, 0)
    edges, _ = read_edges(written(tmp_path), data(weight=None, known_at=None), CATALOGUE, 0)
    assert edges.pairs_M2.tolist() == [[0, 1], [0, 2], [2, 3]] and edges.weights_M.tolist() == [2.0, 1.0, 1.0]


def test_bad_rows_are_rejected_with_their_reason(tmp_path: Path) -> None:
    place = written(tmp_path, w=[1.0, None, float("inf"), -1.0, 1.0, 1.0])
    with pytest.raises(UserError, match=r"3 of 6 rows.*0\.50|3 of 6"):
        read_edges(place, Data(events=Events(item="item"), items=Items(), graph=data().graph, max_reject_share=0.4),
                   CATALOGUE, 99)  # fmt: skip
    edges, rejects = read_edges(place, data(), CATALOGUE, 99)
    assert rejects["row"].to_pylist() == [1, 2, 3] and "not a number above 0" in rejects["reason"][2].as_py()
    assert edges.pairs_M2.tolist() == [[0, 1], [2, 3]]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing column `weight` \(data.graph.weight\)"):
        read_edges(written(tmp_path), data(weight="weight"), CATALOGUE, 99)
