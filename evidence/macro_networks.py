"""The two spaces of Channel-Bench-Macro as networks, whose traces have the benchmark's seven groups in its order.

The benchmark (github.com/xiusu/Channel-Bench-Macro) trained every network whose seven groups have 1 to 4 quarters of
their full width. Its multiply-adds are those of convolutions and of the linear layer at 32x32, and so are ours; its
parameters include those of batch norms and the bias of the linear layer. The networks are loaded by ``model.name``,
like the network of a project of one's own.
"""

import torch
from torch import Tensor, nn

MOBILENET = 128, 768, 768, 768, 256, 1536, 1024
"""Full widths of the groups: trunk, two hidden layers, that of the strided block, second trunk, hidden layer, head."""

RESNET = 256, 256, 256, 512, 512, 512, 512
"""Full widths of the groups: trunk, two hidden layers, that of the strided block, second trunk, two hidden layers."""


def mobilenet(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """Builds the MobileNet space's widest network: 211.3M MACs at 32x32.

    Args:
        num_classes: number of classes.
        width: multiplier of all widths. Below 1, configurations keep their proportions and cost less.
    """
    trunk, first, second, strided, wide, last, head = (round(width * channels) for channels in MOBILENET)
    return _Classifier(
        nn.Sequential(*_conv_norm(3, trunk, 3, stride=2), nn.ReLU()),
        _inverted(trunk, first, trunk),
        _inverted(trunk, second, trunk),
        _inverted(trunk, strided, wide, stride=2),
        _inverted(wide, last, wide),
        nn.Sequential(*_conv_norm(wide, head, 1), nn.ReLU()),
        features=head,
        num_classes=num_classes,
    )


def resnet(num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """Builds the ResNet space's widest network: 1,436M MACs at 32x32.

    Args:
        num_classes: number of classes.
        width: multiplier of all widths. Below 1, configurations keep their proportions and cost less.
    """
    trunk, first, second, strided, wide, third, fourth = (round(width * channels) for channels in RESNET)
    return _Classifier(
        nn.Sequential(*_conv_norm(3, trunk, 3, stride=2), nn.ReLU()),
        _basic(trunk, first, trunk),
        _basic(trunk, second, trunk),
        _basic(trunk, strided, wide, stride=2),
        _basic(wide, third, wide),
        _basic(wide, fourth, wide),
        features=wide,
        num_classes=num_classes,
    )


class _Classifier(nn.Module):
    def __init__(self, *layers: nn.Module, features: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.classifier(torch.flatten(self.pool(self.features(images)), 1))
        return outputs


class _Residual(nn.Module):
    """Layers with a shortcut around them, if there is one, and an activation after the sum, if there is one."""

    def __init__(self, layers: nn.Module, *, shortcut: bool, activation: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.shortcut = shortcut
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        activated: Tensor = self.activation(x + y if self.shortcut else y)
        return activated


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def _inverted(inputs: int, hidden: int, outputs: int, stride: int = 1) -> nn.Module:
    """Returns an inverted residual: its output is linear, and there is no shortcut around a stride."""
    layers = nn.Sequential(
        *_conv_norm(inputs, hidden, 1),
        nn.ReLU(),
        *_conv_norm(hidden, hidden, 3, stride, groups=hidden),
        nn.ReLU(),
        *_conv_norm(hidden, outputs, 1),
    )
    return _Residual(layers, shortcut=stride == 1, activation=nn.Identity())


def _basic(inputs: int, hidden: int, outputs: int, stride: int = 1) -> nn.Module:
    """Returns a basic block; there is no shortcut around a stride."""
    layers = nn.Sequential(*_conv_norm(inputs, hidden, 3, stride), nn.ReLU(), *_conv_norm(hidden, outputs, 3))
    return _Residual(layers, shortcut=stride == 1, activation=nn.ReLU())
