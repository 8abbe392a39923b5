"""Training: the training loop, the recipe, checkpoints, the device and retraining."""
