"""Describes one part of a network, for networks that cannot be traced as a whole, such as detectors."""

import dataclasses
import difflib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoslim.channels.copying import copy_with, named_tensors
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Axis
from autoslim.channels.inputs import Arguments
from autoslim.channels.memory import Operation
from autoslim.channels.resize import resize
from autoslim.errors import UserError, first_line


def part_inputs(network: nn.Module, part: str, example: Arguments) -> Arguments:
    """Returns the arguments that module ``part`` gets while a copy of the whole network runs on ``example``.

    Raises:
        UserError: There is no such module, the network does not run on the example, or the part cannot be slimmed
            alone: the network does not call it exactly once, calls a module inside it from outside, or gives it another
            number of items than the example has.
    """
    name = type(network).__name__
    modules = dict(network.named_modules())
    if part not in modules:
        near = difflib.get_close_matches(part, modules, n=3, cutoff=0.4)
        raise UserError(
            f"part {part!r} is not a module of {name}; "
            + (f"similar names: {', '.join(near)}" if near else "use the paths that named_modules() returns")
        )
    received: list[Arguments] = []
    from_outside: Counter[str] = Counter()
    running = 0

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal running
        running += 1
        received.append(Arguments(args, kwargs))

    def leave(*_: Any) -> None:
        nonlocal running
        running -= 1

    copied = copy_with(network, lambda _, tensor: tensor.clone()).eval()
    target = copied.get_submodule(part)
    target.register_forward_pre_hook(enter, with_kwargs=True)
    target.register_forward_hook(leave)
    for path, module in target.named_modules(prefix=part):
        if module is not target:
            module.register_forward_pre_hook(lambda *_, path=path: None if running else from_outside.update([path]))
    _run(copied, example, f"{name} does not run on the example", "give inputs that it accepts in evaluation mode")
    if len(received) != 1:
        inside = f", but {min(from_outside)!r} inside it" if from_outside else ""
        called = f"{len(received)} times" if received else f"not at all{inside}"
        raise UserError(f"{name} calls part {part!r} {called}; name a module that it calls once")
    if from_outside:
        raise UserError(
            f"{name} calls {min(from_outside)!r}, which is inside part {part!r}, also from outside of it; name a part "
            "that contains both calls"
        )
    images = _number_of_images(example)
    for tensor in received[0].tensors:
        if tensor.dim() == 0 or len(tensor) != images:
            raise UserError(
                f"part {part!r} gets a tensor of shape {tuple(tensor.shape)} for {images} "
                f"input{'s' if images > 1 else ''}, so its costs for one input are not known; name a part that gets "
                "one item for each input"
            )
    return received[0]


def leaves_inside(part: str, leaves: Iterable[str]) -> list[str]:
    """Returns the paths of leaf modules from ``part`` on.

    Raises:
        UserError: A leaf module is not inside the part.
    """
    prefix = f"{part}."
    for leaf in leaves:
        if not leaf.startswith(prefix):
            raise UserError(f"leaf module {leaf!r} is not inside part {part!r}; omit it")
    return [leaf.removeprefix(prefix) for leaf in leaves]


def graph_within(network: nn.Module, part: str, graph: ChannelGraph, example: Arguments) -> ChannelGraph:
    """Returns the graph of ``part`` with the names of the whole network, which is verified by running it resized.

    Raises:
        UserError: The part shares a tensor with the rest of the network, or the network does not run on ``example``
            with other numbers of channels in the part.
    """
    name = type(network).__name__
    renamed = _with_prefix(graph, part)
    tensors = named_tensors(network)
    outside = {id(tensor): path for path, tensor in tensors.items() if not path.startswith(f"{part}.")}
    for path in renamed.tensors:
        if shared := outside.get(id(tensors[path])):
            raise UserError(
                f"{path} in part {part!r} is the same tensor as {shared} outside of it; name a part that contains both"
            )
    half = {group.name: max(1, group.size // group.unit // 2) * group.unit for group in renamed.groups.values()}
    _run(
        resize(network, renamed, half).eval(),
        example,
        f"{name} does not run with half of the channels in part {part!r}",
        "the code outside of the part depends on their number: name a part that contains it",
    )
    return renamed


def _run(network: nn.Module, example: Arguments, failure: str, remedy: str) -> None:
    device = next((tensor.device for tensor in named_tensors(network).values()), torch.device("cpu"))
    try:
        with torch.no_grad():
            example.map(lambda tensor: tensor.to(device, copy=True)).run(network)
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"{failure}: {first_line(error)}; {remedy}") from error


def _number_of_images(example: Arguments) -> int:
    """Returns the batch size of the example. Detectors get a list with one tensor for each image."""
    first = next(iter((*example.args, *example.kwargs.values())), None)
    if isinstance(first, list | tuple):
        return len(first)
    tensor = next(leaf for leaf in tree_leaves((example.args, example.kwargs)) if isinstance(leaf, Tensor))
    return len(tensor)


def _with_prefix(graph: ChannelGraph, part: str) -> ChannelGraph:
    """Returns the graph with ``part`` in front of the names of modules, tensors and groups."""

    def full(name: str) -> str:
        return f"{part}.{name}"

    def named(axis: Axis) -> Axis:
        return tuple(dataclasses.replace(s, group=full(s.group)) if s.group is not None else s for s in axis)

    def operation(each: Operation) -> Operation:
        axes = tuple((dimension, named(axis)) for dimension, axis in each.axes)
        return dataclasses.replace(each, axes=axes, parts=tuple(map(operation, each.parts)))

    return dataclasses.replace(
        graph,
        part=part,
        groups={
            full(name): dataclasses.replace(
                group,
                name=full(name),
                members=tuple(map(full, group.members)),
                expansion=None if group.expansion is None else (full(group.expansion[0]), group.expansion[1]),
            )
            for name, group in graph.groups.items()
        },
        tensors={full(name): tuple(map(named, axes)) for name, axes in graph.tensors.items()},
        weights={full(name): axis for name, axis in graph.weights.items()},
        attributes=tuple(
            dataclasses.replace(each, module=full(each.module), axis=named(each.axis)) for each in graph.attributes
        ),
        layers=tuple(
            dataclasses.replace(
                layer,
                name=full(layer.name),
                inputs=named(layer.inputs),
                outputs=named(layer.outputs),
                weight=None if layer.weight is None else full(layer.weight),
            )
            for layer in graph.layers
        ),
        not_prunable={full(name): reason for name, reason in graph.not_prunable.items()},
        activations={name: (dimension, named(axis)) for name, (dimension, axis) in graph.activations.items()},
        leaves=frozenset(map(full, graph.leaves)),
        operations=tuple(map(operation, graph.operations)),
        element_bytes={full(name): size for name, size in graph.element_bytes.items()},
        parameter_names=frozenset(map(full, graph.parameter_names)),
        not_widenable={full(name): reason for name, reason in graph.not_widenable.items()},
    )
