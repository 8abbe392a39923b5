"""Whether the tests run in their long form (``pytest --long``), which takes hours: see CONTRIBUTING.md."""

LONG = False  # set by conftest.py before tests are collected
