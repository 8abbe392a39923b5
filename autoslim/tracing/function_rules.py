"""Rules for functions, methods and modules that have no channels themselves."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from autoslim.tracing import operations
from autoslim.tracing.attributes import SIZED, Source
from autoslim.tracing.labels import Flow, Vector, flow_of_axes
from autoslim.tracing.operations import operation
from autoslim.tracing.record import Carrier, NoRuleError, Rule, blank, describe


def passing_module_rule(module: nn.Module) -> Rule | None:
    """Returns the rule for a module that passes channels on, or None."""
    rules: tuple[tuple[type | tuple[type, ...], Rule], ...] = (
        (operations.SPATIAL_MODULES, _spatial),
        (operations.UNPOOLING_MODULES, _unpooling),
        (nn.PixelShuffle, _pixel_shuffle),
        (operations.MOVEMENT_MODULES, _movement),
        (nn.GLU, _gate),
    )
    for kinds, rule in rules:
        if isinstance(module, kinds):
            return rule
    known = type(module).__module__ in operations.ELEMENTWISE_HOMES
    return elementwise if known and not isinstance(module, operations.NOT_ELEMENTWISE) else None


def operation_rule(node: fx.Node) -> Rule | None:
    """Returns the rule for a function or a method, or None."""
    if isinstance(node.target, type) and (issubclass(node.target, tuple) or dataclasses.is_dataclass(node.target)):
        return _container
    name = operation(node)
    if name == "getattr" and node.args[1] in _FIELDS:
        return _field
    rules = (
        (operations.CONVERSIONS, _conversion),
        (operations.ELEMENTWISE, elementwise),
        (frozenset({"pixel_shuffle"}), _pixel_shuffle),
        (operations.MOVEMENT, _movement),
        (operations.CREATIONS, _creation),
        (operations.SPATIAL, _spatial),
        (operations.SELECTIONS, _selection),
        (operations.UNPOOLING, _unpooling),
        (operations.REDUCTIONS, _reduction),
        (operations.GATES, _gate),
        (operations.FUNCTIONAL_NORMS, functional_norm),
        (operations.MATRIX_PRODUCTS, matrix_product),
    )
    return next((rule for names, rule in rules if name in names), None)


def _container(carrier: Carrier, node: fx.Node, value: Any) -> Any:
    """Handles a named tuple or a dataclass of outputs, as networks with auxiliary heads return."""
    return fx.node.map_arg((node.args, node.kwargs), lambda other: carrier.flows[other])


_FIELDS = ("values", "indices")


def _field(carrier: Carrier, node: fx.Node, _value: Tensor) -> Flow:
    """Handles ``torch.max(x, 1).values`` and ``.indices``."""
    flows = carrier.flows[node.all_input_nodes[0]]
    if not isinstance(flows, tuple):
        raise NoRuleError("it reads a field of something else than the maxima and their indices")
    flow: Flow = flows[_FIELDS.index(str(node.args[1]))]
    return flow


def _conversion(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Handles ``to`` and ``type_as``, which may read the dtype of another tensor."""
    flow = carrier.input_flow(node)
    return flow.reshaped_like(value.shape) if not flow.is_mixed else flow


def _selection(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Handles ``index_select``, which reads some positions of each channel."""
    flow = carrier.input_flow(node)
    given = dict(zip(("input", "dim", "index"), node.args, strict=False)) | node.kwargs
    axis = given["dim"]
    assert isinstance(axis, int)
    axis %= len(flow.shape)
    if flow.is_mixed or axis == flow.axis:
        raise NoRuleError("it selects channels by an index tensor")
    return flow.reshaped_like(value.shape)


def _pixel_shuffle(carrier: Carrier, node: fx.Node, value: Tensor) -> Any:
    """Unites the r * r channels that a pixel shuffle combines into one: they can only be removed together."""
    flow = carrier.input_flow(node)
    axis = len(value.shape) - 3
    if flow.axis != axis:
        return _movement(carrier, node, value)
    area = flow.shape[axis] // value.shape[axis]
    shuffled = flow.vector[::area]
    reason = f"{describe(node, carrier.modules)} combines it with channels that are not prunable"
    carrier.record.labels.unite(np.repeat(shuffled, area), flow.vector, reason)
    return Flow(value.shape, axis, shuffled)


def _movement(carrier: Carrier, node: fx.Node, value: Any) -> Any:
    """Handles operations that only move elements by running them on the labels."""
    flows = carrier.input_flows(node)
    name = "" if node.op == "call_module" else operation(node)
    if name in operations.EXPANSIONS and (vectors := expanded_axes(carrier, node, flows[0].shape, value.shape)):
        axis = None if flows[0].axis is None else flows[0].axis + len(value.shape) - len(flows[0].shape)
        if flows[0].is_mixed:
            raise NoRuleError("its channels lie along several axes")
        return flow_of_axes(value.shape, vectors if axis is None else vectors | {axis: flows[0].vector})
    if all(flow.is_constant for flow in flows):
        return blank(value)
    if name == "stack" and (stacked := _stacked(carrier, node, flows, value)):
        return stacked
    if name in operations.JOINS and isinstance(value, Tensor) and (joined := _joined(carrier, node, flows, value)):
        return joined
    moved = run_on_labels(carrier, node, lambda other: _labels_or_value(carrier, other))
    if isinstance(moved, Tensor):
        flow = Flow.of(moved)
        _record_sizes(carrier, node, flows[0], (flow,))
        return flow
    pieces = tuple(Flow.of(piece) if isinstance(piece, Tensor) else None for piece in moved)
    _record_sizes(carrier, node, flows[0], pieces)
    if name in operations.SPLITS:
        tie_pieces(carrier, pieces)
    return pieces


def expanded_axes(carrier: Carrier, node: fx.Node, before: torch.Size, after: torch.Size) -> dict[int, Vector]:
    """Returns the labels of the axes of size 1 that ``expand`` or ``repeat`` expands to a number of channels."""
    arguments = node.args[1:] or tuple(node.kwargs.values())
    sizes = arguments[0] if isinstance(arguments[0], list | tuple) else arguments
    vectors = {}
    for axis, size in enumerate(sizes):
        own = axis - len(after) + len(before)
        if own < 0 or before[own] == 1:
            vector = _size_labels(carrier, f"forward:{node.name}", size, after[axis])
            if vector is not None and vector.any():
                vectors[axis] = vector
    return vectors


def _size_labels(carrier: Carrier, name: str, size: Any, count: int) -> Vector | None:
    """Returns labels for an axis whose size is given by an attribute of a module, or is that of another axis.

    ``name`` is that of new labels. Returns None if ``size`` is a number or is computed.
    """
    if source := _source(size):
        vector = carrier.record.labels.produce(name, count)
        carrier.record.size(source, vector)
        return vector
    if not isinstance(size, fx.Node) or operation(size) not in ("getitem", "size"):
        return None
    of, *index = size.args
    if operation(size) == "getitem" and isinstance(of, fx.Node):
        of = _of_shape(of)
    flow = carrier.flows.get(of) if isinstance(of, fx.Node) else None
    if not isinstance(flow, Flow) or len(index) != 1 or not isinstance(index[0], int):
        return None
    return flow.along(index[0])


def _of_shape(node: fx.Node) -> Any:
    """Returns the node of the tensor whose shape ``node`` is, or None."""
    is_shape = (operation(node) == "size" and len(node.args) == 1) or node.args[1:] == ("shape",)
    return node.args[0] if is_shape else None


def _stacked(carrier: Carrier, node: fx.Node, flows: Sequence[Flow], value: Tensor) -> Flow | None:
    """Unites the channels of stacked tensors, which have equal shapes. Returns None if they lie along other axes."""
    first = next(flow for flow in flows if not flow.is_constant)
    vectors = [flow.along(first.axis) for flow in flows] if first.axis is not None else []
    if first.axis is None or any(vector is None for vector in vectors):
        return None
    for vector in vectors:
        assert vector is not None
        carrier.record.labels.unite(first.vector, vector, _combined_with_constant(carrier, node))
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    assert isinstance(dim, int)
    return Flow(value.shape, first.axis + (dim % len(value.shape) <= first.axis), first.vector)


def run_on_labels(carrier: Carrier, node: fx.Node, labels: Callable[[fx.Node], Any]) -> Any:
    """Returns the output of an operation that only moves elements, given ``labels`` instead of the tensors it reads."""
    name = operation(node)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), labels)
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
    return moved


def _record_sizes(carrier: Carrier, node: fx.Node, flow: Flow, outputs: Sequence[Flow | None]) -> None:
    """Records the attributes of modules from which the sizes of the outputs come (see ``tracing.attributes``)."""
    name = operation(node)
    if node.op == "call_module" and (output := outputs[0]) is not None:
        module = carrier.modules[name]
        if isinstance(module, nn.Unflatten) and all(isinstance(size, int) for size in module.unflattened_size):
            first = int(module.dim) % len(flow.shape)
            for index, size in enumerate(module.unflattened_size):
                if size > 0:
                    _record_size(carrier, Source(name, "unflattened_size", index), output, first + index)
    arguments = [*node.args[1:], *node.kwargs.values()]
    if name not in SIZED or not arguments:
        return
    if name == "split":
        sizes = arguments[0]
        for size, output in zip(sizes if isinstance(sizes, list | tuple) else [sizes], outputs, strict=False):
            if (source := _source(size)) and output is not None and output.axis is not None:
                carrier.record.size(source, output.vector)
    elif name == "getitem":
        indices = arguments[0] if isinstance(arguments[0], tuple) else (arguments[0],)
        for axis, index in enumerate(indices):
            if isinstance(index, slice) and axis == flow.axis:
                for bound in (index.start, index.stop):
                    if (source := _source(bound)) and (end := carrier.values[bound]) <= len(flow.vector):
                        carrier.record.size(source, flow.vector[:end])
    elif (output := outputs[0]) is not None:
        sizes = arguments[0] if isinstance(arguments[0], list | tuple) else arguments
        for axis, size in enumerate(sizes):
            if source := _source(size):
                _record_size(carrier, source, output, axis)
        numbers = {axis for axis, size in enumerate(sizes) if isinstance(size, int) and size > 0}
        if not carrier.at_one_size and (varying := output.varying()) and numbers.issuperset(varying):
            carrier.record.written.append(output.labels())


def _record_size(carrier: Carrier, source: Source, flow: Flow, axis: int) -> None:
    """Records that the size of an axis comes from an attribute, at once or when channels are united along the axis."""
    if flow.axis == axis:
        carrier.record.size(source, flow.vector)
    elif flow.is_mixed:
        carrier.mixed_sizes.append((source, flow, axis))


def _source(value: Any) -> Source | None:
    """Returns the attribute that a size comes from, if it is an operation that reads one."""
    return value.meta.get("source") if isinstance(value, fx.Node) else None


def _joined(carrier: Carrier, node: fx.Node, flows: Sequence[Flow], value: Tensor) -> Flow | None:
    """Returns the flow of a concatenation, or None if the channels lie along several axes.

    A concatenation along another axis than that of the channels unites them.
    """
    axes = {flow.axis for flow in flows if not flow.is_constant}
    axis = axes.pop()
    if axes or axis is None:
        return None
    along = [vector for flow in flows if (vector := flow.along(axis)) is not None]
    if sum(map(len, along)) == value.shape[axis]:
        return Flow(value.shape, axis, np.concatenate(along))
    first = flows.index(next(flow for flow in flows if flow.axis == axis))
    for vector in along:
        carrier.record.labels.unite(along[first], vector, _combined_with_constant(carrier, node))
    return Flow(value.shape, axis, along[first])


def _labels_or_value(carrier: Carrier, node: fx.Node) -> Any:
    flow = carrier.flows[node]
    if flow is None:
        return carrier.values[node]
    return fx.node.map_aggregate(flow, lambda leaf: leaf.full() if isinstance(leaf, Flow) else leaf)


def tie_pieces(carrier: Carrier, pieces: Sequence[Flow | None]) -> None:
    """Unites the pieces of an even split, which must keep equal sizes."""
    first = pieces[0]
    for piece in pieces[1:]:
        if first is None or piece is None or piece.axis is None or piece.axis != first.axis:
            continue
        if len(piece.vector) == len(first.vector):
            reason = "its tensor is split evenly together with channels that are not prunable"
            carrier.record.labels.unite(first.vector, piece.vector, reason)


def _creation(carrier: Carrier, node: fx.Node, value: Tensor) -> Any:
    """Handles functions that create a new tensor of another's dtype and device.

    It has channels along an axis whose size comes from an attribute of a module, as the state of a ConvLSTM does, or is
    the number of another tensor's channels.
    """
    if operation(node) == "new_tensor" or len(node.args) < 2:
        return blank(value)
    of = _of_shape(node.args[1]) if isinstance(node.args[1], fx.Node) else None
    if of is not None and isinstance(flow := carrier.flows[of], Flow) and not flow.is_mixed:
        return flow.reshaped_like(value.shape)
    sizes = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
    vectors = {}
    for axis, (size, count) in enumerate(zip(sizes, value.shape, strict=False)):
        vector = _size_labels(carrier, f"forward:{node.name}", size, count)
        if vector is not None and vector.any():
            vectors[axis] = vector
    return flow_of_axes(value.shape, vectors) if len(vectors) == 1 else blank(value)


def _spatial(carrier: Carrier, node: fx.Node, value: Any) -> Any:
    """Handles pooling, padding and interpolation, which act on the pixels of each channel."""
    if not isinstance(value, Tensor):  # the maxima and their indices
        return tuple(_spatial(carrier, node, part) for part in value)
    flow = carrier.input_flow(node)
    if flow.is_mixed and value.shape[1:2] == flow.shape[1:2]:
        carrier.gather(flow, 1, node)
    if flow.is_mixed:
        raise NoRuleError("its channels lie along several axes")
    axis = 1 if flow.axis is None else flow.axis
    if value.shape[axis] != flow.shape[axis]:
        if flow.is_constant:
            return Flow(value.shape)
        if operation(node) == "pad":
            return _padded(node, flow, value)
        raise NoRuleError("it changes the number of channels")
    if _is_average_pool(carrier, node):
        vector = flow.along(axis)
        assert vector is not None
        area, positions = int(np.prod(flow.shape[2:])), int(np.prod(value.shape[2:]))
        carrier.call(node, "avgpool", area, None, vector, positions)
    return flow.reshaped_like(value.shape)


def _padded(node: fx.Node, flow: Flow, value: Tensor) -> Flow:
    """Handles constant channels before and after the others, as in shortcuts without weights (ResNet's option A)."""
    given = dict(zip(("input", "pad", "mode"), node.args, strict=False)) | node.kwargs
    sizes, axis = given["pad"], flow.axis
    assert axis is not None
    assert isinstance(sizes, list | tuple)
    before, after = sizes[2 * (len(flow.shape) - 1 - axis) :][:2]
    if given.get("mode", "constant") != "constant" or not isinstance(before, int) or not isinstance(after, int):
        raise NoRuleError("it adds channels that are not constants of a fixed number")
    if min(before, after) < 0:
        raise NoRuleError("it removes channels")
    added = [np.zeros(count, np.int64) for count in (before, after)]
    return Flow(value.shape, axis, np.concatenate([added[0], flow.vector, added[1]]))


def _unpooling(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Handles max unpooling, which reads maxima and their indices within each channel."""
    flow, indices = carrier.input_flows(node)
    if flow.is_mixed or indices.is_mixed or flow.axis != indices.axis:
        raise NoRuleError("its channels lie along another axis than those of its indices")
    if flow.axis is not None:
        carrier.record.labels.unite(flow.vector, indices.vector, _combined_with_constant(carrier, node))
    return flow.reshaped_like(value.shape)


def _gate(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Handles a gated linear unit, which multiplies one half of its input by a gate that the other half opens."""
    flow = carrier.input_flow(node)
    if flow.is_mixed:
        raise NoRuleError("its channels lie along several axes")
    if flow.axis is None or flow.shape[flow.axis] == value.shape[flow.axis]:
        return flow.reshaped_like(value.shape)  # it halves another axis
    first, second = np.split(flow.vector, 2)
    carrier.record.labels.unite(first, second, "it is multiplied by channels that are not prunable")
    return Flow(value.shape, flow.axis, first)


def _is_average_pool(carrier: Carrier, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(carrier.modules[str(node.target)], operations.AVERAGE_POOLS)
    return operation(node) in operations.AVERAGING


def _reduction(carrier: Carrier, node: fx.Node, value: Any) -> Any:
    """Handles reductions over some axes, such as sums and means."""
    if operation(node) in operations.EXTREMA and len(carrier.input_flows(node)) == 2:
        return elementwise(carrier, node, value)
    if not isinstance(value, Tensor):  # several tensors, such as maxima and their indices
        return tuple(_reduction(carrier, node, part) for part in value)
    flow = carrier.input_flow(node)
    if flow.is_constant:
        return Flow(value.shape)
    reduced = reduced_axes(node, len(flow.shape))
    if reduced is None:
        raise NoRuleError("its axes are not numbers")
    if len(varying := flow.varying()) > 1 and reduced.issuperset(varying):
        return Flow(value.shape)
    if flow.axis is None:
        return _mixed_reduction(carrier, flow, reduced, value.shape)
    if flow.axis in reduced:
        return Flow(value.shape)  # summed over any number of channels
    if len(value.shape) == len(flow.shape):
        return flow.reshaped_like(value.shape)
    return Flow(value.shape, flow.axis - sum(dim < flow.axis for dim in reduced), flow.vector)


def reduced_axes(node: fx.Node, rank: int) -> set[int] | None:
    """Returns the axes over which a reduction of a tensor of ``rank`` axes is computed, or None if it is not known."""
    position = 2 if operation(node) == "norm" else 1  # the first argument of norm is its order
    dims = next((node.kwargs[name] for name in ("dim", "axis") if name in node.kwargs), None)
    if dims is None and len(node.args) > position:
        dims = node.args[position]
    if dims is None:
        return set(range(rank))
    if not isinstance(dims, int | tuple | list):
        return None
    return {int(dim) % rank for dim in ([dims] if isinstance(dims, int) else dims)}


def _mixed_reduction(carrier: Carrier, flow: Flow, reduced: set[int], shape: torch.Size) -> Flow:
    """Unites channels that are summed, such as those of the branches of a selective kernel."""
    labels, rest = flow.narrowed(), flow.full()
    for axis in reduced:
        first = labels.narrow(axis, 0, 1).expand_as(labels)
        carrier.record.labels.unite(
            first.flatten().numpy(), labels.flatten().numpy(), "it is added to channels that are not prunable"
        )
        rest = rest.narrow(axis, 0, 1)
    return Flow.of(rest.reshape(shape))


def elementwise(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Handles elementwise operations such as sums, products and activations, with broadcasting."""
    flows = [_unless_one_channel(carrier, node, flow, value.shape) for flow in carrier.input_flows(node)]
    shape = value.shape
    if any(flow.is_mixed for flow in flows):
        return _mixed(carrier, node, flows, shape)
    leader = max(
        (flow for flow in flows if flow.axis is not None),
        key=lambda flow: (flow.shape == shape, len(flow.vector)),
        default=None,
    )
    if leader is None or leader.axis is None:
        return Flow(shape)
    axis = leader.axis - len(leader.shape) + len(shape)
    for flow in flows:
        if flow is leader:
            continue
        own = axis - len(shape) + len(flow.shape)
        across = flow.axis not in (None, own)  # such as the weights of several branches
        if across:
            carrier.freeze([flow], f"{describe(node, carrier.modules)} broadcasts it against other channels")
        if (flow.shape[own] if own >= 0 else 1) == len(leader.vector):
            other = np.zeros_like(leader.vector) if across else flow.along(own)
            assert other is not None
            carrier.record.labels.unite(leader.vector, other, _combined_with_constant(carrier, node))
    return Flow(shape, axis, leader.vector)


def _unless_one_channel(carrier: Carrier, node: fx.Node, flow: Flow, shape: torch.Size) -> Flow:
    """Returns a flow without channels instead of one of a single channel that is broadcast, which keeps its place."""
    if not flow.is_mixed or flow.varying() or (flow.shape == shape and not operation(node).endswith("_like")):
        return flow
    if not operation(node).endswith("_like"):
        carrier.freeze([flow], f"{describe(node, carrier.modules)} combines this channel with others")
    return Flow(flow.shape)


def _mixed(carrier: Carrier, node: fx.Node, flows: list[Flow], shape: torch.Size) -> Flow:
    """Unites the labels element by element if channels lie along several axes, as in a selective kernel."""
    whole = [flow for flow in flows if flow.shape == shape and not flow.is_constant]
    leader = next((flow for flow in whole if flow.is_mixed), whole[0] if whole else None)
    if leader is None:
        raise NoRuleError("it broadcasts channels that lie along several axes")
    for flow in flows:
        if flow is leader:
            continue
        sizes = (1,) * (len(shape) - len(flow.shape)) + tuple(flow.shape)
        if flow.is_constant and all(sizes[axis] == 1 for axis in leader.varying()):
            continue
        one, other = torch.broadcast_tensors(leader.narrowed(), flow.narrowed())
        carrier.record.labels.unite(
            one.flatten().numpy(), other.flatten().numpy(), _combined_with_constant(carrier, node)
        )
    return leader


def _combined_with_constant(carrier: Carrier, node: fx.Node) -> str:
    return f"{describe(node, carrier.modules)} combines it with a tensor of fixed size"


def functional_norm(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Handles ``F.layer_norm``, ``F.batch_norm`` and similar functions with one parameter per channel."""
    flow, *parameters = carrier.input_flows(node)
    vector = carrier.along(flow, len(flow.shape) - 1 if operation(node) in ("layer_norm", "rms_norm") else 1, node)
    for parameter in parameters:
        if not parameter.is_constant:
            reason = "it is normalised with parameters that are not prunable"
            carrier.record.labels.unite(vector, parameter.labels(), reason)
    return flow.reshaped_like(value.shape)


def matrix_product(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Handles a batched product of activations: unites the channels that are summed over, and passes on the others."""
    left, right = carrier.input_flows(node)
    rank = len(value.shape)
    if left.is_mixed or right.is_mixed or not len(left.shape) == len(right.shape) == rank > 2:
        raise NoRuleError(
            "it is not a batched product of activations"
        )  # a product with one matrix would cost multiply-adds
    rows, columns = left.axis == rank - 2, right.axis == rank - 1
    if (rows and columns) or any(flow.axis is not None and flow.axis < rank - 2 for flow in (left, right)):
        raise NoRuleError("its channels lie along several axes or along the batch")
    carrier.record.labels.unite(_along(left, rank - 1), _along(right, rank - 2), _combined_with_constant(carrier, node))
    if rows:
        return Flow(value.shape, rank - 2, left.vector)
    return Flow(value.shape, rank - 1, right.vector) if columns else Flow(value.shape)


def _along(flow: Flow, axis: int) -> Vector:
    return flow.vector if flow.axis == axis else np.zeros(flow.shape[axis], np.int64)
