"""The report: comparison table and figures."""
