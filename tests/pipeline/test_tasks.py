"""Tasks other than the classification of images, from the user's files to the report."""

import csv
import json
import re
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import error_from, printed
from paths import ROOT
from small_project import RUNS, one_thread
from tiny import merged, write_params

from autoslim.pipeline.params import load_params, read_yaml
from autoslim.pipeline.retrain import load_retrained

SMALL: dict[str, Any] = {
    "methods": ["uniform", "autoslim"],
    "data": {"search_images": 32},
    "supernet": {"epochs": 2, "batch_size": 16, "random_widths": 1, "grid": {"steps": 4}},
    "search": {"chunk": 16, "stop": 0.5},
    "retrain": {"epochs": 2, "batch_size": 16, "seeds": [0, 1]},
    "tracking": {"enabled": False},
    "runtime": {"workers": 0},
}
SEGMENTATION_DATA = """import torch
from torch.utils.data import Dataset


class Squares(Dataset):
    # Images with a bright or a dark square, and masks whose upper row is to be ignored.
    classes = ["background", "bright", "dark"]

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        top, left = torch.randint(1, 8, (2,), generator=generator).tolist()
        kind = 1 + index % 2
        image = 0.3 * torch.randn(3, 12, 12, generator=generator)
        mask = torch.zeros(12, 12, dtype=torch.int64)
        image[:, top : top + 4, left : left + 4] += 3 - 2 * kind
        mask[top : top + 4, left : left + 4] = kind
        mask[0] = 255
        return image, mask


def build():
    return Squares(96, 0), Squares(32, 1)
"""
SEGMENTATION_NETWORK = """from torch import nn


class Network(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images):
        return {"out": self.head(self.second(self.first(images)))}


def build(num_classes=21, width=8):
    return Network(num_classes, width)
"""
VECTOR_DATA = """import torch
from torch.utils.data import Dataset


class Points(Dataset):
    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        image = torch.randn(3, 8, 8, generator=generator)
        means = image.mean((1, 2))
        return image, TARGET


def build():
    return Points(96, 0), Points(32, 1)
"""
VECTOR_NETWORK = """from torch import nn


def build(num_classes=10, width=8):
    first = nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(width, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, num_classes))
"""
DEPTH_NETWORK = """from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, image):
        return {"depth": self.head(self.body(image))[:, 0]}


def build():
    return Network()
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a new git repository, which is the working directory."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    return tmp_path


def make(task: str, data: str, network: str, **changes: Any) -> None:
    """Makes a project for files of the user's in the working directory, with parameters for a short run."""
    Path("my_data.py").write_text(data)
    Path("net.py").write_text(network)
    printed("init", "--data", "my_data.py:build", "--model", "net.py:build", "--task", task, "--budget", "50%")
    write_params(Path(), merged(merged(read_yaml(Path("params.yaml")), SMALL), changes))


def run_stages() -> None:
    with one_thread():
        for name, *arguments in RUNS:
            import_module(f"autoslim.pipeline.{name}").run(*arguments)


def compared() -> dict[str, dict[str, str]]:
    with Path("outputs/report/comparison.csv").open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_segmentation(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("segmentation", SEGMENTATION_DATA, SEGMENTATION_NETWORK)
    run_stages()
    assert "mean IoU" in capsys.readouterr().out
    table = Path("outputs/report/table.md").read_text()
    assert "| mean IoU on test (%) | gain over uniform (points) | pixel accuracy on test (%) |" in table
    assert "Mean IoU on the search split" in table
    row = compared()["autoslim"]
    ious, accuracies = zip(*(counted("autoslim", seed) for seed in (0, 1)), strict=True)
    assert float(row["mean_iou"]) == pytest.approx(np.mean(ious), rel=1e-5)
    assert float(row["pixel_accuracy"]) == pytest.approx(np.mean(accuracies), rel=1e-5)
    trajectory = json.loads(Path("outputs/search/trajectory.json").read_text())
    assert trajectory["scores"]["error"]["name"] == "pixel_accuracy"
    assert all(0 <= step["error"] <= 1 and step["cross_entropy"] > 0 for step in trajectory["steps"])
    metrics = json.loads(Path("outputs/supernet/metrics.json").read_text())
    assert set(metrics["widest"]) == {"pixel_accuracy", "cross_entropy"}
    assert "pixel accuracy (%)" in printed("trajectory")
    assert "mean IoU on test (%)" in printed("compare")
    report = json.loads(Path("outputs/report/metrics.json").read_text())
    assert report["autoslim"]["mean_iou"] == float(row["mean_iou"])
    check_shares_of_pixels()


def check_shares_of_pixels() -> None:
    source: dict[str, Any] = {}
    exec(SEGMENTATION_DATA, source)
    image, _ = source["Squares"](32, 1)[0]
    Path("inputs").mkdir()
    np.save("inputs/one.npy", image.numpy())
    [shown] = json.loads(printed("predict", "autoslim", "inputs", "--json"))
    with torch.no_grad():
        classes = load_retrained(load_params(), "autoslim", 0).network(image[None])["out"].argmax(1)
    shares = {name: float((classes == number).double().mean()) for number, name in enumerate(source["Squares"].classes)}
    assert shown["input"] == "inputs/one.npy"
    assert shown["pixels"] == pytest.approx({name: share for name, share in shares.items() if share})
    assert list(shown["pixels"].values()) == sorted(shown["pixels"].values(), reverse=True)


def counted(method: str, seed: int) -> tuple[float, float]:
    """Returns the mean intersection over union and the accuracy of the pixels that are not ignored, from a count."""
    network = load_retrained(load_params(), method, seed).network
    source: dict[str, Any] = {}
    exec(SEGMENTATION_DATA, source)
    images, masks = (
        torch.stack(column) for column in zip(*(source["Squares"](32, 1)[i] for i in range(32)), strict=True)
    )
    with torch.no_grad():
        found = network(images)["out"].argmax(1)[masks != 255].numpy()
    masks = masks[masks != 255].numpy()
    both = [(found == each) & (masks == each) for each in range(3)]
    either = [(found == each) | (masks == each) for each in range(3)]
    ious = [b.sum() / e.sum() for b, e in zip(both, either, strict=True)]
    return float(np.mean(ious)), float((found == masks).mean())


def stacked(samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the inputs and the targets of all samples."""
    inputs, targets = zip(*(samples[number] for number in range(len(samples))), strict=True)
    return torch.stack(inputs), torch.stack(targets)


@pytest.mark.parametrize(
    ("task", "target", "main", "other"),
    [
        ("multilabel", "(means > 0).float()", "map", "label_accuracy"),
        ("regression", "means[0]", "mae", "r2"),
    ],
)
def test_numbers_and_labels(repository: Path, task: str, target: str, main: str, other: str) -> None:
    make(task, VECTOR_DATA.replace("TARGET", target), VECTOR_NETWORK)
    run_stages()
    row = compared()["autoslim"]
    params = load_params()
    found = []
    for seed in params.retrain.seeds:
        network = load_retrained(params, "autoslim", seed).network
        source: dict[str, Any] = {}
        exec(Path("my_data.py").read_text(), source)
        images, targets = stacked(source["Points"](32, 1))
        with torch.no_grad():
            output = network(images)
        if task == "multilabel":
            found.append([average_precision(output, targets), float(((output > 0) == targets.bool()).float().mean())])
        else:
            errors = output[:, 0] - targets
            spread = float((targets - targets.mean()).square().sum())
            found.append([float(errors.abs().mean()), 1 - float(errors.square().sum()) / spread])
    assert [float(row[main]), float(row[other])] == pytest.approx(np.mean(found, axis=0), rel=1e-4)
    means = {
        method: json.loads(Path(f"outputs/retrain/{method}/metrics.json").read_text())[f"search_{main}"]["mean"]
        for method in ("uniform", "autoslim")
    }
    best = (min if task == "regression" else max)(means, key=means.__getitem__)
    assert json.loads(Path("outputs/report/metrics.json").read_text())["choice"]["method"] == best
    gain = float(row["gain"])
    difference = float(row[main]) - float(compared()["uniform"][main])
    assert gain == pytest.approx(-difference if task == "regression" else difference)

    printed("export", "autoslim", "--to", "net.pt2")
    np.save("inputs.npy", images.numpy())
    for options in (["net.pt2"], ["autoslim", "--seed", "0"]):
        shown = json.loads(printed("predict", *options, "inputs.npy", "--json"))
        assert [each["input"] for each in shown] == [f"inputs.npy[{index}]" for index in range(32)]
        with torch.no_grad():
            outputs = load_retrained(params, "autoslim", 0).network(images)
        for each, output in zip(shown, outputs, strict=True):
            if task == "regression":
                assert each["values"] == pytest.approx(output.tolist(), abs=1e-6)
            else:
                expected = {str(label): float(share) for label, share in enumerate(output.sigmoid())}
                assert each["probabilities"] == pytest.approx(expected, abs=1e-6)
                assert sorted(each["labels"]) == [label for label, share in expected.items() if share >= 0.5]
    assert printed("predict", "net.pt2", "inputs.npy").splitlines()[0].split() == (
        ["input", "value"] if task == "regression" else ["input", "labels", "(%)"]
    )


def average_precision(output: torch.Tensor, targets: torch.Tensor) -> float:
    """Returns the mean over the labels of the average precision, from its definition."""
    values = []
    for scores, labels in zip(output.T, targets.T, strict=True):
        hits = labels[scores.argsort(descending=True)]
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        values.append(float((precision * hits).sum() / hits.sum()))
    return float(np.mean(values))


def test_init_for_a_task_without_distillation(repository: Path) -> None:
    page = (ROOT / "docs/guide/tasks.md").read_text()
    data, task, _ = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    Path("my_task.py").write_text(re.sub(r"    def distillation.*?\n\n", "", task, flags=re.S))
    make("my_task.py:Depth", data, DEPTH_NETWORK)
    assert not load_params().supernet.distillation
    Path("my_task.py").write_text(task)
    Path("params.yaml").unlink()
    make("my_task.py:Depth", data, DEPTH_NETWORK)
    assert load_params().supernet.distillation


def test_the_example_of_the_guide(repository: Path) -> None:
    page = (ROOT / "docs/guide/tasks.md").read_text()
    data, task, derived = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    Path("my_task.py").write_text(task)
    make("my_task.py:Depth", data, DEPTH_NETWORK)
    run_stages()
    assert {"rmse", "relative_error"} <= set(compared()["autoslim"])
    assert error_from("predict", "autoslim", "net.py").startswith("the task is depth, a class of your own, and only")
    names: dict[str, Any] = {}
    exec(derived, names)
    assert float(names["Weighted"]().loss(torch.randn(2, 2, 4, 4), torch.zeros(2, 4, 4))) > 0
    assert (
        "| RMSE on test (m) | gain over uniform (m) | relative error on test (%) |"
        in Path("outputs/report/table.md").read_text()
    )
