"""Channel labels: which channel of which layer each entry along a tensor's axis belongs to.

A label is a number that stands for one channel of one layer's output; 0 stands for "not a channel" (the input image, a
constant, an axis of pixels). Layers create labels and operations pass them on. Operations that require two channels to
be removed together, such as a residual sum or a depthwise convolution, unite their labels.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Vector = np.ndarray  # int64: the labels along one axis


class Labels:
    """All labels of a network, the pairs that are united, and the reasons why some channels are not prunable.

    ``unite`` only records pairs; ``roots`` finds the connected components of all labels at once.
    """

    def __init__(self) -> None:
        self.sources: dict[str, Vector] = {}  # layer or parameter -> the labels of the channels it produces
        self._count = 1
        self._ties: list[Vector] = []  # (2, n), pairs of united labels
        self._frozen: list[tuple[Vector, str]] = []  # labels that are not prunable, with the reason
        self._roots: Vector | None = None  # of every label; None after a new pair

    def copy(self) -> "Labels":
        """Returns a copy; pairs that are united in it are not united here."""
        other = Labels()
        other.sources, other._count = dict(self.sources), self._count
        other._ties, other._frozen = list(self._ties), list(self._frozen)
        return other

    def produce(self, source: str, size: int) -> Vector:
        """Returns labels for the output channels of ``source``: new ones at its first call, the same ones after that.

        A single channel cannot be slimmed and gets the label 0.
        """
        if source not in self.sources:
            if size == 1:
                self.sources[source] = np.zeros(1, np.int64)
            else:
                self.sources[source] = self.new(size)
        return self.sources[source]

    def new(self, size: int) -> Vector:
        """Returns new labels that no layer or parameter leads, such as those of the input channels of a weight."""
        self._count += size
        self._roots = None
        return np.arange(self._count - size, self._count)

    def roots(self, vector: Vector) -> Vector:
        """Returns, for each label, the smallest label that is united with it."""
        roots = self._roots
        if roots is None:
            from scipy.sparse import coo_array
            from scipy.sparse.csgraph import connected_components

            ends = np.concatenate([np.zeros((2, 0), np.int64), *self._ties], 1)
            ties = coo_array((np.ones(ends.shape[1], np.bool_), (ends[0], ends[1])), shape=(self._count, self._count))
            components = connected_components(ties, directed=False)[1]
            _, smallest = np.unique(components, return_index=True)
            roots = self._roots = np.asarray(smallest[components], np.int64)
        return np.asarray(roots[vector])

    def unite(self, first: Vector, second: Vector, reason: str) -> None:
        """Unites the labels in pairs. A channel that is paired with label 0 becomes not prunable, for this reason."""
        if len(first) != len(second):
            raise ValueError(f"{len(first)} channels cannot be united with {len(second)}")
        both = (first != 0) & (second != 0)
        self._ties.append(np.stack([first[both], second[both]]))
        self._roots = None
        self.freeze((first + second)[~both], reason)

    def freeze(self, vector: Vector, reason: str) -> None:
        """Makes these channels not prunable. Only the first reason for a channel is recorded."""
        if vector.any():
            self._frozen.append((vector[vector != 0], reason))

    def not_prunable_roots(self) -> dict[int, str]:
        """Returns the roots of all labels that are not prunable, with the reasons."""
        reasons: dict[int, str] = {}
        for vector, reason in self._frozen:
            for root in np.unique(self.roots(vector)).tolist():
                reasons.setdefault(root, reason)
        return reasons


class Flow:
    """The labels of a tensor's elements.

    In most tensors, labels vary only along the axis of the channels: then ``axis`` and ``vector`` describe them.
    Otherwise (inside a channel shuffle, for example, where they vary along two axes) only ``full()`` does.
    """

    def __init__(self, shape: torch.Size, axis: int | None = None, vector: Vector | None = None) -> None:
        if axis is not None and vector is not None and len(vector) != shape[axis]:
            raise ValueError(f"{len(vector)} labels for axis {axis} of a tensor of {tuple(shape)}")
        self.shape = shape
        self.axis = axis if vector is not None and vector.any() else None
        self.vector = vector if vector is not None and self.axis is not None else np.zeros(0, np.int64)
        self._full: Tensor | None = None

    @classmethod
    def of(cls, full: Tensor) -> "Flow":
        """Returns the flow that a tensor of labels describes."""
        varying, rest = _narrowed(full)
        if len(varying) == 1:
            return cls(full.shape, varying[0], rest.flatten().numpy())
        flow = cls(full.shape)
        if varying or (rest.numel() and int(rest.flatten()[0])):
            flow._full = full
        return flow

    @property
    def is_constant(self) -> bool:
        """Whether the tensor holds no channels."""
        return self.axis is None and self._full is None

    @property
    def is_mixed(self) -> bool:
        """Whether channels lie along more than one axis, or along none."""
        return self._full is not None

    def full(self) -> Tensor:
        """Returns the labels as a tensor of this tensor's shape, expanded without a copy if possible."""
        if self._full is not None:
            return self._full
        if self.axis is None:
            return torch.zeros((), dtype=torch.int64, device="cpu").expand(self.shape)  # rules run on the meta device
        view = [1] * len(self.shape)
        view[self.axis] = -1
        return torch.from_numpy(self.vector).view(view).expand(self.shape)

    def varying(self) -> list[int]:
        """Returns the axes along which the labels vary."""
        return _narrowed(self.full())[0]

    def narrowed(self) -> Tensor:
        """Returns the labels with every axis along which they do not vary reduced to one element."""
        return _narrowed(self.full())[1]

    def labels(self) -> Vector:
        """Returns all labels in this tensor, in no particular order."""
        return np.unique(self._full.numpy()) if self._full is not None else self.vector

    def along(self, axis: int) -> Vector | None:
        """Returns the labels along ``axis``: zeros without channels, None if the channels lie along another axis."""
        axis %= len(self.shape)
        if self.is_constant:
            return np.zeros(self.shape[axis], np.int64)
        return self.vector if self.axis == axis else None

    def gather(self, axis: int) -> tuple[Vector, Vector]:
        """Keeps only the first label at each place along ``axis`` of a mixed flow, and returns the pairs to unite."""
        labels = self.narrowed().movedim(axis, 0).flatten(1)
        first = labels[:, :1].expand_as(labels)
        self.axis, self.vector, self._full = axis, labels[:, 0].numpy().copy(), None
        return first.flatten().numpy(), labels.flatten().numpy()

    def reshaped_like(self, shape: torch.Size) -> "Flow":
        """Returns the flow with the same labels along the same axis for another shape (after pooling or padding)."""
        return Flow(shape, self.axis, self.vector)


class WeightFlow:
    """The labels of a weight, or of a tensor that is computed from weights: independent ones along each axis.

    An element of a convolution's weight belongs to an output channel and to an input channel, while a ``Flow`` has one
    label for each element. At least two axes have labels (see ``flow_of_axes``).
    """

    def __init__(self, shape: torch.Size, vectors: Mapping[int, Vector]) -> None:
        self.shape = shape
        self.vectors = dict(vectors)

    def along(self, axis: int) -> Vector:
        """Returns the labels along ``axis``, zeros if there are none."""
        return self.vectors.get(axis, np.zeros(self.shape[axis], np.int64))

    def labels(self) -> Vector:
        """Returns all labels in this tensor."""
        return np.concatenate([*self.vectors.values()])

    def varying(self) -> list[int]:
        """Returns the axes that have labels."""
        return sorted(self.vectors)


def flow_of_axes(shape: torch.Size, vectors: Mapping[int, Vector]) -> Flow | WeightFlow:
    """Returns the flow of a tensor with these labels along its axes: a ``Flow`` if at most one axis has labels."""
    labelled = {axis: vector for axis, vector in vectors.items() if vector.any()}
    if len(labelled) > 1:
        return WeightFlow(shape, labelled)
    return next((Flow(shape, axis, vector) for axis, vector in labelled.items()), Flow(shape))


def _narrowed(full: Tensor) -> tuple[list[int], Tensor]:
    varying = []
    for axis in range(full.dim()):
        if _varies(full, axis):
            varying.append(axis)
        else:
            full = full.narrow(axis, 0, min(1, full.size(axis)))
    return varying, full


def _varies(full: Tensor, axis: int) -> bool:
    size = full.size(axis)
    if size < 2 or full.stride(axis) == 0:
        return False
    first = full.narrow(axis, 0, 1)
    # Comparing two neighbours is enough for most axes that vary; only the others need a comparison of all elements.
    return bool((first != full.narrow(axis, 1, 1)).any()) or bool((first != full).any())
