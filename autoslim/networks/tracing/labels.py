"""Channel labels: which channel of which layer each position on a tensor's axis carries.

A label is a number that stands for one channel of one layer's output; 0 stands for "not a channel" (the input image, a
constant, an axis of pixels). Layers allocate labels, operations carry them along, and whatever forces two channels to
be the same (a residual sum, a depthwise convolution) unites their labels.
"""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Vector = np.ndarray  # int64, the labels along one axis


class Labels:
    """Labels with the ties between them, and reasons for those whose channels must stay.

    Ties are only written down; ``roots`` follows them for all labels at once.
    """

    def __init__(self) -> None:
        self.sources: dict[str, Vector] = {}  # layer or parameter -> the labels of the channels it produces
        self._count = 1
        self._ties: list[Vector] = []  # (2, n), the labels at their ends
        self._fixed: list[tuple[Vector, str]] = []  # labels, and why they must stay, in the order found
        self._roots: Vector | None = None  # of every label; None after a new tie

    def produce(self, source: str, size: int) -> Vector:
        """New labels for the output channels of ``source``; the same ones when a layer is used again.

        A single channel has nothing to slim: it gets no label.
        """
        if source not in self.sources:
            if size == 1:
                self.sources[source] = np.zeros(1, np.int64)
            else:
                self.sources[source] = np.arange(self._count, self._count + size)
                self._count += size
                self._roots = None
        return self.sources[source]

    def roots(self, vector: Vector) -> Vector:
        """For each label the smallest one that is united with it."""
        roots = self._roots
        if roots is None:
            ends = np.concatenate([np.zeros((2, 0), np.int64), *self._ties], 1)
            ties = coo_array((np.ones(ends.shape[1], np.bool_), (ends[0], ends[1])), shape=(self._count, self._count))
            components = connected_components(ties, directed=False)[1]
            _, smallest = np.unique(components, return_index=True)
            roots = self._roots = np.asarray(smallest[components], np.int64)
        return np.asarray(roots[vector])

    def unite(self, first: Vector, second: Vector, reason: str) -> None:
        """Channel i of both come and go together; where one of the two is no channel, the other must stay."""
        if len(first) != len(second):
            raise ValueError(f"{len(first)} channels cannot be united with {len(second)}")
        both = (first != 0) & (second != 0)
        self._ties.append(np.stack([first[both], second[both]]))
        self._roots = None
        self.fix((first + second)[~both], reason)

    def fix(self, vector: Vector, reason: str) -> None:
        """These channels must stay, for the reason given (the first reason is kept)."""
        if vector.any():
            self._fixed.append((vector[vector != 0], reason))

    def fixed_roots(self) -> dict[int, str]:
        """Root label -> why it must stay."""
        fixed: dict[int, str] = {}
        for vector, reason in self._fixed:
            for root in np.unique(self.roots(vector)).tolist():
                fixed.setdefault(root, reason)
        return fixed
