"""Inputs of any rank, several inputs, outputs of any structure, parts of a network, wrappers and hooks.

Costs are compared with ``FlopCounterMode`` on a real run, and resized networks with the supernet, bit by bit.
"""

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from specimens import batch_statistics, random_channels, shuffle_weights
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoslim import Supernet, recalibrate, resize, sandwich_step, sort_channels, trace
from autoslim.channels.equivalence import output_tensors
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.inputs import Arguments
from autoslim.errors import UserError
from autoslim.resources.latency import measure as measuring
from autoslim.resources.latency.backends import prepare_forward
from autoslim.resources.latency.kernels import find_kernels
from autoslim.resources.latency.table import LatencyTable, Target
from autoslim.resources.measure import measure_memory, measure_networks
from autoslim.resources.profile import counted_at_run_time
from autoslim.search.incremental import IncrementalEvaluator, verified_evaluator

TARGET = Target("here", "eager", "cpu", 1, 1, "fp32", False, "")


def macs_of(network: nn.Module, arguments: Arguments) -> int:
    """Returns the multiply-adds of a run on the CPU."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        arguments.run(network.eval())
    return counter.get_total_flops() // 2


def check(network: nn.Module, graph: ChannelGraph, inputs: Any) -> None:
    """Checks costs, resizing, the supernet and the incremental evaluation of a network with two inputs in a batch."""
    arguments = Arguments.of(inputs)
    shuffle_weights(network)
    assert graph.groups
    assert graph.macs() == macs_of(network, arguments.map(lambda tensor: tensor[:1]))
    channels = random_channels(graph, 1, 0.3, 0.9)
    supernet = Supernet(resize(network, graph, graph.default), graph).eval()
    cut = batch_statistics(supernet.extract(channels))
    assert graph.macs(channels) == macs_of(cut, arguments.map(lambda tensor: tensor[:1]))
    assert graph.params(channels) == sum(parameter.numel() for parameter in cut.parameters())
    supernet.select(channels)
    with torch.no_grad():
        expected = output_tensors(arguments.run(batch_statistics(cut)))
        found = output_tensors(arguments.run(supernet))
    assert expected
    assert all(map(torch.equal, expected, found))
    assert all(tensor.std() > 0 for tensor in found)
    evaluator, reason = verified_evaluator(supernet, arguments)
    assert evaluator is not None, reason
    narrower = {name: max(graph.groups[name].unit, count // 2) for name, count in channels.items()}
    with torch.no_grad():
        for group, output in evaluator.run(arguments, channels, narrower):
            supernet.select(channels if group is None else channels | {group: narrower[group]})
            pairs = zip(output_tensors(arguments.run(supernet)), output_tensors(output), strict=True)
            assert all(torch.allclose(one, other, atol=1e-5) for one, other in pairs)
            supernet.select(channels)
        ordered = sort_channels(network, graph, "l1").eval()
        pairs = zip(output_tensors(arguments.run(network.eval())), output_tensors(arguments.run(ordered)), strict=True)
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in pairs)


def check_export(network: nn.Module, graph: ChannelGraph, inputs: Any) -> None:
    arguments = Arguments.of(inputs)
    thinner = resize(network, graph, graph.scaled(0.5, 1)).eval()
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in [tensor.name for tensor in graph.inputs.tensors]}
    program = torch.export.export(thinner, arguments.args, arguments.kwargs, dynamic_shapes=shapes)
    more = arguments.map(lambda tensor: torch.cat([tensor, tensor[:1]]))
    with torch.no_grad():
        assert torch.allclose(more.run(program.module()), more.run(thinner), atol=1e-6)


def bodies(rank: int) -> nn.Module:
    """A residual network of small blocks with ``rank`` axes after the channels."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[rank - 1]
    whole = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1]
    dropout = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[rank - 1]

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(conv(2, 8, 3, padding=1), norm(8), nn.ReLU(), pool(2))
            self.wide = nn.Sequential(conv(8, 16, 1), norm(16), nn.ReLU6(), conv(16, 16, 3, 1, 1, groups=16), norm(16))
            self.back = nn.Sequential(dropout(0.5), conv(16, 8, 1), norm(8))
            self.head = nn.Sequential(whole(1), nn.Flatten(), nn.Linear(8, 5))

        def forward(self, signal: Tensor) -> Tensor:
            signal = self.stem(signal)
            out: Tensor = self.head(torch.relu(signal + self.back(self.wide(signal))))
            return out

    return Body()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_any_rank(rank: int) -> None:
    network = bodies(rank)
    graph = trace(network, torch.empty(1, 2, *[8] * rank))
    assert set(graph.groups) == {"stem.0", "wide.0"}
    assert graph.input_shape == (2, *[8] * rank)
    inputs = torch.randn(2, 2, *[8] * rank)
    check(network, graph, inputs)
    check_export(network, graph, inputs)
    assert graph.macs(pooling=True) - graph.macs() == 8 * 8**rank + 8 * 4**rank  # the elements that are averaged
    assert counted_at_run_time(network, graph, graph.default)["ptflops"]["macs"] == graph.macs()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures for a short time."""
    monkeypatch.setattr(measuring, "KERNEL_SECONDS", 0.001)
    monkeypatch.setattr(measuring, "NETWORK_SECONDS", 0.001)


@pytest.mark.parametrize("rank", [1, 3])
def test_memory_and_latency_at_any_rank(rank: int, tmp_path: Path, quick: None) -> None:
    network = bodies(rank).eval()
    graph = trace(network, torch.empty(1, 2, *[8] * rank))
    measured = measure_memory(network, torch.randn(1, 2, *[8] * rank))
    assert graph.memory() <= measured <= 1.5 * graph.memory()
    for channels in (graph.default, graph.scaled(0.5, 1)):
        for kernel in find_kernels(network, graph, batch=2):
            module, values = kernel.at(channels)
            prepare_forward(module, values, dataclasses.replace(TARGET, batch=2))()
    for channels_last in (False, True):
        target = dataclasses.replace(TARGET, channels_last=channels_last)
        [costs] = measure_networks([bodies(rank)], graph.inputs, target)
        assert costs.latency > 0
    grid = {name: (group.size, group.size // 2) for name, group in graph.groups.items()}
    table = measuring.measure_table(
        network, graph, grid, TARGET, name="a", points=2, check_networks=2, cache=tmp_path / "cache.json"
    )
    assert LatencyTable.from_dict(table.to_dict(), "here").input_shape == graph.input_shape


class Two(nn.Module):
    """Joins an image and a depth map, and reads a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depth = nn.Conv2d(1, 8, 3, padding=1)
        self.vector = nn.Linear(4, 12)
        self.joined = nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, image: Tensor, depth: Tensor, vector: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        maps = self.joined(torch.cat([self.image(image), torch.relu(self.depth(depth))], 1)).mean((2, 3))
        if vector is not None:
            maps = maps * torch.sigmoid(self.vector(vector))
        out: Tensor = self.head(maps * scale)
        return out


def shapes_of_two(batch: int, *, vector: bool = True) -> dict[str, Tensor]:
    tensors = {"image": torch.randn(batch, 3, 8, 8), "depth": torch.randn(batch, 1, 8, 8)}
    return tensors | ({"vector": torch.randn(batch, 4)} if vector else {})


@pytest.mark.parametrize("vector", [True, False])
@pytest.mark.parametrize("as_tuple", [True, False])
def test_several_inputs(vector: bool, as_tuple: bool) -> None:
    def inputs(batch: int) -> Any:
        tensors = shapes_of_two(batch, vector=vector)
        return tuple(tensors.values()) if as_tuple else tensors

    network = Two()
    graph = trace(network, inputs(1))
    names = ["image", "depth", "vector"][: 3 if vector else 2]
    assert [tensor.name for tensor in graph.inputs.tensors] == names
    assert graph.input_shape == ((3, 8, 8), (1, 8, 8), (4,))[: len(names)]
    assert str(graph.inputs).startswith("image=3x8x8, depth=1x8x8")
    assert set(graph.groups) == {"image.0", "depth", "joined"}
    assert ("vector" in graph.groups["joined"].members) == vector
    check(network, graph, inputs(2))
    check_export(network, graph, inputs(2))
    assert counted_at_run_time(network, graph, graph.default)["ptflops"]["macs"] == graph.macs()


class Aligned(Two):
    """Branches on the sizes of its inputs, so it is traced at these sizes."""

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        if depth.shape[2:] != image.shape[2:]:
            depth = nn.functional.interpolate(depth, image.shape[2:])
        return super().forward(image, depth)


def test_several_inputs_with_code_that_depends_on_their_sizes() -> None:
    network = Aligned()
    inputs = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 4, 4)
    graph = trace(network, inputs)
    assert set(graph.groups) == {"image.0", "depth", "joined"}
    shuffle_weights(network)
    narrow = random_channels(graph, 1, 0.3, 0.9)
    cut = batch_statistics(resize(network, graph, narrow))
    supernet = Supernet(network, graph).eval()
    supernet.select(narrow)
    assert torch.equal(supernet(*inputs), cut(*inputs))
    assert graph.macs(narrow) == macs_of(cut, Arguments.of((inputs[0][:1], inputs[1][:1])))
    assert "Aligned" in verified_evaluator(supernet, Arguments.of(inputs))[1]
    kept = trace(Aligned(), inputs, leaves=["joined"])
    assert (kept.leaves, kept.inputs) == ({"joined"}, graph.inputs)


def test_memory_and_latency_of_several_inputs(tmp_path: Path, quick: None) -> None:
    network = Two().eval()
    graph = trace(network, shapes_of_two(1))
    measured = measure_memory(network, Arguments.of(shapes_of_two(1)))
    assert graph.memory() <= measured <= 1.5 * graph.memory()
    grid = {name: (group.size, group.size // 2) for name, group in graph.groups.items()}
    table = measuring.measure_table(
        network, graph, grid, TARGET, name="a", points=2, check_networks=2, cache=tmp_path / "cache.json"
    )
    assert LatencyTable.from_dict(table.to_dict(), "here").input_shape == graph.input_shape
    assert measure_networks([Two()], graph.inputs, TARGET)[0].memory == measured


def test_a_network_with_several_inputs_is_trained_and_recalibrated() -> None:
    network = Two()
    graph = trace(network, shapes_of_two(1))
    supernet = Supernet(network, graph)
    narrow = graph.scaled(0.5, 1)
    batch = shapes_of_two(4)
    sandwich_step(supernet, (batch, torch.tensor([0, 1, 2, 3])), [narrow])
    assert all(parameter.grad is not None for parameter in supernet.network.parameters())
    cut = supernet.extract(narrow)
    assert recalibrate(cut, [batch, shapes_of_two(4)]) == 2
    assert recalibrate(cut, [tuple(batch.values())]) == 1
    with torch.no_grad():
        expected = cut.image[0](batch["image"]).mean((0, 2, 3))
    torch.testing.assert_close(cut.image[1].running_mean, expected)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(5, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, maps: dict[str, list[Tensor]]) -> Tensor:
        out: Tensor = self.last(torch.relu(self.first(maps["all"][0]) + self.second(maps["all"][1])))
        return out


def test_an_input_that_is_a_container_of_tensors() -> None:
    network = Nested()
    graph = trace(network, ({"all": [torch.empty(1, 3, 4, 4), torch.empty(1, 5, 4, 4)]},))
    assert str(graph.inputs) == "maps['all'][0]=3x4x4, maps['all'][1]=5x4x4"
    assert graph.groups["first"].members == ("first", "second")
    check(network, graph, ({"all": [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)]},))


class Text(nn.Module):
    """A classifier of token ids. The ids are checked, as an embedding on a GPU or an assertion would."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.wide, self.last = nn.Conv1d(8, 16, 3, padding=1), nn.Conv1d(16, 4, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        maps = self.embed(tokens).transpose(1, 2) * mask[:, None]
        out: Tensor = self.last(torch.relu(self.wide(maps))).amax(2)
        return out


def test_integers_and_booleans() -> None:
    network = Text()
    tokens = torch.randint(5, 20, (2, 12))
    graph = trace(network, (tokens[:1], torch.ones(1, 12, dtype=torch.bool)))
    first, second = graph.inputs.tensors
    assert (first.dtype, second.dtype) == (torch.int64, torch.bool)
    drawn = graph.inputs.noise(50, torch.Generator()).tensors[0]
    assert set(drawn.unique().tolist()) <= set(range(int(tokens[0].min()), int(tokens[0].max()) + 1))
    assert set(graph.groups) == {"wide"}
    check(network, graph, (tokens, torch.rand(2, 12) > 0.3))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            lambda: torch.empty(1, 3, 8, 8),
            r"Two.forward\(image: .* cannot be called .*'depth'.*; give an example",
        ),
        (lambda: shapes_of_two(1) | {"other": torch.empty(1)}, "unexpected keyword argument 'other'"),
        (lambda: (torch.empty(1, 3, 8, 8), torch.empty(1, 1, 8, 8), torch.empty(1, 5)), "image=3x8x8, .*vector=5"),
        (lambda: (torch.empty(1, 3, 8, 8), torch.empty(())), "input depth of Two is a tensor without dimensions"),
        (lambda: (torch.empty(1, 3, 8, 8), object()), "input depth of Two is of type object"),
        (lambda: (1, 2), "contains no tensor"),
    ],
)
def test_wrong_examples_are_refused(example: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trace(Two(), example())


def test_inputs_with_a_default_are_named_if_the_network_needs_them() -> None:
    class Needs(Nested):
        def forward(self, first: Tensor, second: Any = None) -> Tensor:
            out: Tensor = self.last(self.first(first) + self.second(second))
            return out

    with pytest.raises(UserError, match=r"give the input size .*, and examples of its other inputs \(second\)"):
        trace(Needs(), torch.empty(1, 3, 4, 4))


@dataclasses.dataclass
class Record:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    note: str = ""


class ModelOutput(OrderedDict[str, Tensor]):
    """Like the outputs of transformers: a mapping that torch's pytree does not know."""


class Outputs(nn.Module):
    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.make = make
        self.stem, self.wide, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Any:
        maps = torch.relu(self.wide(torch.relu(self.stem(images))))
        return self.make(self.last(maps), maps)


@pytest.mark.parametrize(
    "make",
    [
        lambda logits, maps: {"out": logits, "maps": (maps, [logits])},
        lambda logits, maps: (logits, (maps, {"a": maps})),
        lambda logits, maps: Record(logits, (maps,)),
        lambda logits, maps: ModelOutput(logits=logits, maps=maps),
        lambda logits, maps: (logits, None, 3, "text", [maps]),
    ],
)
def test_outputs_of_any_structure_keep_their_channels(make: Callable[[Tensor, Tensor], Any]) -> None:
    network = Outputs(make)
    graph = trace(network, torch.empty(1, 3, 8, 8))
    assert set(graph.groups) == {"stem"}
    assert graph.not_prunable["wide"] == "it is the network's output"
    check(network, graph, torch.randn(2, 3, 8, 8))
    measured = measure_memory(network.eval(), torch.randn(1, 3, 8, 8))
    assert graph.memory() <= measured <= 1.5 * graph.memory()


def test_a_segmentation_network() -> None:
    network = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=3, aux_loss=True
    )
    graph = trace(network, torch.empty(1, 3, 32, 32))
    channels = random_channels(graph, 0, 0.1, 0.2)
    small = resize(network, graph, channels)
    shuffle_weights(small)
    supernet = Supernet(small, graph).eval()
    narrow = {name: max(graph.groups[name].unit, count // 2) for name, count in channels.items()}
    cut = batch_statistics(supernet.extract(narrow))
    assert graph.macs(narrow) == macs_of(cut, Arguments.of(torch.randn(1, 3, 32, 32)))
    supernet.select(narrow)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = batch_statistics(cut)(images), supernet(images)
    assert list(expected) == list(found) == ["out", "aux"]
    assert all(torch.equal(expected[key], found[key]) for key in expected)


DETECTORS = {
    "retinanet_resnet50_fpn": {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 20},
    "fasterrcnn_resnet50_fpn": {"box_score_thresh": 0.0, "box_detections_per_img": 5, "rpn_post_nms_top_n_test": 20},
}


@pytest.mark.parametrize("name", DETECTORS)
def test_the_backbone_of_a_detector(name: str) -> None:
    """The backbone is cut inside the detector, which then computes the same as the supernet."""
    torch.manual_seed(0)
    make = getattr(torchvision.models.detection, name)
    network = make(
        weights=None, weights_backbone=None, num_classes=3, min_size=32, max_size=32, **DETECTORS[name]
    ).eval()
    images = [torch.rand(3, 32, 32), torch.rand(3, 28, 32)]
    graph = trace(network, images[:1], part="backbone")
    assert graph.part == "backbone"
    assert graph.input_shape == (3, 32, 32)
    assert len(graph.groups) == 38
    assert all(group.startswith("backbone.") for group in graph.groups)
    channels = random_channels(graph, 0, 0.1, 0.3)
    supernet = Supernet(resize(network, graph, channels), graph).eval()
    narrow = {name: max(1, count // 2) for name, count in channels.items()}
    cut = batch_statistics(supernet.extract(narrow))
    supernet.select(narrow)
    with torch.no_grad():
        expected, found = output_tensors(cut(images)), output_tensors(supernet(images))
    assert len(expected) == 6  # boxes, labels and scores of each image
    assert all(len(tensor) > 0 for tensor in expected)
    assert all(map(torch.equal, expected, found))

    macs = 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal macs
        assert isinstance(module, nn.Conv2d)
        macs += output[0].numel() * module.weight[0].numel()

    for module in cut.backbone.modules():  # type: ignore[union-attr]
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        cut.eval()(images[:1])
    assert graph.macs(narrow) == macs
    assert graph.params(narrow) == sum(parameter.numel() for parameter in cut.backbone.parameters())  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"torch\.fx cannot trace"):
        trace(network, torch.rand(1, 3, 32, 32))


class Whole(nn.Module):
    """Has a part that is called once, one that is called twice, and one whose module is also called from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU())
        self.twice = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1))
        self.partly = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.never = nn.Conv2d(6, 6, 1)
        self.boxes = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.partly(self.twice(self.twice(self.body(images))))
        maps = maps + self.partly[2](self.partly[0](maps))
        if maps.sum() > 0:  # cannot be traced
            maps = -maps
        out: Tensor = self.boxes(maps.permute(0, 2, 3, 1).reshape(-1, 6))
        return out


def test_a_part_has_the_names_of_the_whole_network() -> None:
    network = Whole()
    example = torch.randn(1, 3, 4, 4)
    graph = trace(network, example, part="body")
    alone = trace(network.body, example)
    assert list(graph.groups) == [f"body.{name}" for name in alone.groups]
    half, half_alone = {"body.0": 4}, {"0": 4}
    for resource in ("macs", "params", "memory"):
        assert graph.cost(half, resource) == alone.cost(half_alone, resource)
    cut, expected = resize(network, graph, half), resize(network.body, alone, half_alone)
    state = {f"body.{name}": tensor for name, tensor in expected.state_dict().items()}
    assert cut.state_dict().keys() == network.state_dict().keys()
    assert all(
        torch.equal(tensor, state.get(name, network.state_dict()[name])) for name, tensor in cut.state_dict().items()
    )
    assert cut.eval()(example).shape == network.eval()(example).shape
    assert counted_at_run_time(network, graph, half)["ptflops"]["macs"] == graph.macs(half)
    shuffle_weights(network)
    ordered = sort_channels(network, graph, "bn_scale").eval()
    assert not torch.equal(ordered.body[0].weight, network.body[0].weight)
    torch.testing.assert_close(ordered(example), network.eval()(example))
    assert trace(network, example, part="body", leaves=["body.2"]).leaves == {"body.2"}


def test_a_part_has_no_incremental_evaluation_and_no_kernels() -> None:
    network = Whole()
    graph = trace(network, torch.randn(1, 3, 4, 4), part="body")
    with pytest.raises(UserError, match="only 'body' was traced"):
        IncrementalEvaluator(Supernet(network, graph).eval())
    with pytest.raises(UserError, match=r"only 'body' was: trace and measure network\.body"):
        find_kernels(network, graph)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("bodi", "part 'bodi' is not a module of Whole; similar names: body"),
        ("twice", "Whole calls part 'twice' 2 times; name a module that it calls once"),
        ("never", "Whole calls part 'never' not at all"),
        ("partly", r"Whole calls 'partly\.\d', which is inside part 'partly', also from outside of it"),
        ("boxes", r"part 'boxes' gets a tensor of shape \(16, 6\) for 1 input"),
    ],
)
def test_parts_that_cannot_be_slimmed_alone(part: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trace(Whole(), torch.randn(1, 3, 4, 4), part=part)


def test_a_part_that_shares_a_weight_is_refused() -> None:
    network = Whole()
    network.never.weight = network.body[3].weight
    network.tied = nn.Conv2d(3, 8, 1)
    network.tied.weight = network.body[0].weight
    with pytest.raises(UserError, match=r"body\.0\.weight in part 'body' is the same tensor as tied\.weight outside"):
        trace(network, torch.randn(1, 3, 4, 4), part="body")


def test_code_outside_of_a_part_that_reads_its_channels() -> None:
    class Reads(Whole):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + self.body[0].weight.view(8, 3).sum()

    with pytest.raises(UserError, match="Reads does not run with half of the channels in part 'body': shape"):
        trace(Reads(), torch.randn(1, 3, 4, 4), part="body")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_scripted_and_wrapped_networks_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    example = torch.randn(1, 3, 4, 4)
    graph = trace(network, example)
    scripted = torch.jit.script(network)
    by_running = torch.jit.trace(network, example)
    for other in (scripted, by_running):
        with pytest.raises(
            UserError, match=r"result of torch\.jit\.script or torch\.jit\.trace.*; use the torch\.nn\.Mod"
        ):
            trace(other, example)
    distributed = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(distributed)  # without a process group
    distributed.module = network
    wrappers = ((nn.DataParallel(network), "module"), (distributed, "module"), (torch.compile(network), "_orig_mod"))
    for wrapped, inside in wrappers:
        message = rf"wrapped in \w+; pass network\.{inside}, which shares its weights"
        for use in (
            lambda wrapped=wrapped: trace(wrapped, example),
            lambda wrapped=wrapped: resize(wrapped, graph, graph.default),
            lambda wrapped=wrapped: Supernet(wrapped, graph),
        ):
            with pytest.raises(UserError, match=message):
                use()
        assert trace(getattr(wrapped, inside), example) == graph
    inner = nn.Sequential(nn.DataParallel(network), nn.Flatten())
    with pytest.raises(UserError, match=r"module '0' of Sequential is wrapped in DataParallel; replace it with"):
        trace(inner, example)
    partly = nn.Sequential(nn.Conv2d(3, 8, 1), torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1))), nn.Conv2d(8, 4, 1))
    with pytest.raises(UserError, match=r"module '1' of Sequential is the result "):
        trace(partly, example)
    with pytest.raises(UserError, match=r"of type function; pass a torch\.nn\.Module"):
        trace(lambda images: images, example)


def test_hooks_on_slimmed_modules_are_named_once() -> None:
    network = nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()),
            last=nn.Sequential(nn.Conv2d(8, 4, 1), nn.Tanh()),
            pool=nn.AvgPool2d(2),
        )
    )
    example = torch.randn(1, 3, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.pool.register_forward_hook(lambda *_: None)  # sees only the output, which keeps its channels
        graph = trace(network, example)
    for module, named in (
        (network.stem[0], "'stem.0'"),
        (network.stem[1], "'stem.1'"),  # has no parameters
        (network.stem, "'stem'"),
    ):
        hook = module.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match=f"Sequential has forward hooks on {named}: ") as caught:
            assert trace(network, example) == graph
        assert len(caught) == 1
        assert caught[0].filename == __file__
        hook.remove()
    network.last[0].register_forward_pre_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"forward hooks on 'last\.0': "):
        trace(network, example)


def test_a_hook_that_needs_data_is_named() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    network[1].register_forward_hook(lambda _, __, output: float(output.sum().item()))
    with pytest.raises(UserError, match="remove the forward hooks of '1', which get no data here"):
        trace(network, torch.randn(1, 3, 4, 4))
