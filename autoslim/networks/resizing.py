"""``resize``: the same network with other numbers of channels."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoslim.networks.axes import Axis, axis_size
from autoslim.networks.copying import copy_with, named_tensors
from autoslim.networks.graph import ChannelGraph
from autoslim.vocabulary.errors import UserError


def resize(network: nn.Module, graph: ChannelGraph, channels: Mapping[str, int]) -> nn.Module:
    """A plain network of the same class with ``channels``, and the parameter names that it had.

    Where a group shrinks, its leading channels keep their weights; where it grows, the new channels' weights are zero,
    and their entries in per-channel vectors (scales, statistics) the mean of the old ones: they are meant to be
    initialised (see ``initialise``). The argument is not changed and shares no memory with the result. With the
    channels that the network has, the result is a copy.

    Args:
        network: the traced network, or any ``resize`` of it.
        graph: ``trace`` of it.
        channels: one number for each of the graph's groups.

    Raises:
        UserError: ``channels`` or ``network`` does not fit the graph.
    """
    graph.check(channels)
    present = present_channels(network, graph)

    def replace(name: str, tensor: Tensor) -> Tensor:
        if name not in graph.tensors:
            return tensor.clone()
        return _resized(tensor, graph.tensors[name], present, channels)

    result = copy_with(network, replace)
    for attribute in graph.attributes:
        setattr(result.get_submodule(attribute.module), attribute.name, attribute.value(channels))
    return result


def present_channels(network: nn.Module, graph: ChannelGraph) -> dict[str, int]:
    """The configuration that ``network``, a resize of the graph's network, has now.

    Raises:
        UserError: it is not such a network.
    """
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
    before = -1
    while len(present) > before:  # an axis tells the size of a group when those of all others on it are known
        before = len(present)
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
                f"its groups make it {expected}"
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
        if all(segment.size(channels) == segment.size(present) for segment in axis):
            continue
        shape = [*tensor.shape]
        shape[dimension] = axis_size(axis, channels)
        others = (segment for other in axes[:dimension] + axes[dimension + 1 :] for segment in other)
        vector = tensor.numel() == tensor.shape[dimension] and not any(segment.group for segment in others)
        grows = any(segment.size(channels) > segment.size(present) for segment in axis)
        fill = tensor.mean() if vector and grows else torch.zeros(())
        target = fill.to(tensor).expand(shape).clone(memory_format=torch.contiguous_format)
        for start, to, length in kept(axis, present, channels):
            target.narrow(dimension, to, length).copy_(tensor.narrow(dimension, start, length))
        tensor = target
    return tensor.clone(memory_format=torch.preserve_format)
