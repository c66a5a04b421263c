"""The `calendar` artifact: the rows as they came, and public holidays."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from lum_ray import artifacts
from lum_ray.artifacts import Artifact, UserError, join
from lum_ray.config import Data
from lum_ray.data.context import canonical_calendar, has_dates
from lum_ray.data.forgotten import forgotten_users, without, without_theirs
from lum_ray.data.raw import RawTables, raw_files
from lum_ray.data.rejects import too_many


def prepare_calendar(
    data: Data,
    tables: RawTables,
    uri: str,
    first_day: int,
    end_day: int,
    fingerprint: Any = None,
    root: str | None = None,
) -> Artifact:
    """Build the calendar artifact at `uri`: the rows as they came, and public holidays of [first_day, end_day + 366).

    One file, `0000.parquet`, with the columns of `context.CALENDAR`, sorted; no rows where the run has no calendar.
    Rows of users who are forgotten under `root` are left out.
    Raises UserError as `canonical_calendar`, and for holidays where the events have day numbers instead of dates.
    """
    found = artifacts.find(uri)
    if found is not None:
        return found
    wanted = data.calendar is not None
    if data.calendar is not None and data.calendar.holidays:
        if not has_dates(raw_files(tables.events, "events"), data.events.time):
            raise UserError(
                f"data.calendar.holidays: the events' `{data.events.time}` holds day numbers, not dates; remove it"
            )
    elif wanted and tables.calendar is None:
        raise UserError(
            "data.calendar: set, but there is neither a calendar table nor `holidays`; give one or remove it"
        )
    rows, rejects = canonical_calendar(data, tables.calendar if wanted else None, first_day, end_day)
    total = rejects.num_rows + rows.num_rows
    forgotten = forgotten_users(root) if root else ()
    rows, rejects = without_theirs(rows, forgotten), without(rejects, forgotten)
    if rejects.num_rows:
        artifacts.write_table(join(uri, "rejects", "0000.parquet"), rejects)
        if rejects.num_rows > data.max_reject_share * total:
            raise too_many(data, "calendar", rejects.num_rows, total, rejects, uri)
    artifacts.write_table(join(uri, "0000.parquet"), rows)
    manifest = {
        "kind": "calendar",
        "digest": uri.rstrip("/").rsplit("/", 1)[-1],
        "inputs": fingerprint,
        "files": [{"name": "0000.parquet", "rows": rows.num_rows}],
        "event_types": sorted(pc.unique(rows["event_type"]).to_pylist()),
        "rows_in": total,
        "rows_rejected": rejects.num_rows,
        "rows_forgotten": total - rejects.num_rows - rows.num_rows,
    }
    return artifacts.commit(uri, manifest)
