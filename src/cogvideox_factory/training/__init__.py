"""Training: the objective, the optimizer, checkpoints, metrics, and the loop."""
