"""The contest of GTS-LUM: its rows with a stand-in for the peers, what it exports, how it reads and fills up lists."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.bench import quality_gts, rectools_peer
from jobs.bench.gts_peers import Contest, export, filled_up, read_lists
from jobs.bench.quality_gts import contest_run, gains
from jobs.bench.rows import KEYS
from lum_ray.artifacts import UserError
from lum_ray.data.adapters.ml_100k import LAST_DAY
from lum_ray.data.items import Catalogue
from lum_ray.evaluation.ranking import TABLE

USERS, ITEMS, RATINGS = 40, 24, 9
# In the place of the peers' Python: each user's list are the most frequent items of training, none for user 0.
STAND_IN = """#!{python}
import argparse, collections, csv, sys
parser = argparse.ArgumentParser()
parser.add_argument("-P", action="store_true")
parser.add_argument("script")
for name in ("model", "train", "history", "users", "out", "out-unseen", "k"):
    parser.add_argument("--" + name, required=True)
options, _ = parser.parse_known_args()
if options.model == "hstu":
    sys.exit(3)
print("this must not reach stdout")
with open(options.train) as file:
    counts = collections.Counter(row["item"] for row in csv.DictReader(file))
seen = collections.defaultdict(set)
with open(options.history) as file:
    for row in csv.DictReader(file):
        seen[row["user"]].add(row["item"])
for path, hidden in ((options.out, False), (options.out_unseen, True)):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "rank", "item", "score"])
        for user in open(options.users).read().split():
            items = [item for item, _ in counts.most_common() if not (hidden and item in seen[user])]
            for rank, item in enumerate(items[: int(options.k)] if user != "0" else []):
                writer.writerow([user, rank + 1, item, counts[item]])
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, so that the run is prepared once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ml-100k in small: every user rates other films, in an order of her own."""
    folder = tmp_path_factory.mktemp("ml-100k")
    rng = np.random.default_rng(0)
    rated = [(u, i, 3, t) for u in range(USERS) for t, i in enumerate(rng.permutation(ITEMS)[:RATINGS].tolist())]
    tables = {
        "inter": ("user_id:token item_id:token rating:float timestamp:float", rated),
        "item": (
            "item_id:token movie_title:token_seq release_year:token class:token_seq",
            [(i, f"Film {i}", 1990 + i % 9, ("Drama", "Comedy", "Action")[i % 3]) for i in range(ITEMS)],
        ),
        "user": (
            "user_id:token age:token gender:token occupation:token",
            [(u, 20 + u, "F", "x") for u in range(USERS)],
        ),
    }
    for kind, (header, rows) in tables.items():
        lines = ["\t".join(header.split()), *("\t".join(map(str, row)) for row in rows)]
        (folder / f"ml-100k.{kind}").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return path


def test_quick_prints_its_rows_and_computes_nothing_twice(
    capfd: pytest.CaptureFixture[str], root: Path, data: Path, peers: Path
) -> None:
    command = ["--dataset", "ml-100k", "--quick", "--root", str(root), "--path", str(data)]
    command += ["--peers", str(peers), "--only", "sasrec"]
    assert quality_gts.main(command) == 0
    first = capfd.readouterr()
    rows = [json.loads(line) for line in first.out.splitlines()]
    assert [row["what"] for row in rows] == [
        f"quality_gts/ml-100k/{subset}{figure}_gain" for subset in ("", "explore_") for figure in ("r5", "r10", "ndcg5")
    ]
    assert all(tuple(row) == KEYS and row["low"] <= row["value"] <= row["high"] for row in rows)
    assert rows[0]["value"] == pytest.approx(rows[0]["run"]["ours"] - float(rows[0]["peer"].split()[1]), abs=1e-4)
    assert rows[0]["run"]["users"] == USERS
    assert "sasrec" in first.err and "popularity_7d" in first.err
    assert "1 users have popularity's list" in first.err
    assert quality_gts.main(command) == 0
    again = capfd.readouterr()
    assert [json.loads(line)["value"] for line in again.out.splitlines()] == [row["value"] for row in rows]
    assert "training" not in again.err and "ranking" not in again.err
    command[-1] = "hstu"
    with pytest.raises(UserError, match="hstu: the peer ended with code 3"):
        quality_gts.main(command)


def test_a_peer_learns_what_ours_may_and_reads_up_to_the_cut(tmp_path: Path, root: Path, data: Path) -> None:
    contest = Contest.of(contest_run("ml-100k", str(root), str(data), quick=True))
    files = export(contest, str(tmp_path))
    with open(files.train, encoding="utf-8") as train, open(files.history, encoding="utf-8") as history:
        trained, known = list(csv.DictReader(train)), list(csv.DictReader(history))
    assert len(trained) == USERS * (RATINGS - 2)
    assert len(known) == USERS * (RATINGS - 1)
    days = [int(row["time"]) // 86_400 for row in known]
    assert max(days) == LAST_DAY - 1 and max(int(row["time"]) // 86_400 for row in trained) == LAST_DAY - 2
    assert contest.cut_s == LAST_DAY * 86_400
    lines = [line.split("\t") for line in (data / "ml-100k.inter").read_text().splitlines()[1:]]
    assert [row["item"] for row in known if row["user"] == "7"] == [line[1] for line in lines if line[0] == "7"][:-1]
    assert sorted(map(int, Path(files.users).read_text().split())) == list(range(USERS))


def test_lists_are_read_by_rank_and_filled_up_by_popularity(tmp_path: Path) -> None:
    catalogue = Catalogue(["a", "b", "c", "d"], np.arange(4), ["a"] * 4, {}, {})
    path = tmp_path / "lists.csv"
    path.write_text("user,rank,item,score\n2,2,a,0.5\n2,1,d,0.75\n1,1,b,-1\n")
    found = read_lists(str(path), catalogue)
    assert {user: items.tolist() for user, (items, _) in found.items()} == {"1": [1], "2": [3, 0]}
    popular = np.array([[2, 3, 0, 1], [2, 3, 0, 1], [3, -1, -1, -1]])
    items, scores = filled_up(found, ["1", "2", "nobody"], popular, 3)
    assert items.tolist() == [[1, 2, 3], [3, 0, 2], [3, -1, -1]]
    assert scores.tolist()[:2] == [[-1, -2, -3], [0.75, 0.5, -0.5]]
    assert np.isnan(scores[2]).tolist() == [False, True, True]
    path.write_text("user,rank,item,score\n2,1,e,0.5\n")
    with pytest.raises(UserError, match="expected items of the catalogue, got \\['e'\\]"):
        read_lists(str(path), catalogue)


def test_ours_is_held_against_the_best_of_each_metric() -> None:
    def row(model: str, reading: str, metric: str, value: float) -> dict[str, object]:
        return {
            "model": model,
            "reading": reading,
            "subset": "all",
            "metric": metric,
            "value": value,
            "gain": 0.5 - value,
        }

    rows = [row("ours", "retrieve", metric, 0.5) for metric in quality_gts.METRICS.values()]
    rows += [row("ours", "rerank", "eval/recall_5", 0.9), row("sasrec", "baseline", "eval/recall_5", 0.4)]
    rows += [row("popularity", "baseline", "eval/recall_5", 0.3), row("popularity", "baseline", "eval/recall_10", 0.7)]
    found = gains(pa.Table.from_pylist(rows, schema=TABLE), "ours")
    assert {what: best["model"] for what, (_, best) in found.items()} == {"r5_gain": "sasrec", "r10_gain": "popularity"}


def test_histories_are_cut_into_windows_that_share_one_event() -> None:
    pandas = pytest.importorskip("pandas")
    events = pandas.DataFrame({"user": list("aabaaab"), "item": list("1234567"), "datetime": [0, 1, 1, 2, 2, 3, 4]})
    found = rectools_peer.windowed(events, 2)
    sequences = found.groupby("user")["item"].agg("".join).to_dict()
    assert sequences == {"a#2": "1", "a#1": "124", "a#0": "456", "b#0": "37"}


@pytest.mark.parametrize("dataset", quality_gts.DATASETS)
def test_a_run_has_one_test_cut_after_its_training(dataset: str) -> None:
    split = contest_run(dataset, "runs", None, quick=False).split
    assert split.test.from_day == split.test.until_day
    assert split.validate_from == split.validate.from_day


def test_without_the_peers_environment_it_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        quality_gts.main(["--peers", str(tmp_path / "nowhere")])
    assert "make peers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quality_gts.main(["--only", "sasrec,lstm"])
    assert "lstm" in capsys.readouterr().err
