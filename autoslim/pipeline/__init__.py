"""The DVC pipeline: one module for each stage, and its parameters, checks, tracking and estimates."""
