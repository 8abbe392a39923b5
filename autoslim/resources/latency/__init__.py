"""Latency: kernels, backends, measurement, and the table that predicts whole networks."""
