"""``hf:PATH``: folders that ``save_to_disk`` of Hugging Face's package datasets wrote, for classifying images.

The types of the columns show which of them has the images (``Image``) and which the classes (``ClassLabel``). If there
are several, a query names them: ``hf:PATH?image=photo&label=fine_label``.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from autoslim.data.images import DEEP_BITS, decoded, unreadable
from autoslim.data.sources import Part, Source, located
from autoslim.errors import UserError, first_line
from autoslim.files import sha256

_SCHEME = "hf:"
_TEST_SPLITS = ("test", "validation", "valid", "val")
_COLUMNS = {"image": "Image", "label": "ClassLabel"}  # key of the query -> type of the column
_FILES = ("dataset_dict.json", "state.json")  # of a folder with splits, and of one without


def is_hugging_face(source: str) -> bool:
    """Returns whether a data source is ``hf:PATH``."""
    return source.startswith(_SCHEME)


def check_hugging_face(source: str, relative_to: Path) -> tuple[Path, dict[str, str]]:
    """Returns the folder of a source, and the columns that it names, without opening data.

    Raises:
        UserError: datasets is not installed, the folder does not exist or has another format, or the query is wrong.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"data source {source} needs the package datasets, autoslim's extra hf; install it with `pip install "
            "datasets`"
        )
    path, _, query = source.removeprefix(_SCHEME).partition("?")
    columns = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := [key for key in columns if key not in _COLUMNS]:
        raise UserError(f"data source {source} has no option {unknown[0]!r}; its options are image and label")
    folder = located(path, relative_to)
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist; write it with save_to_disk of a Hugging Face data set")
    if not any((folder / name).is_file() for name in _FILES):
        raise UserError(
            f"data folder {folder} has neither {' nor '.join(_FILES)}; write it with save_to_disk of a Hugging Face "
            "data set, or use folder:PATH for image files in folders"
        )
    return folder, columns


def load_hugging_face_source(source: str, relative_to: Path) -> Source:
    """Returns the source in a folder. Without a test split, ``prepare`` holds one out.

    Classes without training images are left out.

    Raises:
        UserError: the folder cannot be read, has no training split, or its columns are not images and classes.
    """
    folder, _ = check_hugging_face(source, relative_to)
    images = HuggingFaceImages(source, folder, None)
    splits = images.splits
    train_name = "train" if "train" in splits or len(splits) > 1 else next(iter(splits))
    if train_name not in splits:
        raise UserError(f"{source} has the splits {', '.join(splits)}, but no train; name one of them train")
    image, label = images.columns
    numbers = {name: _class_numbers(dataset, label) for name, dataset in splits.items()}
    others = [name for name in _TEST_SPLITS if name in splits and name != train_name]
    test_name = next((name for name in others if (numbers[name] >= 0).all()), None)  # hidden classes are -1
    train_numbers = numbers[train_name]
    if (train_numbers < 0).any():
        raise UserError(f"{source}: {(train_numbers < 0).sum()} images of {train_name} have no class; remove them")
    present = np.unique(train_numbers)
    names = splits[train_name].features[label].names

    def part(split: str) -> Part:
        if unknown := np.setdiff1d(numbers[split], present).tolist():
            raise UserError(f"{source}: images of class {names[unknown[0]]} are in {split}, but not in {train_name}")
        encoded = splits[split].cast_column(image, _undecoded())

        def content(index: int) -> bytes:
            value = encoded[index][image]
            if value["bytes"] is None:
                return sha256(Path(value["path"])).encode()
            return hashlib.sha256(value["bytes"]).digest()

        return Part(
            labels=np.searchsorted(present, numbers[split]).astype(np.int64),
            read=lambda index: images(f"{split}/{index}"),
            paths=[f"{split}/{index}" for index in range(len(numbers[split]))],
            content=content,
        )

    return Source(
        classes=tuple(names[number] for number in present),
        train=part(train_name),
        test=None if test_name is None else part(test_name),
        root=source.removeprefix(_SCHEME).partition("?")[0],
    )


class HuggingFaceImages:
    """Decodes the image with a path ``split/index``. Another process opens the folder again.

    Args:
        source: the data source.
        folder: the folder that it names.
        channels: number of channels after decoding; None: as stored.
        bits: see ``images.with_channels``.
    """

    def __init__(self, source: str, folder: Path, channels: int | None, bits: int = DEEP_BITS) -> None:
        self.source, self.folder, self.channels, self.bits = source, folder, channels, bits
        self._opened: tuple[Mapping[str, Any], tuple[str, str]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def splits(self) -> Mapping[str, Any]:
        """The data sets by split."""
        return self._open()[0]

    @property
    def columns(self) -> tuple[str, str]:
        """The names of the columns with the images and the classes."""
        return self._open()[1]

    def _open(self) -> tuple[Mapping[str, Any], tuple[str, str]]:
        if self._opened is None:
            splits = _loaded(self.source, self.folder)
            query = dict(parse_qsl(self.source.partition("?")[2]))
            features = next(iter(splits.values())).features
            image, label = (_column(self.source, features, key, kind, query) for key, kind in _COLUMNS.items())
            self._opened = splits, (image, label)
        return self._opened

    def __call__(self, path: str) -> Image.Image:
        split, _, index = path.rpartition("/")
        try:
            image: Image.Image = self.splits[split][int(index)][self.columns[0]]
            return decoded(image, self.channels, self.bits)
        except Exception as error:  # decoders may raise anything
            raise unreadable(f"image {index} of {split} of {self.source}", error) from error


def _loaded(source: str, folder: Path) -> Mapping[str, Any]:
    from datasets import DatasetDict, load_from_disk  # slow to import, and optional

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # damaged or incomplete files
        raise UserError(
            f"{source} cannot be read ({type(error).__name__}: {first_line(error)}); write it again with save_to_disk"
        ) from error
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    if empty := [name for name, dataset in splits.items() if not len(dataset)]:
        raise UserError(f"{source}: its split {empty[0]} is empty; remove it or add images")
    return splits


def _column(source: str, features: Mapping[str, Any], key: str, kind: str, query: Mapping[str, str]) -> str:
    """Returns the name of the column of a type.

    Raises:
        UserError: there is none, there are several, or the one that the source names has another type.
    """
    fitting = [name for name, feature in features.items() if type(feature).__name__ == kind]
    chosen = query.get(key)
    if chosen is not None and chosen not in fitting:
        raise UserError(
            f"{source}: {chosen!r} is no column of type {kind}; columns of this type are {', '.join(fitting) or 'none'}"
        )
    if not fitting:
        known = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise UserError(
            f"{source} has no column of type {kind}; its columns are {known}: cast one with cast_column, or write a "
            "data set of your own (data.source: my_data.py:build)"
        )
    if chosen is None and len(fitting) > 1:
        separator = "&" if "?" in source else "?"
        raise UserError(
            f"{source} has {len(fitting)} columns of type {kind} ({', '.join(fitting)}); choose one of them, for "
            f"example {source}{separator}{key}={fitting[0]}"
        )
    return chosen or fitting[0]


def _class_numbers(dataset: Any, label: str) -> np.ndarray:
    """Returns the class numbers, int64 (N,); -1 for images without a class."""
    column = dataset.select_columns([label]).with_format("arrow")[:][label]
    numbers: np.ndarray = column.combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers


def _undecoded() -> Any:
    from datasets import Image as ImageFeature

    return ImageFeature(decode=False)
