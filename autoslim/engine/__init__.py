"""The engine: data, the one training loop, evaluation, checkpoints and the process group."""
