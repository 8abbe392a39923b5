"""How prepared images are kept: arrays of pixels, or a manifest of files."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from autoslim.engine.data.info import SPLITS
from autoslim.engine.data.pixels import evaluation_pixels
from autoslim.engine.data.source import Part

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
