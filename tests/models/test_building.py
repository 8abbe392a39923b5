"""Networks by name, and what is said where a name leads nowhere."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closure import ROOT
from torch import Tensor, nn
from torchvision.models import ResNet

from autoslim.errors import UserError
from autoslim.models.building import build_network, check_network

FILE = '''
"""A user's own network."""

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


def handing_on(**kwargs):
    return plain(**kwargs)


def beside():
    from random_neighbour import net
    return net()


def nothing():
    return 3


NUMBER = 1
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "random.py"  # also a module's name
    path.write_text(FILE)
    return path


def told(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


# What is found


def test_a_networks_import_path() -> None:
    network = build_network("torchvision.models:resnet18", {"zero_init_residual": True}, classes=7)
    assert isinstance(network, ResNet)
    assert network.fc.out_features == 7
    assert not network.layer1[0].bn2.weight.any()


def test_classes_are_handed_on_where_they_are_taken_and_not_given(file: Path) -> None:
    assert build_network("torchvision.models:resnet18", {"num_classes": 4}, classes=7).fc.out_features == 4
    assert build_network(f"{file}:small", {}, classes=9)[3].out_features == 9
    assert build_network(f"{file}:small", {})[3].out_features == 3
    assert build_network(f"{file}:plain", {}, classes=9).out_features == 5
    assert build_network(f"{file}:handing_on", {"classes": 8}, classes=9).out_features == 8
    assert "with model.kwargs {'widht': 8} cannot be built: plain() got an unexpected" in told(
        lambda: build_network(f"{file}:handing_on", {"widht": 8}, classes=9)
    )


def test_what_lies_beside_a_users_file_is_imported_when_the_network_is_built_too(file: Path) -> None:
    (file.parent / "random_neighbour.py").write_text("from torch import nn\ndef net(): return nn.Linear(2, 6)\n")
    assert build_network(f"{file}:beside", {}).out_features == 6


def test_a_users_file_is_loaded_without_a_trace(file: Path) -> None:
    """Its name may be that of any module."""
    before = dict(sys.modules)
    build_network(f"{file}:small", {})
    assert sys.modules["random"] is before["random"]
    assert sys.modules.keys() == before.keys()


# What is not


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("resnet18", {}, ["model.name 'resnet18' is not an import path; write package.module:callable"]),
        ("torchvision.models:", {}, ["is not an import path"]),
        (":resnet18", {}, ["is not an import path"]),
        ("no.such.package:net", {}, ["model.name 'no.such.package:net' cannot be imported: No module named 'no'"]),
        (
            "torchvision.models:resnet19",
            {},
            ["torchvision.models has no callable 'resnet19'; it has resnet", "resnet18"],
        ),
        ("torchvision.models:zzz", {}, ["has no callable 'zzz'; look up its names"]),
        ("torchvision.models:__name__", {}, ["has no callable '__name__'"]),
        ("builtins:dict", {}, ["model.name 'builtins:dict' returns dict, not a torch module"]),
        (
            "torchvision.models:resnet18",
            {"widht": 3},
            ["model.kwargs {'widht': 3} cannot be built: ", "widht", "; correct model.kwargs"],
        ),
        (
            "missing/net.py:small",
            {},
            ["model.name names the file 'missing/net.py', which does not exist; give its path"],
        ),
    ],
)
def test_what_cannot_be_built(name: str, kwargs: dict[str, Any], words: list[str]) -> None:
    message = told(lambda: build_network(name, kwargs, classes=10))
    assert all(word in message for word in words), message


def test_what_cannot_be_built_from_a_file(file: Path, tmp_path: Path) -> None:
    assert "returns int, not a torch module" in told(lambda: build_network(f"{file}:nothing", {}))
    assert "has no callable 'NUMBER'" in told(lambda: build_network(f"{file}:NUMBER", {}))
    assert "has no callable 'smal'; it has small" in told(lambda: build_network(f"{file}:smal", {}))
    broken = tmp_path / "broken.py"
    broken.write_text("def net(:\n")
    assert "cannot be imported: invalid syntax" in told(lambda: build_network(f"{broken}:net", {}))


def test_timm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert told(lambda: build_network("timm:resnet18", {})) == (
        "model.name 'timm:resnet18' needs timm; install it with `pip install timm`"
    )


# What fits the data


def test_a_network_that_fits_is_not_touched() -> None:
    network = build_network("torchvision.models:resnet18", {}, classes=10).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    check_network(network, "resnet18", (3, 32, 32), 10)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ((3, 32, 32), 7, "model 'net' gives 10 outputs for 7 classes of data; set model.kwargs.num_classes: 7"),
        ((1, 32, 32), 10, "model 'net' does not take images of 1x32x32: "),
    ],
)
def test_a_network_that_does_not_fit(shape: tuple[int, int, int], classes: int, message: str) -> None:
    network = build_network("torchvision.models:resnet18", {}, classes=10)
    assert message in told(lambda: check_network(network, "net", shape, classes))


class Several(nn.Module):
    def forward(self, images: Tensor) -> Any:
        return {"logits": images, "features": images}


def test_outputs_that_are_no_logits() -> None:
    assert "model 'net' gives dict outputs for 10 classes" in told(
        lambda: check_network(Several(), "net", (3, 8, 8), 10)
    )
    assert "gives (2, 3, 8, 8) outputs for 10 classes" in told(
        lambda: check_network(nn.Identity(), "net", (3, 8, 8), 10)
    )


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = images.mean((2, 3))
        logits: Tensor = self.head(maps if float(maps.sum()) >= 0 else -maps)
        return logits


def test_a_network_that_depends_on_data_is_run_for_real() -> None:
    check_network(Chooses(), "net", (3, 8, 8), 10)
    assert "gives 10 outputs for 4 classes" in told(lambda: check_network(Chooses(), "net", (3, 8, 8), 4))


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
