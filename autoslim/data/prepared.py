"""The prepared data folder: its description, arrays or manifest, and how it is opened."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoslim.data.images import evaluation_pixels
from autoslim.data.sources import Part, located
from autoslim.errors import UserError

SPLITS = ("train", "search", "test")
FILE_NAME = "data.json"
FORMAT = 1


@dataclass(frozen=True)
class DataInfo:
    """One prepared data set.

    ``mean`` and ``std`` are per channel, of the train split under the evaluation transform, for pixels in [0, 1].
    ``counts`` are images by split. ``storage`` is "arrays" (pixels as ``.npy``) or "files" (a manifest, no copy).
    ``resize`` is the length of the shorter side before the centre crop of ``image_size`` (pixels.py says the rule);
    0 stands for ``image_size`` itself. ``root`` is the folder that the paths of a manifest start from ("files" only).
    """

    source: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts: dict[str, int]
    storage: str
    resize: int = 0
    root: str = ""

    @property
    def shorter_side(self) -> int:
        """Length in pixels that the shorter side gets before the centre crop."""
        return self.resize or self.image_size

    def to_json(self) -> str:
        """The text of ``data.json``: same values, same bytes."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DataInfo:
        """The inverse of ``to_json``; raises ``ValueError`` or ``KeyError`` where the text is something else."""
        values = json.loads(text)
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f"not a data.json of format {FORMAT}")
        known = {field.name: values[field.name] for field in fields(cls)}
        for name in ("classes", "mean", "std"):
            known[name] = tuple(known[name])
        return cls(**known)


def read_info(folder: Path) -> DataInfo:
    """``data.json`` of a prepared folder; ``UserError`` where there is none or it cannot be read."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{folder} is not a prepared data folder (it has no {FILE_NAME}); run the prepare stage first")
    try:
        return DataInfo.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}); run the prepare stage again") from error


MANIFEST = "manifest.csv"  # columns split, label, path; in the order of the splits
LEAST_STD = 1 / 255  # of a constant channel: dividing by it keeps zero at zero
_DIGITS = 6  # of mean and std in data.json
_BLOCK = 1024  # images decoded at once

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


def images_path(folder: Path, split: str) -> Path:
    """uint8 (N, C, S, S)"""
    return folder / f"{split}.images.npy"


def labels_path(folder: Path, split: str) -> Path:
    """int64 (N,)"""
    return folder / f"{split}.labels.npy"


def channel_moments(images: Iterable[np.ndarray], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (C, S, S), for pixels in [0, 1]; sums are exact."""
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
    size: int,
    progress: Progress,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Decode every split into ``.npy`` files, a block at a time; returns mean and std of the train split."""
    for split, (part, indices) in chosen.items():

        def decode(index: int, part: Part = part) -> np.ndarray:
            return evaluation_pixels(part.read(index), channels, shorter_side, size)

        shape = (len(indices), channels, size, size)
        images = np.lib.format.open_memmap(images_path(folder, split), mode="w+", dtype=np.uint8, shape=shape)
        # Decoding files leaves the interpreter's lock alone; images out of a data set's own memory gain nothing.
        threads = (os.cpu_count() or 1) if part.paths is not None else 1
        with ThreadPoolExecutor(threads) as pool:
            blocks = range(0, len(indices), _BLOCK)
            decoded = (
                image for start in blocks for image in pool.map(decode, indices[start : start + _BLOCK].tolist())
            )
            for row, image in enumerate(progress(decoded, f"preparing {split}", len(indices))):
                images[row] = image
        images.flush()
        np.save(labels_path(folder, split), part.labels[indices])
    train = np.load(images_path(folder, "train"), mmap_mode="r")
    return channel_moments(train, channels)


def write_manifest(folder: Path, chosen: Mapping[str, tuple[Part, np.ndarray]]) -> None:
    """One row an image; no image is opened."""
    with (folder / MANIFEST).open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("split", "label", "path"))
        for split, (part, indices) in chosen.items():
            assert part.paths is not None
            writer.writerows((split, int(part.labels[index]), part.paths[index]) for index in indices)


def read_manifest(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Paths (fixed-length bytes, so that worker processes share them) and labels int64 by split."""
    paths: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
    with (folder / MANIFEST).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        next(reader)
        for split, label, path in reader:
            paths[split].append(os.fsencode(path))
            labels[split].append(int(label))
    return {split: (np.array(paths[split], dtype=np.bytes_), np.array(labels[split], np.int64)) for split in SPLITS}


RESIDENT_LIMIT = 4 * 2**30  # bytes; a larger split stays on the host and its batches are moved


class PreparedData:
    """Splits "train", "search" and "test" as ``prepare`` wrote them; images are memory-mapped or in their files."""

    def __init__(self, info: DataInfo, folder: Path, root: Path) -> None:
        """Use ``open``. ``root`` is where a manifest's paths start."""
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
                # Copy-on-write: torch wants writable memory, the file stays as it is.
                self._images[split] = np.load(images_path(folder, split), mmap_mode="c")
                self._labels[split] = np.load(labels_path(folder, split))

    @classmethod
    def open(cls, folder: Path, *, relative_to: Path = Path()) -> PreparedData:
        """``UserError`` if ``folder`` is missing or not a prepared folder, or if a manifest's images are gone.

        ``relative_to``: where the relative root of a manifest starts (as given to ``prepare``).
        """
        info = read_info(folder)
        root = located(info.root, relative_to) if info.storage == "files" else folder
        if not root.is_dir():
            raise UserError(f"the images of {folder} lie in {root}, which does not exist; run the prepare stage again")
        try:
            data = cls(info, folder, root)
        except (OSError, ValueError, KeyError, StopIteration) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} is incomplete ({reason}); run the prepare stage again") from error
        found = {split: len(data.labels(split)) for split in SPLITS}
        if found != info.counts:
            raise UserError(f"{folder} is incomplete (images {found}, data.json says {info.counts}); prepare it again")
        return data

    def labels(self, split: str) -> np.ndarray:
        """int64 (N,), in the stored order (class after class for a folder: shuffle before cutting into chunks)."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
        return self._labels[split]

    def images(self, split: str) -> np.ndarray:
        """uint8 (N, C, S, S), memory-mapped; only of storage "arrays"."""
        if self.info.storage != "arrays":
            raise ValueError("data stored as files has no array of images; use eval_batches")
        self.labels(split)
        return self._images[split]

    def paths(self, split: str) -> np.ndarray:
        """Paths relative to ``root`` (N,) as bytes; only of storage "files"."""
        if self.info.storage != "files":
            raise ValueError("data stored as arrays has no files; use images")
        self.labels(split)
        return self._paths[split]

    def resident(self, split: str, device: torch.device) -> Tensor:
        """The images of a split (uint8) on ``device``, moved once and kept; on the host where they are too many."""
        images = self.images(split)
        if images.nbytes > RESIDENT_LIMIT:
            device = torch.device("cpu")
        if (split, device) not in self._resident:
            self._resident[split, device] = torch.from_numpy(images).to(device)
        return self._resident[split, device]
