"""Settings for all tests, and the option ``--long``."""

import os
import shutil
import signal
from pathlib import Path

import long_form
import pytest
from mlflow_store import client_of

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


@pytest.fixture
def done(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a copy of a finished project as the working directory."""
    from small_project import finished_project

    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(shutil.copytree(finished_project(tmp_path_factory.getbasetemp()), tmp_path / "project"))
    return Path.cwd()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a store without experiments. It takes seconds to create MLflow's tables."""
    folder = tmp_path_factory.mktemp("store")
    client_of(folder)
    return folder / "mlflow.db"


@pytest.fixture
def tracked_repository(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a repository with an empty store as the working directory, without the caller's settings."""
    for name in [name for name in os.environ if name.startswith(("DVC_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").touch()
    shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
