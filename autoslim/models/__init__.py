"""Networks: building them by import path, our own definitions, the released lists and trained weights."""
