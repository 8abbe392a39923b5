"""From labels to channel groups: which sets of channels come and go together, and in which order tensors hold them."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from torch import nn

from autoslim.networks.graph import Attribute, Axis, ChannelGraph, Layer, Segment
from autoslim.networks.labels import Vector
from autoslim.networks.propagation import CONVOLUTIONS, NORMALISATIONS, Call, Trace
from autoslim.vocabulary.channels import ChannelGroup


class _Groups:
    """Root labels sorted into groups, each an ordered run of roots with ``unit`` channels of its leader to a root."""

    def __init__(self, trace: Trace, layers: set[str]) -> None:
        self.trace = trace
        labels = trace.labels
        self.roots = {source: labels.roots(vector) for source, vector in labels.sources.items()}
        self.reasons = labels.fixed_roots()
        holders: dict[int, set[str]] = {}
        for source, roots in self.roots.items():
            for root in dict.fromkeys(roots.tolist()):
                holders.setdefault(root, set()).add(source)
        self.of_root: dict[int, str] = {}  # root -> group
        self.sequence: dict[str, list[int]] = {}  # group -> its roots in order
        self.unit: dict[str, int] = {}
        self.members: dict[str, list[str]] = {}
        for source in sorted(self.roots, key=lambda s: s not in layers):  # a layer leads before a bare parameter
            self._lead(source, holders)
        self._refuse_scrambled(layers)

    def _lead(self, source: str, holders: dict[int, set[str]]) -> None:
        """Makes groups of the channels that ``source`` is the first to produce."""
        counts: dict[int, int] = {}  # a tensor split into equal pieces holds each root several times: one piece leads
        for root, count in _runs(self.roots[source]):
            if root and root not in self.of_root and root not in self.reasons:
                counts.setdefault(root, count)
        free = list(counts.items())
        kinds = [(frozenset(holders[root]), count) for root, count in free]
        start = 0
        for _, part in groupby(range(len(free)), key=lambda i: kinds[i]):
            indices = list(part)
            name = source if start == 0 else f"{source}#{start}"
            start += 1
            self.sequence[name] = [free[i][0] for i in indices]
            self.unit[name] = free[indices[0]][1]
            self.members[name] = sorted(holders[free[indices[0]][0]], key=list(self.roots).index)
            self.of_root.update((free[i][0], name) for i in indices)

    def _refuse_scrambled(self, layers: set[str]) -> None:
        """Drops groups that some tensor holds in another order, or in part, or that no layer produces."""
        vectors = [*self.roots.values()]
        vectors += [self.trace.labels.roots(v) for axes in self.trace.tensors.values() for v in axes.values()]
        changed = True
        while changed:
            changed = False
            for name in list(self.sequence):
                if not layers.intersection(self.members[name]):
                    self._drop(name, "no layer produces it")
                elif len(self.sequence[name]) == 1:
                    self._drop(name, "all its channels come and go together")
            for vector in vectors:
                bad = next((b for _, b in self._segments(vector) if b is not None), None)
                if bad is not None:
                    self._drop(bad, "its channels are interleaved or cut apart, so they cannot be slimmed on their own")
                    changed = True

    def _drop(self, name: str, reason: str) -> None:
        for root in self.sequence.pop(name):
            self.reasons.setdefault(root, reason)
            del self.of_root[root]
        del self.unit[name], self.members[name]

    def _segments(self, roots: Vector) -> Iterator[tuple[Segment | None, str | None]]:
        """The axis as segments; where it is none, the name of a group at fault."""
        runs = list(_runs(roots))
        at = 0
        while at < len(runs):
            root, count = runs[at]
            name = self.of_root.get(root)
            if name is None:
                fixed = 0
                while at < len(runs) and self.of_root.get(runs[at][0]) is None:
                    fixed += runs[at][1]
                    at += 1
                yield Segment(None, fixed), None
                continue
            sequence = self.sequence[name]
            part = runs[at : at + len(sequence)]
            if [root for root, _ in part] != sequence or any(other != count for _, other in part):
                yield None, name
                return
            yield Segment(name, count, self.unit[name]), None
            at += len(sequence)

    def axis(self, vector: Vector) -> Axis:
        return tuple(segment for segment, _ in self._segments(self.trace.labels.roots(vector)) if segment is not None)

    def size(self, name: str) -> int:
        """The channels of the group's leader (of one piece, where it is split into equal ones)."""
        return len(self.sequence[name]) * self.unit[name]


def build_graph(network: nn.Module, trace: Trace, input_shape: tuple[int, ...]) -> ChannelGraph:
    """The channel graph of a network whose labels have been propagated."""
    modules = dict(network.named_modules())
    layers = {source for source in trace.labels.sources if source in modules}
    groups = _Groups(trace, layers)
    expansions = _expansions(groups, trace)
    named = {
        name: ChannelGroup(
            name, groups.size(name), groups.unit[name], tuple(groups.members[name]), expansions.get(name)
        )
        for name in groups.sequence
    }
    shapes = {name: tuple(t.shape) for name, t in [*network.named_parameters(), *network.named_buffers()]}
    tensors = {}
    for name, axes in trace.tensors.items():
        built = tuple(
            groups.axis(axes[axis]) if axis in axes else (Segment(None, size),)
            for axis, size in enumerate(shapes[name])
        )
        if any(segment.group for axis in built for segment in axis):
            tensors[name] = built
    parameters = {name: parameter.numel() for name, parameter in network.named_parameters()}
    return ChannelGraph(
        groups=named,
        tensors=tensors,
        attributes=tuple(_attributes(modules, tensors)),
        layers=tuple(_layer(groups, call) for call in trace.calls),
        fixed=_fixed(groups, layers),
        input_shape=input_shape,
        other_params=sum(count for name, count in parameters.items() if name not in tensors),
        parameter_names=frozenset(parameters) & frozenset(tensors),
    )


def _layer(groups: _Groups, call: Call) -> Layer:
    inputs = groups.axis(call.inputs) if call.inputs is not None else ()
    return Layer(call.name, call.kind, call.factor, inputs, groups.axis(call.outputs), call.positions, call.weight)


def _fixed(groups: _Groups, layers: set[str]) -> dict[str, str]:
    """Each layer with output channels that stay, and why."""
    fixed = {}
    for source in layers:
        stay = [root for root in groups.roots[source].tolist() if groups.of_root.get(root) is None]
        if stay:
            fixed[source] = groups.reasons.get(stay[0], "it has one channel" if stay[0] == 0 else "unknown")
    return fixed


def _expansions(groups: _Groups, trace: Trace) -> dict[str, tuple[str, int]]:
    """Hidden layers of inverted residuals: made by one 1x1 convolution, t times as wide as its input, carried by a
    depthwise one, and projected back to fewer channels (MobileNetV1 widens too, but never goes back)."""
    found = {}
    projected = {
        axis[0].group: len(call.outputs)
        for call in trace.calls
        if call.kind == "conv" and call.inputs is not None and len(axis := groups.axis(call.inputs)) == 1
    }
    for name, members in groups.members.items():
        dense = [member for member in members if member in trace.feeds]
        if len(dense) != 1 or dense[0] != name or not trace.depthwise.intersection(members):
            continue
        axis = groups.axis(trace.feeds[name])
        if len(axis) == 1 and axis[0].group and axis[0].count == axis[0].unit:
            factor, rest = divmod(groups.size(name), groups.size(axis[0].group))
            if rest == 0 and factor > 1 and projected.get(name, groups.size(name)) < groups.size(name):
                found[name] = (axis[0].group, factor)
    return found


def _attributes(modules: dict[str, nn.Module], tensors: dict[str, tuple[Axis, ...]]) -> Iterator[Attribute]:
    """The integers of each module that follow from the axes of its tensors."""
    for path, module in modules.items():
        axes = next(
            (
                tensors[name]
                for own in ("weight", "running_mean")
                if (name := f"{path}.{own}" if path else own) in tensors
            ),
            None,
        )
        if axes is None:
            continue
        if isinstance(module, CONVOLUTIONS):
            yield Attribute(path, "out_channels", axes[0])
            if module.groups == 1:
                yield Attribute(path, "in_channels", axes[1])
            else:
                wide_in, wide_out = module.in_channels // module.groups, module.out_channels // module.groups
                yield Attribute(path, "groups", axes[0], per=wide_out)
                yield Attribute(path, "in_channels", axes[0], times=wide_in, per=wide_out)
        elif isinstance(module, nn.Linear):
            yield Attribute(path, "out_features", axes[0])
            yield Attribute(path, "in_features", axes[1])
        elif isinstance(module, NORMALISATIONS):
            yield Attribute(path, "num_features", axes[0])
        elif isinstance(module, nn.LayerNorm):
            yield Attribute(path, "normalized_shape", axes[0], as_tuple=True)
        elif isinstance(module, nn.GroupNorm):
            yield Attribute(path, "num_channels", axes[0])
            if module.num_groups > 1:
                yield Attribute(path, "num_groups", axes[0], per=module.num_channels // module.num_groups)
        elif isinstance(module, nn.PReLU):
            yield Attribute(path, "num_parameters", axes[0])


def _runs(vector: Vector) -> Iterator[tuple[int, int]]:
    """Equal neighbours counted: (label, how many)."""
    if not len(vector):
        return
    edges = np.flatnonzero(np.diff(vector)) + 1
    for start, end in zip([0, *edges.tolist()], [*edges.tolist(), len(vector)], strict=True):
        yield int(vector[start]), end - start
