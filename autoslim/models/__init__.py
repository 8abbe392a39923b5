"""Networks: construction from an import path, our own definitions, released channel lists and trained weights."""
