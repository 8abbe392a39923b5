"""Rules for functions, methods and modules that have no channels of their own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from autoslim.tracing import operations
from autoslim.tracing.labels import Flow, Vector
from autoslim.tracing.operations import operation
from autoslim.tracing.record import Carrier, NoRuleError, Rule, blank, describe


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
        if name == "view" and isinstance(args[1], torch.dtype):
            raise NoRuleError("it reinterprets the elements as another dtype")
        # The labels are an expanded tensor, which ``view`` cannot always handle.
        moved = getattr(args[0], "reshape" if name == "view" else name)(*args[1:], **kwargs)
    else:
        if name == "getitem" and any(isinstance(index, Tensor) for index in tree_leaves(args[1])):
            raise NoRuleError("it selects elements by an index tensor")
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


def elementwise(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Sums, products, activations: element by element, the smaller tensor repeated."""
    flows = carrier.all_given(node)
    shape = value.shape
    if any(flow.is_mixed for flow in flows):
        return _mixed(carrier, node, flows, shape)
    leader = next((flow for flow in flows if flow.axis is not None), None)
    if leader is None or leader.axis is None:
        return Flow(shape)
    axis = leader.axis - len(leader.shape) + len(shape)
    for flow in flows:
        if flow is leader:
            continue
        own = axis - len(shape) + len(flow.shape)
        size = flow.shape[own] if own >= 0 else 1
        if size == len(leader.vector) and flow.axis in (None, own):
            other = flow.along(own)
            assert other is not None
            carrier.record.labels.unite(leader.vector, other, _joined_to_fixed(carrier, node))
        elif not flow.is_constant:
            reason = f"{describe(node, carrier.modules)} broadcasts channels against channels"
            carrier.freeze([leader, flow], reason)
    return Flow(shape, axis, leader.vector)


def _mixed(carrier: Carrier, node: fx.Node, flows: list[Flow], shape: torch.Size) -> Flow:
    """Where channels lie along several axes, as in the branches of a selective kernel, every element is united."""
    leader = next((flow for flow in flows if flow.is_mixed and flow.shape == shape), None)
    if leader is None:
        raise NoRuleError
    for flow in flows:
        if flow is leader:
            continue
        sizes = (1,) * (len(shape) - len(flow.shape)) + tuple(flow.shape)
        if flow.is_constant and all(sizes[axis] == 1 for axis in leader.varying()):
            continue
        one, other = torch.broadcast_tensors(leader.narrowed(), flow.narrowed())
        carrier.record.labels.unite(one.flatten().numpy(), other.flatten().numpy(), _joined_to_fixed(carrier, node))
    return leader


def _joined_to_fixed(carrier: Carrier, node: fx.Node) -> str:
    return f"{describe(node, carrier.modules)} joins it to a tensor of fixed size"


def functional_norm(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """``F.layer_norm``, ``F.batch_norm`` and the like with a number for each channel, as in channels-last networks."""
    flow, *parameters = carrier.all_given(node)
    vector = carrier.along(flow, len(flow.shape) - 1 if operation(node) == "layer_norm" else 1, node)
    for parameter in parameters:
        if not parameter.is_constant:
            reason = "it is normalised together with channels that must stay"
            carrier.record.labels.unite(vector, parameter.labels(), reason)
    return flow.reshaped_like(value.shape)


def matrix_product(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """A product of two stacks of matrices, each of activations: what is summed over is united, the rest passes on."""
    left, right = carrier.all_given(node)
    rank = len(value.shape)
    if left.is_mixed or right.is_mixed or not len(left.shape) == len(right.shape) == rank > 2:
        raise NoRuleError  # a product with one matrix is a linear layer and would cost something
    rows, columns = left.axis == rank - 2, right.axis == rank - 1
    if (rows and columns) or any(flow.axis is not None and flow.axis < rank - 2 for flow in (left, right)):
        raise NoRuleError
    carrier.record.labels.unite(_along(left, rank - 1), _along(right, rank - 2), _joined_to_fixed(carrier, node))
    if rows:
        return Flow(value.shape, rank - 2, left.vector)
    return Flow(value.shape, rank - 1, right.vector) if columns else Flow(value.shape)


def _along(flow: Flow, axis: int) -> Vector:
    return flow.vector if flow.axis == axis else np.zeros(flow.shape[axis], np.int64)
