"""Tracing of known networks and of small networks with one difficulty each, and the errors that it raises."""

import copy
import inspect
import math
import pickle
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from specimens import MAIN, OTHERS, batch_statistics, random_channels, shuffle_weights, specimen
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.quantization import get_default_qat_qconfig, quantize_dynamic
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close as assert_equal
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import DeformConv2d, FrozenBatchNorm2d, StochasticDepth

from autoslim import Supernet, current_channels, resize, trace
from autoslim.channels.copying import on_meta
from autoslim.channels.graph import ChannelGraph, layers_not_prunable, slimmable_share
from autoslim.errors import UserError
from autoslim.search.incremental import verified_evaluator
from autoslim.tracing import propagate
from autoslim.tracing.capture import symbolic_graph
from autoslim.tracing.operations import is_local
from autoslim.tracing.record import Carrier


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Body(nn.Module):
    """A stem with 16 channels, a middle part defined by a subclass or an argument, and a classifier."""

    def __init__(self, middle: nn.Module | None = None, channels: int = 16) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.middle = nn.Identity() if middle is None else middle
        self.head = nn.Linear(channels, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.between(self.stem(images)).mean((2, 3)))
        return logits

    def between(self, maps: Tensor) -> Tensor:
        out: Tensor = self.middle(maps)
        return out


EXAMPLE = torch.zeros(1, 3, 8, 8)


def check_resizing(network: nn.Module, graph: ChannelGraph, widest: float = 1.5) -> None:
    """Checks that the supernet and the networks extracted from it agree at random configurations."""
    network.eval()
    shuffle_weights(network)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_equal(resize(network, graph, graph.default)(images), network(images), rtol=0, atol=0)
    wide = resize(network, graph, random_channels(graph, 0, widest, widest))
    shuffle_weights(wide)
    supernet = Supernet(wide, graph).eval()
    for seed in range(5):
        channels = random_channels(graph, seed, 0.1, widest)
        supernet.select(channels)
        expected = batch_statistics(supernet.extract(channels))(images)
        # A sum over a view of a weight is rounded differently than one over a copy.
        tolerance = 1e-4 if any(isinstance(module, Standardised) for module in network.modules()) else 0
        assert_equal(supernet(images), expected, rtol=tolerance, atol=tolerance)


# Known networks


@pytest.mark.parametrize(
    ("name", "groups"),
    [("mobilenet_v2", 25), ("resnet50", 37), ("mobilenet_v1", 14), ("mnasnet", 25), ("resnet18", 12)],
)
def test_number_of_groups(name: str, groups: int) -> None:
    """The number that the authors search. ResNet-18 has 8 inner layers and 4 stages; the stem belongs to the first."""
    assert len(specimen(name).graph.groups) == groups


@pytest.mark.parametrize("name", [*MAIN, *(name for name in OTHERS if name not in ("shufflenet_v2_x0_5", "googlenet"))])
def test_only_the_classes_are_not_prunable(name: str) -> None:
    not_prunable = specimen(name).graph.not_prunable
    assert list(not_prunable.values()) == ["it is the network's output"]


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
def test_residual_groups_are_the_architectures_stages(name: str) -> None:
    graph = specimen(name).graph
    members = [set(group.members) for group in graph.groups.values()]
    if name == "mobilenet_v2":
        for blocks in (range(2, 4), range(4, 7), range(7, 11), range(11, 14), range(14, 17)):  # those with skips
            stage = {f"features.{block}.conv.2" for block in blocks}
            stage |= {f"features.{block}.conv.3" for block in blocks}  # batch norms are members too
            assert sum(any(layer in group for layer in stage) for group in members) == 1
        assert not any({"features.1.conv.1", "features.2.conv.2"} <= group for group in members)
    else:
        for stage, blocks in enumerate((3, 4, 6, 3), start=1):
            outputs = {f"layer{stage}.{block}.conv3" for block in range(blocks)} | {f"layer{stage}.0.downsample.0"}
            assert [group for group in members if group & outputs] == [outputs]


def test_depthwise_convolutions_belong_to_the_group_they_read() -> None:
    graph = specimen("mobilenet_v2").graph
    assert set(graph.groups["features.2.conv.0.0"].members) == {"features.2.conv.0.0", "features.2.conv.1.0"}
    assert graph.groups["features.2.conv.0.0"].expansion == ("features.1.conv.1", 6)
    assert {group.expansion and group.expansion[1] for group in graph.groups.values()} == {None, 6}


def test_widening_without_projection_is_not_an_expansion() -> None:
    assert all(group.expansion is None for group in specimen("mobilenet_v1").graph.groups.values())


def test_grouped_convolutions_have_units() -> None:
    graph = specimen("resnext50_32x4d").graph
    assert graph.groups["layer1.0.conv1"].unit == 128 // 32
    assert graph.groups["layer4.2.conv1"].unit == 1024 // 32


def test_shuffled_channels_are_not_prunable() -> None:
    graph = specimen("shufflenet_v2_x0_5").graph
    assert "interleaved" in graph.not_prunable["stage2.0.branch2.5"]
    assert "stage2.0.branch2.0" in graph.groups  # layers between shuffles can be slimmed


def test_auxiliary_heads_that_run_in_training_only_are_traced() -> None:
    graph = specimen("googlenet").graph
    assert {"aux1.conv.conv", "aux1.fc1", "aux2.conv.conv", "aux2.fc1"} <= graph.groups.keys()
    assert graph.not_prunable == dict.fromkeys(["fc", "aux1.fc2", "aux2.fc2"], "it is the network's output")
    assert not [layer for layer in graph.layers if layer.name.startswith("aux")]  # costs are those of inference


def test_tracing_changes_nothing_and_runs_nothing() -> None:
    network = Body(nn.Sequential(nn.BatchNorm2d(16), conv(16, 16))).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.stem.register_forward_hook(lambda *_: pytest.fail("the network was run"))
    network.stem._forward_hooks.clear()
    modes = [module.training for module in network.modules()]
    trace(network, EXAMPLE)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert trace(network, EXAMPLE) == trace(network, EXAMPLE)


# One problem each


class SharedWeight(Body):
    """Two layers share a weight, and one module is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(16, 16), conv(16, 16)
        self.second.weight = self.first.weight
        self.again = nn.BatchNorm2d(16)

    def between(self, maps: Tensor) -> Tensor:
        maps = self.again(self.first(maps).relu())
        out: Tensor = self.again(self.second(maps))
        return out


class PlainTensors(Body):
    """Constants that are not buffers, and tensors created in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images - self.mean) * torch.linspace(0, 1, images.shape[3]) + torch.arange(8)
        out: Tensor = self.head(maps.mean((2, 3)))
        return out


class Halves(Body):
    """Two groups in one tensor that is split at a computed position; their sizes match only by chance."""

    def __init__(self) -> None:
        super().__init__(channels=8)
        self.left, self.right = conv(3, 8), conv(3, 8)
        self.left_out, self.right_out = conv(8, 8), conv(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        half = maps.shape[1] // 2
        left, right = maps[:, :half] + self.left(images), maps[:, half:] + self.right(images)
        out: Tensor = self.head((self.left_out(left) + self.right_out(right)).mean((2, 3)))
        return out


class Gated(Body):
    """An even split whose pieces are combined again: both halves belong to one group."""

    def __init__(self) -> None:
        super().__init__(channels=12)
        self.wide, self.out = conv(16, 24), conv(12, 12)

    def between(self, maps: Tensor) -> Tensor:
        value, gate = self.wide(maps).chunk(2, 1)
        out: Tensor = self.out(value * gate.sigmoid())
        return out


class Parts(Body):
    """A group that occurs only in a concatenation with channels that are not prunable."""

    def __init__(self) -> None:
        super().__init__(channels=8)
        self.wide, self.mixed = conv(16, 24), conv(24 + 3, 8)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.cat([images, self.wide(self.stem(images))], 1)
        out: Tensor = self.head(self.mixed(maps).mean((2, 3)))
        return out


class ChannelsLast(Body):
    """Linear layers and a layer norm on channels along the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 40), nn.Linear(40, 16)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))

    def between(self, maps: Tensor) -> Tensor:
        inner = self.down(F.gelu(self.up(self.norm(maps.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return maps + self.scale * inner


class Flattened(nn.Module):
    """A flatten with several pixels left: a linear layer reads each channel several times."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 16), nn.PReLU(16), nn.AdaptiveAvgPool2d(2))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 4))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(images))
        return out


class Residual(Body):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.norm = conv(16, 24, bias=False), conv(24, 16, bias=False), nn.BatchNorm2d(16)

    def between(self, maps: Tensor) -> Tensor:
        maps = maps + self.norm(self.outer(self.inner(maps).relu()))
        maps += self.norm(self.outer(self.inner(maps).relu()))  # the same modules once more
        return maps


class Concatenations(Body):
    """A dense block: each layer reads all previous ones, and the norm has channels of several groups."""

    def __init__(self) -> None:
        super().__init__(channels=28)
        self.first, self.second, self.norm = conv(16, 4), conv(20, 8), nn.BatchNorm2d(28)

    def between(self, maps: Tensor) -> Tensor:
        maps = torch.cat([maps, self.first(maps)], 1)
        out: Tensor = self.norm(torch.cat((self.second(maps), maps), dim=1))
        return out


class Excitation(Body):
    """Squeeze-and-excitation twice: with 1x1 convolutions, and with linear layers and views."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.down, self.up = nn.Linear(16, 6), nn.Linear(6, 16)

    def between(self, maps: Tensor) -> Tensor:
        maps = maps * self.excite(self.squeeze(F.adaptive_avg_pool2d(maps, 1)).relu()).sigmoid()
        count, channels = maps.shape[:2]
        scale = self.up(self.down(maps.mean((2, 3))).relu()).sigmoid().view(count, channels, 1, 1)
        return maps * scale.expand_as(maps)


class Nested(Body):
    """Modules in lists and dictionaries in modules, called in loops."""

    def __init__(self) -> None:
        super().__init__(channels=8)
        block = nn.Sequential(nn.Sequential(conv(16, 12), nn.ReLU()), nn.ModuleDict({"out": conv(12, 16)})["out"])
        self.blocks = nn.ModuleList([block, nn.Sequential(block, nn.ModuleList([conv(16, 8)])[0])])

    def between(self, maps: Tensor) -> Tensor:
        for block in self.blocks:
            maps = block(maps)
        return maps


class Noise(Body):
    """Dropout of elements, channels and paths, as modules and as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.dropouts = nn.Sequential(nn.Dropout(0.1), nn.Dropout2d(0.1), nn.AlphaDropout(0.1))
        self.path, self.dropped = conv(16, 16), StochasticDepth(0.2, "row")

    def between(self, maps: Tensor) -> Tensor:
        maps = F.dropout2d(self.dropouts(maps), 0.1, self.training)
        kept = maps.new_empty((maps.shape[0], 1, 1, 1)).bernoulli_(0.8)
        return maps + self.dropped(self.path(maps)) * (kept if self.training else 1) + torch.zeros_like(maps)


class ConvolutionHead(nn.Module):
    """As in SqueezeNet, a convolution produces the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(conv(3, 16), nn.ReLU()), conv(16, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.head(self.body(images)), 1).flatten(1)


class TwoHeads(Body):
    """A dictionary of outputs, one of them maps."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.maps = conv(16, 16), conv(16, 2)

    def forward(self, images: Tensor) -> dict[str, Any]:  # type: ignore[override]
        maps = self.middle(self.stem(images))
        return {"classes": self.head(maps.mean((2, 3))), "more": [self.maps(maps)]}


class SelectiveKernel(Body):
    """Branches that are stacked, weighted and summed."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv(16, 16), conv(16, 16, 5)])
        self.squeeze, self.weigh = nn.Linear(16, 6), nn.Linear(6, 32)

    def between(self, maps: Tensor) -> Tensor:
        stacked = torch.stack([branch(maps) for branch in self.branches], 1)  # (N, 2, C, H, W)
        weights = self.weigh(self.squeeze(stacked.sum(1).mean((2, 3))).relu())
        return (stacked * weights.view(-1, 2, stacked.shape[2], 1, 1).softmax(1)).sum(dim=1)


class SplitAttention(Body):
    """The channels of one convolution viewed as branches."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.weigh = conv(16, 32), nn.Conv2d(16, 32, 1)

    def between(self, maps: Tensor) -> Tensor:
        maps = self.wide(maps)
        count, channels, height, width = maps.shape
        pieces = maps.reshape(count, 2, channels // 2, height, width)
        weights = self.weigh(pieces.sum(1).mean((2, 3), keepdim=True)).view(count, 1, 2, -1)
        weights = weights.transpose(1, 2).softmax(1).reshape(count, 2, -1, 1, 1)
        return (pieces * weights).sum(1)


class ChannelAttention(Body):
    """Efficient channel attention: a kernel slides over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.slide = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def between(self, maps: Tensor) -> Tensor:
        gates = self.slide(maps.mean((2, 3)).unsqueeze(1)).sigmoid()  # (N, 1, C)
        return maps * gates.view(maps.shape[0], -1, 1, 1)


class GlobalContext(Body):
    """A matrix product of all channels with a map of weights, added to every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.where = conv(16, 1, 1)

    def between(self, maps: Tensor) -> Tensor:
        weights = self.where(maps).flatten(2).softmax(-1).transpose(1, 2)  # (N, H * W, 1)
        return maps + (maps.flatten(2) @ weights).unsqueeze(3)


class ResponseNorm(Body):
    """Global response normalisation, with a shift and a gain for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.gain = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(1, 16, 1, 1))
        self.slopes = nn.Parameter(torch.rand(16))

    def between(self, maps: Tensor) -> Tensor:
        norms = maps.norm(p=2, dim=(2, 3), keepdim=True)
        maps = torch.addcmul(self.shift.view(1, -1, 1, 1), self.gain, maps * (norms / norms.mean(1, keepdim=True)))
        return F.prelu(maps, self.slopes)


class UnitVectors(Body):
    """A norm whose order is passed before its dimension."""

    def between(self, maps: Tensor) -> Tensor:
        return maps / maps.norm(2, 1, keepdim=True)


class NormOfAll(Body):
    """A norm over all elements, including the images of the batch."""

    def between(self, maps: Tensor) -> Tensor:
        return maps / maps.norm(1)


class PadsToEven(Body):
    """Code that branches on the size of the maps, as padding like TensorFlow's does, and asserts it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(16, 12, 3, stride=2)
        self.up = nn.Conv2d(12, 16, 3)

    def between(self, maps: Tensor) -> Tensor:
        for layer in (self.down, self.up):
            count, _, height, width = maps.size()
            assert len(maps) == count
            assert height == width, "square images only"
            if max((math.ceil(height / 2) - 1) * 2 + 3 - height, 0) > 0:
                maps = F.pad(maps, (0, 1, 0, 1))
            maps = layer(maps)
        return maps


class HandMadeDrop(Body):
    """Stochastic depth written by hand, with noise of the shape of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.path = conv(16, 16)

    def between(self, maps: Tensor) -> Tensor:
        if not self.training:
            return maps + self.path(maps)
        noise = torch.rand((maps.shape[0],) + (1,) * (maps.ndim - 1), dtype=maps.dtype, device=maps.device)
        return maps + self.path(maps) * (noise < 0.8)


class EachPiece(Body):
    """A loop over the pieces of a tensor and over its rows of pixels."""

    def __init__(self) -> None:
        super().__init__(channels=8)
        self.parts = nn.ModuleList([conv(8, 6), conv(8, 8)])
        self.last = conv(14, 8)

    def between(self, maps: Tensor) -> Tensor:
        pieces = [part(piece) for part, piece in zip(self.parts, maps.chunk(2, 1), strict=True)]
        maps = self.last(torch.cat(pieces, 1))
        return torch.stack([maps[:, :, row] for row in range(maps.shape[2])], 2)


class Extrema(Body):
    """The larger and the smaller of two tensors, element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.other = conv(3, 16)

    def forward(self, images: Tensor) -> Tensor:
        maps, other = self.stem(images), self.other(images)
        maps = torch.max(maps, other) + torch.min(maps, other=other) + torch.maximum(maps, other).minimum(other)
        out: Tensor = self.head(maps.mean(axis=(2, 3)))
        return out


class SpatialAttention(Body):
    """Means and maxima along the channels weight the pixels, and maxima along the rows the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.where = conv(3, 1, 7)

    def between(self, maps: Tensor) -> Tensor:
        highest, _ = torch.max(maps, dim=1, keepdim=True)
        gate = self.where(torch.cat([maps.mean(1, keepdim=True), highest, maps.amin(1, keepdim=True)], 1)).sigmoid()
        return maps * gate * maps.max(dim=2, keepdim=True).values


class LinearUnits(Body):
    """Gated linear units along the channels and along the rows."""

    def __init__(self) -> None:
        super().__init__(channels=12)
        self.wide, self.gate, self.out = conv(16, 24), nn.GLU(1), conv(12, 12)

    def between(self, maps: Tensor) -> Tensor:
        out: Tensor = self.out(F.glu(self.gate(self.wide(maps)), 2))
        return out


class RootMeanSquare(Body):
    """RMS norms of channels along the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.scale = nn.Parameter(torch.rand(24))

    def between(self, maps: Tensor) -> Tensor:
        tokens = self.up(self.norm(maps.flatten(2).transpose(1, 2)))
        tokens = self.down(F.rms_norm(tokens, tokens.shape[-1:], self.scale))
        return maps + tokens.transpose(1, 2).unflatten(2, maps.shape[2:])


class Indices(Body):
    """Max pooling with indices, as a module and as a function, and its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.unpool, self.inner = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2), conv(16, 16)

    def between(self, maps: Tensor) -> Tensor:
        maps, where = self.pool(maps)
        inner, there = F.max_pool2d(self.inner(maps), 2, return_indices=True)
        return self.unpool(maps + F.max_unpool2d(inner, there, 2), where)


class Standardised(nn.Module):
    """A convolution with a standardised weight, as a layer of its own or around another one."""

    def __init__(self, inputs: int, outputs: int, way: str) -> None:
        super().__init__()
        self.conv, self.gain, self.way = conv(inputs, outputs), nn.Parameter(torch.ones(outputs, 1, 1, 1)), way

    def forward(self, maps: Tensor) -> Tensor:
        weight = self.conv.weight
        if self.way == "moments":
            variance, mean = torch.var_mean(weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
            weight = self.gain * (weight - mean) / torch.sqrt(variance + 1e-5)
        else:
            flat = weight.view(weight.size(0), -1)
            weight = weight - flat.mean(1).view(-1, 1, 1, 1)
            weight = self.gain * weight / (flat.std(1).view(-1, 1, 1, 1) + 1e-5).expand_as(weight)
        return F.conv2d(maps, weight, self.conv.bias, padding=1)


class NormedWeight(Standardised):
    """A batch norm standardises the weight."""

    def forward(self, maps: Tensor) -> Tensor:
        weight, gain = self.conv.weight, self.gain.view(-1)
        flat = weight.reshape(1, weight.shape[0], -1)
        flat = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0)
        return F.conv2d(maps, flat.reshape_as(weight), self.conv.bias, padding=1)


class Fused(nn.Module):
    """A 3x3 and a 1x1 branch, each with a scale, that are added up as one kernel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.large, self.small = conv(inputs, outputs), conv(inputs, outputs, 1, bias=False)
        self.scale, self.norm = nn.Parameter(torch.ones(outputs)), FrozenBatchNorm2d(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        kernel = self.large.weight * self.scale.view(-1, 1, 1, 1)
        kernel = kernel + F.pad(self.small.weight, [1, 1, 1, 1]) * scale.reshape(-1, 1, 1, 1)
        return F.conv2d(maps, kernel, self.large.bias + self.norm.bias - self.norm.running_mean * scale, padding=1)


class Functions(nn.Module):
    """Layers that are functions of parameters and of the weights of other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.matrix = nn.Parameter(torch.randn(16, 12, 2, 2)), nn.Parameter(torch.randn(12, 10))
        self.register_buffer("blur", torch.rand(1, 1, 3, 3).repeat(12, 1, 1, 1))
        self.linear, self.value, self.gate = nn.Linear(10, 9), conv(9, 8), conv(9, 8)

    def forward(self, maps: Tensor) -> Tensor:
        maps = F.conv_transpose2d(maps, self.up, stride=2)
        maps = F.conv2d(maps, self.blur, stride=2, padding=1, groups=maps.shape[1])
        tokens = F.linear(maps.permute(0, 2, 3, 1) @ self.matrix, self.linear.weight, self.linear.bias)
        kernel = torch.cat([self.value.weight, self.gate.weight], 0)
        bias = torch.cat([self.value.bias, self.gate.bias])
        value, gate = F.conv2d(tokens.permute(0, 3, 1, 2), kernel, bias).chunk(2, 1)
        return value * gate.sigmoid()


class Offsets(Body):
    """Parameters and buffers for each channel, of several shapes, and one for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.position = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(1, 16, 8, 8))
        self.register_buffer("mean", torch.rand(16))
        self.norm = FrozenBatchNorm2d(16)

    def between(self, maps: Tensor) -> Tensor:
        maps = maps * self.scale.view(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) + self.position
        out: Tensor = self.norm(maps)
        return out


class StoredHalf(nn.Module):
    """The number of channels of each half is an attribute of the module, as in the blocks of YOLO."""

    def __init__(self, channels: int, half: int) -> None:
        super().__init__()
        self.half, self.wide, self.inner = half, conv(channels, 2 * half, 1), conv(half, half)
        self.last, self.weigh = conv(3 * half, channels, 1), nn.Linear(channels, channels)
        self.channels = channels

    def forward(self, maps: Tensor) -> Tensor:
        first, second = self.wide(maps).split((self.half, self.half), 1)
        again, _ = torch.cat([first, second], 1).split(self.half, 1)
        out = self.last(torch.cat([again, second, self.inner(second)], 1))
        return out * self.weigh(out.mean((2, 3))).view(-1, self.channels, 1, 1).sigmoid()


class JoinedPixels(Body):
    """Two layers whose outputs are concatenated along the height."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.last = conv(3, 16), conv(16, 16)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.cat([self.stem(images), self.other(images)], 2)
        out: Tensor = self.head(self.last(maps).mean((2, 3)))
        return out


def two(layer: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    return Body(nn.Sequential(layer(16, 12, *arguments), nn.ReLU(), layer(12, 8, *arguments)), 8)


def up(inputs: int, outputs: int, **options: Any) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, output_padding=1, **options)


def weight_normalised(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer, dim=dim)


def old_weight_norm(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return nn.utils.weight_norm(layer, dim=dim)


TWO = {"stem": (16, 1), "middle.0.conv": (12, 1), "middle.2.conv": (8, 1)}
PRUNABLE: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, int]]]] = {
    "shared weight": (SharedWeight, {"stem": (16, 1)}),
    "plain tensors": (PlainTensors, {"stem": (16, 1)}),
    "gate": (Gated, {"stem": (16, 1), "wide": (12, 1), "out": (12, 1)}),
    "part of a concatenation": (Parts, {"stem": (16, 1), "wide": (24, 1), "mixed": (8, 1)}),
    "channels last": (ChannelsLast, {"stem": (16, 1), "up": (40, 1)}),
    "flatten": (Flattened, {"features.0": (16, 1), "classifier.2": (10, 1)}),
    "group norm": (lambda: Body(nn.GroupNorm(4, 16)), {"stem": (16, 4)}),
    "group norm without weights": (lambda: Body(nn.GroupNorm(4, 16, affine=False)), {"stem": (16, 4)}),
    "batch norm without weights": (lambda: Body(nn.BatchNorm2d(16, affine=False)), {"stem": (16, 1)}),
    "batch norm without statistics": (lambda: Body(nn.BatchNorm2d(16, track_running_stats=False)), {"stem": (16, 1)}),
    "instance norm": (lambda: Body(nn.InstanceNorm2d(16)), {"stem": (16, 1)}),
    "instance norm with weights": (lambda: Body(nn.InstanceNorm2d(16, affine=True)), {"stem": (16, 1)}),
    "depthwise multiplier": (lambda: Body(conv(16, 48, groups=16), 48), {"stem": (16, 1)}),
    "residual sum": (Residual, {"stem": (16, 1), "inner": (24, 1)}),
    "concatenations": (Concatenations, {"stem": (16, 1), "first": (4, 1), "second": (8, 1)}),
    "squeeze-and-excitation": (Excitation, {"stem": (16, 1), "squeeze": (4, 1), "down": (6, 1)}),
    "grouped convolution": (lambda: Body(conv(16, 24, groups=4), 24), {"stem": (16, 4)}),
    "nested modules": (Nested, {"stem": (16, 1), "blocks.0.0.0": (12, 1), "blocks.1.1": (8, 1)}),
    "dropout and stochastic depth": (Noise, {"stem": (16, 1)}),
    "convolution for a head": (ConvolutionHead, {"body.0": (16, 1)}),
    "two heads": (TwoHeads, {"stem": (16, 1), "middle": (16, 1)}),
    "selective kernel": (SelectiveKernel, {"stem": (16, 1), "branches.0": (16, 1), "squeeze": (6, 1)}),
    "split attention": (SplitAttention, {"stem": (16, 1), "wide": (16, 1)}),
    "channel attention": (ChannelAttention, {"stem": (16, 1)}),
    "global context": (GlobalContext, {"stem": (16, 1)}),
    "response norm and functional prelu": (ResponseNorm, {"stem": (16, 1)}),
    "norm by order and dimension": (UnitVectors, {"stem": (16, 1)}),
    "pixel shuffle": (lambda: Body(nn.PixelShuffle(2), 4), {"stem": (16, 4)}),
    "choice by the images' size": (PadsToEven, {"stem": (16, 1), "down": (12, 1), "up": (16, 1)}),
    "noise of the images' shape": (HandMadeDrop, {"stem": (16, 1)}),
    "loop over pieces": (EachPiece, {"stem": (8, 1), "parts.0": (6, 1), "parts.1": (8, 1), "last": (8, 1)}),
    "pixel shuffle and a convolution": (
        lambda: Body(nn.Sequential(nn.PixelShuffle(2), nn.BatchNorm2d(4), conv(4, 6), nn.PixelUnshuffle(2)), 24),
        {"stem": (16, 4), "middle.2": (6, 1)},
    ),
    "transposed convolution": (
        lambda: Body(nn.Sequential(up(16, 12), nn.BatchNorm2d(12), conv(12, 8)), 8),
        {"stem": (16, 1), "middle.0": (12, 1), "middle.2": (8, 1)},
    ),
    "grouped transposed convolution": (lambda: Body(up(16, 24, groups=4), 24), {"stem": (16, 4)}),
    "depthwise transposed convolution": (lambda: Body(up(16, 16, groups=16, bias=False)), {"stem": (16, 1)}),
    "depthwise transposed multiplier": (lambda: Body(up(16, 48, groups=16), 48), {"stem": (16, 1)}),
    "largest and smallest of two": (Extrema, {"stem": (16, 1)}),
    "largest of the channels": (SpatialAttention, {"stem": (16, 1)}),
    "gated linear units": (LinearUnits, {"stem": (16, 1), "wide": (12, 1), "out": (12, 1)}),
    "root mean square norm": (RootMeanSquare, {"stem": (16, 1), "up": (24, 1)}),
    "pooling with indices": (Indices, {"stem": (16, 1)}),
    "weight norm": (lambda: Body(weight_normalised(conv(16, 12)), 12), {"stem": (16, 1), "middle": (12, 1)}),
    "weight norm along the inputs": (
        lambda: Body(weight_normalised(up(16, 12), dim=1), 12),
        {"stem": (16, 1), "middle": (12, 1)},
    ),
    "weight norm of all": (
        lambda: Body(weight_normalised(conv(16, 12), None), 12),
        {"stem": (16, 1), "middle": (12, 1)},
    ),
    "weight norm of a grouped convolution": (
        lambda: Body(weight_normalised(conv(16, 32, groups=8)), 32),
        {"stem": (16, 2)},
    ),
    "weight norm by a hook": (lambda: Body(old_weight_norm(conv(16, 12)), 12), {"stem": (16, 1), "middle": (12, 1)}),
    "weight norm by a hook of all": (
        lambda: Body(old_weight_norm(conv(16, 12), None), 12),
        {"stem": (16, 1), "middle": (12, 1)},
    ),
    "standardised weights": (lambda: two(Standardised, "moments"), TWO),
    "standardised weights by views": (lambda: two(Standardised, "views"), TWO),
    "weights standardised by a batch norm": (lambda: two(NormedWeight, ""), TWO),
    "kernels added up": (lambda: two(Fused), {"stem": (16, 1), "middle.0.large": (12, 1), "middle.2.large": (8, 1)}),
    "layers as functions": (
        lambda: Body(Functions(), 8),
        {
            "stem": (16, 1),
            "middle.up": (12, 1),
            "middle.matrix": (10, 1),
            "middle.linear": (9, 1),
            "middle.value": (8, 1),
        },
    ),
    "tensors for each channel": (Offsets, {"stem": (16, 1)}),
    "sizes as attributes": (
        lambda: Body(StoredHalf(16, 8)),
        {"stem": (16, 1), "middle.wide": (8, 1), "middle.inner": (8, 1), "middle.last": (16, 1)},
    ),
    "concatenation of pixels": (JoinedPixels, {"stem": (16, 1), "last": (16, 1)}),
    "upsampling": (lambda: Body(nn.Upsample(scale_factor=2)), {"stem": (16, 1)}),
    "padding": (lambda: Body(nn.Sequential(nn.ReflectionPad2d(1), nn.MaxPool2d(2))), {"stem": (16, 1)}),
}


@pytest.mark.parametrize("case", PRUNABLE)
@pytest.mark.filterwarnings("error")
def test_groups_that_can_be_slimmed(case: str) -> None:
    make, groups = PRUNABLE[case]
    network = make()
    graph = trace(network, EXAMPLE)
    assert {name: (group.size, group.unit) for name, group in graph.groups.items()} == groups
    check_resizing(network, graph)


def test_the_feature_pyramid_of_torchvision_can_be_slimmed() -> None:
    """Its backbone has frozen batch norms, whose buffers are reshaped to (1, C, 1, 1)."""
    network = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    graph = trace(network, torch.zeros(1, 3, 32, 32))
    assert len(graph.groups) == 13  # those of a ResNet-18, and the lateral convolutions
    assert slimmable_share(graph, graph.default) == 1
    assert "body.layer1.0.bn1.running_mean" in graph.tensors


@pytest.mark.parametrize(
    "case", ["weight norm", "layers as functions", "standardised weights", "transposed convolution"]
)
def test_weights_and_sizes_of_a_cut_network_agree(case: str) -> None:
    """Its costs are those of a run, and a trace of it finds the same groups."""
    network = PRUNABLE[case][0]()
    graph = trace(network, EXAMPLE)
    channels = random_channels(graph, 4, 0.3, 1.2)
    cut = resize(network, graph, channels).eval()
    with FlopCounterMode(display=False) as counter:
        cut(EXAMPLE)
    assert graph.macs(channels) == counter.get_total_flops() // 2
    assert graph.params(channels) == sum(parameter.numel() for parameter in cut.parameters())
    assert trace(cut, EXAMPLE).default == channels


class FusesBatchNorm(Body):
    """Computes with the running statistics of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = conv(16, 16), nn.BatchNorm2d(16)

    def between(self, maps: Tensor) -> Tensor:
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        return F.conv2d(maps, self.inner.weight * scale.view(-1, 1, 1, 1), padding=1)


def test_code_that_computes_with_running_statistics_is_refused() -> None:
    with pytest.raises(UserError) as error:
        trace(FusesBatchNorm(), EXAMPLE)
    message = re.sub(r"py:\d+", "py:1", str(error.value))
    assert message == (
        "forward computes with running_var of the batch norm 'norm' (test_tracing.py:1), but a supernet has no running "
        "statistics; call the batch norm instead, and fuse the two after training"
    )


def test_a_kernel_that_slides_over_channels_mixes_them() -> None:
    network = ChannelAttention().eval()
    graph = trace(network, EXAMPLE)
    modules = dict(network.named_modules())
    nodes = {node.name: node for node in symbolic_graph(network, frozenset()).nodes}
    assert is_local(nodes["stem"], "stem", graph, modules)
    assert not is_local(nodes["slide"], "stem", graph, modules)


class HardView(Body):
    def between(self, maps: Tensor) -> Tensor:
        return maps.view(-1, 16, 4, 16)


class HardMaps(Body):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16 * 4)

    def between(self, maps: Tensor) -> Tensor:
        return self.middle(self.fc(maps.mean((2, 3))).view(-1, 16, 2, 2)).relu()


class HardSlice(Body):
    def __init__(self) -> None:
        super().__init__(channels=8)
        self.part = conv(10, 8)

    def between(self, maps: Tensor) -> Tensor:
        out: Tensor = self.part(maps[:, 3:13])
        return out


class Einsum(Body):
    """A layer written as a sum of products."""

    def __init__(self) -> None:
        super().__init__(channels=12)
        self.weight = nn.Parameter(torch.randn(12, 16))

    def between(self, maps: Tensor) -> Tensor:
        return torch.einsum("nchw,dc->ndhw", maps, self.weight)


class MergedKernels(Body):
    """Two convolutions computed as one, whose kernel is a convolution of their kernels."""

    def __init__(self) -> None:
        super().__init__(channels=12)
        self.first, self.second = conv(16, 12, 1, bias=False), conv(12, 12, bias=False)

    def between(self, maps: Tensor) -> Tensor:
        kernel = F.conv2d(self.second.weight, self.first.weight.permute(1, 0, 2, 3))
        return F.conv2d(maps, kernel, padding=1)


class Attention(Body):
    def __init__(self) -> None:
        super().__init__(channels=8)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = conv(16, 8)

    def between(self, maps: Tensor) -> Tensor:
        tokens = maps.flatten(2).transpose(1, 2)
        mixed = self.attention(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(2, (8, 8))
        out: Tensor = self.out(mixed)
        return out


class Gather(Body):
    """Channels selected by the indices in a buffer."""

    def __init__(self) -> None:
        super().__init__(channels=8)
        self.register_buffer("picked", torch.arange(15, -1, -2))

    def between(self, maps: Tensor) -> Tensor:
        return maps[:, self.picked]


class Reinterprets(Body):
    def between(self, maps: Tensor) -> Tensor:
        return maps.view(torch.int32).view(torch.float32)


class PositionMixer(Body):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def between(self, maps: Tensor) -> Tensor:
        out: Tensor = self.mix(maps)
        return out


class ChoosesByChannels(Body):
    """A projection that runs only if the numbers of channels differ."""

    def __init__(self) -> None:
        super().__init__(channels=12)
        self.wide, self.skip = conv(16, 12), conv(16, 12, 1)
        self.inner = nn.Sequential(conv(12, 10), conv(10, 12))

    def between(self, maps: Tensor) -> Tensor:
        skip, maps = maps, self.wide(maps)
        if skip.shape[1] != maps.shape[1]:
            skip = self.skip(skip)
        out: Tensor = self.inner(maps + skip)
        return out


class LoopsByChannels(Body):
    """A layer that runs once for every eight channels."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.inner = conv(16, 16), nn.Sequential(conv(16, 10), conv(10, 16))

    def between(self, maps: Tensor) -> Tensor:
        for _ in range(maps.size(1) // 8):
            maps = self.again(maps)
        out: Tensor = self.inner(maps)
        return out


class MakesChannels(Body):
    """Creates a tensor with the same number of channels."""

    def between(self, maps: Tensor) -> Tensor:
        return maps + torch.linspace(0, 1, maps.shape[1], device=maps.device).view(-1, 1, 1)


class HiddenConstants(Body):
    def between(self, maps: Tensor) -> Tensor:
        return F.batch_norm(maps, maps.new_zeros(16), maps.new_ones(16))


NOT_PRUNABLE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "size in a view": (HardView, "stem", "its size is written in the network's code: "),
    "size in a view of features": (HardMaps, "fc", "its size is written in the network's code: "),
    "size in a slice": (HardSlice, "stem", "its channels are interleaved or split"),
    "halves at a computed position": (Halves, "stem", "the network does not run at another size: Attempting"),
    "choice by channels": (ChoosesByChannels, "stem", "the code at test_tracing.py:"),
    "choice by other channels": (ChoosesByChannels, "wide", "the code at test_tracing.py:"),
    "loop by channels": (LoopsByChannels, "stem", "its code runs other operations at another size"),
    "channels created in forward": (MakesChannels, "stem", "`add` at test_tracing.py:"),
    "batch norm with constants": (
        HiddenConstants,
        "stem",
        "the network does not run at another size: batch norm for 16 channels got 8 channels (test_tracing.py:",
    ),
    "convolution of two kernels": (MergedKernels, "stem", "`conv2d` at test_tracing.py:"),
    "attention": (Attention, "stem", "MultiheadAttention `attention` at test_tracing.py:"),
    "attention itself": (Attention, "attention", "is attention, which keeps its heads and its width"),
    "gather": (Gather, "stem", "`getitem` at test_tracing.py:"),
    "view as another dtype": (Reinterprets, "stem", "has no slimming rule: it reinterprets the elements"),
    "local response norm": (lambda: Body(nn.LocalResponseNorm(5)), "stem", "LocalResponseNorm `middle`"),
    "channel shuffle": (lambda: Body(nn.ChannelShuffle(4)), "stem", "its channels are interleaved or split"),
    "layer norm over the image": (lambda: Body(nn.LayerNorm([16, 8, 8])), "stem", "LayerNorm `middle` at"),
    "spectral norm": (
        lambda: Body(nn.utils.parametrizations.spectral_norm(conv(16, 16))),
        "middle",
        "its spectral norm is estimated for the whole weight",
    ),
    "spectral norm by a hook": (
        lambda: Body(nn.utils.spectral_norm(conv(16, 16))),
        "stem",
        "Conv2d `middle` at test_tracing.py:",
    ),
    "orthogonal weight": (
        lambda: Body(nn.utils.parametrizations.orthogonal(nn.Conv2d(16, 16, 1))),
        "middle",
        "its weight is computed at each call",
    ),
    "one channel": (lambda: Body(nn.Sequential(conv(16, 1), conv(1, 16))), "middle.0", "it has one channel"),
    "one group": (lambda: Body(nn.GroupNorm(1, 16)), "head", "it is the network's output"),
    "positions": (PositionMixer, "mix", "it mixes positions, not channels"),
}


@pytest.mark.parametrize("make", [tv.VisionTransformer, tv.SwinTransformer])
def test_attention_keeps_its_heads_and_its_width(make: Any) -> None:
    """In transformers, only the hidden layers of MLPs are slimmed, and the reason is given for all others."""
    if make is tv.VisionTransformer:
        sizes: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 16}
        network = make(**sizes, mlp_dim=24, num_classes=4)
    else:
        network = make([2, 2], 16, [1, 1], [2, 2], [2, 2], num_classes=4)
    graph = trace(network, EXAMPLE)
    assert [name.endswith("mlp.0") for name in graph.groups] == [True, True]
    reasons = set(graph.not_prunable.values()) - {"it is the network's output"}
    assert reasons
    assert all("is attention, which keeps its heads and its width" in reason for reason in reasons)
    check_resizing(network, graph)


@pytest.mark.parametrize("case", NOT_PRUNABLE)
def test_layers_that_are_not_prunable_are_listed_with_the_reason(case: str) -> None:
    make, layer, reason = NOT_PRUNABLE[case]
    network = make()
    graph = trace(network, EXAMPLE)
    assert reason in graph.not_prunable[layer]
    assert layer not in graph.groups
    check_resizing(network, graph, widest=1.0)


@pytest.mark.parametrize("strict", [True, False])
def test_an_unforeseen_error_in_a_rule_is_raised_only_on_request(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(carrier: Carrier, *_: Any) -> None:
        raise ZeroDivisionError("in the rule")

    monkeypatch.setattr(propagate, "operation_rule", lambda node: faulty)
    token = propagate.STRICT.set(strict)
    try:
        if strict:
            with pytest.raises(UserError, match="in the rule"):
                trace(Body(), EXAMPLE)
        else:
            assert "`mean` at test_tracing.py:" in trace(Body(), EXAMPLE).not_prunable["stem"]
    finally:
        propagate.STRICT.reset(token)


class CutOff(Body):
    """Reads the first 16 channels: all of them if there are fewer, but not if there are more."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Sequential(conv(16, 12), conv(12, 16))

    def between(self, maps: Tensor) -> Tensor:
        out: Tensor = self.again(maps[:, :16])
        return out


def test_groups_that_can_be_slimmed_but_not_widened() -> None:
    network = CutOff()
    graph = trace(network, EXAMPLE)
    assert graph.groups.keys() == {"stem", "again.0", "again.1"}
    assert graph.not_widenable.keys() == {"stem"}
    check_resizing(network, graph, widest=1.0)
    assert resize(network, graph, graph.default | {"again.0": 20})(EXAMPLE).shape == (1, 4)
    with pytest.raises(UserError, match=r"group stem cannot have 24 channels, but at most 16: .*; keep"):
        resize(network, graph, graph.scaled(1.5))


def test_channels_that_a_leaf_module_reads_are_not_prunable() -> None:
    network = Body(nn.Sequential(conv(16, 16), nn.ReLU(), conv(16, 16)))
    assert trace(network, EXAMPLE).groups.keys() == {"stem", "middle.0", "middle.2"}
    graph = trace(network, EXAMPLE, leaves=["middle"])
    assert not graph.groups
    assert graph.not_prunable["middle"].startswith("Sequential `middle` at test_tracing.py:")
    assert graph.macs() == trace(network, EXAMPLE).macs()


def test_slimmable_share_and_layers_that_are_not_prunable() -> None:
    up = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(16, 12, 2, 2))
    graph = trace(Body(nn.Sequential(up, conv(12, 8)), 8), EXAMPLE)
    stem, up, last, head = 64 * 27 * 16, 64 * 16 * 4 * 12, 256 * 9 * 12 * 8, 8 * 4
    assert slimmable_share(graph, graph.default) == (last + head) / (stem + up + last + head)
    assert layers_not_prunable(graph).keys() == {"stem", "middle.0"}  # without the head, which produces the classes
    assert layers_not_prunable(trace(Einsum(), EXAMPLE))["einsum"] == "it has no slimming rule"
    graph = trace(Residual(), EXAMPLE)
    assert slimmable_share(graph, graph.default) == 1
    assert not layers_not_prunable(trace(Residual(), EXAMPLE))


# Errors


class Chooses(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        if maps.sum() > 0:  # this line
            return maps
        return -maps


class Assigns(Body):
    def between(self, maps: Tensor) -> Tensor:
        maps[:, :, 0] = 0
        return maps


class Counts(Body):
    def between(self, maps: Tensor) -> Tensor:
        return maps * float(maps.mean())


class Loops(Body):
    def between(self, maps: Tensor) -> Tensor:
        for image in maps:
            maps = maps + image
        return maps


@pytest.mark.parametrize(
    ("make", "module", "line", "remedy"),
    [
        (
            lambda: Body(nn.Sequential(Chooses())),
            "'middle.0'",
            "if maps.sum()",
            "name the module in model.leaves to keep its size, or remove what depends on data from its forward",
        ),
        (Loops, "'Loops'", "for image in maps", "move this code to a module inside the network and name that in"),
        (Assigns, "'Assigns'", "maps[:, :, 0] = 0", "use torch.where or torch.cat instead, or move this code to"),
        (Counts, "'Counts'", "return maps * float(maps", "move this code to a module inside"),
    ],
)
def test_the_error_for_code_that_cannot_be_traced_names_module_and_line_and_the_remedy(
    make: Callable[[], nn.Module], module: str, line: str, remedy: str
) -> None:
    number = 1 + next(n for n, text in enumerate(Path(__file__).read_text().splitlines()) if line in text)
    network = make()
    with pytest.raises(UserError) as error:
        trace(network, EXAMPLE)
    message = str(error.value)
    assert f"cannot trace module {module} of {type(network).__name__} (test_tracing.py:{number})" in message
    assert remedy in message
    assert "Shaped" not in message
    assert "\n" not in message


def test_operations_that_cannot_run_without_data_are_named_with_their_line() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = Body(quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}))
    with pytest.raises(
        UserError, match=r"Body does not run without real data, at Linear `middle.0` at .*:\d+: .*fake"
    ) as e:
        trace(network, EXAMPLE)
    assert str(e.value).endswith(
        "name the module that contains this operation in model.leaves, so that it keeps its size"
    )
    assert "`middle.0`" in trace(network, EXAMPLE, leaves=["middle.0"]).not_prunable["stem"]


def test_a_network_that_stores_an_output_of_a_run() -> None:
    class Stores(Body):
        def __init__(self) -> None:
            super().__init__()
            self.outputs: dict[str, Tensor] = {}

        def forward(self, images: Tensor) -> Any:
            self.outputs["stem"] = self.stem(images)
            return self.head(self.outputs["stem"].mean((2, 3)))

    network = Stores()
    network(EXAMPLE)
    with pytest.raises(
        UserError, match=r"Stores cannot be copied, because 'outputs' holds a tensor that a run computed"
    ):
        trace(network, EXAMPLE)
    network.outputs.clear()
    assert list(trace(network, EXAMPLE).groups) == ["stem"]


def test_a_leaf_module_may_depend_on_data() -> None:
    class Wide(Chooses):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(16, 16)

        def forward(self, maps: Tensor) -> Tensor:
            return super().forward(self.conv(maps))

    network = Body(nn.Sequential(Wide(), conv(16, 12)), 12)
    graph = trace(network, EXAMPLE, leaves=["middle.0"])
    assert graph.groups.keys() == {"middle.1"}
    assert "Wide `middle.0` at test_tracing.py:" in graph.not_prunable["stem"]
    assert graph.macs() == 64 * 9 * (3 * 16 + 16 * 16 + 16 * 12) + 12 * 4
    check_resizing(network, graph)


def test_an_input_that_does_not_fit_the_network() -> None:
    with pytest.raises(UserError, match=r"Body does not run on an input of shape \(1, 1, 8, 8\): .*; give the input"):
        trace(Body(), torch.zeros(1, 1, 8, 8))


def test_a_leaf_that_is_not_a_module() -> None:
    with pytest.raises(UserError, match=r"model.leaves names 'midle', which is not a module of Body"):
        trace(Body(), EXAMPLE, leaves=["midle"])


def test_networks_on_meta_trace_like_real_ones() -> None:
    network = Gated()
    assert trace(on_meta(network), EXAMPLE) == trace(network, EXAMPLE)


# A trace is compared with a run


class ChecksTheType(Body):
    def between(self, maps: Tensor) -> Tensor:
        if isinstance(maps, Tensor):
            maps = maps + self.middle(maps)
        return maps


class ChecksTheTypeOfASize(Body):
    def between(self, maps: Tensor) -> Tensor:
        height = maps.shape[2]
        if isinstance(height, Tensor):
            maps = self.middle(maps)
        return F.interpolate(maps, size=(height, height))


class ChecksTheTypeOfAPiece(Body):
    def between(self, maps: Tensor) -> Tensor:
        pieces = maps.chunk(2, 1)
        if isinstance(pieces, tuple) and len(maps.shape) == 4:
            maps = torch.cat([piece for piece in pieces if isinstance(piece, Tensor)], 1)
        return self.middle(maps)  # type: ignore[no-any-return]


class HasADefault(Body):
    def forward(self, images: Tensor, target: Tensor | None = None, double: bool = True) -> Tensor:
        maps = self.stem(images)
        if target is None and double:
            maps = self.middle(self.middle(maps))
        return self.head(maps.mean((2, 3)))  # type: ignore[no-any-return]


class ChecksTheExactType(Body):
    def between(self, maps: Tensor) -> Tensor:
        if type(maps) is Tensor:
            maps = self.middle(maps)
        return maps


@pytest.mark.parametrize("network", [ChecksTheType, ChecksTheTypeOfASize, ChecksTheTypeOfAPiece, HasADefault])
def test_code_that_checks_types_and_defaults_is_traced_as_it_runs(network: Callable[[nn.Module], nn.Module]) -> None:
    built = network(conv(16, 16)).eval()
    graph = trace(built, EXAMPLE)
    with FlopCounterMode(display=False) as counter:
        built(EXAMPLE)
    assert graph.macs() == counter.get_total_flops() // 2
    check_resizing(built, graph)


class ChoosesWithTorch(Body):
    def between(self, maps: Tensor) -> Tensor:
        return self.middle(maps) if (torch.rand(1) * 2).item() < 1 else maps  # type: ignore[no-any-return]


class ChoosesWithPython(Body):
    def between(self, maps: Tensor) -> Tensor:
        return self.middle(maps) if random.random() < 0.5 else maps  # type: ignore[no-any-return]


class SkipsInTraining(Body):
    def between(self, maps: Tensor) -> Tensor:
        if self.training and (torch.rand(1).item() < 0.5 or random.random() < 0.5):
            return maps
        return self.middle(maps)  # type: ignore[no-any-return]


class AddsNoise(Body):
    def between(self, maps: Tensor) -> Tensor:
        return self.middle(maps) + 0.1 * torch.rand(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (ChoosesWithTorch, "a random number decides what forward does"),
        (ChoosesWithPython, "forward draws random numbers with Python's random module"),
    ],
)
def test_a_random_choice_is_refused_whatever_the_generator(
    network: Callable[[nn.Module], nn.Module], reason: str
) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        random.seed(seed)
        with pytest.raises(UserError, match=re.escape(reason)):
            trace(network(conv(16, 16)), EXAMPLE)


@pytest.mark.parametrize("network", [SkipsInTraining, AddsNoise])
def test_random_numbers_that_decide_nothing_in_evaluation_mode_change_nothing(
    network: Callable[[nn.Module], nn.Module],
) -> None:
    macs = {}
    for seed in range(12):
        torch.manual_seed(seed)
        random.seed(seed)
        graph = trace(network(conv(16, 16)), EXAMPLE)
        macs[graph.macs()] = list(graph.groups)
    assert macs == {trace(Body(conv(16, 16)), EXAMPLE).macs(): ["stem", "middle"]}


class AddsToAView(Body):
    def between(self, maps: Tensor) -> Tensor:
        first, second = maps.chunk(2, 1)
        first += second  # maps changes, too
        return maps * 2


class AddsToAPiece(Body):
    def between(self, maps: Tensor) -> Tensor:
        first, second = maps.chunk(2, 1)
        first += second
        return torch.cat([first, second], 1)


def test_a_trace_that_differs_from_a_run_is_refused() -> None:
    with pytest.raises(UserError) as error:
        trace(ChecksTheExactType(conv(16, 16)), EXAMPLE)
    line = inspect.getsourcelines(ChecksTheExactType)[1] + 3
    assert str(error.value) == (
        "the trace of ChecksTheExactType differs from a run: as operation 1, the run executes aten::convolution of "
        f"[2, 16, 8, 8], [16, 16, 3, 3], [16] at test_tracing.py:{line}, but the trace has aten::mean of "
        "[2, 16, 8, 8]; remove that branch from its forward, or name the module that contains it in model.leaves to "
        "keep its size"
    )


def test_an_addition_in_place_is_traced_unless_it_changes_another_tensor() -> None:
    """torch.fx traces ``x += y`` as ``x + y``."""
    assert list(trace(AddsToAPiece(conv(16, 16)), EXAMPLE).groups) == ["stem"]
    with pytest.raises(UserError, match=r"aten::mul of \[2, 16, 8, 8\] at test_tracing.py:\d+, reads other values"):
        trace(AddsToAView(conv(16, 16)), EXAMPLE)


class AddsCoordinates(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(16 + 2, 16, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[2:]
        rows = torch.linspace(-1, 1, height, device=input.device).view(1, 1, -1, 1).expand(len(input), 1, height, width)
        columns = torch.linspace(-1, 1, width, device=input.device).view(1, 1, 1, -1).expand(rows.shape)
        return super().forward(torch.cat([input, rows, columns], 1))


class HasALowRankUpdate(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(16, 16, 3, padding=1)
        self.down, self.up = nn.Conv2d(16, 2, 1, bias=False), nn.Conv2d(2, 16, 1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.up(self.down(input))  # type: ignore[no-any-return]


class ConvolvesTwice(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(16, 16, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(super().forward(input))


class HasWeightsOfTwoFactors(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 16)
        self.left, self.right = nn.Parameter(torch.randn(16, 2)), nn.Parameter(torch.randn(2, 16))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.movedim(1, -1), self.weight + self.left @ self.right, self.bias).movedim(-1, 1)


def _observed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qat.Conv2d(16, 16, 3, padding=1, qconfig=get_default_qat_qconfig("fbgemm"))


@pytest.mark.parametrize(
    "layer", [AddsCoordinates, HasALowRankUpdate, ConvolvesTwice, HasWeightsOfTwoFactors, _observed]
)
def test_a_subclass_that_computes_more_than_its_layer_is_traced_inside(layer: Callable[[], nn.Module]) -> None:
    network = Body(layer()).eval()
    graph = trace(network, EXAMPLE)
    channels = random_channels(graph, 0, 0.3, 1.0)
    for configuration in (graph.default, channels):
        resized = resize(network, graph, configuration)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            resized(torch.zeros(EXAMPLE.shape))
        products_of_weights = 16 * 2 * 16 if isinstance(network.middle, HasWeightsOfTwoFactors) else 0
        assert graph.macs(configuration) == counter.get_total_flops() // 2 - products_of_weights
    supernet = Supernet(network, graph).eval()
    supernet.select(channels)
    images = torch.randn(4, *EXAMPLE.shape[1:])
    assert torch.equal(supernet(images), batch_statistics(supernet.extract(channels))(images))


def test_a_subclass_that_costs_what_its_layer_does_is_slimmed() -> None:
    class Standardised(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(16, 16, 3, padding=1)
            self.gain = nn.Parameter(torch.ones(16, 1, 1, 1))

        def forward(self, input: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(input, weight * self.gain, self.bias)

    graph = trace(Body(Standardised()), EXAMPLE)
    assert list(graph.groups) == ["stem", "middle"]
    assert graph.macs({"stem": 5, "middle": 3}) == 64 * (3 * 9 * 5 + 5 * 9 * 3) + 3 * 4


class Deforms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(16, 18, 3, padding=1)
        self.deformable = DeformConv2d(16, 16, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.deformable(maps, self.offsets(maps))  # type: ignore[no-any-return]


class MultipliesByAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, maps: Tensor) -> Tensor:
        grouped = maps.reshape(len(maps), 2, 8, -1)
        return torch.einsum("bgcn,gcd->bgdn", grouped, self.weight).reshape(maps.shape)


class Recurs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(16, 16, batch_first=True)

    def forward(self, maps: Tensor) -> Tensor:
        return self.recurrent(maps.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(maps.shape)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (Deforms, 64 * 9 * 16 * (18 + 16)),
        (MultipliesByAParameter, 64 * 2 * 8 * 8),
        (Recurs, 64 * 4 * 16 * (16 + 16)),
    ],
)
@pytest.mark.parametrize("leaf", [False, True])
def test_products_with_parameters_are_counted(layer: Callable[[], nn.Module], macs: int, leaf: bool) -> None:
    body = Body(nn.Identity())
    expected = trace(body, EXAMPLE).macs() + macs
    assert trace(Body(layer()), EXAMPLE, leaves=["middle"] if leaf else []).macs() == expected


def test_products_of_unknown_cost_are_named() -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.randn(16, 16))

        def forward(self, maps: Tensor) -> Tensor:
            vectors = maps.flatten(2).transpose(1, 2)
            return torch.cdist(vectors, self.centres, p=1.0).transpose(1, 2).reshape(maps.shape)

    graph = trace(Body(Distances()), EXAMPLE)
    assert list(graph.not_counted) == ["cdist"]
    line = inspect.getsourcelines(Distances.forward)[1] + 2
    assert graph.not_counted["cdist"] == f"`cdist` at test_tracing.py:{line} runs aten::_cdist_forward"


def test_outputs_of_another_structure_are_refused() -> None:
    class Returns(Body):
        def forward(self, images: Tensor) -> Any:
            maps = self.stem(images)
            return {"maps": maps} if type(maps) is Tensor else {"other": maps}

    with pytest.raises(UserError, match="the output of forward has another structure"):
        trace(Returns(conv(16, 16)), EXAMPLE)


class _TwoAttributes(nn.Module):
    """Two attributes have the same value, and only one of them is a size of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.factor = 4, 4
        self.inner = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.inner(x).split(self.width, 1)
        out: Tensor = self.head(first * self.factor + second)
        return out


def test_sizes_in_attributes_follow_the_channels_and_other_attributes_do_not() -> None:
    network = _TwoAttributes()
    graph = trace(network, torch.empty(1, 3, 8, 8))
    assert {name: group.size for name, group in graph.groups.items()} == {"inner": 4}
    cut = resize(network, graph, {"inner": 3})
    assert (cut.width, cut.factor) == (3, 4)
    assert (type(network.width), type(network.factor)) == (int, int)
    assert cut(torch.empty(1, 3, 8, 8)).shape == (1, 2, 8, 8)


class _CopiedSizes(nn.Module):
    """The code copies the size of a piece, by each means, before it uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.inner, self.head = [4, 4], nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [copy.copy(size) for size in pickle.loads(pickle.dumps(copy.deepcopy(self.sizes)))]
        first, second = self.inner(x).split(sizes, 1)
        out: Tensor = self.head(first + second)
        return out


def test_copies_of_sizes_in_attributes_follow_the_channels() -> None:
    network = _CopiedSizes()
    graph = trace(network, torch.empty(1, 3, 8, 8))
    assert {name: group.size for name, group in graph.groups.items()} == {"inner": 4}
    assert resize(network, graph, {"inner": 3}).sizes == [3, 3]


def test_a_grouped_convolution_is_slimmed_within_its_groups_if_whole_groups_cannot_be_removed() -> None:
    graph = specimen("split_attention").graph
    assert (graph.groups["stem.0"].size, graph.groups["block.conv.0"].size) == (8, 12)  # of 16 and 24, in two groups
    cut = specimen("split_attention").real({"stem.0": 5, "block.conv.0": 7, "block.fc1": 6}).block.conv[0]
    assert (cut.in_channels, cut.out_channels, cut.groups, cut.weight.shape) == (10, 14, 2, (14, 5, 3, 3))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class CallsAFunctionOfAutograd(Body):
    def between(self, maps: Tensor) -> Tensor:
        return self.middle(Swish.apply(maps))  # type: ignore[no-any-return]


class Checkpoints(Body):
    def between(self, maps: Tensor) -> Tensor:
        return checkpoint(self.middle, maps, use_reentrant=False)  # type: ignore[no-any-return]


class KeepsAFeature(Body):
    def between(self, maps: Tensor) -> Tensor:
        self.feature = maps
        return self.middle(self.feature)  # type: ignore[no-any-return]


class CountsAndAverages(Body):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__(middle)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(()))

    def between(self, maps: Tensor) -> Tensor:
        self.count += 1
        self.average = 0.9 * self.average + 0.1 * maps.mean()
        return self.middle(maps)  # type: ignore[no-any-return]


class UnpacksATensor(Body):
    def between(self, maps: Tensor) -> Tensor:
        first, second = maps.reshape(maps.shape[0], 2, 8, 8, 8).transpose(0, 1)
        return self.middle(torch.cat([first, second], 1))  # type: ignore[no-any-return]


class ComputesItsBias(Body):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__(middle)
        parametrize.register_parametrization(self.stem, "bias", nn.Tanh())


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (CallsAFunctionOfAutograd, ["stem", "middle"]),
        (Checkpoints, ["stem", "middle"]),
        (KeepsAFeature, ["stem", "middle"]),
        (CountsAndAverages, ["stem", "middle"]),
        (UnpacksATensor, ["middle"]),
        (ComputesItsBias, ["stem", "middle"]),
    ],
)
def test_code_that_torch_runs_in_c_or_that_assigns_is_traced(
    make: Callable[[nn.Module], nn.Module], groups: list[str]
) -> None:
    network = make(conv(16, 16))
    graph = trace(network, EXAMPLE)
    assert list(graph.groups) == groups
    assert all(type(buffer) is Tensor for buffer in network.buffers())
    check_resizing(network, graph)


class AveragesItsChannels(Body):
    """A running mean of each channel, which training assigns to its buffer or changes in place."""

    def __init__(self, middle: nn.Module, in_place: bool) -> None:
        super().__init__(middle)
        self.in_place = in_place
        self.register_buffer("average", torch.zeros(16))

    def between(self, maps: Tensor) -> Tensor:
        if self.training:
            means = maps.detach().mean((0, 2, 3))
            if self.in_place:
                self.average.mul_(0.9).add_(0.1 * means)
            else:
                self.average = 0.9 * self.average + 0.1 * means
        return self.middle(maps - self.average[:, None, None])  # type: ignore[no-any-return]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_buffer_of_channels_that_forward_assigns_to_keeps_its_size(in_place: bool) -> None:
    network = AveragesItsChannels(conv(16, 16), in_place).train()
    graph = trace(network, EXAMPLE)
    assert list(graph.groups) == (["stem", "middle"] if in_place else ["middle"])
    reason = "forward assigns another tensor to the buffer average; change it in place instead"
    assert (graph.not_prunable.get("stem") == reason) is not in_place
    supernet = Supernet(network, graph).train()
    for size in (5, 9):
        channels = dict.fromkeys(graph.groups, size)
        supernet.select(channels)
        supernet(torch.rand(2, *EXAMPLE.shape[1:]))
        assert current_channels(supernet.extract(channels), graph) == channels


def test_a_scripted_function_is_one_operation() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        double = torch.jit.script(_double)

    class CallsAScript(Body):
        def between(self, maps: Tensor) -> Tensor:
            return self.middle(double(maps))  # type: ignore[no-any-return]

    graph = trace(CallsAScript(conv(16, 16)), EXAMPLE)
    assert list(graph.groups) == ["middle"]
    assert "`_double`" in graph.not_prunable["stem"]


def _double(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_dtypes(dtype: torch.dtype) -> None:
    network = Body(conv(16, 16)).to(dtype)
    assert trace(network, EXAMPLE.to(dtype)).macs() == trace(Body(conv(16, 16)), EXAMPLE).macs()


def test_lazy_layers_have_to_run_first() -> None:
    network = Body(nn.LazyConv2d(16, 3, padding=1))
    with pytest.raises(UserError, match=r"middle.weight of Body has no shape yet; run the network on one batch first"):
        trace(network, EXAMPLE)
    network(EXAMPLE)
    assert list(trace(network, EXAMPLE).groups) == ["stem", "middle"]


# Rules for patterns that other tools freeze or break


class Blurs(Body):
    """A fixed kernel for each channel, whose number comes from the input or from an attribute."""

    def __init__(self, by_attribute: bool) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
        self.after, self.channels, self.by_attribute = conv(16, 16), 16, by_attribute

    def between(self, maps: Tensor) -> Tensor:
        if self.by_attribute:
            kernel, groups = self.kernel.repeat(self.channels, 1, 1, 1), self.channels
        else:
            kernel, groups = self.kernel.expand(maps.shape[1], -1, -1, -1), maps.shape[1]
        return self.after(F.conv2d(maps, kernel, groups=groups))  # type: ignore[no-any-return]


class ReadsTheGroups(Body):
    def __init__(self) -> None:
        super().__init__()
        self.deep, self.after = conv(16, 16, groups=16), conv(16, 16)

    def between(self, maps: Tensor) -> Tensor:
        deep = self.deep
        out: Tensor = self.after(F.conv2d(maps, deep.weight, deep.bias, 1, 1, 1, deep.groups))
        return out.flatten(2).view(out.shape[0], -1, *maps.shape[2:])


class Masks(Body):
    def __init__(self) -> None:
        super().__init__(conv(16, 16))
        self.register_buffer("mask", torch.arange(64).view(8, 8) % 3 == 0)
        self.register_buffer("rows", torch.tensor([5, 1, 3]))
        self.register_buffer("grid", torch.linspace(-1, 1, 8, dtype=torch.float64))

    def between(self, maps: Tensor) -> Tensor:
        maps = self.middle(maps.masked_fill(~self.mask, 0.5) * (maps > 0))
        return (maps + self.grid.to(maps)).index_select(2, self.rows)


class PadsChannels(Body):
    """A shortcut without weights (option A of He et al., 2016)."""

    def __init__(self) -> None:
        super().__init__(channels=24)
        self.wide, self.again = conv(16, 24, stride=2), conv(24, 24)

    def between(self, maps: Tensor) -> Tensor:
        maps = self.wide(maps) + F.pad(maps[:, :, ::2, ::2], (0, 0, 0, 0, 3, 5))
        return self.again(maps) + maps  # type: ignore[no-any-return]


class Fuses(Body):
    """A weighted sum of stacked levels with normalised weights (BiFPN, Tan et al., 2020)."""

    def __init__(self) -> None:
        super().__init__(channels=16)
        self.levels = nn.ModuleList([conv(16, 12), conv(16, 12, 1)])
        self.weights, self.out = nn.Parameter(torch.tensor([0.5, 2.0])), conv(12, 16)

    def between(self, maps: Tensor) -> Tensor:
        weights = self.weights.relu()
        weights = weights / (weights.sum() + 1e-4)
        levels = torch.stack([level(maps) for level in self.levels], -1)
        return self.out(levels.mul(weights).sum(-1))  # type: ignore[no-any-return]


class Gates(Body):
    """A mixture of experts with a gate for each of them, and a sum with one weight for each."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = nn.ModuleList([conv(16, 12), conv(16, 12, 1)]), nn.Linear(16, 2)
        self.weights, self.out = nn.Parameter(torch.tensor([0.5, 2.0])), conv(12, 16)

    def between(self, maps: Tensor) -> Tensor:
        gates = self.gate(maps.mean((2, 3))).softmax(-1)
        mixed = sum(gates[:, i].view(-1, 1, 1, 1) * expert(maps) for i, expert in enumerate(self.experts))
        stacked = (gates[:, :, None, None, None] * torch.stack([e(maps) for e in self.experts], 1)).sum(1)
        return self.out(mixed * self.weights[1] + stacked)  # type: ignore[no-any-return]


class StartsFromZeros(Body):
    def __init__(self) -> None:
        super().__init__()
        self.update = conv(32, 16)

    def between(self, maps: Tensor) -> Tensor:
        state = maps.new_zeros(maps.shape)
        for _ in range(2):
            state = torch.tanh(self.update(torch.cat([maps, state], 1)))
        return state


class AddsPositions(Body):
    def __init__(self) -> None:
        super().__init__(conv(16, 16))
        self.positions = nn.Parameter(torch.randn(1, 16, 4, 4))

    def between(self, maps: Tensor) -> Tensor:
        return self.middle(maps + F.interpolate(self.positions, size=maps.shape[-2:]))  # type: ignore[no-any-return]


class Tied(Body):
    """An autoencoder whose decoder has the weights of the encoder, once by a function and once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(16, 12), conv(12, 20)

    def between(self, maps: Tensor) -> Tensor:
        code = self.second(self.first(maps).relu()).relu()
        maps = F.conv_transpose2d(code, self.second.weight, padding=1).relu()
        return F.conv2d(maps, self.first.weight.transpose(0, 1).flip(2, 3), padding=1)


def _pruned() -> nn.Module:
    network = Body(nn.Sequential(conv(16, 24), nn.ReLU(), conv(24, 16)))
    prune.l1_unstructured(network.middle[0], "weight", 0.3)  # type: ignore[index]
    prune.ln_structured(network.middle[2], "weight", 0.3, n=2, dim=0)  # type: ignore[index]
    prune.l1_unstructured(network.middle[2], "bias", 0.3)  # type: ignore[index]
    return network


class Centred(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean((1, 2, 3), keepdim=True)


def _parametrised() -> nn.Module:
    network = Body(nn.Sequential(conv(16, 24, groups=1), nn.ReLU(), conv(24, 24, groups=24), nn.Conv2d(24, 16, 1)))
    for layer in (network.middle[0], network.middle[2]):  # type: ignore[index]
        parametrize.register_parametrization(layer, "weight", Centred())
        parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return network


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (lambda: Blurs(by_attribute=False), {"stem": 16, "after": 16}),
        (lambda: Blurs(by_attribute=True), {"stem": 16, "after": 16}),
        (ReadsTheGroups, {"stem": 16, "after": 16}),
        (Masks, {"stem": 16, "middle": 16}),
        (PadsChannels, {"stem": 16}),
        (Fuses, {"stem": 16, "levels.0": 12, "out": 16}),
        (Gates, {"stem": 16, "experts.0": 12, "out": 16}),
        (StartsFromZeros, {"stem": 16}),
        (AddsPositions, {"stem": 16, "middle": 16}),
        (NormOfAll, {"stem": 16}),
        (Tied, {"stem": 16, "first": 12, "second": 20}),
        (_pruned, {"stem": 16, "middle.0": 24, "middle.2": 16}),
        (_parametrised, {"stem": 16, "middle.0": 24, "middle.3": 16}),
    ],
)
@torch.no_grad()
def test_patterns_are_slimmed_and_evaluated_incrementally(
    make: Callable[[], nn.Module], groups: dict[str, int]
) -> None:
    torch.manual_seed(0)
    network = make().eval()
    graph = trace(network, EXAMPLE)
    assert graph.default == groups
    images = torch.randn(3, *EXAMPLE.shape[1:])
    assert torch.equal(resize(network, graph, groups)(images), network(images))
    channels = random_channels(graph, 0, 0.3, 0.9)
    with FlopCounterMode(display=False) as counter:
        cut = resize(network, graph, channels)
        cut(EXAMPLE)
    assert graph.macs(channels) == counter.get_total_flops() // 2
    assert graph.params(channels) == sum(parameter.numel() for parameter in cut.parameters())
    supernet = Supernet(network, graph).eval()
    for seed in range(2):
        supernet.select(random_channels(graph, seed, 0.3, 0.9))
        assert torch.equal(supernet(images), supernet.extract(supernet.selected)(images))
    evaluator, reason = verified_evaluator(supernet, images)
    assert evaluator is not None, reason


@pytest.mark.parametrize("make", [Tied, _pruned])
@torch.no_grad()
def test_weights_that_are_tied_or_pruned_grow_without_a_change_of_the_output(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = make().double().eval()
    graph = trace(network, EXAMPLE)
    images = torch.randn(3, *EXAMPLE.shape[1:], dtype=torch.float64)
    cut = resize(network, graph, random_channels(graph, 0, 0.3, 0.9))
    torch.testing.assert_close(resize(cut, graph, graph.default)(images), cut(images))
