"""The page of the ranking report: no script, no font, no address outside the file; the style is that of `report`."""

from lum_ray.evaluation import report_template

_STYLE = report_template.TEMPLATE.partition("<style>")[2].partition("</style>")[0]

TEMPLATE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ facts.title }}</title>
<style>"""
    + _STYLE
    + """
main { max-width: 980px; }
tr.ceiling td { color: var(--soft); font-style: italic; border-bottom: none; }
th small { display: block; font-weight: 400; font-size: .74rem; }
table.models td, table.models th { padding-left: .45em; padding-right: .45em; }
table.models td:first-child { white-space: nowrap; padding-right: 1em; }
table.texts td, table.texts th { text-align: left; }
table.texts td.n { text-align: right; }
table.texts td:first-child, table.lines td:first-child { white-space: nowrap; }
.node { display: grid; grid-template-columns: 5.5em 6.5em 4.5em 1fr; gap: .6em; align-items: baseline; }
.node .n { text-align: right; font-variant-numeric: tabular-nums; }
.node .t { color: #3d4956; font-size: .9rem; overflow-wrap: anywhere; min-width: 0; }
.bar { height: .7em; background: var(--tint); }
.bar i { display: block; height: 100%; background: var(--ours); opacity: .65; }
details.tree { border: none; border-top: 1px solid var(--line); border-radius: 0; margin: 0; padding: .35em 0; }
details.tree details.tree { margin-left: 1.2em; }
details.tree summary { font-weight: 400; }
details.tree summary .node { display: inline-grid; width: calc(100% - 1.4em); vertical-align: top; }
.leaves { margin: .3em 0 .6em 1.4em; font-size: .88rem; }
.leaves td { text-align: left; }
@media (max-width: 560px) { .node { grid-template-columns: 4em 3.5em 3.6em 1fr; gap: .4em; } }
</style>
</head>
<body>
<main>
<h1>{{ facts.title }}</h1>
<nav><a href="#run">Run</a>
{% for table in tables %}<a href="#{{ table.name }}">{{ table.title }}</a> {% else %}
<a href="#models">All models</a>{% endfor %}
<a href="#tree">ID tree</a> <a href="#neighbours">Neighbours</a> <a href="#line">One user</a> <a href="#data">Data</a>
</nav>

<h2 id="run">Run</h2>
{% if facts.summary %}
<div class="wide"><table class="lines">
{% for label, value in facts.summary %}<tr><td>{{ label }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></div>
{% else %}<p class="absent">Not shown: no summary was given.</p>
{% endif %}

{% for table in tables %}
<h2 id="{{ table.name }}">{{ table.title }}</h2>
{% if table.sentence %}<p>{{ table.sentence }}</p>{% endif %}
{% if table.picture %}
<div class="wide"><img alt="{{ table.title }}: {{ table.picture.sentence }}" src="{{ table.picture.source }}"></div>
{% endif %}
<p class="soft">{{ table.note }}
{% if loop.first %}
Small figures: 95 % interval by bootstrap over users, and above a column its baskets. Bold: the best of a column.
Ranks are among the whole catalogue and pessimistic: of tied scores the target's comes last.
{% endif %}</p>
<div class="wide"><table class="models">
<tr><th>model</th>
{% for column in table.columns %}
{% set heading, baskets = column.split("|") %}
<th>{{ heading }}{% if baskets %}<small>{{ baskets }}</small>{% endif %}</th>
{% endfor %}</tr>
{% for name, is_ours, cells in table.rows %}
<tr{% if name == "ceiling" %} class="ceiling"{% endif %}><td{% if is_ours %} class="ours"{% endif %}>{{ name }}</td>
{% for cell in cells %}
<td{% if is_ours %} class="ours"{% endif %}>
{%- if cell.best %}<b>{{ cell.value }}</b>{% else %}{{ cell.value }}{% endif %}
{% if cell.interval %}<small>{{ cell.interval }}</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}</table></div>
{% else %}
<h2 id="models">All models</h2>
<p class="absent">Not shown: no rankings were evaluated.</p>
{% endfor %}

{% macro line(node) %}
<span class="node"><span>{{ node.path }}</span>
<span class="bar"><i style="width: {{ '%.1f'|format(100 * node.share) }}%"></i></span>
<span class="n">{{ '{:,}'.format(node.items) }}</span><span class="t">{{ node.examples }}</span></span>
{% endmacro %}
{% macro leaves(node) %}
<table class="leaves">
{% for leaf in node.children %}
<tr><td>{{ leaf.path }}</td><td>{{ '{:,}'.format(leaf.items) }}</td><td>{{ leaf.examples }}</td></tr>
{% endfor %}
{% if node.hidden %}
<tr><td colspan="3" class="soft">and {{ '{:,}'.format(node.hidden) }} more leaves</td></tr>
{% endif %}
</table>
{% endmacro %}
{% macro below(node) %}
{% if node.children and node.children[0].leaf %}{{ leaves(node) }}
{% else %}
{% for child in node.children %}
<details class="tree"><summary>{{ line(child) }}</summary>{{ below(child) }}</details>
{% endfor %}
{% if node.hidden %}<p class="soft">and {{ '{:,}'.format(node.hidden) }} more nodes</p>{% endif %}
{% endif %}
{% endmacro %}
<h2 id="tree">The ID tree</h2>
{% if tree %}
<p>{{ tree.sentence }}</p>
<div class="wide"><img alt="The ID tree: {{ tree.sentence }}" src="{{ tree.source }}"></div>
<p class="soft">Path, share of the items, items, examples. Open a node for what lies below it, down to the leaves.</p>
{{ below(nodes) }}
{% else %}<p class="absent">Not shown: {{ facts.no_tree }}.</p>
{% endif %}

<h2 id="neighbours">Nearest neighbours</h2>
{% if near %}
<p>{{ near_sentence }}</p>
{% for item, lines in near %}
<h3>{{ item }}</h3>
<div class="wide"><table class="texts">
<tr><th>by the fused embedding</th><th>cosine</th><th>by text alone</th><th>cosine</th></tr>
{% for fused, fused_cosine, fused_shared, text, text_cosine, text_shared in lines %}
<tr><td>{% if fused_shared %}{{ fused }}{% else %}<b>{{ fused }}</b>{% endif %}</td>
<td class="n">{{ fused_cosine }}</td>
<td>{{ text }}</td><td class="n">{{ text_cosine }}</td></tr>
{% endfor %}</table></div>
{% endfor %}
{% else %}<p class="absent">Not shown: {{ facts.no_neighbours }}.</p>
{% endif %}

<h2 id="line">One user's time</h2>
{% if line_picture %}
<p>{{ line_picture.sentence }}</p>
<div class="wide"><img alt="One user's time: {{ line_picture.sentence }}" src="{{ line_picture.source }}"></div>
{% if next_sentence %}
<h3>What came next</h3>
<p>{{ next_sentence }}</p>
<div class="wide"><table class="lines">
<tr><td>in front</td><td>{% for item in facts.time_line.next.ranked %}
{% if item in facts.time_line.next.taken %}<b>{{ item }}</b>{% else %}{{ item }}{% endif %}
{% if not loop.last %} · {% endif %}{% endfor %}</td></tr>
<tr><td>taken</td><td>{{ facts.time_line.next.taken|join(" · ") }}</td></tr>
</table></div>
{% endif %}
<h3>The slots, newest first</h3>
<div class="wide"><table class="texts">
<tr><th>time</th><th>descriptor</th><th>items</th></tr>
{% for when, descriptor, items in slots %}
<tr><td>{{ when }}</td><td>{{ descriptor }}</td><td>{{ items }}</td></tr>
{% endfor %}</table></div>
{% if earlier %}<p class="soft">and {{ '{:,}'.format(earlier) }} earlier slots</p>{% endif %}
{% else %}<p class="absent">Not shown: {{ facts.no_time_line }}.</p>
{% endif %}

<h2 id="data">Data</h2>
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
)
