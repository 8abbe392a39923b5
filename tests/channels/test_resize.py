"""Tests of ``resize``, which returns the same network with other numbers of channels."""

import copy

import pytest
import torch
import torchvision.models as tv
from specimens import MAIN, Joins, build, random_channels, shuffle_weights, specimen
from torch import nn

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
def test_new_channels_of_a_normalised_weight_are_zero(dim: int | None) -> None:
    """The norm of a weight of zeros would be zero, and its quotient undefined."""
    norm = nn.utils.parametrizations.weight_norm
    network = nn.Sequential(norm(nn.Conv2d(3, 8, 1), dim=dim), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    images = torch.randn(2, 3, 4, 4)
    graph = trace(network, images[:1])
    wide = resize(network, graph, {"0": 11})
    assert not wide[0].weight[8:].any()
    torch.testing.assert_close(wide(images), network(images))


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
