"""Tests of ``resize``, which returns the same network with other numbers of channels."""

import copy
from typing import Any

import pytest
import torch
import torchvision.models as tv
from specimens import MAIN, OTHERS, PATTERNS, Joins, build, random_channels, shuffle_weights, specimen
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoslim import resize, trace
from autoslim.channels.resize import current_channels, initialise
from autoslim.errors import UserError


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "cifar_resnet18", "densenet121", "regnet_y_400mf"])
def test_the_default_channels_return_an_equal_network(name: str) -> None:
    sample = specimen(name)
    network = build(name).eval()
    shuffle_weights(network)
    same = resize(network, sample.graph, sample.graph.default)
    assert type(same) is type(network)
    assert repr(same) == repr(network)
    assert [path for path, _ in same.named_modules()] == [path for path, _ in network.named_modules()]
    state, expected = same.state_dict(), network.state_dict()
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor)
        assert state[key].data_ptr() != tensor.data_ptr() or tensor.numel() == 0
    with torch.no_grad():
        assert torch.equal(same(sample.images()), network(sample.images()))


@pytest.mark.parametrize("width", [0.35, 0.75, 1.4])
def test_a_scaled_mobilenet_v2_equals_torchvisions(width: float) -> None:
    """torchvision keeps 1280 channels in the last convolution below width 1."""
    sample = specimen("mobilenet_v2")
    channels = sample.graph.scaled(width, 8)
    if width < 1:
        channels["features.18.0"] = 1280
    network = sample.real(channels)
    theirs = tv.mobilenet_v2(width_mult=width)
    theirs.load_state_dict(network.state_dict())  # the same names and shapes
    with torch.no_grad():
        assert torch.equal(network.eval()(sample.images()), theirs.eval()(sample.images()))


@pytest.mark.parametrize("name", [*MAIN, "resnext50_32x4d", "shufflenet_v2_x0_5"])
def test_attributes_follow_the_weights(name: str) -> None:
    """Attributes such as ``in_channels`` and ``groups`` agree with the shapes of the tensors."""
    sample = specimen(name)
    for seed in range(3):
        network = resize(sample.network, sample.graph, random_channels(sample.graph, seed, 0.2, 1.6))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
                assert module.in_channels % module.groups == 0
            elif isinstance(module, nn.Linear):
                assert module.weight.shape == (module.out_features, module.in_features)
            elif isinstance(module, nn.BatchNorm2d):
                assert module.num_features == len(module.running_mean) == len(module.weight)


@pytest.mark.parametrize("name", MAIN)
def test_the_members_of_a_group_always_agree(name: str) -> None:
    sample = specimen(name)
    for seed in range(3):
        channels = random_channels(sample.graph, seed, 0.2, 1.6)
        network = resize(sample.network, sample.graph, channels)
        for group in sample.graph.groups.values():
            sizes = {network.get_submodule(member).out_channels for member in group.members}
            assert sizes == {channels[group.name]}


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_present_channels_of_a_normalised_weight_do_not_change(norm: Any, dim: int | None, seed: int | None) -> None:
    """Also if the norm is one over new channels. Without a seed, it would be the norm of zeros."""
    torch.manual_seed(0)
    layers = norm(nn.Conv2d(3, 8, 1), dim=dim), nn.ReLU(), norm(nn.Conv2d(8, 6, 1), dim=dim), nn.Conv2d(6, 4, 1)
    network = nn.Sequential(*layers).eval()
    images = torch.randn(2, 3, 4, 4)
    expected = network(images)
    wide = resize(network, trace(network, images[:1]), {"0": 11, "2": 9}, seed=seed)
    torch.testing.assert_close(wide(images), expected)
    for layer, outputs, inputs in ((0, 8, 3), (2, 6, 8)):
        weight, before = wide[layer].weight, network[layer].weight
        torch.testing.assert_close(weight[:outputs, :inputs], before)
        assert not weight[:outputs, inputs:].any()
        drawn = weight[outputs:].square().sum(1).mean() / before.square().sum(1).mean()
        assert not drawn if seed is None else 0.2 < drawn < 5
        assert seed is None or len(weight.flatten(1).unique(dim=0)) == outputs + 3


class OwnWeights(nn.Module):
    """Weights, dense, depthwise and normalised by hand, that are parameters or buffers of the user's own module."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"dense": (8, 3, 3, 3), "depthwise": (8, 1, 3, 3), "direction": (6, 8, 1, 1), "product": (6, 5)}
        shapes |= {"length": (6, 1, 1, 1), "place": (1, 6, 8, 8), "last": (4, 5)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("blur", torch.tensor([0.25, 0.5, 0.25]).expand(5, 1, 3).clone())

    def forward(self, images: Tensor) -> Tensor:
        maps = F.conv2d(images, self.dense, padding=1)
        maps = F.conv2d(maps, self.depthwise, padding=1, groups=maps.shape[1])
        norm = self.direction.square().sum((1, 2, 3), keepdim=True).sqrt()
        maps = F.conv2d(maps.tanh(), self.length * self.direction / norm) * self.place
        rows = (maps.mean(3).transpose(1, 2) @ self.product).transpose(1, 2)
        return F.linear(F.conv1d(rows.tanh(), self.blur, groups=rows.shape[1]).mean(2), self.last)


def test_new_channels_of_weights_that_forward_computes_with() -> None:
    torch.manual_seed(0)
    network, images = OwnWeights(), torch.randn(2, 3, 8, 8)
    graph = trace(network, images[:1])
    assert len(graph.groups) == 3
    wide = resize(network, graph, graph.scaled(1.5, 1))
    torch.testing.assert_close(wide(images), network(images))
    for name in ("dense", "depthwise", "direction"):
        assert len(wide.get_parameter(name).flatten(1).unique(dim=0)) == len(wide.get_parameter(name)), name
    assert len(wide.get_parameter("product").unique(dim=1).T) == 8
    assert torch.equal(wide.get_buffer("blur"), network.get_buffer("blur")[:1].expand(8, 1, 3))
    torch.testing.assert_close(wide.get_parameter("place")[:, 6:], network.place.mean(1, True).expand(1, 3, 8, 8))
    assert resize(network, graph, graph.scaled(1.5, 1), seed=None).get_parameter("dense")[8:].count_nonzero() == 0


class LeakyActivations(TorchFunctionMode):
    """Replaces ReLU and its kind, which make some channels constant, by leaky ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.relu, F.relu6, F.hardtanh, F.relu_, torch.relu, Tensor.relu):
            return F.leaky_relu(args[0], 0.5)
        return func(*args, **(kwargs or {}))


class Outputs(TorchDispatchMode):
    """Collects the outputs of convolutions and matrix products, with the channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.channels: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.channels.append(result.transpose(0, 1).flatten(1))
        elif func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.channels.append(result.t())
        return result


OVER_CHANNELS = ("cbam", "convnext_tiny", "audio")
"""Networks that normalise over the channels or take their mean, so that more channels change the output."""


@torch.no_grad()
@pytest.mark.parametrize("name", MAIN + OTHERS + PATTERNS)
def test_all_channels_of_a_widened_network_differ(name: str) -> None:
    """A run shows the channels of each layer, and the same output as before if no layer mixes channels."""
    sample = specimen(name)
    groups = sample.graph.groups
    network = sample.real(random_channels(sample.graph, 0, 0.25, 0.25), torch.float64).eval()
    wider = {
        name: count
        if name in sample.graph.not_widenable
        else -(-3 * count // (2 * groups[name].unit)) * groups[name].unit
        for name, count in current_channels(network, sample.graph).items()
    }
    grown = resize(network, sample.graph, wider)
    outputs, runs = [], []
    for each in (network, grown):
        with LeakyActivations(), Outputs() as run:
            outputs.append(each(sample.images().double()))
        runs.append(run.channels)
    changed = [after for before, after in zip(*runs, strict=True) if len(after) != len(before)]
    assert len(changed) >= 0.9 * (len(groups) - len(sample.graph.not_widenable)) > 0
    for channels in changed:
        assert len(channels.unique(dim=0)) == len(channels)
    if name not in OVER_CHANNELS:
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", [None, 0])
def test_leading_channels_keep_their_weights(seed: int | None) -> None:
    """New entries of vectors are the mean of the old ones. Weights that read new channels are zero."""
    sample = specimen("cifar_resnet18")
    network = sample.real(sample.graph.default)
    channels = {n: size + (8 if index % 2 else -8) for index, (n, size) in enumerate(sample.graph.default.items())}
    state = resize(network, sample.graph, channels, seed=seed).state_dict()
    for name, before in network.state_dict().items():
        after = state[name]
        common = tuple(slice(0, min(a, b)) for a, b in zip(before.shape, after.shape, strict=True))
        assert torch.equal(after[common], before[common]), name
        if before.dim() == 1:
            assert torch.equal(after[len(before) :], before.mean().expand(max(0, len(after) - len(before)))), name
        elif seed is None or before.dim() == 0:
            assert after.count_nonzero() == before[common].count_nonzero(), name
        else:
            assert after[: len(before)].count_nonzero() == before[common].count_nonzero(), name
            assert after[len(before) :].count_nonzero() == after[len(before) :].numel(), name
    assert current_channels(resize(network, sample.graph, channels), sample.graph) == channels


def test_new_channels_have_the_variance_of_the_present_ones() -> None:
    network = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 40, 3), nn.Flatten(), nn.Linear(40, 2))
    graph = trace(network, torch.zeros(1, 3, 5, 5))
    wide = resize(network, graph, {"0": 160, "1": 80}).requires_grad_(False)
    images = torch.randn(500, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for layer, old in ((1, 40), (2, 40)):
        outputs = nn.Sequential(*list(wide)[:layer])(images).square().mean((0, 2, 3))  # without the effect of biases
        assert float(outputs[old:].mean() / outputs[:old].mean()) == pytest.approx(1, abs=0.25)
    torch.testing.assert_close(wide(images), network(images))


def test_new_weights_depend_on_the_seed_and_not_on_the_other_groups() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1))
    graph = trace(network, torch.zeros(1, 3, 4, 4))
    wide, again = (resize(network, graph, {"0": 8, "1": 6}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(wide.parameters(), again.parameters(), strict=True))
    assert not torch.equal(wide[0].weight, resize(network, graph, {"0": 8, "1": 6}, seed=1)[0].weight)
    assert torch.equal(wide[0].weight, resize(network, graph, {"0": 8, "1": 5})[0].weight)
    half = resize(network.to(torch.float64), graph, {"0": 8, "1": 6})
    torch.testing.assert_close(half[0].weight.float(), wide[0].weight)


@pytest.mark.parametrize("zero", [False, True])
def test_new_channels_learn_and_do_not_stay_equal(zero: bool) -> None:
    """Also in a layer whose weights the user has initialised to zero, and before a layer with one output."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 1))
    if zero:
        nn.init.zeros_(network[2].weight)
    graph = trace(network, torch.zeros(1, 3, 8, 8))
    wide = resize(network, graph, graph.scaled(1.5, 4))
    images = torch.randn(16, 3, 8, 8)
    torch.testing.assert_close(wide(images), network(images))
    optimiser = torch.optim.SGD(wide.parameters(), 0.01)
    for _ in range(30):
        optimiser.zero_grad()
        (wide(images) - images.mean((1, 2, 3))[:, None]).square().mean().backward()
        optimiser.step()
    for layer, axis in ((wide[0], 0), (wide[2], 0), (wide[2], 1)):
        assert (layer.weight.narrow(axis, 8, 4).std(axis) > 0).all()
    assert (wide[4].weight[0, 8 * 16 :].view(4, 16).std(0) > 0).all()


def test_new_channels_next_to_a_single_one_are_neutral_too() -> None:
    """The weight of a layer with one output is not a per-channel vector, although it has one number per input."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 5, 1))
    graph = trace(network, torch.zeros(1, 3, 4, 4))
    narrow = resize(network, graph, {"0": 3, "1": 1, "2": 3})
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    wide = resize(narrow, graph, {"0": 4, "1": 1, "2": 4})
    torch.testing.assert_close(wide(images), narrow(images))


def test_concatenated_channels_move_even_if_their_sum_is_constant() -> None:
    """One group shrinks as the other grows: a tensor that reads both keeps its shape, but its channels move."""

    network = Joins()
    graph = trace(network, torch.zeros(1, 3, 4, 4))
    other = resize(network, graph, {"a": 5, "b": 11})
    weight, before = other.get_parameter("c.weight"), network.c.weight
    assert torch.equal(weight[:, :5], before[:, :5])
    assert torch.equal(weight[:, 5:13], before[:, 8:])
    assert not weight[:, 13:].any()


def test_resizing_back_preserves_the_common_channels() -> None:
    sample = specimen("cifar_mobilenet_v2")
    wide = sample.real(sample.graph.scaled(1.5, 8))
    narrow = resize(wide, sample.graph, random_channels(sample.graph, 3, 0.3, 1.0))
    back = resize(
        resize(narrow, sample.graph, current_channels(wide, sample.graph)),
        sample.graph,
        current_channels(narrow, sample.graph),
    )
    assert all(torch.equal(a, b) for a, b in zip(narrow.state_dict().values(), back.state_dict().values(), strict=True))


def test_the_argument_is_not_changed_and_shares_no_memory() -> None:
    sample = specimen("cifar_resnet18")
    network = sample.real(sample.graph.default).train()
    network.get_parameter("conv1.weight").requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    other = resize(network, sample.graph, random_channels(sample.graph, 0, 0.5, 1.5))
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert other.training
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in network.parameters()]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_networks_with_normalised_weights_can_be_copied() -> None:
    """The weight that weight norm stores on its module is not a parameter and requires grad."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.utils.weight_norm(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
    )
    graph = trace(network, torch.zeros(1, 3, 4, 4))
    images = torch.randn(2, 3, 4, 4)
    assert graph.groups.keys() == {"0", "1", "2"}
    assert torch.equal(resize(network, graph, graph.default)(images), network(images))


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "nothing": 8}, "channels do not fit this network: unknown groups nothing; it has 12 groups"),
        (lambda c: {k: v for k, v in c.items() if k != "conv1"}, "missing groups conv1; it has 12 groups"),
        (lambda c: {}, "missing groups conv1, layer1.0.conv1, layer1.1.conv1 ...; it has 12 groups"),
        (lambda c: {**c, "conv1": 0}, "group conv1 cannot have 0 channels; use a positive multiple of 1"),
    ],
)
def test_channels_that_do_not_fit(change: object, message: str) -> None:
    sample = specimen("resnet18")
    with pytest.raises(UserError) as error:
        resize(sample.network, sample.graph, change(sample.graph.default))  # type: ignore[operator]
    assert message in str(error.value)


def test_channels_are_whole_units() -> None:
    sample = specimen("resnext50_32x4d")
    with pytest.raises(UserError, match=r"group layer1.0.conv1 cannot have 6 channels; use a positive multiple of 4"):
        resize(sample.network, sample.graph, sample.graph.default | {"layer1.0.conv1": 6})


def test_a_network_that_was_not_traced() -> None:
    sample = specimen("resnet18")
    with pytest.raises(
        UserError, match=r"this is not the network that was traced: it has no tensor 'conv1.weight' of 4"
    ):
        resize(specimen("mobilenet_v2").network, sample.graph, sample.graph.default)
    network = sample.real(sample.graph.default)
    network.get_submodule("layer3.0").conv2 = nn.Conv2d(256, 200, 3)
    with pytest.raises(
        UserError,
        match=r"the network that was traced: layer3.0.bn2.weight is \(256,\), but its groups require \(200,\)",
    ):
        resize(network, sample.graph, sample.graph.default)


# Initialisation


def test_initialisation_is_by_seed_and_by_the_papers_formulas() -> None:
    """The authors' initialisation; standard deviations are within 5 standard errors."""
    sample = specimen("cifar_mobilenet_v2")
    network, twin, other = (sample.real(sample.graph.scaled(1.5, 8)) for _ in range(3))
    for each, seed in ((network, 3), (twin, 3), (other, 4)):
        initialise(each, seed)
    pairs = zip(network.state_dict().values(), twin.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(network.get_parameter("classifier.1.weight"), other.get_parameter("classifier.1.weight"))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            convolution = isinstance(module, nn.Conv2d)
            expected = (
                (2 / (9 * module.out_channels if module.kernel_size == (3, 3) else module.out_channels)) ** 0.5
                if convolution
                else 0.01
            )
            weight = module.weight.detach()
            assert abs(weight.std() / expected - 1) < 5 / (2 * weight.numel()) ** 0.5
            assert abs(weight.mean()) < 5 * expected / weight.numel() ** 0.5
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()
            assert not module.running_mean.any()


def test_initialisation_keeps_constant_scales() -> None:
    network = tv.convnext.CNBlock(8, 1e-6, 0.0)
    initialise(network, 0)
    assert torch.equal(network.layer_scale, torch.full((8, 1, 1), 1e-6))


def test_initialisation_of_computed_weights() -> None:
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1)))
    initialise(network, 0)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
