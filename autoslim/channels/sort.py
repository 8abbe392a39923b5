"""Channels in order of importance: the same function, what matters most in front, where narrower networks keep it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from autoslim.channels.copying import copy_with, named_tensors
from autoslim.channels.equivalence import harmless_changes
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Axis
from autoslim.channels.resize import current_channels
from autoslim.errors import UserError

Importance = Literal["l1", "bn_scale"]
Orders = dict[str, Tensor]
"""Group -> where each of its units comes from: (channels // unit,), int64, on the CPU."""


def sort_channels(network: nn.Module, graph: ChannelGraph, importance: Importance) -> nn.Module:
    """A copy of ``network`` that computes the same, the channels of each group in order of importance.

    The most important come first, for ``resize`` and ``Supernet`` keep the leading ones. Every tensor with an axis on a
    group is permuted alike; of a group in units (grouped convolutions) whole units move. Sums over channels are rounded
    in another order, and that is all that changes. Costs, names and shapes are untouched.

    A group whose channels ``forward`` tells apart by their place (a slice that is treated in its own way, pooling
    across channels) keeps its order, and so does what must stay (``graph.not_prunable``).

    Args:
        network: the traced network, or any ``resize`` of it. It is not changed and shares no memory with the result.
        graph: ``trace`` of it.
        importance: see ``channel_importance``.

    Raises:
        UserError: ``network`` does not fit the graph, or has no batch norm to take a ``bn_scale`` from.
    """
    return permute(network, graph, importance_orders(network, graph, importance))


def importance_orders(network: nn.Module, graph: ChannelGraph, importance: Importance) -> Orders:
    """The orders in which ``sort_channels`` puts the groups; those that must keep theirs are not among them.

    Ties keep their order. The network is run on noise, on the CPU in evaluation mode, to find who must keep it.
    """
    units = channel_importance(network, graph, importance)
    orders = {group: values.argsort(descending=True, stable=True) for group, values in units.items()}

    def change(groups: Iterable[str]) -> nn.Module:
        return permute(network, graph, {group: orders[group] for group in groups})

    return {group: orders[group] for group in harmless_changes(network, graph.input_shape, list(orders), change)}


def permute(network: nn.Module, graph: ChannelGraph, orders: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``network`` with the units of some groups in another order, in every tensor that holds them.

    Raises:
        UserError: ``network`` does not fit the graph.
    """
    present = current_channels(network, graph)

    def replace(name: str, tensor: Tensor) -> Tensor:
        for dimension, axis in enumerate(graph.tensors.get(name, ())):
            if any(segment.group in orders for segment in axis):
                tensor = tensor.index_select(dimension, _origins(axis, present, orders).to(tensor.device))
        return tensor.clone(memory_format=torch.preserve_format)

    return copy_with(network, replace)


def channel_importance(network: nn.Module, graph: ChannelGraph, importance: Importance) -> dict[str, Tensor]:
    """The importance of each unit of each group: (channels // unit,), float64, on the CPU.

    ``l1`` is the sum of the absolute weights by which the group's convolutions (depthwise and grouped ones too) and
    linear layers produce the channel, biases left out. ``bn_scale`` is the mean absolute scale of all batch norms that
    the channel passes; a group that passes none is measured by ``l1``, for importances are compared within a group
    only. A unit has the sum, or the mean, over its channels.

    Raises:
        UserError: ``network`` does not fit the graph; or ``bn_scale``, and no group passes a batch norm.
    """
    present = current_channels(network, graph)
    l1 = {group: entries.sum(1) for group, entries in _per_unit(_producers(network, graph), graph, present).items()}
    if importance == "l1":
        return l1
    scales = _per_unit(_batch_norm_scales(network), graph, present)
    if not scales:
        raise UserError(
            f"bn_scale (supernet.sort) needs batch norms with a scale, and {type(network).__name__} has none on "
            "channels that can be slimmed; use l1"
        )
    return l1 | {group: entries.mean(1) for group, entries in scales.items()}


def _producers(network: nn.Module, graph: ChannelGraph) -> Iterator[tuple[str, Tensor]]:
    """The weights of the layers that produce groups, each once."""
    tensors = named_tensors(network)
    members = dict.fromkeys(member for group in graph.groups.values() for member in group.members)
    names = [f"{member}.weight" for member in members if f"{member}.weight" in graph.tensors]
    yield from {id(tensors[name]): (name, tensors[name]) for name in names}.values()


def _batch_norm_scales(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            yield f"{path}.weight", module.weight


def _per_unit(
    weights: Iterable[tuple[str, Tensor]], graph: ChannelGraph, channels: Mapping[str, int]
) -> dict[str, Tensor]:
    """Sums of absolute values for each index of the weights' first axes, gathered by group: (units, entries of one)."""
    found: dict[str, list[Tensor]] = {}
    for name, weight in weights:
        if name not in graph.tensors:
            continue
        entries = weight.detach().cpu().double().abs().reshape(len(weight), -1).sum(1)
        start = 0
        for segment in graph.tensors[name][0]:
            size = segment.size(channels)
            if segment.group is not None:
                found.setdefault(segment.group, []).append(entries[start : start + size].view(-1, segment.count))
            start += size
    return {group: torch.cat(parts, 1) for group, parts in found.items()}


def _origins(axis: Axis, channels: Mapping[str, int], orders: Mapping[str, Tensor]) -> Tensor:
    """Where each entry of a permuted axis comes from. A unit's entries lie side by side in every segment."""
    origins = []
    start = 0
    for segment in axis:
        size = segment.size(channels)
        entries = torch.arange(start, start + size)
        if segment.group is not None and segment.group in orders:
            entries = entries.view(-1, segment.count)[orders[segment.group]].flatten()
        origins.append(entries)
        start += size
    return torch.cat(origins)
