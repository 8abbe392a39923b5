"""``torchvision:NAME``: the image classification data sets of ``torchvision.datasets``.

The signature of the constructor decides how a data set is split. With ``train=`` it is built twice. With ``split=`` it
is built as "train" (or the default, if its name contains "train": "trainval", "train-standard") and as the first of
"test", "val", "valid" that exists and has labels. With neither, ``prepare`` holds out a test split. Further constructor
arguments are written as a query: ``torchvision:EMNIST?split=letters``, ``torchvision:Imagenette?size=160px``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
import torchvision
from PIL import Image

from autoslim.data.images import open_image, unreadable
from autoslim.data.sources import Part, Source
from autoslim.errors import UserError, first_line

_TEST_SPLITS = ("test", "val", "valid")


def check_torchvision(name: str) -> tuple[type, dict[str, Any]]:
    """Returns the data set's class and the constructor arguments after "?".

    Raises:
        UserError: the name or an argument is unknown, or a required argument is missing.
    """
    set_name, _, query = name.partition("?")
    options = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    known = [key for key in torchvision.datasets.__all__ if isinstance(getattr(torchvision.datasets, key), type)]
    cls = getattr(torchvision.datasets, set_name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.utils.data.Dataset)):
        close = difflib.get_close_matches(set_name.lower(), [key.lower() for key in known], n=1)
        hint = next((f"did you mean {key}?" for key in known if key.lower() in close), "see torchvision's data sets")
        raise UserError(f"torchvision:{set_name}: torchvision.datasets has no data set {set_name!r}; {hint}")
    parameters = _parameters(cls)
    given_here = {"root", "download", *(("train",) if "train" in parameters else ("split",))}
    for key in options:
        if key not in parameters or (key in given_here and key != "split"):
            raise UserError(f"torchvision:{set_name} takes no argument {key!r} here; it has {', '.join(parameters)}")
    required = [key for key, value in parameters.items() if value.default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in given_here and key not in options]:
        query = "&".join(f"{key}=..." for key in missing)
        raise UserError(f"torchvision:{set_name} needs {', '.join(missing)}; write torchvision:{set_name}?{query}")
    return cls, options


def load_torchvision_source(name: str, raw: Path, relative_to: Path) -> Source:
    """Builds the data set, and downloads it to ``raw`` if necessary.

    Raises:
        UserError: the name or an argument is not valid, or the data set cannot be loaded.
    """
    cls, options = check_torchvision(name)
    root = relative_to / raw.expanduser()
    root.mkdir(parents=True, exist_ok=True)
    parameters = _parameters(cls)
    options |= {key: value for key, value in (("root", str(root)), ("download", True)) if key in parameters}
    if "train" in parameters:
        train, test = _build(cls, options | {"train": True}), _build(cls, options | {"train": False})
    elif "split" in parameters:
        default = parameters["split"].default
        split = options.pop("split", default if isinstance(default, str) and "train" in default else "train")
        train, test = _build(cls, options | {"split": split}), _test_split(cls, options)
    else:
        train, test = _build(cls, options), None
    train_labels = class_numbers(cls.__name__, train)
    present = np.unique(train_labels)  # numbers without images are skipped: EMNIST's letters start at 1
    names = getattr(train, "classes", None)
    classes = tuple(class_name(names, int(number)) for number in present)

    def part(dataset: Any, numbers: np.ndarray) -> Part:
        if unknown := np.setdiff1d(numbers, present).tolist():
            raise UserError(
                f"torchvision:{name}: classes {unknown[:5]} are in its test split but not in its training split"
            )
        return part_of(name, dataset, np.searchsorted(present, numbers).astype(np.int64), root)

    return Source(
        classes=classes,
        train=part(train, train_labels),
        test=None if test is None else part(test, class_numbers(cls.__name__, test)),
        root=str(raw),
    )


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Returns the named constructor parameters, including those that ``**kwargs`` passes to parent classes."""
    named: dict[str, inspect.Parameter] = {}
    for owner in cls.__mro__[:-1]:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                named.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return named


def _value(text: str) -> Any:
    """Converts the text of an argument to a bool, an int or a str."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        return text


def _build(cls: type, options: dict[str, Any]) -> Any:
    try:
        dataset: Any = cls(**options)
        if not len(dataset):
            raise ValueError("it has no images")
        return dataset
    except Exception as error:  # such as a missing package, no network or a damaged archive
        raise UserError(
            f"torchvision:{cls.__name__} could not be loaded ({type(error).__name__}: {first_line(error)}); "
            f"check the network, or put its files into {options.get('root', 'the raw folder')}"
        ) from error


def _test_split(cls: type, options: dict[str, Any]) -> Any:
    """Returns the first test split that exists and has labels. For other names, torchvision raises ``ValueError``."""
    reasons = []
    for split in _TEST_SPLITS:
        try:
            dataset = _build(cls, options | {"split": split})
            check_pair(cls.__name__, dataset)
            return dataset
        except UserError as error:
            if not isinstance(error.__cause__, ValueError | type(None)):
                raise  # for example, a lost connection must not decide the split
            reasons.append(error)
    raise reasons[0]


# Attributes in which torchvision's data sets store their items. One is used only if it agrees with sampled items.
_LABELS = ("targets", "labels", "_labels", "y")
_PAIRS = ("samples", "_samples", "imgs")  # lists of (path, label)
_FILES = ("_image_files", "_images")
_PROBES = 16


def check_pair(name: str, dataset: Any) -> None:
    """Checks that the first item is (PIL image, class number).

    Raises:
        UserError: the first item is something else.
    """
    item = dataset[0]
    label = item[1] if isinstance(item, tuple) and len(item) == 2 else None
    number = isinstance(label, int | np.integer) or (isinstance(label, torch.Tensor) and label.ndim == 0)
    if not (number and isinstance(item[0], Image.Image)):
        raise UserError(f"torchvision:{name} does not return (image, class) pairs; use an image classification set")


def class_numbers(name: str, dataset: Any) -> np.ndarray:
    """Returns class numbers, int64 (N,), from an attribute that agrees with the items, or else from every item."""
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
    """Returns paths relative to ``root`` if the items are image files below it, and None otherwise."""
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
    """Returns the attributes in ``names`` that exist, then ``column`` of the attributes that are lists of pairs."""
    candidates = [getattr(dataset, name) for name in names if hasattr(dataset, name)]
    for name in _PAIRS:
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            candidates.append([pair[column] for pair in pairs])
    return candidates


def _same(path: Path, image: Image.Image) -> bool:
    return path.is_file() and np.array_equal(np.asarray(open_image(path, 3)), np.asarray(image.convert("RGB")))


def class_name(names: Any, number: int) -> str:
    """Returns the name of a class, or its number if the data set has no names."""
    if not isinstance(names, list | tuple) or number >= len(names):
        return str(number)
    return ", ".join(names[number]) if isinstance(names[number], tuple) else str(names[number])


def part_of(name: str, dataset: Any, labels: np.ndarray, root: Path) -> Part:
    """Returns a part with these class numbers. It reads files below ``root`` if the items are files."""
    paths = _files(dataset, root)
    if paths is not None:
        return Part(labels=labels, read=lambda index: open_image(root / paths[index], None), paths=paths)

    def read(index: int) -> Image.Image:
        try:
            image: Image.Image = dataset[index][0]
            return image
        except Exception as error:  # decoders of data sets may raise anything
            raise unreadable(f"image {index} of torchvision:{name}", error) from error

    return Part(labels=labels, read=read, paths=None)
