"""Networks to test on, traced once for all tests, and random configurations of them."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torchvision.models as tv
from patterns import PATTERNS as PATTERN_BUILDERS
from patterns import SHAPES
from torch import Tensor, nn

from autoslim import trace
from autoslim.channels.copying import copy_with
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.resize import resize
from autoslim.models import architectures

torch.set_num_threads(1)  # on such small images, more threads are slower

MAIN = (
    "mobilenet_v2",
    "resnet18",
    "resnet34",
    "resnet50",
    "cifar_mobilenet_v2",
    "cifar_resnet18",
    "cifar_resnet50",
    "cifar_resnet20",
)
"""The main networks. All other torchvision networks here represent a kind of operation."""
OTHERS = (
    "mobilenet_v1",
    "mnasnet",
    "densenet121",  # concatenation
    "squeezenet1_1",  # concatenation, biases, no linear layer
    "efficientnet_b0",  # squeeze-and-excitation, stochastic depth
    "convnext_tiny",  # layer norm, layer scales, linear layers along the channels
    "regnet_y_400mf",  # grouped convolutions and squeeze-and-excitation
    "resnext50_32x4d",  # grouped convolutions
    "shufflenet_v2_x0_5",  # splits and shuffles
    "googlenet",  # auxiliary heads
)

PATTERNS = tuple(PATTERN_BUILDERS)
"""Small networks, each with a pattern of layers that users have."""

SMALL_STAGES = ((1, 8, 1, 1), (4, 12, 2, 2), (4, 16, 2, 2))
"""Arguments of a MobileNetV2 with few MACs."""

_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "small_mobilenet_v2": lambda: architectures.mobilenet_v2(stem=16, stages=SMALL_STAGES, tail=32),
    "cifar_mobilenet_v2": architectures.mobilenet_v2,
    "cifar_resnet18": architectures.resnet,
    "cifar_resnet50": lambda: architectures.resnet(blocks=(3, 4, 6, 3), bottleneck=True),
    "cifar_resnet20": lambda: architectures.resnet(blocks=(3, 3, 3), width=16),
    "mobilenet_v1": architectures.MobileNetV1,
    "mnasnet": architectures.MNasNet,
    "googlenet": lambda: tv.googlenet(init_weights=False),
    **PATTERN_BUILDERS,
}
_SIZES = {
    **dict.fromkeys(PATTERNS, 16),
    "small_mobilenet_v2": 8,
    "cifar_mobilenet_v2": 8,
    "cifar_resnet18": 8,
    "cifar_resnet50": 8,
    "cifar_resnet20": 8,
    "squeezenet1_1": 64,
    "googlenet": 64,
}


class Joins(nn.Module):
    """A layer that reads two groups, so its weight must be gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.c(torch.cat([self.a(images), self.b(images)], 1))
        return out


@dataclass(frozen=True)
class Specimen:
    """A network on the meta device, its graph, and the side of small images for it, or the shape of other inputs."""

    name: str
    network: nn.Module
    graph: ChannelGraph
    side: int
    shape: tuple[int, ...] | None = None

    def images(self, count: int = 4) -> Tensor:
        """Returns images (N, 3, S, S), or other inputs if it has others; the same ones in each call."""
        shape = self.shape or SHAPES.get(self.name, (3, self.side, self.side))
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))

    def real(self, channels: Mapping[str, int], dtype: torch.dtype = torch.float32) -> nn.Module:
        """Returns the network at ``channels`` on the CPU, with random parameters."""
        network = resize(self.network, self.graph, channels).to_empty(device="cpu").to(dtype)
        shuffle_weights(network)
        return network


@cache
@torch.inference_mode(False)  # the cached result is also used in other modes
def specimen(name: str) -> Specimen:
    device = "cpu" if name.startswith("regnet") else "meta"  # RegNets compute their widths with tensors
    with torch.device(device):
        network = build(name).to("meta")
    side = _SIZES.get(name, 32)
    return Specimen(name, network, trace(network, torch.empty(1, *SHAPES.get(name, (3, side, side)))), side)


def build(name: str) -> nn.Module:
    network: nn.Module = _BUILDERS[name]() if name in _BUILDERS else getattr(tv, name)()
    return network


@torch.no_grad()
def shuffle_weights(network: nn.Module, seed: int = 0) -> None:
    """Draws weights as for training, but without equal values, so that a missing bias or scale is detected."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
        else:
            for buffer in module.buffers(recurse=False):  # such as the statistics of a frozen batch norm
                buffer.copy_(torch.empty(buffer.shape).uniform_(0.5, 1.5, generator=generator))
        for name, parameter in module.named_parameters(recurse=False):
            scale = parameter.dim() == 1 and name == "weight"
            deviation = 0.1 if parameter.dim() < 2 else (2 / parameter[0].numel()) ** 0.5
            parameter.copy_(torch.empty(parameter.shape).normal_(float(scale), deviation, generator=generator))


def spread(graph: ChannelGraph, cut: nn.Module, channels: Mapping[str, int]) -> list[Tensor]:
    """Returns the gradients of an extracted network in the shapes of a wider one's parameters, padded with zeros.

    Vectors of several groups (batch norm after a concatenation) are not handled.
    """
    gradients = {name: parameter.grad for name, parameter in cut.named_parameters()}
    holder = copy_with(cut, lambda name, tensor: tensor if gradients.get(name) is None else gradients[name])
    wide = []
    for parameter, narrow in zip(
        resize(holder, graph, channels, seed=None).parameters(), cut.parameters(), strict=True
    ):
        data = parameter.detach()
        if data.dim() == 1:
            data[len(narrow) :] = 0
        wide.append(data)
    return wide


def random_channels(graph: ChannelGraph, seed: int, low: float, high: float) -> dict[str, int]:
    """Returns a random width for each group between ``low`` and ``high`` times its size, in whole units."""
    draw = random.Random(seed)
    return {
        name: max(1, round(draw.uniform(low, high) * group.size / group.unit)) * group.unit
        for name, group in graph.groups.items()
    }


def batch_statistics(network: nn.Module) -> nn.Module:
    """Sets batch norm to batch statistics and everything else to evaluation mode, as in a supernet."""
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return network
