"""`lum-ray demo`: the whole path of both models, from raw events to answered requests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from lum_ray.artifacts import join
from lum_ray.config import Run


def run_lumos_demo(run: Run, say: Callable[[str], None]) -> None:
    """Prepare, train, evaluate and serve `run`; print the metrics, the report's path and two answered requests."""
    from jobs.printing import done, print_metrics
    from serve.environment import optimise

    optimise()  # before Ray is imported
    from lum_ray.data.state import State
    from lum_ray.steps import describe, evaluate, prepare, publish, train
    from lum_ray.steps.session import start_ray
    from serve.app import Endpoint
    from serve.app import run as start_server
    from serve.client import Client
    from serve.types import CalendarRow, User

    started_at = time.monotonic()
    start_ray()
    prepared = prepare(run, say)
    facts = describe(run, prepared)
    say(
        f"{facts['users']:,} users, {facts['days']} days, {facts['active_days']:,} active days, "
        f"{facts['rows_in']:,} raw rows ({facts['rows_rejected']} rejected), "
        f"{facts['bytes_per_token']} bytes per token, {facts['pad_share']:.1%} pads"
    )
    checkpoint = train(run, say)
    found = evaluate(run, say)
    print_metrics(run, found.table)
    report = join(found.uri, "report.html")
    say(f"report: {os.path.abspath(report) if '://' not in report else report}")

    state_uri = publish(run, say)
    say("starting the endpoint (Ray Serve)")
    server = start_server([Endpoint(checkpoint, state_uri, serve=run.serve)], port=0)
    try:
        user = User(user=State.open(state_uri).users()[0])
        with Client(server.url) as client:
            answer = client.predict([user]).model_dump(mode="json")
            asked: dict[str, Any] = {"users": [user.model_dump(exclude_unset=True)]}
            _show(say, f"POST {server.url}/v1/lumos/predict", asked, _headline(answer))
            info = client.models()[0]
            day = answer["answers"][0]["days"][3]["day"]
            kind = next(name for name in info.event_types if name == "holiday" or name == info.event_types[-1])
            scenario = [CalendarRow(event_type=kind, start_day=day)]
            changed = client.what_if([user], [scenario]).model_dump(mode="json")
            asked["scenarios"] = [[row.model_dump(exclude_unset=True) for row in scenario]]
            _show(say, f"POST {server.url}/v1/lumos/what-if", asked, _difference(changed, 3))
    finally:
        server.stop()
    say(f"{time.monotonic() - started_at:.0f} s in all")
    done(report)


def run_gts_demo(run: Run, say: Callable[[str], None]) -> None:
    """Prepare, train and evaluate `run`; print the metrics, the report's path and what one household is expected to
    take next."""
    from jobs.printing import done, print_rankings
    from lum_ray.data.state import State
    from lum_ray.gts.requests import Request
    from lum_ray.steps import describe, evaluate, open_predictor, prepare, publish
    from lum_ray.steps.session import start_ray

    started_at = time.monotonic()
    start_ray()
    facts = describe(run, prepare(run, say))
    say(
        f"{facts['users']:,} users, {facts['events']:,} events ({facts['rows_rejected']:,} of {facts['rows_in']:,} raw "
        f"rows rejected), {facts['items']:,} items in {facts['tree_leaves']} leaves, {facts['bytes_per_event']} bytes "
        "per event"
    )
    found = evaluate(run, say)
    print_rankings(run, found.table)
    report = join(found.uri, "report.html")
    say(f"report: {os.path.abspath(report) if '://' not in report else report}")
    user = State.open(publish(run, say)).users()[0]
    listed = open_predictor(run, say).recommend([Request(user=user)], k=5)[0]
    say(f"what household {user} takes next: " + ", ".join(item.item for item in listed.items))
    say(f"{time.monotonic() - started_at:.0f} s in all")
    done(report)


def _show(say: Callable[[str], None], request: str, body: Any, answer: Any) -> None:
    say(f"{request} {json.dumps(body)}")
    say(f"  -> {json.dumps(answer)}")


def _headline(answer: dict[str, Any]) -> dict[str, Any]:
    """The first day and the horizons of an answer, rounded."""
    one = answer["answers"][0]
    return {"day": one["days"][0]["day"], **_rounded(one["days"][0]["behaviours"]), **_rounded(one["horizons"])}


def _difference(answer: dict[str, Any], day: int) -> dict[str, Any]:
    one = answer["answers"][0]["scenarios"][0]
    moved = one["difference"]["days"][day]
    return {
        "day": moved["day"],
        **{name: round(value, 4) for name, value in moved["behaviours"].items()},
        "nearer_share": round(one["nearer_share"], 3),
        "out_of_range": one["out_of_range"],
    }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {key: round(value, 3) for key, value in item.items() if value is not None}
        for name, item in values.items()
    }
