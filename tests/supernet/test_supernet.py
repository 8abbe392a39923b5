"""``Supernet`` computes the same as networks extracted from it, and shares its weights without copies."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from specimens import (
    MAIN,
    OTHERS,
    PATTERNS,
    Joins,
    batch_statistics,
    random_channels,
    shuffle_weights,
    specimen,
    spread,
)
from torch import Tensor, nn

from autoslim import Supernet, resize, trace
from autoslim.errors import UserError
from autoslim.export.formats import exported_program


def supernet_of(name: str, width: float = 1.5, dtype: torch.dtype = torch.float32) -> Supernet:
    sample = specimen(name)
    return Supernet(sample.real(sample.graph.scaled(width, 8), dtype), sample.graph)


@pytest.fixture
def supernet() -> Supernet:
    """Returns a ResNet-18 with a CIFAR stem at a quarter of its width (16 to 128 channels)."""
    return supernet_of("cifar_resnet18", 0.25)


def some(supernet: Supernet, seed: int, low: float = 0.2, high: float = 0.9) -> dict[str, int]:
    """Returns a random configuration, with each group between ``low`` and ``high`` times its widest."""
    draw = random.Random(seed)
    units = {name: group.unit for name, group in supernet.graph.groups.items()}
    return {
        name: max(1, round(draw.uniform(low, high) * count / units[name])) * units[name]
        for name, count in supernet.widest.items()
    }


# The extracted network


@pytest.mark.parametrize("name", MAIN)
def test_an_extracted_network_equals_the_supernet_bitwise(name: str) -> None:
    supernet, images = supernet_of(name).eval(), specimen(name).images()
    with torch.no_grad():
        for seed, (low, high) in enumerate([(0.5, 1.5), (0.1, 0.4)]):
            channels = random_channels(supernet.graph, seed, low, high)
            supernet.select(channels)
            cut = batch_statistics(supernet.extract(channels))
            assert type(cut) is type(specimen(name).network)
            assert torch.equal(supernet(images), cut(images))


@pytest.mark.parametrize("name", OTHERS + PATTERNS)
def test_extracted_networks_of_every_kind_equal_the_supernet(name: str) -> None:
    """They have concatenation, squeeze-and-excitation, groups, layer norm, shuffles or auxiliary heads."""
    supernet, images = supernet_of(name, 0.5).eval(), specimen(name).images(2)
    channels = some(supernet, 0)
    with torch.no_grad():
        supernet.select(channels)
        assert torch.equal(supernet(images), batch_statistics(supernet.extract(channels))(images))


@pytest.mark.parametrize("name", PATTERNS)
def test_an_extracted_network_is_saved_and_exported(name: str) -> None:
    """Its weights fit a network of the same size, and its graph runs on other numbers of images."""
    sample, supernet = specimen(name), supernet_of(name, 0.5)
    channels = some(supernet, 1)
    cut, images = supernet.extract(channels).eval(), sample.images(3)
    fresh = resize(sample.network, sample.graph, channels).to_empty(device="cpu").eval()
    fresh.load_state_dict(cut.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(images), cut(images))
        program = exported_program(cut, SimpleNamespace(example=sample.images))
        torch.testing.assert_close(program.module()(images), cut(images))


def test_auxiliary_heads_are_slimmed_too() -> None:
    supernet = supernet_of("googlenet", 0.5).train()
    channels = some(supernet, 1)
    supernet.select(channels)
    cut = supernet.extract(channels)
    assert cut.training
    for module in [*supernet.modules(), *cut.modules()]:
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        outputs, expected = supernet(specimen("googlenet").images(2)), cut(specimen("googlenet").images(2))
    assert all(torch.equal(output, other) for output, other in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
def test_it_computes_what_the_masked_widest_network_computes(name: str) -> None:
    """As an independent check, the widest network has the dropped channels set to zero after each normalisation."""
    sample = specimen(name)
    supernet = supernet_of(name, 0.5, torch.float64).eval()
    wide = batch_statistics(supernet.extract(supernet.widest))
    channels = some(supernet, 5)
    modules = dict(wide.named_modules())
    order = list(modules)
    for group in sample.graph.groups.values():
        for member in group.members:
            later = order[order.index(member) :]
            norm = next(modules[path] for path in later if isinstance(modules[path], nn.BatchNorm2d))

            def mask(_: nn.Module, __: object, output: Tensor, keep: int = channels[group.name]) -> Tensor:
                return torch.cat([output[:, :keep], torch.zeros_like(output[:, keep:])], 1)

            norm.register_forward_hook(mask)
    images = sample.images().double()
    supernet.select(channels)
    with torch.no_grad():
        torch.testing.assert_close(supernet(images), wide(images), rtol=1e-9, atol=1e-10)


def test_an_extracted_network_has_reset_statistics_and_shares_no_memory() -> None:
    sample = specimen("cifar_resnet18")
    network = sample.real(sample.graph.scaled(0.25, 8)).train()
    network(sample.images())
    supernet = Supernet(network, sample.graph)
    channels = some(supernet, 0)
    cut = supernet.extract(channels)
    for module in cut.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.track_running_stats
            assert module.num_batches_tracked == 0
            assert torch.equal(module.running_var, torch.ones(module.num_features))
    before = copy.deepcopy(supernet.state_dict())
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.fill_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())
    cut.eval()(sample.images())  # with its running statistics


def test_an_extracted_network_has_the_buffers_of_the_trained_supernet() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, track_running_stats=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10)
    )  # fmt: skip
    supernet = Supernet(network, trace(network, torch.empty(1, 3, 8, 8)))
    for _ in range(3):
        supernet.train()(3 + torch.randn(4, 3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    for channels in (supernet.widest, {"0": 5}):
        supernet.select(channels)
        assert torch.equal(supernet.eval()(images), supernet.extract(channels)(images))


def test_extraction_follows_device_and_format(supernet: Supernet) -> None:
    cut = supernet.double().extract(some(supernet, 0))
    assert {tensor.dtype for tensor in cut.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    cut.eval()(specimen("cifar_resnet18").images().double())


# Shared weights


def test_parameters_and_state_do_not_depend_on_the_selection(supernet: Supernet) -> None:
    parameters = dict(supernet.named_parameters())
    names = set(supernet.state_dict())
    supernet.select(some(supernet, 1))
    assert {name: id(parameter) for name, parameter in supernet.named_parameters()} == {
        name: id(parameter) for name, parameter in parameters.items()
    }
    assert set(supernet.state_dict()) == names == set(parameters)  # no running statistics
    wide = resize(specimen("cifar_resnet18").network, supernet.graph, supernet.widest)
    assert {name.removeprefix("network."): p.shape for name, p in parameters.items()} == {
        name: p.shape for name, p in wide.named_parameters()
    }


def test_views_share_storage_and_nothing_is_copied(supernet: Supernet) -> None:
    supernet.select(some(supernet, 2))
    for name, parameter in supernet.network.named_parameters():
        path, _, attribute = name.rpartition(".")
        used = getattr(supernet.network.get_submodule(path), attribute)
        assert used.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        assert used.data_ptr() == parameter.data_ptr()  # the leading ones
        assert used is parameter or used._base is parameter
    shared = {parameter.untyped_storage().data_ptr() for parameter in supernet.parameters()}
    for module in supernet.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):
                assert value.untyped_storage().data_ptr() in shared
    supernet.select(supernet.widest)
    assert not any(isinstance(value, Tensor) for module in supernet.modules() for value in vars(module).values())


def test_only_the_selected_leading_slices_have_gradients(supernet: Supernet) -> None:
    channels = some(supernet, 3)
    supernet.train().select(channels)
    supernet(specimen("cifar_resnet18").images()).square().sum().backward()
    sizes = {name: p.shape for name, p in supernet.extract(channels).named_parameters()}
    for name, parameter in supernet.network.named_parameters():
        assert parameter.grad is not None
        selected = tuple(slice(0, size) for size in sizes[name])
        assert parameter.grad[selected].any(), name
        outside = parameter.grad.clone()
        outside[selected] = 0
        assert not outside.any(), name


@pytest.mark.parametrize("name", ["small_mobilenet_v2", "squeezenet1_1"])
def test_gradients_equal_the_extracted_networks(name: str) -> None:
    supernet, images = supernet_of(name, 0.5, torch.float64).eval(), specimen(name).images(2).double()
    channels = some(supernet, 4)
    cut = batch_statistics(supernet.extract(channels))
    supernet.select(channels)
    supernet(images).square().sum().backward()
    cut(images).square().sum().backward()
    for parameter, expected in zip(supernet.parameters(), spread(supernet.graph, cut, supernet.widest), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("reselect", [True, False])
def test_optimiser_updates_are_used(fused: bool, reselect: bool) -> None:
    """This includes gathered weights, and the same configuration selected again or not at all."""
    network, images = Joins(), torch.randn(4, 3, 5, 5)
    supernet = Supernet(network, trace(network, torch.zeros(1, 3, 5, 5)))
    channels = {"a": 3, "b": 5}
    supernet.select(channels)
    optimiser = torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9, fused=fused)
    for _ in range(3):
        loss = supernet(images).square().sum()
        assert torch.equal(loss, supernet.extract(channels)(images).square().sum())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if reselect:
            supernet.select(channels)
    assert torch.equal(supernet(images), supernet.extract(channels)(images))


def test_training_steps_at_two_configurations(supernet: Supernet) -> None:
    """Each step has the gradients of the network that is extracted from the weights at that time."""
    images = specimen("cifar_resnet18").images()
    optimiser = torch.optim.SGD(supernet.parameters(), lr=0.01)
    supernet.train()
    for step in range(3):
        channels = some(supernet, step)
        supernet.select(channels)
        logits = supernet(images)
        assert torch.equal(logits, supernet.extract(channels).train()(images))
        optimiser.zero_grad()
        logits.square().mean().backward()
        optimiser.step()


# Moves, formats and modes


def test_moving_keeps_the_selection(supernet: Supernet) -> None:
    images, channels = specimen("cifar_resnet18").images(), some(supernet, 1)
    supernet.eval().select(channels)
    expected = supernet(images)
    supernet.double()
    assert supernet.selected == channels
    torch.testing.assert_close(supernet(images.double()).float(), expected, rtol=1e-4, atol=1e-4)
    supernet.float()
    assert torch.equal(supernet(images), expected)
    supernet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(supernet(images.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
    supernet.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in supernet.parameters())


@pytest.mark.parametrize("name", ["cifar_resnet18", "squeezenet1_1"])
def test_selected_in_inference_mode_then_trained(name: str) -> None:
    """Scoring and training alternate, so a configuration selected for one must also work for the other."""
    supernet, images = supernet_of(name, 0.25), specimen(name).images(2)
    channels = some(supernet, 2)
    with torch.inference_mode():
        supernet.select(channels)
        supernet(images)
    supernet(images).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in supernet.parameters())


def test_loaded_weights_are_used(supernet: Supernet) -> None:
    channels, images = some(supernet, 1), specimen("cifar_resnet18").images()
    supernet.eval().select(channels)
    other = supernet_of("cifar_resnet18", 0.25)
    shuffle_weights(other.network, seed=9)
    supernet.load_state_dict(other.state_dict())
    other.eval().select(channels)
    assert torch.equal(supernet(images), other(images))


def test_batch_statistics_in_both_modes(supernet: Supernet) -> None:
    images = specimen("cifar_resnet18").images()
    with torch.no_grad():
        assert torch.equal(supernet.train()(images), supernet.eval()(images))


def test_attributes_are_those_of_the_selected_network() -> None:
    """Grouped convolutions read ``groups`` from the module. The widest values are restored."""
    supernet = supernet_of("resnext50_32x4d", 1.0)
    conv2 = supernet.network.get_submodule("layer1.0.conv2")
    supernet.select(supernet.widest | {"layer1.0.conv1": 20})
    assert (conv2.groups, conv2.in_channels, conv2.out_channels) == (5, 20, 20)
    assert conv2.weight.shape == (20, 4, 3, 3)
    supernet.select(supernet.widest)
    assert (conv2.groups, conv2.in_channels, conv2.out_channels) == (32, 128, 128)


def test_selecting_invalid_channels(supernet: Supernet) -> None:
    before = dict(supernet.selected)
    with pytest.raises(UserError, match=r"conv1 has at most 16 channels .* 17"):
        supernet.select(supernet.widest | {"conv1": 17})
    with pytest.raises(UserError, match=r"group conv1 cannot have 0 channels; use a positive multiple of 1"):
        supernet.select(supernet.widest | {"conv1": 0})
    with pytest.raises(UserError, match="unknown groups stem"):
        supernet.select(supernet.widest | {"stem": 8})
    with pytest.raises(UserError, match="missing groups"):
        supernet.select({"conv1": 8})
    assert supernet.selected == before


def test_a_supernet_of_another_network() -> None:
    with pytest.raises(UserError, match="this is not the network that was traced"):
        Supernet(specimen("mobilenet_v2").network, specimen("resnet18").graph)


def test_a_supernet_is_not_copied(supernet: Supernet) -> None:
    with pytest.raises(TypeError, match=r"extract\(\)"):
        copy.deepcopy(supernet)


def test_cross_entropy_of_the_selected_network_is_finite_at_one_channel(supernet: Supernet) -> None:
    supernet.train().select(dict.fromkeys(supernet.widest, 1))
    loss = F.cross_entropy(supernet(specimen("cifar_resnet18").images()), torch.arange(4))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in supernet.parameters() if parameter.grad is not None)


@torch.no_grad()
def test_a_recurrent_layer_reads_the_present_weights() -> None:
    """It keeps a list of its weights, and cuDNN moves them into one buffer unless the supernet prevents it."""
    sample = specimen("recurrent")
    supernet = Supernet(sample.real(sample.graph.default), sample.graph).eval()
    channels, images = random_channels(sample.graph, 0, 0.5, 0.8), sample.images()
    for selected in (channels, sample.graph.default, channels):
        supernet.select(selected)
        for parameter in supernet.network.parameters():  # as an optimiser does, without another selection
            parameter.mul_(-0.9)
        assert torch.equal(supernet(images), batch_statistics(supernet.extract(selected))(images))
    supernet.double()
    assert torch.equal(supernet(images.double()), batch_statistics(supernet.extract(channels))(images.double()))
    recurrent = [module for module in supernet.modules() if isinstance(module, nn.RNNBase)]
    assert recurrent
    for module in recurrent:
        assert module.flatten_parameters.__qualname__ != nn.RNNBase.flatten_parameters.__qualname__


def test_gradients_of_a_recurrent_layer_are_those_of_the_extracted_one() -> None:
    sample = specimen("recurrent")
    supernet = Supernet(sample.real(sample.graph.default), sample.graph).eval()
    channels, images = random_channels(sample.graph, 0, 0.5, 0.8), sample.images()
    cut = batch_statistics(supernet.extract(channels))
    supernet.select(channels)
    for network in (supernet, cut):
        network(images).square().sum().backward()
    for wide, narrow in zip(
        supernet.network.parameters(), spread(sample.graph, cut, sample.graph.default), strict=True
    ):
        torch.testing.assert_close(wide.grad, narrow)


class _FunctionalNorm(nn.Module):
    """Normalises with ``F.batch_norm`` and the tensors of a batch norm, or of itself."""

    def __init__(self, owner: str, training: bool | None) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))
        self.owner, self.updates = owner, training

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm if self.owner == "norm" else self
        updates = self.training if self.updates is None else self.updates
        x = F.batch_norm(
            self.stem(x), norm.running_mean, norm.running_var, self.norm.weight, bias=self.norm.bias, training=updates
        )
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@pytest.mark.parametrize(("owner", "training"), [("norm", None), ("norm", False), ("self", None), ("self", True)])
def test_running_statistics_that_no_module_owns_are_refused(owner: str, training: bool | None) -> None:
    network = _FunctionalNorm(owner, training)
    graph = trace(network, torch.empty(1, 3, 4, 4))
    assert list(graph.groups) == ["stem"]
    with pytest.raises(UserError, match=r"running statistics to `batch_norm` at test_supernet.py:\d+, .*module there"):
        Supernet(network, graph)


def test_functional_batch_norms_with_constants_or_batch_statistics_are_not_refused() -> None:
    network = _FunctionalNorm("self", False)
    shuffle_weights(network)
    graph = trace(network, torch.empty(1, 3, 4, 4))
    supernet, images = Supernet(network, graph), torch.randn(2, 3, 4, 4)
    for mode in (True, False):
        supernet.train(mode).select({"stem": 5})
        assert torch.equal(supernet(images), supernet.extract({"stem": 5})(images))
