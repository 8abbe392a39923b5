"""The search: greedy slimming, racing, incremental evaluation, and methods of choosing channels."""
