"""The items of a torchvision data set: their class numbers, their files, and how one is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from autoslim.engine.data.pixels import open_image, unreadable
from autoslim.engine.data.source import Part
from autoslim.vocabulary.errors import UserError

# Attributes that torchvision's data sets keep their items in; none is believed before it agrees with some items.
_LABELS = ("targets", "labels", "_labels", "y")
_PAIRS = ("samples", "_samples", "imgs")  # lists of (path, label)
_FILES = ("_image_files", "_images")
_PROBES = 16


def check_pair(name: str, dataset: Any) -> None:
    """The first item must be (PIL image, class number)."""
    item = dataset[0]
    label = item[1] if isinstance(item, tuple) and len(item) == 2 else None
    number = isinstance(label, int | np.integer) or (isinstance(label, torch.Tensor) and label.ndim == 0)
    if not (number and isinstance(item[0], Image.Image)):
        raise UserError(f"torchvision:{name} does not give (image, class) pairs; use an image classification set")


def class_numbers(name: str, dataset: Any) -> np.ndarray:
    """Class numbers int64 (N,), from an attribute where one agrees with the items, else by reading every item."""
    check_pair(name, dataset)
    probes = sorted({int(position) for position in np.linspace(0, len(dataset) - 1, _PROBES)})
    for values in _candidates(dataset, _LABELS, 1):
        try:
            labels = np.asarray(values).astype(np.int64)
        except (TypeError, ValueError):
            continue
        if labels.shape == (len(dataset),) and all(labels[probe] == int(dataset[probe][1]) for probe in probes):
            return labels
    return np.array([int(dataset[index][1]) for index in range(len(dataset))], dtype=np.int64)


def _files(dataset: Any, root: Path) -> list[str] | None:
    """Paths relative to ``root`` where the items are plain files of images below it, else None."""
    probes = sorted({int(position) for position in np.linspace(0, len(dataset) - 1, 3)})
    for values in _candidates(dataset, _FILES, 0):
        if len(values) != len(dataset) or not all(isinstance(value, str | Path) for value in values):
            continue
        paths = [Path(value).absolute() for value in values]
        if not all(path.is_relative_to(root.absolute()) for path in paths):
            continue
        if all(_same(paths[probe], dataset[probe][0]) for probe in probes):
            return [path.relative_to(root.absolute()).as_posix() for path in paths]
    return None


def _candidates(dataset: Any, names: Sequence[str], column: int) -> list[Sequence[Any]]:
    """Attributes called ``names``, then the given column of lists of pairs."""
    found = [getattr(dataset, name) for name in names if hasattr(dataset, name)]
    for name in _PAIRS:
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            found.append([pair[column] for pair in pairs])
    return found


def _same(path: Path, image: Image.Image) -> bool:
    return path.is_file() and np.array_equal(np.asarray(open_image(path, 3)), np.asarray(image.convert("RGB")))


def class_name(names: Any, number: int) -> str:
    """A class's name; its number where the set has no names."""
    if not isinstance(names, list | tuple) or number >= len(names):
        return str(number)
    return ", ".join(names[number]) if isinstance(names[number], tuple) else str(names[number])


def part_of(name: str, dataset: Any, labels: np.ndarray, root: Path) -> Part:
    """A part with the given class numbers, read from files below ``root`` where the items are such, else by the set."""
    paths = _files(dataset, root)
    if paths is not None:
        return Part(labels=labels, read=lambda index: open_image(root / paths[index], None), paths=paths)

    def read(index: int) -> Image.Image:
        try:
            image: Image.Image = dataset[index][0]
            return image
        except Exception as error:  # whatever the set's own decoding raises
            raise unreadable(f"image {index} of torchvision:{name}", error) from error

    return Part(labels=labels, read=read, paths=None)
