"""Sorts channels by importance without changing a network's function; narrower networks keep the first channels."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from autoslim.channels.copying import copy_with, named_tensors
from autoslim.channels.equivalence import harmless_changes
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Axis
from autoslim.channels.resize import current_channels
from autoslim.errors import UserError

Importance = Literal["l1", "bn_scale"]
Orders = dict[str, Tensor]
"""Group -> the present index of each unit in the new order: (channels // unit,), int64, on the CPU."""


def sort_channels(network: nn.Module, graph: ChannelGraph, importance: Importance) -> nn.Module:
    """Returns a copy of ``network`` that computes the same function, with the channels of each group sorted.

    The most important channels come first, because ``resize`` and ``Supernet`` keep the leading ones. Every tensor with
    an axis that depends on a group is permuted in the same way; if the group has units (grouped convolutions), whole
    units move. The output changes only by rounding, because sums over channels are computed in another order. Costs,
    names and shapes do not change.

    A group keeps its order if ``forward`` treats its channels differently by their position (in a slice, or by pooling
    across channels). Channels that are not prunable (``graph.not_prunable``) keep their order too.

    Args:
        network: The traced network, or any ``resize`` of it. It is not changed and shares no memory with the result.
        graph: The result of ``trace`` for this network.
        importance: See ``channel_importance``.

    Raises:
        UserError: If ``network`` does not fit the graph, or if ``importance`` is ``bn_scale`` and no group passes a
            batch norm.
    """
    return permute(network, graph, importance_orders(network, graph, importance))


def importance_orders(network: nn.Module, graph: ChannelGraph, importance: Importance) -> Orders:
    """Returns the orders that ``sort_channels`` gives the groups (see ``descending_orders``)."""
    return descending_orders(network, graph, channel_importance(network, graph, importance))


def descending_orders(network: nn.Module, graph: ChannelGraph, units: Mapping[str, Tensor]) -> Orders:
    """Returns the orders in which the importance of units falls, without the groups that keep their order.

    Ties keep their order. To find the groups that keep their order (see ``sort_channels``), copies of the network run
    on noise, on the CPU and in evaluation mode.

    Args:
        units: the importance of each unit of each group, such as ``channel_importance`` returns.
    """
    orders = {group: values.argsort(descending=True, stable=True) for group, values in units.items()}

    def change(groups: Iterable[str]) -> nn.Module:
        return permute(network, graph, {group: orders[group] for group in groups}).get_submodule(graph.part)

    traced = network.get_submodule(graph.part)
    return {group: orders[group] for group in harmless_changes(traced, graph.inputs, list(orders), change)}


def permute(network: nn.Module, graph: ChannelGraph, orders: Mapping[str, Tensor]) -> nn.Module:
    """Returns a copy of ``network`` with the units of some groups reordered, in every tensor that depends on them.

    Raises:
        UserError: If ``network`` does not fit the graph.
    """
    present = current_channels(network, graph)

    def replace(name: str, tensor: Tensor) -> Tensor:
        for dimension, axis in enumerate(graph.tensors.get(name, ())):
            if any(segment.group in orders for segment in axis):
                tensor = tensor.index_select(dimension, _origins(axis, present, orders).to(tensor.device))
        return tensor.clone(memory_format=torch.preserve_format)

    return copy_with(network, replace)


def channel_importance(network: nn.Module, graph: ChannelGraph, importance: Importance) -> dict[str, Tensor]:
    """Returns the importance of each unit of each group: (channels // unit,), float64, on the CPU.

    ``l1`` is the sum of the absolute weights with which the group's convolutions (including depthwise and grouped ones)
    and linear layers produce the channel, without biases. ``bn_scale`` is the mean absolute scale of all batch norms
    that the channel passes. A group that passes none gets ``l1`` instead, which is possible because importances are
    only compared within a group. The importance of a unit is the sum (``l1``) or the mean (``bn_scale``) over its
    channels.

    Raises:
        UserError: If ``network`` does not fit the graph, or if ``importance`` is ``bn_scale`` and no group passes a
            batch norm.
    """
    present = current_channels(network, graph)
    l1 = {group: entries.sum(1) for group, entries in _per_unit(_producers(network, graph), present).items()}
    if importance == "l1":
        return l1
    check_batch_norms(network, graph)
    scales = _per_unit(_batch_norm_scales(network, graph), present)
    return l1 | {group: entries.mean(1) for group, entries in scales.items()}


def check_batch_norms(network: nn.Module, graph: ChannelGraph) -> None:
    """Raises ``UserError`` if no group passes a batch norm with a scale, which ``bn_scale`` compares."""
    if not any(segment.group is not None for axis, _ in _batch_norm_scales(network, graph) for segment in axis):
        raise UserError(
            f"bn_scale (supernet.sort or methods) needs batch norms with a scale, and {type(network).__name__} has "
            "none on channels that can be slimmed; use l1"
        )


def taylor_importance(
    network: nn.Module, graph: ChannelGraph, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """Returns the first-order importance of each unit of each group: (channels // unit,), float64, on the CPU.

    It is the sum, over the weights that ``channel_importance`` uses, of the squared products of weight and gradient,
    averaged over batches: an estimate of what the squared loss changes if the weights become zero (Molchanov et al.,
    "Importance Estimation for Neural Network Pruning", 2019, section 3.1).

    Args:
        network: the traced network, or any ``resize`` of it. Its gradients are cleared; it is in evaluation mode
            meanwhile.
        batches: any batches.
        loss: ``loss(network, batch)`` returns the mean loss of a batch, a scalar.

    Raises:
        UserError: there is no batch, or the loss or a weight has no gradient.
    """
    present = current_channels(network, graph)
    located = list(_located(network, graph))
    tensors = named_tensors(network)
    sums = {stored: torch.zeros_like(tensors[stored], dtype=torch.float64, device="cpu") for _, stored, _ in located}
    count = 0
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        for batch in batches:
            network.zero_grad(set_to_none=True)
            value = loss(network, batch)
            if not value.requires_grad:
                raise UserError("the first-order importance needs a loss with a gradient, but it has none; use l1")
            value.backward()
            for stored in sums:
                if (gradient := tensors[stored].grad) is None:
                    raise UserError(f"{stored} has no gradient, so it has no first-order importance; unfreeze it")
                sums[stored] += (tensors[stored].detach() * gradient).cpu().double() ** 2
            count += 1
    finally:
        network.zero_grad(set_to_none=True)
        for module, mode in training.items():
            module.training = mode
    if not count:
        raise UserError("the first-order importance needs at least one batch, but batches is empty")
    weights = (
        (graph.tensors[stored][dimension], (sums[stored] / count).movedim(dimension, 0))
        for _, stored, dimension in located
    )
    return {group: entries.sum(1) for group, entries in _per_unit(weights, present).items()}


def _producers(network: nn.Module, graph: ChannelGraph) -> Iterator[tuple[Axis, Tensor]]:
    """Yields the weight of each layer that produces a group, with the output channels first, and their axis.

    A shared weight is yielded once. A normalised weight is the product that the layer computes with.
    """
    tensors, modules = named_tensors(network), dict(network.named_modules())
    for member, stored, dimension in _located(network, graph):
        weight = tensors[stored] if stored == f"{member}.weight" else _normalised(modules[member])
        yield graph.tensors[stored][dimension], weight.movedim(dimension, 0)


def _located(network: nn.Module, graph: ChannelGraph) -> Iterator[tuple[str, str, int]]:
    """Yields each layer that produces a group, its stored weight, and the dimension of the weight's output channels."""
    groups: dict[str, set[str]] = {}
    for group in graph.groups.values():
        for member in group.members:
            groups.setdefault(member, set()).add(group.name)
    tensors, modules = named_tensors(network), dict(network.named_modules())
    seen: set[int] = set()
    for member, own in groups.items():
        stored = next((name for name in (f"{member}{end}" for end in _WEIGHTS) if name in graph.tensors), None)
        if stored is None or id(tensors[stored]) in seen:
            continue
        seen.add(id(tensors[stored]))
        axes = graph.tensors[stored]
        order = (1, 0) if getattr(modules.get(member), "transposed", False) else range(len(axes))
        dimension = next((d for d in order if any(segment.group in own for segment in axes[d])), None)
        if dimension is not None:
            yield member, stored, dimension


_WEIGHTS = (".weight", ".weight_v", ".parametrizations.weight.original1")
"""Ends of the names of weights: stored, and normalised by the old and the new form of weight norm."""


def _normalised(module: Any) -> Tensor:
    hook = next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)), None)
    # The hook updates the attribute only at the next call.
    weight: Tensor = module.weight if hook is None else hook.compute_weight(module)
    return weight


def _batch_norm_scales(network: nn.Module, graph: ChannelGraph) -> Iterator[tuple[Axis, Tensor]]:
    for path, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{path}.weight" in graph.tensors:
            yield graph.tensors[f"{path}.weight"][0], module.weight


def _per_unit(weights: Iterable[tuple[Axis, Tensor]], channels: Mapping[str, int]) -> dict[str, Tensor]:
    """Returns the sums of absolute values over the weights' first axes, by group: (units, entries per unit)."""
    sums: dict[str, list[Tensor]] = {}
    for axis, weight in weights:
        entries = weight.detach().cpu().double().abs().reshape(len(weight), -1).sum(1)
        start = 0
        for segment in axis:
            size = segment.size(channels)
            if segment.group is not None:
                sums.setdefault(segment.group, []).append(entries[start : start + size].view(-1, segment.count))
            start += size
    return {group: torch.cat(parts, 1) for group, parts in sums.items()}


def _origins(axis: Axis, channels: Mapping[str, int], orders: Mapping[str, Tensor]) -> Tensor:
    """Returns the present index of each entry of a permuted axis. A unit's entries are adjacent in every segment."""
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
