"""Small networks with patterns of layers that users have, written after the papers that introduced them."""

from collections.abc import Callable

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


def _unit(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


class _Classifier(nn.Module):
    """A stem, a block and a linear layer."""

    def __init__(self, block: nn.Module, inputs: int, outputs: int, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = _unit(3, inputs, 3, 2) if stem is None else stem
        self.block = block
        self.head = nn.Linear(outputs, 10)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.stem(images)).flatten(2).mean(2))
        return out


class _Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = _unit(channels, channels, 3), _unit(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """A block of YOLOv8: each bottleneck reads the last piece, and all pieces are concatenated."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = _unit(inputs, 2 * hidden), _unit(4 * hidden, outputs)
        self.m = nn.ModuleList(_Bottleneck(hidden) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        out: Tensor = self.cv2(torch.cat(y, 1))
        return out


class C2fBySize(C2f):
    """The same with the sizes of the pieces in an attribute."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(inputs, hidden, outputs)
        self.c = hidden

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        out: Tensor = self.cv2(torch.cat(y, 1))
        return out


class SPPF(nn.Module):
    """Spatial pyramid pooling of YOLOv5: the same pooling three times, concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = _unit(inputs, inputs // 2), _unit(inputs * 2, outputs)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        out: Tensor = self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))
        return out


class ShuffleUnit(nn.Module):
    """A unit of ShuffleNetV1: grouped convolutions with a shuffle between them, and a residual sum."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.reduce, self.depthwise = (
            _unit(channels, channels, groups=groups),
            _unit(channels, channels, 3, 1, channels),
        )
        self.expand = _unit(channels, channels, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(x)
        count, channels, height, width = y.shape
        y = y.view(count, self.groups, channels // self.groups, height, width)
        y = y.transpose(1, 2).reshape(count, channels, height, width)
        return x + self.expand(self.depthwise(y))


class SplitAttention(nn.Module):
    """The split attention of ResNeSt: a grouped convolution whose groups are weighted and added."""

    def __init__(self, inputs: int, outputs: int, radix: int) -> None:
        super().__init__()
        self.radix = radix
        self.conv = _unit(inputs, outputs * radix, 3, groups=radix)
        self.fc1, self.fc2 = nn.Conv2d(outputs, outputs // 2, 1), nn.Conv2d(outputs // 2, outputs * radix, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        count, channels, height, width = x.shape
        parts = x.reshape(count, self.radix, channels // self.radix, height, width)
        weights = self.fc2(torch.relu(self.fc1(parts.sum(1).mean((2, 3), keepdim=True))))
        weights = weights.reshape(count, self.radix, -1, 1, 1).softmax(1)
        return (parts * weights).sum(1)


class GroupedUpsampling(nn.Module):
    """Transposed convolutions in two groups whose outputs are added, with and without weight norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        plain, normal = (nn.ConvTranspose2d(inputs, 2 * outputs, 2, 2, groups=2) for _ in range(2))
        self.plain, self.normal = plain, parametrizations.weight_norm(normal)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x).unflatten(1, (2, -1)).sum(1) + self.normal(x).unflatten(1, (2, -1)).sum(1)


class Scales(nn.Module):
    """The hierarchy of Res2Net: pieces of one width, each read together with the output of the one before."""

    def __init__(self, channels: int, scales: int) -> None:
        super().__init__()
        self.width, self.channels = channels // scales, channels
        self.convs = nn.ModuleList(_unit(self.width, self.width, 3) for _ in range(scales - 1))
        self.project = _unit(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(x, self.width, 1)
        outs = [pieces[0]]
        for index, conv in enumerate(self.convs):
            outs.append(conv(pieces[index + 1] if index == 0 else pieces[index + 1] + outs[-1]))
        out: Tensor = x + self.project(torch.cat(outs, 1))
        return out


class Mixed(nn.Module):
    """Depthwise convolutions of several sizes, for pieces of different widths, as in MixNet."""

    def __init__(self, splits: list[int], outputs: int) -> None:
        super().__init__()
        self.splits = splits
        self.convs = nn.ModuleList(_unit(width, width, 2 * i + 3, 1, width) for i, width in enumerate(splits))
        self.project = _unit(sum(splits), outputs)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(x, self.splits, 1)
        out: Tensor = self.project(torch.cat([conv(piece) for conv, piece in zip(self.convs, pieces, strict=True)], 1))
        return out


class PartialSum(nn.Module):
    """A residual sum with the first channels only, as in ReXNet."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_channels = inputs
        self.conv, self.project = _unit(inputs, outputs, 3), _unit(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.project(torch.cat([y[:, : self.in_channels] + x, y[:, self.in_channels :]], 1))
        return out


class ConvLSTM(nn.Module):
    """A convolutional LSTM cell, applied three times to the same features."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Conv2d(inputs + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        count, _, height, width = x.shape
        h = c = x.new_zeros(count, self.hidden, height, width)
        for _ in range(3):
            i, f, o, g = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h


class Generator(nn.Module):
    """Linear layers whose features are arranged as maps, by all kinds of sizes (after DCGAN, Radford et al., 2016)."""

    def __init__(self, channels: int = 8, side: int = 4) -> None:
        super().__init__()
        self.width, self.side, area = channels, side, side * side
        self.by_size, self.by_attribute = nn.Linear(10, channels * area), nn.Linear(10, channels * area)
        self.by_module = nn.Sequential(nn.Linear(10, channels * area), nn.Unflatten(1, (channels, side, side)))
        self.last_axis = nn.Linear(10, area * channels)
        self.norm, self.up = nn.BatchNorm2d(channels), nn.ConvTranspose2d(channels, 6, 4, 2, 1)
        self.read = nn.Conv2d(channels, 6, 3, padding=1)
        self.add, self.out = nn.Conv2d(channels, 6, 1), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, noise: Tensor) -> Tensor:
        one = self.norm(self.by_size(noise).view(noise.shape[0], -1, self.side, self.side)).relu()
        two = F.interpolate(
            self.by_attribute(noise).relu().view(-1, self.width, self.side, self.side), scale_factor=2.0
        )
        three = self.by_module(noise)
        four = self.last_axis(noise).view(noise.shape[0], self.side, self.side, -1).permute(0, 3, 1, 2)
        maps = self.up(one) + self.read(two) + F.interpolate(self.add(three * four), scale_factor=2.0)
        out: Tensor = self.out(maps.relu())
        return out


class ShuffledByHand(nn.Module):
    """Pixel shuffles and their inverse by view, permute and reshape, with the r * r channels first and last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 6), conv(24, 24)
        self.last, self.first = nn.Conv2d(24, 32, 1), nn.Conv2d(8, 40, 1)
        self.middle, self.head = conv(10, 8), nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        count, channels, height, width = maps.shape
        maps = maps.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        maps = self.last(self.down(maps.reshape(count, 4 * channels, height // 2, width // 2)))
        channels = maps.shape[1] // 4
        maps = maps.view(count, channels, 2, 2, height // 2, width // 2).permute(0, 1, 4, 2, 5, 3)
        maps = F.avg_pool2d(maps.reshape(count, channels, height, width), 2)
        maps = self.first(maps)
        channels = maps.shape[1] // 4
        maps = maps.view(count, 2, 2, channels, height // 2, width // 2).permute(0, 3, 4, 1, 5, 2)
        out: Tensor = self.head(self.middle(maps.reshape(count, channels, height, width)))
        return out


class Recurrent(nn.Module):
    """Recurrent layers that read the columns of maps, and a linear layer between them (CRNN, Shi et al., 2015)."""

    def __init__(self, height: int = 4) -> None:
        super().__init__()
        self.maps = nn.Sequential(conv(3, 8), nn.MaxPool2d(4), conv(8, 12))
        self.lstm = nn.LSTM(12 * height, 10, num_layers=2, bidirectional=True)
        self.between, self.gru = nn.Linear(20, 14), nn.GRU(14, 6, batch_first=True)
        self.skip, self.rnn, self.head = nn.Conv2d(12, 9, 1), nn.RNN(9, 6, bias=False), nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        states, _ = self.lstm(maps.permute(3, 0, 1, 2).flatten(2))  # (W, N, C * H)
        states, _ = self.gru(self.between(states).relu().transpose(0, 1))
        _, last = self.rnn(self.skip(maps).mean(2).permute(2, 0, 1))
        out: Tensor = self.head(torch.cat([states[:, -1], last[0]], 1))
        return out


def _audio() -> nn.Module:
    layers = nn.Sequential(nn.Conv1d(16, 24, 3, padding=2, dilation=2), nn.BatchNorm1d(24), nn.ReLU())
    stem = nn.Sequential(nn.Conv1d(1, 16, 9, 4, 4), nn.GroupNorm(1, 16), nn.ReLU())
    return _Classifier(nn.Sequential(*layers, nn.Conv1d(24, 24, 3, groups=24), nn.Conv1d(24, 32, 1)), 16, 32, stem)


def _video() -> nn.Module:
    layers = nn.Sequential(nn.Conv3d(8, 12, (1, 3, 3)), nn.Conv3d(12, 16, (3, 1, 1)), nn.BatchNorm3d(16), nn.ReLU())
    stem = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.MaxPool3d(2))
    return _Classifier(layers, 8, 16, stem)


PATTERNS: dict[str, Callable[[], nn.Module]] = {
    "unet": UNet,
    "edsr": EDSR,
    "cbam": lambda: classifier(CBAM(16)),
    "coordinate_attention": lambda: classifier(CoordinateAttention(16)),
    "repvgg_fused": lambda: classifier(FusedBranches(16, 24), FusedBranches(24, 16)),
    "aspp": lambda: classifier(ASPP(16)),
    "fpn": FPN,
    "gated": lambda: classifier(Gated(16), Gated(16)),
    "weight_norm": weight_norm,
    "c2f": lambda: _Classifier(C2f(16, 8, 24), 16, 24),
    "c2f_by_size": lambda: _Classifier(C2fBySize(16, 8, 24), 16, 24),
    "sppf": lambda: _Classifier(SPPF(16, 24), 16, 24),
    "shuffle_unit": lambda: _Classifier(nn.Sequential(ShuffleUnit(36, 3), ShuffleUnit(36, 3)), 36, 36),
    "split_attention": lambda: _Classifier(SplitAttention(16, 12, 2), 16, 12),
    "grouped_upsampling": lambda: _Classifier(GroupedUpsampling(16, 12), 16, 12),
    "scales": lambda: _Classifier(Scales(24, 4), 24, 24),
    "mixed": lambda: _Classifier(Mixed([12, 8, 8], 24), 28, 24),
    "partial_sum": lambda: _Classifier(PartialSum(12, 20), 12, 20),
    "conv_lstm": lambda: _Classifier(ConvLSTM(12, 8), 12, 8),
    "generator": Generator,
    "shuffled_by_hand": ShuffledByHand,
    "recurrent": Recurrent,
    "audio": _audio,
    "video": _video,
}
SHAPES = {"generator": (10,), "audio": (1, 64), "video": (3, 8, 8, 8)}
"""The inputs of patterns for other data than images."""
