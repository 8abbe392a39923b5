"""``torchvision:NAME``: any image classification set of ``torchvision.datasets``, by its own download.

Constructors differ; what is needed is read off the signature. A set with ``train=`` is built twice; one with
``split=`` as "train" (or its default, where that has "train" in its name: "trainval", "train-standard") and as the
first of "test", "val", "valid" that exists and has labels; one with neither has a test split held out by the
preparation. Further constructor arguments are written like a query: ``torchvision:EMNIST?split=letters``,
``torchvision:Imagenette?size=160px``.
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
    """The class and the constructor arguments written behind "?". ``UserError`` for an unknown name or argument."""
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
    """Build the set, downloading it into ``raw`` where it is not there yet."""
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
    present = np.unique(train_labels)  # EMNIST's letters start at 1: numbers without images are left out
    names = getattr(train, "classes", None)
    classes = tuple(class_name(names, int(number)) for number in present)

    def part(dataset: Any, numbers: np.ndarray) -> Part:
        if unknown := np.setdiff1d(numbers, present).tolist():
            raise UserError(f"torchvision:{name}: classes {unknown[:5]} are in its test split but not in training")
        return part_of(name, dataset, np.searchsorted(present, numbers).astype(np.int64), root)

    return Source(
        classes=classes,
        train=part(train, train_labels),
        test=None if test is None else part(test, class_numbers(cls.__name__, test)),
        root=str(raw),
    )


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Named constructor parameters, those that ``**kwargs`` hands to the parent classes among them."""
    found: dict[str, inspect.Parameter] = {}
    for owner in cls.__mro__[:-1]:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _value(text: str) -> Any:
    """A constructor argument as written: true/false, an integer, or text."""
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
            raise ValueError("it holds no images")
        return dataset
    except Exception as error:  # a missing package, no network, a broken archive: theirs to name
        raise UserError(
            f"torchvision:{cls.__name__} could not be loaded ({type(error).__name__}: {first_line(error)}); "
            f"check the network, or put its files into {options.get('root', 'the raw folder')}"
        ) from error


def _test_split(cls: type, options: dict[str, Any]) -> Any:
    """The first split that exists (a ``ValueError`` otherwise, by torchvision's habit) and has labels."""
    reasons = []
    for split in _TEST_SPLITS:
        try:
            dataset = _build(cls, options | {"split": split})
            check_pair(cls.__name__, dataset)
            return dataset
        except UserError as error:
            if not isinstance(error.__cause__, ValueError | type(None)):
                raise  # no network, say: that must not choose the split
            reasons.append(error)
    raise reasons[0]


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
