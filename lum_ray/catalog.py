"""The only table from a model's name to its parts."""

from __future__ import annotations

from collections.abc import Sequence

from lum_ray import config
from lum_ray.gts.config import GtsConfig
from lum_ray.lumos.config import LumosConfig

SECTIONS: dict[str, type] = {"lumos": LumosConfig, "gts": GtsConfig}


def load_run(path: str, assignments: Sequence[str] = ()) -> config.Run:
    """The run of a YAML file, with `--set` overrides applied. Raises UserError naming what is wrong."""
    return config.load(path, assignments, SECTIONS)


def read_run(raw: object) -> config.Run:
    """The run of plain values, as `config.dump` wrote them (run.json of an artifact)."""
    return config.read_run(raw, SECTIONS)
