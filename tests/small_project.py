"""Runs stages in this process, in a small project without DVC, git or MLflow, and returns their output or errors."""

import contextlib
import functools
import importlib.util
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from tiny import merged, tiny_params, write_params

SMALLER: dict[str, Any] = {
    "data": {"train_images": 100, "test_images": 50, "search_images": 32},
    "supernet": {"epochs": 1, "random_widths": 1, "grid": {"steps": 3}},
    "search": {"chunk": 32, "stop": 0.4},
    "retrain": {"epochs": 1},
    "tracking": {"enabled": False},
    "runtime": {"workers": 0},
}

RUNS = (
    ["prepare"],
    ["resources"],
    ["supernet"],
    ["search"],
    ["allocate"],
    ["retrain", "uniform"],
    ["retrain", "autoslim"],
    ["report"],
)
"""The stages of a pipeline with the methods uniform and autoslim, with their arguments, in order."""


def start_project(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Creates a project in which nothing has run, and returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    watched = (ROOT / "dvc.yaml").read_text().replace("autoslim/models,", "autoslim/models, net.py,")
    (folder / "dvc.yaml").write_text(watched)  # as documented for a network in a file
    shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    change_params(folder, changes or {})
    return folder


def change_params(folder: Path, changes: dict[str, Any]) -> None:
    write_params(folder, merged(tiny_params(SMALLER), changes))


@functools.cache
def finished_project(base: Path) -> Path:
    """Returns a project below ``base`` in which every stage has run. Tests share it: to change it, make a copy."""
    folder = start_project(base / "finished-project")
    with contextlib.chdir(folder):
        for arguments in RUNS:
            stage(*arguments)
    return folder


def stage(name: str, *arguments: str) -> str:
    """Runs a stage in the working directory and returns its output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), one_thread():
        _main(name)(*arguments)
    return output.getvalue()


def error_of(command: Callable[..., Any] | str, *arguments: str, trains: bool = False) -> str:
    """Returns the error of a command: one line on stderr, exit code 1, and no checkpoint unless it ``trains``."""
    run = _main(command) if isinstance(command, str) else command
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        one_thread(),
        pytest.raises(SystemExit) as ending,
    ):
        run(*arguments)
    assert ending.value.code == 1
    progress = "preparing ", "supernet: ", "search: ", "allocate: ", "retrain ", "latency of "
    lines = [line for line in err.getvalue().splitlines() if not line.startswith(progress)]
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err.getvalue() + out.getvalue()
    assert len(lines) == 1 or all(line.startswith("  ") for line in lines[1:])  # all wrong parameters, one per line
    written = list(Path("checkpoints").glob("*/*"))
    assert trains or not written
    return "\n".join(lines).removeprefix("error: ")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread. Such small networks then run faster, especially if other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _main(name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(f"stage_{name}", ROOT / f"stages/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    main: Callable[..., Any] = module.main
    return main
