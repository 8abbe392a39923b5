"""Training: the one loop, recipe, checkpoints, device and retraining."""
