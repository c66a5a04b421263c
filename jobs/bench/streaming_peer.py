"""MosaicML streaming over dense windows, one sample a user, with two workers. For `jobs.bench.loader`.

    <peers' python> -P jobs/bench/streaming_peer.py --windows NPY --work FOLDER --batch N

It runs in an environment of its own (`make peers`), where lum_ray is not. It writes the windows (users, days,
behaviours; float32) as MDS shards and says "ready" on stdout; then for every line on stdin it runs an epoch and answers
with `seconds windows`. Importing it takes none of its packages.
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
    options = parser.parse_args()
    import numpy as np
    from torch.utils.data import DataLoader

    streaming = _streaming()
    windows = np.load(options.windows, mmap_mode="r")
    shape = ",".join(str(size) for size in windows.shape[1:])
    with streaming.MDSWriter(out=options.work, columns={"x": f"ndarray:float32:{shape}"}) as writer:
        for window in windows:
            writer.write({"x": np.asarray(window)})
    dataset = streaming.StreamingDataset(local=options.work, batch_size=options.batch, shuffle=True)
    loader = DataLoader(dataset, options.batch, num_workers=2, drop_last=True, persistent_workers=True)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        count = sum(len(batch["x"]) for batch in loader)
        print(time.perf_counter() - start, count, flush=True)


if __name__ == "__main__":
    main()
