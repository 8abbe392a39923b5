"""Compares what ``autoslim`` prints with independent numbers. Exports load without autoslim."""

import contextlib
import csv
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from command_line import error_from, facts, printed, table
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_project import change_params, finished_project
from test_docs import commands, python_blocks
from typer.testing import CliRunner

from autoslim import load_elastic, trace
from autoslim.channels.graph import ChannelGraph
from autoslim.cli.main import app
from autoslim.cli.trajectory import print_steps
from autoslim.files import format_bytes
from autoslim.models.building import build_network
from autoslim.pipeline.params import load_params
from autoslim.resources.budgets import format_amount, format_named_amount

MOBILENET = "torchvision.models:mobilenet_v2"


@pytest.fixture(autouse=True)
def _outside_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a project in which all stages have run, as the working directory. No test changes it."""
    folder = finished_project(tmp_path_factory.getbasetemp())
    monkeypatch.chdir(folder)
    return folder


def graph_of(name: str) -> ChannelGraph:
    return trace(build_network(name, {}, None), torch.empty(1, 3, 224, 224))


# Starting


def test_help_imports_no_large_library() -> None:
    large = "torch", "torchvision", "mlflow", "sklearn", "matplotlib", "dvc", "scipy", "numpy", "filelock"
    code = f"""
import sys
from autoslim.cli.main import app
try:
    app(["--help"])
except SystemExit:
    pass
print("imported:", [name for name in {large} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: []\n")


def test_help_names_the_commands() -> None:
    command = [str(Path(sys.executable).with_name("autoslim")), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    module = [sys.executable, "-m", "autoslim", "--help"]
    assert subprocess.run(module, capture_output=True, text=True, check=True).stdout == shown
    for name in (
        "profile",
        "check",
        "trajectory",
        "compare",
        "evaluate",
        "export",
        "predict",
        "estimate",
        "stage",
        "latency",
    ):
        assert re.search(rf"\b{name}\b", shown)


@pytest.mark.parametrize(
    "command",
    [
        "profile",
        "check",
        "trajectory",
        "compare",
        "evaluate",
        "export",
        "predict",
        "estimate",
        "stage",
        "latency measure",
        "latency show",
    ],
)
def test_the_help_of_every_command_has_an_example(command: str) -> None:
    assert f"autoslim {command}" in printed(*command.split(), "--help").split("Example", 1)[1]


@pytest.mark.parametrize(
    "command",
    [
        ["profile"],
        ["check"],
        ["estimate", "--seconds", "0"],
        ["evaluate", "autoslim"],
        ["predict", "autoslim", "image.png"],
    ],
)
def test_the_output_of_own_code_is_not_part_of_json(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    made = torch.nn.Conv2d.__init__

    def printing(*arguments: Any, **options: Any) -> None:
        print("a layer of my network")
        made(*arguments, **options)

    monkeypatch.setattr(torch.nn.Conv2d, "__init__", printing)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "image.png")
    result = CliRunner().invoke(app, [str(tmp_path / a) if a.endswith(".png") else a for a in [*command, "--json"]])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    assert "a layer of my network" in result.stderr


# profile


def test_profile_works_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = printed("profile", MOBILENET, "--layers")
    groups, layers = table(text, "group"), table(text, "layer")
    assert len(groups) == 25
    assert groups[0] == {
        "group": "features.0.0",
        "channels": "32",
        "unit": "1",
        "members": "features.0.0, features.1.conv.0.0",
    }
    shown = facts(text)
    assert shown["MACs"] == "301M (300,774,272; with average pooling, as the authors count, 300,836,992)"
    assert shown["parameters"] == "3.5M (3,504,872)"
    values = json.loads(printed("profile", MOBILENET, "--json"))
    assert shown["memory"].endswith(f"({values['totals']['memory']:,} bytes: weights, activations)")
    assert values["totals"]["memory"] == graph_of(MOBILENET).memory()
    assert shown["keeps its size"] == "classifier.1: it is the network's output"
    # Without its empty cells:
    assert layers[-1] == {"layer": "(total)", "kind": "300,774,272", "in": "100", "out": "3,504,872"}
    assert list(tmp_path.iterdir()) == []


def test_profile_counts_what_the_resized_network_has() -> None:
    values = json.loads(printed("profile", MOBILENET, "--width", "0.75", "--classes", "10", "--json", "--verify"))
    reference = torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.75)
    # Below 1x, torchvision keeps 1280 channels in the last convolution, unlike a uniform width: counted separately.
    assert values["totals"]["params"] == values["ptflops"]["params"]
    assert values["totals"]["macs"] == values["ptflops"]["macs"]
    channels = {group["name"]: group["channels"] for group in values["groups"]}
    shapes = {name: module.out_channels for name, module in reference.named_modules() if name in channels}
    assert channels.pop("features.18.0") == 960
    assert shapes.pop("features.18.0") == 1280
    assert channels == shapes
    assert sum(layer["macs"] for layer in values["layers"]) == values["totals"]["macs"]
    normalised = sum(2 * m.num_features for m in reference.modules() if isinstance(m, torch.nn.BatchNorm2d))
    normalised -= 2 * (1280 - 960)
    assert sum(layer["params"] for layer in values["layers"]) + normalised == values["totals"]["params"]
    assert sum(layer["share"] for layer in values["layers"]) == pytest.approx(1)


NETWORK = """
import torch
from torch import nn

def build(num_classes=4, width=8, act="ReLU"):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), getattr(nn, act)(), nn.Conv2d(width, 6, 1, bias=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes),
    )

class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x).flatten(2)
        return self.head(((x @ x.transpose(1, 2)) @ x).mean(2))

def signal():
    return nn.Sequential(nn.Conv1d(1, 8, 5), nn.ReLU(), nn.Conv1d(8, 4, 3))

def video():
    return nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 3))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.depth, self.embed = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3), nn.Embedding(9, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, image, depth, tokens):
        return self.head((self.image(image) + self.depth(depth)).mean((2, 3)) + self.embed(tokens).mean(1))

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = build(6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.body(x)
        return self.head(-x if x.sum() > 0 else x)
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    return tmp_path


def test_profile_of_a_users_file(net: Path) -> None:
    text = printed(
        "profile", "net.py:build", "--input", "1x10x12", "--kwargs", "width=16", "-k", "act=Hardswish", "--layers"
    )
    assert [group["channels"] for group in table(text, "group")] == ["16", "6"]
    macs = 16 * 9 * 80 + 16 * 6 * 80 + 6 * 4  # 8 x 10 outputs
    pooling = 6 * 80
    assert facts(text)["MACs"].endswith(f"({macs:,}; with average pooling, as the authors count, {macs + pooling:,})")
    first, second, last, others, _ = table(text, "layer")
    assert [layer["parameters"] for layer in (first, second, last)] == ["160", "96", "28"]
    assert (first["in"], first["out"], second["in"], second["out"]) == ("1", "16", "16", "6")
    assert others["kind"] == "0"  # no normalisation: all parameters are in layers


def test_profile_takes_channels_from_a_file(net: Path) -> None:
    Path("channels.json").write_text(json.dumps({"method": "mine", "channels": {"0": 3, "2": 5}}))
    Path("bare.json").write_text(json.dumps({"0": 3, "2": 5}))
    text = printed("profile", "net.py:build", "--input", "1x10x12", "--channels", "channels.json", "--verify")
    assert [(group["channels"], group["default"]) for group in table(text, "group")] == [("3", "8"), ("5", "6")]
    macs = 3 * 9 * 80 + 3 * 5 * 80 + 5 * 4
    assert f"({macs:,};" in facts(text)["MACs"]
    counted = f"{macs:,} MACs, {3 * 10 + 3 * 5 + 5 * 4 + 4} parameters: equal"
    assert facts(text)["counted in a run"] == facts(text)["by ptflops"] == counted
    assert printed("profile", "net.py:build", "--input", "1x10x12", "--channels", "bare.json", "--verify") == text


def test_verify_names_what_budgets_do_not_include(net: Path) -> None:
    shown = facts(printed("profile", "net.py:Attends", "--input", "1x10x10", "--verify"))
    assert shown["not in budgets"] == f"{2 * 8 * 8 * 64:,} MACs of products of activations, as in attention"
    assert shown["counted in a run"] == f"{8 * 9 * 64 + 8 * 2:,} MACs, {8 * 10 + 9 * 2} parameters: equal"
    assert shown["by ptflops"] == shown["counted in a run"]


@pytest.mark.parametrize(
    ("name", "size", "macs"),
    [
        ("signal", "1x100", 8 * 5 * 96 + 4 * 8 * 3 * 94),
        ("video", "3x8x10x12", 8 * 3 * 27 * 6 * 8 * 10 + 4 * 8 * 27 * 4 * 6 * 8),
    ],
)
def test_profile_of_signals_and_videos(net: Path, name: str, size: str, macs: int) -> None:
    shown = facts(printed("profile", f"net.py:{name}", "--input", size, "--verify"))
    assert shown["network"] == f"net.py:{name} on {size} {'images' if size.count('x') == 2 else 'inputs'}"
    assert f"({macs:,};" in shown["MACs"]
    assert shown["by ptflops"].startswith(f"{macs:,} MACs")


def test_profile_of_a_network_with_several_inputs(net: Path) -> None:
    macs = 8 * 27 * 36 + 8 * 9 * 36 + 8 * 2
    for inputs in (("image=3x8x8", "depth=1x8x8", "tokens=5:int64"), ("3x8x8", "1x8x8", "5:int64")):
        options = [part for text in inputs for part in ("--input", text)]
        shown = facts(printed("profile", "net.py:Two", *options, "--verify"))
        assert shown["network"] == "net.py:Two on image=3x8x8, depth=1x8x8, tokens=5"
        assert f"({macs:,};" in shown["MACs"]
        assert shown["by ptflops"].startswith(f"{macs:,} MACs")
        values = json.loads(printed("profile", "net.py:Two", *options, "--json"))
        assert values["input"] == {"image": [3, 8, 8], "depth": [1, 8, 8], "tokens": [5]}


def test_profile_of_a_part(net: Path) -> None:
    text = printed("profile", "net.py:Detector", "--input", "1x10x12", "--part", "body", "--verify", "--layers")
    assert [group["group"] for group in table(text, "group")] == ["body.0", "body.2"]
    macs = 8 * 9 * 80 + 8 * 6 * 80 + 6 * 6
    shown = facts(text)
    assert shown["part"] == "body; all numbers are those of the part"
    assert f"({macs:,};" in shown["MACs"]
    assert shown["by ptflops"] == f"{macs:,} MACs, {80 + 48 + 42} parameters: equal"
    assert [layer["layer"] for layer in table(text, "layer")][:3] == ["body.0", "body.2", "body.5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.py:Two"], "missing a required argument: 'depth'); give an example of each input"),
        (["net.py:build", "--input", "image=1x9x9"], "Sequential.forward(input) cannot be called with the example"),
        (["net.py:Two", "--input", "image=3x8x8", "--input", "1x8x8"], "some of the --input options have a name and"),
        (["net.py:Two", "--input", "image=3x8x8", "--input", "image=3x8x8"], "--input image is given twice"),
        (["net.py:build", "--input", "1x0x9"], "--input '1x0x9' is not the size of an input"),
        (["net.py:build", "--input", "1x9x9:int65"], "--input '1x9x9:int65' is not the size of an input"),
        (["net.py:Detector", "--input", "1x9x9", "--part", "bod"], "part 'bod' is not a module of Detector; similar"),
        (["nosuch:thing"], "model.name 'nosuch:thing' cannot be imported"),
        (
            ["net.py:build", "--input", "10"],
            "--input '10' is not the size of an input",
        ),
        (
            ["net.py:build", "--input", "1x9x9", "--size", "9"],
            "--input and --size both set the image size",
        ),
        (["net.py:build", "--size", "9"], "does not run on an input of shape (1, 3, 9, 9): "),
        (["net.py:build", "--input", "1x9x9", "-k", "width"], "--kwargs 'width' is not KEY=VALUE"),
        (["net.py:build", "--input", "1x9x9", "-k", "width=[1"], "--kwargs 'width=[1': the value is not valid YAML"),
        (["net.py:build", "--input", "1x9x9", "--width", "0"], "--width 0 is not positive"),
        (
            ["net.py:Attends", "--classes", "3"],
            "got an unexpected keyword argument 'num_classes'; correct model.kwargs",
        ),
        (["net.py:build", "--input", "1x9x9", "--leaf", "7"], "model.leaves names '7', which is not a module of"),
        (
            ["net.py:build", "--input", "1x9x9", "--channels", "gone.json"],
            "--channels gone.json cannot be read (No such",
        ),
        (["net.py:build", "--input", "1x9x9", "--channels", "net.py"], "--channels net.py is not JSON ("),
        (
            ["net.py:build", "--input", "1x9x9", "--channels", "list.json"],
            "--channels list.json does not map groups to numbers of channels",
        ),
        (
            ["net.py:build", "--input", "1x9x9", "--channels", "few.json"],
            "channels do not fit this network: missing groups 2",
        ),
        (
            ["net.py:build", "--input", "1x9x9", "--channels", "few.json", "--width", "1"],
            "--width and --channels both set the channels",
        ),
        ([], "no network is named, and this is not an autoslim project"),
    ],
)
def test_errors_of_profile(net: Path, arguments: list[str], message: str) -> None:
    Path("list.json").write_text("[1, 2]")
    Path("few.json").write_text('{"0": 3}')
    assert message in error_from("profile", *arguments)


def test_profile_of_a_released_list() -> None:
    values = json.loads(printed("profile", "released/mobilenet_v2-305M", "--json", "--verify"))
    assert round(values["totals"]["macs_with_pooling"] / 1e6, 2) == 305.17  # the authors' figures
    assert round(values["totals"]["params"] / 1e6, 2) == 5.77
    assert values["ptflops"]["macs"] == values["totals"]["macs"]
    message = error_from("profile", "released/mobilenet_v2-305M", "--width", "0.5")
    assert message.startswith("released/mobilenet_v2-305M sets the channels, and so does --width")


def test_profile_without_a_name_uses_the_projects_network(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "stages")  # any folder of the project works
    chosen = json.loads((project / "outputs/channels/uniform.json").read_text())
    path = str(project / "outputs/channels/uniform.json")
    values = json.loads(printed("profile", "--channels", path, "--json"))
    assert values["input"] == [1, 8, 8]
    assert {name: values["totals"][name] for name in chosen["costs"]} == chosen["costs"]
    half = json.loads(printed("profile", "--width", "0.5", "--json"))
    assert all(group["channels"] == group["default"] // 2 for group in half["groups"])  # params.yaml's divisor is 2


def test_profile_shows_the_limits_of_groups(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dvc.yaml", "data"):
        (tmp_path / name).symlink_to(project / name)
    monkeypatch.chdir(tmp_path)
    change_params(tmp_path, {})
    free = {group["name"]: group for group in json.loads(printed("profile", "--json"))["groups"]}
    first, *others = free
    change_params(tmp_path, {"supernet": {"grid": {"groups": {"*": {"multiple": 8}, first: {"freeze": True}}}}})
    limited = {group["name"]: group for group in json.loads(printed("profile", "--json"))["groups"]}
    assert limited[first]["grid"] == [free[first]["default"]]
    assert all(count % 8 == 0 for name in others for count in limited[name]["grid"])
    assert any(count % 8 for name in others for count in free[name]["grid"])
    rows = {row["group"]: row for row in table(printed("profile"), "group") if "grid" in row}
    assert rows[first]["grid"] == str(free[first]["default"])
    change_params(tmp_path, {"supernet": {"grid": {"groups": {"none*": {"freeze": True}}}}})
    assert "the limits of 'none*' (supernet.grid.groups) apply to no channel group" in error_from("profile")
    change_params(tmp_path, {"supernet": {"grid": {"groups": {"*": {"minimum": 4, "maximum": 2, "frozen": 1}}}}})
    assert "supernet.grid.groups" in error_from("profile")


# trajectory and compare


def test_trajectory_shows_every_step(project: Path) -> None:
    steps = json.loads((project / "outputs/search/trajectory.json").read_text())["steps"]
    rows = table(printed("trajectory"), "step")
    firsts = [row for row in rows if len(row) > 2]  # a further group of a step has a row with two cells
    assert [row["step"] for row in firsts] == [str(step["step"]) for step in steps]
    shown = [row["slimmed"] if len(row) > 2 else row["step"] for row in rows[1:]]
    assert shown == [group for step in steps for group in step["slimmed"]]
    assert [row["memory"] for row in firsts] == [format_amount(step["memory"], "memory") for step in steps]
    assert "latency" not in rows[0]
    changes = [
        f"{before['channels'][group]} -> {step['channels'][group]}"
        for before, step in itertools.pairwise(steps)
        for group in step["slimmed"]
    ]
    assert [list(row.values())[-1] for row in rows[1:]] == changes
    for step, row in zip(steps, firsts, strict=True):
        assert float(row["top-1 (%)"]) == pytest.approx(100 * (1 - step["error"]), abs=0.0051)


def test_a_step_of_several_groups_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    def step(number: int, slimmed: list[str], a: int, b: int) -> dict[str, object]:
        return {"step": number, "slimmed": slimmed, "channels": {"a": a, "b": b}, "macs": a * b, "error": 0.5}

    trajectory = {
        "resource": "macs",
        "default": {"channels": {"a": 8, "b": 8}, "macs": 64},
        "steps": [step(0, [], 8, 8), step(1, ["b", "a"], 6, 4)],
    }
    print_steps(trajectory)
    rows = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert rows == [
        ["0", "64", "100.0", "50.00", "(widest)"],
        ["1", "24", "37.5", "50.00", "b", "8 -> 4"],
        ["a", "8 -> 6"],
    ]


def test_trajectory_shows_the_configurations_of_budgets(project: Path) -> None:
    trajectory = json.loads((project / "outputs/search/trajectory.json").read_text())
    limit = 0.5 * trajectory["default"]["macs"]
    best = max((step for step in trajectory["steps"] if step["macs"] <= limit), key=lambda step: step["macs"])
    found = json.loads(printed("trajectory", "--budget", "50%", "--budget", "100%", "--json"))
    assert found["50%"]["channels"] == best["channels"]
    refinement = json.loads(Path("outputs/channels/refinement.json").read_text())
    assert found["50%"]["channels"] == refinement["before"]["channels"]
    assert (found["50%"]["step"], found["50%"]["macs"]) == (best["step"], best["macs"])
    assert found["100%"]["macs"] <= trajectory["default"]["macs"]
    rows = table(printed("trajectory", "-b", "50%"), "group")
    sizes = trajectory["default"]["channels"]
    assert {row["group"]: row["default"] for row in rows} == {name: str(size) for name, size in sizes.items()}
    assert {row["group"]: int(row["50%"].split()[0]) for row in rows} == best["channels"]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("much", "budget 'much' is not an amount of macs; write it like 305M, 0.57G or 50%"),
        ("1", "budget 1 (1 MACs) is outside the trajectory"),
        ("900%", "budget 900% (110K MACs) is outside the trajectory"),
        ("params=900%,macs=900%", "budget params=900%,macs=900% ("),
        ("memory=1B,macs=50%", "budget memory=1B,macs=50% (1B) is outside the trajectory"),
        ("latency=12ms", "the search did not record latency, only MACs, parameters, memory; set latency.table"),
        ("12ms", "budget '12ms' has no unit of macs (ms measures latency: set resource); write it like"),
        ("macs=50%,weight=3M", "--budget 'macs=50%,weight=3M' is not RESOURCE=AMOUNT,...; write it like macs=305M,"),
        ("macs=50%,macs=40%", "--budget 'macs=50%,macs=40%' is not RESOURCE=AMOUNT,...; write it like macs=305M,"),
        ("macs=", "budget '' is not an amount of macs; write it like 305M, 0.57G or 50%"),
    ],
)
def test_budgets_outside_the_trajectory_are_errors(project: Path, budget: str, message: str) -> None:
    assert error_from("trajectory", "--budget", budget).startswith(message)


def test_budgets_of_any_resource_are_read_off_any_trajectory(project: Path) -> None:
    trajectory = json.loads((project / "outputs/search/trajectory.json").read_text())
    steps, default = trajectory["steps"], trajectory["default"]
    for resource in ("macs", "params", "memory"):
        found = json.loads(printed("trajectory", "--budget", "60%", "--resource", resource, "--json"))["60%"]
        first = next(step for step in steps if step[resource] <= 0.6 * default[resource])
        assert found == {name: first[name] for name in ("step", "macs", "params", "memory", "channels")} | {
            "top1": 1 - first["error"]
        }
    several = "params=70%,memory=80%"
    (found,) = json.loads(printed("trajectory", "--budget", several, "--json")).values()
    first = next(s for s in steps if all(s[r] <= f * default[r] for r, f in (("params", 0.7), ("memory", 0.8))))
    assert found["step"] == first["step"]
    message = facts(printed("trajectory", "--budget", several).replace("=", " ").replace("%", " "))
    assert message["default"].startswith("12.2K MACs, ")


def test_a_trajectory_of_several_limits_and_one_without_memory(project: Path, tmp_path: Path) -> None:
    """Shares are those of the binding limit; an older search without a resource must run again."""
    trajectory = json.loads((project / "outputs/search/trajectory.json").read_text())
    folder = tmp_path / "outputs/search"
    folder.mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    limits = {"macs": 5000.0, "params": 700.0}
    for step in trajectory["steps"]:
        step["cost"] = max(step[resource] / limit for resource, limit in limits.items())
        del step["memory"]
    for which in ("default", "widest", "narrowest"):
        del trajectory[which]["memory"]
    del trajectory["digest"]
    (folder / "trajectory.json").write_text(json.dumps(trajectory | {"limits": limits}))
    with contextlib.chdir(tmp_path):
        text = printed("trajectory")
        assert error_from("trajectory", "-b", "20kB", "-r", "memory") == (
            "the search did not record memory, only MACs, parameters; run `dvc repro search`"
        )
    rows = table(text, "step")
    assert [float(row["% of the limits"]) for row in rows if len(row) > 2] == [
        pytest.approx(100 * step["cost"], abs=0.051) for step in trajectory["steps"]
    ]
    assert "limits: 5K MACs, 700 parameters; the share is that of the binding limit" in text


def test_compare_shows_the_reports_numbers(project: Path) -> None:
    metrics = json.loads((project / "outputs/report/metrics.json").read_text())
    rows = {row["method"]: row for row in table(printed("compare"), "method")}
    assert rows.keys() == {"uniform", "autoslim"}
    for method, row in rows.items():
        mean, spread = (float(part) for part in row["top-1 on test (%)"].split(" ± "))
        assert mean == pytest.approx(100 * metrics[method]["top1"], abs=0.0051)
        assert spread == pytest.approx(100 * metrics[method]["top1_std"], abs=0.0051)
        assert row["seeds"] == "2"
        assert row["memory"] == format_amount(metrics[method]["memory"], "memory")
        median, spread = row["latency measured"].split(" ± ")
        assert median == format_amount(metrics[method]["measured_latency"], "latency")
        quartiles = (metrics[method][f"measured_latency_{end}"] for end in ("low", "high"))
        assert spread == format_amount(-1 * next(quartiles) / 2 + next(quartiles) / 2, "latency")
        assert "latency predicted" not in row  # there is no table
    text = printed("compare")
    assert text.startswith("budget 50% = 6.1K MACs\n")
    assert "supernet" in text  # as the report remarks


def test_compare_of_several_budgets_with_predicted_latency(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outputs/report"
    shutil.copytree(project / "outputs/report", folder)
    (tmp_path / "dvc.yaml").touch()
    metrics = json.loads((folder / "metrics.json").read_text())
    written = metrics | {"budget": "50% of MACs, 12ms", "budget_latency": 12.0}
    (folder / "metrics.json").write_text(json.dumps(written))
    lines = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    with (folder / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows([line | {"latency": "11.25"} for line in lines])
    with contextlib.chdir(tmp_path):
        text = printed("compare")
        (folder / "comparison.csv").write_text("method,macs\nuniform,many\n")
        message = error_from("compare")
    assert text.startswith("budget 50% of MACs, 12ms = 6.1K MACs, 12ms\n")
    assert [row["latency predicted"] for row in table(text, "method")] == ["11.2ms", "11.2ms"]
    assert message.startswith("outputs/report/comparison.csv or metrics.json")


# evaluate and export


def test_evaluate_agrees_with_the_report(project: Path) -> None:
    metrics = json.loads((project / "outputs/report/metrics.json").read_text())
    rows = table(printed("evaluate", "autoslim", "--split", "test"), "seed")
    assert [row["seed"] for row in rows] == ["0", "1", "all"]
    assert float(rows[-1]["top-1 on test (%)"].split()[0]) == pytest.approx(
        100 * metrics["autoslim"]["top1"], abs=0.0051
    )
    by_seed = json.loads(printed("evaluate", "autoslim", "--split", "test", "--json"))["seeds"]
    mean = (by_seed["0"]["top1"] + by_seed["1"]["top1"]) / 2
    assert mean == pytest.approx(metrics["autoslim"]["top1"], abs=1e-6)
    (only,) = table(printed("evaluate", "autoslim", "--seed", "1"), "seed")
    curves = (project / "outputs/retrain/autoslim/curves.csv").read_text().splitlines()
    names, last = curves[0].split(","), curves[-1].split(",")
    expected = dict(zip(names, last, strict=True))
    assert expected["seed"] == "1"
    assert float(only["top-1 on search (%)"]) == pytest.approx(100 * float(expected["search_top1"]), abs=0.0051)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evaluate", "released/mnasnet-217M"],
            "there is no retrained network of method 'released/mnasnet-217M'; there are networks of autoslim and",
        ),
        (
            ["evaluate", "best"],
            "method 'best' is unknown; methods are default, uniform, autoslim, random, evolution, l1, ",
        ),
        (
            ["evaluate", "uniform", "--seed", "7"],
            "method uniform has no network with seed 7; its seeds are 0, 1: choose one",
        ),
        (["export", "uniform", "--to", "net.h5"], "--to net.h5 does not end in .safetensors, .pt2, .onnx or .xml"),
        (["export", "uniform", "--to", "gone/net.pt2"], "--to gone/net.pt2: the folder "),
        (["export", "uniform", "--to", "n.pt2", "--int8"], "--int8 needs a file that ends in .onnx or .xml, not n.pt2"),
        (
            ["export", "uniform", "--to", "n.onnx", "--elastic", "50%"],
            "--elastic needs a file that ends in .safetensors,",
        ),
        (
            ["export", "uniform", "--to", "n.safetensors", "--elastic", "50%,"],
            "--elastic '50%,' is not a list of differe",
        ),
        (
            ["export", "autoslim", "--to", "n.safetensors", "--elastic", "9%"],
            "the trajectory has no configuration within",
        ),
        (
            ["export", "autoslim", "--to", "n.safetensors", "--elastic", "50%,50.0%"],
            "the widths 50% and 50.0% are the s",
        ),
        (
            ["export", "autoslim", "--to", "n.safetensors", "--elastic", "50%", "--seed", "1"],
            "--elastic exports the supernet, not a retrained network; omit --seed",
        ),
        (["predict", "net.h5", "params.yaml"], "net.h5 is neither a method nor a file that can be run; name a .pt2,"),
        (["predict", "net.pt2", "params.yaml"], "net.pt2 does not exist; write it with `autoslim export`"),
        (["predict", "net.pt2", "params.yaml", "--seed", "1"], "--seed 1 selects one of a method's networks, but"),
        (["predict", "uniform", "gone.png"], "gone.png does not exist or is not a file; name image files, or folders"),
        (["predict", "uniform", "stages"], "stages contains no image ("),
        (["predict", "uniform", "params.yaml"], "{project}/params.yaml is not a readable image ("),
        (["stage", "train"], "there is no stage 'train'; stages are prepare, resources, supernet, search"),
        (["stage", "retrain"], "stage retrain needs a method; write `autoslim stage retrain autoslim`"),
        (["stage", "search", "uniform"], "stage search does not accept a method, but 'uniform' was passed"),
        (["check", "gone.yaml"], "gone.yaml does not exist in "),
    ],
)
def test_errors_of_commands(project: Path, arguments: list[str], message: str) -> None:
    assert error_from(*arguments).startswith(message.replace("{project}", str(project)))


@pytest.mark.parametrize(
    "command", [["trajectory"], ["compare"], ["check"], ["evaluate", "autoslim"], ["stage", "search"]]
)
def test_commands_outside_a_project_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_from(*command).startswith(f"{tmp_path} is not in an autoslim project")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["trajectory"], "there is no outputs/search/trajectory.json; run `dvc repro search`"),
        (["compare"], "there is no outputs/report/metrics.json; run `dvc repro report`"),
        (["evaluate", "autoslim"], "there is no retrained network of method 'autoslim'; run `dvc repro`"),
        (["profile"], "data/prepared is not a prepared data folder"),
    ],
)
def test_commands_before_anything_has_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], message: str
) -> None:
    (tmp_path / "dvc.yaml").touch()
    change_params(tmp_path, {})
    monkeypatch.chdir(tmp_path)
    assert error_from(*command).startswith(message)


def test_an_exported_network_runs_without_autoslim(project: Path, tmp_path: Path) -> None:
    shown = printed("export", "autoslim", "--seed", "1", "--to", str(tmp_path / "net.pt2"))
    assert "torch.export.load" in shown
    images = np.load(project / "data/prepared/test.images.npy")
    labels = np.load(project / "data/prepared/test.labels.npy")
    np.savez(tmp_path / "test.npz", images=images, labels=labels)
    code = """
import json, sys, torch, numpy
about, test = json.load(open("net.json")), numpy.load("test.npz")
mean, std = (torch.tensor(about["input"][key]).view(1, -1, 1, 1) for key in ("mean", "std"))
network = torch.export.load("net.pt2").module()
images = (torch.from_numpy(test["images"]).float() / 255 - mean) / std
logits = network(images)
one = network(images[:1])
assert not [name for name in sys.modules if name.startswith(("autoslim", "torchvision"))]
torch.testing.assert_close(one, logits[:1])
top1 = (logits.argmax(1).numpy() == test["labels"]).mean()
print(json.dumps({"top1": top1, "shape": list(logits.shape), "logits": logits[0].tolist()}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout)
    assert loaded["shape"] == [len(images), 10]
    (row,) = table(printed("evaluate", "autoslim", "--seed", "1", "--split", "test"), "seed")
    assert float(row["top-1 on test (%)"]) == pytest.approx(100 * loaded["top1"], abs=0.0051)


def test_exported_weights_include_what_is_needed_to_use_them(project: Path, tmp_path: Path) -> None:
    printed("export", "uniform", "--to", str(tmp_path / "net.safetensors"))
    weights = load_file(tmp_path / "net.safetensors")
    written = load_file(project / "outputs/retrain/uniform/weights/seed-0.safetensors")
    assert weights.keys() == written.keys()
    assert all(torch.equal(weights[name], written[name]) for name in weights)
    about = json.loads((tmp_path / "net.json").read_text())
    chosen = json.loads((project / "outputs/channels/uniform.json").read_text())
    assert {key: about[key] for key in ("method", "seed", "channels", "costs")} == {
        "method": "uniform",
        "seed": 0,
        "channels": chosen["channels"],
        "costs": chosen["costs"],
    }
    assert about["input"]["shape"] == [1, 8, 8]
    assert about["classes"] == [str(digit) for digit in range(10)]
    (tmp_path / "net.safetensors").unlink()
    again = ("export", "autoslim", "--to", str(tmp_path / "net.safetensors"))
    assert "net.json exists and describes another network; choose another file with --to" in error_from(*again)
    assert json.loads((tmp_path / "net.json").read_text()) == about
    printed(*again, "--force")
    assert json.loads((tmp_path / "net.json").read_text())["method"] == "autoslim"


def test_files_of_one_network_share_its_description(project: Path, tmp_path: Path) -> None:
    """Each file is compared with the network, and contains the description that is next to it."""
    for suffix in (".pt2", ".safetensors", ".onnx"):
        shown = printed("export", "uniform", "--to", str(tmp_path / f"net{suffix}"))
        difference, largest = re.findall(r"on 32 search images: .* by up to (\S+) \(the largest is (\S+)\)", shown)[0]
        assert float(difference) <= 1e-5 * float(largest)
    about = json.loads((tmp_path / "net.json").read_text())
    assert {key: about[key] for key in ("method", "seed", "budget", "resource")} == {
        "method": "uniform",
        "seed": 0,
        "budget": "50%",
        "resource": "macs",
    }
    extra = {"autoslim.json": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        weights = file.metadata()["autoslim"]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for text in (extra["autoslim.json"], weights, session.get_modelmeta().custom_metadata_map["autoslim"]):
        assert json.loads(text) == about
    [images] = session.get_inputs()
    assert images.shape[1:] == [1, 8, 8]
    assert isinstance(images.shape[0], str)  # any batch size


def test_an_int8_export_is_compared_with_the_float_network(project: Path, tmp_path: Path) -> None:
    shown = printed("export", "uniform", "--to", str(tmp_path / "net.onnx"), "--int8")
    before, after = table(shown, "network")
    (row,) = table(printed("evaluate", "uniform", "--seed", "0", "--split", "test"), "seed")
    column = "top-1 on test (%)"
    assert (before["network"], before[column], after["network"]) == ("float32", row[column], "int8")
    model = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    pixels = np.load(project / "data/prepared/test.images.npy")
    labels = np.load(project / "data/prepared/test.labels.npy")
    about = json.loads(model.get_modelmeta().custom_metadata_map["autoslim"])
    assert about["quantisation"] == {"dtype": "int8", "calibration_images": 32}
    mean, std = (np.array(about["input"][key], np.float32)[:, None, None] for key in ("mean", "std"))
    (logits,) = model.run(None, {"images": (pixels.astype(np.float32) / 255 - mean) / std})
    assert float(after[column]) == pytest.approx(100 * (logits.argmax(1) == labels).mean(), abs=0.0051)
    assert after["size"] == format_bytes((tmp_path / "net.onnx").stat().st_size)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ""])
def test_predictions_for_files_agree_with_evaluate(project: Path, tmp_path: Path, suffix: str) -> None:
    network = "autoslim"
    if suffix:
        network = str(tmp_path / f"net{suffix}")
        printed("export", "autoslim", "--seed", "1", "--no-verify", "--to", network)
    pixels = np.load(project / "data/prepared/test.images.npy")
    labels = np.load(project / "data/prepared/test.labels.npy")
    (tmp_path / "images" / "more").mkdir(parents=True)
    (tmp_path / "images" / "notes.txt").touch()
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = tmp_path / "images" / ("more" if number % 2 else "")
        Image.fromarray(image[0]).save(folder / f"{number:02d}-{label}.png")
    options = [] if suffix else ["--seed", "1"]
    found = json.loads(printed("predict", network, str(tmp_path / "images"), "--json", "--top", "10", *options))
    assert len(found) == len(labels)
    right = [prediction["class"] == Path(prediction["image"]).stem.partition("-")[2] for prediction in found]
    (row,) = table(printed("evaluate", "autoslim", "--seed", "1", "--split", "test"), "seed")
    assert float(row["top-1 on test (%)"]) == pytest.approx(100 * sum(right) / len(right), abs=0.0051)
    for prediction in found:
        shares = prediction["probabilities"]
        assert sum(shares.values()) == pytest.approx(1)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert shares[prediction["class"]] == prediction["probability"]
    if not suffix:
        one = table(printed("predict", network, found[0]["image"], "--top", "2", *options), "image")
        (label, share), (second, _) = list(found[0]["probabilities"].items())[:2]
        assert (one[0]["class"], one[0]["probability (%)"]) == (label, f"{100 * share:.1f}")
        assert one[0]["next"].startswith(f"{second} (")


def test_an_elastic_export_has_the_widths_of_the_trajectory(project: Path, tmp_path: Path) -> None:
    file = tmp_path / "elastic.safetensors"
    shown = printed("export", "autoslim", "--to", str(file), "--elastic", "45%,70%,100%")
    [difference] = re.findall(r"with the networks on 32 search images: .* by up to (\S+) ", shown)
    assert float(difference) < 1e-5
    params, pixels = load_params(), np.load("data/prepared/test.images.npy")
    labels = np.load("data/prepared/test.labels.npy")
    build = partial(build_network, params.model.name, params.model.kwargs, 10)
    elastic = load_elastic(build, file)
    assert json.loads((tmp_path / "elastic.json").read_text()) == elastic.about
    mean, std = (torch.tensor(elastic.about["input"][key])[:, None, None] for key in ("mean", "std"))
    graph = trace(build(), torch.empty(1, 1, 8, 8))
    for row, expected in zip(table(shown, "width"), ("45%", "70%", "100%"), strict=True):
        assert row["width"] == expected
        elastic.select(expected)
        width = elastic.about["widths"][expected]
        [step] = json.loads(printed("trajectory", "--budget", expected, "--json")).values()
        assert width["channels"] == step["channels"]
        assert row["MACs"] == format_amount(graph.macs(step["channels"]), "macs")
        with torch.inference_mode():
            right = elastic((torch.from_numpy(pixels) / 255 - mean) / std).argmax(1).numpy() == labels
        assert width["test"] == pytest.approx({"top1": right.mean()})
        assert float(row["top-1 on test (%)"]) == pytest.approx(100 * right.mean(), abs=0.0051)
    again = ("export", "autoslim", "--to", str(file), "--elastic", "45%")
    assert "elastic.safetensors exists; choose another file" in error_from(*again)


def test_the_commands_and_examples_of_the_page_on_deployment_run(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "docs/guide/deploy.md"
    monkeypatch.chdir(shutil.copytree(project, tmp_path / "copy"))
    Path("photos").mkdir()
    for name in ("photo.jpg", "photos/a.png", "photos/b.png"):
        Image.new("RGB", (20, 30), "red").save(name)
    kwargs = load_params().model.kwargs
    Path("net.py").write_text(
        f"from autoslim.models.architectures import mobilenet_v2\n\ndef build():\n    return mobilenet_v2(**{kwargs})\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    reached = {"25%,50%,100%": "45%,50%,100%"}  # the search of this project ends at 40 %
    ran = 0
    for arguments in commands(page, "autoslim"):
        if len(arguments) > 1 and "inputs.npy" not in arguments:  # of own data: tests/pipeline/test_tasks.py
            printed(*(reached.get(argument, argument) for argument in arguments))
            ran += 1
    assert ran >= 6
    for code in python_blocks(page):
        exec(code.replace("25%", "45%"), {"__name__": "example"})
    sys.modules.pop("net")


# check and stage


def test_check_prints_the_budget_in_units(project: Path) -> None:
    trajectory = json.loads((project / "outputs/search/trajectory.json").read_text())
    shown = facts(printed("check"))
    assert shown["parameters"] == "params.yaml is complete"
    assert shown["images"] == "1x8x8, 10 classes; 100 train, 32 search, 50 test"
    assert shown["budget"] == "50%: at most 6.1K MACs, 50 % of the default network's"
    assert shown["search"] == "from the widest down to 4.88K MACs"
    spans = [f"{trajectory[which]['macs'] / 1000:.3g}K" for which in ("narrowest", "widest")]
    assert shown["supernet"] == f"from {spans[0]} to {spans[1]} MACs"
    amounts = (format_named_amount(trajectory["default"][name], name) for name in ("macs", "params", "memory"))
    assert shown["network"].endswith(f" groups, {', '.join(amounts)}")
    assert "will be measured on " in shown["latency"]


def test_check_as_json(project: Path, tmp_path: Path) -> None:
    shown = json.loads(printed("check", "--json"))
    trajectory = json.loads((project / "outputs/search/trajectory.json").read_text())
    assert shown["images"] == {"train": 100, "search": 32, "test": 50}
    assert shown["costs"] == {name: trajectory["default"][name] for name in ("macs", "params", "memory")}
    assert shown["budgets"] == {
        "macs": {
            "text": "50%",
            "checked": True,
            "amount": trajectory["default"]["macs"] / 2,
            **{which: trajectory[which]["macs"] for which in ("narrowest", "widest", "default")},
        }
    }
    change_params(tmp_path, {"budget": {"macs": "50%", "latency": "1us"}})
    shown = json.loads(printed("check", str(tmp_path / "params.yaml"), "--json"))
    assert shown["budgets"]["latency"] == {"text": "1us", "checked": False}
    change_params(tmp_path, {"data": {"search_images": 40}})
    shown = json.loads(printed("check", str(tmp_path / "params.yaml"), "--json"))
    assert (shown["prepared"], "budgets" in shown) == (False, False)


def test_check_of_several_budgets_and_of_latency_that_is_not_measured(project: Path, tmp_path: Path) -> None:
    change_params(tmp_path, {"budget": {"macs": "50%", "memory": "80%"}})
    shown = facts(printed("check", str(tmp_path / "params.yaml")))
    trajectory = json.loads((project / "outputs/search/trajectory.json").read_text())
    assert shown["budget of MACs"] == "50%: at most 6.1K MACs, 50 % of the default network's"
    least = format_amount(0.8 * trajectory["default"]["memory"], "memory")
    assert shown["budget of memory"] == f"80%: at most {least}, 80 % of the default network's"
    share = 0.4 * max(1 / 0.5, 1 / 0.8)
    assert shown["search"] == f"from the widest down to {100 * share:.1f} % of the limits"
    assert shown["supernet"].count(" to ") == 2
    change_params(tmp_path, {"budget": {"macs": "50%", "latency": "1us"}})
    shown = facts(printed("check", str(tmp_path / "params.yaml")))
    wait = "latency is not measured yet; run `dvc repro resources`"
    assert shown["budget of latency"] == f"1us: not checked: {wait}"
    assert shown["search"] == wait
    assert shown["budget of MACs"].startswith("50%: at most 6.1K MACs")
    change_params(tmp_path, {"budget": "50%", "resource": "latency"})
    shown = facts(printed("check", str(tmp_path / "params.yaml")))
    assert (shown["budget"], shown["supernet"]) == (f"50%: not checked: {wait}", wait)
    change_params(tmp_path, {"budget": {"macs": "50%", "memory": "1kB"}})
    assert "budget.memory 1kB is below the narrowest subnet" in error_from("check", str(tmp_path / "params.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrain": {"label_smoothing": 0.95}}, "retrain.label_smoothing is 0.95, but with 10 classes"),
        ({"model": {"weights": "other.safetensors"}, "supernet": {"width": 1.0}}, "lack features.0.0.weight"),
        ({"runtime": {"processes": 2}}, "runtime.processes is 2, but 1 CUDA devices are visible"),
    ],
)
def test_check_raises_the_errors_of_a_run(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(copy)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    save_file({"foreign": torch.zeros(1)}, "other.safetensors")
    pipeline = (copy / "dvc.yaml").read_text()
    (copy / "dvc.yaml").write_text(pipeline.replace("deps: [", "deps: [other.safetensors, "))
    change_params(copy, changes)
    assert message in error_from("check", str(copy / "params.yaml"))


def test_check_downloads_no_weights(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("autoslim.pipeline.assembly.load_trained_tensors", download)
    copy = shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(copy)
    info = copy / "data/prepared/data.json"
    values = json.loads(info.read_text()) | {"channels": 3, "image_size": [32, 32]}
    values["inputs"]["shape"] = [3, 32, 32]
    info.write_text(json.dumps({name: value for name, value in values.items() if name != "digest"}))
    large = {"name": "torchvision.models:mobilenet_v2", "kwargs": {}, "weights": "DEFAULT"}
    change_params(copy, {"model": large, "supernet": {"width": 1.0}})
    assert "torchvision.models:mobilenet_v2, 25 groups" in facts(printed("check"))["network"]


@pytest.mark.parametrize("stage", [["supernet"], ["retrain", "uniform"]])
def test_a_parameter_changed_after_prepare_is_checked_before_the_work(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: list[str]
) -> None:
    copy = shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(copy)
    change_params(copy, {"retrain": {"label_smoothing": 0.95}})
    assert "retrain.label_smoothing is 0.95, but with 10 classes" in error_from("stage", *stage)


def test_check_skips_the_network_if_the_data_are_not_prepared(project: Path, tmp_path: Path) -> None:
    change_params(tmp_path, {"data": {"source": "torchvision:CIFAR10"}})
    shown = printed("check", str(tmp_path / "params.yaml"))
    assert "not checked, because the data are not prepared; run `dvc repro prepare`" in shown
    change_params(tmp_path, {"data": {"source": "torchvision:CIFAR1"}, "runtime": {"device": "cuda:40"}})
    assert "torchvision.datasets has no data set 'CIFAR1'; did you mean CIFAR10?" in error_from(
        "check", str(tmp_path / "params.yaml")
    )


def test_stage_calls_the_same_functions_as_dvc(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(copy / "stages")
    before = (copy / "outputs/search/trajectory.json").read_text()
    (copy / "outputs/search/trajectory.json").unlink()
    with contextlib.redirect_stderr(io.StringIO()):
        printed("stage", "search")
    assert (copy / "outputs/search/trajectory.json").read_text() == before
    (copy / "params.yaml").write_text("budget: 3")
    assert error_from("stage", "search").startswith("params.yaml has ")
    result = CliRunner().invoke(app, ["stage", "search", "--traceback"])
    assert type(result.exception).__name__ == "InvalidParametersError"
