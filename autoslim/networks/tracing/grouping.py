"""From labels to channel groups: which channels come and go together, and in which order tensors hold them."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

import numpy as np

from autoslim.networks.axes import Axis, Segment
from autoslim.networks.tracing.labels import Vector
from autoslim.networks.tracing.record import Record


@dataclass(frozen=True)
class RootGroup:
    """A channel group before it has numbers: its root labels in order, each ``unit`` channels of its leader wide."""

    roots: tuple[int, ...]
    unit: int
    members: tuple[str, ...]

    @property
    def size(self) -> int:
        """The channels of the group's leader (of one piece, where it is split into equal ones)."""
        return len(self.roots) * self.unit


class Grouping:
    """The groups of a record's labels, and why the other labels must stay.

    A group is a run of channels in some layer's output that the same layers hold. A run that some tensor holds in
    another order or in part (after a channel shuffle, say) cannot be slimmed by taking leading channels: it stays.
    """

    def __init__(self, record: Record, layers: set[str]) -> None:
        self.record = record
        self.roots = {source: record.labels.roots(vector) for source, vector in record.labels.sources.items()}
        self.reasons = record.labels.fixed_roots()  # root -> why it must stay
        self.groups: dict[str, RootGroup] = {}
        self._group_of: dict[int, str] = {}  # root -> group
        self._axes: dict[bytes, Axis] = {}
        holders = self._holders()
        for source in sorted(self.roots, key=lambda s: s not in layers):  # a layer leads before a bare parameter
            self._lead(source, holders)
        for name, group in list(self.groups.items()):
            if not layers.intersection(group.members):
                self._drop(name, "no layer produces it")
            elif len(group.roots) == 1:
                self._drop(name, "all its channels come and go together")
        self._drop_scrambled()

    def axis(self, vector: Vector) -> Axis:
        """A tensor's axis as segments."""
        roots = self.record.labels.roots(vector)
        key = roots.tobytes()  # most tensors share their axes with others
        if key not in self._axes:
            self._axes[key] = tuple(segment for segment, _ in self._segments(roots) if segment is not None)
        return self._axes[key]

    def counted(self, labels: Vector, times: Fraction) -> Axis:
        """As many channels as ``labels`` hold, divided by ``times``: one segment for each group, in no order."""
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
        """Why some of the channels that ``source`` produces must stay; None where none must."""
        stay = next((root for root in self.roots[source].tolist() if root not in self._group_of), None)
        if stay is None:
            return None
        return self.reasons[stay] if stay else "it has one channel"

    def _holders(self) -> dict[int, tuple[str, ...]]:
        """Root -> the sources whose output holds it, in the order of the network."""
        holders: dict[int, list[str]] = {}
        for source, roots in self.roots.items():
            for root in dict.fromkeys(roots.tolist()):
                holders.setdefault(root, []).append(source)
        return {root: tuple(sources) for root, sources in holders.items()}

    def _lead(self, source: str, holders: dict[int, tuple[str, ...]]) -> None:
        """Makes groups of the channels that ``source`` is the first to produce."""
        units: dict[int, int] = {}  # a tensor split into equal pieces holds each root several times: one piece leads
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
        while scrambled:  # what stays may cut others apart that were next to it
            scrambled = {bad for vector in different for _, bad in self._segments(vector) if bad is not None}
            for name in scrambled:
                assert name is not None
                self._drop(name, "its channels are interleaved or cut apart, so they cannot be slimmed on their own")

    def _drop(self, name: str, reason: str) -> None:
        for root in self.groups.pop(name).roots:
            self.reasons.setdefault(root, reason)
            del self._group_of[root]

    def _segments(self, roots: Vector) -> Iterator[tuple[Segment | None, str | None]]:
        """The axis as segments, up to the first group that it does not hold whole and in order; then that group."""
        runs = list(_runs(roots))
        at = 0
        while at < len(runs):
            name = self._group_of.get(runs[at][0])
            if name is None:
                fixed = 0
                while at < len(runs) and runs[at][0] not in self._group_of:
                    fixed += runs[at][1]
                    at += 1
                yield Segment(None, fixed), None
                continue
            group, count = self.groups[name], runs[at][1]
            if runs[at : at + len(group.roots)] != [(root, count) for root in group.roots]:
                yield None, name
                return
            yield Segment(name, count, group.unit), None
            at += len(group.roots)


def _runs(vector: Vector) -> Iterator[tuple[int, int]]:
    """Equal neighbours counted: (label, how many)."""
    if not len(vector):
        return
    edges = np.flatnonzero(np.diff(vector)) + 1
    for start, end in zip([0, *edges.tolist()], [*edges.tolist(), len(vector)], strict=True):
        yield int(vector[start]), end - start
