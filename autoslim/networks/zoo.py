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

    With the defaults it is the CIFAR-10 network of 88.00M MACs at 32x32 (paper section 2.2).

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
    num_classes: int = 10, blocks: Sequence[int] = (2, 2, 2, 2), bottleneck: bool = False, in_channels: int = 3
) -> ResNet:
    """ResNet for small images: a 3x3 stem of stride 1 and no max pooling. The defaults are ResNet-18's blocks."""
    network = ResNet(Bottleneck if bottleneck else BasicBlock, list(blocks), num_classes=num_classes)
    network.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    return network
