"""Memory in closed form against the memory of real tensors while a resized network runs."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torchvision.models as tv
from independent_counts import graph_at_224
from specimens import MAIN, OTHERS, PATTERNS, random_channels, specimen
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autoslim import resize, trace
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.memory import live_outputs
from autoslim.errors import UserError
from autoslim.tracing.capture import shaped_graph, symbolic_graph


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)


# The independent measurement


class _MemoryMeter(fx.Interpreter):
    """Runs a network and measures the memory of all live values after each operation.

    torch.fx deletes a value after its last use; values without any use are deleted here.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.constant = {key(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self.measured: dict[str, int] = {}  # bytes after each operation
        self.elements: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        for node in [node for node in self.env if not node.users]:
            del self.env[node]
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            self.constant.add(key(value))
        tensors = [leaf for leaf in pytree.tree_leaves([*self.env.values(), value]) if isinstance(leaf, Tensor)]
        sizes = {key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.measured[n.name] = sum(size for at, size in sizes.items() if at not in self.constant)
        self.elements[n.name] = value.numel() if isinstance(value, Tensor) else 0
        return value


def key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@torch.no_grad()
def measured(network: nn.Module, graph: ChannelGraph) -> _MemoryMeter:
    """Runs a network on the CPU on one image."""
    image = torch.randn(1, *graph.input_shape, dtype=next(network.parameters()).dtype)
    try:
        operations = symbolic_graph(network.eval(), graph.leaves)
    except UserError:
        operations, _ = shaped_graph(network, graph.leaves, image)
    meter = _MemoryMeter(fx.GraphModule(network, operations))
    meter.run(image)
    return meter


def own_bytes(network: nn.Module) -> int:
    tensors = (*network.parameters(), *network.buffers())
    return sum({key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@torch.no_grad()
def check_memory(network: nn.Module, graph: ChannelGraph, channels: Mapping[str, int]) -> None:
    resized = resize(network, graph, channels).to_empty(device="cpu")
    for tensor in (*resized.parameters(), *resized.buffers()):
        tensor.zero_()  # some buffers are indices
    meter = measured(resized, graph)
    assert {operation.name: operation.elements(channels) for operation in graph.operations} == meter.elements
    outputs = live_outputs(graph.operations)
    sizes = [sum(output.bytes * output.elements(channels) for output in several) for several in outputs]
    assert dict(zip(meter.measured, sizes, strict=True)) == meter.measured
    assert graph.memory(channels) == own_bytes(resized) + max(meter.measured.values())


class Body(nn.Module):
    """A stem, a part that subclasses define, a convolution and a linear layer."""

    def __init__(self, between: int = 16) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.last = conv(between, 8)
        self.head = nn.Linear(8, 4)

    def between(self, maps: Tensor) -> Tensor:
        return maps

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.last(self.between(self.stem(images))).mean((2, 3)))
        return logits


EXAMPLE = torch.empty(1, 3, 8, 8)


@pytest.mark.parametrize(
    "name", [*MAIN, *OTHERS, *PATTERNS, "squeezenet1_0", "mobilenet_v3_small", "efficientnet_v2_s"]
)
def test_memory_equals_that_of_a_run_of_the_resized_network(name: str) -> None:
    """They are equal at the peak and at each operation, at random configurations of 0.1 to 1.6 times the width."""
    sample = specimen(name)
    for seed, (low, high) in enumerate([(1.0, 1.0), (0.5, 1.5), (0.1, 1.6)]):
        check_memory(sample.network, sample.graph, random_channels(sample.graph, seed, low, high))


@pytest.mark.parametrize("name", ["skresnet18", "resnest14d", "hrnet_w18_small", "ghostnet_100"])
def test_networks_of_timm(name: str) -> None:
    """Branches that are stacked and split again, and slices of concatenations."""
    network = pytest.importorskip("timm").create_model(name)
    graph = trace(network, torch.empty(1, 3, 32, 32))
    for seed in range(2):
        check_memory(network, graph, random_channels(graph, seed, 0.1, 0.6))


def test_a_network_with_attention() -> None:
    """Windows are moved into the first dimension. At 224 pixels, attention needs no padding."""
    network = tv.swin_t()
    graph = trace(network, torch.empty(1, 3, 224, 224))
    check_memory(network, graph, random_channels(graph, 0, 0.3, 1.2))


class Sequence(Body):
    """Positions come first: with one image, permuted tensors are still contiguous and ``reshape`` copies nothing."""

    def between(self, maps: Tensor) -> Tensor:
        tokens = maps.flatten(2).permute(0, 2, 1).contiguous().transpose(0, 1)  # (N, 16, 8, 8) -> (64, N, 16)
        return torch.relu(tokens.reshape(64, -1)).reshape(64, -1, tokens.shape[2]).permute(1, 2, 0).unflatten(2, (8, 8))


class Tuples(Body):
    """Operations that return several tensors, of which some are not used."""

    def between(self, maps: Tensor) -> Tensor:
        highest, _ = maps.max(1, keepdim=True)  # (N, 16, 8, 8) -> twice (N, 1, 8, 8), one of int64
        first, second = (maps * highest).chunk(2, 1)
        several = torch.relu(first).unbind(3)
        return torch.cat([torch.stack(several, 3), second], 1)


class Shuffled(Body):
    """Channels are shuffled and then restored to their order."""

    def between(self, maps: Tensor) -> Tensor:
        count, channels, height, width = maps.shape
        mixed = maps.view(count, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return torch.relu(mixed).transpose(1, 2).reshape(count, channels, height, width)


class Unused(Body):
    def between(self, maps: Tensor) -> Tensor:
        torch.cat([maps, maps], 1)
        return torch.relu(maps)


class Chooses(Body):
    """A network whose code depends on sizes, so its graph is valid for one size only."""

    def between(self, maps: Tensor) -> Tensor:
        if maps.shape[2] > 4:
            maps = maps[:, :, ::2, ::2]
        count, channels, height, width = maps.shape
        rows = maps.reshape(count, channels, height * width).softmax(2)
        return maps * rows.view(count, channels, height, width)


class DropsTheBatch(Body):
    def forward(self, images: Tensor) -> Tensor:
        pooled = self.last(torch.relu(self.stem(images))).mean((2, 3), keepdim=True)
        logits: Tensor = self.head(torch.relu(pooled.squeeze()))  # one image: (1, 8, 1, 1) -> (8)
        return logits


class Constants(Body):
    """Reads a parameter, a view of one, a buffer and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.places = nn.Parameter(torch.ones(1, 8, 8))
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.float64))

    def between(self, maps: Tensor) -> Tensor:
        scaled = maps * self.scale.view(1, -1, 1, 1) + self.places.expand_as(maps)
        return scaled * self.mask.float() * torch.tensor(2.0)


@pytest.mark.parametrize("make", [Body, Sequence, Tuples, Shuffled, Unused, Chooses, DropsTheBatch, Constants])
def test_kinds_of_operations(make: Callable[[], nn.Module]) -> None:
    network = make()
    graph = trace(network, EXAMPLE)
    assert graph.groups
    for seed in range(4):
        channels = random_channels(graph, seed, 0.2, 1.5)
        # Some operations halve the channels.
        check_memory(network, graph, {name: count + count % 2 for name, count in channels.items()})


def test_a_network_that_runs_only_on_several_images() -> None:
    """Its memory follows from a run on two images, with the first dimension counted as one."""

    class Squeezes(Body):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(self.last(self.stem(images)).mean((2, 3), keepdim=True).squeeze())
            return logits.softmax(1)

    network, plain = Squeezes(), Body()
    graph = trace(network, EXAMPLE)
    assert graph.memory({"stem": 12, "last": 40}) == trace(plain, EXAMPLE).memory({"stem": 12, "last": 40})


def test_a_leaf_runs_on_the_cpu() -> None:
    class Leaf(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps if maps.sum() > 0 else torch.cat([maps, maps], 1)

    class WithLeaf(Body):
        def __init__(self) -> None:
            super().__init__(32)
            self.leaf = Leaf()

        def between(self, maps: Tensor) -> Tensor:
            doubled: Tensor = self.leaf(maps)
            return doubled

    network = WithLeaf()
    graph = trace(network, EXAMPLE, leaves=["leaf"])
    check_memory(network, graph, {"last": 5})


def test_dtypes_and_shared_weights() -> None:
    """Half precision requires half the memory; a weight with two names is counted once."""

    class Tied(Body):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = conv(16, 16), conv(16, 16)
            self.other.weight = self.one.weight
            self.norm = nn.BatchNorm2d(16)

        def between(self, maps: Tensor) -> Tensor:
            out: Tensor = self.norm(self.other(self.one(maps)))
            return out

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        network = Tied().to(dtype)
        graph = trace(network, EXAMPLE)
        check_memory(network, graph, random_channels(graph, 0, 0.5, 1.5))


# By hand


def test_by_hand() -> None:
    """A convolution, batch norm, an activation and a sum, at 8 x 8 and then 4 x 4 pixels."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1, bias=False)
            self.norm = nn.BatchNorm2d(6)
            self.down = nn.Conv2d(6, 10, 2, 2)
            self.head = nn.Linear(10, 4)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.down(torch.relu(self.norm(self.stem(images))))
            logits: Tensor = self.head((maps + maps.sigmoid()).mean((2, 3)))
            return logits

    graph = trace(Small(), EXAMPLE)
    for stem, down in [(6, 10), (1, 9), (1, 40)]:
        weights = 4 * (3 * stem + 4 * stem + stem * down * 4 + down + down * 4 + 4) + 8  # 8: num_batches_tracked
        peaks = [3 * 64 + stem * 64, 2 * stem * 64, stem * 64 + down * 16, 3 * down * 16]
        assert graph.memory({"stem": stem, "down": down}) == weights + 4 * max(peaks)


@pytest.mark.parametrize("in_place", [False, True])
def test_in_place_operations_allocate_nothing(in_place: bool) -> None:
    class Rectified(Body):
        def between(self, maps: Tensor) -> Tensor:
            return nn.functional.relu(maps, inplace=in_place)

    graph = trace(Rectified(), EXAMPLE)
    stem, last = 4 * 64 * 16, 4 * 64 * 8
    assert graph.memory() == own_bytes(Rectified()) + (stem + last if in_place else 2 * stem)


def test_views_allocate_nothing() -> None:
    class Viewed(Body):
        def between(self, maps: Tensor) -> Tensor:
            return maps.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (8, 8))

    assert trace(Viewed(), EXAMPLE).memory() == trace(Body(), EXAMPLE).memory()


def test_a_view_keeps_its_whole_storage_alive() -> None:
    """One channel of the stem is read at the end."""

    class ReadsOneChannel(Body):
        def forward(self, images: Tensor) -> Tensor:
            maps = self.stem(images)
            one = maps[:, :1]
            logits: Tensor = self.head(torch.relu(self.last(maps)).mean((2, 3)))
            return logits + one.mean()

    graph = trace(ReadsOneChannel(), EXAMPLE)
    stem, last = 4 * 64 * 16, 4 * 64 * 8
    assert graph.memory() == own_bytes(ReadsOneChannel()) + stem + 2 * last


# As a resource


@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "convnext_tiny"])
def test_memory_grows_with_each_group(name: str) -> None:
    graph = specimen(name).graph
    for seed in range(5):
        channels = random_channels(graph, seed, 0.2, 1.4)
        for group in list(graph.groups)[seed::5]:
            more = channels | {group: channels[group] + graph.groups[group].unit}
            assert graph.memory(more) > graph.memory(channels)


def test_memory_at_full_size() -> None:
    """MobileNetV2 requires its weights and its largest activation twice, before and after batch norm."""
    graph = graph_at_224("mobilenet_v2")
    with torch.device("meta"):
        weights = own_bytes(tv.mobilenet_v2())
    assert graph.memory() == weights + 2 * 4 * 96 * 112 * 112
    assert graph.cost(graph.default, "memory") == graph.memory(graph.default) == graph.memory()
