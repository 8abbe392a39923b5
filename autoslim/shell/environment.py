"""Settings of other libraries that must stand in the environment before those are imported."""

import os

# oneDNN keeps 1,024 primitives by default and builds anew what it forgot; the widths of a supernet need more of them
# (read when torch starts).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
# Nothing that a user runs here calls home.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A defect's traceback is for a bug report: Typer's boxes around every line of it are not.
os.environ.setdefault("TYPER_STANDARD_TRACEBACK", "1")
