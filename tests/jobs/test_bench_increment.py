from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.bench.increment import DAY_US, FIRST_DAY, LATE_DAYS, differences, linked, make_day, make_events, run_file
from lum_ray import catalog
from lum_ray.steps.prepare import prepare_timelines


def test_the_last_day_holds_late_lines_and_only_it() -> None:
    names = pa.array([f"user-{n}" for n in range(50)])
    late, punctual = (make_day(FIRST_DAY, 8000, names, late) for late in (True, False))
    assert make_day(FIRST_DAY, 8000, names, True).equals(late)
    days = late["time"].cast(pa.int64()).to_numpy() // DAY_US - FIRST_DAY
    assert set(np.unique(days)) == set(range(-LATE_DAYS, 1)) and 0.01 < (days < 0).mean() < 0.03
    assert set(punctual["time"].cast(pa.int64()).to_numpy() // DAY_US) == {FIRST_DAY}


def test_the_increment_is_compared_with_the_rebuild(tmp_path: Path) -> None:
    files = make_events(tmp_path / "all", 8000, 20)
    assert [pq.read_metadata(file).num_rows > 0 for file in files] == [True] * 20
    watched, said = tmp_path / "events", list[str]()

    def made(root: str) -> str:
        return prepare_timelines(catalog.read_run(run_file(str(watched), str(tmp_path / root))), said.append).uri

    linked(watched, files[:-1])
    base = made("base")
    linked(watched, files)
    increment = made("base")
    assert said[-1].startswith("continuing") and said[-1].endswith("rows")
    assert differences(increment, made("rebuilt")) == 0
    assert differences(increment, base) > 0
    with pytest.raises(SystemExit):
        differences(increment, _other_buckets(tmp_path, base))


def _other_buckets(root: Path, uri: str) -> str:
    text = (Path(uri) / "manifest.json").read_text()
    (root / "other").mkdir()
    (root / "other" / "manifest.json").write_text(text.replace('"log2_buckets": 6', '"log2_buckets": 7'))
    return str(root / "other")
