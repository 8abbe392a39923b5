"""Ctrl-C at any moment is one line and exit code 130, signal handlers are restored, and a resumed run says so."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import KilledError
from paths import ROOT
from small_project import stage
from torch import nn

from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.tracking.tracker import NullTracker
from autoslim.training.checkpoints import Checkpoints
from autoslim.training.loop import Plan, train
from autoslim.training.progress import Progress

INTERRUPTED = "interrupted; run again to continue training, search and latency tables from their last checkpoint\n"
COMMANDS = {
    "stage": [str(ROOT / "stages/supernet.py")],
    "stage with an argument": [str(ROOT / "stages/retrain.py"), "uniform"],
    "autoslim": ["-c", "from autoslim.cli.main import main; main()", "check"],
}


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("stage", "typer"),
        ("stage", "torch"),
        ("stage with an argument", "typer"),
        ("stage with an argument", "pydantic"),
        ("autoslim", "typer"),
        ("autoslim", "ruamel/yaml"),
    ],
)
def test_an_interrupt_during_an_import_is_one_line(command: str, module: str, tmp_path: Path) -> None:
    """The module is replaced by one that sends the signal when it is imported."""
    package = tmp_path / module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    if module == "ruamel/yaml":
        (tmp_path / "ruamel/__init__.py").touch()
    (tmp_path / "dvc.yaml").touch()
    done = subprocess.run(
        [sys.executable, *COMMANDS[command]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 130
    # Typer imports pydantic while it parses arguments, and exits without a line.
    assert done.stderr == ("" if module == "pydantic" else INTERRUPTED)


@pytest.mark.parametrize("ending", [None, SystemExit(2), ValueError("x"), KeyboardInterrupt()])
def test_a_command_restores_the_signal_handler(ending: BaseException | None) -> None:
    def command() -> None:
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        if ending is not None:
            raise ending

    def mine(*_: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        if ending is None:
            with_clear_errors(command)()
        else:
            with pytest.raises((SystemExit, ValueError)):
                with_clear_errors(command)()
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_data_set_that_exits_does_not_end_a_stage_as_a_success(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        with_clear_errors(lambda: sys.exit(0))()
    assert ending.value.code == 1
    assert capsys.readouterr().err.startswith("error: sys.exit was called before the command was complete")


def test_a_resumed_training_says_so_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed: list[str] = []

    def run(kill_at: int | None) -> None:
        network = nn.Linear(2, 2)

        def step(images: torch.Tensor, labels: torch.Tensor, number: int) -> torch.Tensor:
            if number == kill_at:
                raise KilledError
            printed.append(capsys.readouterr().err)
            loss = network(images).square().mean()
            loss.backward()
            return loss.detach()

        batch = torch.ones(3, 2), torch.zeros(3)
        train(
            network,
            torch.optim.SGD(network.parameters(), 0.1),
            Plan(3, 15),
            step=step,
            batches=lambda epoch, skip: itertools.repeat(batch, 15 - skip),
            learning_rate=lambda number: 0.1,
            validate=dict,
            observe=lambda row: None,
            checkpoints=Checkpoints(tmp_path, "run", "key"),
            name="run",
            label="supernet",
        )

    with pytest.raises(KilledError):
        run(38)
    assert "".join(printed) == ""  # a new run has nothing to continue
    printed.clear()
    capsys.readouterr()
    run(None)
    assert printed[0] == "supernet: continuing at step 30 of 45\n"


def test_a_resumed_search_says_so_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("search", 60, done=38):
        assert capsys.readouterr().err == "search: continuing at step 38 of 60\n"


@pytest.mark.parametrize(
    ("arguments", "label"),
    [(["supernet"], "supernet"), (["search"], "search"), (["retrain", "uniform"], "retrain uniform 50%, seed 0")],
)
def test_a_kill_while_the_tracked_run_ends_loses_no_work(
    arguments: list[str], label: str, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def killed_at_the_end(*args: Any, **kwargs: Any) -> Iterator[NullTracker]:
        yield NullTracker()
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(f"autoslim.pipeline.{arguments[0]}.tracked_stage", killed_at_the_end)
        with pytest.raises(KilledError):
            stage(*arguments)
    assert f"{label}: continuing at step " in stage(*arguments)
    assert not list((done / "checkpoints").glob("*/"))
