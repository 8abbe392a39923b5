"""Inference memory in closed form: the weights, and the peak of the activations that are alive at the same time."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoslim.channels.groups import Axis, axis_size


@dataclass(frozen=True)
class Operation:
    """One operation of the traced graph, in evaluation mode on one image.

    Attributes:
        name: The name of the torch.fx node.
        reads: The operations whose outputs it reads.
        shape: The shape of its output in the traced network, or None if the output is not one tensor.
        axes: The dimensions along which the channels of the output lie, and these axes, if they depend on a group. For
            channels that a shuffle has reordered, only the size of the axis is correct. Only weights that the network
            computes have more than one.
        storage: The operation, or part of one, that allocated the memory of the output: this one, or the first one
            whose memory it views or overwrites. It is empty for outputs that are not activations (parameters, numbers).
        bytes: The size of an element of the output.
        parts: The tensors in an output that is not one tensor.
    """

    name: str
    reads: tuple[str, ...]
    shape: tuple[int, ...] | None
    axes: tuple[tuple[int, Axis], ...]
    storage: str
    bytes: int
    parts: tuple["Operation", ...] = ()

    def elements(self, channels: Mapping[str, int]) -> int:
        """Returns the number of elements of the output; 0 if it is not one tensor."""
        if self.shape is None:
            return 0
        return self.constant * math.prod(axis_size(axis, channels) for _, axis in self.axes)

    @property
    def constant(self) -> int:
        """The product of the sizes that depend on no group."""
        assert self.shape is not None
        variable = {dimension for dimension, _ in self.axes}
        return math.prod(size for dimension, size in enumerate(self.shape) if dimension not in variable)


@dataclass(frozen=True)
class MemoryModel:
    """The memory of a network as a sum over products of axis sizes."""

    axes: tuple[Axis, ...]
    weights: tuple[tuple[tuple[int, ...], int], ...]  # axes -> bytes per element of all tensors with these axes
    products: tuple[tuple[int, ...], ...]  # the axes of each column of ``alive``
    alive: np.ndarray  # (operations, products), int64: bytes per element of each product that are alive

    def bytes(self, channels: Mapping[str, int]) -> int:
        """Returns the bytes of the weights plus the peak of the activations."""
        sizes = [axis_size(axis, channels) for axis in self.axes]
        weights = sum(size * math.prod(sizes[index] for index in axes) for axes, size in self.weights)
        products = [math.prod(sizes[index] for index in axes) for axes in self.products]
        return weights + int((self.alive @ np.array(products, np.int64)).max(initial=0))


def memory_model(
    operations: Sequence[Operation],
    tensors: Mapping[str, tuple[Axis, ...]],
    element_bytes: Mapping[str, int],
    other_bytes: int,
) -> MemoryModel:
    """Returns the memory model of a network. The arguments are fields of ``ChannelGraph``."""
    index_of: dict[Axis, int] = {}
    weights: Counter[tuple[int, ...]] = Counter({(): other_bytes})
    for name, size in element_bytes.items():
        constant = [axis for axis in tensors[name] if all(segment.group is None for segment in axis)]
        slimmable = [axis for axis in tensors[name] if axis not in constant]
        indices = tuple(index_of.setdefault(axis, len(index_of)) for axis in slimmable)
        weights[indices] += size * math.prod(axis_size(axis, {}) for axis in constant)
    terms: list[Counter[tuple[int, ...]]] = []
    for outputs in live_outputs(operations):
        term: Counter[tuple[int, ...]] = Counter()
        for output in outputs:
            indices = tuple(index_of.setdefault(axis, len(index_of)) for _, axis in output.axes)
            term[indices] += output.bytes * output.constant
        terms.append(term)
    products = tuple(dict.fromkeys(indices for term in terms for indices in term))
    rows = np.array([[term[indices] for indices in products] for term in terms], np.int64)
    rows = np.unique(rows, axis=0)
    highest = [row for row in rows if (rows >= row).all(1).sum() == 1]  # no other row is at least as large everywhere
    return MemoryModel(tuple(index_of), tuple(weights.items()), products, np.array(highest))


def live_outputs(operations: Sequence[Operation]) -> Iterator[list[Operation]]:
    """Yields, for each operation, the outputs that own the memory of all activations alive while it runs."""
    outputs = {operation.name: (operation, *operation.parts) for operation in operations}
    owners = {output.name: output for several in outputs.values() for output in several}
    storages = {name: {output.storage for output in several} - {""} for name, several in outputs.items()}
    last: dict[str, str] = {}  # storage -> the last operation that reads from it
    for operation in operations:
        for name in (operation.name, *operation.reads):
            last |= dict.fromkeys(storages[name], operation.name)
    alive: set[str] = set()
    for operation in operations:
        alive |= storages[operation.name]
        yield [owners[storage] for storage in sorted(alive)]
        alive = {storage for storage in alive if last[storage] != operation.name}
