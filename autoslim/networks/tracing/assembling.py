"""From channel groups to the channel graph: sizes, axes, attributes and costs."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import torch
from torch import nn

from autoslim.networks.axes import Axis, Operation, Segment
from autoslim.networks.copying import named_tensors
from autoslim.networks.graph import Attribute, ChannelGraph, Layer
from autoslim.networks.tracing.flow import Flow
from autoslim.networks.tracing.grouping import Grouping
from autoslim.networks.tracing.labels import Vector
from autoslim.networks.tracing.operations import CONVOLUTIONS, NORMALISATIONS
from autoslim.networks.tracing.record import Call, Record
from autoslim.vocabulary.channels import ChannelGroup


def build_graph(
    network: nn.Module, record: Record, input_shape: tuple[int, ...], leaves: frozenset[str]
) -> ChannelGraph:
    """The channel graph of a network whose labels have been propagated."""
    modules = dict(network.named_modules())
    grouping = Grouping(record, {source for source in record.labels.sources if source in modules})
    expansions = _expansions(grouping, record)
    groups = {
        name: ChannelGroup(name, group.size, group.unit, group.members, expansions.get(name))
        for name, group in grouping.groups.items()
    }
    tensors = _tensors(network, grouping, record)
    own = {name: tensor for name, tensor in named_tensors(network).items() if record.first_name[name] == name}
    parameters = {name: parameter.numel() for name, parameter in network.named_parameters()}
    reasons = {source: grouping.reason(source) for source in record.labels.sources if source in modules}
    return ChannelGraph(
        groups=groups,
        tensors=tensors,
        attributes=tuple(_attributes(modules, grouping, record)),
        layers=tuple(_layer(grouping, call) for call in record.calls),
        fixed={source: reason for source, reason in reasons.items() if reason is not None} | record.fixed,
        activations=dict(_activations(grouping, record)),
        operations=tuple(_operation(grouping, record, operation) for operation in record.operations),
        input_shape=input_shape,
        leaves=leaves,
        other_params=sum(count for name, count in parameters.items() if name not in tensors),
        element_bytes={name: tensor.element_size() for name, tensor in own.items() if name in tensors},
        other_bytes=sum(tensor.numel() * tensor.element_size() for name, tensor in own.items() if name not in tensors),
        parameter_names=frozenset(parameters) & frozenset(tensors),
    )


def _tensors(network: nn.Module, grouping: Grouping, record: Record) -> dict[str, tuple[Axis, ...]]:
    """The axes of each tensor that depends on a group, under each of its names."""
    tensors = {}
    for name, tensor in named_tensors(network).items():
        known = record.tensors.get(record.first_name[name], {})
        axes = tuple(
            grouping.axis(known[axis]) if axis in known else (Segment(None, size),)
            for axis, size in enumerate(tensor.shape)
        )
        if _slimmable(*axes):
            tensors[name] = axes
    return tensors


def _activations(grouping: Grouping, record: Record) -> Iterator[tuple[str, tuple[int, Axis]]]:
    known: dict[int, Axis] = {}  # most operations pass the very same labels on
    for name, flow in record.flows.items():
        if id(flow.vector) not in known:
            known[id(flow.vector)] = grouping.axis(flow.vector)
        axis = known[id(flow.vector)]
        if flow.axis is not None and _slimmable(axis) and _is_whole(grouping, axis, flow.vector):
            yield name, (flow.axis, axis)


def _is_whole(grouping: Grouping, axis: Axis, vector: Vector) -> bool:
    """Whether the axis holds all of the vector: not if channels were scrambled on the way."""
    found = sum(s.count * (len(grouping.groups[s.group].roots) if s.group else 1) for s in axis)
    return found == len(vector)


def _operation(grouping: Grouping, record: Record, operation: Operation) -> Operation:
    """The operation with its axis, and so its parts."""
    parts = tuple(_operation(grouping, record, part) for part in operation.parts)
    return replace(operation, axis=_output_axis(grouping, record, operation), parts=parts)


def _output_axis(grouping: Grouping, record: Record, operation: Operation) -> tuple[int, Axis] | None:
    """The dimension along which the channels of an output lie, and how many they are."""
    flow = record.outputs.get(operation.name)
    if operation.shape is None or flow is None or flow.is_constant:
        return None
    if flow.is_mixed:  # of branches that are summed up later, a channel has the same label in each by now
        flow = Flow.of(torch.from_numpy(grouping.record.labels.roots(flow.narrowed().numpy())))
    varying = flow.varying()
    if not varying:
        return None
    dimension = max(varying, key=lambda dim: flow.shape[dim])  # inside a channel shuffle, the longer of two
    labels = flow.narrowed().flatten().numpy()
    dimension += len(operation.shape) - len(flow.shape)  # with one image, the first dimension may be gone
    size = operation.shape[dimension] if dimension >= 0 else 0
    if size == 0:
        return None
    axis = grouping.axis(labels)
    if len(labels) != size or not _is_whole(grouping, axis, labels):
        axis = grouping.counted(labels, Fraction(len(labels), size))
    return (dimension, axis) if _slimmable(axis) else None


def _layer(grouping: Grouping, call: Call) -> Layer:
    inputs = grouping.axis(call.inputs) if call.inputs is not None else ()
    return Layer(call.name, call.kind, call.factor, inputs, grouping.axis(call.outputs), call.positions, call.weight)


def _expansions(grouping: Grouping, record: Record) -> dict[str, tuple[str, int]]:
    """Hidden layers of inverted residuals, each with the group it expands and how many times.

    They are made by one 1x1 convolution, a whole number of times as wide as its input, carried by a depthwise one, and
    projected back to fewer channels (MobileNetV1 widens too, but never goes back).
    """
    projected = {
        axis[0].group: len(call.outputs)
        for call in record.calls
        if call.kind == "conv" and call.inputs is not None and len(axis := grouping.axis(call.inputs)) == 1
    }
    found = {}
    for name, group in grouping.groups.items():
        dense = [member for member in group.members if member in record.feeds]
        if dense != [name] or not record.depthwise.intersection(group.members):
            continue
        axis = grouping.axis(record.feeds[name])
        if len(axis) == 1 and axis[0].group and axis[0].count == axis[0].unit:
            factor, rest = divmod(group.size, grouping.groups[axis[0].group].size)
            if rest == 0 and factor > 1 and projected.get(name, group.size) < group.size:
                found[name] = (axis[0].group, factor)
    return found


def _attributes(modules: dict[str, nn.Module], grouping: Grouping, record: Record) -> Iterator[Attribute]:
    """The integers of each module that follow from its channels."""
    for path, (out, into) in record.modules.items():
        module = modules[path]
        outputs = grouping.axis(out)
        inputs = grouping.axis(into) if into is not None else ()
        if not _slimmable(outputs, inputs):
            continue
        if isinstance(module, CONVOLUTIONS):
            yield Attribute(path, "out_channels", outputs)
            if module.groups == 1:
                yield Attribute(path, "in_channels", inputs)
            else:
                wide_in, wide_out = module.in_channels // module.groups, module.out_channels // module.groups
                yield Attribute(path, "groups", outputs, per=wide_out)
                yield Attribute(path, "in_channels", outputs, times=wide_in, per=wide_out)
        elif isinstance(module, nn.Linear):
            yield Attribute(path, "out_features", outputs)
            yield Attribute(path, "in_features", inputs)
        elif isinstance(module, NORMALISATIONS):
            yield Attribute(path, "num_features", outputs)
        elif isinstance(module, nn.LayerNorm):
            yield Attribute(path, "normalized_shape", outputs, as_tuple=True)
        elif isinstance(module, nn.GroupNorm):
            yield Attribute(path, "num_channels", outputs)
            if module.num_groups > 1:
                yield Attribute(path, "num_groups", outputs, per=module.num_channels // module.num_groups)
        elif isinstance(module, nn.PReLU):
            yield Attribute(path, "num_parameters", outputs)


def _slimmable(*axes: Axis) -> bool:
    return any(segment.group for axis in axes for segment in axis)
