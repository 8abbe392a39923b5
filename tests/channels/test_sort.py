"""``sort_channels`` puts the most important channels first and changes outputs only by rounding."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from specimens import MAIN, OTHERS, PATTERNS, random_channels, shuffle_weights, specimen
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from autoslim import resize, sort_channels, trace
from autoslim.channels.sort import Importance, channel_importance, importance_orders, permute, taylor_importance
from autoslim.errors import UserError


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Returns the network in float64, with random parameters and running statistics."""
    network.double()
    shuffle_weights(network, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return network


def outputs(network: nn.Module, images: Tensor, training: bool) -> list[Tensor]:
    """Returns all outputs of a copy, including auxiliary heads, without dropout."""
    ran = copy.deepcopy(network).train(training)
    for module in ran.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | StochasticDepth):
            module.eval()
    with torch.no_grad():
        output = ran(images)
    return [output] if isinstance(output, Tensor) else list(output)


def assert_same(network: nn.Module, other: nn.Module, images: Tensor) -> None:
    for training in (False, True):
        pairs = zip(outputs(network, images, training), outputs(other, images, training), strict=True)
        for expected, found in pairs:
            assert expected.std() > 0
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=float(1e-9 * expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "importance"),
    [(name, "l1") for name in MAIN + OTHERS + PATTERNS]
    + [(name, "bn_scale") for name in ("cifar_mobilenet_v2", "densenet121", "resnext50_32x4d", "shufflenet_v2_x0_5")],
)
def test_sorting_changes_nothing_but_the_order(name: str, importance: Importance) -> None:
    sample = specimen(name)
    network = randomised(sample.real(sample.graph.default, torch.float64))
    ordered = sort_channels(network, sample.graph, importance)
    assert_same(network, ordered, sample.images().double())
    before, after = (channel_importance(n, sample.graph, importance) for n in (network, ordered))
    assert before.keys() == after.keys() == sample.graph.groups.keys()
    for group, values in after.items():
        torch.testing.assert_close(values, before[group].sort(descending=True).values, rtol=1e-12, atol=0)
    assert sum(not torch.equal(before[group], after[group]) for group in after) == len(after)  # all orders changed


@pytest.mark.parametrize("name", ["cifar_resnet18", "resnext50_32x4d", "densenet121", "regnet_y_400mf"])
def test_a_resized_network_is_sorted_too(name: str) -> None:
    sample = specimen(name)
    network = randomised(sample.real(random_channels(sample.graph, 1, 0.3, 1.2), torch.float64))
    ordered = sort_channels(network, sample.graph, "l1")
    assert_same(network, ordered, sample.images().double())
    assert all((values.diff() <= 0).all() for values in channel_importance(ordered, sample.graph, "l1").values())


class Everything(nn.Module):
    """A few layers with every kind of tensor that depends on a group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise, self.slope = nn.Conv2d(6, 12, 3, padding=1, groups=6), nn.PReLU(12)
        self.branch, self.joined = nn.Conv2d(12, 5, 1), nn.BatchNorm2d(17)
        self.wide, self.grouped = nn.Conv2d(17, 16, 1), nn.Conv2d(16, 8, 3, padding=1, groups=4)
        self.in_groups = nn.GroupNorm(4, 8)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.flat, self.layer_norm = nn.Linear(8 * 4 * 4, 9), nn.LayerNorm(9)
        self.last = nn.Linear(9, 4)
        self.spatial_first = nn.Linear(4 * 4 * 5, 4)

    def forward(self, images: Tensor) -> Tensor:
        thin = self.norm(self.stem(images)).relu()
        middle = self.slope(self.depthwise(thin))
        branch = self.branch(middle)
        joined = self.joined(torch.cat([middle, branch], 1)).relu()
        scaled = self.in_groups(self.grouped(self.wide(joined).relu())) * self.scale
        out: Tensor = self.last(self.layer_norm(self.flat(scaled.flatten(1))).relu())
        return out + self.spatial_first(branch.permute(0, 2, 3, 1).flatten(1).sigmoid())


EVERYTHING = trace(Everything(), torch.zeros(1, 3, 4, 4))
IMAGES = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_every_kind_of_tensor_moves_with_its_group() -> None:
    network = randomised(Everything(), seed=1)
    assert {name for name, _ in network.named_parameters()} - EVERYTHING.tensors.keys() == {
        "last.bias",
        "spatial_first.bias",
    }
    assert [(group.unit, group.size) for group in EVERYTHING.groups.values()] == [(1, 6), (1, 5), (4, 16), (1, 9)]
    assert_same(network, sort_channels(network, EVERYTHING, "l1"), IMAGES)


@pytest.mark.parametrize("forgotten", EVERYTHING.tensors)
def test_a_tensor_that_is_not_permuted_is_detected(forgotten: str) -> None:
    """The tests above fail if any tensor is not permuted, including running statistics."""
    network = randomised(Everything(), seed=1)
    ordered = sort_channels(network, EVERYTHING, "l1")
    with torch.no_grad():
        dict([*ordered.named_parameters(), *ordered.named_buffers()])[forgotten].copy_(network.state_dict()[forgotten])
    [expected], [found] = outputs(network, IMAGES, False), outputs(ordered, IMAGES, False)
    assert (found - expected).abs().max() > 1e-4 * expected.abs().max()


# Importance


class TwoLayers(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(3, 2)
        )


@pytest.mark.parametrize(("importance", "best"), [("l1", [2, 0]), ("bn_scale", [3, 1])])
def test_narrowing_keeps_the_most_important_channels(importance: Importance, best: list[int]) -> None:
    """The result equals a network whose channels are selected by hand."""
    network = randomised(TwoLayers())
    graph = trace(TwoLayers(), torch.zeros(1, 2, 1, 1))
    images = torch.randn(8, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[2.0, -2], [0.5, 1], [-3, 3], [1, 0.1]])[:, :, None, None])
        network[1].weight.copy_(torch.tensor([0.1, -1.5, 0.2, 2.0]))
    hand = randomised(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 1)))
    with torch.no_grad():
        for expected, weight in zip(hand[0].parameters(), network[0].parameters(), strict=True):
            expected.copy_(weight[best])
        for name, tensor in hand[1].state_dict().items():
            tensor.copy_(network[1].state_dict()[name][best] if tensor.dim() else tensor)
        hand[3].weight.copy_(network[3].weight[:, best])
        hand[3].bias.copy_(network[3].bias)
    ordered = resize(sort_channels(network, graph, importance), graph, {"0": 2, "3": 3}).eval()
    with torch.no_grad():
        # The group of the second layer is sorted as well, which the last layer undoes.
        expected = network[5](hand.eval()(images).flatten(1))
        torch.testing.assert_close(ordered(images), expected, rtol=1e-12, atol=1e-12)


def test_l1_sums_the_layers_that_produce_a_group() -> None:
    """A residual sum of two convolutions; the second is followed by depthwise ones."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
            self.depthwise, self.head = nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.head(self.a(images) + self.depthwise(self.b(images)))
            return out

    network = randomised(Sum())
    graph = trace(Sum(), torch.zeros(1, 3, 4, 4))
    weights = [network.get_parameter(f"{layer}.weight").detach() for layer in ("a", "b", "depthwise")]
    expected = sum(weight.abs().sum((1, 2, 3)) for weight in weights)
    torch.testing.assert_close(channel_importance(network, graph, "l1"), {"a": expected})


def test_l1_of_transposed_and_of_normalised_layers() -> None:
    """A transposed convolution has its outputs on the second axis; a normalised weight is computed at each call."""
    network = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
        nn.ConvTranspose2d(8, 6, 2, groups=2),
        nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(6, 5, 2), dim=1),
        nn.ConvTranspose2d(5, 4, 2),
        nn.Conv2d(4, 2, 1),
    )
    graph = trace(network, torch.zeros(1, 3, 4, 4))
    randomised(network)
    weights = [layer.weight.detach().abs() for layer in network]
    in_units = weights[0].sum((1, 2, 3)).view(2, 4).sum(1) + weights[1].sum((1, 2, 3)).view(2, 4).sum(1)
    expected = {"0": in_units, "2": weights[2].sum((0, 2, 3)), "3": weights[3].sum((0, 2, 3))}
    torch.testing.assert_close(channel_importance(network, graph, "l1"), expected)
    assert_same(network, sort_channels(network, graph, "l1"), IMAGES)


def test_taylor_importance_sums_squared_products_of_weights_and_gradients() -> None:
    """A convolution with gradients in closed form, and a depthwise one whose filters share the group."""
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 1, 1, bias=False))
    graph = trace(network, torch.zeros(1, 2, 1, 1))
    randomised(network)
    batches = [torch.randn(5, 2, 1, 1, dtype=torch.float64) for _ in range(3)]
    found = taylor_importance(network, graph, batches, lambda network, batch: network(batch).mean())
    first, depthwise, last = (layer.weight.detach().flatten(1) for layer in network)
    biases = [network[0].bias.detach(), network[1].bias.detach()]
    expected = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        mean = batch.flatten(1).mean(0)  # the network is linear
        slope = last[0] * depthwise[:, 0]  # of the output in the first layer's channels
        expected += ((first * slope[:, None] * mean) ** 2).sum(1) / 3
        expected += (depthwise[:, 0] * last[0] * (first @ mean + biases[0])) ** 2 / 3
    torch.testing.assert_close(found, {"0": expected})
    assert all(parameter.grad is None for parameter in network.parameters())
    with pytest.raises(UserError, match="at least one batch"):
        taylor_importance(network, graph, [], lambda network, batch: network(batch).mean())
    network[0].weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"0\.weight has no gradient"):
        taylor_importance(network, graph, batches, lambda network, batch: network(batch).mean())


def test_units_of_a_grouped_convolution_move_whole() -> None:
    sample = specimen("resnext50_32x4d")
    network = randomised(sample.real(sample.graph.default, torch.float64))
    before = network.get_parameter("layer1.0.conv1.weight").detach().flatten(1).split(4)
    with_grouped = zip(before, network.get_parameter("layer1.0.conv2.weight").detach().flatten(1).split(4), strict=True)
    importance = torch.stack([a.abs().sum() + b.abs().sum() for a, b in with_grouped])
    ordered = sort_channels(network, sample.graph, "l1").get_parameter("layer1.0.conv1.weight").detach()
    for unit, origin in zip(ordered.flatten(1).split(4), importance.argsort(descending=True), strict=True):
        # The stem's channels have moved too, along the other axis.
        assert torch.equal(unit.sort(1).values, before[origin].sort(1).values)


def test_scales_of_all_batch_norms_on_a_channel_count() -> None:
    """In DenseNet, new channels pass the batch norm of every later layer of their block."""
    sample = specimen("densenet121")
    network = randomised(sample.real(sample.graph.default, torch.float64))
    group = "features.denseblock4.denselayer14.conv2"
    at = 512 + 13 * 32
    norms = ["denseblock4.denselayer15.norm1", "denseblock4.denselayer16.norm1", "norm5"]
    scales = [network.get_parameter(f"features.{norm}.weight").detach()[at : at + 32].abs() for norm in norms]
    found = channel_importance(network, sample.graph, "bn_scale")[group]
    torch.testing.assert_close(found, torch.stack(scales).mean(0))


def test_groups_without_a_batch_norm_are_sorted_by_their_weights() -> None:
    network = randomised(Everything())
    by_scale, by_weight = (channel_importance(network, EVERYTHING, kind) for kind in ("bn_scale", "l1"))
    same = {group for group in by_scale if torch.equal(by_scale[group], by_weight[group])}
    assert same == {"wide", "flat"}


def test_a_network_without_batch_norms_has_no_scales() -> None:
    sample = specimen("squeezenet1_1")
    with pytest.raises(UserError) as error:
        sort_channels(sample.real(sample.graph.default), sample.graph, "bn_scale")
    assert str(error.value) == (
        "bn_scale (supernet.sort or methods) needs batch norms with a scale, and SqueezeNet has none on channels "
        "that can be slimmed; use l1"
    )


# Networks in which the position of a channel matters


def halves(x: Tensor) -> Tensor:
    return torch.cat([x[:, :4].relu(), x[:, 4:]], 1)


def pooled_across(x: Tensor) -> Tensor:
    return F.max_pool2d(x.permute(0, 2, 3, 1), 3, 1, 1).permute(0, 3, 1, 2)


class Treated(nn.Module):
    def __init__(self, treatment: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
        self.treatment = treatment

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.d(self.c(self.treatment(self.b(self.a(images).relu()))).relu())
        return out


@pytest.mark.parametrize("treatment", [halves, pooled_across])
def test_a_group_in_which_the_position_matters_keeps_its_order(treatment: Callable[[Tensor], Tensor]) -> None:
    network = randomised(Treated(treatment))
    graph = trace(Treated(treatment), torch.zeros(1, 3, 4, 4))
    assert graph.groups.keys() == {"a", "b", "c"}
    assert importance_orders(network, graph, "l1").keys() == {"a", "c"}
    ordered = sort_channels(network, graph, "l1")
    assert_same(network, ordered, IMAGES)
    after = channel_importance(ordered, graph, "l1")
    assert (after["a"].diff() <= 0).all()
    assert not (after["b"].diff() <= 0).all()


def logistic(x: Tensor) -> Tensor:
    """Doubles any difference fifty times."""
    x = x.sigmoid()
    for _ in range(50):
        x = 4 * x * (1 - x)
    return x


def test_groups_are_sorted_although_a_network_amplifies_rounding() -> None:
    """This happens in deep networks that are not trained."""
    network = randomised(Treated(logistic))
    graph = trace(Treated(logistic), torch.zeros(1, 3, 4, 4))
    orders = importance_orders(network, graph, "l1")
    assert orders.keys() == {"a", "b", "c"}
    [expected], [found] = (outputs(n, IMAGES, False) for n in (network, permute(network, graph, orders)))
    assert (found - expected).abs().max() > 1e-6  # far beyond the tolerance for rounding in other networks


def test_a_network_that_requires_float32_is_sorted() -> None:
    network = Treated(nn.Identity())
    shuffle_weights(network)

    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.inner(images.float())
            return out

    casts = Casts()
    graph = trace(casts, torch.zeros(1, 3, 4, 4))
    ordered = sort_channels(casts, graph, "l1")
    after = channel_importance(ordered, graph, "l1")
    assert all((values.diff() <= 0).all() for values in after.values())
    images = IMAGES.float()
    with torch.no_grad():
        torch.testing.assert_close(ordered(images), casts(images), rtol=1e-4, atol=1e-5)


# The argument


def test_the_argument_is_not_changed_and_shares_no_memory() -> None:
    sample = specimen("cifar_resnet18")
    network = sample.real(sample.graph.default).train()
    network.get_parameter("conv1.weight").requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    ordered = sort_channels(network, sample.graph, "l1")
    with torch.no_grad():
        for tensor in tensors(ordered):
            tensor.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert ordered.training
    assert [p.requires_grad for p in ordered.parameters()] == [p.requires_grad for p in network.parameters()]


def test_a_shared_weight_is_permuted_once() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.b.weight = self.a.weight
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.head(self.b(self.a(self.stem(images)).relu()).relu())
            return out

    network = randomised(Shares())
    graph = trace(Shares(), torch.zeros(1, 3, 4, 4))
    ordered = sort_channels(network, graph, "l1")
    assert ordered.get_parameter("a.weight") is ordered.get_parameter("b.weight")
    assert not torch.equal(ordered.get_parameter("a.weight"), network.get_parameter("a.weight"))
    assert_same(network, ordered, IMAGES)


def tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
