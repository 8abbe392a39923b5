"""The channel graph: the channel groups of a network, and all shapes and costs as functions of their sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from autoslim.channels.grid import Grid, GridSpec, make_grid, scaled
from autoslim.channels.groups import Axis, ChannelGroup, Channels, axis_size
from autoslim.channels.inputs import Inputs
from autoslim.channels.limits import group_ranges
from autoslim.channels.memory import MemoryModel, Operation, memory_model
from autoslim.errors import UserError

IS_OUTPUT = "it is the network's output"
"""The reason why the channels of the output layer, the classes, are not prunable."""


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module that depends on the channels (``in_channels``, ``groups``, ...).

    Its value is ``size(axis) * times // per``. ``as_tuple`` marks a tuple with one
    element, such as ``LayerNorm.normalized_shape``. For an attribute that is a list, ``entries`` has an axis for each
    entry, and ``axis`` is their concatenation; with ``as_tuple`` it is a tuple.
    """

    module: str
    name: str
    axis: Axis
    times: int = 1
    per: int = 1
    as_tuple: bool = False
    entries: tuple[Axis, ...] = ()

    def value(self, channels: Mapping[str, int]) -> int | tuple[int, ...] | list[int]:
        """Returns the attribute's value in a configuration."""
        if self.entries:
            sizes = [axis_size(entry, channels) for entry in self.entries]
            return tuple(sizes) if self.as_tuple else sizes
        number = axis_size(self.axis, channels) * self.times // self.per
        return (number,) if self.as_tuple else number


@dataclass(frozen=True)
class Layer:
    """One call of a convolution or a linear layer, or of an average pooling.

    MACs per image are ``factor * size(inputs) * size(outputs)``. For a dense convolution, ``factor`` is the number of
    output positions times the kernel area. For a grouped one that is slimmed by whole groups, it is also multiplied by
    the inputs per group, and ``inputs`` is empty; for one that keeps its groups, ``inputs`` is the axis of the inputs
    of one group. ``positions`` is the number of output positions (H' * W'), so ``positions * size(outputs)`` is
    the size of the activation. A recurrent layer has two entries: the products with its input, and all others.
    Operations without a slimming rule that cost MACs (a deformable convolution, an
    attention block) have the kind "other": ``factor`` is their total, and ``positions`` and ``outputs`` are 1.
    """

    name: str
    kind: str  # "conv", "depthwise", "grouped", "linear", "recurrent", "avgpool" or "other"
    factor: int
    inputs: Axis
    outputs: Axis
    positions: int
    weight: str | None = None  # the parameter's name

    def macs(self, channels: Mapping[str, int]) -> int:
        """Returns the multiply-adds for one image."""
        return (
            self.factor * (axis_size(self.inputs, channels) if self.inputs else 1) * axis_size(self.outputs, channels)
        )


@dataclass(frozen=True)
class ChannelGraph:
    """A network's channel groups, and its costs in closed form.

    One multiply-add is one MAC. Convolutions and products of activations with parameters, as in linear layers, are
    counted, at batch size 1 and the traced input sizes; biases, normalisation, activations, pooling and products of
    activations, as in attention, are not. ``macs(..., pooling=True)`` adds average pooling, one MAC
    per element of its input, as the authors of AutoSlim count.

    Attributes:
        groups: The channel groups by name.
        tensors: All axes of each parameter and buffer with an axis that depends on a group.
        weights: The weights of layers among ``tensors``, each with the dimension of the channels that it produces, or
            None if it produces none of a group. The other tensors have values for each channel.
        attributes: The integer attributes of modules that depend on a group.
        layers: The calls of layers that cost MACs, in order.
        not_prunable: The layers whose channels cannot be slimmed, with the reasons.
        activations: For each operation whose output has channels of a group, their dimension and that axis.
        inputs: The inputs that the network was traced with.
        leaves: Paths of modules that were traced as one operation.
        operations: All operations in evaluation mode, in order.
        other_params: The number of parameters in tensors that depend on no group.
        element_bytes: The size of an element of each of ``tensors``, under the first name of the tensor.
        other_bytes: The size of the parameters and buffers that depend on no group.
        parameter_names: The parameters among ``tensors``; the rest are buffers.
        not_widenable: The groups that can be slimmed but not widened, with the reasons.
        not_counted: The operations that read parameters and whose multiply-adds are not known, with their names.
        batch_norms: The calls of ``F.batch_norm`` on running statistics, with their lines. A ``Supernet`` refuses them.
        part: The path of the module that was traced, if it is a part of the network; the costs are those of the part.
    """

    groups: dict[str, ChannelGroup]
    tensors: dict[str, tuple[Axis, ...]]
    attributes: tuple[Attribute, ...]
    layers: tuple[Layer, ...]
    not_prunable: dict[str, str]
    activations: dict[str, tuple[int, Axis]]
    inputs: Inputs
    leaves: frozenset[str]
    operations: tuple[Operation, ...] = field(repr=False)
    other_params: int
    element_bytes: dict[str, int] = field(repr=False)
    other_bytes: int
    parameter_names: frozenset[str] = field(repr=False)
    not_widenable: dict[str, str] = field(default_factory=dict)
    weights: dict[str, int | None] = field(default_factory=dict, repr=False)
    not_counted: dict[str, str] = field(default_factory=dict)
    part: str = ""
    batch_norms: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[Any, ...]:
        """(C, H, W) of an image: the shape of the input without the batch. For several inputs, all of their shapes."""
        shapes = tuple(tensor.shape for tensor in self.inputs.tensors)
        return shapes[0] if self.inputs.is_single else shapes

    @property
    def default(self) -> Channels:
        """The configuration of the traced network."""
        return {name: group.size for name, group in self.groups.items()}

    def scaled(self, width: float, divisor: int = 8) -> Channels:
        """Returns the configuration of a uniform width multiplier (see ``autoslim.channels.grid.scaled``)."""
        return scaled(self.groups, width, divisor)

    def grid(self, spec: GridSpec = GridSpec()) -> Grid:  # noqa: B008
        """Returns the numbers of channels that ``spec`` gives each group of this network.

        Raises:
            UserError: If the limits of ``spec.groups`` match no group, or if no number of channels is within them.
        """
        floor = {name: max(1, round(spec.narrowest * group.size)) for name, group in self.groups.items()}
        widest = self.scaled(spec.width, spec.divisor)
        ranges = group_ranges(self.groups, spec.groups)
        for name, allowed in ranges.items():
            widest[name], floor[name] = allowed.clamped(widest[name], floor[name])
        multiples = {name: allowed.multiple for name, allowed in ranges.items()}
        return make_grid(self.groups, widest, floor, spec.steps, spec.divisor, spec.anchor, multiples)

    def macs(self, channels: Mapping[str, int] | None = None, *, pooling: bool = False) -> int:
        """Returns the multiply-adds for one image."""
        chosen = self.default if channels is None else channels
        return sum(layer.macs(chosen) for layer in self.layers if pooling or layer.kind != "avgpool")

    def params(self, channels: Mapping[str, int] | None = None) -> int:
        """Returns the number of parameters, without buffers."""
        chosen = self.default if channels is None else channels
        counts = (
            math.prod(axis_size(axis, chosen) for axis in axes)
            for name, axes in self.tensors.items()
            if name in self.parameter_names
        )
        return self.other_params + sum(counts)

    def memory(self, channels: Mapping[str, int] | None = None) -> int:
        """Returns the bytes that inference on one image requires: all weights and buffers, and the peak of activations.

        An activation is allocated by the operation that computes it and freed after the last operation that reads from
        its memory; in-place operations and views allocate nothing. The inputs and the output of an operation are alive
        while it runs. Not counted are the workspace of kernels, memory used inside an operation or a leaf module, the
        allocator's rounding, tensors that the network's code still refers to after their last use, and its constants.
        """
        chosen = self.default if channels is None else channels
        return self._memory_model.bytes(chosen)

    @cached_property
    def _memory_model(self) -> MemoryModel:
        return memory_model(self.operations, self.tensors, self.element_bytes, self.other_bytes)

    def cost(self, channels: Mapping[str, int], resource: str = "macs") -> int:
        """Returns the cost of a configuration in the unit of the resource.

        Raises:
            UserError: If the resource is not macs, params or memory.
        """
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
            UserError: If groups are missing or unknown, or if a group cannot have this number of channels.
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
                    f"group {name} cannot have {count} channels, but at most {size}: "
                    f"{self.not_widenable[name]}; keep supernet.width at 1.0"
                )
            if count < unit or count % unit:
                raise UserError(f"group {name} cannot have {count} channels; use a positive multiple of {unit}")


def is_slimmable(layer: Layer) -> bool:
    """Returns whether the input or output channels of a layer depend on a group."""
    return any(segment.group for segment in (*layer.inputs, *layer.outputs))


def slimmable_share(graph: ChannelGraph, channels: Mapping[str, int]) -> float:
    """Returns the share of the network's MACs at ``channels`` in layers that can be slimmed, in [0, 1].

    A layer is counted in full if its inputs or its outputs can be slimmed. Average pooling is not counted.
    """
    layers = [layer for layer in graph.layers if layer.kind != "avgpool" and is_slimmable(layer)]
    return sum(layer.macs(channels) for layer in layers) / max(1, graph.macs(channels))


def layers_not_prunable(graph: ChannelGraph) -> dict[str, str]:
    """Returns the layers with output channels that are not prunable, with the reasons.

    These are convolutions, linear layers and layers without a slimming rule. Layers that produce the network's output
    are left out, because their size is the number of classes. If the result is empty, every other layer can be slimmed.
    """
    layers = {name: reason for name, reason in graph.not_prunable.items() if reason != IS_OUTPUT}
    functional = [
        layer.name for layer in graph.layers if layer.kind == "other" and layer.name not in graph.not_prunable
    ]
    return layers | dict.fromkeys(functional, "it has no slimming rule")
