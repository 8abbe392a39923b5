"""A pipeline in which only a part of the network is slimmed, because the whole network cannot be traced."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_project import change_params, error_of, stage, start_project

from autoslim import Costs, trace
from autoslim.models.building import build_network
from autoslim.pipeline.project import CHANNELS, RETRAIN

NETWORK = """
import torch
from torch import nn


class Chooses(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        layers = [nn.Conv2d(1, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU()]
        self.backbone = nn.Sequential(*layers, nn.Conv2d(16, 8, 1))
        self.small, self.large = nn.Linear(8, num_classes), nn.Linear(8, num_classes)

    def forward(self, images):
        features = self.backbone(images).mean((2, 3))
        return self.large(features) if float(features.detach().abs().mean()) > 1 else self.small(features)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = {"name": "net.py:Chooses", "kwargs": {}, "part": "backbone"}
    folder = start_project(tmp_path / "project", {"model": model, "supernet": {"width": 1.0}})
    (folder / "net.py").write_text(NETWORK)
    monkeypatch.chdir(folder)
    return folder


def test_a_part_is_slimmed_within_the_network(project: Path) -> None:
    for name in ("prepare", "resources", "supernet", "search", "allocate"):
        stage(name)
    stage("retrain", "uniform")
    stage("retrain", "autoslim")
    assert "autoslim" in stage("report")
    network = build_network("net.py:Chooses", {}, 10)
    backbone = trace(network.backbone, torch.zeros(1, 1, 8, 8))
    for method in ("uniform", "autoslim"):
        allocation = json.loads((CHANNELS / f"{method}.json").read_text())
        channels = {name.removeprefix("backbone."): count for name, count in allocation["channels"].items()}
        assert allocation["costs"]["macs"] == backbone.macs(channels) <= 0.5 * backbone.macs()
        assert allocation["costs"]["params"] == Costs(backbone).of(channels, "params")
        weights = load_file(RETRAIN / method / "weights/seed-0.safetensors")
        assert weights["backbone.0.weight"].shape == (channels["0"], 1, 3, 3)
        assert weights["backbone.3.weight"].shape == (channels["3"], channels["0"], 3, 3)
        assert weights["small.weight"].shape == weights["large.weight"].shape == (10, 8)
    markdown = Path("outputs/report/table.md").read_text()
    assert markdown.count("us |") + markdown.count("us ±") + markdown.count("ms |") + markdown.count("ms ±") >= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": None}, "torch.fx cannot trace"),
        ({"part": "backbon"}, "part 'backbon' is not a module of Chooses; similar names: backbone"),
    ],
)
def test_a_wrong_part(project: Path, changes: dict[str, object], message: str) -> None:
    model = {"name": "net.py:Chooses", "kwargs": {}, "part": "backbone"} | changes
    change_params(project, {"model": model, "supernet": {"width": 1.0}})
    assert message in error_of("prepare")


def test_a_latency_budget_needs_the_whole_network(project: Path) -> None:
    model = {"name": "net.py:Chooses", "kwargs": {}, "part": "backbone"}
    change_params(project, {"model": model, "supernet": {"width": 1.0}, "resource": "latency"})
    stage("prepare")
    assert "latency requires a network that was traced as a whole" in error_of("resources")
