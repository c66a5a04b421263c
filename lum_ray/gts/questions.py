"""Questions about a user (will she be gone for 28 days?) put to a trained model, whose weights stay as they are.

A question is a target that is no item: its text becomes a vector as a new item's does, and stands in front of the
history or behind it, as a candidate of reading P would; a scalar head reads the answer off the last state. Without a
place for it (`none`) each question has a head of its own on the state of reading R. Only the vectors and the head are
trained. Source: GTS-LUM, target in front; Departs: the LLM and the tokens are those of the trained recommender.

Legend: B samples, P pairs of a sample and a question, Q questions, D width of the LLM.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from lum_ray.gts.model import Gts
from lum_ray.nn import MLP
from lum_ray.stage import Batch

Position = Literal["front", "end", "none"]


class Questions(nn.Module):
    """`started_QD`: the questions' vectors as items of the catalogue have them; `rate_Q`: how often each is answered
    with yes, which is where the head starts from. `module` is frozen by this, and no part of its state."""

    def __init__(self, module: Gts, started_QD: Tensor, rate_Q: Tensor, position: Position) -> None:
        super().__init__()
        self.position = position
        # a twin that shares every weight: only where it puts a target is another
        twin = copy.copy(module).eval().requires_grad_(False)
        twin.config = replace(module.config, target_position="front" if position == "none" else position)
        self._reads = (twin,)  # in a tuple, so that it is no part of this module
        self.vectors_QD = nn.Parameter(started_QD.detach().clone(), requires_grad=position != "none")
        self.odds_Q = nn.Parameter(torch.logit(rate_Q.float(), eps=1e-4))
        self.state_width = 2 * module.width
        heads = len(rate_Q) if position == "none" else 1
        self.head = MLP(self.state_width, module.config.output_width, 1, heads)
        assert self.head.out is not None
        nn.init.zeros_(self.head.out.weight)
        nn.init.zeros_(self.head.out.bias)

    def states(self, batch: Batch, sample_P: Tensor, question_P: Tensor) -> Tensor:
        """The last states (P, 2 D) of the samples' histories with these questions."""
        (module,) = self._reads
        with torch.no_grad():
            x_BLD = module.tokens(batch, module.catalogue()[0][batch["unique_U"]])
        target_PD = None if self.position == "none" else self.vectors_QD[question_P]
        found = module.read(batch, x_BLD, sample_P, int(target_PD is not None), target_PD)
        return module.last(batch, sample_P, found, target_PD is not None)

    def logits(self, state_PD: Tensor, question_P: Tensor) -> Tensor:
        """The logit (P,) of yes, from `states`."""
        found = self.head(state_PD).float()
        column_P = question_P if self.position == "none" else torch.zeros_like(question_P)
        own: Tensor = found.gather(1, column_P[:, None])[:, 0]
        return own + self.odds_Q[question_P]
