"""Inference memory in closed form: weights, and the peak of the activations that are alive at once."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoslim.channels.groups import Axis, axis_size


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


@dataclass(frozen=True)
class MemoryModel:
    """The bytes of a network as sums over the sizes of its axes; index 0 stands for the number 1."""

    axes: tuple[Axis, ...]  # from index 1 on
    weights: tuple[tuple[tuple[int, ...], int], ...]  # axes, and the bytes of the tensors with these for each element
    alive: np.ndarray  # (n, 1 + axes), int64: bytes that activations take at once for each channel of an axis

    def bytes(self, channels: Mapping[str, int]) -> int:
        sizes = [1, *(axis_size(axis, channels) for axis in self.axes)]
        weights = sum(size * math.prod(sizes[index] for index in axes) for axes, size in self.weights)
        return weights + int((self.alive @ np.array(sizes)).max(initial=0))


def memory_model(
    operations: Sequence[Operation],
    tensors: Mapping[str, tuple[Axis, ...]],
    element_bytes: Mapping[str, int],
    other_bytes: int,
) -> MemoryModel:
    """The model of a network with these operations, and with these axes of its tensors (see ``ChannelGraph``)."""
    place: dict[Axis, int] = {}
    weights: Counter[tuple[int, ...]] = Counter({(): other_bytes})
    for name, size in element_bytes.items():
        fixed = [axis for axis in tensors[name] if all(segment.group is None for segment in axis)]
        slimmable = [axis for axis in tensors[name] if axis not in fixed]
        indices = tuple(place.setdefault(axis, len(place) + 1) for axis in slimmable)
        weights[indices] += size * math.prod(axis_size(axis, {}) for axis in fixed)
    terms: list[Counter[int]] = []
    for outputs in live_outputs(operations):
        term: Counter[int] = Counter()
        for output in outputs:
            assert output.shape is not None
            if output.axis is None:
                term[0] += output.bytes * math.prod(output.shape)
            else:
                dimension, axis = output.axis
                rest = math.prod(output.shape[:dimension]) * math.prod(output.shape[dimension + 1 :])
                term[place.setdefault(axis, len(place) + 1)] += output.bytes * rest
        terms.append(term)
    rows = np.array([[term[index] for index in range(len(place) + 1)] for term in terms], np.int64)
    rows = np.unique(rows, axis=0)
    highest = [row for row in rows if (rows >= row).all(1).sum() == 1]  # no other is as high in every term
    return MemoryModel(tuple(place), tuple(weights.items()), np.array(highest))


def live_outputs(operations: Sequence[Operation]) -> Iterator[list[Operation]]:
    """While each operation runs, the outputs in whose memory the activations lie that are there."""
    outputs = {operation.name: (operation, *operation.parts) for operation in operations}
    owners = {output.name: output for several in outputs.values() for output in several}
    held = {name: {output.storage for output in several} - {""} for name, several in outputs.items()}
    last: dict[str, str] = {}  # the operation that reads in a memory last
    for operation in operations:
        for name in (operation.name, *operation.reads):
            last |= dict.fromkeys(held[name], operation.name)
    alive: set[str] = set()
    for operation in operations:
        alive |= held[operation.name]
        yield [owners[storage] for storage in sorted(alive)]
        alive = {storage for storage in alive if last[storage] != operation.name}
