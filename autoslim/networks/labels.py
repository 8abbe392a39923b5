"""Channel labels: which channel of which layer each position on a tensor's axis carries.

A label is a number that stands for one channel of one layer's output; 0 stands for "not a channel" (the input image, a
constant, an axis of pixels). Layers allocate labels, operations carry them along, and whatever forces two channels to be
the same (a residual sum, a depthwise convolution) unites their labels.
"""

import numpy as np
import torch
from torch import Tensor

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
        """Channel i of ``first`` and of ``second`` come and go together; where one is no channel, the other must stay."""
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


class Flow:
    """The labels of a tensor's elements.

    Almost always they vary along one axis only, the channels' one: ``axis`` and ``vector`` then say it all. Inside a
    channel shuffle they vary along two, and only ``full()`` does.
    """

    def __init__(self, shape: torch.Size, axis: int | None = None, vector: Vector | None = None) -> None:
        self.shape, self.axis = shape, axis
        self.vector = np.zeros(0, np.int64) if vector is None else vector
        self._full: Tensor | None = None

    @classmethod
    def of(cls, full: Tensor) -> "Flow":
        """The flow of a tensor of labels, in its shortest form."""
        varying = [axis for axis in range(full.dim()) if full.size(axis) > 1 and _varies(full, axis)]
        if not varying:
            flow = cls(full.shape)
            if full.numel() and int(full.flatten()[0]):
                flow._full = full
            return flow
        if len(varying) == 1:
            axis = varying[0]
            index = tuple(slice(None) if i == axis else 0 for i in range(full.dim()))
            return cls(full.shape, axis, full[index].numpy())
        flow = cls(full.shape)
        flow._full = full
        return flow

    @property
    def is_constant(self) -> bool:
        """Whether no channel is in this tensor."""
        return self.axis is None and self._full is None

    @property
    def is_mixed(self) -> bool:
        """Whether channels lie along more than one axis, or along none."""
        return self._full is not None

    def full(self) -> Tensor:
        """The labels as a tensor of this tensor's shape (a view that repeats where it can)."""
        if self._full is not None:
            return self._full
        if self.axis is None:
            return torch.zeros((), dtype=torch.int64).expand(self.shape)
        view = [1] * len(self.shape)
        view[self.axis] = -1
        return torch.from_numpy(self.vector).view(view).expand(self.shape)

    def labels(self) -> Vector:
        """All labels in this tensor, in no particular order."""
        return np.unique(self._full.numpy()) if self._full is not None else self.vector

    def along(self, axis: int) -> Vector | None:
        """The labels along ``axis``: zeros where the tensor holds no channel, None where its channels lie elsewhere."""
        axis %= len(self.shape)
        if self.is_constant:
            return np.zeros(self.shape[axis], np.int64)
        return self.vector if self.axis == axis else None

    def reshaped_like(self, shape: torch.Size) -> "Flow":
        """The same labels on the same axis of a tensor of another size elsewhere (after pooling, padding, resampling)."""
        return Flow(shape, self.axis, self.vector)


def _varies(full: Tensor, axis: int) -> bool:
    return full.stride(axis) != 0 and bool((full != full.narrow(axis, 0, 1)).any())
