"""Axes of tensors as runs of channels, and the operations whose outputs have them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A run of consecutive channels on a tensor's axis: ``count`` of them for every ``unit`` channels of ``group``.

    Without a group the run has ``count`` channels whatever the configuration.
    """

    group: str | None
    count: int
    unit: int = 1

    def size(self, channels: Mapping[str, int]) -> int:
        return self.count if self.group is None else channels[self.group] // self.unit * self.count


Axis = tuple[Segment, ...]
"""A tensor's axis, as the runs of channels that it concatenates."""


def axis_size(axis: Iterable[Segment], channels: Mapping[str, int]) -> int:
    return sum(segment.size(channels) for segment in axis)


@dataclass(frozen=True)
class Operation:
    """One operation of the traced graph, in evaluation mode on one image.

    ``shape`` is its output's in the network as traced, None where that is not one tensor (a tuple, a number); ``parts``
    are then the tensors that it holds, if any. ``axis`` is the dimension along which its channels lie, and that axis,
    where they depend on a group; of channels that a shuffle put out of order it has the right number only. ``storage``
    names the operation (or part of one) in whose memory the output lies: itself, or the first one whose memory it views
    or writes over in place; it is empty for what is no activation (parameters, numbers).
    """

    name: str  # of the torch.fx node
    reads: tuple[str, ...]  # the operations whose outputs it reads
    shape: tuple[int, ...] | None
    axis: tuple[int, Axis] | None
    storage: str
    bytes: int  # an element
    parts: tuple["Operation", ...] = ()

    def elements(self, channels: Mapping[str, int]) -> int:
        """Of its output; 0 where that is not one tensor."""
        if self.shape is None:
            return 0
        if self.axis is None:
            return math.prod(self.shape)
        dimension, axis = self.axis
        return math.prod(self.shape[:dimension]) * axis_size(axis, channels) * math.prod(self.shape[dimension + 1 :])
