"""Run files: one YAML file describes a run; it is read strictly into frozen dataclasses.

The dataclasses are plain and pydantic and YAML are imported where they are used, so that a model can import this file
on a machine that has neither. A model's own section (`lumos:`, `gts:`) is a
dataclass of that model's folder; whoever reads a run hands in the table of sections (see `catalog`).
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lum_ray.artifacts import UserError, read_bytes
from lum_ray.run import Run, Serve, Split, Subset, Train, Tune
from lum_ray.run_data import (
    Behaviour,
    Calendar,
    Data,
    Day,
    Derived,
    Events,
    Graph,
    Horizon,
    Items,
    Kind,
    Profiles,
    Source,
)

__all__ = [
    "Behaviour",
    "Calendar",
    "Data",
    "Day",
    "Derived",
    "Events",
    "Graph",
    "Horizon",
    "Items",
    "Kind",
    "Profiles",
    "Run",
    "Serve",
    "Source",
    "Split",
    "Subset",
    "Train",
    "Tune",
    "day_number",
    "dump",
    "load",
    "override",
    "read",
    "read_run",
]


T = TypeVar("T")

_PLAIN_FIELDS: dict[str, type[Any]] = {
    "data": Data,
    "split": Split,
    "train": Train,
    "tune": Tune,
    "serve": Serve,
    "name": str,
    "root": str,
    "seed": int,
}


def read(kind: type[T], raw: Any, path: str) -> T:
    """`raw` (plain YAML values) as a dataclass of type `kind`.

    Raises UserError that names the dotted path of every offender (at most five), what was expected and what came.
    """
    import pydantic

    try:
        text = json.dumps(raw, default=_iso)
        return pydantic.TypeAdapter(kind).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        lines = [_explain(kind, item, path) for item in error.errors()[:5]]
        more = f"\n... and {error.error_count() - 5} more" if error.error_count() > 5 else ""
        raise UserError("\n".join(lines) + more) from None


def _iso(value: Any) -> str:
    if isinstance(value, datetime.date):
        return value.isoformat()
    raise UserError(f"a run file holds numbers, strings, lists and mappings, got {value!r}")


def _explain(kind: type, item: Mapping[str, Any], path: str) -> str:
    parts = (str(part) for part in item["loc"])
    # of a value with several types, each type's complaint names that type
    own = [part for part in parts if part not in ("int", "str", "bool", "constrained-str") and part[:8] != "literal["]
    place = ".".join([path, *own]).strip(".")
    if item["type"] == "unexpected_keyword_argument":
        owner: Any = kind
        for part in item["loc"][:-1]:
            owner = _field_type(owner, part)
        known = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else f"; known keys: {', '.join(known)}" if known else ""
        return f"{place}: unknown key{hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{place}: {message}"
    return f"{place}: {message[0].lower()}{message[1:]}, got {item['input']!r}"


def _field_type(owner: Any, part: Any) -> Any:
    import typing

    if isinstance(part, int):
        return next(iter(typing.get_args(owner)), None)
    if not dataclasses.is_dataclass(owner):
        return None
    hint = typing.get_type_hints(owner).get(str(part))
    options = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return options[0] if len(options) == 1 else hint


def override(raw: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`raw` with every `a.b=v` of `assignments` set (v is YAML; a number in the path is a list's index)."""
    result: dict[str, Any] = json.loads(json.dumps(raw, default=_iso))
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        if not separator or not dotted:
            raise UserError(f"--set {assignment}: expected a.b=value, such as train.steps=200")
        *parents, last = dotted.split(".")
        place: Any = result
        for part in parents:
            if isinstance(place, list):
                place = place[_index(place, part, dotted)]
                continue
            if not isinstance(place.get(part), (dict, list)):
                place[part] = {}
            place = place[part]
        value = _parse(text, f"--set {dotted}")
        if isinstance(place, list):
            place[_index(place, last, dotted)] = value
        else:
            place[last] = value
    return result


def _parse(text: str, where: str) -> Any:
    """The values of YAML; dates stay text, so that a wrong one is refused with its path. Raises UserError."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    # on the class of its own, so that other users of yaml keep their dates
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _index(place: list[Any], part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"--set {dotted}: expected a list index from 0 to {len(place) - 1}, got {part!r}")
    return int(part)


def read_run(raw: Any, sections: Mapping[str, type]) -> Run:
    """A run from the plain values of its file; `sections` maps a model's name to the dataclass of its section.

    Raises UserError naming the dotted path of what is wrong.
    """
    if not isinstance(raw, dict):
        raise UserError(f"a run file is a mapping with the keys name, data, split, ..., got {type(raw).__name__}")
    allowed = [*_PLAIN_FIELDS, *sections]
    for key in raw:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            raise UserError(
                f"{key}: unknown key" + (f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(allowed)}")
            )
    models = [name for name in sections if name in raw]
    if len(models) != 1:
        raise UserError(
            f"expected exactly one model section of {', '.join(sections)}, got {', '.join(models) or 'none'}"
        )
    for key in ("name", "data", "split"):
        if key not in raw:
            raise UserError(f"{key}: missing; `lum-ray init lumos_demo` writes a complete run file to start from")
    if not isinstance(raw["name"], str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", raw["name"]):
        raise UserError(f"name: expected letters, digits, '_', '.' or '-', got {raw['name']!r}")
    parts: dict[str, Any] = {key: read(kind, raw[key], key) for key, kind in _PLAIN_FIELDS.items() if key in raw}
    section: Any = read(sections[models[0]], raw[models[0]] or {}, models[0])
    try:
        return Run(model=models[0], section=section, **parts)
    except ValueError as error:
        raise UserError(str(error)) from None


def load(path: str, assignments: Sequence[str], sections: Mapping[str, type]) -> Run:
    """The run of a YAML file (a path or URI) with overrides. Raises UserError for a missing file, bad YAML, or a bad
    value."""
    try:
        raw = _parse(read_bytes(path).decode(), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such run file; write one with `lum-ray init lumos_demo > {path}`") from None
    return read_run(override(raw, assignments) if isinstance(raw, dict) else raw, sections)


def dump(run: Run) -> dict[str, Any]:
    """The plain values of a run, as its file would hold them: `read_run(dump(run))` equals `run`."""
    values = dataclasses.asdict(run)
    values[values.pop("model")] = values.pop("section")
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def day_number(day: Day) -> int:
    """A day as days since 1970-01-01 (ISO dates) or as it is (day numbers). Raises UserError for anything else."""
    if isinstance(day, int):
        return day
    try:
        return (datetime.date.fromisoformat(day) - datetime.date(1970, 1, 1)).days
    except ValueError:
        raise UserError(f"expected a day number or an ISO date such as 2017-09-20, got {day!r}") from None
