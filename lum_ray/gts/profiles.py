"""The user's own table, one row a user, as numbers for the one prefix token that it becomes.

Legend: B samples, N numbers, P width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lum_ray.data.rows import Int32, Int64, Rows
from lum_ray.data.windows import profile_at
from lum_ray.gts.config import GtsInputs

Floats = npt.NDArray[np.float32]


def profile_rows(inputs: GtsInputs, rows: Rows, row: Int64, cut: Int32) -> Floats:
    """(B, P): standardised numbers, whether each is missing, and each category one-hot; unknown values are zeros.
    As known at the cuts (B,)."""
    profile, parts = profile_at(rows, row, cut), []
    for index, name in enumerate(inputs.profile_numbers):
        value = np.asarray(profile[name], np.float64) if name in profile else np.full(len(row), np.nan)
        mean, std = inputs.arrays["profile_scale"][index]
        parts += [np.nan_to_num((value - mean) / std), np.isnan(value)]
    for name, known in zip(inputs.profile_categories, inputs.profile_values, strict=True):
        value = profile[name] if name in profile else np.full(len(row), None)
        parts += [value == one for one in known]
    if not parts:
        return np.zeros((len(row), 1), np.float32)
    return np.stack(parts, axis=1).astype(np.float32)
