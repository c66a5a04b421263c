"""The aggregation of `jobs.bench.events` by polars, DuckDB and Ray Data's groupby().map_groups.

Each function reads the log's files and writes a row per user and day with all behaviours; it returns its seconds.
"""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa

from jobs.bench.events import KINDS


def polars_daily(folder: str, out: str) -> float:
    """polars' streaming engine, to one parquet file."""
    import polars as pl

    start = time.perf_counter()
    day = pl.col("time").dt.date().cast(pl.Int32).alias("day")
    daily = pl.scan_parquet(f"{folder}/*.parquet").group_by("user", day).agg(**_aggregates(pl))
    _averaged(pl, daily).sink_parquet(out, engine="streaming")
    return time.perf_counter() - start


def _aggregates(pl: Any) -> dict[str, Any]:
    cents = (pl.col("amount") * 100).round().cast(pl.Int64)
    return {
        "active": pl.lit(1, pl.Int64).first(),
        "events": pl.len().cast(pl.Int64),
        **{kind: (pl.col("kind") == kind).sum().cast(pl.Int64) for kind in KINDS},
        "spend": cents.sum(),
        "largest": cents.max().fill_null(0),
        "n": pl.col("amount").count().cast(pl.Int64),
        "units": pl.col("quantity").cast(pl.Int64).sum(),
        "discounted": (pl.col("discount") > 0).any().cast(pl.Int64),
        "shops": pl.col("shop").n_unique().cast(pl.Int64),
    }


def _averaged(pl: Any, daily: Any) -> Any:
    divisor = pl.col("n").clip(1)
    quotient, twice = pl.col("spend") // divisor, 2 * (pl.col("spend") % divisor)
    up = (twice > divisor) | ((twice == divisor) & (quotient % 2 == 1))
    return daily.with_columns(average=quotient + up.cast(pl.Int64)).drop("n")


def duckdb_daily(folder: str, out: str) -> float:
    """DuckDB, to one parquet file."""
    import duckdb

    start = time.perf_counter()
    kinds = ", ".join(f"count(*) FILTER (kind = '{kind}') AS {kind}" for kind in KINDS)
    duckdb.sql(
        f"""COPY (
            SELECT user, day, active, events, {", ".join(KINDS)}, spend, largest, units, discounted, shops,
                q + (2 * r > d OR (2 * r = d AND q % 2 = 1))::BIGINT AS average
            FROM (SELECT *, spend // d AS q, spend % d AS r FROM (
                SELECT "user", (epoch_us("time") // 86400000000)::INTEGER AS day, 1::BIGINT AS active,
                    count(*) AS events, {kinds},
                    coalesce(sum(round(amount * 100)::BIGINT), 0)::BIGINT AS spend,
                    coalesce(max(round(amount * 100)::BIGINT), 0) AS largest,
                    greatest(count(amount), 1) AS d,
                    sum(quantity)::BIGINT AS units,
                    coalesce(bool_or(discount > 0), false)::BIGINT AS discounted,
                    count(DISTINCT shop) AS shops
                FROM read_parquet('{folder}/*.parquet') GROUP BY ALL)))
        TO '{out}' (FORMAT parquet)"""
    )
    return time.perf_counter() - start


def map_groups_daily(folder: str, address: str) -> float:
    """Ray Data's groupby().map_groups over users, with polars inside, in the session at `address`."""
    import polars as pl
    import ray.data

    def of_user(events: pa.Table) -> pa.Table:
        day = pl.col("time").dt.date().cast(pl.Int32).alias("day")
        found = _averaged(pl, pl.from_arrow(events).group_by("user", day).agg(**_aggregates(pl)))  # type: ignore[union-attr]
        table: pa.Table = found.to_arrow()
        return table

    ray.init(address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    start = time.perf_counter()
    groups = ray.data.read_parquet(folder).groupby("user").map_groups(of_user, batch_format="pyarrow")
    rows = sum(block.num_rows for block in groups.iter_batches(batch_size=None, batch_format="pyarrow"))
    assert rows > 0
    return time.perf_counter() - start


def differences(artifact: str, others: dict[str, str]) -> dict[str, int]:
    """For each of `others` (name -> parquet file): rows of one side that the other side lacks; 0 where they are equal.

    `artifact`: the files of a timelines part, as a pattern.
    """
    import polars as pl

    ours = pl.scan_parquet(artifact).drop("bucket", "user_hash").explode(pl.exclude("user")).rename({"days": "day"})
    keys = sorted(ours.collect_schema().names())
    ours = ours.select(keys)
    found = {}
    for name, path in others.items():
        theirs = pl.scan_parquet(path).select(keys)
        both = ours.join(theirs, on=keys, how="inner").select(pl.len())
        counts = [
            query.collect(engine="streaming").item() for query in (both, *(q.select(pl.len()) for q in (ours, theirs)))
        ]
        found[name] = counts[1] + counts[2] - 2 * counts[0]
    return found
