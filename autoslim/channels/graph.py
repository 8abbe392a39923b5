"""What a trace knows of a network: its channel groups and how every tensor and every cost follows from their sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from autoslim.channels.grid import Grid, GridSpec, make_grid, scaled
from autoslim.channels.groups import Axis, ChannelGroup, Channels, axis_size
from autoslim.channels.memory import MemoryModel, Operation, memory_model
from autoslim.errors import UserError

IS_OUTPUT = "it is the network's output"
"""Why the classes must stay."""


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
    of its input, as the authors count.

    ``activations`` holds, for each operation of the traced graph whose output has channels of a group, the dimension
    that they lie along and that axis. ``operations`` are all operations in evaluation mode, in order.

    ``tensors`` holds, for each parameter and buffer with an axis that depends on a group, all its axes; ``attributes``
    the modules' integers that follow; ``not_prunable`` names each layer whose channels cannot be slimmed, with the
    reason. ``not_widenable`` names each group that can be slimmed but not widened, with the reason.
    """

    groups: dict[str, ChannelGroup]
    tensors: dict[str, tuple[Axis, ...]]
    attributes: tuple[Attribute, ...]
    layers: tuple[Layer, ...]
    not_prunable: dict[str, str]
    activations: dict[str, tuple[int, Axis]]
    input_shape: tuple[int, ...]  # (C, H, W)
    leaves: frozenset[str]  # modules that tracing did not look into
    operations: tuple[Operation, ...] = field(repr=False)
    other_params: int  # parameters in tensors that no group touches
    element_bytes: dict[str, int] = field(repr=False)  # of each of `tensors`, under its first name
    other_bytes: int  # of parameters and buffers that no group touches
    parameter_names: frozenset[str] = field(repr=False)  # the trainable ones among `tensors`
    not_widenable: dict[str, str] = field(default_factory=dict)

    @property
    def default(self) -> Channels:
        """The configuration of the network as traced."""
        return {name: group.size for name, group in self.groups.items()}

    def scaled(self, width: float, divisor: int = 8) -> Channels:
        """The configuration of a uniform width multiplier (see ``vocabulary.channels.scaled``)."""
        return scaled(self.groups, width, divisor)

    def grid(self, spec: GridSpec) -> Grid:
        """The numbers of channels that ``spec`` gives each group of this network."""
        floor = {name: max(1, round(spec.narrowest * group.size)) for name, group in self.groups.items()}
        widest = self.scaled(spec.width, spec.divisor)
        return make_grid(self.groups, widest, floor, spec.steps, spec.divisor, spec.anchor)

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

    def memory(self, channels: Mapping[str, int] | None = None) -> int:
        """Bytes that inference on one image takes: all weights and buffers, and the activations' peak.

        An activation's memory is taken by the operation that makes it and given back after the last operation that
        reads anything in it; in-place operations and views take none. While an operation runs, what it reads and what
        it makes are there; so the input is there until it is last read, and the output at the end. Left out are the
        workspace of kernels, what happens inside an operation or a leaf, the allocator's rounding, tensors that the
        network's code keeps (a local variable lives on after its last use) and constants in it.
        """
        chosen = self.default if channels is None else channels
        return self._memory_model.bytes(chosen)

    @cached_property
    def _memory_model(self) -> MemoryModel:
        return memory_model(self.operations, self.tensors, self.element_bytes, self.other_bytes)

    def cost(self, channels: Mapping[str, int], resource: str = "macs") -> int:
        """What a configuration takes of a resource, in that resource's unit."""
        if resource == "macs":
            return self.macs(channels)
        if resource == "params":
            return self.params(channels)
        if resource == "memory":
            return self.memory(channels)
        raise UserError(f"resource {resource!r} has no closed form here; use macs, params or memory")

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
            if name in self.not_widenable and count > size:
                raise UserError(
                    f"channels of group {name} are {count}, and it can have {size} at most: "
                    f"{self.not_widenable[name]}; keep supernet.width at 1.0"
                )
            if count < unit or count % unit:
                raise UserError(f"channels of group {name} are {count}; they must be a positive multiple of {unit}")


def is_slimmable(layer: Layer) -> bool:
    """Whether its input or output channels depend on some group."""
    return any(segment.group for segment in (*layer.inputs, *layer.outputs))


def slimmable_share(graph: ChannelGraph, channels: Mapping[str, int]) -> float:
    """The part of the network's MACs at ``channels``, in [0, 1], in layers that can be slimmed; no average pooling.

    A layer between two that must keep their size does not count; one of whose two sides can be slimmed counts whole.
    """
    layers = [layer for layer in graph.layers if layer.kind != "avgpool" and is_slimmable(layer)]
    return sum(layer.macs(channels) for layer in layers) / max(1, graph.macs(channels))


def layers_not_prunable(graph: ChannelGraph) -> dict[str, str]:
    """Every convolution, linear layer or layer without a rule of which some output channel must stay, and why.

    Those that make the network's output (its classes) are left out, for they could not be otherwise. A network without
    any has all its layers slimmable.
    """
    stay = {name: reason for name, reason in graph.not_prunable.items() if reason != IS_OUTPUT}
    functional = [
        layer.name for layer in graph.layers if layer.kind == "other" and layer.name not in graph.not_prunable
    ]
    return stay | dict.fromkeys(functional, "it has no slimming rule")
