"""MosaicML streaming, one sample a user, with two workers. For `jobs.bench.loader`.

    <peers' python> -P jobs/bench/streaming_peer.py --windows NPZ --work FOLDER --batch N [--dense]

It runs in an environment of its own (`make peers`), where lum_ray is not. `windows` holds `offsets` (N + 1,), `place`
(A,) in the window and `values` (A, behaviours) of N users' active days, and the window's `days`. A sample is a user's
active days, which a worker makes dense; with --dense it is her window, made dense before it is written. It says "ready"
on stdout; then for every line on stdin it runs an epoch and answers with `seconds windows`. Importing it takes none of
its packages.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import sys
import time
import types
from typing import Any


def _streaming() -> Any:
    # it imports torchvision for data sets of pictures, whose compiled part wants a torch for GPUs
    class Anything(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module = sys.modules[name] = Anything(name)
        module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
    import streaming

    return streaming


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("windows", "work"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dense", action="store_true")
    options = parser.parse_args()
    import numpy as np
    from torch.utils.data import DataLoader

    streaming = _streaming()
    with np.load(options.windows) as stored:
        bounds, place, values, days = (stored[name] for name in ("offsets", "place", "values", "days"))
    shape = (int(days), values.shape[1])

    def made_dense(place: Any, values: Any) -> Any:
        dense = np.zeros(shape, np.float32)
        dense[place] = values
        return dense

    class Users(streaming.StreamingDataset):  # type: ignore[misc,name-defined]
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return sample if options.dense else {"x": made_dense(sample["place"], sample["values"])}

    sparse = {"place": "ndarray:int32", "values": "ndarray:int64"}
    columns = {"x": f"ndarray:float32:{shape[0]},{shape[1]}"} if options.dense else sparse
    with streaming.MDSWriter(out=options.work, columns=columns) as writer:
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
            own = place[begin:end], values[begin:end]
            writer.write({"x": made_dense(*own)} if options.dense else dict(zip(sparse, own)))
    dataset = Users(local=options.work, batch_size=options.batch, shuffle=True)
    loader = DataLoader(dataset, options.batch, num_workers=2, drop_last=True, persistent_workers=True)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        count = sum(len(batch["x"]) for batch in loader)
        print(time.perf_counter() - start, count, flush=True)


if __name__ == "__main__":
    main()
