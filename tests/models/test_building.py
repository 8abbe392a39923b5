"""Construction of networks by name, and the errors for invalid names."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import message_of
from paths import ROOT
from torch import Tensor, nn
from torchvision.models import ResNet

from autoslim.data.prepared import DataInfo
from autoslim.models.building import build_network, check_network
from autoslim.tasks.classification import CLASSIFICATION

FILE = '''
"""A user's network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass
class Size:
    width: int = 4


def small(num_classes: int = 3, size: Size = Size()) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, size.width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(size.width, num_classes))


def plain(classes: int = 5):
    return nn.Linear(2, classes)


def passing_on(**kwargs):
    return plain(**kwargs)


def neighbour():
    from random_neighbour import net
    return net()


def nothing():
    return 3


NUMBER = 1
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "random.py"  # the name of a standard module
    path.write_text(FILE)
    return path


# Valid names


def test_a_networks_import_path() -> None:
    network = build_network("torchvision.models:resnet18", {"zero_init_residual": True}, classes=7)
    assert isinstance(network, ResNet)
    assert network.fc.out_features == 7
    assert not network.layer1[0].bn2.weight.any()


def test_classes_are_passed_if_accepted_and_not_in_kwargs(file: Path) -> None:
    assert build_network("torchvision.models:resnet18", {"num_classes": 4}, classes=7).fc.out_features == 4
    assert build_network(f"{file}:small", {}, classes=9)[3].out_features == 9
    assert build_network(f"{file}:small", {})[3].out_features == 3
    assert build_network(f"{file}:plain", {}, classes=9).out_features == 5
    assert build_network(f"{file}:passing_on", {"classes": 8}, classes=9).out_features == 8
    assert "with model.kwargs {'widht': 8} cannot be built: plain() got an unexpected" in message_of(
        lambda: build_network(f"{file}:passing_on", {"widht": 8}, classes=9)
    )


def test_a_users_file_imports_its_neighbours_also_when_the_network_is_built(file: Path) -> None:
    (file.parent / "random_neighbour.py").write_text("from torch import nn\ndef net(): return nn.Linear(2, 6)\n")
    assert build_network(f"{file}:neighbour", {}).out_features == 6


def test_loading_a_users_file_does_not_change_sys_modules(file: Path) -> None:
    """The file may have the name of any module."""
    before = dict(sys.modules)
    build_network(f"{file}:small", {})
    assert sys.modules["random"] is before["random"]
    assert sys.modules.keys() == before.keys()


# Invalid names


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("resnet18", {}, ["model.name 'resnet18' is not an import path", "package.module:callable"]),
        ("torchvision.models:", {}, ["is not an import path"]),
        (":resnet18", {}, ["is not an import path"]),
        ("no.such.package:net", {}, ["model.name 'no.such.package:net' cannot be imported: No module named 'no'"]),
        (
            "torchvision.models:resnet19",
            {},
            ["torchvision.models has no callable 'resnet19'", "resnet18"],
        ),
        ("torchvision.models:zzz", {}, ["torchvision.models has no callable 'zzz'"]),
        ("torchvision.models:__name__", {}, ["has no callable '__name__'"]),
        ("builtins:dict", {}, ["model.name 'builtins:dict' returns dict, not a torch module"]),
        (
            "torchvision.models:resnet18",
            {"widht": 3},
            ["model.kwargs {'widht': 3} cannot be built: ", "correct model.kwargs"],
        ),
        (
            "missing/net.py:small",
            {},
            ["model.name names the file 'missing/net.py', which does not exist"],
        ),
    ],
)
def test_names_that_cannot_be_built(name: str, kwargs: dict[str, Any], words: list[str]) -> None:
    message = message_of(lambda: build_network(name, kwargs, classes=10))
    assert all(word in message for word in words), message


def test_files_that_cannot_be_built(file: Path, tmp_path: Path) -> None:
    assert "returns int, not a torch module" in message_of(lambda: build_network(f"{file}:nothing", {}))
    assert "has no callable 'NUMBER'" in message_of(lambda: build_network(f"{file}:NUMBER", {}))
    assert "has no callable 'smal'; similar names are small" in message_of(lambda: build_network(f"{file}:smal", {}))
    broken = tmp_path / "broken.py"
    broken.write_text("def net(:\n")
    assert "cannot be imported: invalid syntax" in message_of(lambda: build_network(f"{broken}:net", {}))


def test_the_error_without_timm_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert message_of(lambda: build_network("timm:resnet18", {})) == (
        "model.name 'timm:resnet18' needs timm; install it with `pip install timm`"
    )


# Input and output


def images(channels: int, height: int, width: int, classes: int = 10) -> DataInfo:
    names = tuple(map(str, range(classes)))
    return DataInfo("digits", names, channels, (height, width), (), (), {}, storage="arrays")


def test_checking_a_network_does_not_change_it() -> None:
    network = build_network("torchvision.models:resnet18", {}, classes=10).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    check_network(network, "resnet18", images(3, 32, 32), CLASSIFICATION)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "classes", "expected"),
    [
        ((3, 32, 32), 7, "model 'net' returns 10 outputs for 7 classes of data; set model.kwargs.num_classes: 7"),
        ((1, 32, 32), 10, "model 'net' does not accept images of 1x32x32: "),
    ],
)
def test_a_network_that_does_not_fit(shape: tuple[int, int, int], classes: int, expected: str) -> None:
    network = build_network("torchvision.models:resnet18", {}, classes=10)
    assert expected in message_of(
        lambda: check_network(network, "net", images(*shape, classes=classes), CLASSIFICATION)
    )


class Two(nn.Module):
    def forward(self, image: Tensor, depth: Tensor, scale: float = 1.0) -> Tensor:
        return image + scale * depth


def test_a_network_with_two_inputs_is_not_told_to_change_the_image_size() -> None:
    message = message_of(lambda: check_network(Two(), "net", images(3, 8, 8), CLASSIFICATION))
    assert message.startswith(
        "model 'net' has the inputs image, depth, but the data have a batch of images as the only input"
    )


class Several(nn.Module):
    def forward(self, images: Tensor) -> Any:
        return {"logits": images, "features": images}


def test_outputs_that_are_not_logits() -> None:
    assert "model 'net' returns dict outputs for 10 classes" in message_of(
        lambda: check_network(Several(), "net", images(3, 8, 8), CLASSIFICATION)
    )
    assert "returns (2, 3, 8, 8) outputs for 10 classes" in message_of(
        lambda: check_network(nn.Identity(), "net", images(3, 8, 8), CLASSIFICATION)
    )


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = images.mean((2, 3))
        logits: Tensor = self.head(maps if float(maps.sum()) >= 0 else -maps)
        return logits


def test_a_network_with_data_dependent_control_flow_is_run_on_its_device() -> None:
    check_network(DataDependent(), "net", images(3, 8, 8), CLASSIFICATION)
    assert "returns 10 outputs for 4 classes" in message_of(
        lambda: check_network(DataDependent(), "net", images(3, 8, 8, classes=4), CLASSIFICATION)
    )


# Start-up


def test_slow_packages_are_not_imported_before_they_are_needed() -> None:
    modules = (
        "autoslim.models.building, autoslim.models.pretrained, autoslim.models.released, "
        "autoslim.resources.latency.measure, autoslim.report.table"
    )
    slow = ("torchvision", "timm", "scipy.stats", "sklearn", "matplotlib", "onnx", "onnxruntime", "mlflow")
    code = f"import sys, {modules}; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
