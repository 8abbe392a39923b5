"""Runs every stage as for ImageNet: JPEG files of many sizes, worker processes that decode, and 224x224 pixels.

Also compares the presets' budgets with what their searches reach.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from independent_counts import counted
from paths import ROOT
from PIL import Image
from safetensors.torch import load_file
from small_project import stage, start_project
from tiny import merged, write_params

from autoslim import resize, trace
from autoslim.channels.copying import on_meta
from autoslim.data import prepared
from autoslim.errors import UserError
from autoslim.models.building import build_network
from autoslim.pipeline.checks import check_reach
from autoslim.pipeline.params import check_params, load_params, read_yaml
from autoslim.resources.budgets import parse_budget

PRESET = ROOT / "presets/imagenet-mobilenet_v2.yaml"
BUDGET = 305e6  # MACs at 224x224, as in the preset
CLASSES = ("cat", "dog", "fish", "owl")
SIZES = (300, 240), (240, 300), (256, 256), (500, 375), (180, 200)  # width, height; the last is scaled up
STEPS = 16  # of supernet training, in one epoch

# Network, width, image size, precision and schedule are those of the preset; the learning rate follows the batch.
SMALLER: dict[str, Any] = {
    "data": {"search_images": 16},
    "supernet": {"epochs": 1, "batch_size": 2, "grid": {"steps": 2}, "optimiser": {"learning_rate": 0.001}},
    "search": {"stop": 1.0, "images": 2, "chunk": 2},
    "retrain": {"epochs": 1, "batch_size": 8, "optimiser": {"learning_rate": 0.002}},
    "tracking": {"enabled": False},
    "runtime": {"device": "cpu", "threads": 1, "workers": 2},
}


def write_images(folder: Path) -> None:
    """Writes 12 training and 4 validation images per class: stripes in a direction for each class, with noise."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                width, height = SIZES[number % len(SIZES)]
                down, right = np.mgrid[:height, :width]
                angle = label * np.pi / len(CLASSES)
                wave = np.sin((down * np.cos(angle) + right * np.sin(angle)) / 8 + draw.uniform(0, 6))
                pixels = 128 + 80 * wave[..., None] + draw.normal(0, 20, (height, width, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / part / name / f"{number:03}.jpg", quality=85)


def preset_project(folder: Path, images: Path, changes: dict[str, Any]) -> Path:
    start_project(folder)
    values = merged(read_yaml(PRESET), SMALLER)
    write_params(folder, merged(merged(values, {"data": {"source": f"folder:{images}"}}), changes))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def project(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a project with a smaller version of the preset in which every stage has run."""
    folder = preset_project(tmp_path_factory.mktemp("preset"), images, {})
    with contextlib.chdir(folder):
        for arguments in (["prepare"], ["resources"], ["supernet"], ["search"], ["allocate"]):
            stage(*arguments)
        for method in ("uniform", "autoslim"):
            stage("retrain", method)
        stage("report")
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# The whole path


def test_images_are_not_copied(project: Path) -> None:
    info = read(project / "data/prepared/data.json")
    assert info["storage"] == "files"
    assert (info["channels"], info["image_size"], info["resize"]) == (
        3,
        [224, 224],
        224,
    )  # the median image is 240 high
    assert info["counts"] == {"train": 32, "search": 16, "test": 16}
    assert sorted(path.name for path in (project / "data/prepared").iterdir()) == ["data.json", "manifest.csv"]


@pytest.mark.parametrize(("method", "share"), [("uniform", 0.99), ("autoslim", 0.8)])
def test_the_network_chosen_is_within_the_budget_by_an_independent_count(
    project: Path, method: str, share: float
) -> None:
    """torchvision's network is resized and gets the weights. It uses as much of the budget as the grid allows."""
    network = torchvision.models.mobilenet_v2(num_classes=len(CLASSES))
    channels = read(project / f"outputs/channels/{method}.json")["channels"]
    plain = resize(network, trace(network, torch.empty(1, 3, 224, 224)), channels)
    plain.load_state_dict(load_file(project / f"outputs/retrain/{method}/weights/seed-1995.safetensors"))
    macs = counted(plain, (3, 224, 224))
    assert share * BUDGET < macs <= BUDGET
    assert read(project / "outputs/report/metrics.json")[method]["macs"] == macs


def test_autoslim_is_the_first_of_the_trajectory_within_the_budget(project: Path) -> None:
    steps = read(project / "outputs/search/trajectory.json")["steps"]
    macs = [step["macs"] for step in steps]
    first = next(number for number, cost in enumerate(macs) if cost <= BUDGET)
    assert macs == sorted(macs, reverse=True)
    assert 600e6 < macs[0] < 700e6  # the supernet is 1.5 times as wide
    assert read(project / "outputs/channels/autoslim.json")["channels"] == steps[first]["channels"]


def test_the_report_has_both_methods_and_its_figures(project: Path) -> None:
    lines = (project / "outputs/report/table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith(("| uniform", "| autoslim"))] == [
        "| uniform",
        "| autoslim",
    ]
    for figure in ("trajectory", "channels", "curves"):
        assert (project / f"outputs/report/{figure}.png").stat().st_size > 10_000


# Resuming


def test_a_supernet_killed_within_an_epoch_continues_to_the_same_weights(
    project: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL in the middle of an epoch, weights are bitwise equal, with images decoded by workers."""
    folder = preset_project(tmp_path / "killed", images, {"runtime": {"checkpoint_minutes": 0}})
    monkeypatch.chdir(folder)
    stage("prepare")
    kill_after_checkpoint(folder)
    (saved,) = (folder / "checkpoints").glob("supernet-*/supernet.pt")
    done = torch.load(saved, weights_only=True)["step"]
    assert 0 < done < STEPS

    steps, readers = count_steps(monkeypatch), record_readers(monkeypatch, tmp_path / "readers")
    stage("supernet")
    assert len(steps) == STEPS - done
    weights = [load_file(where / "outputs/supernet/weights.safetensors") for where in (project, folder)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    processes = set(readers.read_text().split())
    assert len(processes) >= 2
    assert str(os.getpid()) not in processes


def kill_after_checkpoint(folder: Path) -> None:
    """Starts the stage as DVC does and kills it as soon as it has written its first checkpoint."""
    with subprocess.Popen(
        [sys.executable, ROOT / "stages/supernet.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        late = time.monotonic() + 180
        while not list((folder / "checkpoints").glob("supernet-*/supernet.pt")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < late
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that grows by one item at each step of the optimiser."""
    done: list[int] = []
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any) -> Any:
        done.append(len(done))
        return original(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    return done


def record_readers(monkeypatch: pytest.MonkeyPatch, path: Path) -> Path:
    """Writes the id of the decoding process to ``path`` for each image. Workers are forks and inherit this."""
    original = prepared.open_image

    def record(*args: Any) -> Image.Image:
        with path.open("a") as file:
            print(os.getpid(), file=file)
        return original(*args)

    monkeypatch.setattr(prepared, "open_image", record)
    return path


# The presets' budgets


@pytest.mark.parametrize(
    ("family", "budgets"),
    [
        ("mobilenet_v1", ["150M", "325M", "572M"]),
        ("mobilenet_v2", ["207M", "305M", "505M"]),
        ("mnasnet", ["217M", "315M", "532M"]),
        ("resnet50", ["570M", "1G", "2G", "3G"]),
    ],
)
def test_a_presets_budgets_are_reached_by_its_search(family: str, budgets: list[str]) -> None:
    """They are checked at 224x224 and 1000 classes on the meta device. A tenth below the lowest is out of reach."""
    path = ROOT / f"presets/imagenet-{family}.yaml"
    header = path.read_text().splitlines()[0]
    assert re.findall(r"\b[0-9.]+[MG]\b", header.partition("budgets")[2]) == budgets
    params = load_params(path)
    assert str(params.budget) in budgets
    graph = trace(on_meta(build_network(params.model.name, params.model.kwargs, 1000)), torch.empty(1, 3, 224, 224))
    values = read_yaml(path)
    for budget in budgets:
        (reach,) = check_reach(check_params(values | {"budget": budget}, "test"), graph)
        assert reach.stop <= reach.budget == parse_budget(budget).amount <= reach.widest
    least = 0.9 * parse_budget(budgets[0]).amount
    with pytest.raises(UserError, match="the end of the search"):
        check_reach(check_params(values | {"budget": least}, "test"), graph)
