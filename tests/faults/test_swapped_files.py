"""Files of another run that have the right shapes: their own digests match, so other files have to name them."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from failures import message_of
from small_project import change_params, error_of, finished_project, stage
from torch import nn

from autoslim.cli.evaluate import Split, evaluate_cli
from autoslim.models.pretrained import read_trained, write_trained
from autoslim.pipeline.params import load_params
from autoslim.pipeline.retrain import load_retrained
from autoslim.training.checkpoints import load_weights, save_weights


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns projects by name: ``own``, ``supernet`` with another seed of the supernet, ``data`` with other data."""
    found = {}
    runs: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
        "own": ({}, [["allocate"], ["retrain", "uniform"]]),
        "supernet": ({"supernet": {"seed": 5}}, [["supernet"], ["search"], ["allocate"], ["retrain", "uniform"]]),
        "data": ({"data": {"seed": 5}}, [["prepare"]]),
    }
    for name, (changes, stages) in runs.items():
        finished = finished_project(tmp_path_factory.getbasetemp())
        found[name] = shutil.copytree(finished, tmp_path_factory.mktemp(name) / "project")
        with pytest.MonkeyPatch.context() as patch, contextlib.chdir(found[name]):
            patch.delenv("DVC_ROOT", raising=False)
            seeds = [0, 1] if name == "own" else [0]
            change_params(found[name], changes | {"retrain": {"start": "supernet", "seeds": seeds}})
            for arguments in stages:
                stage(*arguments)
    return found


@pytest.fixture
def swapped(others: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a copy of the project ``own`` as the working directory."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(shutil.copytree(others["own"], tmp_path / "project"))
    return Path.cwd()


def swap(name: str, other: Path) -> None:
    shutil.copyfile(other / name, name)


def test_the_supernets_weights_of_another_run(others: dict[str, Path], swapped: Path) -> None:
    swap("outputs/supernet/weights.safetensors", others["supernet"])
    for name in ("search", "allocate"):
        assert error_of(name) == (
            "outputs/supernet/weights.safetensors does not contain the weights that outputs/supernet/supernet.json "
            "belongs to: one of the two files is from another run; run `dvc repro`"
        )


def test_the_trajectory_of_another_supernet(others: dict[str, Path], swapped: Path) -> None:
    swap("outputs/search/trajectory.json", others["supernet"])
    assert error_of("allocate") == (
        "outputs/supernet/weights.safetensors does not contain the weights that outputs/search/trajectory.json "
        "belongs to: one of the two files is from another run; run `dvc repro`"
    )


@pytest.mark.parametrize("path", ["outputs/supernet", "outputs/search"])
def test_the_whole_folder_of_another_supernet(path: str, others: dict[str, Path], swapped: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(others["supernet"] / path, path)
    assert "outputs/search/trajectory.json belongs to: one of the two files is from another run" in error_of("allocate")


def test_initial_weights_of_another_run(others: dict[str, Path], swapped: Path) -> None:
    swap("outputs/channels/uniform.safetensors", others["supernet"])
    assert error_of("retrain", "uniform") == (
        "outputs/channels/uniform.safetensors does not contain the weights that outputs/channels/uniform.json belongs "
        "to: one of the two files is from another run; run `dvc repro`"
    )


def test_retrained_weights_of_another_seed(swapped: Path) -> None:
    weights = Path("outputs/retrain/uniform/weights")
    contents = [(weights / f"seed-{seed}.safetensors").read_bytes() for seed in (0, 1)]
    for seed in (0, 1):
        (weights / f"seed-{seed}.safetensors").write_bytes(contents[1 - seed])
    reason = "does not contain weights of this network: they are those of seed 1, not 0; run `dvc repro`"
    expected = f"{weights}/seed-0.safetensors {reason}"
    assert error_of(lambda: evaluate_cli("uniform", None, Split.SEARCH, False)) == expected
    assert message_of(lambda: load_retrained(load_params(), "uniform", 0)) == expected  # of export and predict
    assert error_of("report") == expected


def test_retrained_weights_of_another_supernet(others: dict[str, Path], swapped: Path) -> None:
    swap("outputs/retrain/uniform/weights/seed-0.safetensors", others["supernet"])
    for command in ("report", lambda: evaluate_cli("uniform", None, Split.SEARCH, False)):
        assert "seed-0.safetensors does not contain weights of this network: they are those of initial weights " in (
            error_of(command)
        )


def test_prepared_data_of_another_run(others: dict[str, Path], swapped: Path) -> None:
    """The arrays have the same shapes, and match the digests in their own ``data.json``."""
    shutil.rmtree("data/prepared")
    shutil.copytree(others["data"] / "data/prepared", "data/prepared")
    for name in ("search", "allocate"):
        assert error_of(name) == (
            "outputs/supernet contains a supernet that was trained on other data than those in data/prepared; run "
            "`dvc repro`"
        )
    for command in ("report", lambda: evaluate_cli("uniform", None, Split.SEARCH, False)):
        assert "seed-0.safetensors does not contain weights of this network: they are those of data " in (
            error_of(command)
        )


def test_the_copy_of_other_trained_weights(tmp_path: Path) -> None:
    from small_data import small_network

    network, graph = small_network()
    sources = [str(tmp_path / f"{number}.pt") for number in range(2)]
    for source in sources:
        Path(source).write_text(source)
    write_trained(tmp_path / "trained.safetensors", network, [], sources[0])
    assert read_trained(tmp_path / "trained.safetensors", network, graph, sources[0]) is not None
    assert "they are those of model.weights " in message_of(
        lambda: read_trained(tmp_path / "trained.safetensors", network, graph, sources[1])
    )
    Path(sources[1]).unlink()  # cannot be compared
    assert read_trained(tmp_path / "trained.safetensors", network, graph, sources[1]) is not None


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """safetensors orders the metadata at random; DVC would run what depends on the file again."""
    network = nn.Linear(3, 2)
    file, about = tmp_path / "w.safetensors", {name: f"ä{name}" for name in "badc"}
    contents = set()
    for _ in range(8):
        save_weights(network, file, about)
        contents.add(file.read_bytes())
    assert len(contents) == 1
    load_weights(network, file, about)
    assert message_of(lambda: load_weights(network, file, {"a": "other"})) == (
        f"{file} does not contain weights of this network: they are those of a äa, not other; run `dvc repro`"
    )
