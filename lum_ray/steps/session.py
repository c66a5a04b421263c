"""The Ray session: that of the job, or an embedded one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType

import ray
import ray.data  # sets up its own logging when it is imported
import torch

from lum_ray.config import Train
from lum_ray.training.fit import check_room


def start_ray() -> None:
    """Join the session that there is (`ray job submit`, RAY_ADDRESS), else start an embedded one; again is a no-op.

    An embedded session ends with this process. Its start has a hard limit of 30 s inside Ray, so it is tried twice.
    SIGTERM then ends the process with code 143: Ray's own handler writes a native trace, and aborts within a search.
    """
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        try:
            ray.init(address="local", include_dashboard=False, **quiet)
        except (ConnectionError, TimeoutError, RuntimeError):
            time.sleep(2)
            ray.init(address="local", include_dashboard=False, **quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def training_session(train: Train) -> bool:
    """Join or start the session that training needs. Returns whether its workers compute on GPUs.

    `auto` with one worker asks this process, with several the session: the driver may be on a machine without GPUs. One
    worker joins a cluster too where it is a job there, so that its metrics are seen. Raises UserError where the session
    has no room for the workers.
    """
    if train.workers > 1 or os.environ.get("RAY_ADDRESS"):
        start_ray()
    if train.device != "auto":
        gpus = train.device == "cuda"
    elif train.workers == 1:
        gpus = torch.cuda.is_available()
    else:
        gpus = bool(ray.cluster_resources().get("GPU", 0) >= 1)
    check_room(train.workers, gpus, train.min_workers)
    return gpus
