"""Other ways from a file to dense batches of daily behaviours, for `jobs.bench.loader`.

Each gives one window a user, as a float32 tensor (batch, days, behaviours). An epoch returns the windows that it gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

Floats = npt.NDArray[np.float32]


def write_dense_rows(uri: str, windows: Iterator[Floats], behaviours: Sequence[str], filesystem: Any) -> None:
    """Parquet files with a row per user and day, a column per behaviour; `windows`: (N, days, behaviours) each."""
    for number, window in enumerate(windows):
        rows = window.reshape(-1, len(behaviours))
        table = pa.table({name: np.ascontiguousarray(rows[:, column]) for column, name in enumerate(behaviours)})
        pq.write_table(table, f"{uri}/{number:05d}.parquet", filesystem=filesystem, compression="zstd")


def ray_epoch(uri: str, behaviours: Sequence[str], days: int, batch: int, filesystem: Any) -> int:
    """Ray Data's iter_torch_batches over dense rows."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_parquet(uri, filesystem=filesystem, columns=list(behaviours))
    count = 0
    for columns in dataset.iter_torch_batches(batch_size=batch * days, drop_last=True):
        dense = torch.stack([columns[name] for name in behaviours], dim=-1).view(batch, days, len(behaviours))
        count += len(dense)
    return count


class Windows(IterableDataset[Floats]):
    """The window before `cut` of every user of a timelines artifact's files, one by one; workers share the files."""

    def __init__(self, paths: Sequence[str], behaviours: Sequence[str], cut: int, days: int) -> None:
        self.paths, self.behaviours, self.cut, self.days = tuple(paths), tuple(behaviours), cut, days

    def __iter__(self) -> Iterator[Floats]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        groups = [(path, group) for path in self.paths for group in range(pq.read_metadata(path).num_row_groups)]
        for path, group in groups[part::parts]:
            table = pq.ParquetFile(path).read_row_group(group, columns=["days", *self.behaviours])
            names = ("days", *self.behaviours)
            offsets = table["days"].combine_chunks().offsets.to_numpy()
            flat = [table[name].combine_chunks().values.to_numpy() for name in names]
            for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                place = flat[0][begin:end] - (self.cut - self.days)
                inside = (place >= 0) & (place < self.days)
                dense = np.zeros((self.days, len(self.behaviours)), np.float32)
                for column, values in enumerate(flat[1:]):
                    dense[place[inside], column] = values[begin:end][inside]
                yield dense


def data_loader(dataset: Windows, batch: int) -> DataLoader[Floats]:
    """torch's DataLoader with two workers that stay, which collates sample by sample."""
    return DataLoader(
        dataset, batch, num_workers=2, drop_last=True, persistent_workers=True, multiprocessing_context="spawn"
    )


def loader_epoch(loader: DataLoader[Floats]) -> int:
    return sum(len(dense) for dense in loader)
