"""Data: sources, the prepared splits (train, search, test), augmentation and batches."""
