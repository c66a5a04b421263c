"""What the commands print: what they say and the tables of metrics, on stderr; the URI of what was made, on stdout."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from lum_ray import config
from lum_ray.artifacts import UserError

console = Console(stderr=True)
if not console.is_terminal:
    console.width = max(console.width, 140)  # a log file has room for the table of metrics

HEADLINE = {"binary": "eval/roc_auc", "continuous": "eval/wmape", "count": "eval/wmape"}


def plain(text: str) -> str:
    """The text as it is, without rich's markup."""
    return text.replace("[", "\\[")


def say(text: str) -> None:
    """What the steps report, on stderr."""
    console.print(f"[dim]·[/] {plain(text)}", highlight=False, soft_wrap=True)


def done(uri: str) -> None:
    """The last line on stdout."""
    print(uri, flush=True)


def print_metrics(run: config.Run, table: Any) -> None:
    """The headline metric of every task, a column a model, on stderr."""
    from lum_ray.steps.train import tasks_of

    found = {(row["task"], row["metric"], row["model"]): row for row in table.to_pylist()}
    models = sorted({model for _, _, model in found}, key=lambda name: (name != run.name, name))
    shown = Table("task", "metric", *models, box=None, header_style="bold")
    tasks = tasks_of(run)
    shown_tasks = {task for task, _, _ in found}
    for task in sorted(shown_tasks, key=lambda name: (HEADLINE[tasks[name].kind], not tasks[name].horizon, name)):
        metric = HEADLINE[tasks[task].kind]
        rows = [found.get((task, metric, model)) for model in models]
        values = [row["value"] for row in rows if row]
        best = (max if metric == "eval/roc_auc" else min)(values) if values else None
        cells = [
            "-" if row is None else f"[{'bold' if row['value'] == best else 'default'}]{row['value']:.4f}[/]"
            + (f" [dim]{row['low']:.3f}–{row['high']:.3f}[/]" if model == run.name else "")
            for row, model in zip(rows, models, strict=True)
        ]  # fmt: skip
        shown.add_row(task, metric.removeprefix("eval/"), *cells)
    console.print(shown)


RANKINGS = ("recall_5", "recall_10", "recall_50", "recall_200", "ndcg_5", "ndcg_10", "mrr")


def print_rankings(run: config.Run, table: Any) -> None:
    """The headline metrics of every model and reading over all test baskets, on stderr; best first by MRR."""
    rows = table.to_pylist()
    found = {(row["model"], row["reading"], row["subset"], row["metric"].removeprefix("eval/")): row for row in rows}
    who = sorted({key[:2] for key in found}, key=lambda key: -found[(*key, "all", "mrr")]["value"])
    extra = [("repeat", "recall_10"), ("explore", "recall_10")]
    shown = Table(
        "model", *RANKINGS, *(f"{subset} {metric}" for subset, metric in extra), box=None, header_style="bold"
    )
    for key in who:
        cells = []
        for subset, metric in [*(("all", metric) for metric in RANKINGS), *extra]:
            row = found.get((*key, subset, metric))
            interval = f" [dim]{row['low']:.3f}–{row['high']:.3f}[/]" if row and metric == "recall_10" else ""
            cells.append("-" if row is None else f"{row['value']:.4f}{interval}")
        name = f"{key[0]}: {key[1]}" if key[1] != "baseline" else key[0]
        shown.add_row(f"[bold]{name}[/]" if key[0] == run.name else name, *cells)
    console.print(shown)
    ceiling = next(
        (row["value"] for row in rows if row["metric"] == "eval/recall_ceiling_5" and row["subset"] == "all"), None
    )
    if ceiling is not None:
        say(f"ceiling of recall_5: {ceiling:.4f} (baskets have more than five items)")


def print_audit(checks: Any) -> None:
    """The leak battery, a row a check, on stderr."""
    colour = {"ok": "green", "LEAKY": "bold red", "not applicable": "dim"}
    shown = Table("check", "what was compared", "figure", "bar", "verdict", box=None, header_style="bold")
    for check in checks:
        cells = map(plain, (check.name, check.compared, check.figure, check.bar))
        shown.add_row(*cells, f"[{colour[check.verdict]}]{check.verdict}[/]")
    console.print(shown)


def print_cohorts(table: Any) -> None:
    """Treatment minus control of each task, on stderr."""
    shown = Table("task", "estimate", "difference", "95 %", "treated", "control", box=None, header_style="bold")
    for row in table.to_pylist():
        name = row["estimate"].removeprefix("eval/cohort_")
        shown.add_row(row["task"], name, f"{row['value']:+.4f}", f"{row['low']:+.4f} to {row['high']:+.4f}",
                      str(row["n_treatment"]), str(row["n_control"]))  # fmt: skip
    console.print(shown)


def print_forgotten(found: Any) -> None:
    """What `forget` did and its proof, on stderr. Raises UserError where a file still holds a user."""
    say(f"{found.rows:,} rows; {found.rewritten:,} files rewritten, {found.removed:,} removed")
    for checkpoint in found.checkpoints:
        say(f"{checkpoint} was trained with them; `lum-ray train RUN --fresh` or the next training leaves them out")
    if found.source_rows:
        say(f"your own tables hold {found.source_rows:,} rows of theirs: lum_ray reads none of them, deleting is yours")
    for uri, trace in list(found.namesakes.items())[:5]:
        say(f"not theirs, but an equal ID: {uri}, {', '.join(trace.namesakes[:5])}")
    if found.left:
        lines = [f"  {uri}: {', '.join(trace.mentions) or f'{trace.rows} rows'}" for uri, trace in found.left.items()]
        raise UserError("\n".join([f"forget: {len(lines)} of {found.scanned} files still hold them:", *lines[:5]]))
    say(f"proof: {found.scanned:,} files read again, none holds them; running servers know them until they start anew")
