"""Prediction files: their columns, how they are read, and the checks before any metric is computed.

All models must have predicted the same rows, and hold the same outcomes for them: else a table of metrics compares
different questions. Source: DESIGN.md, section 3 (Prediction files).

Legend: n rows of one behaviour, sorted by (user, cut_day, day), the same for each model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lum_ray.artifacts import UserError, list_files, storage
from lum_ray.evaluation.metrics import Floats, Ints

SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("cut_day", pa.int32()),
        ("day", pa.int32()),
        ("behaviour", pa.string()),
        ("p", pa.float32()),
        ("mean", pa.float32()),
        ("median", pa.float32()),
        ("low", pa.float32()),
        ("high", pa.float32()),
        ("least_mape", pa.float32()),
        ("y", pa.float64()),
        ("model", pa.string()),
        ("seed", pa.int32()),
    ]
)
OPTIONAL = ("least_mape",)
"""Columns that a file may lack: they count as not predicted."""
TEXTS = ["user", "behaviour", "model"]
CODED = pa.schema(
    [pa.field(f.name, pa.dictionary(pa.int32(), pa.string()) if f.name in TEXTS else f.type) for f in SCHEMA]
)
"""The schema in memory: millions of rows hold few distinct texts."""
FUNCTIONALS = ("p", "mean", "median", "low", "high", "least_mape")
_MOST_OFFENDERS = 5


@dataclass(frozen=True)
class Task:
    """What a behaviour of a prediction file is.

    binary: `p` (= `mean`) is filled. Numbers fill `mean` (unconditional), and `median`, `low`, `high`, `least_mape`;
    with a `gate` these four describe the value *given* that the gate is open, and `p` is P(gate open). `horizon`: one
    row a cut (day = cut_day) over the days after it, instead of one a day.
    """

    kind: Literal["binary", "continuous", "count"]
    gate: str | None = None
    horizon: bool = False


@dataclass(frozen=True)
class Outcomes:
    """The rows that every model predicted for one behaviour."""

    user: Ints  # (n,) index into Predictions.users
    cut: Ints  # (n,) day number
    day: Ints  # (n,) day number
    y: Floats  # (n,) raw unit, NaN where unknown or masked


@dataclass(frozen=True)
class Predictions:
    """Checked predictions of several models over the same rows."""

    users: NDArray[np.object_]  # (N,)
    models: tuple[str, ...]
    outcomes: Mapping[str, Outcomes]  # behaviour -> rows
    forecasts: Mapping[tuple[str, str, int], Mapping[str, Floats]]  # (behaviour, model, seed) -> p, mean, ... (n,)

    def seeds(self, behaviour: str, model: str) -> list[int]:
        """Seeds for which the model predicted the behaviour."""
        return sorted(seed for b, m, seed in self.forecasts if (b, m) == (behaviour, model))


def read_predictions(uris: str | Sequence[str], tasks: Mapping[str, Task]) -> Predictions:
    """Read and check prediction files: folders or single files, several models together.

    Raises UserError naming the file for unreadable files and missing columns, and at most five offenders for missing or
    infinite predictions, duplicate rows, rows or outcomes that differ between models, and unknown behaviours.
    """
    places = [uris] if isinstance(uris, str) else list(uris)
    files = [file for place in places for file in list_files(place, ".parquet")]
    if not files:
        where = ", ".join(places)
        raise UserError(f"{where}: expected prediction files (*.parquet), found none; run `lum-ray evaluate` first")
    return check(pa.concat_tables([_read(file) for file in files]), tasks)


def _read(uri: str) -> pa.Table:
    place = storage(uri)
    with place.filesystem.open_input_file(place.path) as source:
        try:
            table = pq.ParquetFile(source, read_dictionary=TEXTS).read()
        except pa.ArrowInvalid as error:
            raise UserError(f"{uri}: expected a whole parquet file: {error}; write the predictions again") from error
    return _conform(table, uri)


def _conform(table: pa.Table, where: str) -> pa.Table:
    for name in OPTIONAL:
        if name not in table.column_names:
            table = table.append_column(
                SCHEMA.field(name), pa.repeat(pa.scalar(float("nan"), pa.float32()), len(table))
            )
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise UserError(
            f"{where}: expected the columns {', '.join(SCHEMA.names)}; missing: {', '.join(missing)}; "
            "fill a column that a model does not predict with NaN"
        )
    try:
        table = table.select(SCHEMA.names).cast(CODED)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise UserError(f"{where}: a column has not the type of a prediction file: {error}") from error
    for name in ("user", "cut_day", "day", "behaviour", "model", "seed"):
        if table[name].null_count:
            raise UserError(f"{where}: column {name}: expected a value in each row, {table[name].null_count} are null")
    return table


def check(table: pa.Table, tasks: Mapping[str, Task]) -> Predictions:
    """Predictions from a table with the columns of `SCHEMA`. Raises UserError as `read_predictions` does."""
    table = _conform(table, "predictions")
    users, user = _codes(table["user"])
    models, model = _codes(table["model"])
    behaviours, behaviour = _codes(table["behaviour"])
    unknown = sorted(set(behaviours) - set(tasks))
    absent = sorted(set(tasks) - set(behaviours))
    if unknown or absent:
        raise UserError(
            f"behaviours of the predictions: expected exactly {', '.join(sorted(tasks))}; "
            f"unknown: {_list(unknown)}; without a row: {_list(absent)}"
        )
    seed = table["seed"].to_numpy().astype(np.int64)
    numbers = {name: table[name].to_numpy() for name in (*FUNCTIONALS, "y")}
    cut, day = (table[name].to_numpy().astype(np.int64) for name in ("cut_day", "day"))

    seeds, seed_code = np.unique(seed, return_inverse=True)
    group = (behaviour * len(models) + model) * len(seeds) + seed_code
    order = np.argsort(group, kind="stable")
    found, starts = np.unique(group[order], return_index=True)
    outcomes: dict[str, Outcomes] = {}
    first: dict[str, str] = {}
    forecasts: dict[tuple[str, str, int], Mapping[str, Floats]] = {}
    # Days and cuts are below 2^20 apart for 2,800 years, users below 2^23 in one evaluation: one sortable number a row.
    low_cut, low_day = int(cut.min()), int(day.min())
    if len(users) >= 1 << 22 or max(int(cut.max()) - low_cut, int(day.max()) - low_day) >= 1 << 20:
        raise UserError(f"predictions: at most 4 million users and 2^20 days at once, got {len(users)} users")
    for number, index in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
        name = behaviours[number // (len(models) * len(seeds))]
        who = models[number // len(seeds) % len(models)]
        run = int(seeds[number % len(seeds)])
        label = f"model {who}, seed {run}, behaviour {name}"
        key = (user[index] << 40) | ((cut[index] - low_cut) << 20) | (day[index] - low_day)
        by_key = np.argsort(key, kind="stable")
        index, key = index[by_key], key[by_key]
        rows = Outcomes(user[index], cut[index], day[index], numbers["y"][index])

        twice = np.flatnonzero(key[1:] == key[:-1])
        if len(twice):
            _refuse(label, "one row a (user, cut_day, day)", "come twice", users, rows, twice)
        if name not in outcomes:
            outcomes[name], first[name] = rows, label
        else:
            _same_rows(users, outcomes[name], rows, first[name], label)
        forecast = {column: numbers[column][index].astype(np.float64) for column in FUNCTIONALS}
        _finite(users, rows, forecast, tasks[name], label)
        forecasts[name, who, run] = forecast
    for name in behaviours:
        lacking = [who for who in models if not any((b, m) == (name, who) for b, m, _ in forecasts)]
        if lacking:
            raise UserError(f"behaviour {name}: expected rows of every model, none of {_list(lacking)}")
    return Predictions(np.array(users, dtype=object), tuple(models), outcomes, forecasts)


def _codes(column: pa.ChunkedArray) -> tuple[list[str], Ints]:
    """Sorted distinct values, and each row's index into them."""
    encoded = column.unify_dictionaries().combine_chunks()
    values = encoded.dictionary.to_pylist()
    ranked = sorted(range(len(values)), key=values.__getitem__)
    rank = np.empty(len(values), dtype=np.int64)
    rank[ranked] = np.arange(len(values))
    return [values[i] for i in ranked], rank[encoded.indices.to_numpy(zero_copy_only=False)]


def _same_rows(users: list[str], one: Outcomes, other: Outcomes, one_label: str, other_label: str) -> None:
    def keys(rows: Outcomes) -> list[tuple[int, int, int]]:
        return list(zip(rows.user.tolist(), rows.cut.tolist(), rows.day.tolist(), strict=True))

    if len(one.user) != len(other.user) or any(
        not np.array_equal(getattr(one, field), getattr(other, field)) for field in ("user", "cut", "day")
    ):
        ours, theirs = set(keys(one)), set(keys(other))
        only = [f"({users[u]}, {c}, {d}) only in [{one_label}]" for u, c, d in sorted(ours - theirs)]
        only += [f"({users[u]}, {c}, {d}) only in [{other_label}]" for u, c, d in sorted(theirs - ours)]
        raise UserError(
            f"expected the same rows (user, cut_day, day) in all models, {len(only)} differ: {_list(only)}; "
            "predict all models for the same cuts"
        )
    unequal = np.flatnonzero(~((one.y == other.y) | (np.isnan(one.y) & np.isnan(other.y))))
    if len(unequal):
        raise UserError(
            f"expected the same outcome y in all models, [{one_label}] and [{other_label}] differ in {len(unequal)} "
            f"rows: {_rows(users, one, unequal)}; the files come from different data"
        )


def _finite(users: list[str], rows: Outcomes, forecast: Mapping[str, Floats], task: Task, label: str) -> None:
    needed = ["p", "mean"] if task.kind == "binary" else ["mean", *(["p"] if task.gate else [])]
    for column in FUNCTIONALS:
        wrong = np.flatnonzero(~np.isfinite(forecast[column]))
        # A model without a distribution leaves a whole column out; gaps in a column are a fault.
        partly = task.kind != "binary" and len(wrong) < len(rows.user)
        if len(wrong) and (column in needed or partly):
            _refuse(f"{label}: column {column}", "finite numbers", "are NaN or infinite", users, rows, wrong)
    if "p" in needed:
        wrong = np.flatnonzero((forecast["p"] < 0) | (forecast["p"] > 1))
        if len(wrong):
            _refuse(f"{label}: column p", "probabilities in [0, 1]", "are not", users, rows, wrong)
    if task.kind == "binary":
        wrong = np.flatnonzero(~(np.isnan(rows.y) | (rows.y == 0) | (rows.y == 1)))
        if len(wrong):
            _refuse(f"{label}: column y", "0, 1 or NaN", "are none of them", users, rows, wrong)


def _refuse(where: str, expected: str, came: str, users: list[str], rows: Outcomes, index: Ints) -> NoReturn:
    raise UserError(
        f"{where}: expected {expected}, {len(index)} rows {came}: (user, cut_day, day) = {_rows(users, rows, index)}"
    )


def _rows(users: list[str], rows: Outcomes, index: Ints) -> str:
    shown = index[: _MOST_OFFENDERS + 1].tolist()
    return _list([f"({users[rows.user[i]]}, {rows.cut[i]}, {rows.day[i]})" for i in shown])


def _list(items: Sequence[str]) -> str:
    shown = ", ".join(items[:_MOST_OFFENDERS])
    return (shown or "none") + (", ..." if len(items) > _MOST_OFFENDERS else "")
