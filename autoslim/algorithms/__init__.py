"""The method: sandwich rule, greedy slimming, BN recalibration, channel allocation. Pure functions of plain values."""
