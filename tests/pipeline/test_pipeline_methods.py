"""The methods of a comparison: what they need, choose and start from, and what a change of methods reruns."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import error_from, printed
from safetensors.torch import load_file
from small_project import change_params, error_of, stage
from tiny import merged
from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.data.batches import eval_batches
from autoslim.data.prepared import PreparedData, read_info
from autoslim.pipeline.assembly import grid_spec, traced_network
from autoslim.pipeline.costs import load_costs
from autoslim.pipeline.params import load_params
from autoslim.pipeline.project import PREPARED
from autoslim.resources.latency.kernels import find_kernels
from autoslim.resources.latency.table import Check, KernelTimes, LatencyTable, Target
from autoslim.search import sampling
from autoslim.search.methods import ON_SUPERNET, ON_TRAINED

WITHOUT_SUPERNET = ["default", "uniform", "l1"]
ALL = ["default", "uniform", *ON_TRAINED, *ON_SUPERNET]


@pytest.fixture
def done(done: Path) -> Path:
    """Returns a copy of a finished project as the working directory, with weights of the default network."""
    change_params(Path(), {})
    network, generator = traced()[0], torch.Generator().manual_seed(0)
    weights = {name: tensor.float() for name, tensor in network.state_dict().items()}
    for name in weights:  # random batch norms, so that all tensors show which channels are kept
        if weights[name].dim() == 1:
            weights[name] = 0.5 + torch.rand(weights[name].shape, generator=generator)
    torch.save(weights, "trained.pt")
    watched = Path("dvc.yaml").read_text().replace("autoslim/models, net.py,", "autoslim/models, net.py, trained.pt,")
    Path("dvc.yaml").write_text(watched)
    return Path.cwd()


def change(changes: dict[str, Any]) -> None:
    """Changes the parameters of a project that starts from the weights."""
    weights = {"model": {"weights": "trained.pt"}, "supernet": {"width": 1.0, "sort": "l1"}, "retrain": {"seeds": [0]}}
    change_params(Path(), merged(weights, changes))


def traced() -> tuple[nn.Module, ChannelGraph]:
    return traced_network(load_params().model, read_info(PREPARED))


def allocated(method: str) -> dict[str, Any]:
    return read(f"outputs/channels/{method}.json")


def read(path: str) -> Any:
    return json.loads(Path(path).read_text())


def test_a_project_that_needs_no_supernet_trains_none(done: Path) -> None:
    change({"methods": WITHOUT_SUPERNET})
    stage("resources")
    assert "supernet: not trained, because no method needs it" in stage("supernet")
    assert "search: nothing is searched, because no method needs it" in stage("search")
    assert not list(Path("checkpoints").glob("supernet-*"))
    assert load_file("outputs/supernet/weights.safetensors") == {}
    stage("allocate")
    assert [allocated(method)["start"] for method in WITHOUT_SUPERNET] == ["trained", "weights", "weights"]
    for method in WITHOUT_SUPERNET:
        stage("retrain", method)
    stage("report")
    table = Path("outputs/report/table.md").read_text()
    assert "uniform and l1 were fine-tuned from model.weights." in table
    assert "supernet" not in table
    with Path("outputs/report/comparison.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == WITHOUT_SUPERNET
    assert rows["l1"]["gain"]
    for figure in ("trajectory", "channels", "resources", "curves"):
        assert Path(f"outputs/report/{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert "not run, because no method needs them" in printed("check")
    estimate = printed("estimate", "--seconds", "0")
    assert "supernet: training" not in estimate
    assert "retrain l1: training" in estimate
    assert "l1" in printed("compare")
    assert "method l1" in printed("evaluate", "l1")


def test_without_trained_weights_networks_that_need_no_supernet_start_from_scratch(done: Path) -> None:
    change_params(done, {"methods": ["default", "uniform"]})
    for name in ("resources", "supernet", "search", "allocate"):
        stage(name)
    assert [allocated(method)["start"] for method in ("default", "uniform")] == ["scratch", "scratch"]


def test_all_methods_keep_the_budget_in_each_resource(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[dict[str, Any]] = [
        {"resource": "macs", "budget": "45%"},
        {"resource": "params", "budget": "45%"},
        {"resource": "memory", "budget": "60%"},
        {"resource": "macs", "budget": {"macs": "60%", "params": "50%"}},
    ]
    change({"methods": ALL})
    stage("resources")
    stage("supernet")
    for limits in budgets:
        change({"methods": ALL, **limits})
        for name in ("resources", "search", "allocate"):
            stage(name)
        params, (_, graph) = load_params(), traced()
        costs, grid = load_costs(graph), graph.grid(grid_spec(params.supernet))
        maxima = costs.limits(params.budgets)
        for method in ALL[1:]:
            channels = allocated(method)["channels"]
            for resource, maximum in maxima.items():
                assert 0.5 * maximum < costs.of(channels, resource) <= maximum, (method, limits)
            assert all(grid[name][-1] <= count <= grid[name][0] for name, count in channels.items())
    starts = {method: allocated(method)["start"] for method in ALL}
    on_supernet = dict.fromkeys(["uniform", *ON_SUPERNET], "supernet")
    assert starts == {"default": "trained", **on_supernet, **dict.fromkeys(ON_TRAINED, "weights")}
    for method in ALL:
        stage("retrain", method)
    stage("report")
    text = Path("outputs/report/table.md").read_text()
    assert "l1, bn_scale, taylor and sensitivity were fine-tuned from model.weights." in text
    assert "uniform, autoslim, random and evolution were fine-tuned from the supernet's weights." in text
    estimate = printed("estimate", "--seconds", "0")
    assert all(f"\n{work} " in estimate for work in ("search", "refinement", "random", "evolution", "sensitivity"))


def test_all_methods_keep_a_latency_budget(done: Path) -> None:
    """The table has 1 ms, and 0.1 ms for each channel, so that the latency of a configuration has a closed form."""
    change({"methods": ALL})
    network, graph = traced()
    kernels = find_kernels(network, graph)
    times = [KernelTimes((), (name,), (0,), (0, 1000), ((0.0, 100.0),), "") for name in graph.groups]
    times += [KernelTimes((), (), (0,), (0,), ((0.0,),), "")] * (len(kernels) - len(times))
    found = {kernel.name: replace(each, work=kernel.work) for kernel, each in zip(kernels, times, strict=True)}
    target = Target("a phone", "onnxruntime", "cpu", 4, 1, "fp32", False, {"torch": "3"})
    check = Check(tuple(range(5, 25)), tuple(n + 0.5 for n in range(5, 25)), 0.03, 0.09, 0.995)
    phone = LatencyTable("a network", graph.input_shape, graph.default, target, found, 1.0, 1.0, check=check)
    Path("phone.json").write_text(json.dumps(phone.to_dict()))
    watched = Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(watched.replace("pipeline/resources.py,", "pipeline/resources.py, phone.json,"))
    change({"methods": ALL, "resource": "latency", "budget": "60%", "latency": {"table": "phone.json"}})
    for name in ("resources", "supernet", "search", "allocate"):
        stage(name)
    grid = graph.grid(grid_spec(load_params().supernet))
    limit = 0.6 * (1 + 0.1 * sum(graph.default.values()))
    for method in ALL[1:]:
        channels = allocated(method)["channels"]
        assert 0.8 * limit < 1 + 0.1 * sum(channels.values()) <= limit + 1e-9, method
        if method != "uniform":  # its widths lie between those of the grid
            assert all(count in grid[name] for name, count in channels.items())


INPUTS = {  # layer -> the group that it reads, of the tiny network
    "features.1.conv.1": "features.0.0",
    "features.2.conv.0.0": "features.1.conv.1",
    "features.2.conv.2": "features.2.conv.0.0",
    "features.3.conv.0.0": "features.2.conv.2",
    "features.3.conv.2": "features.3.conv.0.0",
    "features.4.0": "features.2.conv.2",
}


def test_l1_keeps_the_channels_with_the_largest_weights(done: Path) -> None:
    """Compared with the definition, computed from the weights alone."""
    change({"methods": ["uniform", "l1"]})
    for name in ("resources", "supernet", "search", "allocate"):
        stage(name)
    _, graph = traced()
    weights = torch.load("trained.pt", weights_only=True)
    norms = {
        name: torch.stack([weights[f"{member}.weight"].double().abs().sum((1, 2, 3)) for member in group.members])
        for name, group in graph.groups.items()
    }
    norms = {name: values.sum(0) for name, values in norms.items()}
    relative = {name: values / values.mean() for name, values in norms.items()}
    least = {name: numbers[-1] for name, numbers in graph.grid(grid_spec(load_params().supernet)).items()}

    def above(threshold: float) -> dict[str, int]:
        return {name: max(least[name], int((values > threshold).sum())) for name, values in relative.items()}

    thresholds = sorted(torch.cat([*relative.values()]).tolist())
    expected = next(channels for channels in map(above, thresholds) if graph.macs(channels) <= 0.5 * graph.macs())
    assert allocated("l1")["channels"] == expected
    assert expected != allocated("uniform")["channels"]
    for method in ("l1", "uniform"):
        channels, initial = allocated(method)["channels"], load_file(f"outputs/channels/{method}.safetensors")
        largest = {name: norms[name].argsort(descending=True)[:count] for name, count in channels.items()}
        for name, group in graph.groups.items():
            for member in group.members:
                kept = weights[f"{member}.weight"][largest[name]]
                if member in INPUTS:
                    kept = kept[:, largest[INPUTS[member]]]
                assert torch.equal(initial[f"{member}.weight"], kept), member
        assert torch.equal(initial["classifier.1.weight"], weights["classifier.1.weight"][:, largest["features.4.0"]])


def test_batch_norms_of_a_pruned_network_are_those_of_the_search_images(done: Path) -> None:
    """The first batch norm's statistics are those of the first layer's outputs."""
    change({"methods": ["l1"]})
    for name in ("resources", "supernet", "search", "allocate"):
        stage(name)
    initial, data = load_file("outputs/channels/l1.safetensors"), PreparedData.open(PREPARED)
    images, _ = next(iter(eval_batches(data, "search", batch_size=32, device=torch.device("cpu"))))
    outputs = F.conv2d(images, initial["features.0.0.weight"], stride=1, padding=1)
    torch.testing.assert_close(initial["features.0.1.running_mean"], outputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(initial["features.0.1.running_var"], outputs.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_all_networks_can_start_from_the_trained_weights(done: Path) -> None:
    change({"methods": ["default", "uniform", "autoslim"], "retrain": {"start": "weights"}})
    for name in ("resources", "supernet", "search", "allocate"):
        stage(name)
    assert [allocated(method)["start"] for method in ("default", "uniform", "autoslim")] == [
        "trained",
        "weights",
        "weights",
    ]
    classifier = torch.load("trained.pt", weights_only=True)["classifier.1.bias"]
    assert torch.equal(load_file("outputs/channels/autoslim.safetensors")["classifier.1.bias"], classifier)


def test_random_and_evolution_score_as_many_networks_as_the_search(done: Path) -> None:
    change_params(done, {"methods": ["uniform", "autoslim", "random", "evolution"], "retrain": {"start": "scratch"}})
    metrics = read("outputs/search/metrics.json")
    evaluations = round(metrics["images_evaluated"] / read("outputs/search/trajectory.json")["images"])
    for method in ("random", "evolution"):
        assert f"allocate: {method}: {evaluations} networks, top-1 on search images " in stage("allocate")
        assert allocated(method)["start"] == "scratch"
    before = [allocated(method)["channels"] for method in ("random", "evolution")]
    stage("allocate")
    assert [allocated(method)["channels"] for method in ("random", "evolution")] == before


def test_a_killed_random_search_continues(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_params(done, {"methods": ["evolution"]})
    stage("allocate")
    expected, scored = allocated("evolution"), []
    original = sampling.mean_score

    def killed(outcomes: Any) -> Any:
        scored.append(1)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return original(outcomes)

    monkeypatch.setattr(sampling, "mean_score", killed)
    with pytest.raises(SystemExit):
        stage("allocate")
    stage("allocate")
    resumed = len(scored)
    assert allocated("evolution") == expected
    scored[:] = [1] * 4
    stage("allocate")
    assert resumed - 4 == len(scored) - 4 - 3, "what had been scored was not scored again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ["uniform", "taylor"], "model": {"weights": None}, "supernet": {"sort": None}},
            "params.yaml: methods has taylor, which ",
        ),
        (
            {"retrain": {"start": "weights"}, "model": {"weights": None}, "supernet": {"sort": None}},
            "params.yaml: retrain.start is weights, ",
        ),
    ],
)
def test_methods_that_need_trained_weights_are_refused_without(
    done: Path, changes: dict[str, Any], message: str
) -> None:
    change_params(done, changes)
    found = error_of("resources")
    assert message in found
    assert "set model.weights" in found


@pytest.mark.parametrize("method", ["taylor", "sensitivity"])
def test_methods_that_score_the_trained_network_need_its_classes(done: Path, method: str) -> None:
    weights = torch.load("trained.pt", weights_only=True)
    weights |= {name: weights[name][:7] for name in ("classifier.1.weight", "classifier.1.bias")}
    torch.save(weights, "trained.pt")
    change({"methods": ["l1", "bn_scale"]})
    for name in ("resources", "supernet", "search", "allocate"):
        stage(name)
    assert allocated("l1")["start"] == "weights"
    change({"methods": ["l1", method]})
    message = error_of("resources")
    assert message.startswith(f"method {method} scores the trained network on the data, but model.weights 'trained.pt'")
    assert "classifier.1 would have random weights" in message


def test_commands_name_what_was_not_run(done: Path) -> None:
    change({"methods": WITHOUT_SUPERNET})
    for name in ("resources", "supernet", "search"):
        stage(name)
    assert "no method of params.yaml needs it; add autoslim" in error_from("trajectory")
