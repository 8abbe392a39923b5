"""The prepared data folder: its description (``data.json``) and its arrays or manifest."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoslim.data.arrays import read_array
from autoslim.data.hugging_face import HuggingFaceImages, is_hugging_face
from autoslim.data.images import DEEP_BITS, Size, evaluation_pixels, open_image
from autoslim.data.own import OwnData, build_own
from autoslim.data.sources import Part, located
from autoslim.data.structure import Structure, in_words, is_tensor, tensor_structure, zeros
from autoslim.errors import UserError
from autoslim.files import DamagedError, parse_json, sealed, sha256, unsealed

SPLITS = ("train", "search", "test")
FILE_NAME = "data.json"
FORMAT = 3


@dataclass(frozen=True)
class DataInfo:
    """The description of a prepared data set.

    ``classes`` are the names; () if the targets are not classes. ``image_size`` is (height, width). ``mean`` and
    ``std`` are per channel, over the train split after the evaluation transform, for pixels in [0, 1]. ``counts`` are
    the numbers of images by split. ``storage`` is "arrays" (pixels as ``.npy``), "files" (a manifest, no copy), or
    "own" (data sets of the user's, no copy). ``resize`` is the shorter side of the box that images are resized to cover
    before the centre crop of ``image_size`` (see ``data.images``); 0 stands for that of ``image_size``. ``bits`` is the
    number of bits that the values of images with more than 8 bits use. The paths of a manifest are relative to ``root``
    ("files" only). ``digests`` are the SHA-256 digests of the other files in the folder. ``inputs`` and ``targets`` are
    the structures of a sample (see ``data.structure``); by default a float32 tensor (C, H, W) and a class number.
    ``search_limit`` is the largest number of search images that can be held out; None if it is not known.

    Own data have no ``mean`` and ``std``, and ``channels`` and ``image_size`` are 0 unless the input is one tensor of
    shape (C, H, W). Their ``origin`` identifies them: the digest of the user's "file", the "sizes" of the data sets,
    and a digest of "samples" that were read.
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
    digests: dict[str, str] = field(default_factory=dict)
    search_limit: int | None = None
    inputs: Structure = field(default_factory=dict)
    targets: Structure = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.inputs:
            object.__setattr__(self, "inputs", tensor_structure(self.channels, *self.image_size))
        if not self.targets:
            object.__setattr__(self, "targets", tensor_structure(dtype="int64"))

    @property
    def shorter_side(self) -> int:
        """The shorter side of the box before the centre crop, in pixels."""
        return self.resize or min(self.image_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an image, (C, H, W), or of a sample whose input is a single tensor."""
        if not is_tensor(self.inputs):
            raise ValueError(f"the inputs are {in_words(self.inputs)}, not a single tensor")
        return tuple(self.inputs["shape"])

    @property
    def outputs(self) -> int | None:
        """The number of outputs that the targets ask for: the number of classes, or else the target's last dimension.

        It is 1 for a number, and None for structures and for masks of integers without names of the classes.
        """
        if self.classes:
            return len(self.classes)
        if not is_tensor(self.targets):
            return None
        shape = self.targets["shape"]
        if len(shape) > 1 and not self.targets["dtype"].startswith(("float", "bfloat")):
            return None
        return int(shape[-1]) if shape else 1

    def example(self, batch: int = 1) -> Any:
        """Returns inputs of this structure for ``batch`` samples, of zeros: (1, C, H, W) for an image."""
        return zeros(self.inputs, batch)

    def to_json(self) -> str:
        """Returns the text of ``data.json``. Equal values produce equal bytes."""
        return json.dumps(sealed({"format": FORMAT, **asdict(self)}), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DataInfo:
        """Restores the description from the text of ``data.json``.

        Raises:
            ValueError, KeyError: the text is not a ``data.json`` of this format.
        """
        values = parse_json(text)
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f"not a data.json of format {FORMAT}")
        values = unsealed(values)
        known = {entry.name: values[entry.name] for entry in fields(cls)}
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


@dataclass(frozen=True)
class Written:
    """What ``write_arrays`` and ``write_manifest`` wrote.

    Attributes:
        digests: file name -> SHA-256 digest.
        mean: per channel, of the train split; empty for a manifest.
        std: the same.
        contents: split -> a digest of the pixels of each image; empty for a manifest.
    """

    digests: dict[str, str]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    contents: Mapping[str, Sequence[bytes]] = field(default_factory=dict)


def write_arrays(
    folder: Path,
    chosen: Mapping[str, tuple[Part, np.ndarray]],
    channels: int,
    shorter_side: int,
    size: Size,
    bits: int,
    progress: Progress,
) -> Written:
    """Decodes every split into ``.npy`` files, block by block.

    The files are written in order, not through a memory map: on a full disk, writing to a map kills the process.
    """
    digests: dict[str, str] = {}
    contents: dict[str, list[bytes]] = {}
    moments: tuple[tuple[float, ...], tuple[float, ...]] = (), ()
    for split, (part, indices) in chosen.items():

        def decode(index: int, part: Part = part) -> np.ndarray:
            return evaluation_pixels(part.read(index), channels, shorter_side, size, bits)

        def written(
            images: Iterable[np.ndarray], file: IO[bytes], digest: hashlib._Hash, split: str = split
        ) -> Iterator[np.ndarray]:
            for image in images:
                pixels = image.tobytes()
                file.write(pixels)
                digest.update(pixels)
                contents.setdefault(split, []).append(hashlib.sha256(pixels).digest()[:16])
                yield image

        images = progress(over_images(decode, part, indices), f"preparing {split}", len(indices))
        path = images_path(folder, split)
        with path.open("wb") as file:
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header, {"descr": "|u1", "fortran_order": False, "shape": (len(indices), channels, *size)}
            )
            file.write(header.getvalue())
            digest = hashlib.sha256(header.getvalue())
            found = channel_moments(written(images, file, digest), channels)
        digests[path.name] = digest.hexdigest()
        if split == "train":
            moments = found
        path = labels_path(folder, split)
        digests[path.name] = _save(path, part.labels[indices])
    return Written(digests, *moments, contents)


def over_images(function: Callable[[int], Result], part: Part, indices: np.ndarray) -> Iterator[Result]:
    """Yields ``function(index)`` for each index in order. Images in files are decoded by several threads.

    Decoding a file releases the GIL; threads do not help for images in memory.
    """
    threads = (os.cpu_count() or 1) if part.paths is not None else 1
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), _BLOCK):
            yield from pool.map(function, indices[start : start + _BLOCK].tolist())


def write_manifest(folder: Path, chosen: Mapping[str, tuple[Part, np.ndarray]]) -> Written:
    """Writes one row per image, without opening the images."""
    with (folder / MANIFEST).open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("split", "label", "path"))
        for split, (part, indices) in chosen.items():
            assert part.paths is not None
            writer.writerows((split, int(part.labels[index]), part.paths[index]) for index in indices)
    return Written({MANIFEST: sha256(folder / MANIFEST)})


def indices_path(folder: Path, split: str) -> Path:
    """Returns the file of the indices of a split in its data set: int64 (N,). Only for own data."""
    return folder / f"{split}.indices.npy"


def write_indices(folder: Path, indices: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Writes the indices of each split in its data set and the class numbers, if there are any; returns digests."""
    files = {indices_path(folder, split): values for split, values in indices.items()}
    files |= {labels_path(folder, split): values for split, values in labels.items()}
    return {path.name: _save(path, values) for path, values in files.items()}


def _save(path: Path, values: np.ndarray) -> str:
    """Writes an array, and returns the digest of the file."""
    content = io.BytesIO()  # np.save to a file does not say why a full disk refused it
    np.save(content, values)
    path.write_bytes(content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


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


def data_digest(folder: Path) -> str:
    """Returns the SHA-256 digest of the ``data.json`` of a prepared folder, which contains those of the other files."""
    return sha256(folder / FILE_NAME)


RESIDENT_LIMIT = 4 * 2**30  # bytes; a larger split remains on the host, and its batches are moved to the device


class PreparedData:
    """The splits "train", "search" and "test" that ``prepare`` wrote. Images are memory-mapped or in their files."""

    def __init__(self, info: DataInfo, folder: Path, root: Path, own: OwnData | None = None) -> None:
        """Use ``open`` instead. The paths of a manifest are relative to ``root``."""
        self.info = info
        self.own = own
        self.folder = folder
        self.root = root
        self._resident: dict[tuple[str, torch.device], Tensor] = {}
        self._paths: dict[str, np.ndarray] = {}
        self._images: dict[str, np.ndarray] = {}
        self._labels: dict[str, np.ndarray] = {}
        self._indices: dict[str, np.ndarray] = {}
        if own is not None:
            for split in SPLITS:
                self._verify(indices_path(folder, split))
                self._indices[split] = read_array(indices_path(folder, split))
                if labels_path(folder, split).name in info.digests:
                    self._verify(labels_path(folder, split))
                    self._labels[split] = read_array(labels_path(folder, split))
        elif info.storage == "files":
            self._verify(folder / MANIFEST)
            for split, (paths, labels) in read_manifest(folder).items():
                self._paths[split], self._labels[split] = paths, labels
        else:
            for split in SPLITS:
                # Copy-on-write, because torch expects writable memory. The file does not change.
                self._images[split] = read_array(images_path(folder, split), "c")
                self._verify(labels_path(folder, split))
                self._labels[split] = read_array(labels_path(folder, split))
        for split in self._labels:
            self._check(split)
        self._verified: set[str] = set()  # splits whose images match their digest

    @property
    def digest(self) -> str:
        """The digest of the prepared folder (see ``data_digest``)."""
        return data_digest(self.folder)

    def _verify(self, path: Path) -> None:
        """Raises ``DamagedError`` if a file does not match its digest in ``data.json``, which may have none."""
        expected = self.info.digests.get(path.name)
        if expected is not None and sha256(path) != expected:
            raise DamagedError(f"{path.name} does not match its digest")

    def _check(self, split: str) -> None:
        """Raises ``DamagedError`` if labels or images of a split do not fit ``data.json``."""
        labels, classes = self._labels[split], len(self.info.classes)
        if labels.ndim != 1 or labels.dtype != np.int64:
            raise DamagedError(f"the labels of {split} are {labels.dtype} of shape {labels.shape}, not int64 (N,)")
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            raise DamagedError(
                f"the labels of {split} are from {labels.min()} to {labels.max()}, but there are {classes} classes"
            )
        if self.info.storage == "arrays":
            images, shape = self._images[split], (len(labels), *self.info.input_shape)
            if images.dtype != np.uint8 or images.shape != shape:
                raise DamagedError(f"the images of {split} are {images.dtype} {images.shape}, not uint8 {shape}")

    @classmethod
    def open(cls, folder: Path, *, relative_to: Path = Path()) -> PreparedData:
        """Opens a prepared folder. A manifest's relative root starts at ``relative_to``, as in ``prepare``.

        Raises:
            UserError: ``folder`` is missing, incomplete or not a prepared folder, or the manifest's root is missing.
        """
        info = read_info(folder)
        own = _rebuilt(info, relative_to) if info.storage == "own" else None
        root = located(info.root, relative_to) if info.storage == "files" else folder
        if not root.is_dir():
            raise UserError(f"the images of {folder} are in {root}, which does not exist; run the prepare stage again")
        try:
            data = cls(info, folder, root, own)
        except DamagedError as error:
            raise UserError(f"{folder} is damaged ({error}); delete it and run the prepare stage again") from error
        except (OSError, ValueError, KeyError, TypeError, EOFError, StopIteration, csv.Error) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} is incomplete ({reason}); run the prepare stage again") from error
        counts = {split: len(data.labels(split) if own is None else data.indices(split)) for split in SPLITS}
        if counts != info.counts:
            raise UserError(
                f"{folder} is incomplete (images {counts}, data.json has {info.counts}); run the prepare stage again"
            )
        return data

    def labels(self, split: str) -> np.ndarray:
        """Returns int64 labels (N,) in stored order. Folders are sorted by class: shuffle them before making chunks.

        Own data whose targets are not class numbers have none.
        """
        self.count(split)
        if split not in self._labels:
            raise ValueError(f"the targets of {self.info.source} are not class numbers")
        return self._labels[split]

    def count(self, split: str) -> int:
        """Returns the number of samples of a split."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
        return self.info.counts[split]

    def indices(self, split: str) -> np.ndarray:
        """Returns the indices of a split in its data set, int64 (N,); only for storage "own"."""
        if self.info.storage != "own":
            raise ValueError("only own data have indices")
        self.count(split)
        return self._indices[split]

    def images(self, split: str) -> np.ndarray:
        """Returns uint8 images (N, C, H, W), memory-mapped; only for storage "arrays".

        The first call compares the split's file with its digest, which reads it once (about 2 s for each GiB).

        Raises:
            UserError: the file is damaged.
        """
        if self.info.storage != "arrays":
            raise ValueError(f"data stored as {self.info.storage} has no array of images; use eval_batches")
        self.labels(split)
        if split not in self._verified:
            try:
                self._verify(images_path(self.folder, split))
            except DamagedError as error:
                raise UserError(
                    f"{self.folder} is damaged ({error}); delete it and run the prepare stage again"
                ) from error
            self._verified.add(split)
        return self._images[split]

    def paths(self, split: str) -> np.ndarray:
        """Returns paths relative to ``root``, as bytes (N,); only for storage "files"."""
        if self.info.storage != "files":
            raise ValueError(f"data stored as {self.info.storage} has no manifest of files")
        self.labels(split)
        return self._paths[split]

    def opener(self) -> Callable[[str], Image.Image]:
        """Returns a function that decodes the image with a path of the manifest; it can be pickled.

        The function raises ``UserError`` if the image cannot be decoded.
        """
        if is_hugging_face(self.info.source):
            return HuggingFaceImages(self.info.source, self.root, self.info.channels, self.info.bits)
        return partial(_open_file, self.root, self.info.channels, self.info.bits)

    def resident(self, split: str, device: torch.device) -> Tensor:
        """Returns the images of a split (uint8) on ``device``, moved once, or on the host above ``RESIDENT_LIMIT``."""
        images = self.images(split)
        if images.nbytes > RESIDENT_LIMIT:
            device = torch.device("cpu")
        if (split, device) not in self._resident:
            self._resident[split, device] = torch.from_numpy(images).to(device)
        return self._resident[split, device]


def _open_file(root: Path, channels: int, bits: int, path: str) -> Image.Image:
    return open_image(root / path, channels, bits)


def _rebuilt(info: DataInfo, relative_to: Path) -> OwnData:
    """Returns the user's data sets, which must be those that were prepared.

    Raises:
        UserError: the file changed, or the data sets have other sizes.
    """
    own = build_own(info.source, relative_to)
    remedy = "run `dvc repro prepare`, or the prepare stage, again"
    if own.digest != info.origin.get("file"):
        raise UserError(f"{own.file} changed after the data were prepared; {remedy}")
    if own.sizes != info.origin.get("sizes"):
        raise UserError(
            f"the data sets of {info.source} have {own.sizes} samples, but had {info.origin.get('sizes')} when the "
            f"data were prepared; {remedy}"
        )
    return own
