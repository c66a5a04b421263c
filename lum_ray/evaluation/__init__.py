"""Evaluation: reads prediction files, never a model. Metrics, their intervals, baselines, the report."""
