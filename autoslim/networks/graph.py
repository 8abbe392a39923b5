"""What a trace knows of a network: its channel groups and how every tensor and every cost follows from their sizes."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autoslim.vocabulary.channels import ChannelGroup, Channels, scaled
from autoslim.vocabulary.errors import UserError


@dataclass(frozen=True)
class Segment:
    """A run of consecutive channels on a tensor's axis: ``count`` of them for every ``unit`` channels of ``group``.

    Without a group the run has ``count`` channels whatever the configuration.
    """

    group: str | None
    count: int
    unit: int = 1

    def size(self, channels: Mapping[str, int]) -> int:
        return self.count if self.group is None else channels[self.group] // self.unit * self.count


Axis = tuple[Segment, ...]
"""A tensor's axis, as the runs of channels that it concatenates."""


def axis_size(axis: Iterable[Segment], channels: Mapping[str, int]) -> int:
    return sum(segment.size(channels) for segment in axis)


@dataclass(frozen=True)
class Attribute:
    """A module's integer that follows from the channels (``in_channels``, ``groups``, ...).

    It is ``size(axis) * times // per``. ``as_tuple`` marks ``LayerNorm.normalized_shape``, which is a tuple of one.
    """

    module: str
    name: str
    axis: Axis
    times: int = 1
    per: int = 1
    as_tuple: bool = False

    def value(self, channels: Mapping[str, int]) -> int | tuple[int, ...]:
        number = axis_size(self.axis, channels) * self.times // self.per
        return (number,) if self.as_tuple else number


@dataclass(frozen=True)
class Layer:
    """One call of a convolution or a linear layer, or of an average pooling.

    MACs per image are ``factor * size(inputs) * size(outputs)``: for a dense convolution ``factor`` is output positions
    times kernel area; for a grouped one it also holds the inputs per group, and ``inputs`` is empty. ``positions`` is
    the number of output positions (H' * W'), so ``positions * size(outputs)`` is the size of the activation. What has
    no slimming rule and still computes (a transposed convolution, an attention block) is of kind "other": ``factor`` is
    all its MACs, and nothing is said of its activation.
    """

    name: str
    kind: str  # "conv", "depthwise", "grouped", "linear", "avgpool" or "other"
    factor: int
    inputs: Axis
    outputs: Axis
    positions: int
    weight: str | None = None  # the parameter's name

    def macs(self, channels: Mapping[str, int]) -> int:
        return (
            self.factor * (axis_size(self.inputs, channels) if self.inputs else 1) * axis_size(self.outputs, channels)
        )


@dataclass(frozen=True)
class ChannelGraph:
    """A network's channel groups, and its costs in closed form.

    One multiply-add is one MAC; convolution and linear layers count, at batch size 1 and the traced input size; biases,
    normalisation, activations and pooling do not. ``macs(..., pooling=True)`` adds average pooling, one MAC per element
    of its input, as the authors count (paper section 3.4).

    ``activations`` holds, for each operation of the traced graph whose output has channels of a group, the dimension
    that they lie along and that axis.

    ``tensors`` holds, for each parameter and buffer with an axis that depends on a group, all its axes; ``attributes``
    the modules' integers that follow; ``fixed`` names each layer whose channels cannot be slimmed, with the reason.
    ``capped`` names each group that can be slimmed but not widened, with the reason.
    """

    groups: dict[str, ChannelGroup]
    tensors: dict[str, tuple[Axis, ...]]
    attributes: tuple[Attribute, ...]
    layers: tuple[Layer, ...]
    fixed: dict[str, str]
    activations: dict[str, tuple[int, Axis]]
    input_shape: tuple[int, ...]  # (C, H, W)
    leaves: frozenset[str]  # modules that tracing did not look into
    other_params: int  # parameters in tensors that no group touches
    parameter_names: frozenset[str] = field(repr=False)  # the trainable ones among `tensors`
    capped: dict[str, str] = field(default_factory=dict)

    @property
    def default(self) -> Channels:
        """The configuration of the network as traced."""
        return {name: group.size for name, group in self.groups.items()}

    def scaled(self, width: float, divisor: int = 8) -> Channels:
        """The configuration of a uniform width multiplier (see ``vocabulary.channels.scaled``)."""
        return scaled(self.groups, width, divisor)

    def macs(self, channels: Mapping[str, int] | None = None, *, pooling: bool = False) -> int:
        """Multiply-adds for one image."""
        chosen = self.default if channels is None else channels
        return sum(layer.macs(chosen) for layer in self.layers if pooling or layer.kind != "avgpool")

    def params(self, channels: Mapping[str, int] | None = None) -> int:
        """Parameters, buffers not counted."""
        chosen = self.default if channels is None else channels
        counts = (
            math.prod(axis_size(axis, chosen) for axis in axes)
            for name, axes in self.tensors.items()
            if name in self.parameter_names
        )
        return self.other_params + sum(counts)

    def cost(self, channels: Mapping[str, int], resource: str = "macs") -> int:
        """What a configuration takes of a resource, in that resource's unit."""
        if resource == "macs":
            return self.macs(channels)
        if resource == "params":
            return self.params(channels)
        raise UserError(f"resource {resource!r} has no closed form here; use macs or params")

    def check(self, channels: Mapping[str, int]) -> None:
        """Checks that ``channels`` is a configuration of this network.

        Raises:
            UserError: it has other groups, or sizes that cannot be.
        """
        problems = [
            f"{what} {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}"
            for what, names in (
                ("missing groups", self.groups.keys() - channels.keys()),
                ("unknown groups", channels.keys() - self.groups.keys()),
            )
            if names
        ]
        if problems:
            raise UserError(
                f"channels do not fit this network: {'; '.join(problems)}; "
                f"it has {len(self.groups)} groups (see `autoslim profile`)"
            )
        for name, count in channels.items():
            size, unit = self.groups[name].size, self.groups[name].unit
            if name in self.capped and count > size:
                raise UserError(
                    f"channels of group {name} are {count}, and it can have {size} at most: {self.capped[name]}; "
                    "keep supernet.width at 1.0"
                )
            if count < unit or count % unit:
                raise UserError(f"channels of group {name} are {count}; they must be a positive multiple of {unit}")
