"""Names from parameters, the command line and files: nothing is written outside the project, and text stays text."""

import json
import re
from pathlib import Path

import pytest
from failures import message_of
from paths import ROOT
from rich.console import Console
from small_project import error_of, start_project

from autoslim.pipeline.artifacts import Allocation
from autoslim.pipeline.entry import _on_one_line
from autoslim.pipeline.project import CHANNELS
from autoslim.pipeline.retrain import seeds_of
from autoslim.pipeline.tracking.store import artifact_folder
from autoslim.report.figures import channels_figure
from autoslim.report.table import Result, compare, markdown_table, terminal_table
from autoslim.resources.budgets import parse_budgets

COSTS = {"macs": 100.0, "params": 10.0, "memory": 1000.0}


@pytest.mark.parametrize("name", ["..", ".", "", "../..", "../../evil", "/etc", "a/../../b", "..\\..", "\0"])
def test_every_experiment_has_its_files_below_one_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    folder = artifact_folder(name)
    assert folder.resolve().parent == (tmp_path / "mlartifacts").resolve()
    assert artifact_folder("my runs v1.2").name == "my-runs-v1.2"  # as before


@pytest.mark.parametrize("method", ["../../evil", "/tmp/evil", "..", "released/../../evil"])
def test_a_method_on_the_command_line_is_no_path(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(start_project(tmp_path / "project"))
    planted = CHANNELS / f"{method}.json"
    if not planted.is_absolute():
        CHANNELS.joinpath("released").mkdir(parents=True)
        planted.write_text(json.dumps({"method": method, "channels": {}, "costs": COSTS}))
    before = sorted(tmp_path.rglob("*"))
    expected = error_of("retrain", method)
    assert expected.startswith((f"method {method!r} is unknown; ", "there is no released list '../../evil'; "))
    for read in (lambda: Allocation.read(CHANNELS, method), lambda: seeds_of(method)):
        assert message_of(read) == expected
    assert sorted(tmp_path.rglob("*")) == before


def test_the_channels_of_another_method_are_damaged(tmp_path: Path) -> None:
    Allocation("uniform", {}, COSTS, "scratch").write(tmp_path)
    (tmp_path / "uniform.json").rename(tmp_path / "autoslim.json")
    assert "it contains the channels of 'uniform'" in message_of(lambda: Allocation.read(tmp_path, "autoslim"))


def test_a_target_in_the_report_is_text() -> None:
    """The name of the target of a latency table is read from a file, which may come from someone else."""
    target = "<script>x</script> [y](z) `a|b` [bold]c[/nothing]\n\n# d"
    comparison = compare(
        [Result("uniform", COSTS, {0: 0.5, 1: 0.6})],
        budgets=parse_budgets("50%", "macs"),
        resource="macs",
        limits={"macs": 100.0},
        predicted_on=target,
    )
    remarks = markdown_table(comparison).rpartition("\n\n")[2]
    assert re.search(r"(?<!\\)[<>\[\]`|*_]", remarks) is None
    assert "\\<script\\>x\\</script\\>" in remarks
    console = Console(width=1000)
    with console.capture() as capture:
        console.print(terminal_table(comparison))  # a closing tag of its own would be an error
    assert "[bold]c[/nothing]" in capture.get()


def test_a_layers_name_in_a_figure_is_text(tmp_path: Path) -> None:
    groups = {"$\\oops{$": 8, "$x$": 4}
    assert channels_figure(tmp_path / "figure.png", groups, {"uniform": groups}, 50).exists()


def test_an_error_message_cannot_control_the_terminal() -> None:
    assert _on_one_line("a\x1b]0;title\x07b\r\n c\udc80 é") == r"a\x1b]0;title\x07b c\udc80 é"


def test_servers_that_are_started_or_documented_listen_on_loopback() -> None:
    lines = [
        line
        for path in (ROOT / "Makefile", ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*(mlflow (ui|server)|mkdocs serve|python -m http\.server)\b", line)
    ]
    assert lines
    assert [line for line in lines if "127.0.0.1" not in line and "localhost" not in line] == []
