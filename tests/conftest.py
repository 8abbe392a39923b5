"""Settings for all tests, and the option ``--long``."""

import signal

import long_form
import pytest

from autoslim.tracing.propagate import STRICT

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs; processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
STRICT.set(True)  # an error in a slimming rule fails the test instead of making layers not prunable


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="Also run the tests that take long, and the others with more random examples (use -s to see counts).",
    )


def pytest_configure(config: pytest.Config) -> None:
    long_form.LONG = config.getoption("--long")
    config.addinivalue_line("markers", "long: runs only with --long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
