"""Files that stages exchange are read as they were written, and damaged or wrong files are errors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from failures import message_of
from small_data import SPAN, small_network
from specimens import shuffle_weights
from torch import nn

from autoslim import Supernet, resize, trace
from autoslim.files import write_sealed
from autoslim.models.architectures import mobilenet_v2
from autoslim.pipeline.artifacts import Allocation
from autoslim.pipeline.project import check_trajectory_format
from autoslim.resources.costs import Costs
from autoslim.search.greedy import Option, SlimmingStep
from autoslim.search.trajectory import read_trajectory, step_from_dict, step_to_dict
from autoslim.supernet.extract import SupernetFile, load_supernet
from autoslim.tasks.task import Score
from autoslim.training.checkpoints import load_weights, save_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with the outputs of the supernet stage."""
    network, graph = small_network()
    levels = graph.grid(SPAN)
    wide = resize(network, graph, {name: options[0] for name, options in levels.items()})
    shuffle_weights(wide)
    save_weights(Supernet(wide, graph).network, tmp_path / "weights.safetensors")
    SupernetFile("autoslim.models.architectures:mobilenet_v2", graph.input_shape, levels, graph.default).write(tmp_path)
    return tmp_path


def test_weights_are_restored_in_any_memory_layout(tmp_path: Path) -> None:
    network = mobilenet_v2(10, 8, [[1, 8, 1, 1]], 16).to(memory_format=torch.channels_last)
    shuffle_weights(network)
    save_weights(network, tmp_path / "deep/weights.safetensors")
    other = mobilenet_v2(10, 8, [[1, 8, 1, 1]], 16)
    load_weights(other, tmp_path / "deep/weights.safetensors")
    pairs = zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_shared_weights_are_restored(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        network[1].weight = network[0].weight
        return network

    network, other = tied(), tied()
    save_weights(network, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    assert other[1].weight is other[0].weight
    assert torch.equal(other[0].weight, network[0].weight)


def test_a_supernet_is_restored(folder: Path) -> None:
    network, graph = small_network()
    supernet, file = load_supernet(folder, network, graph)
    assert file.grid == graph.grid(SPAN)
    assert supernet.widest == {name: options[0] for name, options in file.grid.items()}
    expected = resize(network, graph, supernet.widest)
    shuffle_weights(expected)
    for name, parameter in expected.named_parameters():
        assert torch.equal(supernet.network.get_parameter(name), parameter)


def test_a_supernet_of_another_network(folder: Path) -> None:
    other = mobilenet_v2(10, 8, [[1, 8, 1, 1], [2, 12, 2, 2]], 16, in_channels=1)
    message = message_of(lambda: load_supernet(folder, other, trace(other, torch.zeros(1, 1, 8, 8))))
    for part in (
        str(folder),
        "another network",
        "5 groups",
        "features.2.conv.2 has 8",
        "12 here",
        "dvc repro supernet",
    ):
        assert part in message


def test_a_supernet_for_another_input_size(folder: Path) -> None:
    network, _ = small_network()
    message = message_of(lambda: load_supernet(folder, network, trace(network, torch.zeros(1, 1, 16, 16))))
    assert "input [1, 8, 8]" in message
    assert "input [1, 16, 16]: run `dvc repro supernet`" in message


def test_a_supernet_with_other_classes(folder: Path) -> None:
    """Groups and input are the same, so only the weights differ."""
    other = mobilenet_v2(7, 8, [[1, 8, 1, 1], [2, 8, 2, 2]], 16, in_channels=1)
    message = message_of(lambda: load_supernet(folder, other, trace(other, torch.zeros(1, 1, 8, 8))))
    assert message.startswith(
        f"{folder / 'weights.safetensors'} does not contain weights of this network: size mismatch"
    )
    assert message.endswith("run `dvc repro`")


def test_there_is_no_supernet(tmp_path: Path) -> None:
    assert message_of(lambda: load_supernet(tmp_path, *small_network())) == (
        f"there is no supernet at {tmp_path}; run `dvc repro supernet`"
    )


def test_weights_are_missing(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    assert f"there are no weights at {folder / 'weights.safetensors'}" in message_of(
        lambda: load_supernet(folder, *small_network())
    )


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:100], lambda b: b[:-5], lambda b: b"\xff" * len(b), lambda b: b + b"more"]
)
def test_damaged_weights(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    message = message_of(lambda: load_supernet(folder, *small_network()))
    assert message.startswith(f"{path} does not contain weights of this network: ")
    assert message.endswith("run `dvc repro`")


def test_weights_with_one_tensor_too_many_or_too_few(tmp_path: Path) -> None:
    save_weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), tmp_path / "w.safetensors")
    assert "Unexpected key" in message_of(
        lambda: load_weights(nn.Sequential(nn.Linear(2, 2)), tmp_path / "w.safetensors")
    )
    three = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    assert "Missing key" in message_of(lambda: load_weights(three, tmp_path / "w.safetensors"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"network": "x"}', '{"grid": [], "network": "x", "input_shape": []}'])
def test_a_damaged_supernet_file(folder: Path, text: str) -> None:
    (folder / "supernet.json").write_text(text)
    message = message_of(lambda: load_supernet(folder, *small_network()))
    assert str(folder / "supernet.json") in message
    assert "run `dvc repro supernet`" in message


@pytest.mark.parametrize(
    ("channels", "costs", "reason"),
    [
        ({"a": "8"}, {"macs": 5}, "a is '8'"),
        ({"a": 8.0}, {"macs": 5}, "a is 8.0"),
        ({"a": 8}, {"macs": None}, "macs is None"),
        ([8], {"macs": 5}, "'list' object has no attribute 'items'"),
        ({"a": 8}, 5, "'int' object has no attribute 'items'"),
    ],
)
def test_damaged_channels(tmp_path: Path, channels: object, costs: object, reason: str) -> None:
    path = tmp_path / "uniform.json"
    path.write_text(json.dumps({"method": "uniform", "channels": channels, "costs": costs, "start": "scratch"}))
    message = message_of(lambda: Allocation.read(tmp_path, "uniform"))
    assert message == f"{path} is damaged ({reason}); run `dvc repro allocate` again"


@pytest.mark.parametrize("text", ["", "[1]", '{"steps": 3}'])
def test_a_damaged_trajectory(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trajectory.json"
    assert message_of(lambda: read_trajectory(path)) == f"there is no trajectory at {path}; run `dvc repro search`"
    path.write_text(text)
    message = message_of(lambda: read_trajectory(path))
    assert str(path) in message
    assert "run `dvc repro search`" in message


def test_no_trajectory_because_no_method_needs_one(tmp_path: Path) -> None:
    write_sealed(tmp_path / "trajectory.json", {})
    trajectory = read_trajectory(tmp_path / "trajectory.json")
    message = message_of(lambda: check_trajectory_format(trajectory))
    assert message.startswith(
        "nothing was searched, because no method of params.yaml needs it; add autoslim to methods"
    )


def test_no_supernet_because_no_method_needs_one(tmp_path: Path) -> None:
    SupernetFile.write_none(tmp_path)
    message = message_of(lambda: SupernetFile.read(tmp_path))
    assert message.startswith(f"{tmp_path} contains no supernet, because no method of params.yaml needs one")


def test_a_trajectory_of_another_version() -> None:
    message = message_of(lambda: check_trajectory_format({"format": 1, "steps": []}))
    assert (
        message == "outputs/search/trajectory.json was written by another version of autoslim; run `dvc repro search`"
    )


def test_steps_are_restored_from_json() -> None:
    _, graph = small_network()
    channels = graph.scaled(0.5, 2)
    step = SlimmingStep(
        ("features.0.0",),
        channels,
        graph.params(channels),
        Score(1 / 3, 0.1 + 0.2),
        {"features.4.0": Option(8, 123, 0.1)},
        {"features.4.0": Score(2 / 7, 1e-17)},
        ("features.4.0",),
    )
    values = json.loads(json.dumps(step_to_dict(step, Costs(graph))))
    assert step_from_dict(values) == step
    assert (values["macs"], values["params"]) == (graph.macs(channels), graph.params(channels))
