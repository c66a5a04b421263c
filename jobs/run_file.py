"""A run as a commented YAML file."""

from __future__ import annotations

from typing import Any

import yaml

from lum_ray import config

SECTIONS = {
    "name": "A name for checkpoints, reports and predictions.",
    "root": "Where artifacts go: a folder, or s3://bucket/path.",
    "seed": None,
    "data": "The raw tables, their columns, and the daily behaviours that are features and targets at once.",
    "split": "A cut is the first predicted day. Training targets end before validate_from.",
    "lumos": "The model. Fields that are not here have the paper's value.",
    "train": "batch: windows in a global step, whatever the number of workers.",
    "tune": None,
    "serve": None,
}
FIELDS = {
    "data.source": "an adapter that writes raw tables; leave it out (null) and give events.path for tables of your own",
    "data.events": "path: parquet files, local or s3://; user, time: columns; id: a column whose repeats are refused",
    "data.profiles": "one row a user, nulls are fine; registered, ends, segment: columns or null",
    "data.calendar": "what is known ahead; holidays: a country code such as US, or null",
    "data.time_zone": "days begin at midnight here",
    "data.behaviours": "aggregate: sum count min max any mean n_unique; gate: the yes-or-no that a number needs",
    "data.derived": "targets over days: 'no X in the next N days', 'X after N days without'",
    "data.horizons": "heads of their own over the first days after the cut: any (binary) or sum (numbers)",
    "data.max_reject_share": "more broken rows than this stop the job; they are listed in rejects/",
    "data.engine": "auto, local or ray",
    "lumos.history_days": "the paper: 360",
    "lumos.cuts_per_window": "1 is the paper's; more supervise several cuts of one history in one pass (needs causal)",
    "lumos.continuous": "point (the paper) or lognormal: a distribution, hence intervals",
    "train.precision": "auto: BF16 where the device has it, else FP32",
    "train.zero_stage": "DeepSpeed's ZeRO, 0 to 3",
    "train.patience": "validations without a gain before stopping; 0: never",
    "train.keep_best": "which validation metric decides",
}


def commented(run: config.Run) -> str:
    """The run as YAML that `config.load` reads back to the same run, with what a first reader needs to know."""
    plain = config.dump(run)
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
