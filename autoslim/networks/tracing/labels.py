"""Channel labels: which channel of which layer each position on a tensor's axis carries.

A label is a number that stands for one channel of one layer's output; 0 stands for "not a channel" (the input image, a
constant, an axis of pixels). Layers allocate labels, operations carry them along, and whatever forces two channels to
be the same (a residual sum, a depthwise convolution) unites their labels.
"""

import numpy as np

Vector = np.ndarray  # int64, the labels along one axis


class Labels:
    """A union-find over labels, with reasons for those whose channels must stay."""

    def __init__(self) -> None:
        self._parent = [0]
        self._fixed: dict[int, str] = {}
        self.sources: dict[str, Vector] = {}  # layer or parameter -> the labels of the channels it produces

    def produce(self, source: str, size: int) -> Vector:
        """New labels for the output channels of ``source``; the same ones when a layer is used again.

        A single channel has nothing to slim: it gets no label.
        """
        if source not in self.sources:
            if size == 1:
                self.sources[source] = np.zeros(1, np.int64)
            else:
                start = len(self._parent)
                self._parent.extend(range(start, start + size))
                self.sources[source] = np.arange(start, start + size)
        return self.sources[source]

    def find(self, label: int) -> int:
        """The root of the labels united with this one."""
        parent = self._parent
        root = label
        while parent[root] != root:
            root = parent[root]
        while parent[label] != root:
            parent[label], label = root, parent[label]
        return root

    def roots(self, vector: Vector) -> Vector:
        return np.fromiter((self.find(label) for label in vector.tolist()), np.int64, len(vector))

    def unite(self, first: Vector, second: Vector, reason: str) -> None:
        """Channel i of both come and go together; where one of the two is no channel, the other must stay."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            if a == b:
                continue
            if a == 0 or b == 0:
                self._fixed.setdefault(a + b, reason)
                continue
            root_a, root_b = self.find(a), self.find(b)
            if root_a != root_b:
                self._parent[max(root_a, root_b)] = min(root_a, root_b)

    def fix(self, vector: Vector, reason: str) -> None:
        """These channels must stay, for the reason given (the first reason is kept)."""
        for label in vector.tolist():
            if label:
                self._fixed.setdefault(label, reason)

    def fixed_roots(self) -> dict[int, str]:
        """Root label -> why it must stay."""
        fixed: dict[int, str] = {}
        for label, reason in self._fixed.items():
            fixed.setdefault(self.find(label), reason)
        return fixed
