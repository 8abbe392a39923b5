"""Costs in closed form against an independent count and against published figures."""

import pytest
import torch
import torchvision.models as tv
from independent_counts import counted, graph_at_224
from specimens import MAIN, OTHERS, PATTERNS, random_channels, specimen
from torch import nn

from autoslim import resize, trace
from autoslim.channels.copying import on_meta
from autoslim.errors import UserError
from autoslim.models.architectures import mobilenet_v2

# An independent count


@pytest.mark.parametrize("name", MAIN + OTHERS + PATTERNS)
def test_closed_form_equals_the_count_on_the_resized_network(name: str) -> None:
    """They are equal at random configurations between 0.1 and 1.6 times the width."""
    sample = specimen(name)
    for seed, (low, high) in enumerate([(1.0, 1.0), (0.5, 1.5), (0.1, 1.6)]):
        channels = random_channels(sample.graph, seed, low, high)
        network = resize(sample.network, sample.graph, channels)
        assert sample.graph.macs(channels) == counted(network, sample.graph.input_shape)
        assert sample.graph.params(channels) == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1"])
def test_costs_of_every_layer_against_its_shapes_at_run_time(name: str) -> None:
    """MACs and activation sizes follow from the shapes of each layer at run time."""
    sample = specimen(name)
    channels = random_channels(sample.graph, 0, 0.3, 1.5)
    network = resize(sample.network, sample.graph, channels).eval()
    found: dict[str, tuple[int, int]] = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def record(layer: nn.Module, _: object, output: torch.Tensor, path: str = path) -> None:
                positions = output[0, 0].numel() if output.dim() == 4 else 1
                found[path] = (positions * layer.get_parameter("weight").numel(), output[0].numel())

            module.register_forward_hook(record)
    network(torch.empty(1, *sample.graph.input_shape, device="meta"))
    layers = {layer.name: layer for layer in sample.graph.layers if layer.kind != "avgpool"}
    assert layers.keys() == found.keys()
    for path, layer in layers.items():
        activation = layer.positions * sum(segment.size(channels) for segment in layer.outputs)
        assert (layer.macs(channels), activation) == found[path]


def test_operations_without_a_rule_are_counted() -> None:
    """Transposed and functional convolutions and the layers of an attention block are counted."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.up = nn.ConvTranspose2d(8, 6, 2, 2)
            self.kernel = nn.Parameter(torch.empty(10, 6, 3, 3))
            self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
            self.head = nn.Linear(10, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = nn.functional.conv2d(self.up(self.stem(images)), self.kernel, stride=2)
            tokens = maps.flatten(2).transpose(1, 2)
            out: torch.Tensor = self.head(self.attention(tokens, tokens, tokens)[0].mean(1))
            return out

    graph = trace(Mixture(), torch.empty(1, 3, 8, 8))
    stem, up, kernel = 36 * 27 * 8, 36 * 8 * 6 * 4, 25 * 6 * 9 * 10
    attention = 25 * (10 * 30 + 10 * 10)
    assert graph.macs() == stem + up + kernel + attention + 10 * 4
    assert graph.params() == sum(parameter.numel() for parameter in Mixture().parameters())


def test_a_layer_called_twice_costs_twice_and_has_its_parameters_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.again, self.tied = (nn.Conv2d(i, 8, 3, padding=1, bias=False) for i in (3, 8, 8))
            self.tied.weight = self.again.weight

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.tied(self.again(self.again(self.stem(images)))).mean(1)
            return out

    graph = trace(Twice(), torch.empty(1, 3, 4, 4))
    assert graph.macs({"stem": 5}) == 16 * 9 * (3 * 5 + 3 * 5 * 5)
    assert graph.params({"stem": 5}) == 9 * (3 * 5 + 5 * 5)


# Published figures


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("mobilenet_v2", {1.0: 300.84, 1.5: 672.93, 1.3: 509.46, 0.75: 209.13}),
        ("resnet50", {1.0: 4089.28}),
    ],
)
def test_figures_of_the_authors(name: str, figures: dict[float, float]) -> None:
    """The authors count average pooling. Below width 1, MobileNetV2's last convolution keeps 1280 channels."""
    graph = graph_at_224(name)
    for width, millions in figures.items():
        channels = graph.scaled(width, 8) | ({"features.18.0": 1280} if width < 1 else {})
        assert round(graph.macs(channels, pooling=True) / 1e6, 2) == millions


def test_figures_at_cifars_size() -> None:
    """The paper states 88.00M MACs for CIFAR-10."""
    graph = trace(mobilenet_v2(), torch.empty(1, 3, 32, 32))
    assert round(graph.macs(pooling=True) / 1e6, 2) == 88.00
    assert round(graph.params() / 1e6, 2) == 2.24
    wide = graph.scaled(1.5, 8)
    assert (round(graph.macs(wide, pooling=True) / 1e6, 1), round(graph.params(wide) / 1e6, 2)) == (199.7, 4.96)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_figures_of_torchvision(name: str) -> None:
    """torchvision publishes parameters and billions of multiply-adds in the metadata of its weights."""
    meta = tv.get_model_weights(name).DEFAULT.meta
    graph = graph_at_224(name)
    assert graph.params() == meta["num_params"]
    assert round(graph.macs() / 1e9, 2) == pytest.approx(meta["_ops"], abs=0.011)


def test_average_pooling_costs_one_mac_per_input_element() -> None:
    graph = specimen("efficientnet_b0").graph
    network = on_meta(specimen("efficientnet_b0").network).eval()
    read = 0

    def record(_: nn.Module, inputs: tuple[torch.Tensor, ...], __: object) -> None:
        nonlocal read
        read += inputs[0][0].numel()

    for module in network.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):
            module.register_forward_hook(record)
    network(torch.empty(1, *graph.input_shape, device="meta"))
    assert graph.macs(pooling=True) - graph.macs() == read > 0


# Resources


def test_cost_by_resource() -> None:
    graph = specimen("resnet18").graph
    assert graph.cost(graph.default, "macs") == graph.macs()
    assert graph.cost(graph.default, "params") == graph.params() == 11_689_512
    with pytest.raises(UserError, match="resource 'latency' has no closed form here; use macs, params or memory"):
        graph.cost(graph.default, "latency")


def test_costs_grow_with_channels() -> None:
    graph = specimen("densenet121").graph
    for seed in range(5):
        channels = random_channels(graph, seed, 0.2, 1.4)
        for name in list(graph.groups)[seed::5]:
            more = channels | {name: channels[name] + graph.groups[name].unit}
            assert graph.macs(more) > graph.macs(channels)
            assert graph.params(more) > graph.params(channels)
