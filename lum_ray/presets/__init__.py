"""Named runs as functions. `lum-ray init NAME` writes one as a commented run file."""

from __future__ import annotations

from collections.abc import Callable

from lum_ray.config import Run
from lum_ray.presets.gts import gts_demo, gts_ml_100k, gts_paper, gts_simulator, gts_tiny
from lum_ray.presets.lumos import (
    lumos_complete_journey,
    lumos_demo,
    lumos_oulad,
    lumos_paper,
    lumos_simulator,
    lumos_tiny,
    lumos_wide,
)

PRESETS: dict[str, Callable[[], Run]] = {
    function.__name__: function
    for function in (
        lumos_demo,
        lumos_complete_journey,
        lumos_oulad,
        lumos_simulator,
        lumos_tiny,
        lumos_paper,
        lumos_wide,
        gts_demo,
        gts_ml_100k,
        gts_simulator,
        gts_tiny,
        gts_paper,
    )
}
