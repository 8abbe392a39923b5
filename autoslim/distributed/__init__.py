"""Several processes: their ranks, and synchronised gradients and batch norm statistics."""
