"""The supernet: shared weights, the sandwich rule, training, and the extraction of networks."""
