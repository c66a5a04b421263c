"""Training: the DeepSpeed engine, the loop, checkpoints, telemetry, and Ray Train around them."""
