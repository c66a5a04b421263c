"""Daily tokens: activity, static attributes and calendar of each day of a window, brought to the model's width.

Legend: B windows, T history days, A active days of the batch, U behaviours, E distinct event rows, S event_width,
N numbers, G categories, D width; the arrays of a batch are described in `lumos.model`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lum_ray.lumos.config import Inputs, LumosConfig
from lum_ray.nn import MLP, Constants

Batch = Mapping[str, Tensor]
CATEGORY_WIDTH = 16


class Measured(nn.Module):
    """From stored numbers to the model's scale, by constants of the state dict that stay float32."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        values = {
            "resolution_U": torch.tensor([b.resolution for b in inputs.behaviours], dtype=torch.float32),
            "scale_U": torch.tensor([b.scale for b in inputs.behaviours], dtype=torch.float32),
            "log_U": torch.tensor([b.transform == "log1p" for b in inputs.behaviours]),
            "mean_N": torch.tensor([n.mean for n in inputs.numbers], dtype=torch.float32),
            "std_N": torch.tensor([n.std for n in inputs.numbers], dtype=torch.float32),
        }
        self.constants = Constants(values, persistent=True)

    def activity(self, values_AU: Tensor) -> Tensor:
        """transform(value * resolution) / scale as float32; 0 stays 0, negative values mirror positive ones."""
        raw = values_AU.float() * self.constants["resolution_U"]
        return torch.where(self.constants["log_U"], raw.sign() * raw.abs().log1p(), raw) / self.constants["scale_U"]

    def numbers(self, numbers_BN: Tensor) -> Tensor:
        """(B, 2 N): standardised numbers with 0 for missing ones, then whether each is missing."""
        missing, mean_N = numbers_BN.isnan(), self.constants["mean_N"]
        known = torch.where(missing, mean_N, numbers_BN)
        return torch.cat([(known - mean_N) / self.constants["std_N"], missing.float()], dim=-1)


class Tokenizer(nn.Module):
    """One token a day from activity, static attributes and events. Source: LUMOS, section 3.3, eq. 1."""

    def __init__(self, config: LumosConfig, inputs: Inputs) -> None:
        super().__init__()
        embed, width, behaviours = config.embedding, config.width, len(inputs.behaviours)
        self.measured = Measured(inputs)
        sizes = [len(category.values) + 1 for category in inputs.categories]
        static_width = 2 * len(inputs.numbers) + CATEGORY_WIDTH * len(sizes)
        self.user = MLP(behaviours, embed, config.embed_layers)
        self.event = MLP(inputs.event_width, embed, config.embed_layers)
        self.static = MLP(static_width, embed, config.embed_layers) if config.static and static_width else None
        self.categories = nn.ModuleList(nn.Embedding(size, CATEGORY_WIDTH) for size in sizes if self.static)
        self.u_pad = nn.Parameter(torch.randn(behaviours)) if config.pad in ("learned", "unread") else None
        self.project_in = nn.Linear(embed * (3 if self.static else 2), width)
        self.project_out = nn.Linear(width, width)

    def _static(self, batch: Batch) -> Tensor:
        """The embedded static attributes (B, embed)."""
        codes = batch["categories_BG"].unbind(-1)
        vectors = [table(code) for table, code in zip(self.categories, codes, strict=True)]
        x_BW = torch.cat([self.measured.numbers(batch["numbers_BN"]), *vectors], dim=-1)
        assert self.static is not None
        embedded: Tensor = self.static(x_BW.to(self.project_in.weight.dtype))
        return embedded

    def activity(self, batch: Batch, pad_BT: Tensor) -> Tensor:
        """The scaled behaviours of every day (B, T, U), 0 on idle days and on pads."""
        x_AU = self.measured.activity(batch["values_AU"])
        dense = x_AU.new_zeros(pad_BT.numel(), x_AU.shape[1]).index_put((batch["slot_A"],), x_AU)
        return dense.view(*pad_BT.shape, -1).masked_fill(pad_BT[..., None], 0.0)

    def forward(self, batch: Batch, rows_ES: Tensor, pad_BT: Tensor, plain: bool = False) -> Tensor:
        """Tokens (B, T, D). `plain` builds every day's three vectors and concatenates them; the other form splits the
        projection's first layer by modality, so that events run on distinct rows, static attributes once a window and
        activity on active days, one zero day and one pad.
        """
        index_BT, slot_A = batch["history_event_BT"], batch["slot_A"]
        dtype = self.project_in.weight.dtype
        x_AU = self.measured.activity(batch["values_AU"]).to(dtype)
        zero_U = x_AU.new_zeros(x_AU.shape[1])
        pad_U = self.u_pad if self.u_pad is not None else zero_U
        history = index_BT.shape[1]
        if plain:
            dense = x_AU.new_zeros(index_BT.numel(), x_AU.shape[1]).index_put((slot_A,), x_AU)
            dense = dense.view(*index_BT.shape, x_AU.shape[1])
            parts = [self.user(torch.where(pad_BT[..., None], pad_U, dense))]
            if self.static is not None:
                parts.append(self._static(batch)[:, None].expand(-1, history, -1))
            parts.append(self.event(rows_ES[index_BT]))
            return self.project_out(F.relu(self.project_in(torch.cat(parts, dim=-1))))  # type: ignore[no-any-return]

        by_modality = self.project_in.weight.chunk(3 if self.static else 2, dim=1)
        users = F.linear(self.user(torch.cat([x_AU, zero_U[None], pad_U[None]])), by_modality[0])
        active_AD, zero_D, extra_pad_D = users[:-2], users[-2], users[-1] - users[-2]
        hidden = F.embedding(index_BT, F.linear(self.event(rows_ES), by_modality[-1]))
        window_D = zero_D + self.project_in.bias
        if self.static is not None:
            window_D = F.linear(self._static(batch), by_modality[1])[:, None] + window_D
        # in place: nothing below needs the values before it for its gradient
        flat = hidden.add_(window_D.to(hidden.dtype)).flatten(0, 1)
        pad_X = pad_BT.flatten().to(hidden.dtype)
        flat.addmm_(pad_X[:, None], extra_pad_D[None].to(hidden.dtype))
        # a day before the user existed stays a pad even if the data has activity there
        observed_A = 1 - pad_X[slot_A]
        flat.index_add_(0, slot_A, ((active_AD - zero_D) * observed_A[:, None]).to(hidden.dtype))
        return self.project_out(hidden.relu_())  # type: ignore[no-any-return]
