"""Trained weights put into a network: whether they are this network's, and what is new where the classes are."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoslim.networks.copying import copy_with
from autoslim.networks.graph import ChannelGraph
from autoslim.networks.initialisation import initialise
from autoslim.networks.tracing.record import IS_OUTPUT
from autoslim.vocabulary.errors import UserError


def with_weights(
    network: nn.Module, graph: ChannelGraph, tensors: Mapping[str, Tensor], seed: int, *, source: str
) -> tuple[nn.Module, list[str]]:
    """A copy of ``network`` with trained tensors, and the layers for which there were none of the right shape.

    These are the layers that give the classes, where ``tensors`` come from other classes: their weights are drawn anew
    (see ``initialise``). Tensors of an auxiliary head that is switched off in ``network`` (None) are left out.

    Args:
        graph: ``trace`` of ``network``.
        source: names ``tensors`` in messages.

    Raises:
        UserError: they are not of this network: some lack, are too many, or have another shape.
    """
    given = {name: tensor for name, tensor in tensors.items() if not _switched_off(network, name)}
    own = network.state_dict(keep_vars=True)
    _check_names(own, given, source)
    new = _layers_of_other_classes(own, given, graph, source)
    start = copy_with(network, lambda _, tensor: tensor.clone(memory_format=torch.preserve_format))
    start.load_state_dict({name: given[name] for name in given if name.rpartition(".")[0] not in new}, strict=False)
    initialise(nn.ModuleList([start.get_submodule(layer) for layer in new]), seed)
    return start, new


def check_covered(graph: ChannelGraph, widest: Mapping[str, int]) -> None:
    """Raises:
    UserError: a supernet has channels that a trained network at its default sizes has no weights for.
    """
    for name, group in graph.groups.items():
        if widest[name] > group.size:
            raise UserError(
                f"the supernet has {widest[name]} channels in group {name}, but model.weights have {group.size}; set "
                "supernet.width to 1.0, or lower supernet.width and supernet.grid.divisor"
            )


def _switched_off(network: nn.Module, name: str) -> bool:
    top, dot, _ = name.partition(".")
    return bool(dot) and getattr(network, top, network) is None


def _check_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    there = {id(own[name]) for name in given if name in own}  # a tensor with several names is given under one of them
    lacking = [n for n, tensor in own.items() if id(tensor) not in there and not n.endswith("num_batches_tracked")]
    if lacking:
        raise UserError(f"{source} lack {_some(lacking)} of this network; give the weights of this network, whole")
    if unknown := [name for name in given if name not in own]:
        raise UserError(f"{source} have {_some(unknown)}, which this network has not; give the weights of this network")


def _layers_of_other_classes(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], graph: ChannelGraph, source: str
) -> list[str]:
    """The layers whose tensors have another shape, as far as that is because they give the classes."""
    layers = []
    for name, theirs in given.items():
        ours = own[name]
        if theirs.shape == ours.shape:
            continue
        layer = name.rpartition(".")[0]
        if graph.fixed.get(layer) != IS_OUTPUT or theirs.shape[1:] != ours.shape[1:]:
            raise UserError(f"{source} {_misfit(name, theirs, ours, graph)}")
        layers.append(layer)
    return list(dict.fromkeys(layers))


def _misfit(name: str, theirs: Tensor, ours: Tensor, graph: ChannelGraph) -> str:
    sizes = ("x".join(map(str, tensor.shape)) or "a number" for tensor in (theirs, ours))
    remedy = "correct model.kwargs, or give the weights of this network"
    if ours.dim() == theirs.dim() == 4 and ours.shape[1] == graph.input_shape[0] != theirs.shape[1]:
        remedy = f"they are for images of {theirs.shape[1]} channels: set data.channels and model.kwargs so"
    return "have {} of {}, this network of {}; {}".format(name, *sizes, remedy)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
