"""The search: greedy slimming, racing, incremental evaluation, and the methods that choose channels."""
