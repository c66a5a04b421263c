"""What a search leaves behind: `best_run.yaml`, `trials.json`, `report.html`, and an entry in `tuning/LOG.md`."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import optuna
import yaml
from jinja2 import Environment

from lum_ray import config
from lum_ray.artifacts import join, write_bytes, write_json
from lum_ray.config import Run
from lum_ray.evaluation import ranking_report_template
from lum_ray.evaluation.bootstrap import Interval, interval
from lum_ray.evaluation.pictures import Picture
from lum_ray.steps.forecasts import forecasts
from lum_ray.steps.prepare import Log
from tuning import pictures
from tuning.ledger import Record, key_of
from tuning.objective import resamples
from tuning.pictures import Trials, name_of
from tuning.search import params_of, study_of
from tuning.spaces import Space, value_of

LOG = os.path.join("tuning", "LOG.md")
FEWEST_TRIALS = 4
"""Fewer finished trials say nothing about which setting matters."""


@dataclass(frozen=True)
class Contest:
    """The winner and the run as it is on the test split, and the paired difference; users asked."""

    winner: Interval
    default: Interval
    gain: Interval
    users: int


def conclude(
    run: Run,
    root: str,
    space: Space,
    metric: str,
    mode: str,
    uri: str,
    records: Sequence[Record],
    whole: bool,
    log: Log,
) -> Record:
    """Write what the trials that are over show, and return the winner. `root`: as the user gave it, for best_run.yaml.

    The test split is read once all trials are over (`whole`), and chooses nothing. Needs one finished trial.
    """
    base = space.base(run)
    folders = {r.key: join(run.root, "predictions", str(r.forecasts)) for r in records if r.state == "finished"}
    found, users = resamples(base, folders, metric)
    params = {
        record.key: {path: record.values.get(path, value_of(base, path)) for path in space.distributions}
        for record in records
    }
    trials = Trials(metric, 1 if mode == "max" else -1, records, params, found, key_of(base))
    winner = trials.best_of(trials.finished)
    best_run = replace(space.apply(run, winner.values), root=root)
    text = yaml.safe_dump(config.dump(best_run), sort_keys=False, allow_unicode=True, width=110)
    write_bytes(join(uri, "best_run.yaml"), f"# Trial {winner.number} of {uri}\n{text}".encode())
    write_json(join(uri, "trials.json"), [dataclasses.asdict(record) for record in records])
    contest = None
    if whole and winner.key != trials.default and trials.default in found:
        log("the winner against the run as it is, on the test split")
        contest = _contest(run, base, space, winner, trials.default, metric, records)
    shares = _importance(run, space, records, mode)
    sections = _sections(space, trials, shares)
    for name, _, picture, _ in sections:
        if picture:
            write_bytes(join(uri, f"{name}.svg"), base64.b64decode(picture.source.partition(",")[2]))
    page = _page(run, space, trials, winner, contest, sections, users, whole)
    write_bytes(join(uri, "report.html"), page.encode())
    for line in _said(trials, winner, contest, whole):
        log(line)
    log(f"report: {join(uri, 'report.html')}; train the winner with `lum-ray train {join(uri, 'best_run.yaml')}`")
    if whole:
        _enter(_entry(run, space, trials, winner, contest, shares, uri), uri, _search(uri, len(records)), log)
    return winner


def _contest(
    run: Run, base: Run, space: Space, winner: Record, default: str, metric: str, records: Sequence[Record]
) -> Contest:
    known = {record.key: record for record in records}
    folders = {}
    for key in (winner.key, default):
        checkpoint = join(run.root, "checkpoints", str(known[key].checkpoint))
        folders[key] = forecasts(space.apply(run, known[key].values), checkpoint, "test", base)
    found, users = resamples(base, folders, metric)
    ours, other = found[winner.key], found[default]
    return Contest(interval(ours), interval(other), interval(ours - other), users)


def _importance(run: Run, space: Space, records: Sequence[Record], mode: str) -> Mapping[str, float]:
    """Each setting's share of the variance of the metric (fANOVA over the finished trials); none for too few."""
    done = [r for r in records if r.state == "finished" and params_of(run, space, r.values) is not None]
    if len(done) < FEWEST_TRIALS or len({record.value for record in done}) < 2:
        return {}
    study = study_of(run, space, list(done), mode)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {path: float(share) for path, share in shares.items() if math.isfinite(share)}


def _said(trials: Trials, winner: Record, contest: Contest | None, whole: bool) -> list[str]:
    at = interval(trials.found[winner.key])
    lines = [f"best of {len(trials.finished)} finished trials: #{winner.number}, {trials.metric} {_interval(at)} "
             f"({_settings(winner)})"]  # fmt: skip
    if contest:
        lines.append(f"on the test split, {contest.users:,} users: {_interval(contest.winner)}, the run as it is "
                     f"{_interval(contest.default)}; difference {_signed(contest.gain)}")  # fmt: skip
    elif whole and winner.key == trials.default:
        lines.append("no trial was better than the run as it is")
    return lines


def _interval(at: Interval) -> str:
    return f"{at.value:.4f} [{at.low:.4f}, {at.high:.4f}]"


def _signed(at: Interval) -> str:
    return f"{at.value:+.4f} [{at.low:+.4f}, {at.high:+.4f}]"


def _settings(record: Record) -> str:
    shown = (f"{name_of(path)} {v:.3g}" if isinstance(v, float) else f"{name_of(path)} {v}"
             for path, v in record.values.items())  # fmt: skip
    return ", ".join(shown) or "the run as it is"


Section = tuple[str, str, Picture | None, str]  # name, heading, picture, why there is none


def _sections(space: Space, trials: Trials, shares: Mapping[str, float]) -> list[Section]:
    axes = space.map_of
    missing = "needs a second setting with few values, and finished trials"
    return [
        ("map", f"{name_of(axes[0]).capitalize()} and {name_of(axes[1])}" if axes else "Heat map",
         pictures.heat_map(trials, *axes) if axes else None, missing),
        ("sensitivity", "What each value is worth", pictures.sensitivity(trials, axes or ()),
         "needs the run as it is and two values of a setting among the finished trials"),
        ("importance", "Which setting matters", pictures.importance(shares),
         f"needs {FEWEST_TRIALS} finished trials that differ"),
        ("cost", "Cost against quality", pictures.cost(trials), "no trial has finished"),
    ]  # fmt: skip


def _page(
    run: Run,
    space: Space,
    trials: Trials,
    winner: Record,
    contest: Contest | None,
    sections: list[Section],
    users: int,
    whole: bool,
) -> str:
    lines = []
    sign = trials.sign
    order = sorted(trials.records, key=lambda r: (r.state != "finished", -sign * _rank(r.value, sign), r.number))
    for record in order:
        at = interval(trials.found[record.key]) if record.key in trials.found else None
        gain = trials.gain(record.key) if at else None
        settings = [trials.params[record.key][path] for path in space.distributions]
        lines.append({
            "number": record.number, "ours": record.key == winner.key, "state": record.state,
            "default": record.key == trials.default,
            "settings": [f"{v:.3g}" if isinstance(v, float) else str(v) for v in settings],
            "value": "–" if record.value is None else f"{record.value:.4f}",
            "interval": f"{at.low:.4f} to {at.high:.4f}" if at else "",
            "gain": _signed(gain) if gain else "–",
            "train_s": f"{record.train_s:,.0f}", "parameters": f"{record.parameters:,}" if record.parameters else "–",
            "step": record.curve[-1][0] if record.curve else "–", "message": record.message,
        })  # fmt: skip
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(TEMPLATE)
        .render(
            title=f"{run.name}: search {space.name}, {len(trials.records)} trials",
            said=_said(trials, winner, contest, whole), metric=trials.metric, sections=sections, lines=lines,
            names=[name_of(path) for path in space.distributions], fixed=dict(space.fixed), users=users, whole=whole,
        )
    )  # fmt: skip


def _rank(value: float | None, sign: int) -> float:
    return -sign * np.inf if value is None or math.isnan(value) else value


def _entry(
    run: Run, space: Space, trials: Trials, winner: Record, contest: Contest | None, shares: Mapping[str, float],
    uri: str,
) -> str:  # fmt: skip
    """The search for the log: settings, figures, conclusion."""
    states = [f"{sum(r.state == state for r in trials.records)} {state}" for state in ("finished", "pruned", "failed")]
    searched = ", ".join(f"`{path}`" for path in space.distributions)
    fixed = ", ".join(f"`{path}` {value}" for path, value in space.fixed.items())
    lines = [
        f"## {datetime.date.today()}: {run.name}, search {space.name} ({_search(uri, len(trials.records))})", "",
        f"Searched {searched}{f' with {fixed}' if fixed else ''}: {', '.join(states)}, "
        f"{sum(r.train_s for r in trials.records):,.0f} s of training. Validation, `{trials.metric}`, intervals over "
        "users.",
        "", "| trial | settings | value | against the run as it is |", "|---|---|---|---|",
    ]  # fmt: skip
    ranked = sorted(trials.finished, key=lambda r: -trials.sign * float(trials.found[r.key][0]))
    for record in ranked:
        gain = trials.gain(record.key)
        lines.append(f"| {record.number} | {_settings(record)} | {_interval(interval(trials.found[record.key]))} | "
                     f"{_signed(gain) if gain else '-'} |")  # fmt: skip
    if shares:
        weighed = ", ".join(f"{name_of(path)} {share:.2f}" for path, share in shares.items())
        lines += ["", f"Share of the variance between trials: {weighed}."]
    if contest:
        clear = contest.gain.low > 0 or contest.gain.high < 0
        lines += ["", f"Test, {contest.users:,} users: winner {_interval(contest.winner)}, the run as it is "
                  f"{_interval(contest.default)}, difference {_signed(contest.gain)}: "
                  f"{'beyond chance' if clear else 'not beyond chance'}."]  # fmt: skip
    elif winner.key == trials.default:
        lines += ["", "No trial was better than the run as it is."]
    return "\n".join(lines) + "\n"


def _search(uri: str, trials: int) -> str:
    return f"{uri.rsplit('/', 1)[-1]}, {trials} trials"


def _enter(entry: str, uri: str, search: str, log: Log) -> None:
    """Put the entry at the top of `tuning/LOG.md` where the command runs in the repository, and beside the report."""
    write_bytes(join(uri, "log.md"), entry.encode())
    if not os.path.exists(LOG):
        return
    with open(LOG, encoding="utf-8") as stream:
        text = stream.read()
    if search in text:
        return
    head, mark, rest = text.partition("\n## ")
    with open(LOG, "w", encoding="utf-8") as stream:
        stream.write(f"{head}\n{entry}{mark}{rest}" if mark else f"{text.rstrip()}\n\n{entry}")
    log(f"entered into {LOG}")


_STYLE = ranking_report_template.TEMPLATE.partition("<style>")[2].partition("</style>")[0]
TEMPLATE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>"""
    + _STYLE
    + """</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<nav>{% for name, heading, picture, missing in sections %}<a href="#{{ name }}">{{ heading }}</a>
{% endfor %}<a href="#trials">Trials</a></nav>
{% for line in said %}<p>{{ line[0]|upper }}{{ line[1:] }}.</p>
{% endfor %}
<p class="soft">Trials are compared by {{ metric }} of their prediction files for the same {{ "{:,}".format(users) }}
users and validation cuts, whatever their data shape; intervals are 95 %, by bootstrap over users (another seed of the
same settings varies too, which they do not hold). The best of many
trials looks better on validation than it is{% if whole %}: the test split says how good{% endif %}.</p>
{% if fixed %}<p class="soft">In all trials: {% for path, value in fixed.items() %}{{ path }} {{ value }}
{%- if not loop.last %}, {% endif %}{% endfor %}.</p>{% endif %}
{% if not whole %}<p class="absent">The search is not over: the same command goes on, and reads the test split at the
end.</p>{% endif %}
{% for name, heading, picture, missing in sections %}
<h2 id="{{ name }}">{{ heading }}</h2>
{% if picture %}
<p>{{ picture.sentence }}</p>
<div class="wide"><img alt="{{ heading }}: {{ picture.sentence }}" src="{{ picture.source }}"></div>
{% else %}<p class="absent">Not shown: {{ missing }}.</p>
{% endif %}
{% endfor %}
<h2 id="trials">Trials</h2>
<div class="wide"><table>
<tr><th>trial</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}
<th>value</th><th>against the run as it is</th><th>steps</th><th>training, s</th><th>parameters</th><th>state</th></tr>
{% for line in lines %}
<tr>
{% set cell = ' class="ours"'|safe if line.ours else '' %}
<td{{ cell }}>{{ line.number }}{% if line.default %}<small>the run as it is</small>{% endif %}</td>
{% for value in line.settings %}<td{{ cell }}>{{ value }}</td>{% endfor %}
<td{{ cell }}>{{ line.value }}{% if line.interval %}<small>{{ line.interval }}</small>{% endif %}</td>
<td{{ cell }}>{{ line.gain }}</td><td{{ cell }}>{{ line.step }}</td><td{{ cell }}>{{ line.train_s }}</td>
<td{{ cell }}>{{ line.parameters }}</td><td{{ cell }}>{{ line.state }}
{%- if line.message %}<small>{{ line.message }}</small>{% endif %}</td></tr>
{% endfor %}</table></div>
</main>
</body>
</html>
"""
)
