from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from lum_ray.artifacts import UserError
from lum_ray.data.adapters import oulad

LOCAL = fs.LocalFileSystem()
REAL = Path(__file__).parents[3].parent / "shared" / "data" / "oulad"
LEAKS = {"final_result", "date_unregistration", "score"}


def source(folder: Path) -> Path:
    """One course of 10 days, three students; the third never clicks."""
    here = {"code_module": "AAA", "code_presentation": "2013J"}

    def table(name: str, rows: list[dict[str, object]]) -> None:
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")

    table(
        "courses",
        [
            here | {"module_presentation_length": 10.0},
            here | {"code_presentation": "2014B", "module_presentation_length": 9.0},
        ],
    )
    table("vle", [here | {"id_site": 5, "activity_type": "quiz"}, here | {"id_site": 6, "activity_type": "url"}])
    clicks = [(1, 5, -2, 3), (1, 5, -2, 4), (1, 6, -2, 1), (2, 5, 10, 2)]
    names = ("id_student", "id_site", "date", "sum_click")
    table("vle_events", [here | dict(zip(names, row, strict=True)) for row in clicks])
    info = {"gender": "F", "region": "Wales", "highest_education": "A Level", "imd_band": None, "age_band": "0-35"}
    info |= {"disability": "N", "num_of_prev_attempts": 0.0, "studied_credits": 60.0, "final_result": "Pass"}
    table("studentInfo", [here | info | {"id_student": float(student)} for student in (1, 2, 3)])
    days = {3: None, 2: -30.0, 1: -7.0}
    table(
        "studentRegistration",
        [here | {"id_student": float(s), "date_registration": d, "date_unregistration": 4.0} for s, d in days.items()],
    )
    works = [(70.0, "TMA", 4.0, 25.0), (71.0, "CMA", 8.0, 0.0), (72.0, "CMA", 8.0, 5.0), (73.0, "Exam", None, 100.0)]
    names = ("id_assessment", "assessment_type", "date", "weight")
    table("assessments", [here | dict(zip(names, row, strict=True)) for row in works])
    handed = [(70.0, 1.0, 3.0, 0.0), (70.0, 2.0, -1.0, 1.0), (71.0, 2.0, 11.0, 0.0), (72.0, 2.0, 10.0, 0.0)]
    names = ("id_assessment", "id_student", "date_submitted", "is_banked")
    table("studentAssessment", [dict(zip(names, row, strict=True)) | {"score": 1.0} for row in handed])
    return folder


def test_tiny_folder(tmp_path: Path) -> None:
    dest = tmp_path / "out"
    oulad.write(str(dest), LOCAL, str(source(tmp_path)), {})
    events = [tuple(row.values()) for row in pq.read_table(dest / "events").to_pylist()]
    # Repeated rows are summed; the banked submission and the one after the course's end are not there.
    assert events == [
        ("AAA_2013J_1", -2, "5", "quiz", 7, 0),
        ("AAA_2013J_1", -2, "6", "url", 1, 0),
        ("AAA_2013J_2", 10, "5", "quiz", 2, 0),
        ("AAA_2013J_1", 3, None, "submission", 0, 1),
        ("AAA_2013J_2", 10, None, "submission", 0, 1),
    ]
    profiles = pq.read_table(dest / "profiles")
    assert not LEAKS & set(profiles.column_names)
    assert profiles["user"].to_pylist() == ["AAA_2013J_1", "AAA_2013J_2", "AAA_2013J_3"]
    assert profiles["registered"].to_pylist() == [-7, -30, None]
    assert profiles["ends"].to_pylist() == [11] * 3
    assert profiles["course"].to_pylist() == ["AAA_2013J"] * 3
    calendar = pq.read_table(dest / "calendar").to_pylist()
    columns = ("key", "start_day", "end_day", "event_type", "value")
    assert [tuple(row[name] for name in columns) for row in calendar][:3] == [
        ("AAA_2013J", 4, 4, "deadline_tma", 1.25),
        ("AAA_2013J", 8, 8, "deadline_cma", 1.05),
        ("AAA_2013J", 10, 10, "deadline_exam", 2.0),
    ]
    ahead = {(row["event_type"], row["start_day"]): row["value"] for row in calendar[3:]}
    assert len(ahead) == len(calendar) - 3 == 21
    assert ahead["before_tma", 3] == 1.0
    assert ahead["before_tma", -3] == pytest.approx(1 / 7)
    assert ("before_tma", 4) not in ahead
    assert {row["scope"] for row in calendar} == {"segment"}
    assert {
        str(pq.read_schema(dest / name / "0000.parquet").field(day).type)
        for name, day in (("events", "time"), ("profiles", "registered"), ("calendar", "start_day"))
    } == {"int32"}


def test_presentations(tmp_path: Path) -> None:
    oulad.write(str(tmp_path / "out"), LOCAL, str(source(tmp_path)), {"presentations": ["2014B"]})
    assert pq.read_table(tmp_path / "out" / "events").num_rows == 0
    with pytest.raises(UserError, match=r"no presentation \['2019X'\].*2013J"):
        oulad.write(str(tmp_path / "out"), LOCAL, str(tmp_path), {"presentations": ["2019X"]})


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    def run(options: dict[str, object], path: str | None = str(tmp_path)) -> None:
        oulad.write(str(tmp_path / "out"), LOCAL, path, options)

    with pytest.raises(UserError, match=r"unknown options \['speed'\]"):
        run({"speed": 1})
    with pytest.raises(UserError, match=r"`path`"):
        run({}, None)
    with pytest.raises(UserError, match=r"courses.parquet, found nothing"):
        run({})
    source(tmp_path)
    pq.write_table(pa.table({"id_site": [9]}), tmp_path / "vle.parquet")
    with pytest.raises(UserError, match=r"vle.parquet lacks the columns.*activity_type"):
        run({})
    pq.write_table(
        pa.table({"id_site": [5], "activity_type": ["quiz"], "code_module": ["AAA"], "code_presentation": ["2013J"]}),
        tmp_path / "vle.parquet",
    )
    with pytest.raises(UserError, match=r"sites that vle.parquet does not hold: \[6\]"):
        run({})


# Collected only where the real tables lie beside the repository.
if REAL.is_dir():

    def test_real_folder(tmp_path: Path) -> None:
        oulad.write(str(tmp_path), LOCAL, str(REAL), {})
        events = pq.read_table(tmp_path / "events", columns=["user", "time", "clicks", "submitted"])
        raw = pq.read_table(REAL / "vle_events.parquet", columns=["sum_click"])
        clicks = events.filter(pc.equal(events["submitted"], 0))
        assert clicks.num_rows == 5_656_426
        assert pc.sum(events["clicks"]) == pc.sum(raw["sum_click"])
        profiles = pq.read_table(tmp_path / "profiles")
        assert profiles.num_rows == 21_333 == len(profiles["user"].unique())
        assert not LEAKS & set(profiles.column_names)
        assert profiles["registered"].null_count == 36
        # Every event lies before the exclusive end of its course.
        row = pc.index_in(events["user"], value_set=profiles["user"].combine_chunks())
        assert row.null_count == 0
        ends = pc.take(profiles["ends"], row)
        assert pc.max(pc.subtract(events["time"], ends)).as_py() == -1
        assert pq.read_table(tmp_path / "calendar").num_rows == 120 * (1 + oulad.LEAD_DAYS)
