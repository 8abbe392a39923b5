"""Rules for what has no channels of its own: parameters that are read directly, and operations that pass labels on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from autoslim.networks.tracing import operations
from autoslim.networks.tracing.carrying import Carrier, NoRuleError, Rule, blank, leaves, operation
from autoslim.networks.tracing.flow import Flow
from autoslim.networks.tracing.joining import elementwise, functional_norm, matrix_product


def passing_module_rule(module: nn.Module) -> Rule | None:
    """The rule for a module that passes channels on."""
    if isinstance(module, operations.SPATIAL_MODULES):
        return _spatial
    if isinstance(module, operations.MOVEMENT_MODULES):
        return _movement
    known = type(module).__module__ in operations.ELEMENTWISE_HOMES
    return elementwise if known and not isinstance(module, operations.NOT_ELEMENTWISE) else None


def operation_rule(node: fx.Node) -> Rule | None:
    """The rule for a function or a method."""
    if isinstance(node.target, type) and issubclass(node.target, tuple):
        return _container
    name = operation(node)
    rules = (
        (operations.ELEMENTWISE, elementwise),
        (operations.MOVEMENT, _movement),
        (operations.CREATIONS, _creation),
        (operations.SPATIAL, _spatial),
        (operations.REDUCTIONS, _reduction),
        (operations.FUNCTIONAL_NORMS, functional_norm),
        (operations.MATRIX_PRODUCTS, matrix_product),
    )
    return next((rule for names, rule in rules if name in names), None)


def read_tensor(carrier: Carrier, name: str, value: Any) -> Flow | None:
    """A parameter or buffer that ``forward`` reads by itself: a vector of numbers may be one for each channel."""
    if not isinstance(value, Tensor):
        return None
    name = carrier.record.first_name.get(name, name)
    long = [axis for axis in range(value.dim()) if value.size(axis) > 1]
    if len(long) != 1 or not value.is_floating_point():
        return Flow(value.shape)
    vector = carrier.record.labels.produce(name, value.size(long[0]))
    if long[0] not in carrier.record.tensors.get(name, {}):
        carrier.record.index(name, long[0], vector)
    return Flow(value.shape, long[0], vector)


def _container(carrier: Carrier, node: fx.Node, value: Any) -> Any:
    """A named tuple of outputs, such as those of networks with auxiliary heads."""
    return fx.node.map_arg((node.args, node.kwargs), lambda other: carrier.flows[other])


def _movement(carrier: Carrier, node: fx.Node, value: Any) -> Any:
    """Whatever only moves elements is run on the labels themselves."""
    flows = carrier.all_given(node)
    if all(flow.is_constant for flow in flows):
        return blank(value)
    name = operation(node)
    if name in operations.JOINS and isinstance(value, Tensor) and (joined := _joined(flows, value)) is not None:
        return joined
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda other: _labels_or_value(carrier, other))
    if node.op == "call_module":
        moved = carrier.modules[str(node.target)](*args, **kwargs)
    elif node.op == "call_method":
        # The labels of a tensor are a view that repeats, which cannot always be viewed again.
        moved = getattr(args[0], "reshape" if name == "view" else name)(*args[1:], **kwargs)
    else:
        if name == "getitem" and any(isinstance(index, Tensor) for index in leaves(args[1])):
            raise NoRuleError  # which elements are taken stands in the data
        moved = node.target(*args, **kwargs)  # type: ignore[operator]
    if isinstance(moved, Tensor):
        return Flow.of(moved)
    pieces = tuple(Flow.of(piece) if isinstance(piece, Tensor) else None for piece in moved)
    if name in operations.SPLITS:
        _tie_pieces(carrier, pieces)
    return pieces


def _joined(flows: Sequence[Flow], value: Tensor) -> Flow | None:
    """The flow of a concatenation along the channels' axis; None for any other."""
    axes = {flow.axis for flow in flows if not flow.is_constant}
    axis = axes.pop()
    if axes or axis is None or sum(flow.shape[axis] for flow in flows) != value.shape[axis]:
        return None
    along = [flow.along(axis) for flow in flows]
    return Flow(value.shape, axis, np.concatenate([vector for vector in along if vector is not None]))


def _labels_or_value(carrier: Carrier, node: fx.Node) -> Any:
    flow = carrier.flows[node]
    if flow is None:
        return carrier.values[node]
    return fx.node.map_aggregate(flow, lambda leaf: leaf.full() if isinstance(leaf, Flow) else leaf)


def _tie_pieces(carrier: Carrier, pieces: Sequence[Flow | None]) -> None:
    """Equal pieces of a split stay equal."""
    first = pieces[0]
    for piece in pieces[1:]:
        if first is None or piece is None or piece.axis is None or piece.axis != first.axis:
            continue
        if len(piece.vector) == len(first.vector):
            reason = "its tensor is split evenly beside channels that must stay"
            carrier.record.labels.unite(first.vector, piece.vector, reason)


def _creation(_carrier: Carrier, _node: fx.Node, value: Tensor) -> Any:
    """A new tensor of the kind of another: no channel of that is in it."""
    return blank(value)


def _spatial(carrier: Carrier, node: fx.Node, value: Any) -> Flow:
    flow = carrier.given(node)
    if not isinstance(value, Tensor) or flow.is_mixed:
        raise NoRuleError
    axis = 1 if flow.axis is None else flow.axis
    if value.shape[axis] != flow.shape[axis]:
        if flow.is_constant:
            return Flow(value.shape)
        raise NoRuleError
    if _is_average_pool(carrier, node):
        vector = flow.along(axis)
        assert vector is not None
        area, positions = int(np.prod(flow.shape[2:])), int(np.prod(value.shape[2:]))
        carrier.call(node, "avgpool", area, None, vector, positions)
    return flow.reshaped_like(value.shape)


def _is_average_pool(carrier: Carrier, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(carrier.modules[str(node.target)], operations.AVERAGE_POOLS)
    return operation(node) in operations.AVERAGING


def _reduction(carrier: Carrier, node: fx.Node, value: Any) -> Flow:
    flow = carrier.given(node)
    place = 2 if operation(node) == "norm" else 1  # after its order
    dims = node.kwargs.get("dim", node.args[place] if len(node.args) > place else None)
    if not isinstance(value, Tensor):
        raise NoRuleError
    if flow.is_constant:
        return Flow(value.shape)
    if not isinstance(dims, int | tuple | list):
        raise NoRuleError
    given = [dims] if isinstance(dims, int) else dims
    reduced = {int(dim) % len(flow.shape) for dim in given}
    if flow.axis is None:
        return _mixed_reduction(carrier, flow, reduced, value.shape)
    if flow.axis in reduced:
        return Flow(value.shape)  # a sum over the channels, whatever their number
    if len(value.shape) == len(flow.shape):
        return flow.reshaped_like(value.shape)
    return Flow(value.shape, flow.axis - sum(dim < flow.axis for dim in reduced), flow.vector)


def _mixed_reduction(carrier: Carrier, flow: Flow, reduced: set[int], shape: torch.Size) -> Flow:
    """Channels that are summed up, as the branches of a selective kernel, come and go together."""
    labels, rest = flow.narrowed(), flow.full()
    for axis in reduced:
        first = labels.narrow(axis, 0, 1).expand_as(labels)
        carrier.record.labels.unite(first.flatten().numpy(), labels.flatten().numpy(), "it is summed up with others")
        rest = rest.narrow(axis, 0, 1)
    return Flow.of(rest.reshape(shape))
