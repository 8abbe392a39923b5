"""Inputs and targets of any structure: tuples, lists and mappings of tensors, numbers and text.

A sample's structure is described in JSON. A tensor or number is its shape and dtype, ``{"shape": [3, 32, 32], "dtype":
"float32"}``, and text has the dtype "str". Containers are ``{"tuple": [...]}``, ``{"list": [...]}`` or ``{"mapping":
{...}}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from autoslim.errors import first_line

Structure = dict[str, Any]


class StructureError(ValueError):
    """Raised for values that have no structure of this kind, or for samples whose structures differ."""


def tensor_structure(*shape: int, dtype: str = "float32") -> Structure:
    """Returns the structure of a single tensor."""
    return {"shape": list(shape), "dtype": dtype}


def collated(samples: Sequence[Any]) -> Any:
    """Returns a batch of ``samples``: each tensor gets a first dimension, and each text becomes a list of texts.

    The leaves are those of torch's ``default_collate``, except that float64, which Python's numbers become, is
    converted to float32, the dtype of networks. Containers become tuples, lists or dicts. Those of inputs are the
    arguments of a network, by position or, from a mapping, by name.

    Raises:
        StructureError: the samples differ in structure or shape, or contain something that is not a tensor, an array, a
            number or text.
    """
    first = samples[0]
    for kind in (Mapping, tuple, list):
        if len({isinstance(sample, kind) for sample in samples}) > 1:
            kinds = sorted({type(sample).__name__ for sample in samples})
            raise StructureError(f"samples are of different types: {', '.join(kinds)}")
    if isinstance(first, Mapping):
        if any(sample.keys() != first.keys() for sample in samples):
            raise StructureError("samples have different keys")
        return {key: collated([sample[key] for sample in samples]) for key in first}
    if isinstance(first, tuple | list):
        if any(len(sample) != len(first) for sample in samples):
            raise StructureError(f"samples have different lengths: {sorted({len(sample) for sample in samples})}")
        parts = [collated(column) for column in zip(*samples, strict=True)]
        return parts if isinstance(first, list) else tuple(parts)
    if all(hasattr(sample, "shape") for sample in samples):
        shapes = sorted({tuple(sample.shape) for sample in samples})
        if len(shapes) > 1:
            raise StructureError(f"samples have different shapes: {', '.join(map(str, shapes[:3]))}")
    try:
        batch = default_collate(list(samples))
    except (TypeError, RuntimeError) as error:
        if isinstance(first, Tensor):
            raise StructureError(first_line(error)) from error
        raise StructureError(f"{type(first).__name__} is not a tensor, an array, a number or text") from error
    return batch.float() if isinstance(batch, Tensor) and batch.dtype == torch.float64 else batch


def structure_of_batch(batch: Any, *, wide: bool = False) -> Structure:
    """Returns the structure of each sample of a batch that ``collated`` made; if ``wide``, with int64 for integers.

    Raises:
        StructureError: the keys of a mapping are not text.
    """
    if isinstance(batch, Mapping):
        if any(not isinstance(key, str) for key in batch):
            raise StructureError(f"a mapping has the keys {', '.join(map(repr, batch))}, which must be text")
        return {"mapping": {key: structure_of_batch(value, wide=wide) for key, value in batch.items()}}
    if isinstance(batch, Tensor):
        dtype = torch.int64 if wide and is_integer(batch.dtype) else batch.dtype
        return tensor_structure(*batch.shape[1:], dtype=str(dtype).removeprefix("torch."))
    if isinstance(batch, list) and batch and isinstance(batch[0], str | bytes):
        return tensor_structure(dtype="str")
    kind = "tuple" if isinstance(batch, tuple) else "list"
    return {kind: [structure_of_batch(value, wide=wide) for value in batch]}


def is_integer(dtype: torch.dtype) -> bool:
    """Returns whether values of a dtype are integers; truth values are not."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def zeros(structure: Structure, batch: int) -> Any:
    """Returns a batch of this structure, of zeros and empty texts."""
    if "mapping" in structure:
        return {key: zeros(value, batch) for key, value in structure["mapping"].items()}
    if "list" in structure:
        return [zeros(value, batch) for value in structure["list"]]
    if "tuple" in structure:
        return tuple(zeros(value, batch) for value in structure["tuple"])
    if structure["dtype"] == "str":
        return [""] * batch
    return torch.zeros(batch, *structure["shape"], dtype=getattr(torch, structure["dtype"]))


def is_tensor(structure: Structure) -> bool:
    """Returns whether this is a single tensor or number."""
    return "shape" in structure and structure["dtype"] != "str"


def is_class_number(structure: Structure) -> bool:
    """Returns whether this is a single integer (not a truth value)."""
    return is_tensor(structure) and not structure["shape"] and is_integer(getattr(torch, structure["dtype"]))


def in_words(structure: Structure) -> str:
    """Returns a description for messages, such as "3x32x32" or "(3x32x32, int64)"."""
    if "mapping" in structure:
        return "{" + ", ".join(f"{key}: {in_words(value)}" for key, value in structure["mapping"].items()) + "}"
    if "list" in structure:
        return "[" + ", ".join(map(in_words, structure["list"])) + "]"
    if "tuple" in structure:
        return "(" + ", ".join(map(in_words, structure["tuple"])) + ")"
    shape = "x".join(map(str, structure["shape"]))
    return shape if shape and structure["dtype"] == "float32" else " ".join(filter(None, (shape, structure["dtype"])))


def not_finite(batch: Any) -> str:
    """Returns "nan" or "infinite values" if a batch has some; "" if it has none.

    A single tensor must be finite. A part of another structure may be infinite, such as a mask that is added to scores.
    """
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if any(bool(tensor.isnan().any()) for tensor in tensors):
        return "nan"
    return "infinite values" if isinstance(batch, Tensor) and bool(batch.isinf().any()) else ""


def on_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a batch with each tensor replaced by ``change(tensor)``."""
    if isinstance(batch, Mapping):
        return {key: on_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, list):
        return [on_tensors(value, change) for value in batch]
    if isinstance(batch, tuple):
        return tuple(on_tensors(value, change) for value in batch)
    return change(batch) if isinstance(batch, Tensor) else batch
