"""Inputs of a stage that are edited while it runs: DVC would record the result as that of the edited inputs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_project import RUNS, change_params, error_of, stage, start_project

from autoslim.pipeline.params import load_params

EDITS: dict[str, dict[str, Any]] = {
    "prepare": {"data": {"seed": 5}},
    "resources": {"supernet": {"width": 1.25}},
    "supernet": {"supernet": {"optimiser": {"learning_rate": 0.001}}},
    "search": {"search": {"stop": 0.45}},
    "allocate": {"budget": "60%"},
    "retrain": {"retrain": {"batch_size": 32}},
    "report": {"budget": "60%"},
}


def edit_during(name: str, edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls ``edit`` when the stage has read its parameters."""

    def load_then_edit() -> Any:
        params = load_params()
        edit()
        return params

    monkeypatch.setattr(f"autoslim.pipeline.{name}.load_params", load_then_edit)


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
def test_no_stage_ends_well_if_its_parameters_were_edited(
    arguments: list[str], done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = arguments[0]
    edit_during(name, lambda: change_params(done, EDITS[name]), monkeypatch)
    [section] = EDITS[name]
    message = error_of(*arguments, trains=True)
    assert message.startswith(section)
    assert f" changed while the stage {name} ran, so DVC would record" in message


@pytest.mark.parametrize("file", ["net.py", "data/prepared/data.json", "autoslim/training/loop.py"])
def test_edited_files(file: str, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (done / file).parent.mkdir(parents=True, exist_ok=True)
    if not (done / file).exists():
        (done / file).write_text("a = 1\n")
    content = (done / file).read_bytes()
    edit_during("supernet", lambda: (done / file).write_bytes(content + b"\n"), monkeypatch)
    assert error_of("supernet", trains=True).startswith(f"{file} changed while the stage supernet ran")


def test_work_is_kept_and_counts_once_the_edit_is_undone(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (done / "outputs/supernet/weights.safetensors").read_bytes()
    shutil.rmtree(done / "outputs/supernet")
    with monkeypatch.context() as patch:
        edit_during("supernet", lambda: change_params(done, EDITS["supernet"]), patch)
        error_of("supernet", trains=True)
    assert list((done / "checkpoints").glob("supernet-*/*.pt"))
    change_params(done, {})
    assert "continuing at step 1 of 1" in stage("supernet")
    assert (done / "outputs/supernet/weights.safetensors").read_bytes() == weights
    assert not list((done / "checkpoints").glob("*/"))


def test_edits_that_change_nothing_or_another_stage_are_allowed(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"budget": "70%", "retrain": {"epochs": 5}, "runtime": {"checkpoint_minutes": 1}}
    edit_during("supernet", lambda: change_params(done, changes), monkeypatch)
    stage("supernet")


NET = """
import os
from autoslim.models.architectures import mobilenet_v2
from autoslim.pipeline import assembly

if os.environ.get("RANK") == "1":  # as if the code had been edited between the starts of the ranks
    assembly.code_digest = lambda modules: "edited"

def build(num_classes=10):
    return mobilenet_v2(num_classes, 8, [[1, 8, 1, 1], [2, 8, 2, 2]], 16, in_channels=1)
"""


def test_ranks_that_read_other_inputs_train_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = start_project(tmp_path / "project")
    (folder / "net.py").write_text(NET)
    change_params(
        folder, {"model": {"name": "net.py:build", "kwargs": {}}, "runtime": {"processes": 2, "device": "cpu"}}
    )
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(folder)
    stage("prepare")
    assert error_of("supernet").startswith("rank 1 of 2 differs from rank 0 in its parameters, data or code: ")
