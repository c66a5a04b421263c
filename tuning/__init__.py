"""Searches over a run's settings with Ray Tune: spaces, the sweep, what it leaves behind."""
