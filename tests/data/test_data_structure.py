"""Samples of any structure: their description, batches and examples."""

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from autoslim.data.prepared import DataInfo
from autoslim.data.structure import (
    Structure,
    StructureError,
    collated,
    in_words,
    structure_of_batch,
    tensor_structure,
    zeros,
)

Boxes = namedtuple("Boxes", "corners label")

SAMPLES: list[Any] = [
    torch.ones(3, 4, 5),
    torch.ones(2, dtype=torch.bfloat16),
    np.ones((2, 3), np.uint8),
    np.ones(2),
    np.int64(3),
    7,
    0.5,
    True,
    "name",
    (torch.ones(2), 3),
    [torch.ones(2), np.ones(1, np.int32)],
    {"left": torch.ones(1), "right": (1.0, ["a", torch.ones(2, dtype=torch.bool)])},
    Boxes(torch.ones(4), 2),
]


def structure_of(sample: Any) -> Structure:
    """Returns the structure of a sample's input or target."""
    return structure_of_batch(collated([sample]))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_batch_has_the_values_of_torchs_collation_and_the_shapes_of_the_description(sample: Any) -> None:
    batch = collated([sample, sample])
    assert all(isinstance(batch, kind) == isinstance(sample, kind) for kind in (tuple, dict))
    leaves, wanted = tree_leaves(batch), tree_leaves(default_collate([sample, sample]))
    described = tree_leaves(zeros(structure_of(sample), 2))
    for leaf, expected, zero in zip(leaves, wanted, described, strict=True):
        if isinstance(leaf, str):
            assert (leaf, zero) == (expected, "")
            continue
        assert torch.equal(leaf, expected)
        assert leaf.dtype == (torch.float32 if expected.dtype == torch.float64 else expected.dtype)
        assert (zero.shape, zero.dtype, bool(zero.any())) == (leaf.shape, leaf.dtype, False)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([torch.ones(2), torch.ones(3)], r"different shapes: \(2,\), \(3,\)"),
        ([[1], (1,)], "different types: list, tuple"),
        ([torch.ones(2), 1], "expected Tensor as element 1"),
        ([(1, 2), (1,)], r"different lengths: \[1, 2\]"),
        ([{"a": 1}, {"b": 1}], "different keys"),
        ([None], "NoneType is not a tensor, an array, a number or text"),
        ([Image.new("RGB", (2, 2))], "Image is not a tensor, an array, a number or text"),
    ],
)
def test_samples_that_make_no_batch(samples: list[Any], message: str) -> None:
    with pytest.raises(StructureError, match=message):
        collated(samples)


def test_keys_of_a_mapping_are_text() -> None:
    with pytest.raises(StructureError, match="has the keys 1, which must be text"):
        structure_of({1: 2})


def info(inputs: Structure | None = None, targets: Structure | None = None, classes: tuple[str, ...] = ()) -> DataInfo:
    size = (0, 0) if inputs else (4, 5)
    structures = {"inputs": inputs or {}, "targets": targets or {}}
    return DataInfo("own", classes, 0 if inputs else 3, size, (), (), {"train": 1}, "own", **structures)


def test_the_example_of_images_is_one_black_image() -> None:
    images = info(classes=("a", "b"))
    assert images.example().shape == (1, 3, 4, 5)
    assert images.example(2).shape == (2, *images.input_shape)
    assert images.targets == tensor_structure(dtype="int64")
    assert DataInfo.from_json(images.to_json()) == images


def test_the_example_of_several_inputs_has_their_structure() -> None:
    own = info(structure_of((torch.ones(2), {"tokens": torch.ones(7, dtype=torch.int64)})), structure_of(1.0))
    image, tokens = own.example()
    assert (image.shape, tokens["tokens"].shape, tokens["tokens"].dtype) == ((1, 2), (1, 7), torch.int64)
    assert DataInfo.from_json(own.to_json()) == own
    assert in_words(own.inputs) == "(2, {tokens: 7 int64})"
    with pytest.raises(ValueError, match="not a single tensor"):
        own.input_shape  # noqa: B018


@pytest.mark.parametrize(
    ("target", "classes", "outputs"),
    [
        (3, ("a", "b", "c", "d"), 4),
        (0.5, (), 1),
        (torch.zeros(6), (), 6),
        (torch.zeros(6, dtype=torch.int64), (), 6),
        (torch.zeros(5, 5, dtype=torch.int64), (), None),
        (torch.zeros(5, 5, dtype=torch.int64), ("sky", "sea"), 2),
        (torch.zeros(5, 3), (), 3),
        ((1.0, torch.zeros(2)), (), None),
    ],
)
def test_the_number_of_outputs_that_targets_ask_for(target: Any, classes: tuple[str, ...], outputs: int | None) -> None:
    assert info(tensor_structure(3), structure_of(target), classes).outputs == outputs
