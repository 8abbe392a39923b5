"""Small networks with patterns of layers that users have, written after the papers that introduced them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    """Returns a convolution that keeps the size of the maps, with batch norm and ReLU."""
    padding = kernel // 2 * options.get("dilation", 1)
    layer = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def classifier(*middle: nn.Module) -> nn.Module:
    """Returns a network with ``middle`` between a stem and a head of 16 channels each."""
    head = (conv(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return nn.Sequential(conv(3, 16), *middle, *head)


class UNet(nn.Module):
    """Transposed convolutions, dense and depthwise, and skips that are concatenated (Ronneberger et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.middle, self.low = conv(3, 8), conv(8, 16), conv(16, 24)
        self.up = nn.ConvTranspose2d(24, 16, 2, 2)
        self.smooth = nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=16, bias=False)
        self.join, self.last, self.head = conv(32, 16), conv(24, 12), nn.Conv2d(12, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        high = self.high(images)
        middle = self.middle(F.max_pool2d(high, 2))
        low = self.up(self.low(F.max_pool2d(middle, 2)))
        joined = self.smooth(self.join(torch.cat([middle, low], 1)))
        out: Tensor = self.head(self.last(torch.cat([high, joined], 1)))
        return out


class EDSR(nn.Module):
    """Residual blocks and a pixel shuffle with a convolution after it (Lim et al., 2017)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        blocks = [(nn.Conv2d(width, 12, 3, padding=1), nn.Conv2d(12, width, 3, padding=1)) for _ in range(2)]
        self.blocks = nn.ModuleList(nn.Sequential(first, nn.ReLU(), second) for first, second in blocks)
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        first = maps = self.stem(images)
        for block in self.blocks:
            maps = maps + 0.1 * block(maps)
        out: Tensor = self.last(self.up(maps + first))
        return out


class CBAM(nn.Module):
    """Attention by means and maxima, over the channels and over the pixels (Woo et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(nn.Conv2d(channels, 6, 1), nn.ReLU(), nn.Conv2d(6, channels, 1))
        self.where = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        gates = self.weigh(F.adaptive_avg_pool2d(maps, 1)) + self.weigh(F.adaptive_max_pool2d(maps, 1))
        maps = maps * gates.sigmoid()
        pixels = torch.cat([torch.max(maps, 1)[0].unsqueeze(1), torch.mean(maps, 1).unsqueeze(1)], dim=1)
        return maps * self.where(pixels).sigmoid()


class CoordinateAttention(nn.Module):
    """Attention along the rows and along the columns (Hou et al., 2021)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shrink, self.act = nn.Sequential(nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8)), nn.Hardswish()
        self.rows, self.columns = nn.Conv2d(8, channels, 1), nn.Conv2d(8, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        _, _, height, width = maps.size()
        rows = F.adaptive_avg_pool2d(maps, (height, 1))
        columns = F.adaptive_avg_pool2d(maps, (1, width)).permute(0, 1, 3, 2)
        joined = self.act(self.shrink(torch.cat([rows, columns], dim=2)))
        rows, columns = torch.split(joined, [height, width], dim=2)
        return maps * self.rows(rows).sigmoid() * self.columns(columns.permute(0, 1, 3, 2)).sigmoid()


class FusedBranches(nn.Module):
    """A 3x3 and a 1x1 branch that are fused into one kernel in each call (after RepVGG, Ding et al., 2021)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.large = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.small = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.scale, self.norm = nn.Parameter(torch.ones(outputs)), FrozenBatchNorm2d(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        kernel = self.large.weight * self.scale.view(-1, 1, 1, 1)
        kernel = kernel + F.pad(self.small.weight, [1, 1, 1, 1]) * scale.reshape(-1, 1, 1, 1)
        bias = self.large.bias + self.norm.bias - self.norm.running_mean * scale
        return (F.conv2d(maps, kernel, padding=1) + bias.view(1, -1, 1, 1)).relu()


class ASPP(nn.Module):
    """Parallel dilated convolutions and an image-wide branch (DeepLabv3, Chen et al., 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [conv(channels, 8, 1), conv(channels, 8, dilation=2), conv(channels, 8, dilation=4)]
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(channels, 8, 1))
        self.project = conv(32, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        pooled = F.interpolate(self.pooled(maps), size=maps.shape[-2:], mode="bilinear", align_corners=False)
        out: Tensor = self.project(torch.cat([*(branch(maps) for branch in self.branches), pooled], 1))
        return out


class FPN(nn.Module):
    """A top-down pyramid over a backbone with frozen batch norms, and a head on the finest level (Lin et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 12, 16)
        stages = zip((3, *widths[:-1]), widths, strict=True)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), FrozenBatchNorm2d(b), nn.ReLU()) for a, b in stages
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, 10, 1) for width in widths)
        self.smooth, self.head = nn.Conv2d(10, 10, 3, padding=1), nn.Conv2d(10, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        top = self.lateral[-1](maps[-1])
        for lateral, level in zip(reversed(self.lateral[:-1]), reversed(maps[:-1]), strict=True):
            top = lateral(level) + F.interpolate(top, scale_factor=2.0, mode="nearest")
        out: Tensor = self.head(self.smooth(top))
        return out


class Gated(nn.Module):
    """A residual block with gated linear units (Dauphin et al., 2017), by halves, by a split and by ``F.glu``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(channels, 24, 1), conv(12, 20, 3), conv(10, 16, 1)
        self.out = conv(8, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        value, gate = self.first(maps).chunk(2, 1)
        wide = self.second(value * gate.sigmoid())
        half = wide.shape[1] // 2
        value, gate = wide.split((half, half), 1)
        inner: Tensor = self.out(F.glu(self.third(torch.maximum(value, gate)), 1))
        return maps + inner


def weight_norm() -> nn.Module:
    """Returns layers with weight norm (Salimans and Kingma, 2016)."""
    norm = parametrizations.weight_norm
    up = norm(nn.ConvTranspose2d(12, 8, 2, 2), dim=1)
    layers = (
        norm(nn.Conv2d(3, 16, 3, padding=1)),
        nn.ReLU(),
        norm(nn.Conv2d(16, 12, 3, 2, 1)),
        nn.ReLU(),
        up,
        nn.ReLU(),
    )
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(nn.Linear(8, 6)), nn.Linear(6, 4))
