"""The page of `report.html`: no script, no font, no address outside the file."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ facts.title }}</title>
<style>
:root { --ink: #1d2733; --soft: #5b6774; --line: #dde3e9; --tint: #f4f7fa; --ours: #0b5cad; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4em 0 .6em; }
h2 { font-size: 1.2rem; margin: 2.2em 0 .5em; padding-bottom: .25em; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4em 0 .4em; }
p { margin: .5em 0; }
.soft, .absent { color: var(--soft); }
.absent { background: var(--tint); border-left: 3px solid var(--line); padding: .6em .9em; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.wide img { display: block; width: 100%; min-width: 600px; height: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35em .7em; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; font-size: .85rem; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
td small { display: block; color: var(--soft); white-space: nowrap; font-size: .78rem; font-weight: 400; }
td.ours, th.ours { background: var(--tint); }
th.block { color: var(--ink); padding-top: 1em; }
th.ours { color: var(--ours); }
td b { color: var(--ink); font-weight: 750; }
td { color: #3d4956; }
table.lines td { text-align: left; }
table.lines td:first-child { color: var(--soft); padding-right: 1.2em; }
details { margin: .7em 0; border: 1px solid var(--line); border-radius: 6px; padding: .45em .8em; }
summary { cursor: pointer; font-weight: 600; }
nav { font-size: .92rem; }
nav a { color: var(--ours); margin-right: .9em; white-space: nowrap; }
@media print { details > * { display: block; } nav { display: none; } }
</style>
</head>
<body>
<main>
<h1>{{ facts.title }}</h1>
{% set links %}
<a href="#strata">Where each is better</a> <a href="#calendar">What the calendar is worth</a>
{% endset %}
<nav><a href="#run">Run</a> <a href="#metrics">Metrics</a>
{% if strata or worth %}{{ links }}{% endif %}
{% for section in sections %}<a href="#{{ section.name }}">{{ section.title }}</a> {% endfor %}
{% if not (strata or worth) %}{{ links }}{% endif %}
<a href="#cohorts">Cohorts</a> <a href="#data">Data</a></nav>

<h2 id="run">Run</h2>
{% if facts.summary %}
<div class="wide"><table class="lines">
{% for label, value in facts.summary %}<tr><td>{{ label }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></div>
{% else %}<p class="absent">Not shown: no summary was given.</p>
{% endif %}

<h2 id="metrics">Metrics</h2>
{% macro title(table) %}
{{ table.heading }}{% if table.best %} <span class="soft">({{ table.best }} is best)</span>{% endif %}
{% endmacro %}
{% macro metric(table) %}
{% if table.sentence %}<p>{{ table.sentence }}</p>{% endif %}
<div class="wide"><table>
<tr><th>task</th>
{% for model in table.models %}
<th{% if model == facts.ours %} class="ours"{% endif %}>{{ model|replace("_", " ") }}</th>
{% endfor %}
<th>rows</th></tr>
{% for task, n, cells in table.rows %}
<tr><td>{{ task }}</td>
{% for cell in cells %}
<td{% if cell.ours %} class="ours"{% endif %}>
{%- if cell.best %}<b>{{ cell.value }}</b>{% else %}{{ cell.value }}{% endif %}
{% if cell.interval %}<small>{{ cell.interval }}</small>{% endif %}</td>
{% endfor %}
<td>{{ n }}</td></tr>
{% endfor %}</table></div>
{% endmacro %}
{% if tables %}
<p class="soft">Small figures: 95 % interval by bootstrap over users. Bold: the best of a row.
All models predict the same rows.</p>
{% for table in tables if table.open %}
<h3>{{ title(table) }}</h3>
{{ metric(table) }}
{% endfor %}
{% for table in tables if not table.open %}
<details><summary>{{ title(table) }}</summary>
{{ metric(table) }}
</details>
{% endfor %}
{% else %}<p class="absent">Not shown: no predictions were evaluated.</p>
{% endif %}

{% macro contest() %}
<h2 id="strata">Where each is better</h2>
{% if strata and strata.tables %}
<p class="soft">The gain of {{ facts.ours }} over {{ facts.peer }} in groups of users and days, with its 95 %
interval by paired bootstrap over users; right of 0, {{ facts.ours }} is better.</p>
{% for task, picture in strata.pictures %}
<h3>{{ task }}</h3>
<p>{{ picture.sentence }}</p>
<div class="wide"><img alt="Where each is better: {{ picture.sentence }}" src="{{ picture.source }}"></div>
{% else %}<p class="absent">Not drawn: no group of any task holds enough rows of both outcomes.</p>
{% endfor %}
{% for table in strata.tables %}
<details><summary>{{ table.name }}</summary>
<div class="wide"><table>
<tr><th>group</th><th>gain</th><th class="ours">{{ facts.ours|replace("_", " ") }}</th>
<th>{{ facts.peer|replace("_", " ") }}</th><th>rows</th><th>users</th></tr>
{% for by, group, n, users, ours, peer, gain, interval in table.lines %}
{% if loop.changed(by) %}<tr><th class="block" colspan="6">{{ by }}</th></tr>{% endif %}
<tr><td>{{ group }}</td><td>{{ gain }}{% if interval %}<small>{{ interval }}</small>{% endif %}</td>
<td class="ours">{{ ours }}</td><td>{{ peer }}</td><td>{{ n }}</td><td>{{ users }}</td></tr>
{% endfor %}</table></div>
</details>
{% endfor %}
{% else %}<p class="absent">Not shown: no peer was compared group by group.</p>
{% endif %}

<h2 id="calendar">What the calendar is worth</h2>
{% if worth and worth.table.lines %}
<p>{{ worth.sentence }}</p>
<div class="wide"><table>
<tr><th>model</th><th>task</th><th>metric</th><th>with</th><th>without</th><th>gain</th></tr>
{% for model, task, metric, with_calendar, without, gain, interval in worth.table.lines %}
<tr><td>{{ model }}</td><td>{{ task }}</td><td>{{ metric }}</td><td>{{ with_calendar }}</td><td>{{ without }}</td>
<td>{{ gain }}{% if interval %}<small>{{ interval }}</small>{% endif %}</td></tr>
{% endfor %}</table></div>
{% else %}<p class="absent">Not shown: no model was compared with itself without the calendar.</p>
{% endif %}
{% endmacro %}
{# A contest of models opens with its outcome; a run of one model says last that there was none. #}
{% if strata or worth %}{{ contest() }}{% endif %}

{% for section in sections %}
<h2 id="{{ section.name }}">{{ section.title }}</h2>
{% if section.picture %}
<p>{{ section.picture.sentence }}</p>
<div class="wide"><img alt="{{ section.title }}: {{ section.picture.sentence }}"
src="{{ section.picture.source }}"></div>
{% else %}<p class="absent">Not shown: {{ section.absent }}.</p>
{% endif %}
{% endfor %}
{% if not (strata or worth) %}{{ contest() }}{% endif %}

<h2 id="cohorts">Cohorts</h2>
{% if cohorts %}
<p class="soft">Mean outcome of the treatment minus that of the control, with its 95 % interval by bootstrap
over users.</p>
<div class="wide"><table>
<tr><th>task</th><th>outcome</th><th>difference</th><th>interval</th><th>users</th></tr>
{% for task, name, value, interval, n in cohorts %}
<tr><td>{{ task }}</td><td>{{ name }}</td><td>{{ value }}</td><td>{{ interval }}</td><td>{{ n }}</td></tr>
{% endfor %}</table></div>
{% else %}<p class="absent">Not shown: no cohorts were assigned.</p>
{% endif %}

<h2 id="data">Data</h2>
<p>{{ pads }}</p>
{% if facts.data %}
<div class="wide"><table class="lines">
{% for label, value in facts.data %}<tr><td>{{ label }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></div>
{% else %}<p class="absent">Not shown: no data facts were given.</p>
{% endif %}
</main>
</body>
</html>
"""
