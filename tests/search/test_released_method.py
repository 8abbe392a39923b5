"""A released list as a method: chosen, retrained, evaluated and exported, without a supernet or a search."""

import json
from contextlib import chdir
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_project import stage, start_project
from typer.testing import CliRunner

from autoslim.cli.main import app
from autoslim.models.released import released
from autoslim.resources.budgets import format_amount

METHOD = "released/mobilenet_v2-207M"


def test_a_released_list_is_retrained_evaluated_and_exported(tmp_path: Path) -> None:
    model = {"name": "torchvision.models:mobilenet_v2", "kwargs": {"width_mult": 1.0}}
    folder = start_project(
        tmp_path / "project",
        {"methods": [METHOD], "model": model, "data": {"channels": 3}, "retrain": {"seeds": [3], "start": "scratch"}},
    )
    with chdir(folder):
        for name in ("prepare", "resources", "allocate"):
            stage(name)
        stage("retrain", METHOD)
        evaluated = CliRunner().invoke(app, ["evaluate", METHOD])
        exported = CliRunner().invoke(app, ["export", METHOD, "--to", "net.pt2"])
    assert evaluated.exit_code == exported.exit_code == 0, evaluated.output + exported.output
    assert f"method {METHOD}" in evaluated.output
    chosen = json.loads((folder / f"outputs/channels/{METHOD}.json").read_text())
    budget = json.loads((folder / "outputs/channels/budgets.json").read_text())[METHOD]
    assert budget == {"budget": format_amount(chosen["costs"]["macs"]), "resource": "macs"}  # for images of 8x8
    weights = load_file(folder / f"outputs/retrain/{METHOD}/weights/seed-3.safetensors")
    numbers = released("mobilenet_v2-207M").numbers  # in the authors' order: the stem, the first block, ..., the head
    assert weights["features.0.0.weight"].shape == (numbers[0], 3, 3, 3)
    assert weights["features.18.0.weight"].shape[0] == numbers[-2]
    assert weights["classifier.1.weight"].shape == (10, numbers[-2])
    thin = torch.export.load(folder / "net.pt2").module()
    assert thin(torch.zeros(5, 3, 8, 8)).shape == (5, 10)
    assert sum(p.numel() for p in thin.parameters()) == chosen["costs"]["params"]
