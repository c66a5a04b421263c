"""One function per arrow of the data flow: prepare, train, evaluate, predict, publish.

Each finds what is there already and builds what is missing, so that any of them can be called first.
"""

from lum_ray.steps.evaluate import evaluate
from lum_ray.steps.predict import open_predictor, predict, publish
from lum_ray.steps.prepare import prepare
from lum_ray.steps.train import train

__all__ = ["evaluate", "open_predictor", "predict", "prepare", "publish", "train"]
