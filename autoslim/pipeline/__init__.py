"""The DVC pipeline: one module per stage, parameters, checks, tracking and estimates."""
