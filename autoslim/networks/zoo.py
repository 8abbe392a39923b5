"""Our own model definitions: small images need another stem than ImageNet's.

They are torchvision's classes with other layers put in, so a network made here loads where autoslim is not installed.
"""

from collections.abc import Sequence

from torch import nn
from torchvision.models import MobileNetV2, ResNet
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation

CIFAR_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""MobileNetV2's stages as (expansion, channels, blocks, stride) with the first strided stage at stride 1."""


def mobilenet_v2(
    num_classes: int = 10,
    stem: int = 32,
    stages: Sequence[Sequence[int]] = CIFAR_STAGES,
    tail: int = 1280,
    in_channels: int = 3,
    dropout: float = 0.0,
) -> MobileNetV2:
    """MobileNetV2 for small images: a stem of stride 1, stages of your own.

    With the defaults it is the CIFAR-10 network of 88.00M MACs at 32x32.

    Args:
        num_classes: outputs of the classifier.
        stem: channels of the first convolution.
        stages: (expansion, channels, blocks, stride of the first block) each.
        tail: channels of the last 1x1 convolution.
        in_channels: 1 for grey images, 3 for colour.
        dropout: before the classifier.
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
    """ResNet for small images: a 3x3 stem of stride 1 and no max pooling. The defaults are ResNet-18's blocks.

    With ``blocks`` (3, 3, 3) and ``width`` 16 it is the ResNet-20 of He et al. (2015, section 4.2), with projections as
    shortcuts: 40.8M MACs at 32x32.

    Args:
        num_classes: outputs of the classifier.
        blocks: of each stage, up to four; after the first one a stage has twice the channels, at half the size.
        bottleneck: blocks of three convolutions, with four times the channels at their ends.
        in_channels: 1 for grey images, 3 for colour.
        width: channels of the stem and of the first stage.
    """
    kind = Bottleneck if bottleneck else BasicBlock
    network = ResNet(kind, [1, 1, 1, 1], num_classes=num_classes)
    network.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    network.maxpool = nn.Identity()
    network.inplanes = width  # counted on by the stages
    for number in range(4):
        stage: nn.Module = nn.Identity()
        if number < len(blocks):
            stage = network._make_layer(kind, width * 2**number, blocks[number], stride=1 if number == 0 else 2)
        setattr(network, f"layer{number + 1}", stage)
    network.fc = nn.Linear(network.inplanes, num_classes)
    return network
