"""Networks as channel groups: trace, resize, supernet, and our own model definitions."""
