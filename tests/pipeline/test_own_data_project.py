"""The pipeline on data sets of the user's own: a new project, its deps, the keys of checkpoints, and all stages."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_line import error_from, facts, printed
from tiny import merged, write_params

from autoslim.data.prepared import read_info
from autoslim.pipeline.assembly import checkpoints, inputs
from autoslim.pipeline.params import load_params, read_yaml
from autoslim.pipeline.project import PREPARED, STAGES

DATA = """import torch
from torch.utils.data import Dataset


class Shapes(Dataset):
    classes = ["dark", "bright"]

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed + index)
        return torch.randn(3, 12, 12, generator=generator) + index % 2, index % 2


def brighter(image, label):
    return image + 0.1 * torch.randn(1), label


def build():
    return {"train": Shapes(96, 0), "test": Shapes(32, 1000), "train_transforms": brighter}
"""
NETWORK = """from torch import nn


def build(num_classes=10, width=8):
    first = nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU()
    second = nn.Conv2d(width, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
"""
SMALL: dict[str, Any] = {
    "methods": ["autoslim"],
    "data": {"search_images": 32},
    "supernet": {"epochs": 1, "batch_size": 16, "random_widths": 1, "grid": {"steps": 4}},
    "search": {"chunk": 16, "stop": 0.4},
    "retrain": {"epochs": 1, "batch_size": 16, "seeds": [0]},
    "tracking": {"enabled": False},
    "runtime": {"workers": 0},
}
READERS = [stage for stage in STAGES if stage != "resources"]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a git repository, which is the working directory, with a network and data of the user's."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    Path("net.py").write_text(NETWORK)
    Path("my_data.py").write_text(DATA)
    return tmp_path


def deps() -> dict[str, list[str]]:
    stages = read_yaml(Path("dvc.yaml"))["stages"]
    return {name: stage.get("do", stage).get("deps", []) for name, stage in stages.items()}


def test_init_names_the_file_among_the_deps_and_switches_the_transforms_of_images_off(repository: Path) -> None:
    shown = printed("init", "--preset", "cifar10", "--data", "my_data.py:build", "--model", "my_data.py:build")
    assert "git add" in shown
    assert "my_data.py" in shown.partition("git add")[2]
    params = load_params()
    assert params.data.source == "my_data.py:build"
    assert (params.data.image_size, params.data.channels, params.data.storage) == (None, None, "auto")
    assert params.supernet.augment.active == params.retrain.augment.active == {}
    assert {name: files.count("my_data.py") for name, files in deps().items()} == dict.fromkeys(STAGES, 1)


def test_init_in_a_folder_keeps_the_path_of_the_file(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed("init", "slimming", "--data", "my_data.py:build", "--model", "net.py:build")
    monkeypatch.chdir("slimming")
    assert load_params().data.source == "../my_data.py:build"
    assert [name for name, files in deps().items() if "../my_data.py" in files] == READERS
    assert facts(printed("check"))["data"] == "../my_data.py:build"


def test_a_file_that_dvc_does_not_track_and_parameters_without_effect(repository: Path) -> None:
    printed("init", "--model", "net.py:build")
    write_params(Path(), merged(read_yaml(Path("params.yaml")), {"data": {"source": "my_data.py:build"}}))
    message = (
        "supernet.augment has pad: 1, but it has no effect on the data sets of my_data.py:build, which do their own "
        "augmentation; set pad to 0, false or null"
    )
    assert message in error_from("check")
    off = {"augment": {"pad": 0, "flip": False, "area": None, "jitter": 0.0}}
    write_params(Path(), merged(read_yaml(Path("params.yaml")), {"supernet": off, "retrain": off}))
    assert error_from("check") == (
        "data.source is the file my_data.py, which DVC does not track: changing it would not rerun "
        f"{', '.join(READERS)}; run `autoslim init --upgrade`, which adds my_data.py to their deps in dvc.yaml"
    )
    printed("init", "--upgrade")
    assert [name for name, files in deps().items() if "my_data.py" in files] == READERS
    assert facts(printed("check"))["data"] == "my_data.py:build"
    write_params(Path(), merged(read_yaml(Path("params.yaml")), {"data": {"image_size": 32}}))
    assert "data.image_size is 32, but it has no effect on the data sets of my_data.py:build" in error_from("check")


def test_all_stages_run_on_own_data(repository: Path) -> None:
    printed("init", "--data", "my_data.py:build", "--model", "net.py:build", "--budget", "50%")
    write_params(Path(), merged(read_yaml(Path("params.yaml")), SMALL))
    printed("stage", "prepare")
    assert read_info(PREPARED).counts == {"train": 64, "search": 32, "test": 32}
    assert facts(printed("check"))["images"] == "3x12x12, 2 classes; 64 train, 32 search, 32 test"
    for stage in STAGES[1:]:
        printed("stage", stage, *(["autoslim"] if stage == "retrain" else []))
    assert "autoslim" in Path("outputs/report/table.md").read_text()
    before = checkpoints("search", *inputs(load_params().model, PREPARED)).folder
    with Path("my_data.py").open("a") as file:
        file.write("\n\nSCALE = 2\n")
    assert "my_data.py changed after the data were prepared" in error_from("stage", "search")
    printed("stage", "prepare")
    assert checkpoints("search", *inputs(load_params().model, PREPARED)).folder != before
