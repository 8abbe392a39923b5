"""Rules for weights that ``forward`` computes with itself: layers written as functions, and weights that are computed.

Examples are convolutions whose weights are standardised, and blocks that add the weights of their branches.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from autoslim.errors import UserError
from autoslim.tracing import operations
from autoslim.tracing.function_rules import (
    elementwise,
    expanded_axes,
    passing_module_rule,
    reduced_axes,
    run_on_labels,
    tie_pieces,
)
from autoslim.tracing.labels import Flow, Vector, WeightFlow, flow_of_axes
from autoslim.tracing.layer_rules import tie_groups
from autoslim.tracing.operations import operation
from autoslim.tracing.record import Carrier, NoRuleError, Rule, describe, source_line


def read_tensor(carrier: Carrier, name: str, value: Any) -> Flow | WeightFlow | None:
    """Returns the flow of a parameter or buffer that ``forward`` reads; each of its axes may hold channels."""
    if not isinstance(value, Tensor):
        return None
    first_name = carrier.record.first_name.get(name)
    if first_name is None or not value.is_floating_point():  # a tensor that ``resize`` cannot change, or indices
        return Flow(value.shape)
    long = [axis for axis in range(value.dim()) if value.size(axis) > 1]
    known = carrier.record.tensors.get(first_name, {})
    vectors = {}
    for axis in long:
        if axis in known:
            vectors[axis] = known[axis]
            continue
        labels = carrier.record.labels
        vectors[axis] = labels.produce(first_name, value.size(axis)) if len(long) == 1 else labels.new(value.size(axis))
        carrier.record.index(first_name, axis, vectors[axis])
    _follow_owner(carrier, first_name, [vectors.get(axis, np.zeros(1, np.int64)) for axis in range(value.dim())])
    return flow_of_axes(value.shape, vectors)


def check_statistics(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Checks that ``forward`` passes the running statistics of batch norms to ``F.batch_norm`` only.

    Raises:
        UserError: It computes with them, but a supernet has none.
    """
    for node in graph.nodes:
        path, _, attribute = str(node.target).rpartition(".")
        computes = [user for user in node.users if operation(user) != "batch_norm"]
        statistic = node.op == "get_attr" and attribute in ("running_mean", "running_var")
        if statistic and computes and isinstance(modules.get(path), _BatchNorm):
            raise UserError(
                f"forward computes with {attribute} of the batch norm {path!r} ({source_line(computes[0])}), but a "
                "supernet has no running statistics; call the batch norm instead, and fuse the two after training"
            )


def functional_batch_norms(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the calls of ``F.batch_norm`` that update running statistics, or that read those of a batch norm.

    A supernet, which has no running statistics for each subnet, cannot run them. Calls that only read other tensors, as
    frozen batch norms do, are left out: their statistics are constants.
    """
    found = []
    for node in graph.nodes:
        given = dict(zip(_BATCH_NORM, node.args, strict=False)) | node.kwargs
        statistics = [s for name in _BATCH_NORM[1:3] if isinstance(s := given.get(name), fx.Node)]
        owners = [modules.get(str(s.target).rpartition(".")[0]) for s in statistics if s.op == "get_attr"]
        read = any(isinstance(owner, _BatchNorm) for owner in owners)
        if operation(node) == "batch_norm" and statistics and (read or given.get("training")):
            found.append(describe(node, dict(modules)))
    return found


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training")


def _follow_owner(carrier: Carrier, name: str, axes: Sequence[Vector]) -> None:
    """Records that the sizes of a layer that is not called are those of its weight."""
    path, attribute = _owner(name)
    module = carrier.modules.get(path)
    if attribute != "weight" or path in carrier.record.modules:
        return
    if isinstance(module, (*operations.CONVOLUTIONS, nn.Linear)):
        carrier.record.modules[path] = (axes[0], axes[1])
    elif isinstance(module, operations.TRANSPOSED_CONVOLUTIONS) and module.groups == 1:
        carrier.record.modules[path] = (axes[1], axes[0])
    elif isinstance(module, (*operations.NORMALISATIONS, *operations.LAST_AXIS_NORMS)) and len(axes) == 1:
        carrier.record.modules[path] = (axes[0], None)


def _owner(name: str) -> tuple[str, str]:
    """Returns the module and the attribute that a tensor belongs to, also if it is pruned or parametrised by torch."""
    path, parametrised, rest = name.partition(".parametrizations.")
    if parametrised and rest.endswith(".original"):
        return path, rest.removesuffix(".original")
    path, _, attribute = name.rpartition(".")
    return path, attribute.removesuffix("_orig")


def functional_layer_rule(node: fx.Node) -> Rule | None:
    """Returns the rule for a function that computes a convolution or a linear layer, or None."""
    name = operation(node)
    if name in operations.FUNCTIONAL_CONVOLUTIONS:
        return _convolution
    return _linear if name == "linear" and node.op == "call_function" else None


def weight_rule(node: fx.Node, modules: Mapping[str, nn.Module]) -> Rule | None:
    """Returns the rule for an operation that reads a ``WeightFlow``, or None."""
    if node.op == "call_module":
        return _combination if passing_module_rule(modules[str(node.target)]) is elementwise else None
    name = operation(node)
    rules: tuple[tuple[frozenset[str], Rule], ...] = (
        (operations.CONVERSIONS, _conversion),
        (operations.ELEMENTWISE | {"_weight_norm", "expand_as"}, _combination),
        (operations.REDUCTIONS, _reduction),
        (operations.MOVEMENT, _movement),
        (frozenset({"pad", "interpolate"}), _padding),
        (frozenset({"batch_norm"}), _normalisation),
        (operations.MATRIX_PRODUCTS, _product),
    )
    return functional_layer_rule(node) or next((rule for names, rule in rules if name in names), None)


def _vector(flow: Flow | WeightFlow, axis: int) -> Vector:
    """Returns the labels along one of the axes, and zeros if there are none."""
    if isinstance(flow, WeightFlow):
        return flow.along(axis)
    if flow.is_mixed:
        raise NoRuleError("its channels lie along several axes")
    return flow.vector if flow.axis == axis else np.zeros(flow.shape[axis], np.int64)


def _conversion(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow | WeightFlow:
    """Handles ``to`` and ``type_as``, which may read the dtype of another tensor."""
    return carrier.all_flows(node)[0]


def _combination(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow | WeightFlow:
    """Handles elementwise operations: channels along the same axis are united."""
    rank = len(value.shape)
    found: dict[int, list[Vector]] = {}
    for flow in carrier.all_flows(node):
        for own, size in enumerate(flow.shape):
            if size > 1:
                found.setdefault(own + rank - len(flow.shape), []).append(_vector(flow, own))
    reason = f"{describe(node, carrier.modules)} combines it with a tensor of fixed size"
    vectors = {}
    for axis, (first, *others) in found.items():
        for other in others:
            carrier.record.labels.unite(first, other, reason)
            carrier.record.combined.append((first, other))
        if all(vector.any() for vector in (first, *others)):  # otherwise all of them have just become not prunable
            vectors[axis] = np.max([first, *others], axis=0)
    return flow_of_axes(value.shape, vectors)


def _reduction(carrier: Carrier, node: fx.Node, value: Any) -> Any:
    """Handles reductions, such as the mean of the weights of each output channel."""
    flows = carrier.all_flows(node)
    if operation(node) in operations.EXTREMA and len(flows) == 2:
        return _combination(carrier, node, value)
    if not isinstance(value, Tensor):  # several tensors, such as means and variances
        return tuple(_reduction(carrier, node, part) for part in value)
    rank = len(flows[0].shape)
    reduced = reduced_axes(node, rank)
    if reduced is None:
        return Flow(value.shape)
    kept = [axis for axis in range(rank) if axis not in reduced]
    positions = kept if len(value.shape) == rank else range(len(kept))
    return flow_of_axes(value.shape, {to: _vector(flows[0], axis) for to, axis in zip(positions, kept, strict=True)})


def _movement(carrier: Carrier, node: fx.Node, value: Any) -> Any:
    """Handles operations that only move elements, by running them on the labels of each axis in turn."""
    flows = carrier.all_flows(node)
    axes = sorted({axis for flow in flows for axis in flow.varying()})
    moved = {axis: run_on_labels(carrier, node, _labels_of(carrier, axis)) for axis in axes}
    if isinstance(value, Tensor):
        flow = _assembled(carrier, node, value.shape, moved)
        if operation(node) not in operations.EXPANSIONS:
            return flow
        expanded = expanded_axes(carrier, node, flows[0].shape, value.shape)
        return flow_of_axes(value.shape, {axis: _vector(flow, axis) for axis in flow.varying()} | expanded)
    if operation(node) in operations.SPLITS:
        for pieces in moved.values():
            tie_pieces(carrier, [Flow.of(piece) for piece in pieces])
    return tuple(
        _assembled(carrier, node, part.shape, {axis: pieces[index] for axis, pieces in moved.items()})
        for index, part in enumerate(value)
    )


def _labels_of(carrier: Carrier, axis: int) -> Callable[[fx.Node], Any]:
    def labels(leaf: Any) -> Any:
        if not isinstance(leaf, Flow | WeightFlow):
            return leaf
        vector = _vector(leaf, axis) if axis < len(leaf.shape) else None
        return Flow(leaf.shape, axis, vector).full()

    def of(node: fx.Node) -> Any:
        flow = carrier.flows[node]
        return carrier.values[node] if flow is None else fx.node.map_aggregate(flow, labels)

    return of


def _assembled(carrier: Carrier, node: fx.Node, shape: torch.Size, moved: Mapping[int, Tensor]) -> Flow | WeightFlow:
    """Returns the flow of a tensor from its labels, given for each axis of the tensor that it was made of.

    If the channels of two axes end up along the same one, as after flattening a weight, only the first remain prunable.
    """
    vectors: dict[int, Vector] = {}
    for axis, full in moved.items():
        flow = Flow.of(full)
        if flow.is_constant:
            continue
        reason = f"{describe(node, carrier.modules)} merges it with other channels"
        if flow.axis is not None and flow.axis not in vectors:
            vectors[flow.axis] = flow.vector
        elif flow.is_mixed and axis in flow.varying() and axis not in vectors:  # such as a concatenation
            labels = flow.narrowed().movedim(axis, 0).flatten(1)
            first = labels[:, :1].expand_as(labels)
            united = first.flatten().numpy(), labels.flatten().numpy()
            carrier.record.labels.unite(*united, reason)
            carrier.record.combined.append(united)
            vectors[axis] = labels[:, 0].numpy().copy()
        else:
            carrier.freeze([flow], reason)
    return flow_of_axes(shape, vectors)


def _padding(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow | WeightFlow:
    """Handles padding, such as that of a 1x1 kernel to 3x3, and interpolation, as of position embeddings.

    Channels along the axes whose size changes become not prunable.
    """
    [flow] = carrier.all_flows(node)
    vectors = {}
    for axis, size in enumerate(value.shape):
        vector = _vector(flow, axis)
        if size == flow.shape[axis]:
            vectors[axis] = vector
        else:
            carrier.record.labels.freeze(vector, f"{describe(node, carrier.modules)} changes its size")
    return flow_of_axes(value.shape, vectors)


def _normalisation(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow | WeightFlow:
    """Handles a batch norm over a weight, as in weight standardisation."""
    flow, *parameters = carrier.all_flows(node)
    vectors = {axis: _vector(flow, axis) for axis in range(len(flow.shape))}
    for parameter in parameters:
        carrier.record.labels.unite(vectors[1], _vector(parameter, 0), "it is normalised with a tensor of fixed size")
        carrier.record.combined.append((vectors[1], _vector(parameter, 0)))
    return flow_of_axes(value.shape, vectors)


def _convolution(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Handles a convolution, transposed or not, whose weight is any tensor."""
    flow, weight, bias = _arguments(carrier, node)
    given = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    groups = carrier.values[given] if isinstance(given, fx.Node) else given
    transposed = "transpose" in operation(node)
    axis = len(flow.shape) - len(weight.shape) + 1
    carrier.gather(flow, axis, node)
    if flow.axis not in (None, axis) or flow.is_mixed or not isinstance(groups, int):
        raise NoRuleError("its channels lie along another axis")
    inputs = _vector(flow, axis)
    size = value.shape[axis]
    area = int(np.prod(weight.shape[2:]))
    positions = value.numel() // (carrier.batch * size)
    factor = area * (flow.shape.numel() // (carrier.batch * len(inputs)) if transposed else positions)
    name = _layer_name(carrier, node, size)
    produced = carrier.record.labels.produce(name, size)
    if groups == 1:
        _tie_weight(
            carrier, node, weight, {0: inputs, 1: produced} if transposed else {0: produced, 1: inputs}, int(transposed)
        )
        carrier.call(node, "conv", factor, inputs, produced, positions, name)
    else:
        tie_groups(carrier, inputs, produced, len(inputs) // groups)
        if isinstance(given, fx.Node) and (source := given.meta.get("source")):
            carrier.record.size(source, inputs[:: len(inputs) // groups])
        _tie_weight(carrier, node, weight, {0: inputs if transposed else produced}, 0)
        kind = "depthwise" if groups == len(inputs) else "grouped"
        carrier.call(node, kind, factor * (len(inputs) // groups), None, produced, positions, name)
    if bias is not None:
        _tie_weight(carrier, node, bias, {0: produced})
    return Flow(value.shape, axis, produced)


def _linear(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Handles ``F.linear``."""
    flow, weight, bias = _arguments(carrier, node)
    return _linear_layer(carrier, node, value, flow, weight, bias, 1)


def _product(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Handles the product of activations with a matrix of weights, (..., inputs) @ (inputs, outputs)."""
    flow, weight, _ = _arguments(carrier, node)
    return _linear_layer(carrier, node, value, flow, weight, None, 0)


def _linear_layer(
    carrier: Carrier,
    node: fx.Node,
    value: Tensor,
    flow: Flow,
    weight: Flow | WeightFlow,
    bias: Flow | WeightFlow | None,
    read: int,
) -> Flow:
    """Handles a linear layer. ``read`` is the axis of the weight along which it reads its inputs."""
    last = len(flow.shape) - 1
    if len(weight.shape) != 2 or flow.axis not in (None, last) or flow.is_mixed or last == 0:
        raise NoRuleError("it is not a product of the last axis with a matrix")
    name = _layer_name(carrier, node, value.shape[last])
    inputs, produced = _vector(flow, last), carrier.record.labels.produce(name, value.shape[last])
    _tie_weight(carrier, node, weight, {read: inputs, 1 - read: produced}, 1 - read)
    if bias is not None:
        _tie_weight(carrier, node, bias, {0: produced})
    positions = value.numel() // (carrier.batch * value.shape[last])
    carrier.call(node, "linear", positions, inputs, produced, positions, name)
    return Flow(value.shape, last, produced)


def _arguments(carrier: Carrier, node: fx.Node) -> tuple[Flow, Flow | WeightFlow, Flow | WeightFlow | None]:
    """Returns the flows of the activations, of the weight and of the bias."""
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    activations, weight, bias = (
        carrier.flows[argument] if isinstance(argument := given.get(name), fx.Node) else None
        for name in ("input", "weight", "bias")
    )
    if not isinstance(activations, Flow) or not isinstance(weight, Flow | WeightFlow):
        raise NoRuleError("it does not compute a layer of activations and a weight")
    return activations, weight, bias


def _tie_weight(
    carrier: Carrier,
    node: fx.Node,
    weight: Flow | WeightFlow,
    axes: Mapping[int, Vector],
    produces: int | None = None,
) -> None:
    """Unites the labels of a weight with those of the layer's channels. Its other axes keep their size.

    ``produces`` is the axis of the channels that the weight produces, and None for a bias.
    """
    what = describe(node, carrier.modules)
    if produces is not None and len(axes) > 1:
        carrier.record.weight_axes.append((_vector(weight, produces), _vector(weight, 1 - produces)))
    for axis, size in enumerate(weight.shape):
        vector = _vector(weight, axis)
        if axis in axes and size > 1:
            carrier.record.labels.unite(axes[axis], vector, f"{what} combines it with a tensor of fixed size")
            if produces is not None:
                carrier.record.weight_uses.append((vector, axis == produces))
        else:
            carrier.record.labels.freeze(vector, f"{what} uses it as an axis of its kernel")


def _layer_name(carrier: Carrier, node: fx.Node, size: int) -> str:
    """Returns the name of a layer that is written as a function: that of the module of its weight, or of the weight.

    A weight that is computed has the name of the first weight that it is computed from. ``size`` is the number of
    channels that the layer produces.
    """
    search = [argument for argument in tree_leaves((node.args, node.kwargs)) if isinstance(argument, fx.Node)][1:2]
    sources: dict[fx.Node, None] = {}
    while search:
        source = search.pop()
        if source not in sources:
            sources[source] = None
            search += reversed(source.all_input_nodes)
    parameters = [source for source in sources if source.op == "get_attr"]
    weights = [source for source in parameters if isinstance(carrier.flows[source], WeightFlow)]
    names = [carrier.record.first_name.get(str(source.target), str(source.target)) for source in weights or parameters]
    owners = [path for path, attribute in map(_owner, names) if path and attribute == "weight"]
    name = (owners or names or [node.name])[0]
    known = carrier.record.labels.sources.get(name)
    if known is not None and (len(known) != size or "transpose" in operation(node)):
        name = f"{name}:{node.name}"  # another layer with the same weight, such as the decoder of an autoencoder
    carrier.record.functional.add(name)
    return name
