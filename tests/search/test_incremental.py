"""Compares incremental evaluation with whole runs of the same subnets."""

from collections.abc import Callable

import pytest
import torch
from specimens import MAIN, OTHERS, PATTERNS, random_channels, specimen
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoslim.search.incremental import IncrementalEvaluator, verified_evaluator
from autoslim.supernet.supernet import Supernet
from autoslim.tracing import trace


def evaluator_of(name: str) -> tuple[Supernet, IncrementalEvaluator, Tensor, dict[str, int], dict[str, int]]:
    """Returns a supernet in float64, its evaluator, images, a configuration, and slimmer groups."""
    found = specimen(name)
    supernet = Supernet(found.real(found.graph.default, torch.float64), found.graph).eval()
    current = random_channels(found.graph, 3, 0.6, 1.0)
    groups = found.graph.groups.items()
    less = {n: max(g.unit, current[n] // g.unit * 3 // 4 * g.unit) for n, g in groups}
    slimmer = {n: count for n, count in less.items() if count < current[n]}
    return supernet, IncrementalEvaluator(supernet), found.images().double(), current, slimmer


def whole(supernet: Supernet, images: Tensor, channels: dict[str, int]) -> Tensor:
    supernet.select(channels)
    output: Tensor = supernet(images)
    return output


@pytest.mark.parametrize("name", ["small_mobilenet_v2", *MAIN, *OTHERS, *PATTERNS])
@torch.inference_mode()
def test_incremental_evaluation_equals_whole_runs(name: str) -> None:
    supernet, evaluator, images, current, slimmer = evaluator_of(name)
    expected = {group: whole(supernet, images, {**current, group: count}) for group, count in slimmer.items()}
    found: dict[str | None, Tensor] = dict(evaluator.run(images, current, slimmer))
    torch.testing.assert_close(found.pop(None), whole(supernet, images, current), rtol=1e-9, atol=1e-9)
    assert found.keys() == expected.keys()
    for group, output in found.items():
        assert group is not None
        torch.testing.assert_close(output, expected[group], rtol=1e-9, atol=1e-9 * float(output.abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "efficientnet_b0"])
@torch.inference_mode()
def test_no_operation_runs_again_without_need(name: str) -> None:
    """A slimmed subnet branches off at the first layer that reads a channel of its group, not earlier."""
    supernet, evaluator, *_ = evaluator_of(name)
    readers = {}
    for layer in supernet.graph.layers:
        if layer.kind in ("conv", "linear"):
            for segment in layer.inputs:
                readers.setdefault(segment.group, layer.name)
    started = {group: str(evaluator.nodes[start].target) for group, start in evaluator.start.items()}
    assert started == {group: readers[group] for group in started}


@torch.inference_mode()
def test_the_current_subnet_runs_once() -> None:
    """The operations that torch counts equal the sums of the layers' closed forms."""
    supernet, evaluator, images, current, slimmer = evaluator_of("cifar_resnet18")
    layers = [layer for layer in supernet.graph.layers if layer.kind in ("conv", "linear")]
    names = [layer.name for layer in layers]
    expected = sum(layer.macs(current) for layer in layers)
    for group, count in slimmer.items():
        first = names.index(str(evaluator.nodes[evaluator.start[group]].target))
        expected += sum(layer.macs({**current, group: count}) for layer in layers[first:])
    with FlopCounterMode(display=False) as counter:
        list(evaluator.run(images, current, slimmer))
    assert counter.get_total_flops() == 2 * len(images) * expected


class Overwriting(nn.Module):
    """Overwrites, through a view, a value that another branch still reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.left(x)
        x.flatten(1).relu_()
        y += self.right(x)
        y = torch.nn.functional.relu(y, True) + x.mul_(0.5)
        z: Tensor = self.head(y.mean((2, 3)))
        return z


@torch.inference_mode()
def test_in_place_operations_do_not_affect_other_subnets() -> None:
    torch.manual_seed(0)
    network = Overwriting()
    graph = trace(network, torch.empty(1, 3, 8, 8))
    supernet = Supernet(network.double(), graph).eval()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    current = graph.default
    slimmer = {name: size - 2 for name, size in current.items()}
    assert slimmer
    for group, output in IncrementalEvaluator(supernet).run(images, current, slimmer):
        channels = current if group is None else {**current, group: slimmer[group]}
        torch.testing.assert_close(output, whole(supernet, images, channels))


class Normalised(nn.Module):
    """Softmax and normalisation over the channels: outputs with fewer channels are not slices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(1, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)) + self.stem(x).softmax(1)
        z: Tensor = self.head(x).mean((2, 3))
        return z


@torch.inference_mode()
def test_operations_over_the_channels_run_again() -> None:
    torch.manual_seed(0)
    network = Normalised()
    graph = trace(network, torch.empty(1, 3, 8, 8))
    supernet = Supernet(network.double(), graph).eval()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    evaluator = IncrementalEvaluator(supernet)
    (group,) = graph.groups
    assert str(evaluator.nodes[evaluator.start[group]].target) == "norm"
    found = dict(evaluator.run(images, graph.default, {group: 5}))
    torch.testing.assert_close(found[group], whole(supernet, images, {group: 5}))


def supernet_of(network: nn.Module, side: int = 8) -> tuple[Supernet, Tensor]:
    graph = trace(network, torch.empty(1, 3, side, side))
    images = torch.randn(6, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Supernet(network.double(), graph).eval(), images


class Parts(nn.Module):
    """Three convolutions of 8 channels and a head, which ``forward`` combines."""

    def __init__(self, forward: Callable[["Parts", Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.same, self.over, self.drop = nn.Identity(), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.slide, self.flat = nn.MaxPool1d(3, 1, 1), nn.AvgPool2d(3, 1, 1)
        self.head = nn.Linear(8, 2)
        self.forwarding = forward

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.forwarding(self, self.stem(x)).mean((2, 3)))
        return z


def two_names(p: Parts, x: Tensor) -> Tensor:
    short = p.same(x)
    y = p.left(x)
    y = y + p.right(p.over(x))
    return y + short


def two_names_by_dropout(p: Parts, x: Tensor) -> Tensor:
    short = p.drop(x)
    y = p.left(x)
    return y + p.right(p.over(x)) + short


def written_through_a_view(p: Parts, x: Tensor) -> Tensor:
    view = x.flatten(1)
    y = p.left(x)
    view.relu_()
    return p.right(x) + y


def written_twice(p: Parts, x: Tensor) -> Tensor:
    y = x.relu_()
    a = p.left(x)
    return a + p.right(y.mul_(2)) + x


def written_to_another(p: Parts, x: Tensor) -> Tensor:
    z = p.left(x)
    w = p.right(x)
    torch.mul(z, 0.5, out=x)
    return w + x


def pooled_over_channels(p: Parts, x: Tensor) -> Tensor:
    y = p.left(x)
    y = p.slide(y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(y.shape)
    return p.right(y)


def pooled_over_channels_last(p: Parts, x: Tensor) -> Tensor:
    return p.right(p.flat(p.left(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def split_and_read_by_parts(p: Parts, x: Tensor) -> Tensor:
    one, two = p.left(x).chunk(2, 1)
    return p.right(torch.cat([two, one.relu_()], 1)) + x


@pytest.mark.parametrize(
    "forward",
    [
        two_names,
        two_names_by_dropout,
        written_through_a_view,
        written_twice,
        written_to_another,
        pooled_over_channels,
        pooled_over_channels_last,
        split_and_read_by_parts,
    ],
)
@torch.inference_mode()
def test_code_that_overwrites_values_or_mixes_channels(
    forward: Callable[[Parts, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    supernet, images = supernet_of(Parts(forward))
    current = {n: g.size - g.unit for n, g in supernet.graph.groups.items()}
    slimmer = {n: count - supernet.graph.groups[n].unit for n, count in current.items()}
    for group, output in IncrementalEvaluator(supernet).run(images.clone(), current, slimmer):
        channels = current if group is None else {**current, group: slimmer[group]}
        torch.testing.assert_close(output, whole(supernet, images.clone(), channels))


def scaled_by_a_modules_size(p: Parts, x: Tensor) -> Tensor:
    y = p.left(x)
    return p.right(y) + y.sum(1, keepdim=True) / p.left.out_channels


def chosen_by_shape(p: Parts, x: Tensor) -> Tensor:
    return p.right(p.left(x)) if x.shape[2] > 4 else p.left(x)


def merged_by_a_view(p: Parts, x: Tensor) -> Tensor:
    y = p.left(x)
    n, c, h, w = y.shape
    return p.right(y.view(n * c, h, w).view(n, c, h, w))


@pytest.mark.parametrize("forward", [scaled_by_a_modules_size, chosen_by_shape, merged_by_a_view])
@torch.no_grad()
def test_code_that_cannot_be_evaluated_incrementally_is_detected(forward: Callable[[Parts, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    supernet, images = supernet_of(Parts(forward))
    expected = whole(supernet, images, supernet.widest)
    evaluator, reason = verified_evaluator(supernet, images)
    if evaluator is None:
        assert reason
    else:  # a later version of torch may support it: then the result must be correct
        current = {n: g.size - g.unit for n, g in supernet.graph.groups.items()}
        for group, output in evaluator.run(images, current, {n: c - 1 for n, c in current.items()}):
            channels = current if group is None else {**current, group: current[group] - 1}
            torch.testing.assert_close(output, whole(supernet, images, channels))
    torch.testing.assert_close(whole(supernet, images, supernet.widest), expected)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "densenet121", "efficientnet_b0", "shufflenet_v2_x0_5"])
def test_ordinary_networks_are_evaluated_incrementally(name: str) -> None:
    supernet, _, images, *_ = evaluator_of(name)
    evaluator, reason = verified_evaluator(supernet, torch.cat([images, images.flip(3)]))
    assert evaluator is not None, reason


def test_the_supernet_is_not_changed() -> None:
    supernet, _, images, current, slimmer = evaluator_of("small_mobilenet_v2")
    supernet.train().select(current)
    next(iter(supernet.network.modules())).eval()
    before = [supernet.selected, [m.training for m in supernet.modules()], whole(supernet, images, current).detach()]
    evaluator = IncrementalEvaluator(supernet)
    assert before[:2] == [current, [m.training for m in supernet.modules()]]
    with torch.no_grad():
        list(evaluator.run(images, current, slimmer))
    torch.testing.assert_close(whole(supernet, images, current).detach(), before[2])
