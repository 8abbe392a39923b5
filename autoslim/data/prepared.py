"""The prepared data folder: its description (``data.json``) and its arrays or manifest."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from autoslim.data.images import DEEP_BITS, Size, evaluation_pixels
from autoslim.data.sources import Part, located
from autoslim.errors import UserError

SPLITS = ("train", "search", "test")
FILE_NAME = "data.json"
FORMAT = 2


@dataclass(frozen=True)
class DataInfo:
    """The description of a prepared data set.

    ``image_size`` is (height, width). ``mean`` and ``std`` are per channel, over the train split after the evaluation
    transform, for pixels in [0, 1]. ``counts`` are the numbers of images by split. ``storage`` is "arrays" (pixels as
    ``.npy``) or "files" (a manifest, no copy). ``resize`` is the shorter side of the box that images are resized to
    cover before the centre crop of ``image_size`` (see ``data.images``); 0 stands for that of ``image_size``. ``bits``
    is the number of bits that the values of images with more than 8 bits use. The paths of a manifest are relative to
    ``root`` ("files" only).
    """

    source: str
    classes: tuple[str, ...]
    channels: int
    image_size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts: dict[str, int]
    storage: str
    resize: int = 0
    root: str = ""
    bits: int = DEEP_BITS

    @property
    def shorter_side(self) -> int:
        """The shorter side of the box before the centre crop, in pixels."""
        return self.resize or min(self.image_size)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of an image: (C, H, W)."""
        return (self.channels, *self.image_size)

    def to_json(self) -> str:
        """Returns the text of ``data.json``. Equal values produce equal bytes."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DataInfo:
        """Restores the description from the text of ``data.json``.

        Raises:
            ValueError, KeyError: the text is not a ``data.json`` of this format.
        """
        values = json.loads(text)
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f"not a data.json of format {FORMAT}")
        known = {field.name: values[field.name] for field in fields(cls)}
        for name in ("classes", "image_size", "mean", "std"):
            known[name] = tuple(known[name])
        return cls(**known)


def read_info(folder: Path) -> DataInfo:
    """Reads ``data.json`` of a prepared folder.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{folder} is not a prepared data folder (it has no {FILE_NAME}); run the prepare stage first")
    try:
        return DataInfo.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}); run the prepare stage again") from error


MANIFEST = "manifest.csv"  # columns split, label, path; in the order of the splits
LEAST_STD = 1 / 255  # a constant channel has no deviation to divide by
_DIGITS = 6  # decimals of mean and std in data.json
_BLOCK = 1024  # images per block that is decoded

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
Result = TypeVar("Result")


def images_path(folder: Path, split: str) -> Path:
    """Returns the file of a split's images: uint8 (N, C, H, W)."""
    return folder / f"{split}.images.npy"


def labels_path(folder: Path, split: str) -> Path:
    """Returns the file of a split's labels: int64 (N,)."""
    return folder / f"{split}.labels.npy"


def channel_moments(images: Iterable[np.ndarray], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel of uint8 images (C, H, W), scaled to [0, 1], from exact sums."""
    total, squares, count = np.zeros(channels, np.int64), np.zeros(channels, np.int64), 0
    for image in images:
        values = image.reshape(channels, -1).astype(np.int64)
        total += values.sum(axis=1)
        squares += (values**2).sum(axis=1)
        count += values.shape[1]
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0)
    std = np.maximum(np.sqrt(variance) / 255, LEAST_STD)
    return tuple(np.round(mean / 255, _DIGITS).tolist()), tuple(np.round(std, _DIGITS).tolist())


def write_arrays(
    folder: Path,
    chosen: Mapping[str, tuple[Part, np.ndarray]],
    channels: int,
    shorter_side: int,
    size: Size,
    bits: int,
    progress: Progress,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Decodes every split into ``.npy`` files, block by block, and returns mean and std of the train split."""
    for split, (part, indices) in chosen.items():

        def decode(index: int, part: Part = part) -> np.ndarray:
            return evaluation_pixels(part.read(index), channels, shorter_side, size, bits)

        shape = (len(indices), channels, *size)
        images = np.lib.format.open_memmap(images_path(folder, split), mode="w+", dtype=np.uint8, shape=shape)
        for row, image in enumerate(progress(over_images(decode, part, indices), f"preparing {split}", len(indices))):
            images[row] = image
        images.flush()
        np.save(labels_path(folder, split), part.labels[indices])
    train = np.load(images_path(folder, "train"), mmap_mode="r")
    return channel_moments(train, channels)


def over_images(function: Callable[[int], Result], part: Part, indices: np.ndarray) -> Iterator[Result]:
    """Yields ``function(index)`` for each index in order. Images in files are decoded by several threads.

    Decoding a file releases the GIL; threads do not help for images in memory.
    """
    threads = (os.cpu_count() or 1) if part.paths is not None else 1
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), _BLOCK):
            yield from pool.map(function, indices[start : start + _BLOCK].tolist())


def write_manifest(folder: Path, chosen: Mapping[str, tuple[Part, np.ndarray]]) -> None:
    """Writes one row per image, without opening the images."""
    with (folder / MANIFEST).open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("split", "label", "path"))
        for split, (part, indices) in chosen.items():
            assert part.paths is not None
            writer.writerows((split, int(part.labels[index]), part.paths[index]) for index in indices)


def read_manifest(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns paths and int64 labels by split. Paths are fixed-length bytes, so worker processes share their memory."""
    paths: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
    with (folder / MANIFEST).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        next(reader)
        for split, label, path in reader:
            paths[split].append(os.fsencode(path))
            labels[split].append(int(label))
    return {split: (np.array(paths[split], dtype=np.bytes_), np.array(labels[split], np.int64)) for split in SPLITS}


RESIDENT_LIMIT = 4 * 2**30  # bytes; a larger split remains on the host, and its batches are moved to the device


class PreparedData:
    """The splits "train", "search" and "test" that ``prepare`` wrote. Images are memory-mapped or in their files."""

    def __init__(self, info: DataInfo, folder: Path, root: Path) -> None:
        """Use ``open`` instead. The paths of a manifest are relative to ``root``."""
        self.info = info
        self.folder = folder
        self.root = root
        self._resident: dict[tuple[str, torch.device], Tensor] = {}
        self._paths: dict[str, np.ndarray] = {}
        self._images: dict[str, np.ndarray] = {}
        self._labels: dict[str, np.ndarray] = {}
        if info.storage == "files":
            for split, (paths, labels) in read_manifest(folder).items():
                self._paths[split], self._labels[split] = paths, labels
        else:
            for split in SPLITS:
                # Copy-on-write, because torch expects writable memory. The file does not change.
                self._images[split] = np.load(images_path(folder, split), mmap_mode="c")
                self._labels[split] = np.load(labels_path(folder, split))

    @classmethod
    def open(cls, folder: Path, *, relative_to: Path = Path()) -> PreparedData:
        """Opens a prepared folder. A manifest's relative root starts at ``relative_to``, as in ``prepare``.

        Raises:
            UserError: ``folder`` is missing, incomplete or not a prepared folder, or the manifest's root is missing.
        """
        info = read_info(folder)
        root = located(info.root, relative_to) if info.storage == "files" else folder
        if not root.is_dir():
            raise UserError(f"the images of {folder} are in {root}, which does not exist; run the prepare stage again")
        try:
            data = cls(info, folder, root)
        except (OSError, ValueError, KeyError, StopIteration) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} is incomplete ({reason}); run the prepare stage again") from error
        counts = {split: len(data.labels(split)) for split in SPLITS}
        if counts != info.counts:
            raise UserError(
                f"{folder} is incomplete (images {counts}, data.json has {info.counts}); run the prepare stage again"
            )
        return data

    def labels(self, split: str) -> np.ndarray:
        """Returns int64 labels (N,) in stored order. Folders are sorted by class: shuffle them before making chunks."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
        return self._labels[split]

    def images(self, split: str) -> np.ndarray:
        """Returns uint8 images (N, C, H, W), memory-mapped; only for storage "arrays"."""
        if self.info.storage != "arrays":
            raise ValueError("data stored as files has no array of images; use eval_batches")
        self.labels(split)
        return self._images[split]

    def paths(self, split: str) -> np.ndarray:
        """Returns paths relative to ``root``, as bytes (N,); only for storage "files"."""
        if self.info.storage != "files":
            raise ValueError("data stored as arrays has no files; use images")
        self.labels(split)
        return self._paths[split]

    def resident(self, split: str, device: torch.device) -> Tensor:
        """Returns the images of a split (uint8) on ``device``, moved once, or on the host above ``RESIDENT_LIMIT``."""
        images = self.images(split)
        if images.nbytes > RESIDENT_LIMIT:
            device = torch.device("cpu")
        if (split, device) not in self._resident:
            self._resident[split, device] = torch.from_numpy(images).to(device)
        return self._resident[split, device]
