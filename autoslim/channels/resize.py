"""Changes the numbers of channels of a network (``resize``), and draws its weights (``initialise``)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from autoslim.channels.copying import copy_with, named_tensors
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Axis, axis_size
from autoslim.channels.wrappers import check_plain
from autoslim.errors import UserError


def resize(network: nn.Module, graph: ChannelGraph, channels: Mapping[str, int]) -> nn.Module:
    """Returns a plain network of the same class with ``channels`` and the same parameter names.

    If a group shrinks, its leading channels keep their weights. If it grows, the weights of the new channels are zero,
    and their entries in per-channel vectors (scales, statistics) are the mean of the old ones; use ``initialise`` to
    draw them. The argument is not changed and shares no memory with the result.

    Args:
        network: The traced network, or any ``resize`` of it.
        graph: The result of ``trace`` for this network.
        channels: The number of channels of each of the graph's groups.

    Raises:
        UserError: If ``channels`` or ``network`` does not fit the graph.
    """
    graph.check(channels)
    present = current_channels(network, graph)

    def replace(name: str, tensor: Tensor) -> Tensor:
        if name not in graph.tensors:
            return tensor.clone()
        return _resized(tensor, graph.tensors[name], present, channels)

    result = copy_with(network, replace)
    for attribute in graph.attributes:
        setattr(result.get_submodule(attribute.module), attribute.name, attribute.value(channels))
    _define_norms({name: tensor for name, tensor in named_tensors(result).items() if name in graph.tensors})
    return result


@torch.no_grad()
def _define_norms(tensors: Mapping[str, Tensor]) -> None:
    """Gives new channels of normalised weights, g * v / |v|, a direction v, and zero as their length g."""
    for name, length in tensors.items():
        for ending, of_direction in _DIRECTIONS.items():
            direction = tensors.get(name.removesuffix(ending) + of_direction) if name.endswith(ending) else None
            if direction is not None:
                normed = [axis for axis in range(direction.dim()) if length.dim() == 0 or length.shape[axis] == 1]
                undefined = (direction == 0).all(normed, keepdim=True) if normed else direction == 0
                direction.masked_fill_(undefined, 1)
                length.masked_fill_(undefined.view(length.shape), 0)


_DIRECTIONS = {"weight_g": "weight_v", "parametrizations.weight.original0": "parametrizations.weight.original1"}
"""Ends of the names of the lengths and of the directions of weights normalised by weight norm, old and new."""


def current_channels(network: nn.Module, graph: ChannelGraph) -> dict[str, int]:
    """Returns the configuration of ``network``, which is the graph's network or a ``resize`` of it.

    Raises:
        UserError: If the tensors of ``network`` do not fit the graph, or if it is inside a wrapper.
    """
    check_plain(network)
    tensors = named_tensors(network)
    for name, axes in graph.tensors.items():
        if name not in tensors or tensors[name].dim() != len(axes):
            raise UserError(
                f"this is not the network that was traced: it has no tensor {name!r} of {len(axes)} dimensions"
            )
    sizes = dict.fromkeys(
        (axis, size)
        for name, axes in graph.tensors.items()
        for axis, size in zip(axes, tensors[name].shape, strict=True)
    )
    present: dict[str, int] = {}
    solved = -1
    while len(present) > solved:  # an axis with one unknown group determines the size of that group
        solved = len(present)
        for axis, size in sizes:
            unknown = {s.group: s.unit for s in axis if s.group is not None and s.group not in present}
            if len(unknown) == 1:
                [(group, unit)] = unknown.items()
                known = axis_size((s for s in axis if s.group != group), present)
                present[group] = (size - known) // sum(s.count for s in axis if s.group == group) * unit
    present = {name: present.get(name, group.size) for name, group in graph.groups.items()}
    for name, axes in graph.tensors.items():
        expected = tuple(axis_size(axis, present) for axis in axes)
        if tuple(tensors[name].shape) != expected:
            raise UserError(
                f"this is not the network that was traced: {name} is {tuple(tensors[name].shape)}, "
                f"but its groups require {expected}"
            )
    return present


def common_spans(axis: Axis, wide: Mapping[str, int], narrow: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """Returns, for each segment, (start in the wide tensor, start in the narrow one, number of common channels)."""
    spans = []
    at_wide = at_narrow = 0
    for segment in axis:
        size_wide, size_narrow = segment.size(wide), segment.size(narrow)
        spans.append((at_wide, at_narrow, min(size_wide, size_narrow)))
        at_wide, at_narrow = at_wide + size_wide, at_narrow + size_narrow
    return spans


def _resized(tensor: Tensor, axes: tuple[Axis, ...], present: Mapping[str, int], channels: Mapping[str, int]) -> Tensor:
    for dimension, axis in enumerate(axes):
        if all(segment.size(channels) == segment.size(present) for segment in axis):
            continue
        shape = [*tensor.shape]
        shape[dimension] = axis_size(axis, channels)
        others = (segment for other in axes[:dimension] + axes[dimension + 1 :] for segment in other)
        vector = tensor.numel() == tensor.shape[dimension] and not any(segment.group for segment in others)
        grows = any(segment.size(channels) > segment.size(present) for segment in axis)
        fill = tensor.mean() if vector and grows else torch.zeros(())
        target = fill.to(tensor).expand(shape).clone(memory_format=torch.contiguous_format)
        for start, to, length in common_spans(axis, present, channels):
            target.narrow(dimension, to, length).copy_(tensor.narrow(dimension, start, length))
        tensor = target
    return tensor.clone(memory_format=torch.preserve_format)


@torch.no_grad()
def initialise(network: nn.Module, seed: int) -> None:
    """Draws all weights in place: the same values for the same seed and sizes, on any device.

    The scheme is that of the AutoSlim authors' code and of torchvision's MobileNetV2. Convolution weights are normal
    with variance 2 / (kernel area * output channels), also in depthwise convolutions. Linear weights are normal with
    standard deviation 0.01. Biases are 0, and the scales of normalisation layers 1. Running statistics are reset. Other
    parameters (such as layer scales) keep their value if they are constant; otherwise they are drawn from a normal
    distribution with their present mean and standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        parameters = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.modules.conv._ConvNd) and "weight" in parameters:
            weight = parameters.pop("weight")
            drawn = torch.empty(weight.shape)  # on the CPU, so that the values depend on no device or memory format
            mode: Literal["fan_in", "fan_out"] = "fan_in" if module.transposed else "fan_out"
            weight.copy_(nn.init.kaiming_normal_(drawn, mode=mode, nonlinearity="relu", generator=generator))
        elif isinstance(module, nn.Linear) and "weight" in parameters:
            _normal(parameters.pop("weight"), 0, 0.01, generator)
        elif "weight" in parameters and _is_normalisation(module):
            parameters.pop("weight").fill_(1)
        if (bias := parameters.pop("bias", None)) is not None:
            bias.zero_()
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
        for parameter in parameters.values():
            mean, deviation = float(parameter.mean()), float(parameter.std(correction=0))
            if deviation > 1e-6 * abs(mean):
                _normal(parameter, mean, deviation, generator)
            else:
                parameter.fill_(mean)


def _is_normalisation(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.RMSNorm | nn.GroupNorm)


def _normal(parameter: nn.Parameter, mean: float, deviation: float, generator: torch.Generator) -> None:
    parameter.copy_(torch.empty(parameter.shape).normal_(mean, deviation, generator=generator))
