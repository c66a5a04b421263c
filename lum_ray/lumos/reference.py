"""What training saw of the future, kept beside the weights: the yardstick of how far a what-if scenario lies from it.

Shapes: n training cuts, F future days, E distinct event rows, S event width without the rhythm of weekday and season.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from lum_ray.stage import Arrays

MAX_ROWS = 2048


def reference_rows(
    batches: Iterable[Arrays], rhythm_width: int, future_days: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Distinct event rows of training cuts (E, S), the most frequent first, and for each cut (n,) the largest distance,
    over its days, from an event row to the nearest row that another day holds (0 where it comes more than once).
    """
    cuts = []
    for batch in batches:
        days = batch["future_event_BCX"][batch["valid_BC"]][:, :future_days]
        cuts.append(batch["event_rows_ES"][days][:, :, rhythm_width:])
    days_nFS = np.concatenate(cuts).astype(np.float32)
    if days_nFS.shape[2] == 0:  # no calendar: no scenario is far
        return {"event_rows_ES": np.zeros((1, 0), np.float32), "distances": np.zeros(len(days_nFS), np.float32)}
    flat = days_nFS.reshape(-1, days_nFS.shape[2])
    rows_ES, inverse, counts = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    nearest = np.zeros(len(rows_ES), np.float32)
    for index in np.flatnonzero(counts == 1):
        others = np.delete(rows_ES, index, axis=0)
        gaps = ((others - rows_ES[index]) ** 2).sum(axis=1)
        nearest[index] = float(np.sqrt(gaps.min())) if len(gaps) else 0.0
    distances = nearest[inverse.ravel()].reshape(days_nFS.shape[:2]).max(axis=1)
    kept = np.argsort(-counts, kind="stable")[:MAX_ROWS]
    return {"event_rows_ES": np.ascontiguousarray(rows_ES[kept]), "distances": distances.astype(np.float32)}
