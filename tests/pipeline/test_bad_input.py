"""Each user error is reported on one line, with the value, the rule and the remedy, before any training."""

import copy
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failures import message_of
from PIL import Image
from pydantic import BaseModel
from small_project import change_params, error_of, stage, start_project
from tiny import tiny_params
from torch import Tensor, nn

from autoslim.channels.resize import resize
from autoslim.data.prepared import read_info
from autoslim.errors import UserError
from autoslim.models.building import build_network
from autoslim.pipeline.assembly import grid_spec, traced_network
from autoslim.pipeline.checks import check_task
from autoslim.pipeline.entry import InvalidParametersError
from autoslim.pipeline.params import MOVED_NETWORKS, RENAMED, Params, check_params, load_params
from autoslim.pipeline.project import PREPARED
from autoslim.resources.budgets import format_amount
from autoslim.tasks.building import find_task


@pytest.fixture(autouse=True)
def _outside_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a project in which nothing has run, as the working directory."""
    monkeypatch.chdir(start_project(tmp_path / "project"))
    return Path.cwd()


# params.yaml


def with_value(name: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(tiny_params())
    *sections, last = name.split(".")
    section = values
    for key in sections:
        section = section[key]
    section[last] = value
    return values


def problems(values: Any) -> tuple[str, ...]:
    with pytest.raises(InvalidParametersError) as caught:
        check_params(values, "params.yaml")
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("supernet.epochs", 0, "greater than 0"),
        ("supernet.epochs", 1.5, "integer"),
        ("supernet.epochs", True, "integer"),
        ("supernet.epochs", "60", "integer"),
        ("search.stop", "0.1", "number"),
        ("search.stop", 2, "less than or equal to 1"),
        ("retrain.optimiser.learning_rate", float("nan"), "finite number"),
        ("retrain.optimiser.name", "adam", "'sgd' or 'adamw'"),
        ("retrain.optimiser.clip_norm", 0, "greater than 0"),
        ("retrain.augment.policy", "auto_augment", "'trivial_augment' or 'rand_augment'"),
        ("retrain.augment.magnitude", 31, "less than or equal to 30"),
        ("supernet.augment.mixup", -0.2, "greater than or equal to 0"),
        ("supernet.ema", 1.0, "less than 1"),
        ("retrain.ema", 0, "greater than 0"),
        ("retrain.teacher", "widest", "'default'"),
        ("retrain.teacher_weight", 0, "greater than 0"),
        ("retrain.teacher_temperature", 0, "greater than 0"),
        ("retrain.label_smoothing", 1.0, "less than 1"),
        ("search.per_cost", "yes", "boolean"),
        ("search.score", "losses", "'error', 'loss' or 'cross_entropy'"),
        ("resource", "flops", "'macs', 'params', 'memory' or 'latency'"),
        ("data.channels", 2, "1 or 3"),
        ("data.image_size", "large", "integer or a valid list"),
        ("data.image_size", [8, 0], "greater than 0"),
        ("data.image_size", [8, 8.5], "integer"),
        ("data.source", 3, "string"),
        ("data.seed", -1, "greater than or equal to 0"),
        ("runtime.workers", "many", "integer or 'auto'"),
        ("runtime.workers", -1, "greater than or equal to 0 or 'auto'"),
        ("runtime.device", "gpu", "cpu|mps"),
        ("methods", [], "at least 1 item"),
        ("retrain.seeds", 3, "list"),
        ("model.kwargs", ["a"], "dictionary"),
        ("report", None, "mapping"),
        ("search", "fast", "mapping"),
        ("budget", None, "string"),
        ("budget", {"macs": None}, "string"),
    ],
)
def test_a_wrong_parameter_is_reported_once_with_its_value_and_valid_values(
    name: str, value: Any, expected: str
) -> None:
    (problem,) = problems(with_value(name, value))
    named, _, message = problem.partition("; ")
    assert named == f"{name} is {json.dumps(value)}"
    assert expected in message
    if expected != "mapping":
        assert description(name) in message


@pytest.mark.parametrize(
    ("name", "value", "item", "expected"),
    [
        ("methods", ["autoslim", 1], "methods[1] is 1", "string"),
        ("retrain.seeds", [0, "1"], 'retrain.seeds[1] is "1"', "integer"),
        ("retrain.augment.area", [0.5, 2], "retrain.augment.area[1] is 2", "less than or equal to 1"),
        ("retrain.augment.area", [0.5], "retrain.augment.area[1] is missing", "add it"),
        ("retrain.optimiser.betas", [0.9, 1], "retrain.optimiser.betas[1] is 1", "less than 1"),
    ],
)
def test_a_wrong_item_of_a_list_is_reported_with_its_index(name: str, value: Any, item: str, expected: str) -> None:
    (problem,) = problems(with_value(name, value))
    assert problem.startswith(item)
    assert expected in problem
    assert description(name) in problem


@pytest.mark.parametrize(
    ("name", "value", "named", "remedy"),
    [
        ("budget", "a lot", "budget 'a lot' is not an amount of macs", "305M"),
        ("budget", "12ms", "budget '12ms' has no unit of macs", "set resource"),
        ("budget", "0%", "budget '0%' is not a positive number", "305M"),
        ("budget", "1e400", "budget '1e400' is not a positive number", "305M"),
        ("budget", {"params": "3M"}, "budget limits params, but resource is macs", "set resource"),
        ("budget", {"macs": "3ms"}, "budget '3ms' has no unit of macs", "name that in budget"),
        ("budget", {"macs": "3M", "latancy": "4ms"}, "budget bounds 'latancy'", "macs, params"),
        ("budget", 0.2, "budget 0.2 is less than 1", "20%"),
        ("budget", {}, "budget is an empty mapping", "{macs: 305M, params: 3.5M}"),
        ("retrain.seeds", [1, 1], "retrain.seeds", "[1, 1]"),
        ("methods", ["uniform", "uniform"], "methods", "uniform, uniform"),
        ("retrain.augment.area", [0.9, 0.2], "retrain.augment.area is [0.9, 0.2]", "low <= high"),
        ("supernet.optimiser.momentum", 0, "supernet.optimiser.nesterov is true, but momentum is 0", "set nesterov"),
        ("retrain.optimiser.warmup_epochs", 9, "retrain.optimiser.warmup_epochs is 9", "raise epochs"),
        ("supernet.width", 0.1, "supernet.grid.narrowest is 0.15, but width is 0.1", "raise width"),
    ],
)
def test_inconsistent_parameters_are_reported_with_their_values_and_a_remedy(
    name: str, value: Any, named: str, remedy: str
) -> None:
    (problem,) = problems(with_value(name, value))
    assert problem.startswith(named)
    assert remedy in problem


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "search.stop",
            2,
            "search.stop is 2; it should be less than or equal to 1. "
            "The search ends at this fraction of the default network's cost.",
        ),
        ("search.per_cost", "yes", 'search.per_cost is "yes"; it should be a valid boolean. '),
        ("report", None, "report is null; it should be a mapping. A section with figure_dpi."),
        ("budget", "a lot", "budget 'a lot' is not an amount of macs; write it like 305M, 0.57G or 50%"),
        (
            "retrain.optimiser.warmup_epochs",
            9,
            "retrain.optimiser.warmup_epochs is 9, but there are only 2 epochs; lower it or raise epochs",
        ),
        ("data.storge", "auto", "data.storge is unknown; did you mean storage?"),
        ("tracking.zzz", 1, "tracking.zzz is unknown; expected one of enabled, experiment, log_network"),
    ],
)
def test_whole_messages(name: str, value: Any, message: str) -> None:
    (problem,) = problems(with_value(name, value))
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("old", "value", "new", "message"),
    [
        ("report.picture_dpi", 150, "report.figure_dpi", "report.picture_dpi is now report.figure_dpi"),
        ("latency.checked_on", 30, "latency.check_networks", "latency.checked_on is now latency.check_networks"),
        ("retrain.start", "new", "", "retrain.start: new is now scratch"),
        (
            "model.name",
            "autoslim.networks.zoo:mobilenet_v2",
            "",
            "model.name: autoslim.networks.zoo:mobilenet_v2 is now autoslim.models.architectures:mobilenet_v2",
        ),
        (
            "model.name",
            "autoslim.networks.families:MNasNet",
            "",
            "model.name: autoslim.networks.families:MNasNet is now autoslim.models.architectures:MNasNet",
        ),
    ],
)
def test_the_error_for_a_former_name_contains_the_present_one(old: str, value: Any, new: str, message: str) -> None:
    values = with_value(old, value)
    assert problems(values) == (message,)
    if new:  # usually the old name replaces the present one
        section, name = new.split(".")
        del values[section][name]
        assert problems(values) == (message,)


def test_former_names_are_mapped_to_existing_parameters() -> None:
    for old, new in RENAMED.items():
        if ":" in old:
            name = old.partition(":")[0]
            check_params(with_value(name, new), "params.yaml")
        else:
            assert description(new)
    for module in MOVED_NETWORKS.values():
        import_module(module)


def test_a_missing_parameter_is_reported_with_its_description() -> None:
    values = copy.deepcopy(tiny_params())
    del values["report"]
    del values["search"]["stop"]
    missing_stop, missing_report = problems(values)
    assert missing_stop == f"search.stop is missing; add it. {description('search.stop')}"
    assert missing_report.startswith("report is missing; add it. ")
    assert "figure_dpi" in missing_report


def test_all_wrong_parameters_are_reported_at_once(empty: Path) -> None:
    change_params(empty, {"budget": "much", "serach": {}, "data": {"seed": "x"}, "retrain": {"epochs": 0}})
    lines = error_of("prepare").splitlines()
    assert lines[0] == "params.yaml has 4 wrong parameters:"
    assert [line.split()[0] for line in lines[1:]] == ["budget", "data.seed", "retrain.epochs", "serach"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "params.yaml: the file is null; it should be a mapping. A section with resource, budget"),
        ("- 1\n", "params.yaml: the file is [1]; it should be a mapping"),
        ("budget: [25%\n", "params.yaml is not valid YAML: while parsing a flow sequence"),
        ("budget: 1M\nbudget: 2M\n", "params.yaml is not valid YAML: while constructing a mapping"),
    ],
)
def test_a_file_without_parameters(empty: Path, text: str, message: str) -> None:
    Path("params.yaml").write_text(text)
    assert error_of("prepare").startswith(message)


def test_a_file_in_another_encoding(empty: Path) -> None:
    Path("params.yaml").write_bytes("budget: 25% # fünf\n".encode("latin-1"))
    message = error_of("prepare")
    assert message.startswith("params.yaml")
    assert "UTF-8" in message


def description(name: str) -> str:
    """Returns a parameter's description in the schema."""
    *sections, last = name.split(".")
    schema: type[BaseModel] = Params
    for section in sections:
        annotation = schema.model_fields[section].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        schema = annotation
    text = schema.model_fields[last].description
    assert text
    return text


def test_every_parameter_has_a_complete_description() -> None:
    """Descriptions are used in the generated documentation and in errors."""

    def check(schema: type[BaseModel]) -> None:
        for name, field in schema.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)
            else:
                assert (field.description or "").endswith("."), name

    check(Params)


# Budget and network


SPANS = "the supernet spans {narrowest} to {widest} {unit}, and the default network has {default}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budget": "300%"},
            "budget 300% ({budget} MACs) is above the widest subnet; {spans}: lower budget or raise supernet.width",
        ),
        (
            {"budget": 500},
            "budget 500 is below the narrowest subnet; {spans}: raise budget or lower supernet.grid.narrowest",
        ),
        (
            {"budget": "50%", "search": {"stop": 0.9}},
            "budget 50% ({budget} MACs) is below {stop}, the end of the search; {spans}: "
            "raise budget or lower search.stop (0.9)",
        ),
        (
            {"resource": "params", "budget": "1M"},
            "budget 1M is above the widest subnet; {spans}: lower budget or raise supernet.width",
        ),
    ],
)
@pytest.mark.parametrize("stage", [("supernet",), ("search",), ("allocate",)])
def test_a_budget_out_of_reach_is_reported_with_both_bounds(
    done: Path, stage: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    change_params(done, changes)
    params = load_params()
    network, graph = traced_network(params.model, read_info(PREPARED))
    levels = graph.grid(grid_spec(params.supernet))
    resource = params.resource

    def cost(level: int) -> str:
        subnet = resize(network, graph, {name: options[level] for name, options in levels.items()})
        return format_amount(counted(subnet, graph.input_shape)[resource], resource)

    default = counted(network, graph.input_shape)[resource]
    spans = SPANS.format(
        narrowest=cost(-1),
        widest=cost(0),
        unit={"macs": "MACs", "params": "parameters"}[resource],
        default=format_amount(default, resource),
    )
    amounts = {"budget": 3 * default if params.budget == "300%" else 0.5 * default, "stop": 0.9 * default}
    written = {name: format_amount(value, resource) for name, value in amounts.items()}
    assert error_of(*stage) == message.format(spans=spans, **written)


def counted(network: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Returns MACs, computed from shapes at run time, and parameters."""
    macs = 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal macs
        macs += module.get_parameter("weight").numel() * (output[0, 0].numel() if output.dim() == 4 else 1)

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        network.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return {"macs": macs, "params": sum(parameter.numel() for parameter in network.parameters())}


NETWORKS = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.gate = nn.Identity()
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.gate(self.stem(x)).mean((2, 3)))

class Choice(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Chooses(Plain):
    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.gate = Choice()

class Raises(nn.Module):
    def __init__(self, num_classes=10):
        raise RuntimeError("there is no such size\\n  as seven")

class NothingToSlim(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))

class Twice(Plain):
    def forward(self, x):
        return super().forward(x), None

def number():
    return 7
"""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "resnet50"}, "model.name 'resnet50' is not an import path; write package.module:callable"),
        (
            {"name": "nosuch.package:net"},
            "model.name 'nosuch.package:net' cannot be imported: No module named 'nosuch'; ",
        ),
        (
            {"name": "torchvision.models:resnet5"},
            "model.name 'torchvision.models:resnet5': torchvision.models has no callable 'resnet5'; ",
        ),
        ({"name": "gone.py:build"}, "model.name names the file 'gone.py', which does not exist; give its path"),
        (
            {"name": "broken.py:build"},
            "model.name 'broken.py:build' cannot be imported: No module named 'nosuchmodule'",
        ),
        (
            {"name": "net.py:Raises"},
            "with model.kwargs {} cannot be built: there is no such size",
        ),
        (
            {"name": "net.py:Plain", "kwargs": {"depth": 3}},
            "got an unexpected keyword argument 'depth'; correct model.kwargs",
        ),
        ({"name": "net.py:number"}, "model.name 'net.py:number' returns int, not a torch module; name a callable that"),
        ({"name": "net.py:Chooses"}, "torch.fx cannot trace module 'gate' of Chooses (net.py:"),
        ({"name": "net.py:Chooses"}, "name the module in model.leaves to keep its size"),
        (
            {"name": "net.py:Plain", "kwargs": {"num_classes": 7}},
            "returns 7 outputs for 10 classes of data; set model.kwargs",
        ),
        ({"name": "net.py:Twice"}, "returns tuple outputs for 10 classes"),
        ({"name": "torchvision.models:resnet18"}, "does not accept images of 1x8x8: "),
        (
            {"name": "torchvision.models:resnet18"},
            "; set data.channels and data.image_size, or model.kwargs, to what",
        ),
        ({"name": "net.py:NothingToSlim"}, "has no channels that can be slimmed (head: it is the network's output)"),
        (
            {"name": "net.py:Plain", "leaves": ["gato"]},
            "model.leaves names 'gato', which is not a module of 'net.py:Plain'; similar",
        ),
    ],
)
def test_a_network_that_cannot_be_used(done: Path, model: dict[str, Any], message: str) -> None:
    Path("net.py").write_text(NETWORKS)
    Path("broken.py").write_text("import nosuchmodule\n")
    change_params(done, {"model": {"kwargs": {}} | model})
    assert message in error_of("prepare")


def test_a_network_in_a_file_that_dvc_does_not_track(done: Path) -> None:
    Path("mine.py").write_text(NETWORKS)
    change_params(done, {"model": {"name": "mine.py:Plain", "kwargs": {}}})
    message = error_of("prepare")
    assert "model.name is the file mine.py" in message
    assert (
        "would not rerun resources, supernet, search, allocate, retrain, report; run `autoslim init --upgrade`, which "
        "adds mine.py to their" in message
    )


def test_weights_that_training_would_discard(done: Path) -> None:
    change_params(done, {"model": {"name": "torchvision.models:resnet18", "kwargs": {"weights": "DEFAULT"}}})
    assert error_of("supernet") == (
        "model.kwargs.weights is 'DEFAULT', but only the supernet can start from trained weights; name them in "
        "model.weights instead"
    )


def test_auxiliary_heads_are_reported(done: Path) -> None:
    kwargs = {"aux_logits": True, "init_weights": False}
    data = {"channels": 3, "image_size": 96}
    change_params(done, {"data": data, "model": {"name": "torchvision.models:googlenet", "kwargs": kwargs}})
    assert "in training, not one tensor as in evaluation; switch auxiliary heads off" in error_of("prepare")


# Data


def write_images(folder: Path, counts: dict[str, dict[str, int]], size: int = 8) -> None:
    """Writes grey images in ImageFolder layout."""
    generator = np.random.default_rng(0)
    for split, classes in counts.items():
        for name, count in classes.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (size, size), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


FOLDER: dict[str, Any] = {
    "data": {"source": "folder:images", "search_images": 10, "train_images": None, "test_images": None},
    "search": {"chunk": 10},
}


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "data folder {} does not exist; expected <folder>/train/<class>/<images> and"),
        ({"test": {"a": 1}}, "data folder {} has no train/; expected"),
        ({"train": {"a": 1, "b": 1}}, "data folder {} has neither test/ nor val/; expected"),
        ({"train": {}, "test": {}}, "{}/train is empty: it has no class folders; expected"),
        ({"train": {"a": 2}, "test": {"a": 2}}, "{}/train has only one class (a); at least two are required"),
        ({"train": {"a": 2, "b": 2}, "test": {"a": 2}}, "test/ lacks b; both must have the same class folders"),
        ({"train": {"a": 2, "b": 0}, "test": {"a": 2, "b": 2}}, "{}/train/b contains no image (.jpg"),
        (
            {"train": {"a": 1, "b": 2}, "test": {"a": 1, "b": 1}},
            "search_images 10 is not possible: up to 1 can be held out of the 3 training images (at most half of each",
        ),
    ],
)
def test_a_data_folder_that_cannot_be_used(empty: Path, counts: dict[str, dict[str, int]], message: str) -> None:
    for split in counts:
        (empty / "images" / split).mkdir(parents=True)
    write_images(empty / "images", counts)
    change_params(empty, FOLDER)
    assert message.format(empty / "images") in error_of("prepare")
    assert not Path("data/prepared").exists()


def test_the_error_for_an_unreadable_image_has_its_path(empty: Path) -> None:
    write_images(empty / "images", {"train": {"a": 20, "b": 20}, "test": {"a": 2, "b": 2}})
    (empty / "images/test/b/1.png").write_bytes(b"no image")
    change_params(empty, FOLDER)
    message = error_of("prepare")
    assert str(empty / "images/test/b/1.png") in message
    assert not Path("data/prepared").exists()


def test_images_of_different_sizes_require_a_size(empty: Path) -> None:
    write_images(empty / "images", {"train": {"a": 20, "b": 20}, "test": {"a": 2, "b": 2}})
    Image.new("L", (30, 9)).save(empty / "images/train/a/0.png")
    Image.new("L", (30, 9)).save(empty / "images/train/a/1.png")
    change_params(empty, FOLDER)
    assert error_of("prepare").endswith("differ in size (from 8x8 to 30x9); set image_size")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cifar10", "data source 'cifar10' is unknown; expected digits, scenes, torchvision:NAME"),
        ("torchvision:Cifar10", "torchvision.datasets has no data set 'Cifar10'; did you mean CIFAR10?"),
        ("folder:", "data source 'folder:' is unknown; expected"),
    ],
)
def test_sources_that_do_not_exist(empty: Path, source: str, message: str) -> None:
    change_params(empty, {"data": {"source": source}})
    assert message in error_of("prepare")


# Outputs of earlier stages, and the device


def test_without_params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of("search") == (
        f"params.yaml does not exist in {tmp_path}; run from the repository's root, or restore the file from git"
    )


@pytest.mark.parametrize(
    ("missing", "stage", "named", "remedy"),
    [
        ("data/prepared", ("supernet",), "data/prepared is not a prepared data folder", "run the prepare stage"),
        (
            "data/prepared",
            ("retrain", "uniform"),
            "data/prepared is not a prepared data folder",
            "run the prepare stage",
        ),
        ("data/prepared/train.images.npy", ("supernet",), "data/prepared is incomplete", "run the prepare stage again"),
        ("outputs/supernet", ("search",), "outputs/supernet", "run `dvc repro supernet`"),
        (
            "outputs/supernet/weights.safetensors",
            ("search",),
            "outputs/supernet/weights.safetensors",
            "run `dvc repro`",
        ),
        ("outputs/search", ("allocate",), "outputs/search/trajectory.json", "run `dvc repro search`"),
        ("outputs/search", ("report",), "outputs/search/trajectory.json", "run `dvc repro search`"),
    ],
)
@pytest.mark.parametrize("damaged", [False, True])
def test_missing_or_damaged_outputs_of_earlier_stages(
    done: Path, missing: str, stage: tuple[str, ...], named: str, remedy: str, damaged: bool
) -> None:
    path = done / missing
    if damaged:
        for file in path.rglob("*.json") if path.is_dir() else [path]:
            file.write_text("{")
        if path.name == "prepared":
            named = "data/prepared/data.json cannot be read"
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    message = error_of(*stage)
    assert named in message
    assert remedy in message


def test_retraining_requires_no_weights_of_the_supernet(done: Path) -> None:
    """Channels may have been pulled with DVC. Here, only those of the method are missing."""
    (done / "outputs/supernet/weights.safetensors").unlink()
    (done / "outputs/search/trajectory.json").unlink()
    (done / "outputs/channels/uniform.json").unlink()
    assert error_of("retrain", "uniform") == (
        "there are no channels of method 'uniform' at outputs/channels/uniform.json; run `dvc repro allocate`"
    )


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "best",
            "method 'best' is unknown; methods are default, uniform, autoslim, random, evolution, l1, bn_scale, "
            "taylor, sensitivity, and released/mobilenet_v1-150M, ",
        ),
        ("released/resnet50-1M", "there is no released list 'resnet50-1M'; the lists are mobilenet_v1-150M, "),
        (
            "released/resnet50-1G",
            "resnet50-1G is a list for torchvision.models:resnet50; this network has no layer conv1",
        ),
    ],
)
def test_methods_that_do_not_exist_or_are_for_another_network(empty: Path, method: str, message: str) -> None:
    change_params(empty, {"methods": ["uniform", method]})
    assert message in error_of("prepare")


def test_channels_of_another_network(done: Path) -> None:
    change_params(done, {"model": {"kwargs": {"in_channels": 1, "stem": 8, "stages": [[1, 8, 1, 2]], "tail": 16}}})
    assert error_of("retrain", "uniform").startswith(
        "the channels of method uniform belong to another network than model.name "
    )


def test_a_supernet_of_another_network(done: Path) -> None:
    change_params(done, {"model": {"kwargs": {"in_channels": 1, "stem": 8, "stages": [[1, 8, 1, 2]], "tail": 16}}})
    message = error_of("search")
    assert message.startswith(
        "outputs/supernet contains the supernet of another network (autoslim.models.architectures:mobilenet_v2, 6 "
    )
    assert "params.yaml names one with 3 groups and input [1, 8, 8]" in message
    assert message.endswith("run `dvc repro supernet`")


def test_supernet_weights_of_another_network(done: Path) -> None:
    shutil.copy("outputs/retrain/uniform/weights/seed-0.safetensors", "outputs/supernet/weights.safetensors")
    assert "weights.safetensors does not contain weights of this network: " in error_of("search")
    Path("outputs/supernet/weights.safetensors").write_bytes(b"damaged")
    assert "weights.safetensors does not contain weights of this network: " in error_of("search")


def test_a_trajectory_of_another_network(done: Path) -> None:
    change_params(done, {"model": {"kwargs": {"in_channels": 1, "stem": 8, "stages": [[1, 8, 1, 2]], "tail": 16}}})
    assert error_of("allocate").startswith("outputs/search/trajectory.json belongs to another network (default 12.2K")


def test_larger_chunks_and_more_images_than_the_search_split_are_lowered_with_a_note(done: Path) -> None:
    def trajectory() -> dict[str, Any]:
        values: dict[str, Any] = json.loads(Path("outputs/search/trajectory.json").read_text())
        return values

    change_params(done, {"search": {"images": 32, "chunk": 32}})
    assert "search.chunk" not in stage("search")
    expected = trajectory()
    change_params(done, {"search": {"images": 2048, "chunk": 1024}})
    assert "search: search.chunk is 1024, but 32 images are scored: they are one chunk\n" in stage("search")
    assert trajectory() == expected
    assert (expected["images"], expected["chunk"]) == (32, 32)


def test_a_larger_batch_than_the_train_split_is_lowered_with_a_note(done: Path) -> None:
    weights = Path("outputs/retrain/uniform/weights/seed-0.safetensors")
    change_params(done, {"retrain": {"batch_size": 100}})
    assert "training images" not in stage("retrain", "uniform")
    expected = weights.read_bytes()
    change_params(done, {"retrain": {"batch_size": 1000}})
    assert (
        "retrain uniform: retrain.batch_size is 1000, but there are 100 training images: each step uses all of them, "
        "and an epoch has one step\n"
    ) in stage("retrain", "uniform")
    assert weights.read_bytes() == expected
    assert json.loads(Path("outputs/retrain/uniform/metrics.json").read_text())["images_per_step"] == 100


def test_a_supernet_that_guesses_is_reported_by_three_stages(done: Path) -> None:
    """Its weights are random, because the learning rate is too small to change them."""
    change_params(done, {"supernet": {"batch_size": 128, "optimiser": {"learning_rate": 1e-12}}})
    output = stage("supernet")
    assert "supernet: supernet.batch_size is 128, but there are 100 training images" in output
    assert "supernet: warning: the top-1 of subnets (widest " in output
    assert "is not above chance, which is 12.5%; among such" in output  # 4 of the 32 images of the search split
    assert json.loads(Path("outputs/supernet/metrics.json").read_text())["images_per_step"] == 100
    output = stage("search")
    assert re.search(r"search: warning: (\d+) of the \1 configurations on the search's path have a top-1", output)
    assert stage("report").splitlines()[0].startswith("Warning: ")
    assert Path("outputs/report/table.md").read_text().startswith("**Warning:** ")


@pytest.mark.parametrize("stage", [("supernet",), ("search",), ("retrain", "autoslim")])
def test_a_device_that_is_not_available(done: Path, stage: tuple[str, ...]) -> None:
    change_params(done, {"runtime": {"device": "cuda:63"}})
    message = error_of(*stage)
    assert message.startswith("runtime.device 'cuda:63' is not available here (")
    assert message.endswith("set it to auto or cpu")


def test_a_loss_that_is_not_finite(done: Path) -> None:
    change_params(done, {"supernet": {"epochs": 4, "optimiser": {"learning_rate": 1e25}}})
    message = error_of("supernet", trains=True)
    assert re.match(r"(the loss is (nan|inf) at|weights are no longer finite after) step \d \(epoch \d\); ", message)
    assert message.endswith("; lower learning_rate, or set precision to fp32")
    if match := re.search(r"the last valid weights are in (\S+);", message):
        network = torch.load(match[1], weights_only=True)["network"]
        assert all(tensor.isfinite().all() for tensor in network.values())
    else:
        assert "no checkpoint was written before;" in message


# Commands as users call them


def called(command: list[str], folder: Path) -> str:
    """Returns stderr of a command that must fail with code 1 and no traceback."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


def test_stages_as_dvc_calls_them(empty: Path) -> None:
    assert called([sys.executable, "stages/retrain.py", "autoslim"], empty).startswith("error: data/prepared is not a")
    change_params(empty, {"budget": "lots"})
    assert called([sys.executable, "stages/prepare.py"], empty) == (
        "error: params.yaml: budget 'lots' is not an amount of macs; write it like 305M, 0.57G or 50%\n"
    )


def test_library_users_catch_a_value_error() -> None:
    assert issubclass(InvalidParametersError, UserError)
    assert issubclass(UserError, ValueError)


# Trained weights


def watch(file: str, stage: str = "supernet") -> None:
    """Adds a file to the deps of a stage, as documented for trained weights."""
    dep = f"autoslim/pipeline/{stage}.py,"
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace(dep, f"{dep} {file},"))


TRAINED: dict[str, Any] = {"model": {"weights": "weights/trained.pt"}, "supernet": {"width": 1.0}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"model": {"weights": "w.pt"}},
            ["supernet.width is 1.5", "model.weights is 'w.pt'", "set supernet.width to 1.0 or less"],
        ),
        (
            {"supernet": {"sort": "l1"}},
            ["supernet.sort is l1", "model.weights is null", "set supernet.sort to null"],
        ),
        (
            {"supernet": {"sort": "l2"}},
            ['supernet.sort is "l2"', "'l1' or 'bn_scale'"],
        ),
        (
            TRAINED,
            ["model.weights", "'weights/trained.pt'", "does not exist"],
        ),
        (
            {"model": {"weights": "DEFAULT"}, "supernet": {"width": 1.0}},
            ["model.weights 'DEFAULT'", "'autoslim.models.architectures:mobilenet_v2'", "path of a file"],
        ),
    ],
)
def test_trained_weights_that_cannot_be_used(empty: Path, changes: dict[str, Any], parts: list[str]) -> None:
    change_params(empty, changes)
    message = error_of("prepare")
    assert all(part in message for part in parts), message
    assert not Path("data/prepared").exists()


def test_a_teacher_without_weights(empty: Path) -> None:
    change_params(empty, {"retrain": {"teacher": "default"}})
    assert error_of("prepare") == (
        "params.yaml: retrain.teacher is default, the default network with model.weights, but model.weights is null, "
        "and random weights cannot teach; set retrain.teacher to null, or set model.weights"
    )
    assert not Path("data/prepared").exists()


def teaching_project(folder: Path, network: nn.Module | None = None) -> None:
    """Sets trained weights, whose file only the supernet stage watches, and a teacher with them."""
    Path("weights").mkdir()
    network = network or traced_network(load_params().model, read_info(PREPARED))[0]
    torch.save(network.state_dict(), "weights/trained.pt")
    watch("weights/trained.pt")
    change_params(folder, TRAINED | {"retrain": {"teacher": "default"}})


@pytest.mark.parametrize("stage", [("prepare",), ("supernet",), ("retrain", "uniform")])
def test_a_teacher_whose_file_retraining_does_not_watch(done: Path, stage: tuple[str, ...]) -> None:
    teaching_project(done)
    assert error_of(*stage) == (
        "model.weights is the file weights/trained.pt, which DVC does not track: changing it would not rerun "
        "retrain; run `autoslim init --upgrade`, which adds weights/trained.pt to its deps in dvc.yaml"
    )


@pytest.mark.parametrize("stage", [("prepare",), ("supernet",), ("retrain", "uniform")])
def test_a_teacher_for_other_classes(done: Path, stage: tuple[str, ...]) -> None:
    model = load_params().model
    teaching_project(done, build_network(model.name, model.kwargs, 7))
    watch("weights/trained.pt", "retrain")
    assert error_of(*stage) == (
        "retrain.teacher is default, but model.weights 'weights/trained.pt' are for other classes than the data: "
        "classifier.1 would have random weights, which cannot teach; set retrain.teacher to null, or use weights "
        "that were trained for these classes"
    )


def test_a_teacher_trains_the_retrained_networks(done: Path) -> None:
    """Without labels, its weights alone decide; they are a part of the key of checkpoints."""
    teaching_project(done)
    watch("weights/trained.pt", "retrain")
    weights = Path("outputs/retrain/uniform/weights/seed-0.safetensors")
    without = weights.read_bytes()
    stage("retrain", "uniform")
    first = weights.read_bytes()
    stage("retrain", "uniform")
    assert weights.read_bytes() == first != without
    state = torch.load("weights/trained.pt")
    torch.save({name: 2 * tensor for name, tensor in state.items()}, "weights/trained.pt")
    stage("retrain", "uniform")
    assert weights.read_bytes() != first


def test_labels_of_data_without_classes_are_not_mixed(done: Path) -> None:
    info, task = read_info(PREPARED), find_task("classification")
    change_params(done, {"retrain": {"augment": {"cutmix": 1.0}}})
    mixing = load_params()
    check_task(mixing, info, task)
    assert message_of(lambda: check_task(mixing, dataclasses.replace(info, classes=()), task)) == (
        "retrain.augment.cutmix is 1, but labels can be mixed only if each image has one of several classes, and the "
        "data have no classes; set it to 0"
    )


def test_trained_weights_that_dvc_does_not_track(empty: Path) -> None:
    Path("weights").mkdir()
    torch.save({}, "weights/trained.pt")
    change_params(empty, TRAINED)
    assert error_of("prepare") == (
        "model.weights is the file weights/trained.pt, which DVC does not track: changing it would not rerun "
        "supernet; run `autoslim init --upgrade`, which adds weights/trained.pt to its deps in dvc.yaml"
    )


@pytest.mark.parametrize("watched", ["weights/trained.pt", "weights", "./weights/"])
@pytest.mark.parametrize("stage", ["prepare", "supernet"])
def test_trained_weights_of_another_network(done: Path, watched: str, stage: str) -> None:
    """The first stage also reports it. DVC tracks the files of a folder in the deps."""
    Path("weights").mkdir()
    network, _ = traced_network(load_params().model, read_info(PREPARED))
    torch.save(network.state_dict() | {"features.0.0.weight": torch.zeros(8, 3, 3, 3)}, "weights/trained.pt")
    watch(watched)
    change_params(done, TRAINED)
    assert error_of(stage) == (
        "model.weights 'weights/trained.pt' have features.0.0.weight of shape 8x3x3x3, but this network has 8x1x3x3; "
        "the weights are for images of 3 channels: set data.channels and model.kwargs accordingly"
    )


def test_rounding_that_makes_a_supernet_wider_than_its_trained_weights(done: Path) -> None:
    Path("weights").mkdir()
    torch.save({}, "weights/trained.pt")
    watch("weights/trained.pt")
    change_params(done, {"model": TRAINED["model"], "supernet": {"width": 0.9, "grid": {"divisor": 12}}})
    for name in ("prepare", "supernet"):
        assert error_of(name) == (
            "the supernet has 12 channels in group features.0.0, but model.weights have 8; set supernet.width to 1.0, "
            "or lower supernet.width and supernet.grid.divisor"
        )


def test_scales_that_a_network_does_not_have(done: Path) -> None:
    Path("net.py").write_text(NETWORKS)
    change_params(done, {"model": {"name": "net.py:Plain", "kwargs": {}}})
    network, _ = traced_network(load_params().model, read_info(PREPARED))
    torch.save(network.state_dict(), "trained.pt")
    watch("trained.pt")
    model = {"name": "net.py:Plain", "kwargs": {}, "weights": "trained.pt"}
    change_params(done, {"model": model, "supernet": {"width": 1.0, "sort": "bn_scale"}})
    assert error_of("prepare") == (
        "bn_scale (supernet.sort or methods) needs batch norms with a scale, and Plain has none on channels that can "
        "be slimmed; use l1"
    )
    change_params(
        done, {"methods": ["bn_scale"], "model": model, "supernet": {"width": 1.0}, "retrain": {"start": "scratch"}}
    )
    assert error_of("resources").startswith("bn_scale (supernet.sort or methods) needs batch norms with a scale")


def test_a_start_from_a_supernet_that_is_narrower_than_a_released_list(empty: Path) -> None:
    change_params(
        empty,
        {
            "methods": ["autoslim", "released/mobilenet_v2-505M"],
            "model": {"name": "torchvision.models:mobilenet_v2", "kwargs": {}},
            "data": {"channels": 3},
            "supernet": {"width": 1.0},
            "retrain": {"start": "supernet"},
        },
    )
    message = error_of("prepare")
    assert message.startswith("retrain.start is supernet, but method released/mobilenet_v2-505M has ")
    assert "set retrain.start to scratch, or raise supernet.width" in message
