"""Several processes: ranks, and what they share at each training step."""
