"""A trained model that tests deploy."""

from __future__ import annotations

import pytest

from lum_ray import config
from lum_ray.config import Run
from lum_ray.steps import publish, train
from serve.app import Endpoint


@pytest.fixture(scope="session")
def trained(tiny: Run) -> Endpoint:
    return Endpoint(train(tiny), publish(tiny), serve=config.Serve(timeout_s=60.0, ingress_replicas=1))
