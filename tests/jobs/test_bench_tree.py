from __future__ import annotations

import json

import numpy as np
import pytest

from jobs.bench import tree
from jobs.bench.rows import KEYS


def test_quick_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert tree.main(["--quick"]) == 0
    rows = {row["what"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    arms = [f"{k}-{affinity}" for k in (10, 30) for affinity in ("connectivity", "gaussian")]
    figures = ("planted_ari", "refit_ari", "left_out_ari", "neighbours_in_leaf")
    assert list(rows) == [
        *(f"tree/600/{name}" for name in ("build_s", "peak_gib", "planted_ari")),
        *(f"tree/600/{arm}/{name}" for arm in arms for name in figures),
    ]
    assert all(tuple(row) == KEYS for row in rows.values())
    assert rows["tree/600/build_s"]["value"] > 0
    assert 0 <= rows["tree/600/peak_gib"]["value"] < 1
    for arm in arms:
        assert rows[f"tree/600/{arm}/planted_ari"]["value"] > 0.9
        assert rows[f"tree/600/{arm}/neighbours_in_leaf"]["value"] > rows[f"tree/600/{arm}/neighbours_in_leaf"]["high"]


def test_planted_leaves_are_nested() -> None:
    items, leaf = tree.planted(900, 3, 2, 0.0, 0)
    assert items.dtype == np.float32
    assert len(np.unique(items, axis=0)) == len(np.unique(leaf)) == 9
    centre = np.stack([items[leaf == i][0] for i in range(9)])
    distance = np.linalg.norm(centre[:, None] - centre, axis=2)
    siblings = np.arange(9)[:, None] // 3 == np.arange(9) // 3
    assert distance[siblings].max() < distance[~siblings].min()
