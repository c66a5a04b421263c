"""Sources that lum_ray can turn into raw tables: name of the adapter -> its module (see `write_source`)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pyarrow import fs

from lum_ray.artifacts import UserError

# Modules by name, imported on use: an adapter's packages are asked for only where it is used.
ADAPTERS = {
    "complete_journey": "lum_ray.data.adapters.complete_journey",
    "ml_100k": "lum_ray.data.adapters.ml_100k",
    "next_item": "lum_ray.data.adapters.next_item",
    "oulad": "lum_ray.data.adapters.oulad",
    "simulator": "lum_ray.data.adapters.simulator",
}
VERSIONS = {"complete_journey": 1, "ml_100k": 1, "next_item": 1, "oulad": 2, "simulator": 1}
"""What an adapter writes has changed where its number has: tables of another version are written anew."""


def write_source(
    adapter: str, dest: str, filesystem: fs.FileSystem, path: str | None, options: Mapping[str, Any]
) -> None:
    """Write events/, profiles/ and calendar/ (and items/, see the adapter) under `dest` with the adapter of that name.

    Raises UserError for an unknown adapter, and what the adapter's own `write` raises.
    """
    if adapter not in ADAPTERS:
        raise UserError(f"adapter '{adapter}': expected one of {sorted(ADAPTERS)}; or give the raw tables' own paths")
    importlib.import_module(ADAPTERS[adapter]).write(dest, filesystem, path, options)
