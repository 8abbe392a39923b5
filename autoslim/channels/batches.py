"""Batches of any structure: pairs of inputs and targets, and calls of a network with its inputs."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoslim.channels.inputs import Arguments
from autoslim.errors import UserError

Batch = Any
"""A pair (inputs, targets), as a tuple or a list, both of any structure; see ``batch_arguments`` for the inputs."""


def batch_arguments(inputs: Any) -> Arguments:
    """Returns the arguments of ``forward``: ``*inputs`` for a tuple or a list, ``**inputs`` for a mapping.

    A data loader of torch returns lists where the dataset has tuples, so both are several arguments.
    """
    return Arguments.of(tuple(inputs) if isinstance(inputs, list) else inputs)


def call(network: nn.Module, inputs: Any) -> Any:
    """Calls the network with the inputs of a batch (see ``batch_arguments``)."""
    return batch_arguments(inputs).run(network)


def split_batch(batch: Batch) -> tuple[Any, Any]:
    """Returns the inputs and the targets of a batch.

    Raises:
        UserError: the batch is not a pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        kind = f"a {type(batch).__name__}" + (f" of {len(batch)} elements" if isinstance(batch, tuple | list) else "")
        raise UserError(
            f"a batch must be a pair (inputs, targets), but this one is {kind}; convert it, for example with "
            "((batch['image'], batch['label']) for batch in loader)"
        )
    return batch[0], batch[1]


def to_device(values: Any, device: torch.device) -> Any:
    """Returns ``values`` with all tensors on the device. Structures of lists, tuples and mappings are kept."""
    return tree_map(lambda value: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value, values)


def device_of(network: nn.Module) -> torch.device:
    """Returns the device of the network's first parameter or buffer; the CPU if it has none."""
    first = next(iter([*network.parameters(), *network.buffers()]), None)
    return torch.device("cpu") if first is None else first.device


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """Yields (inputs, targets) of each batch on the device.

    Raises:
        UserError: a batch is not a pair.
    """
    for batch in batches:
        yield split_batch(to_device(batch, device))


def first_tensor(values: Any) -> Tensor:
    """Returns the first tensor in ``values`` that has a dimension: that of the samples.

    Raises:
        UserError: there is no such tensor.
    """
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.dim():
            return value
    raise UserError("the inputs of a batch contain no tensor; a batch is a pair (inputs, targets)")
