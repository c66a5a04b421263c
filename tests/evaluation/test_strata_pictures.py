"""The report's view of the comparisons, from tables written by hand; the forest itself is in test_strata."""

from __future__ import annotations

import pyarrow as pa

from lum_ray.evaluation import strata, strata_pictures


def rows(*entries: tuple[str, str, str, float | None]) -> pa.Table:
    """(task, metric, group, gain), each gain with an interval of .01 to both sides."""
    return pa.Table.from_pylist(
        [
            {"task": task, "metric": metric, "by": "half", "group": group, "n": 900, "users": 90}
            | (
                {}
                if gain is None
                else {"ours": 0.8, "peer": 0.7, "gain": gain, "low": gain - 0.01, "high": gain + 0.01}
            )
            for task, metric, group, gain in entries
        ],
        schema=strata.STRATA,
    )


def test_the_first_three_tasks_that_can_be_drawn_are_drawn_and_all_are_tabled() -> None:
    entries = [(f"t{k}", strata.AUC, "one", None if k == 0 else 0.02) for k in range(5)]
    found = strata_pictures.comparison(rows(*entries), "ours", "peer")
    assert [task for task, _ in found.pictures] == ["t1", "t2", "t3"]
    assert len(found.tables) == 5
    assert found.tables[0].lines == (("half", "one", "900", "90", "", "", "undefined", ""),)
    assert found.tables[1].lines[0][6] == "+.020"


def test_a_share_of_a_mape_is_shown_in_percent() -> None:
    table = rows(("spend", "eval/value_if_active_mape_least", "one", 0.046))
    picture = strata_pictures.picture(table, "spend", "ours", "peer")
    assert picture is not None and "+4.6\u00a0%" in picture.sentence


def test_the_worth_of_a_calendar_counts_tasks_by_their_intervals() -> None:
    entries = [("a", 0.02), ("b", 0.005), ("c", -0.03)]
    table = pa.Table.from_pylist(
        [
            {"model": "ours", "task": task, "metric": strata.AUC, "with_calendar": 0.8, "without": 0.7}
            | {"gain": gain, "low": gain - 0.01, "high": gain + 0.01}
            for task, gain in entries
        ],
        schema=strata.WORTH,
    )
    found = strata_pictures.worth(table)
    assert "better with the calendar in 2 of 3 tasks" in found.sentence
    assert "speaks for it in 1, against it in 1" in found.sentence
    assert len(found.table.lines) == 3
