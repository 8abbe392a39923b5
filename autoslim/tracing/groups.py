"""Derives the channel groups and the channel graph from channel labels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby

import numpy as np
import torch
from torch import nn

from autoslim.channels.copying import named_tensors
from autoslim.channels.graph import Attribute, ChannelGraph, Layer
from autoslim.channels.groups import Axis, ChannelGroup, Segment
from autoslim.channels.inputs import Inputs
from autoslim.channels.memory import Operation
from autoslim.tracing.labels import Flow, Vector, WeightFlow
from autoslim.tracing.operations import CONVOLUTIONS, LAST_AXIS_NORMS, NORMALISATIONS, TRANSPOSED_CONVOLUTIONS
from autoslim.tracing.record import Call, Record


@dataclass(frozen=True)
class RootGroup:
    """A channel group as root labels, in order; each stands for ``unit`` channels of the layer that leads the group."""

    roots: tuple[int, ...]
    unit: int
    members: tuple[str, ...]

    @property
    def size(self) -> int:
        """The number of channels of the leading layer, or of one piece if its output is split into equal ones."""
        return len(self.roots) * self.unit


class Grouping:
    """The groups of a record's labels, and the reasons why the other labels are not prunable.

    A group is a run of channels in some layer's output that belongs to the same set of layers. A run that some tensor
    contains in another order or in part (after a channel shuffle, for example) cannot be slimmed by keeping its leading
    channels and is not prunable.
    """

    def __init__(self, record: Record, layers: set[str]) -> None:
        self.record = record
        self.roots = {source: record.labels.roots(vector) for source, vector in record.labels.sources.items()}
        self.reasons = record.labels.not_prunable_roots()  # root -> why it is not prunable
        self.groups: dict[str, RootGroup] = {}
        self._group_of: dict[int, str] = {}  # root -> group
        self._axes: dict[bytes, Axis] = {}
        holders = self._holders()
        for source in sorted(
            self.roots, key=lambda s: s not in layers
        ):  # layers take precedence over parameters as leaders
            self._lead(source, holders)
        for name, group in list(self.groups.items()):
            if not layers.intersection(group.members):
                self._drop(name, "no layer produces it")
            elif len(group.roots) == 1:
                self._drop(name, "all its channels can only be removed together")
        self._drop_scrambled()

    def axis(self, vector: Vector) -> Axis:
        """Returns a tensor's axis as segments."""
        roots = self.record.labels.roots(vector)
        key = roots.tobytes()  # most axes occur in several tensors
        if key not in self._axes:
            self._axes[key] = tuple(segment for segment, _ in self._segments(roots) if segment is not None)
        return self._axes[key]

    def counted(self, labels: Vector, times: Fraction) -> Axis:
        """Returns an axis with the channels of ``labels`` divided by ``times``: one segment per group, unordered."""
        counts: dict[str | None, int] = {}
        for root, count in zip(*np.unique(self.record.labels.roots(labels), return_counts=True), strict=True):
            name = self._group_of.get(int(root))
            counts[name] = counts.get(name, 0) + int(count)
        segments = []
        for name, count in counts.items():
            if name is None:
                segments.append(Segment(None, int(count / times)))
            else:
                group = self.groups[name]
                each = count / (len(group.roots) * times)
                segments.append(Segment(name, each.numerator, group.unit * each.denominator))
        return tuple(segments)

    def reason(self, source: str) -> str | None:
        """Returns why some of the channels that ``source`` produces are not prunable; or None if all are prunable."""
        root = next((root for root in self.roots[source].tolist() if root not in self._group_of), None)
        if root is None:
            return None
        return self.reasons[root] if root else "it has one channel"

    def _holders(self) -> dict[int, tuple[str, ...]]:
        """Returns, for each root, the sources whose output contains it, in the order of the network."""
        holders: dict[int, list[str]] = {}
        for source, roots in self.roots.items():
            for root in dict.fromkeys(roots.tolist()):
                holders.setdefault(root, []).append(source)
        return {root: tuple(sources) for root, sources in holders.items()}

    def _lead(self, source: str, holders: dict[int, tuple[str, ...]]) -> None:
        """Creates groups of the channels that ``source`` is the first to produce."""
        units: dict[
            int, int
        ] = {}  # a tensor that is split into equal pieces contains each root several times: the first piece leads
        for root, count in _runs(self.roots[source]):
            if root and root not in self._group_of and root not in self.reasons:
                units.setdefault(root, count)
        kinds = groupby(units, key=lambda root: (holders[root], units[root]))
        for number, ((members, unit), run) in enumerate(kinds):
            name = source if number == 0 else f"{source}#{number}"
            self.groups[name] = RootGroup(tuple(run), unit, members)
            self._group_of.update((root, name) for root in self.groups[name].roots)

    def _drop_scrambled(self) -> None:
        vectors = [*self.roots.values()]
        vectors += [self.record.labels.roots(v) for axes in self.record.tensors.values() for v in axes.values()]
        different = {vector.tobytes(): vector for vector in vectors}.values()
        scrambled: set[str | None] = {None}
        while scrambled:  # a dropped group may separate channels of another one
            scrambled = {bad for vector in different for _, bad in self._segments(vector) if bad is not None}
            for name in scrambled:
                assert name is not None
                self._drop(name, "its channels are interleaved or split, so they cannot be slimmed separately")

    def _drop(self, name: str, reason: str) -> None:
        for root in self.groups.pop(name).roots:
            self.reasons.setdefault(root, reason)
            del self._group_of[root]

    def _segments(self, roots: Vector) -> Iterator[tuple[Segment | None, str | None]]:
        """Yields the segments of an axis, up to the first group that it does not contain completely and in order."""
        runs = list(_runs(roots))
        at = 0
        while at < len(runs):
            name = self._group_of.get(runs[at][0])
            if name is None:
                count = 0
                while at < len(runs) and runs[at][0] not in self._group_of:
                    count += runs[at][1]
                    at += 1
                yield Segment(None, count), None
                continue
            group, count = self.groups[name], runs[at][1]
            if runs[at : at + len(group.roots)] != [(root, count) for root in group.roots]:
                yield None, name
                return
            yield Segment(name, count, group.unit), None
            at += len(group.roots)


def _runs(vector: Vector) -> Iterator[tuple[int, int]]:
    """Yields (label, length) for each run of equal labels."""
    if not len(vector):
        return
    edges = np.flatnonzero(np.diff(vector)) + 1
    for start, end in zip([0, *edges.tolist()], [*edges.tolist(), len(vector)], strict=True):
        yield int(vector[start]), end - start


def build_graph(network: nn.Module, record: Record, inputs: Inputs, leaves: frozenset[str]) -> ChannelGraph:
    """Returns the channel graph of a network whose labels have been propagated."""
    modules = dict(network.named_modules())
    layers = {source for source in record.labels.sources if source in modules or source in record.functional}
    _decide_grouped(record, layers)
    grouping = Grouping(record, layers)
    expansions = _expansions(grouping, record)
    groups = {
        name: ChannelGroup(name, group.size, group.unit, group.members, expansions.get(name))
        for name, group in grouping.groups.items()
    }
    tensors = _tensors(network, grouping, record)
    distinct = {name: tensor for name, tensor in named_tensors(network).items() if record.first_name[name] == name}
    parameters = {name: parameter.numel() for name, parameter in network.named_parameters()}
    reasons = {source: grouping.reason(source) for source in record.labels.sources if source in layers}
    return ChannelGraph(
        groups=groups,
        tensors=tensors,
        weights=_weights(network, record, tensors),
        attributes=tuple(_attributes(modules, grouping, record)),
        layers=tuple(_layer(grouping, call) for call in record.calls),
        not_prunable={source: reason for source, reason in reasons.items() if reason is not None} | record.not_prunable,
        activations=dict(_activations(grouping, record)),
        operations=tuple(_operation(grouping, record, operation) for operation in record.operations),
        inputs=inputs,
        leaves=leaves,
        other_params=sum(count for name, count in parameters.items() if name not in tensors),
        element_bytes={name: tensor.element_size() for name, tensor in distinct.items() if name in tensors},
        other_bytes=sum(
            tensor.numel() * tensor.element_size() for name, tensor in distinct.items() if name not in tensors
        ),
        parameter_names=frozenset(parameters) & frozenset(tensors),
        not_counted=record.not_counted,
        batch_norms=tuple(record.batch_norms),
    )


def _decide_grouped(record: Record, layers: set[str]) -> None:
    """Decides how each grouped convolution is slimmed: by whole groups, or, if this is impossible, within them."""
    within: set[str] = set()
    while record.grouped:
        trial = replace(record, labels=record.labels.copy())
        for convolution in record.grouped:
            convolution.unite(trial.labels, within=convolution.name in within)
        grouping = Grouping(trial, layers)
        failing = {convolution.name for convolution in record.grouped if grouping.reason(convolution.name)} - within
        if not failing:
            break
        within |= failing
    for convolution in record.grouped:
        convolution.unite(record.labels, within=convolution.name in within)
        if convolution.name in within:
            each = len(convolution.inputs) // convolution.groups
            for weight in convolution.weights:
                record.index(weight, 1, convolution.second_axis)
                if weight in record.weights:
                    record.weights[weight] = int(convolution.transposed)
            convolution.call.inputs = convolution.inputs[:each]
            convolution.call.factor //= each
    record.slimmed_within |= within
    record.grouped.clear()


def _tensors(network: nn.Module, grouping: Grouping, record: Record) -> dict[str, tuple[Axis, ...]]:
    """Returns the axes of each tensor that depends on a group, under each of its names."""
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


def _weights(network: nn.Module, record: Record, tensors: Mapping[str, tuple[Axis, ...]]) -> dict[str, int | None]:
    """Returns the weights among ``tensors``, each with the axis of the channels that it produces (see the graph).

    Of the tensors from which ``forward`` computes weights, scales with one entry for each channel are left out.
    """
    used: dict[bool, set[int]] = {True: set(), False: set()}  # labels of axes of produced channels, and of those read
    pairs = [{label for vector in pair for label in vector.tolist() if label} for pair in record.combined]
    for vector, produced in record.weight_uses:
        used[produced].update(label for label in vector.tolist() if label)
    for labels in used.values():
        size = 0
        while len(labels) > size:
            size = len(labels)
            labels.update(*(pair for pair in pairs if not labels.isdisjoint(pair)))
    combined = {label for pair in pairs for label in pair}
    weights: dict[str, int | None] = {}
    shapes = {name: tensor.shape for name, tensor in named_tensors(network).items()}
    for name in tensors:
        first = record.first_name[name]
        axes = record.tensors[first]
        if first in record.weights:
            along = record.weights[first]
            weights[name] = None if _is_swapped(record, axes, along) else along
            continue
        produces, reads = (
            [axis for axis, vector in axes.items() if not labels.isdisjoint(vector.tolist())]
            for labels in used.values()
        )
        is_vector = len(axes) == 1 and shapes[name].numel() == shapes[name][min(axes)]
        is_scale = is_vector and not combined.isdisjoint(axes[min(axes)].tolist())
        if (produces or reads) and not is_scale:
            weights[name] = produces[0] if len(produces) == 1 and produces != reads else None
    return weights


def _is_swapped(record: Record, axes: Mapping[int, Vector], produces: int | None) -> bool:
    """Returns whether a function also uses the weight of a layer with the channels that it produces and reads swapped.

    ``produces`` is the axis along which the layer itself produces channels.
    """
    if produces is None or not {produces, 1 - produces} <= axes.keys():
        return False
    return any(
        np.array_equal(axes[1 - produces], produced) and np.array_equal(axes[produces], read)
        for produced, read in record.weight_axes
    )


def _activations(grouping: Grouping, record: Record) -> Iterator[tuple[str, tuple[int, Axis]]]:
    known: dict[int, Axis] = {}  # most operations pass on the same labels
    for name, flow in record.flows.items():
        if id(flow.vector) not in known:
            known[id(flow.vector)] = grouping.axis(flow.vector)
        axis = known[id(flow.vector)]
        if flow.axis is not None and _slimmable(axis) and _is_whole(grouping, axis, flow.vector):
            yield name, (flow.axis, axis)


def _is_whole(grouping: Grouping, axis: Axis, vector: Vector) -> bool:
    """Returns whether the axis covers the whole vector. It does not if channels were shuffled before."""
    covered = sum(s.count * (len(grouping.groups[s.group].roots) if s.group else 1) for s in axis)
    return covered == len(vector)


def _operation(grouping: Grouping, record: Record, operation: Operation) -> Operation:
    """Returns the operation and its parts with their axes."""
    parts = tuple(_operation(grouping, record, part) for part in operation.parts)
    return replace(operation, axes=_output_axes(grouping, record, operation), parts=parts)


def _output_axes(grouping: Grouping, record: Record, operation: Operation) -> tuple[tuple[int, Axis], ...]:
    """Returns the dimensions along which the channels of an output lie, and these axes, if they depend on a group."""
    flow = record.outputs.get(operation.name)
    if operation.shape is None or flow is None:
        return ()
    if isinstance(flow, WeightFlow):
        axes = [(dimension, grouping.axis(vector)) for dimension, vector in flow.vectors.items()]
        return tuple((dimension, axis) for dimension, axis in axes if _slimmable(axis))
    found = _output_axis(grouping, flow, operation.shape)
    return () if found is None else (found,)


def _output_axis(grouping: Grouping, flow: Flow, shape: tuple[int, ...]) -> tuple[int, Axis] | None:
    """Returns the dimension along which the channels of an activation lie, and that axis, or None if it has none."""
    if flow.is_mixed:  # a channel of branches that are added up later has the same root in each of them
        flow = Flow.of(torch.from_numpy(grouping.record.labels.roots(flow.narrowed().numpy())))
    varying = flow.varying()
    if not varying:
        return None
    dimension = max(varying, key=lambda dim: flow.shape[dim])  # inside a channel shuffle, the longer of the two
    labels = flow.narrowed().flatten().numpy()
    dimension += len(shape) - len(flow.shape)  # with one image, the network may have dropped the first dimension
    size = shape[dimension] if dimension >= 0 else 0
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
    """Returns the hidden groups of inverted residuals, each with the group that it expands and the factor.

    Such a group is produced by one 1x1 convolution, is wider than its input by a whole factor, passes a depthwise
    convolution, and is projected to fewer channels (MobileNetV1 also widens, but does not project).
    """
    projected = {
        axis[0].group: len(call.outputs)
        for call in record.calls
        if call.kind == "conv" and call.inputs is not None and len(axis := grouping.axis(call.inputs)) == 1
    }
    expansions = {}
    for name, group in grouping.groups.items():
        dense = [member for member in group.members if member in record.feeds]
        if dense != [name] or not record.depthwise.intersection(group.members):
            continue
        axis = grouping.axis(record.feeds[name])
        if len(axis) == 1 and axis[0].group and axis[0].count == axis[0].unit:
            factor, rest = divmod(group.size, grouping.groups[axis[0].group].size)
            if rest == 0 and factor > 1 and projected.get(name, group.size) < group.size:
                expansions[name] = (axis[0].group, factor)
    return expansions


def _attributes(modules: dict[str, nn.Module], grouping: Grouping, record: Record) -> Iterator[Attribute]:
    """Yields the integer attributes of each module that depend on its channels."""
    for path, (out, into) in record.modules.items():
        module = modules[path]
        outputs = grouping.axis(out)
        inputs = grouping.axis(into) if into is not None else ()
        if not _slimmable(outputs, inputs):
            continue
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)):
            yield Attribute(path, "out_channels", outputs)
            if module.groups == 1 or path in record.slimmed_within:
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
        elif isinstance(module, LAST_AXIS_NORMS):
            yield Attribute(path, "normalized_shape", outputs, as_tuple=True)
        elif isinstance(module, nn.GroupNorm):
            yield Attribute(path, "num_channels", outputs)
            if module.num_groups > 1:
                yield Attribute(path, "num_groups", outputs, per=module.num_channels // module.num_groups)
        elif isinstance(module, nn.PReLU):
            yield Attribute(path, "num_parameters", outputs)
    yield from _sizes(modules, grouping, record)


def _sizes(modules: dict[str, nn.Module], grouping: Grouping, record: Record) -> Iterator[Attribute]:
    """Yields the attributes from which the code of ``forward`` reads sizes that depend on the channels."""
    axes: dict[tuple[str, str], dict[int | None, tuple[Fraction, Axis]]] = {}
    for source, vector in record.sizes.items():
        axis = grouping.axis(vector)
        if _slimmable(axis) and _is_whole(grouping, axis, vector):
            axes.setdefault((source.module, source.name), {}).setdefault(source.index, (source.factor, axis))
    for (path, name), known in axes.items():
        value = vars(modules[path])[name]
        if None in known:
            factor, axis = known[None]
            yield Attribute(path, name, axis, factor.denominator, factor.numerator)
        elif all(factor == 1 for factor, _ in known.values()):
            entries = tuple(
                known[index][1] if index in known else (Segment(None, size),) for index, size in enumerate(value)
            )
            whole = tuple(segment for entry in entries for segment in entry)
            yield Attribute(path, name, whole, as_tuple=isinstance(value, tuple), entries=entries)


def _slimmable(*axes: Axis) -> bool:
    return any(segment.group for axis in axes for segment in axis)
