"""What the scores start from before a sequence is read: how popular an item is, and how the user had it before.

A cosine at a learned temperature would have to learn the items' popularity, many orders of magnitude, and attention
over a few slots cannot count a year. So the log share of an item among all events joins every score, and for items that
the user had, the log share of her moments with it takes over. Both coefficients are learned, from values at which the
scores are those of "most frequent, then popular"; the network learns what to add.

Departs: GTS-LUM scores by the cosine alone. Legend: S pairs of user and item, F features.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lum_ray.gts.collate import RECENT
from lum_ray.nn import MLP

Int64 = npt.NDArray[np.int64]
FEATURES = 4 + len(RECENT)
START = (0.0, -0.1, 1.0, -1.0, *(0.0 for _ in RECENT))
"""Coefficients of the features at the start; see `repeat_features`."""
ITEMS_A_MOMENT = -2.0
"""Where the sum starts: a share of moments is larger than one of events."""
PACE = 10.0
"""By how much faster than the network its coefficients learn: they are few, and of size 1."""


class Prior(nn.Module):
    """`popular(log_q)` for every item, `repeated(features)` on top for those that the user had."""

    def __init__(self, repeats: bool) -> None:
        super().__init__()
        self.popularity = nn.Parameter(torch.ones(1) / PACE)
        self.linear = nn.Linear(FEATURES, 1) if repeats else None
        self.curve = MLP(FEATURES, 16, 1, 1) if repeats else None
        if self.linear is not None and self.curve is not None and self.curve.out is not None:
            with torch.no_grad():
                self.linear.weight.copy_(torch.tensor([START]) / PACE)
                self.linear.bias.fill_(ITEMS_A_MOMENT / PACE)
                self.curve.out.weight.zero_()
                self.curve.out.bias.zero_()

    def popular(self, log_q: Tensor) -> Tensor:
        """The score of items (...) by the log of their share of the training events."""
        return PACE * self.popularity * log_q

    def repeated(self, seen_SF: Tensor) -> Tensor:
        """What having had an item adds (S,) float32."""
        assert self.linear is not None and self.curve is not None
        added: Tensor = self.linear(seen_SF) + self.curve(seen_SF)
        return PACE * added.float()[..., 0]


def negative_chance(share_N: npt.NDArray[np.float64], negatives: int) -> npt.NDArray[np.float64]:
    """The chance (N,) of an item with this share of the events to be among a step's `negatives` draws."""
    return 1 - np.maximum(1 - share_N, 0.0) ** negatives


def repeat_features(
    count: Int64, since: Int64, instants: Int64, recent: Int64, log_q: npt.NDArray[np.floating]
) -> npt.NDArray[np.float32]:
    """(S, F): log of 1 + how many moments with the item, log of how many moments ago the last was, log of their share
    of all moments, log of the item's share of all events; logs of 1 + how many of the latest moments had it
    (`recent` (S, W), see `collate.RECENT`)."""
    share_of = np.log(count / np.maximum(instants, 1))
    whole = np.stack([np.log1p(count), np.log(np.maximum(since, 1)), share_of, log_q], axis=1)
    return np.concatenate([whole, np.log1p(recent)], axis=1).astype(np.float32)
