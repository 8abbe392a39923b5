"""The outputs of a network or of an operation: tensors, nested in any structure."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._pytree import tree_leaves


def output_leaves(output: Any) -> list[Any]:
    """Returns the leaves of a nested output, in order.

    An output may be nested in tuples, lists, mappings (also their subclasses), dataclasses, and types that are known to
    ``torch.utils._pytree``. Anything else, such as a tensor or None, is a leaf.
    """
    leaves: list[Any] = []
    nested(output, leaves.append)
    return leaves


def nested(output: Any, of_leaf: Callable[[Any], Any]) -> Any:
    """Returns a nested output as dictionaries and lists, with each leaf replaced by ``of_leaf(leaf)``."""
    if isinstance(output, Mapping):
        return {key: nested(value, of_leaf) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return [nested(value, of_leaf) for value in output]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: nested(getattr(output, field.name), of_leaf) for field in dataclasses.fields(output)}
    leaves = tree_leaves(output)
    if len(leaves) == 1 and leaves[0] is output:
        return of_leaf(output)
    return [nested(leaf, of_leaf) for leaf in leaves]
