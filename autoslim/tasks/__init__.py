"""Tasks: what networks are trained for. Losses, scores and metrics."""
