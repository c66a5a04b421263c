from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from lum_ray.artifacts import UserError
from lum_ray.data.adapters import ml_100k, write_source
from lum_ray.data.adapters.ml_100k import LAST_DAY

LOCAL = fs.LocalFileSystem()


def source(folder: Path) -> Path:
    """Two people: one with four ratings, of which two in the same second, and one with a single rating."""
    folder.mkdir()
    ratings = [("7", "30", 3, 200), ("9", "10", 5, 50), ("7", "20", 1, 100), ("7", "10", 4, 200), ("7", "40", 2, 90)]
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["\t".join(map(str, row)) for row in ratings]
    (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    (folder / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "10\tToy Story\t1995\tAnimation Children's Comedy\n"
        '20\tThe "Quoted" One\t1996\tDrama\n'
        "30\tunknown\t\tunknown\n"
        "40\tFilm\tV\tDrama\n"
    )
    (folder / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "7\t24\tM\ttechnician\t85711\n9\t53\tF\tother\tT8H1N\n"
    )
    return folder


def test_everyones_last_rating_is_on_the_last_day(tmp_path: Path) -> None:
    write_source("ml_100k", str(tmp_path / "out"), LOCAL, str(source(tmp_path / "in")), {})
    events = [tuple(row.values()) for row in pq.read_table(tmp_path / "out" / "events").to_pylist()]
    # of the two ratings in one second that of item 30 stands first in the file
    assert events == [
        ("7", LAST_DAY - 3, "40", 2.0),
        ("7", LAST_DAY - 2, "20", 1.0),
        ("7", LAST_DAY - 1, "30", 3.0),
        ("7", LAST_DAY, "10", 4.0),
        ("9", LAST_DAY, "10", 5.0),
    ]
    items = pq.read_table(tmp_path / "out" / "items")
    assert items["year"].to_pylist() == [1995, 1996, None, None]
    assert items["title"].to_pylist()[1] == 'The "Quoted" One'
    profiles = pq.read_table(tmp_path / "out" / "profiles").to_pylist()
    assert profiles[0] == {"user": "7", "age": 24, "gender": "M", "occupation": "technician"}


def test_true_times_if_asked_for(tmp_path: Path) -> None:
    ml_100k.write(str(tmp_path / "out"), LOCAL, str(source(tmp_path / "in")), {"leave_one_out": False})
    times = pq.read_table(tmp_path / "out" / "events")["time"].to_pylist()
    assert times[0] == datetime.datetime(1970, 1, 1, 0, 1, 30, tzinfo=datetime.UTC)
    assert times[2] == times[3]


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    folder = source(tmp_path / "in")
    with pytest.raises(UserError, match="leave_one_out"):
        ml_100k.write(str(tmp_path), LOCAL, str(folder), {"leave_two_out": True})
    with pytest.raises(UserError, match="recbole"):
        ml_100k.write(str(tmp_path), LOCAL, None, {})
    (folder / "ml-100k.user").write_text("user_id:token\tage:token\n7\t24\n")
    with pytest.raises(UserError, match="gender:token"):
        ml_100k.write(str(tmp_path), LOCAL, str(folder), {})
    (folder / "ml-100k.item").unlink()
    with pytest.raises(UserError, match=r"ml-100k\.item"):
        ml_100k.write(str(tmp_path), LOCAL, str(folder), {})
