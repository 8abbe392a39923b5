"""``resize``: the same network with other numbers of channels."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.networks.graph import Axis, ChannelGraph, axis_size
from autoslim.vocabulary.errors import UserError


def resize(network: nn.Module, graph: ChannelGraph, channels: Mapping[str, int]) -> nn.Module:
    """A plain network of the same class with ``channels``, and the parameter names that it had.

    Where a group shrinks, its leading channels keep their weights; where it grows, the new channels' weights are zero
    (they are meant to be initialised: see ``initialise``). The argument is not changed and shares no memory with the
    result. With the channels that the network has, the result is a copy.

    Args:
        network: the traced network, or any ``resize`` of it.
        graph: ``trace`` of it.
        channels: one number for each of the graph's groups.

    Raises:
        UserError: ``channels`` or ``network`` does not fit the graph.
    """
    graph.check(channels)
    present = present_channels(network, graph)
    memo: dict[int, Any] = {}
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, axes in graph.tensors.items():
        tensor = tensors[name]
        data = _resized(tensor.detach(), axes, present, channels)
        memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
    result = copy.deepcopy(network, memo)
    for attribute in graph.attributes:
        setattr(result.get_submodule(attribute.module), attribute.name, attribute.value(channels))
    return result


def present_channels(network: nn.Module, graph: ChannelGraph) -> dict[str, int]:
    """The configuration that ``network``, a resize of the graph's network, has now.

    Raises:
        UserError: it is not such a network.
    """
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    present: dict[str, int] = {}
    for name, axes in graph.tensors.items():
        if name not in tensors or tensors[name].dim() != len(axes):
            raise UserError(
                f"this is not the network that was traced: it has no tensor {name!r} of {len(axes)} dimensions"
            )
        for axis, size in zip(axes, tensors[name].shape, strict=True):
            if len(axis) == 1 and axis[0].group is not None:
                present.setdefault(axis[0].group, size // axis[0].count * axis[0].unit)
    for name, axes in graph.tensors.items():
        expected = tuple(axis_size(axis, present) for axis in axes)
        if tuple(tensors[name].shape) != expected:
            raise UserError(
                f"this is not the network that was traced: {name} is {tuple(tensors[name].shape)}, its groups make it {expected}"
            )
    return present


def kept(axis: Axis, wide: Mapping[str, int], narrow: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """For each segment (start in the wide tensor, start in the narrow one, how many channels they share)."""
    spans = []
    at_wide = at_narrow = 0
    for segment in axis:
        size_wide, size_narrow = segment.size(wide), segment.size(narrow)
        spans.append((at_wide, at_narrow, min(size_wide, size_narrow)))
        at_wide, at_narrow = at_wide + size_wide, at_narrow + size_narrow
    return spans


def _resized(tensor: Tensor, axes: tuple[Axis, ...], present: Mapping[str, int], channels: Mapping[str, int]) -> Tensor:
    for dimension, axis in enumerate(axes):
        size = axis_size(axis, channels)
        if size == tensor.shape[dimension]:
            continue
        shape = [*tensor.shape]
        shape[dimension] = size
        target = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        for start, to, length in kept(axis, present, channels):
            target.narrow(dimension, to, length).copy_(tensor.narrow(dimension, start, length))
        tensor = target
    return tensor.clone(memory_format=torch.preserve_format)
