"""A run as a commented YAML file."""

from __future__ import annotations

from typing import Any

import yaml

from lum_ray import config

SECTIONS = {
    "name": "A name for checkpoints, reports and predictions.",
    "root": "Where artifacts go: a folder, or s3://bucket/path.",
    "seed": None,
    "data": "The raw tables, their columns, and what is learned of them: daily behaviours (lumos) or items (gts).",
    "split": "A cut is the first predicted day. Training targets end before validate_from.",
    "lumos": "The model. Fields that are not here have the paper's value.",
    "gts": "The model. Fields that are not here have the paper's value, or that of HLLM where it gives none.",
    "train": "batch: windows in a global step, whatever the number of workers.",
    "tune": "space: quick, lumos_shape, gts_shape, gts_grid or a YAML file; metric: null for the model's own.",
    "serve": None,
}
FIELDS = {
    "data.source": "an adapter that writes raw tables; leave it out (null) and give events.path for tables of your own",
    "data.events": "path: parquet files or a Delta table (version or timestamp pins it), local or s3://; user, time: "
    "columns; id: a column whose repeats are refused; "
    "item: what the event is about (gts)",
    "data.items": "one row an item; text: columns that describe it in words; numbers, categories: its table",
    "data.graph": "edges between items: co_occurrence at one moment before the train cut, or a table at path, or both",
    "data.profiles": "one row a user, nulls are fine; registered, ends, segment, known_at: columns or null",
    "data.calendar": "what is known ahead; holidays: a country code such as US, or null",
    "data.time_zone": "days begin at midnight here",
    "serve.tokens": "bearer tokens, hashed: a file, or env:NAME; see `lum-ray token`; null: 127.0.0.1 only",
    "serve.allow_anonymous": "true: others may reach serve.host without a token",
    "serve.max_replicas": "more than replicas: as many as the load needs; null: always replicas",
    "data.behaviours": "aggregate: sum count min max any mean n_unique; gate: the yes-or-no that a number needs",
    "data.derived": "targets over days: 'no X in the next N days', 'X after N days without'",
    "data.horizons": "heads of their own over the first days after the cut: any (binary) or sum (numbers)",
    "data.max_reject_share": "more broken rows than this stop the job; they are listed in rejects/",
    "data.late_days": "events in new files may be so many days before the end of what was known, others are rejected",
    "data.engine": "auto, local or ray",
    "lumos.history_days": "the paper: 360",
    "lumos.cuts_per_window": "1 is the paper's; more supervise several cuts of one history in one pass (needs causal)",
    "lumos.continuous": "point (the paper) or lognormal: a distribution, hence intervals",
    "gts.text_encoder": "a Hugging Face id, a folder, or minilm (from its package, offline)",
    "gts.branching": "children of a node of the ID tree, and how many levels it has (depth)",
    "gts.slot_minutes": "behaviours of one slot share a descriptor and a time ID; another size needs no new sequences",
    "gts.max_tokens": "of a sequence, the prefix included; the newest behaviours are kept",
    "gts.llm": "a Hugging Face id, a folder, smollm2 (converted at install), or random",
    "gts.keep_layers": "the LLM's first layers; null: all",
    "gts.tune": "frozen, lora or full",
    "gts.reading": "literal LEAKS: it puts the true target into the prefix, an ablation only",
    "gts.propensity_share": "of samples that have a candidate in front; the others retrieve",
    "gts.align_steps": "of Phase I; 0 leaves it out",
    "gts.rerank": "how many of the retrieved items are scored again with themselves in front",
    "train.precision": "auto: BF16 where the device has it, else FP32",
    "train.device": "auto: GPUs where the machine or the cluster has them",
    "train.zero_stage": "DeepSpeed's ZeRO, 0 to 3",
    "train.patience": "validations without a gain before stopping; 0: never",
    "train.keep_best": "which validation metric decides",
}


def commented(run: config.Run) -> str:
    """The run as YAML that `config.load` reads back to the same run, with what a first reader needs to know."""
    plain = config.dump(run)
    other = ("behaviours", "derived", "horizons") if run.model == "gts" else ("items", "graph")
    plain["data"] = {name: value for name, value in plain["data"].items() if name not in other or value}
    lines = [f"# A run of {run.model}. Check it with `lum-ray validate`, start it with `lum-ray train`."]
    for key in ("name", "root", "seed", "data", "split", run.model, "train", "tune", "serve"):
        comment = SECTIONS.get(key)
        lines += ["", f"# {comment}"] if comment else [""]
        lines += _section(key, plain[key])
    return "\n".join(lines) + "\n"


def _section(key: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return _yaml({key: value})
    lines = [f"{key}:"]
    for name, item in value.items():
        comment = FIELDS.get(f"{key}.{name}")
        lines += [f"  # {comment}"] if comment else []
        if name in ("behaviours", "derived", "horizons") and item:
            lines.append(f"  {name}:")
            lines += [f"    - {_flow({k: v for k, v in row.items() if v is not None})}" for row in item]
        else:
            lines += [f"  {line}" for line in _yaml({name: item})]
    return lines


def _yaml(value: Any) -> list[str]:
    return yaml.safe_dump(value, sort_keys=False, width=110, allow_unicode=True).rstrip().splitlines()


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=1000, allow_unicode=True).strip()
