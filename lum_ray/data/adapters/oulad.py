"""OULAD: clicks and submissions of Open University students, from a folder of the raw tables as parquet.

A user is an enrolment (module, presentation, student), e.g. `AAA_2013J_11391`; a day is the source's own day number
relative to the start of the presentation (granularity day; before it: negative).

Tables written:
- events: user, time (int32 day), site, activity_type, clicks, submitted. One row per (enrolment, day, site) with the
  clicks summed (one source row in five repeats a triple), `submitted` 0; one row per submission with activity_type
  `submission`, clicks 0 and `submitted` 1 on the day it was handed in. Results carried over from an earlier
  presentation (`is_banked`) are not acts of a day and are left out, as are submissions after the course's last day.
- profiles: one row per enrolment, with or without clicks: student, module, presentation, course (the segment of
  deadlines, e.g. `AAA_2013J`), registered, ends (exclusive; clicks occur up to and including day
  `module_presentation_length`), and
  demographics. Nothing that is known only later: no final result, no day of unregistration, no score.
- calendar: the due days of a course (`deadline_tma`, `deadline_cma`, `deadline_exam`), value = 1 + w / 100 with w the
  weight in percent of the assessments of that type due on that day: 11 of the 120 deadlines weigh 0 and must not
  vanish. An exam without a day takes place at the end of the last week (so the source's documentation): on the last
  day. On each of the 7 days before it stands `before_tma` (or cma, exam), whose value grows from 1/7 to 1: a model that
  sees a day's own events alone must still know that work is due soon.

Source: Kuzilek, Hlosta, Zdrahal, Scientific Data 4, 170171 (2017).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from lum_ray.artifacts import UserError

COURSE = ("code_module", "code_presentation")
DEMOGRAPHICS = ("gender", "region", "highest_education", "imd_band", "age_band", "disability")
LEAD_DAYS = 7
COUNTS = ("num_of_prev_attempts", "studied_credits")
COLUMNS = {
    "vle_events": (*COURSE, "id_student", "id_site", "date", "sum_click"),
    "vle": (*COURSE, "id_site", "activity_type"),
    "studentInfo": (*COURSE, "id_student", *DEMOGRAPHICS, *COUNTS),
    "studentRegistration": (*COURSE, "id_student", "date_registration"),
    "assessments": (*COURSE, "id_assessment", "assessment_type", "date", "weight"),
    "studentAssessment": ("id_assessment", "id_student", "date_submitted", "is_banked"),
    "courses": (*COURSE, "module_presentation_length"),
}


def write(dest: str, filesystem: fs.FileSystem, path: str | None, options: Mapping[str, Any]) -> None:
    """Write events/, profiles/ and calendar/ under `dest` from the folder `path`.

    `options`: `presentations`, a list such as ["2013J", "2014B"] (default: all that the folder holds).
    Raises UserError for another option, a missing folder, file or column, and an unknown presentation.
    """
    unknown = sorted(set(options) - {"presentations"})
    if unknown:
        raise UserError(f"oulad: unknown options {unknown[:5]}; known: ['presentations']")
    if path is None:
        raise UserError("oulad: expected the input's `path`: the folder with vle_events.parquet and the others")
    wanted = options.get("presentations")
    length = _course_lengths(path, wanted)
    tables = {
        "events": pa.concat_tables([_clicks(path, wanted), _submissions(path, wanted, length)]),
        "profiles": _profiles(path, wanted, length),
        "calendar": _deadlines(path, wanted, length),
    }
    for name, table in tables.items():
        filesystem.create_dir(f"{dest}/{name}", recursive=True)
        pq.write_table(
            table, f"{dest}/{name}/0000.parquet", filesystem=filesystem, compression="zstd", row_group_size=1 << 18
        )


def _read(folder: str, name: str, presentations: list[str] | None) -> pa.Table:
    file_path = os.path.join(folder, f"{name}.parquet")
    if not os.path.isfile(file_path):
        raise UserError(
            f"oulad: expected the file {file_path}, found nothing; the folder must hold "
            f"{', '.join(f'{table}.parquet' for table in COLUMNS)}"
        )
    try:
        file = pq.ParquetFile(file_path)
    except pa.ArrowInvalid as error:
        raise UserError(f"oulad: {file_path} is not a readable parquet file: {error}") from error
    missing = sorted(set(COLUMNS[name]) - set(file.schema_arrow.names))
    if missing:
        raise UserError(f"oulad: {file_path} lacks the columns {missing[:5]}, it has {file.schema_arrow.names}")
    table = file.read(columns=list(COLUMNS[name]))
    if presentations is not None and "code_presentation" in table.column_names:
        known = sorted(set(table["code_presentation"].unique().to_pylist()))
        absent = sorted(set(presentations) - set(known))
        if absent and name == "courses":
            raise UserError(f"oulad: {file_path} holds no presentation {absent[:5]}; it holds {known}")
        table = table.filter(pc.is_in(table["code_presentation"], pa.array(presentations, pa.string())))
    # The source's numbers are float64, also ids and days: whole numbers, or the cast refuses.
    for column in table.column_names:
        kind = table.schema.field(column).type
        if pa.types.is_large_string(kind):
            table = table.set_column(table.column_names.index(column), column, pc.cast(table[column], pa.string()))
        elif pa.types.is_floating(kind) and column != "weight":
            table = table.set_column(table.column_names.index(column), column, pc.cast(table[column], pa.int32()))
    return table


def _course(table: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(table["code_module"], table["code_presentation"], "_")


def _user(table: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(_course(table), pc.cast(table["id_student"], pa.string()), "_")


def _course_lengths(folder: str, presentations: list[str] | None) -> dict[str, int]:
    table = _read(folder, "courses", presentations)
    return dict(zip(_course(table).to_pylist(), table["module_presentation_length"].to_pylist(), strict=True))


def _length_of(course: pa.ChunkedArray, length: Mapping[str, int], file: str) -> pa.Array:
    absent = sorted(set(course.unique().to_pylist()) - set(length))
    if absent:
        raise UserError(f"oulad: {file} names the courses {absent[:5]}, which courses.parquet does not hold")
    row = pc.index_in(course, value_set=pa.array(list(length), pa.string()))
    return pc.take(pa.array(list(length.values()), pa.int32()), row)


def _events(user: Any, day: Any, site: Any, activity_type: Any, clicks: Any, submitted: int) -> pa.Table:
    return pa.table(
        {
            "user": user,
            "time": pc.cast(day, pa.int32()),
            "site": pc.cast(site, pa.string()),
            "activity_type": activity_type,
            "clicks": pc.cast(clicks, pa.int64()),
            "submitted": pa.array([submitted], pa.int64()).take(pa.array([0] * len(user), pa.int32())),
        }
    )


def _clicks(folder: str, presentations: list[str] | None) -> pa.Table:
    table = _read(folder, "vle_events", presentations)
    keys = [*COURSE, "id_student", "date", "id_site"]
    summed = table.group_by(keys, use_threads=False).aggregate([("sum_click", "sum")])
    sites = _read(folder, "vle", presentations)
    row = pc.index_in(summed["id_site"], value_set=pc.cast(sites["id_site"], pa.int32()).combine_chunks())
    if row.null_count:
        lost = summed.filter(pc.is_null(row))["id_site"].unique().to_pylist()
        raise UserError(f"oulad: vle_events.parquet names sites that vle.parquet does not hold: {sorted(lost)[:5]}")
    activity = pc.take(sites["activity_type"].combine_chunks(), row)
    return _events(_user(summed), summed["date"], summed["id_site"], activity, summed["sum_click_sum"], 0)


def _submissions(folder: str, presentations: list[str] | None, length: Mapping[str, int]) -> pa.Table:
    assessments = _read(folder, "assessments", presentations)
    table = _read(folder, "studentAssessment", presentations)
    row = pc.index_in(table["id_assessment"], value_set=assessments["id_assessment"].combine_chunks())
    if presentations is None and row.null_count:
        lost = table.filter(pc.is_null(row))["id_assessment"].unique().to_pylist()
        raise UserError(f"oulad: studentAssessment.parquet names unknown assessments: {sorted(lost)[:5]}")
    handed_in = pc.and_(pc.is_valid(row), pc.equal(table["is_banked"], 0))
    table, row = table.filter(handed_in), row.filter(handed_in)
    for column in COURSE:
        table = table.append_column(column, pc.take(assessments[column].combine_chunks(), row))
    last = _length_of(_course(table), length, "assessments.parquet")
    table = table.filter(pc.less_equal(table["date_submitted"], last))
    none = pa.nulls(table.num_rows, pa.string())
    kind = pa.array(["submission"], pa.string()).take(pa.array([0] * table.num_rows, pa.int32()))
    return _events(
        _user(table), table["date_submitted"], none, kind, pa.nulls(table.num_rows, pa.int64()).fill_null(0), 1
    )


def _profiles(folder: str, presentations: list[str] | None, length: Mapping[str, int]) -> pa.Table:
    info = _read(folder, "studentInfo", presentations)
    registration = _read(folder, "studentRegistration", presentations)
    user = _user(info)
    row = pc.index_in(user, value_set=_user(registration).combine_chunks())
    course = _course(info)
    columns: dict[str, Any] = {
        "user": user,
        "student": pc.cast(info["id_student"], pa.string()),
        "module": info["code_module"],
        "presentation": info["code_presentation"],
        "course": course,
        "registered": pc.take(registration["date_registration"].combine_chunks(), row),
        "ends": pc.add(_length_of(course, length, "studentInfo.parquet"), pa.scalar(1, pa.int32())),
    }
    for name in (*DEMOGRAPHICS, *COUNTS):
        columns[name] = info[name]
    return pa.table(columns)


def _deadlines(folder: str, presentations: list[str] | None, length: Mapping[str, int]) -> pa.Table:
    table = _read(folder, "assessments", presentations)
    course = _course(table)
    day = pc.coalesce(table["date"], _length_of(course, length, "assessments.parquet"))
    kind = pc.binary_join_element_wise("deadline", pc.utf8_lower(table["assessment_type"]), "_")
    due = pa.table({"key": course, "start_day": day, "event_type": kind, "weight": table["weight"]})
    # Seven computer-marked pieces due on one day are one deadline with the sum of their weights.
    due = due.group_by(["key", "start_day", "event_type"], use_threads=False).aggregate([("weight", "sum")])
    worth = pc.add(pc.divide(due["weight_sum"], 100.0), 1.0)
    parts = [_segment_rows(due["key"], due["start_day"], due["event_type"], worth)]
    before = pc.replace_substring(due["event_type"], "deadline", "before")
    for days in range(1, LEAD_DAYS + 1):
        value = pa.repeat(pa.scalar((LEAD_DAYS + 1 - days) / LEAD_DAYS), due.num_rows)
        day = pc.subtract(due["start_day"], pa.scalar(days, pa.int32()))
        parts.append(_segment_rows(due["key"], day, before, value))
    return pa.concat_tables(parts)


def _segment_rows(key: Any, day: Any, event_type: Any, value: Any) -> pa.Table:
    """Calendar rows of one day each, always known."""
    count = len(key)
    return pa.table(
        {
            "scope": pa.array(["segment"] * count, pa.string()),
            "key": key,
            "start_day": day,
            "end_day": day,
            "event_type": event_type,
            "value": value,
            "known_at": pa.nulls(count, pa.int32()),
        }
    )
