"""The tables of a run, checked by their footers."""

from __future__ import annotations

from collections.abc import Callable

from lum_ray.config import Run
from lum_ray.data.context import check_calendar, check_profiles
from lum_ray.data.items import read_items, unknown_items
from lum_ray.data.schema import check_events
from lum_ray.steps.prepare import raw_items, raw_tables


def check(loaded: Run, say: Callable[[str], None]) -> str:
    """Check the schema of a run's tables and say how many rows they have; where the events are. Raises UserError."""
    tables, _ = raw_tables(loaded, say)
    files = check_events(tables.events, loaded.data)
    say(f"events: {len(files)} files, {sum(file.rows for file in files):,} rows")
    if tables.profiles:
        say(f"profiles: {sum(file.rows for file in check_profiles(tables.profiles, loaded.data)):,} rows")
    if tables.calendar and loaded.data.calendar:
        say(f"calendar: {sum(file.rows for file in check_calendar(tables.calendar, loaded.data)):,} rows")
    if loaded.model == "gts":
        catalogue, rejects = read_items(raw_items(loaded, say)[0], loaded.data)
        say(f"items: {len(catalogue):,}, {rejects.num_rows:,} rows left out or mended")
        missing = unknown_items(files, loaded.data, catalogue)
        say(f"events of items that the catalogue does not have: {missing.events:,} {', '.join(missing.items)}")
    return str(tables.events)
