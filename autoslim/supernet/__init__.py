"""The supernet: shared weights, the sandwich rule, training, and extracting networks."""
