"""From the columns of a table to one vector a row, learned from the table itself.

The paper takes TableGPT2's encoder, which was not released. What is known of it is kept: a cell is a token, cells
attend along their column and along their row, no order of rows or columns matters, and training is column-contrastive.
So that a row's vector does not depend on which rows it comes with, its cells attend along the column to a fixed sample
of the fitted rows (`Departs:`), not to one another.

A number is written in its column's quantiles (piecewise linear: full below, partly in the bin where it lies), so that
neither unit nor tails matter; a category is one of the column's values, or of those unknown; a null is a value of its
own. Shapes: N rows, R reference rows, C columns, B rows of a batch, D width of a cell, H width of a row, K bins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lum_ray.artifacts import UserError
from lum_ray.nn import CrossAttention, EncoderLayer, SwiGLU

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Numbers = Mapping[str, npt.NDArray[np.floating[Any]]]
Categories = Mapping[str, npt.NDArray[np.object_]]

BINS = 16
MISSING, OTHER = 0, 1
"""Codes of a null and of a value that the fitted rows did not have; the known values follow."""
MAX_VALUES = 4096
"""Values of a category that are told apart, the most frequent; the others share one code."""
LAYERS, HEADS, REFERENCES, BATCH, CHUNK = 2, 4, 64, 256, 4096
KEEP_SHARE, HIDE_SHARE = 0.6, 0.05
"""Of the columns in each of the two views of a row; of the category values that are taken for unknown in training."""
TEMPERATURE, LEARNING_RATE = 0.1, 2e-3


@dataclass(frozen=True)
class Layout:
    """The columns in order, numbers first: each number's quantiles, each category's known values."""

    numbers: tuple[str, ...]
    quantiles: tuple[tuple[float, ...], ...]
    categories: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    @property
    def columns(self) -> int:
        return len(self.numbers) + len(self.categories)

    @staticmethod
    def of(numbers: Numbers, categories: Categories) -> Layout:
        return Layout(
            tuple(numbers),
            tuple(_quantiles(np.asarray(column, np.float64)) for column in numbers.values()),
            tuple(categories),
            tuple(_known_values(column) for column in categories.values()),
        )

    def codes(self, numbers: Numbers, categories: Categories) -> tuple[npt.NDArray[np.float64], Int64]:
        """(numbers (N, numbers) float64, NaN where null; categories (N, categories) int64 codes)."""
        lacking = [name for name in self.numbers if name not in numbers]
        lacking += [name for name in self.categories if name not in categories]
        if lacking:
            raise UserError(f"table: expected the columns it was fitted on, {', '.join(lacking[:5])} is missing")
        columns = [np.asarray(numbers[name], np.float64) for name in self.numbers]
        coded = [
            _codes(np.asarray(categories[name], object), values)
            for name, values in zip(self.categories, self.values, strict=True)
        ]
        lengths = {len(column) for column in (*columns, *coded)}
        if len(lengths) > 1:
            raise UserError(f"table: expected columns of one length, got lengths {sorted(lengths)[:5]}")
        count = lengths.pop() if lengths else 0
        return (
            np.stack(columns, axis=1) if columns else np.zeros((count, 0)),
            np.stack(coded, axis=1) if coded else np.zeros((count, 0), np.int64),
        )


def _quantiles(column: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Distinct bin edges; none where the column does not vary."""
    finite = column[np.isfinite(column)]
    if len(finite) == 0:
        return ()
    edges = np.unique(np.quantile(finite, np.linspace(0, 1, BINS + 1)))
    return tuple(edges.tolist()) if len(edges) > 1 else ()


def _known_values(column: npt.NDArray[np.object_]) -> tuple[str, ...]:
    found = [str(value) for value in column if not _is_null(value)]
    values, counts = np.unique(np.array(found, object), return_counts=True)
    return tuple(sorted(values[np.argsort(-counts, kind="stable")[:MAX_VALUES]].tolist()))


def _codes(column: npt.NDArray[np.object_], values: tuple[str, ...]) -> Int64:
    place = {value: code for code, value in enumerate(values, start=2)}
    return np.array([MISSING if _is_null(value) else place.get(str(value), OTHER) for value in column], np.int64)


def _is_null(value: Any) -> bool:
    return value is None or value != value  # NaN is the one value that differs from itself


class TableLayer(nn.Module):
    """Attention along the column to the reference rows, attention along the row, SwiGLU; each pre-norm and added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.column_norm, self.swiglu_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.column = CrossAttention(width, HEADS)
        self.column_swiglu = SwiGLU(width, 2 * width)
        self.row = EncoderLayer(width, HEADS, 2 * width)

    def forward(self, cells_BCD: Tensor, reference_RCD: Tensor, bias_B11C: Tensor | None) -> Tensor:
        queries, memory = (self.column_norm(cells).transpose(0, 1) for cells in (cells_BCD, reference_RCD))
        mixed_CBD = self.column(queries, self.column.keys_values(memory))
        cells_BCD = cells_BCD + mixed_CBD.transpose(0, 1)
        cells_BCD = cells_BCD + self.column_swiglu(self.swiglu_norm(cells_BCD))
        return self.row(cells_BCD, bias_B11C, False, None)  # type: ignore[no-any-return]


class TableEncoder(nn.Module):
    """Rows as cells (B, C, ...) to vectors (B, H). A cell is the embedding of its column plus that of its value."""

    def __init__(self, layout: Layout, width: int) -> None:
        super().__init__()
        self.layout, cell = layout, -(-max(width, 8) // HEADS) * HEADS
        edges = np.full((len(layout.numbers), BINS + 1), np.inf)
        for row, quantiles in zip(edges, layout.quantiles, strict=True):
            row[: len(quantiles)] = quantiles
        self.register_buffer("edges", torch.from_numpy(edges), persistent=False)
        sizes = [2 + len(values) for values in layout.values]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.register_buffer("starts", torch.from_numpy(starts[:-1]), persistent=False)
        self.column = nn.Parameter(torch.randn(layout.columns, cell) / cell**0.5)
        self.bins = nn.Parameter(torch.randn(len(layout.numbers), BINS, cell) / cell**0.5)
        self.null = nn.Parameter(torch.randn(len(layout.numbers), cell) / cell**0.5)
        self.values = nn.Embedding(max(1, int(starts[-1])), cell)
        nn.init.normal_(self.values.weight, std=cell**-0.5)
        self.layers = nn.ModuleList(TableLayer(cell) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(cell)
        self.out = nn.Linear(cell, width)

    def cells(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """Cells (B, C, D) of numbers (B, .) float64 with NaN where null, and codes (B, .)."""
        edges, starts = self.get_buffer("edges"), self.get_buffer("starts")
        low, high = edges[:, :-1], edges[:, 1:]
        used = torch.isfinite(high)
        span = torch.where(used, high - low, 1.0)
        part = ((numbers.nan_to_num(0.0)[..., None] - torch.where(used, low, 0.0)) / span).clamp(0, 1)
        written = torch.einsum("bck,ckd->bcd", torch.where(used, part, 0.0).to(self.bins.dtype), self.bins)
        written = torch.where(torch.isnan(numbers)[..., None], self.null, written)
        return torch.cat([written, self.values(codes + starts)], dim=1) + self.column

    def forward(self, cells_BCD: Tensor, reference_RCD: Tensor, seen_BC: Tensor | None = None) -> Tensor:
        """Vectors (B, H); cells that are not in `seen_BC` are as if their columns were not there."""
        bias = None
        if seen_BC is not None:
            bias = torch.zeros(seen_BC.shape).masked_fill(~seen_BC, -torch.inf)[:, None, None, :]
        for index, layer in enumerate(self.layers):
            cells_BCD = layer(cells_BCD, reference_RCD, bias)
            if index + 1 < len(self.layers):
                reference_RCD = layer(reference_RCD, reference_RCD, None)
        weight_BC = torch.ones(cells_BCD.shape[:2]) if seen_BC is None else seen_BC.float()
        pooled = (self.norm(cells_BCD) * weight_BC[..., None]).sum(1) / weight_BC.sum(1, keepdim=True)
        return self.out(pooled)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class FittedTable:
    """An encoder and the rows that it refers to; for a table without columns `width` is 0 and there is nothing else."""

    width: int
    layout: Layout
    encoder: TableEncoder | None
    reference: tuple[npt.NDArray[np.float64], Int64]

    def rows(self, numbers: Numbers, categories: Categories) -> Float32:
        """The vectors (N, H) float32 of rows, of unit length, each a function of its own cells alone, to rounding.

        Raises UserError where a column of the fitted table is missing; others are not looked at.
        """
        found = self.layout.codes(numbers, categories)
        if self.encoder is None:
            lengths = {len(column) for column in (*numbers.values(), *categories.values())}
            return np.zeros((max(lengths, default=0), 0), np.float32)
        keys, first, inverse = _distinct(*found)
        result = np.zeros((len(keys), self.width), np.float32)
        with torch.no_grad():
            reference = self.encoder.cells(*_tensors(*self.reference))
            for begin in range(0, len(first), CHUNK):
                chosen = first[begin : begin + CHUNK]
                cells = self.encoder.cells(*_tensors(found[0][chosen], found[1][chosen]))
                result[begin : begin + CHUNK] = F.normalize(self.encoder(cells, reference), dim=1).numpy()
        return result[inverse]

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Plain arrays (safetensors can hold them); `layout` is JSON in bytes."""
        plain = {"width": self.width, **vars(self.layout)}
        arrays: dict[str, npt.NDArray[Any]] = {"layout": np.frombuffer(json.dumps(plain).encode(), np.uint8).copy()}
        if self.encoder is not None:
            arrays |= {f"weights.{name}": value.numpy() for name, value in self.encoder.state_dict().items()}
            arrays |= {"reference_numbers": self.reference[0], "reference_codes": self.reference[1]}
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> FittedTable:
        plain = json.loads(arrays["layout"].tobytes())
        width = plain.pop("width")
        layout = Layout(**{name: _tuples(value) for name, value in plain.items()})
        if width == 0:
            return FittedTable(0, layout, None, _nothing())
        encoder = TableEncoder(layout, width).requires_grad_(False).eval()
        prefix = "weights."
        state = {k[len(prefix) :]: torch.from_numpy(v.copy()) for k, v in arrays.items() if k.startswith(prefix)}
        encoder.load_state_dict(state)
        return FittedTable(width, layout, encoder, (arrays["reference_numbers"], arrays["reference_codes"]))


def fit_table(
    numbers: Numbers, categories: Categories, width: int = 64, steps: int = 200, seed: int = 0
) -> FittedTable:
    """Fit an encoder on the rows of a table: numbers (N,) with NaN, categories (N,) objects with None or NaN for null.

    Column-contrastive: two random sets of columns of a row must find one another among the distinct rows of a batch. A
    table without columns gives width 0; one with a single distinct row cannot be trained and keeps its random start.
    The same call gives the same vectors. Raises UserError for columns of different lengths.
    Source: GTS-LUM, table embedding. Departs: TableGPT2's encoder was not released; see the head of this file.
    """
    twice = sorted(set(numbers) & set(categories))
    if twice:
        raise UserError(f"table: expected a column to be a number or a category, got both for {', '.join(twice[:5])}")
    layout = Layout.of(numbers, categories)
    found = layout.codes(numbers, categories)
    if layout.columns == 0 or len(found[0]) == 0:
        return FittedTable(0, layout, None, _nothing())
    _, first, _ = _distinct(*found)
    table = _tensors(found[0][first], found[1][first])
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(len(found[0]), min(REFERENCES, len(found[0])), replace=False))
    reference = (found[0][chosen], found[1][chosen])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = TableEncoder(layout, width)
        if len(first) > 1:
            _train(encoder, table, _tensors(*reference), steps)
    return FittedTable(width, layout, encoder.requires_grad_(False).eval(), reference)


def _train(encoder: TableEncoder, table: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], steps: int) -> None:
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=max(2, steps), pct_start=0.1)
    count = len(table[0])
    for _ in range(steps):
        rows = torch.randperm(count)[:BATCH]
        numbers, codes = table[0][rows], table[1][rows]
        references = encoder.cells(*reference)
        views = [
            F.normalize(encoder(encoder.cells(numbers, _hidden(codes)), references, _subset(numbers, codes)), dim=1)
            for _ in range(2)
        ]
        scores = views[0] @ views[1].T / TEMPERATURE
        target = torch.arange(len(rows))
        loss = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()


def _subset(numbers: Tensor, codes: Tensor) -> Tensor:
    """Which columns a view has (B, C): each with KEEP_SHARE, at least one."""
    drawn = torch.rand(len(numbers), numbers.shape[1] + codes.shape[1])
    return (drawn < KEEP_SHARE) | (drawn == drawn.amin(1, keepdim=True))


def _hidden(codes: Tensor) -> Tensor:
    """Some values as if they were unknown, so that the vector of those that are means something."""
    return torch.where((torch.rand(codes.shape) < HIDE_SHARE) & (codes > OTHER), OTHER, codes)


def _distinct(numbers: npt.NDArray[np.float64], codes: Int64) -> tuple[npt.NDArray[np.void], Int64, Int64]:
    """(keys, first row, which key) of rows that are the same to the bit; every null is the same."""
    whole = np.concatenate([np.where(np.isnan(numbers), np.nan, numbers + 0.0).view(np.int64), codes], axis=1)
    whole = np.ascontiguousarray(whole)
    keys, first, inverse = np.unique(
        whole.view(np.dtype((np.void, whole.itemsize * whole.shape[1]))).ravel(), return_index=True, return_inverse=True
    )
    return keys, first.astype(np.int64), inverse.astype(np.int64)


def _tensors(numbers: npt.NDArray[np.float64], codes: Int64) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.ascontiguousarray(numbers)), torch.from_numpy(np.ascontiguousarray(codes))


def _nothing() -> tuple[npt.NDArray[np.float64], Int64]:
    return np.zeros((0, 0)), np.zeros((0, 0), np.int64)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def serialise_rows(numbers: Numbers, categories: Categories) -> list[str]:
    """Each row in words, "department: GROCERY, brand share: 0.3": categories, then numbers, to four digits, without the
    nulls ("" where all are); for `encoders.embed_texts`, the other way to a row's vector."""
    lengths = {len(column) for column in (*numbers.values(), *categories.values())}
    if len(lengths) > 1:
        raise UserError(f"table: expected columns of one length, got lengths {sorted(lengths)[:5]}")
    rows: list[list[str]] = [[] for _ in range(max(lengths, default=0))]
    for name, column in categories.items():
        for row, value in zip(rows, column, strict=True):
            if not _is_null(value):
                row.append(f"{name.replace('_', ' ')}: {value}")
    for name, numeric in numbers.items():
        for row, number in zip(rows, np.asarray(numeric, np.float64).tolist(), strict=True):
            if not _is_null(number):
                row.append(f"{name.replace('_', ' ')}: {number:.4g}")
    return [", ".join(row) for row in rows]
