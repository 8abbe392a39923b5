"""The library for networks, training loops and data of one's own: one function for each step, and one for all."""
