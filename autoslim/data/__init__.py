"""Data sources, the prepared splits (train, search and test), augmentation and batches."""
