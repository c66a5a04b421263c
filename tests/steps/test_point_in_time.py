"""Whatever happens or becomes known at or after a cut changes nothing that a model reads at it or was fitted on.

Random tables go through the real prepare twice: as they are, and without what was not known at the cut. And the order
of rows and files changes nothing, while other names for the users only permute what is made of them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lum_ray import catalog
from lum_ray.config import Data, Events, Graph, Items, Run
from lum_ray.config import Profiles as ProfilesOfRun
from lum_ray.data.graph import read_edges
from lum_ray.data.items import Catalogue
from lum_ray.data.prepare import Tokenizer, prepare_timelines
from lum_ray.data.raw import RawTables
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples, hash_strings
from lum_ray.data.windows import came_before
from lum_ray.gts import sequences
from lum_ray.gts.config import GtsConfig, GtsInputs
from lum_ray.gts.fitting import fit_profiles, fit_tree, statistics
from lum_ray.gts.model import Gts
from lum_ray.gts.stage import GtsStage
from lum_ray.lumos.model import Lumos
from lum_ray.lumos.stage import LumosStage
from lum_ray.steps import prepare

START, CUT, END = 100, 130, 150
USERS, ITEMS = 5, 8
EXAMPLES = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
Row = dict[str, Any]

day = st.integers(START, END - 1)
known_at = st.one_of(st.none(), day)
# the first user has a training cut in every world
events = st.lists(
    st.tuples(st.integers(0, USERS - 1), day, st.integers(0, 9), st.integers(0, ITEMS - 1)), min_size=5, max_size=60
).map(lambda rows: [(0, START + 1, 1, 0), *rows])
profiles = st.lists(
    st.tuples(st.one_of(st.none(), day), st.floats(0, 99, width=16), st.sampled_from("abc"), known_at),
    min_size=USERS, max_size=USERS,
).map(lambda people: [(None, *people[0][1:]), *people[1:]])  # fmt: skip
calendar = st.lists(
    st.tuples(
        st.sampled_from(["user", "global"]), st.integers(0, USERS - 1), day, st.integers(0, 9),
        st.sampled_from(["match", "sale", "late"]), st.integers(1, 9), known_at,
    ),
    max_size=8,
)  # fmt: skip


def table_of(rows: list[Any], names: dict[str, pa.DataType]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return pa.table({name: pa.array(c, kind) for (name, kind), c in zip(names.items(), columns, strict=True)})


def write(folder: Path, table: pa.Table, files: int = 1) -> str:
    folder.mkdir(parents=True)
    for number in range(files):
        first, stop = (place * len(table) // files for place in (number, number + 1))
        pq.write_table(table.slice(first, stop - first), folder / f"{number}.parquet")
    return str(folder)


def as_tables(rows: list[Any], people: list[Any], coming: list[Any], name: Any = "u{}".format) -> dict[str, pa.Table]:
    """The raw tables; `name` gives a user's ID by number."""
    whole, text, number = pa.int32(), pa.string(), pa.float64()
    return {
        "events": table_of(
            [(name(u), d, a, f"i{i}") for u, d, a, i in rows],
            {"user": text, "time": whole, "amount": whole, "item": text},
        ),
        "profiles": table_of(
            [(name(u), *person) for u, person in enumerate(people)],
            {"user": text, "joined": whole, "age": number, "town": text, "known": whole},
        ),
        "calendar": table_of(
            [(s, name(u) if s == "user" else None, d, d + n, t, v, k) for s, u, d, n, t, v, k in coming],
            {"scope": text, "key": text, "start_day": whole, "end_day": whole, "event_type": text, "value": number,
             "known_at": whole},
        ),
    }  # fmt: skip


def before_cut(rows: list[Any], people: list[Any], coming: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The same without what happens or becomes known at or after the cut."""

    def calendar_known(row: Any) -> bool:
        default = row[2] if row[0] == "user" else START - 1
        return (default if row[-1] is None else row[-1]) < CUT

    hidden = [(joined, None, None, None) if known is not None and known >= CUT else (joined, age, town, known)
              for joined, age, town, known in people]  # fmt: skip
    return [row for row in rows if row[1] < CUT], hidden, [row for row in coming if calendar_known(row)]


def lumos_run(folder: Path, tables: dict[str, pa.Table]) -> Run:
    paths = {name: {"path": write(folder / name, table)} for name, table in tables.items() if len(table)}
    raw: dict[str, Any] = {
        "name": "own",
        "root": str(folder / "root"),
        "data": {
            **paths,
            "behaviours": [
                {"name": "active", "kind": "binary", "aggregate": "count()"},
                {"name": "spend", "kind": "continuous", "aggregate": "sum(amount)"},
            ],
            "horizons": [{"behaviour": "active", "over": "any", "days": 3}],
            "start": START,
            "end": END,
            "engine": "local",
        },
        "split": {"validate_from": CUT, "validate": {}, "test": {"from_day": CUT + 5}, "min_history_days": 1},
        "lumos": {"history_days": 14, "future_days": 3, "width": 8, "heads": 2, "encoder_layers": 1, "swiglu_width": 8},
    }  # fmt: skip
    raw["data"]["profiles"] |= {"registered": "joined", "numbers": ["age"], "categories": ["town"], "known_at": "known"}
    return catalog.read_run(raw)


def lumos_reads(run: Run) -> tuple[Any, dict[str, dict[str, Any]]]:
    """What is fitted, and by user what the model reads at the cut (no targets)."""
    prepared = prepare(run)
    calendar = prepared.calendar_table if run.data.calendar else None
    nothing = cast(Lumos, object())  # the weights are not asked
    stage = LumosStage(run.section, prepared.inputs, calendar, END, 1, module=nothing)
    timelines = Timelines.open(prepared.timelines.uri)
    rows = timelines.read(range(timelines.buckets))
    return json.loads(prepared.inputs.to_json()), {
        str(rows.user[i]): one_user(stage, rows, i) for i in came_before(rows, CUT)
    }


def one_user(stage: LumosStage, rows: Rows, index: int) -> dict[str, Any]:
    samples = Samples(np.array([index]), np.array([CUT], np.int32), np.zeros(1, np.int32))
    batch = stage.collate(rows, samples)
    coming = ("history_event_BT", "future_event_BCX")
    read = {name: batch["event_rows_ES"][batch[name]].tolist() for name in coming}
    for name in ("values_AU", "slot_A", "pads_B", "categories_BG"):
        read[name] = batch[name].tolist()
    return read | {"numbers_BN": np.nan_to_num(batch["numbers_BN"], nan=-1.0).tolist()}


@EXAMPLES
@given(events, profiles, calendar)
def test_lumos_reads_nothing_from_the_cut_on(rows: Any, people: Any, coming: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        fitted, read = lumos_reads(lumos_run(Path(place) / "all", as_tables(rows, people, coming)))
        some, known = lumos_reads(lumos_run(Path(place) / "before", as_tables(*before_cut(rows, people, coming))))
    assert read == known
    assert {name: fitted[name] for name in fitted if not name.startswith("event_")} == {
        name: some[name] for name in some if not name.startswith("event_")
    }
    assert fitted["event_types"] == some["event_types"] and fitted["event_scales"] == some["event_scales"]


@EXAMPLES
@given(events, profiles, calendar, st.randoms(use_true_random=False))
def test_lumos_does_not_see_the_order_of_rows_and_users(rows: Any, people: Any, coming: Any, random: Any) -> None:
    names = list(range(USERS))
    random.shuffle(names)
    with tempfile.TemporaryDirectory() as place:
        run = lumos_run(Path(place) / "a", as_tables(rows, people, coming))
        fitted, read = lumos_reads(run)
        shuffled = random.sample(rows, len(rows))
        again, same = lumos_reads(
            lumos_run(Path(place) / "b", as_tables(shuffled, people, random.sample(coming, len(coming))))
        )
        tables = as_tables(rows, people, coming, lambda number: f"u{names[number]}")
        _, other = lumos_reads(lumos_run(Path(place) / "c", tables))
    assert read == same and fitted == again
    # the draws behind the fitted starts are by user; what a user's model reads is not
    for number, name in enumerate(names):
        one, two = read.get(f"u{number}"), other.get(f"u{name}")
        assert (one is None) == (two is None)
        for part in one or ():
            np.testing.assert_allclose(np.array(one[part], float), np.array(two[part], float), rtol=1e-6)  # type: ignore[index]


def gts_reads(folder: Path, tables: dict[str, pa.Table], files: int = 1) -> tuple[Any, dict[str, Any]]:
    """What is fitted of GTS-LUM (counts, edges, profiles, the tree), and by user what the model reads at the cut."""
    data = Data(
        events=Events(item="item"), items=Items(), graph=Graph(known_at="known"), start=START, end=END,
        profiles=ProfilesOfRun(registered="joined", numbers=("age",), categories=("town",), known_at="known"),
    )  # fmt: skip
    paths = [write(folder / name, tables[name], files) for name in ("events", "profiles", "edges")]
    made_by = Tokenizer(sequences.partial, sequences.merge, sequences.TOKENIZER_VERSION, sequences.COLUMNS)
    artifact = prepare_timelines(data, RawTables(*paths[:2]), str(folder / "root"), made_by, "local")
    timelines = Timelines.open(artifact.uri)
    rows = timelines.read(range(timelines.buckets))
    rows = rows.take(came_before(rows, CUT))
    names = sorted(f"i{item}" for item in range(ITEMS))
    hashes = hash_strings(names).view(np.int64)
    catalogue = Catalogue(names, hashes, names, {}, {})
    found = statistics([rows], catalogue.index_of, ITEMS, CUT)
    fit = fit_profiles([rows], ("age",), ("town",), CUT)
    edges, _ = read_edges(paths[2], data, catalogue, CUT)
    random = np.random.default_rng(0)
    config = GtsConfig(text_encoder="minilm", llm="random", branching=2, depth=2, neighbours=2, max_tokens=24, width=8,
                       heads=2, layers=1, queries=1, output_width=8, graph_width=4, table_width=2)  # fmt: skip
    text_NE = random.normal(size=(ITEMS, 6)).astype(np.float32)
    tree = fit_tree(config, text_NE, found.count_N > 0, 0)
    arrays = {
        "hash_N": hashes, "text_NE": text_NE, "graph_NG": np.zeros((ITEMS, 4), np.float32),
        "graph_known_N": np.ones(ITEMS, bool), "table_NH": np.zeros((ITEMS, 2), np.float32),
        "paths_ND": tree.paths_ND, "collision_N": tree.collision_N, "count_N": found.count_N,
        "log_q_N": np.zeros(ITEMS, np.float32), "words_NT": np.zeros((ITEMS, 2), np.int64),
        "profile_scale": fit["scale"], "holidays": np.zeros(0, np.int64),
    }  # fmt: skip
    inputs = GtsInputs(tuple(names), ("x",), fit["numbers"], fit["categories"], fit["values"], arrays)
    stage = GtsStage(config, inputs, END, module=cast(Gts, object()))  # its weights are not asked
    shapes = [
        found.count_N,
        found.edges_M2,
        found.weights_M,
        fit["scale"],
        tree.paths_ND,
        edges.pairs_M2,
        edges.weights_M,
    ]
    fitted = [fit["values"], *(np.asarray(array).tolist() for array in shapes)]
    read = {}
    for index in range(len(rows)):
        batch = stage.questions(rows, Samples(np.array([index]), np.array([CUT], np.int32), np.zeros(1, np.int32)))
        read[str(rows.user[index])] = {name: np.asarray(array).tolist() for name, array in batch.items()}
    return fitted, read


edge = st.tuples(st.integers(0, ITEMS - 1), st.integers(0, ITEMS - 1), day)


def with_edges(tables: dict[str, pa.Table], rows: list[Any]) -> dict[str, pa.Table]:
    names = {"source": pa.string(), "target": pa.string(), "known": pa.int32()}
    return tables | {"edges": table_of([(f"i{a}", f"i{b}", d) for a, b, d in rows], names)}


FIRST_EDGE = (0, 1, START)


@EXAMPLES
@given(events, profiles, st.lists(edge, max_size=9), st.randoms(use_true_random=False))
def test_gts_reads_nothing_from_the_cut_on_and_no_order(rows: Any, people: Any, edges: Any, random: Any) -> None:
    edges = [FIRST_EDGE, *edges]  # a table without rows is refused
    names = list(range(USERS))
    random.shuffle(names)
    with tempfile.TemporaryDirectory() as place:
        fitted, read = gts_reads(Path(place) / "a", with_edges(as_tables(rows, people, []), edges))
        some, hidden, _ = before_cut(rows, people, [])
        known_edges = [row for row in edges if row[2] < CUT]
        assert (fitted, read) == gts_reads(Path(place) / "b", with_edges(as_tables(some, hidden, []), known_edges))
        shuffled = with_edges(as_tables(random.sample(rows, len(rows)), people, []), random.sample(edges, len(edges)))
        assert (fitted, read) == gts_reads(Path(place) / "c", shuffled, 3)
        tables = with_edges(as_tables(rows, people, [], lambda number: f"u{names[number]}"), edges)
        again, other = gts_reads(Path(place) / "d", tables)
    np.testing.assert_allclose(again[4], fitted[4])  # a sum in another order
    assert again[:4] == fitted[:4] and again[5:] == fitted[5:]
    for number, name in enumerate(names):
        one, two = read.get(f"u{number}"), other.get(f"u{name}")
        assert (one is None) == (two is None)
        for part in one or ():
            np.testing.assert_allclose(one[part], two[part], rtol=1e-6)  # type: ignore[index]
