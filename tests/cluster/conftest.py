"""A real Ray head for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.nodes import Head, start_head


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """Three CPUs, no GPU; ended by its own process id."""
    node = start_head(cpus=3)
    yield node.head
    node.stop()
