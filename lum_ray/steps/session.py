"""The Ray session: that of the job, or an embedded one on this machine."""

from __future__ import annotations

import logging
import os
import time

import ray
import ray.data  # sets up its own logging when it is imported


def start_ray() -> None:
    """Join the session that there is (`ray job submit`, RAY_ADDRESS), else start an embedded one; again is a no-op.

    An embedded session ends with this process. Its start has a hard limit of 30 s inside Ray, so it is tried twice.
    """
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    # its C++ part reports on stderr what no user can act on, such as how Serve's actors end
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return
    try:
        ray.init(address="local", include_dashboard=False, **quiet)
    except (ConnectionError, TimeoutError, RuntimeError):
        time.sleep(2)
        ray.init(address="local", include_dashboard=False, **quiet)
