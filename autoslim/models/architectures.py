"""MobileNetV2 and ResNet for small images, and the paper's MobileNetV1 and MNasNet."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import MobileNetV2, ResNet
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation

from autoslim.channels.grid import make_divisible

CIFAR_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""MobileNetV2's stages as (expansion, channels, blocks, stride), with stride 1 in the first strided stage."""


def mobilenet_v2(
    num_classes: int = 10,
    stem: int = 32,
    stages: Sequence[Sequence[int]] = CIFAR_STAGES,
    tail: int = 1280,
    in_channels: int = 3,
    dropout: float = 0.0,
) -> MobileNetV2:
    """Builds a MobileNetV2 for small images, with a stem of stride 1.

    With the defaults it is the CIFAR-10 network of 88.00M MACs at 32x32.

    Args:
        num_classes: number of classes.
        stem: channels of the first convolution.
        stages: (expansion, channels, blocks, stride of the first block) of each stage.
        tail: channels of the last 1x1 convolution.
        in_channels: channels of the images: 1 for grey images, 3 for colour.
        dropout: dropout rate before the classifier.
    """
    network = MobileNetV2(num_classes=num_classes, dropout=dropout)
    relu6 = nn.ReLU6
    layers: list[nn.Module] = [Conv2dNormActivation(in_channels, stem, 3, 1, activation_layer=relu6)]
    width = stem
    for expansion, channels, blocks, stride in stages:
        for block in range(blocks):
            layers.append(InvertedResidual(width, channels, stride if block == 0 else 1, expansion))
            width = channels
    layers.append(Conv2dNormActivation(width, tail, 1, activation_layer=relu6))
    network.features = nn.Sequential(*layers)
    network.last_channel = tail
    network.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(tail, num_classes))
    return network


def resnet(
    num_classes: int = 10,
    blocks: Sequence[int] = (2, 2, 2, 2),
    bottleneck: bool = False,
    in_channels: int = 3,
    width: int = 64,
) -> ResNet:
    """Builds a ResNet for small images, with a 3x3 stem of stride 1 and no max pooling. The default is ResNet-18.

    With ``blocks`` (3, 3, 3) and ``width`` 16 it is the ResNet-20 of He et al. (2015, section 4.2), with projections as
    shortcuts: 40.8M MACs at 32x32.

    Args:
        num_classes: number of classes.
        blocks: number of blocks of each stage, for up to four stages. Each stage after the first doubles the channels
            and halves the resolution.
        bottleneck: whether blocks have three convolutions, with four times the channels at their output.
        in_channels: channels of the images: 1 for grey images, 3 for colour.
        width: channels of the stem and of the first stage.
    """
    kind = Bottleneck if bottleneck else BasicBlock
    network = ResNet(kind, [1, 1, 1, 1], num_classes=num_classes)
    network.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    network.maxpool = nn.Identity()
    network.inplanes = width  # read and updated by _make_layer
    for number in range(4):
        stage: nn.Module = nn.Identity()
        if number < len(blocks):
            stage = network._make_layer(kind, width * 2**number, blocks[number], stride=1 if number == 0 else 2)
        setattr(network, f"layer{number + 1}", stage)
    network.fc = nn.Linear(network.inplanes, num_classes)
    return network


_V1_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
"""(channels, stride) of MobileNetV1's depthwise separable blocks."""

_MNAS_STAGES = (
    (3, 24, 3, 2, 3),
    (3, 40, 3, 2, 5),
    (6, 80, 3, 2, 5),
    (6, 96, 2, 1, 3),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
"""(expansion, channels, blocks, stride of the first block, kernel size) of MNasNet's stages after the first block."""


class _Classifier(nn.Module):
    """Layers followed by average pooling and a linear classifier."""

    def __init__(self, layers: Sequence[nn.Module], width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(self.features(images))  # (N, C, 1, 1)
        logits: Tensor = self.classifier(maps.flatten(1))
        return logits


class MobileNetV1(_Classifier):
    """MobileNetV1: a stem and 13 depthwise separable blocks. Batch norm and ReLU follow each convolution.

    It has 568.79M MACs, as the authors count them, and 4.23M parameters at width 1, 224x224 and 1000 classes.

    Args:
        num_classes: number of classes.
        width_mult: width multiplier. Channels are rounded to multiples of 8.
        in_channels: channels of the images: 1 for grey images, 3 for colour.
        dropout: dropout rate before the classifier.
    """

    def __init__(
        self, num_classes: int = 1000, width_mult: float = 1.0, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        width = make_divisible(32 * width_mult, 8)
        layers: list[nn.Module] = [Conv2dNormActivation(in_channels, width, 3, 2)]
        for channels, stride in _V1_BLOCKS:
            out = make_divisible(channels * width_mult, 8)
            depthwise = Conv2dNormActivation(width, width, 3, stride, groups=width)
            layers.append(nn.Sequential(depthwise, Conv2dNormActivation(width, out, 1)))
            width = out
        super().__init__(layers, width, num_classes, dropout)


class MNasNetBlock(nn.Module):
    """Inverted residual block: 1x1 expansion (none at expansion 1), depthwise convolution and linear 1x1 projection.

    In MNasNet, every block of a stage except the first has a skip connection.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, kernel: int, skip: bool) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(Conv2dNormActivation(inputs, hidden, 1, activation_layer=nn.ReLU6))
        layers.append(Conv2dNormActivation(hidden, hidden, kernel, stride, groups=hidden, activation_layer=nn.ReLU6))
        layers.append(Conv2dNormActivation(hidden, outputs, 1, activation_layer=None))
        self.layers = nn.Sequential(*layers)
        self.skip = skip

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.layers(maps)
        return maps + out if self.skip else out


class MNasNet(_Classifier):
    """MNasNet as defined by the AutoSlim authors, with ReLU6 everywhere and average pooling as a layer.

    It has 314.48M MACs as the authors count them. torchvision's ``mnasnet1_0`` has the same convolutions but ReLU,
    another batch-norm momentum and a mean instead of the pooling, and thus 314.42M MACs.

    Args:
        num_classes: number of classes.
        width_mult: width multiplier. Channels are rounded to multiples of 8, and expansions are multiples of these.
        in_channels: channels of the images: 1 for grey images, 3 for colour.
        dropout: dropout rate before the classifier.
    """

    def __init__(
        self, num_classes: int = 1000, width_mult: float = 1.0, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        def scaled(channels: int) -> int:
            return make_divisible(channels * width_mult, 8)

        width = scaled(16)
        layers: list[nn.Module] = [
            Conv2dNormActivation(in_channels, scaled(32), 3, 2, activation_layer=nn.ReLU6),
            MNasNetBlock(scaled(32), width, 1, 1, 3, skip=False),
        ]
        for expansion, channels, blocks, stride, kernel in _MNAS_STAGES:
            out = scaled(channels)
            for block in range(blocks):
                first = block == 0
                layers.append(MNasNetBlock(width, out, stride if first else 1, expansion, kernel, skip=not first))
                width = out
        tail = scaled(1280)
        layers.append(Conv2dNormActivation(width, tail, 1, activation_layer=nn.ReLU6))
        super().__init__(layers, tail, num_classes, dropout)
