"""Where in a tensor its channel labels lie."""

import numpy as np
import torch
from torch import Tensor

from autoslim.networks.tracing.labels import Vector


class Flow:
    """The labels of a tensor's elements.

    Almost always they vary along one axis only, the channels' one: ``axis`` and ``vector`` then say it all. Inside a
    channel shuffle they vary along two, and only ``full()`` does.
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
        """The flow of a tensor of labels, in its shortest form."""
        varying, rest = _narrowed(full)
        if len(varying) == 1:
            return cls(full.shape, varying[0], rest.flatten().numpy())
        flow = cls(full.shape)
        if varying or (rest.numel() and int(rest.flatten()[0])):
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

    def varying(self) -> list[int]:
        """The axes along which the labels vary."""
        return _narrowed(self.full())[0]

    def narrowed(self) -> Tensor:
        """The labels, of all other axes one element only."""
        return _narrowed(self.full())[1]

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
        """The same labels on the same axis of a tensor whose other axes have other sizes (after pooling, padding)."""
        return Flow(shape, self.axis, self.vector)


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
    # Two neighbours tell most axes that vary; only for the others the whole tensor is looked at.
    return bool((first != full.narrow(axis, 1, 1)).any()) or bool((first != full).any())
