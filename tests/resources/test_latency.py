"""Compares kernels with the network they come from and predictions with closed forms, and tests latency tables."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from specimens import OTHERS, PATTERNS, random_channels, specimen
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoslim import trace
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import GridSpec
from autoslim.channels.inputs import Arguments
from autoslim.errors import UserError
from autoslim.models.architectures import mobilenet_v2
from autoslim.pipeline.costs import latency_target, report_target
from autoslim.pipeline.params import Latency as LatencyParams
from autoslim.pipeline.params import read_yaml
from autoslim.resources.costs import Costs, Objective
from autoslim.resources.latency import backends
from autoslim.resources.latency import measure as measuring
from autoslim.resources.latency.backends import check_runtime, prepare_forward
from autoslim.resources.latency.kernels import describe_kernel, find_kernels
from autoslim.resources.latency.measure import (
    fit_line,
    fit_weights,
    measure_table,
    prediction_check,
    random_configurations,
)
from autoslim.resources.latency.table import Check, KernelTimes, LatencyTable, Target
from autoslim.resources.latency.turns import MAX_TURNS, MIN_TURNS, latencies_in_turns
from autoslim.resources.measure import measure_memory, measure_networks
from autoslim.tracing.capture import symbolic_graph

TARGET = Target("a machine", "eager", "cpu", 1, 1, "fp32", False, "torch")


def small() -> tuple[nn.Module, ChannelGraph]:
    network = mobilenet_v2(stem=16, stages=((1, 8, 1, 1), (4, 12, 2, 2)), tail=32)
    return network, trace(network, torch.empty(1, 3, 8, 8))


def table_of(graph: ChannelGraph, kernels: Mapping[str, KernelTimes], **values: Any) -> LatencyTable:
    return LatencyTable("a network", graph.input_shape, graph.default, TARGET, kernels, **values)


LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "cifar_resnet50", *OTHERS, *PATTERNS])
def test_kernels_compute_what_the_network_computes(name: str, batch: int) -> None:
    """Each kernel, extracted and resized alone, returns the network's values, and no layer is missing."""
    sample = specimen(name)
    graph = sample.graph
    channels = random_channels(graph, 1, 0.3, 1.4)
    plain = sample.real(channels).eval()
    values = _Recording(fx.GraphModule(plain, symbolic_graph(plain, graph.leaves)))
    with torch.inference_mode():
        values.run(sample.images(batch))
    kernels = find_kernels(sample.network, graph, batch)
    state, layers = plain.state_dict(), []
    for kernel in kernels:
        module, ones = kernel.at(channels)
        module = module.to_empty(device="cpu")
        module.load_state_dict({name: state[name] for name in module.state_dict()})
        inputs = [values.of[operation.name].clone() for operation in kernel.reads]
        assert [(v.shape, v.dtype) for v in inputs] == [(one.shape, one.dtype) for one in ones]
        with torch.inference_mode():
            for output, value in zip(tree_leaves(module(*inputs)), tree_leaves(values.of[kernel.writes]), strict=True):
                assert torch.equal(output, value)
        layers += [name for name, part in module.named_modules() if isinstance(part, LAYERS)]
    counted = [layer.weight.removesuffix(".weight") for layer in graph.layers if layer.weight is not None]
    assert sorted(layers) == sorted(counted)
    assert len({kernel.name for kernel in kernels}) == len(kernels)


class _Recording(fx.Interpreter):
    """Copies the output of each operation, because in-place operations overwrite values."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.of: dict[str, Any] = {}
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.of[n.name] = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)
        return value


def test_kernels_of_a_residual_network() -> None:
    """Convolution, normalisation and activation are one kernel. Groups read and groups written are distinguished."""
    network = specimen("resnet18").network
    graph = trace(network, torch.empty(1, 3, 64, 64))
    kernels = {kernel.name: kernel for kernel in find_kernels(network, graph)}
    assert len(kernels) == 31  # 20 convolutions, 8 sums, 2 pools, 1 linear layer
    stem = kernels["conv1"]
    assert (stem.inputs, stem.outputs) == ((), ("conv1",))
    first = kernels["layer1_0_conv1"]
    assert (first.inputs, first.outputs) == (("conv1",), ("layer1.0.conv1",))
    assert [str(node.target) for node in first.module.graph.nodes if node.op == "call_module"] == [
        "layer1.0.conv1",
        "layer1.0.bn1",
        "layer1.0.relu",
    ]
    assert kernels["add"].inputs == ()
    assert kernels["add"].outputs == ("conv1",)


def test_in_place_operations_are_kernels_and_views_are_not() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y.add_(y.mean())
            return y.flatten(1).view(-1, 128)

    network = Adds()
    graph = trace(network, torch.empty(1, 3, 4, 4))
    assert [kernel.name for kernel in find_kernels(network, graph)] == ["conv", "mean", "add_"]


def test_equal_kernels_have_equal_descriptions() -> None:
    network, graph = specimen("resnet18").network, specimen("resnet18").graph
    kernels = {kernel.name: kernel for kernel in find_kernels(network, graph)}

    def description(name: str, **changes: int) -> str:
        return describe_kernel(*kernels[name].at({**graph.default, **changes}))

    assert description("layer1_0_conv2") == description("layer1_1_conv2")
    assert description("layer1_0_conv2") != description("layer2_0_conv2")
    assert description("layer1_0_conv1") != description("layer1_0_conv2")  # the first one has an activation
    assert description("layer1_0_conv2", conv1=32) != description("layer1_0_conv2")


class Awkward(nn.Module):
    """Has windows, a leaf that returns two tensors, a mask, a scalar tensor and parameters outside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pair, self.last = nn.Conv2d(3, 8, 1), Pair(), nn.Conv2d(8, 8, 1)
        self.bias, self.shift = nn.Parameter(torch.rand(1, 8, 4, 4)), nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        y = self.conv(x)
        y = y.reshape(n, 8, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(4 * n, 8, 4, 4) + self.bias
        left, right = self.pair(y)
        mask = left > right
        y = torch.where(mask, left, right) * left.mean()
        return self.last(y + self.shift).mean((2, 3)).reshape(n, -1)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.cos()


@pytest.mark.parametrize("batch", [1, 3])
def test_kernels_of_an_awkward_network(batch: int) -> None:
    """The inputs of each kernel have the network's shapes and dtypes. A leaf with two outputs is one kernel."""
    network = Awkward().eval()
    graph = trace(network, torch.empty(1, 3, 8, 8), leaves=["pair"])
    values = _Recording(fx.GraphModule(network, symbolic_graph(network, graph.leaves)))
    with torch.inference_mode():
        values.run(torch.rand(batch, 3, 8, 8))
    kernels = find_kernels(network, graph, batch)
    for kernel in kernels:
        module, ones = kernel.at(graph.default)
        inputs = [values.of[reading.name] for reading in kernel.reads]
        assert [(v.shape, v.dtype) for v in inputs] == [(one.shape, one.dtype) for one in ones]
        module.load_state_dict(
            {name: value for name, value in network.state_dict().items() if name in module.state_dict()}
        )
        with torch.inference_mode():
            results = module(*[value.clone() for value in inputs])
            assert torch.is_tensor(results) or kernel.name == "pair"
            if torch.is_tensor(results):
                assert torch.equal(results, values.of[kernel.writes])
        prepare_forward(module, ones, dataclasses.replace(TARGET, precision="bf16", batch=batch))()
    names = [kernel.name for kernel in kernels]
    assert names.count("pair") == 1
    assert not any("getitem" in name for name in names)
    formats = {reading.dtype for kernel in kernels for reading in kernel.reads}
    assert torch.bool in formats
    assert () in {reading.shape for kernel in kernels for reading in kernel.reads}


@pytest.mark.parametrize(
    "change",
    [
        {"conv": nn.Conv2d(8, 8, 3, padding=2, dilation=2)},
        {"pool": nn.MaxPool2d(5, 1, 2)},
        {"window": 5},
        {"attention": nn.MultiheadAttention(8, 4)},
        {"act": nn.GELU()},
    ],
)
def test_the_work_of_kernels_distinguishes_networks_of_the_same_groups(change: dict[str, Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.act = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
            self.pool, self.attention, self.window = nn.MaxPool2d(3, 1, 1), nn.MultiheadAttention(8, 2), 3

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.act(self.conv(self.first(x))))
            x = nn.functional.max_pool2d(x, self.window, 1, self.window // 2)
            tokens = x.flatten(2).permute(2, 0, 1)
            return self.attention(tokens, tokens, tokens)[0].mean(0)

    def work(network: nn.Module) -> list[str]:
        return [kernel.work for kernel in find_kernels(network, trace(network, torch.empty(1, 3, 8, 8)))]

    other = Net()
    for name, value in change.items():
        setattr(other, name, value)
    assert work(Net()) == work(Net())
    assert work(other) != work(Net())


def test_a_network_that_runs_only_on_one_image() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).reshape(1, 8, 16)

    network = One()
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 1)), torch.empty(1, 3, 4, 4))
    with pytest.raises(UserError, match=r"One .*batch of 4"):
        find_kernels(network, graph, 4)


def test_different_kernels_have_different_descriptions() -> None:
    """They differ by parameters, by keyword arguments and by the path of a user's module, the same in every process."""

    class Scaled(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(size, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    class Scales(nn.Module):
        def __init__(self, size: int, along: int) -> None:
            super().__init__()
            self.conv, self.conv_2, self.conv_3 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.scale, self.leaf, self.leaf_2 = Scaled(size), Scaled(1), Scaled(1)
            self.along = along

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv_2(self.leaf(self.conv(x)))
            x = self.conv_3(self.leaf_2(x))
            return self.scale(x).mean(dim=self.along)

    def descriptions(size: int, along: int) -> dict[str, str]:
        network = Scales(size, along)
        graph = trace(network, torch.empty(1, 3, 4, 4), leaves=["leaf", "leaf_2"])
        return {kernel.name: describe_kernel(*kernel.at(graph.default)) for kernel in find_kernels(network, graph)}

    one = descriptions(1, 2)
    assert one == descriptions(1, 2)
    assert one["conv_3"] != descriptions(8, 2)["conv_3"]  # a weight for each channel
    assert one["mean"] != descriptions(1, 3)["mean"]
    assert one["leaf"] != one["leaf_2"]  # the contents of a leaf are not known
    assert "0x" not in "".join(one.values())


def test_a_network_with_control_flow_on_shapes_has_no_kernels() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            return self.other(x) if x.shape[2] > 4 else x

    network = Chooses()
    graph = trace(network, torch.empty(1, 3, 16, 16))
    with pytest.raises(UserError, match="latency"):
        find_kernels(network, graph)


def test_prediction_is_bilinear_within_and_beyond_the_measured_sizes() -> None:
    """Any time of the form a + b i + c o + d i o is predicted exactly, at all sizes and between them."""

    def time(i: float, o: float) -> float:
        return 2 + 0.5 * i + 0.25 * o + 0.125 * i * o

    rows, columns = (4, 8, 16), (2, 6)
    kernel = KernelTimes(("a",), ("b",), rows, columns, tuple(tuple(time(i, o) for o in columns) for i in rows), "")
    for i, o in itertools.product(range(1, 30), range(1, 12)):
        assert kernel.predict({"a": i, "b": o, "c": 7}) == pytest.approx(time(i, o))
    joint = KernelTimes((), ("a", "b"), (0,), (10, 20, 40), ((1.0, 3.0, 5.0),), "")
    assert [joint.predict({"a": n, "b": 10}) for n in (0, 5, 10, 20, 30)] == pytest.approx([1, 2, 3, 4, 5])
    assert KernelTimes((), (), (0,), (0,), ((0.5,),), "").predict({"a": 3}) == 0.5
    assert KernelTimes((), ("a",), (0,), (10, 20), ((1.0, 9.0),), "").predict({"a": 2}) == 0  # not negative


def test_a_networks_latency_is_a_line_of_the_sum_of_its_kernels() -> None:
    _, graph = small()
    group = next(iter(graph.groups))
    kernels = {
        "one": KernelTimes((), (group,), (0,), (0, 10), ((1.0, 2.0),), ""),
        "two": KernelTimes((), (), (0,), (0,), ((4.0,),), ""),
    }
    costs = Costs(graph, table_of(graph, kernels, slope=2.0, intercept=0.5))
    channels = {**graph.default, group: 20}
    assert costs.of(channels, "latency") == 0.5 + 2 * (3 + 4)
    all_costs = costs.all(channels)
    assert all_costs == {
        "macs": graph.macs(channels),
        "params": graph.params(channels),
        "memory": graph.memory(channels),
        "latency": 14.5,
    }
    assert Costs(graph).all(channels).keys() == all_costs.keys() - {"latency"}
    with pytest.raises(UserError, match=r"no latency table.*latency\.table"):
        Costs(graph).of(channels, "latency")


def test_a_table_for_another_network_raises() -> None:
    _, graph = small()
    other = specimen("resnet18").graph
    with pytest.raises(UserError, match="latency table was measured for another network"):
        Costs(graph, table_of(other, {}))


def test_the_objective_with_several_limits() -> None:
    _, graph = small()
    costs = Costs(graph)
    half = {name: count // 2 for name, count in graph.default.items()}
    limits = {"macs": graph.macs() / 4, "params": graph.params() / 2}
    objective = Objective(costs, "macs", limits)
    assert objective.cost(graph.default) == 4
    assert objective.cost(half) == max(graph.macs(half) / limits["macs"], graph.params(half) / limits["params"])
    assert objective.stop(0.9, graph.default) == 1  # all limits are satisfied
    assert objective.stop(0.1, graph.default) == pytest.approx(0.4)
    assert Objective(costs, "macs").stop(0.25, graph.default) == graph.macs() / 4


DAMAGES: list[tuple[tuple[str, ...], Any]] = [
    (("slope",), -1.0),
    (("intercept",), float("nan")),
    (("intercept",), -100.0),
    (("default", "features.0.0"), "2"),
    (("kernels", "one", "output_sizes"), ["1", "2"]),
    (("kernels", "one", "_known"), []),
    (("check", "rank_correlation"), 2.0),
    (("kernels", "one", "ms"), [[1.0]]),
    (("kernels", "one", "ms"), [[1.0, 2.0], [1.0, 2.0]]),
    (("kernels", "one", "ms"), [[1.0, -2.0]]),
    (("kernels", "one", "ms"), [[1.0, None]]),
    (("kernels", "one", "output_sizes"), [2, 1]),
    (("kernels", "one", "input_sizes"), [0, 1]),
    (("kernels", "one", "outputs"), ["gone"]),
    (("check", "median_error"), None),
    (("check", "measured"), [1.0]),
    (("check", "measured"), []),
]


def test_a_table_is_restored_from_its_file() -> None:
    _, graph = small()
    kernels = {"one": KernelTimes((), ("features.0.0",), (0,), (1, 2), ((1.0, 2.0),), "work")}
    check = Check((1.0, 2.0), (1.5, 2.5), 0.1, 0.2, 1.0)
    table = table_of(graph, kernels, slope=1.5, intercept=-0.5, check=check)
    again = LatencyTable.from_dict(json.loads(json.dumps(table.to_dict())), "table.json")
    assert again == table
    assert "rank correlation 1.000" in table.summary()
    assert table.reliable
    assert "too low" not in table.summary()
    unreliable = dataclasses.replace(table, check=dataclasses.replace(check, rank_correlation=0.3))
    assert not unreliable.reliable
    assert "rank correlation 0.300, which is too low" in unreliable.summary()
    for (*parents, last), value in DAMAGES:
        damaged = json.loads(json.dumps(table.to_dict()))
        section = damaged
        for name in parents:
            section = section[name]
        section[last] = value
        with pytest.raises(UserError, match=r"table\.json is damaged"):
            LatencyTable.from_dict(damaged, "table.json")
    damaged = table.to_dict()
    del damaged["target"]
    with pytest.raises(UserError, match=r"table\.json is damaged"):
        LatencyTable.from_dict(damaged, "table.json")
    with pytest.raises(UserError, match=r"table\.json is not a latency table of format 1"):
        LatencyTable.from_dict({"a": 1}, "table.json")


def test_the_fitted_line_and_the_errors_in_closed_form() -> None:
    sums = [1.0, 2.0, 3.0, 7.0]
    assert fit_line(sums, [3 * total + 0.5 for total in sums]) == pytest.approx((3, 0.5))
    assert fit_line([1.0, 2.0, 3.0], [2.0, 2.0, 1.0]) == pytest.approx((0, (1 / 2 + 1 / 2 + 1) / (1 / 4 + 1 / 4 + 1)))
    check = prediction_check([1.1, 2.0, 2.7, 4.0], [1.0, 2.0, 3.0, 4.0])
    assert check.median_error == pytest.approx(0.05)
    assert check.error_95 == pytest.approx(0.1)
    assert check.rank_correlation == pytest.approx(1)
    assert prediction_check([2.0, 1.0, 3.0], [1.0, 2.0, 3.0]).rank_correlation == pytest.approx(0.5)


def test_equal_times_have_no_rank_correlation() -> None:
    assert prediction_check([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).rank_correlation == 0
    assert prediction_check([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]).rank_correlation == 0


def test_random_configurations_cover_the_grid() -> None:
    _, graph = small()
    grid = graph.grid(GridSpec(1.5, 0.25, 12, 1))
    drawn = random_configurations(grid, 40, seed=0)
    assert all(channels[name] in levels for channels in drawn for name, levels in grid.items())
    assert drawn == random_configurations(grid, 40, seed=0) != random_configurations(grid, 40, seed=1)
    costs = [graph.macs(channels) for channels in drawn]
    ends = [graph.macs({name: levels[end] for name, levels in grid.items()}) for end in (0, -1)]
    assert max(costs) > 0.6 * ends[0]
    assert min(costs) < 4 * ends[1]


def test_tables_are_measured_from_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the time is proportional to MACs, predictions are exact. A second measurement continues from the cache."""
    network, graph = small()
    grid = graph.grid(GridSpec(1.5, 0.25, 4, 1))
    measurements: list[int] = []

    def by_macs(module: nn.Module, values: Any, target: Target, seconds: float = 0) -> measuring.Latency:
        macs = sum(part.weight.numel() * out for part, out in _outputs(module, values))
        measurements.append(macs)
        return measuring.Latency(1e-3 * macs + 0.01, 0, 0)

    monkeypatch.setattr(measuring, "measure_latency", by_macs)
    arguments: dict[str, Any] = {
        "name": "small",
        "points": None,
        "check_networks": 10,
        "cache": tmp_path / "kernels.json",
    }
    table = measure_table(network, graph, grid, TARGET, **arguments)
    for channels in random_configurations(grid, 5, seed=9):
        kernels = 1e-3 * graph.macs(channels) + 0.01 * len(table.kernels)
        assert table.kernels_ms(channels) == pytest.approx(kernels)
        assert table.predict(channels) == pytest.approx(1e-3 * graph.macs(channels) + 0.01)
    assert table.check is not None
    assert len(table.check.measured) == 10
    assert table.check.rank_correlation == pytest.approx(1)
    count = len(measurements)
    printed = capsys.readouterr().err
    assert "continuing" not in printed
    points = printed.partition("latency of kernels: ")[2].split("/")[0]
    again = measure_table(network, graph, grid, TARGET, **arguments)
    assert again == table
    assert len(measurements) - count == 10 + measuring.FITTED_ON  # only whole networks
    assert f"latency of kernels: continuing at point {points} of {points}\n" in capsys.readouterr().err


def _outputs(module: nn.Module, values: Any) -> list[tuple[nn.Conv2d | nn.Linear, int]]:
    """Returns the layers that run, with the number of positions of their outputs."""
    outputs: list[tuple[nn.Conv2d | nn.Linear, int]] = []
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.register_forward_hook(
                lambda m, _, out: outputs.append((m, out[0].numel() // out.shape[1])),  # H' * W'
            )
    with torch.inference_mode():
        (values if isinstance(values, Arguments) else Arguments.of(tuple(values))).run(module)
    return outputs


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "compile"])
def test_each_runtime_computes_the_networks_output(runtime: str) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    network, _ = small()
    target = dataclasses.replace(TARGET, runtime=runtime)
    images = torch.rand(1, 3, 8, 8)
    expected = network.eval()(images)
    result = prepare_forward(network, [images], target)()
    output = result[0] if isinstance(result, list) else result
    torch.testing.assert_close(torch.as_tensor(output), expected.detach(), rtol=1e-4, atol=1e-5)
    latency = measuring.measure_latency(network, [images], target, seconds=0.02)
    assert 0 < latency.low <= latency.median <= latency.high


def test_settings_that_a_runtime_does_not_support(monkeypatch: pytest.MonkeyPatch) -> None:
    check_runtime("eager", "cuda", "bf16", True)
    with pytest.raises(UserError, match=r"latency\.device is cuda.*set latency\.device to cpu"):
        check_runtime("onnxruntime", "cuda", "fp32", False)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx, onnxscript, onnxruntime cannot be found; install"):
        check_runtime("onnxruntime", "cpu", "fp32", False)


def test_networks_that_a_runtime_cannot_run() -> None:
    with pytest.raises(UserError, match=r"latency\.channels_last is true.*set latency\.channels_last to false"):
        check_runtime("onnxruntime", "cpu", "fp32", True)
    with pytest.raises(UserError, match=r"torch cannot run .* cpu in fp32 with batch 1 \(Given groups=1"):
        prepare_forward(nn.Conv2d(3, 8, 1), [torch.rand(1, 4, 8, 8)], TARGET)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).real

    with pytest.raises(UserError, match=r"ONNX Runtime cannot run this network \(") as raised:
        prepare_forward(Unknown(), [torch.rand(1, 3, 4, 4)], dataclasses.replace(TARGET, runtime="onnxruntime"))
    assert "\x1b" not in str(raised.value)
    assert "linalg_eig" in str(raised.value)  # the reason and not the exporter's banner


def test_a_network_that_fails_in_onnx_runtime_raises_before_it_is_measured() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Beyond(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, (x[0, 0, 0, 0] + 100).long()]

    with pytest.raises(UserError, match=r"ONNX Runtime cannot run this network \("):
        prepare_forward(Beyond(), [torch.zeros(1, 3, 4, 4)], dataclasses.replace(TARGET, runtime="onnxruntime"))


def test_measuring_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    threads: list[int] = []

    class Records(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            threads.append(torch.get_num_threads())
            return x

    measuring.measure_latency(Records(), [torch.rand(1)], dataclasses.replace(TARGET, threads=before + 1), seconds=0)
    assert set(threads) == {before + 1}
    assert torch.get_num_threads() == before


def test_measured_memory_in_closed_form() -> None:
    """Two layers: the peak is that of the weights, the input, the hidden activation and the output."""
    network = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1, bias=False)).eval()
    images = torch.rand(1, 3, 10, 10)
    weights, plane = 4 * (3 * 8 + 8 * 4), 4 * 100
    # The caller keeps the input, and the hidden tensor is alive while the second layer runs.
    assert measure_memory(network, images) == weights + (3 + 8 + 4) * plane
    in_place = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(inplace=True)).eval()
    assert measure_memory(in_place, images) == 4 * 24 + (3 + 8) * plane
    graph = trace(network, images)
    assert measure_memory(network, images) >= graph.memory()


def test_the_report_measures_the_memory_of_one_image() -> None:
    network, graph = small()
    values = read_yaml(ROOT / "params.yaml")["latency"]
    targets = [latency_target(LatencyParams(**values | {"batch": count})) for count in (1, 8)]
    costs = [measure_networks([network], graph.inputs, target)[0] for target in targets]
    assert costs[0].memory == costs[1].memory >= graph.memory()


def test_the_report_measures_with_the_tables_settings_if_it_was_measured_here() -> None:
    _, graph = small()
    params = LatencyParams(**read_yaml(ROOT / "params.yaml")["latency"])
    here = latency_target(params)
    assert report_target(params, None) == here
    table = table_of(graph, {})
    assert report_target(params, table) == here  # the table was measured on another machine
    other = dataclasses.replace(here, batch=64, threads=2, channels_last=True)
    assert report_target(params, dataclasses.replace(table, target=other)) == other


def test_functions_are_measured_in_turns() -> None:
    """A machine that becomes slower meets all functions alike: the medians of equal functions hardly differ."""
    order: list[str] = []
    latencies = latencies_in_turns([lambda: order.append("a"), lambda: order.append("b")], lambda: order.append("|"))
    assert all(0 <= latency.low <= latency.median <= latency.high for latency in latencies)
    blocks = [block for block in "".join(order).split("|") if block]
    assert all(len({*block}) == 1 for block in blocks)  # the device is waited for at the end of each block
    turns = len(blocks) // 2 - 2
    assert [block[0] for block in blocks] == ["a", "a", "b", "b", *["a", "b"] * turns]
    assert MIN_TURNS <= turns <= MAX_TURNS
    slow, fast = latencies_in_turns([lambda: time.sleep(0.004), lambda: time.sleep(0.001)])
    for latency, least in ((slow, 4), (fast, 1)):
        assert least <= latency.low <= latency.median <= latency.high
    assert fast.median < slow.median


def test_slow_functions_have_fewer_turns() -> None:
    calls: list[int] = []
    latencies_in_turns([lambda: (calls.append(1), time.sleep(0.15))])
    assert 2 + MIN_TURNS <= len(calls) < 2 + MAX_TURNS
    assert latencies_in_turns([]) == []


@pytest.mark.parametrize("runtime", ["eager", "compile", "onnxruntime"])
def test_networks_are_measured_in_turns(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network runs in every turn, with the threads of the target, which are restored."""
    threads = torch.get_num_threads()
    networks = [small()[0] for _ in range(2)]
    _, graph = small()
    ran: list[tuple[int, int]] = []
    turns = latencies_in_turns

    def recorded(runs: Any, finish: Any) -> Any:
        def watched(index: int) -> None:
            ran.append((index, torch.get_num_threads()))
            runs[index]()

        return turns([functools.partial(watched, index) for index in range(len(runs))], finish)

    monkeypatch.setattr("autoslim.resources.measure.latencies_in_turns", recorded)
    target = dataclasses.replace(TARGET, runtime=runtime, threads=threads + 1)
    costs = measure_networks(networks, graph.inputs, target)
    assert all(each.latency_low <= each.latency <= each.latency_high for each in costs)
    assert {*ran} == {(0, threads + 1), (1, threads + 1)}
    assert torch.get_num_threads() == threads


def test_no_warning_about_cuda_where_there_is_only_its_compiler(tmp_path: Path) -> None:
    """torch's import of it would print one in the middle of a report. The first command shows that it would."""
    code = "from torch.utils import cpp_extension; cpp_extension._find_cuda_home()"
    environment = os.environ | {"CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    for start, printed in (("", True), ("import autoslim.pipeline.entry; ", False)):
        command = [sys.executable, "-c", start + code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert ("No CUDA runtime is found" in done.stderr) == printed


@pytest.mark.parametrize(
    ("runtime", "precision"), [("openvino", "fp32"), ("onnxruntime", "int8"), ("openvino", "int8")]
)
def test_exported_networks_compute_what_the_network_computes(runtime: str, precision: str) -> None:
    """Up to the rounding of int8, whose ranges are those of normal random inputs."""
    for package in ("onnxscript", runtime, *(["nncf"] if (runtime, precision) == ("openvino", "int8") else [])):
        pytest.importorskip(package)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten())
    images = torch.randn(1, 3, 8, 8)
    target = dataclasses.replace(TARGET, runtime=runtime, precision=precision)
    [output] = prepare_forward(network, [images], target)()  # type: ignore[misc]
    with torch.inference_mode():
        expected = network.eval()(images)
    error = (torch.as_tensor(output) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5 if precision == "fp32" else 1e-5 < error < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("eager", "cpu", "int8", False),
            r"latency\.precision is int8, but eager .*runtime to onnxruntime or openvino",
        ),
        (("openvino", "cpu", "bf16", False), r"latency\.precision is bf16, but openvino .*set .* to fp32 or int8"),
        (("tensorrt", "cpu", "fp32", False), r"latency\.device is cpu, but tensorrt is supported only with cuda"),
        (("tensorrt", "cuda", "int8", False), r"latency\.precision is int8, but tensorrt is supported only with fp32"),
    ],
)
def test_precisions_that_a_runtime_does_not_support(settings: tuple[str, str, str, bool], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_runtime(*settings)


def test_weights_beyond_the_caches_in_closed_form() -> None:
    """The fit finds the coefficients of latencies with a bend, and keeps the line if there is none."""
    weights = [1e6 * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)]
    sums = [1 + 0.1 * (n * 7 % 5) + 2e-7 * count for n, count in enumerate(weights)]
    bent = [0.5 + 1.5 * total + 4e-7 * max(0, count - 5e6) for total, count in zip(sums, weights, strict=True)]
    assert fit_weights(sums, weights, bent) == pytest.approx((1.5, 0.5, 4e-7, 5e6), rel=1e-4)
    draw = torch.Generator().manual_seed(0)
    noise = (1 + 0.05 * torch.randn(12, generator=draw)).tolist()
    straight = [(0.5 + 1.5 * total) * factor for total, factor in zip(sums, noise, strict=True)]
    assert fit_weights(sums, weights, straight) is None
    assert fit_weights(sums, [0.0] * 12, bent) is None  # a table without numbers of weights


def test_a_table_counts_the_weights_of_its_kernels() -> None:
    rows = ((10, 20), (20, 40))
    kernel = KernelTimes(("features.0.0",), (), (1, 2), (0,), ((1.0,), (2.0,)), "", ((10,), (20,)))
    assert [kernel.count_weights({"features.0.0": n}) for n in (1, 2, 4)] == [10, 20, 40]
    with pytest.raises(ValueError, match="weights do not match"):
        KernelTimes((), (), (0,), (0,), ((1.0,),), "", rows)
    _, graph = small()
    table = table_of(graph, {"a": kernel, "b": kernel}, slope=2.0, intercept=0.5, weight_ms=0.1, cached_weights=25.0)
    channels = {**graph.default, "features.0.0": 2}
    assert table.predict(channels) == pytest.approx(0.5 + 2 * (2 + 2) + 0.1 * (40 - 25))
    assert table.predict({**channels, "features.0.0": 1}) == pytest.approx(0.5 + 2 * (1 + 1))  # within the caches
    old = {k: v for k, v in table.to_dict().items() if k not in ("weight_ms", "cached_weights")}
    old["kernels"] = {name: {k: v for k, v in of.items() if k != "weights"} for name, of in old["kernels"].items()}
    again = LatencyTable.from_dict(json.loads(json.dumps(old)), "old.json")  # of an earlier version
    assert again.predict(channels) == pytest.approx(0.5 + 2 * (2 + 2))


def test_the_shares_of_good_predictions_are_in_the_tables_file() -> None:
    check = prediction_check([1.0, 1.04, 1.08, 0.8], [1.0, 1.0, 1.0, 1.0])
    assert (check.within(0.05), check.within(0.1)) == (0.5, 0.75)
    _, graph = small()
    kernel = KernelTimes((), (), (0,), (0,), ((1.0,),), "")
    table = table_of(graph, {"one": kernel}, check=check)
    values = json.loads(json.dumps(table.to_dict()))
    assert (values["check"]["within_5_percent"], values["check"]["within_10_percent"]) == (0.5, 0.75)
    assert LatencyTable.from_dict(values, "table.json") == table
    assert "50% are within ±5 % and 75% within ±10 %" in table.summary()
