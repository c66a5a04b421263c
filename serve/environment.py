"""Settings of Ray Serve that it reads from the environment when it is imported, in every process."""

from __future__ import annotations

import os
import sys


def optimise(haproxy: bool = False) -> None:
    """Take the faster ways of Ray Serve (its RAY_SERVE_THROUGHPUT_OPTIMIZED) where the environment says nothing else.

    Call it before Ray is imported. Predictions have a thread of their own, so that a model at work does not stall
    health checks there. With `haproxy` HAProxy takes the place of Serve's proxy, at a fraction of its CPU; but its
    statistics (port 8404) and metrics (9101) are open to every address, and a server needs half a minute to end.
    """
    there = sys.platform == "linux"  # Ray brings HAProxy for Linux only
    haproxy = os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", str(int(haproxy and there))) == "1"
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    # Ray's C++ part else reports on stderr how Serve's actors end, of which no user can make anything
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", str(int(haproxy)))
