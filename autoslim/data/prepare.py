"""Prepares a data source as three disjoint splits, stored as arrays or as a manifest of files."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from autoslim.data.duplicates import describe_shared, file_contents, shared_images
from autoslim.data.hugging_face import check_hugging_face, load_hugging_face_source
from autoslim.data.images import DEEP_BITS, Size, evaluation_pixels, is_deep, is_grey, shorter_side_for, used_bits
from autoslim.data.own import OwnData, build_own, check_own
from autoslim.data.own_inspection import Inspected, inspect_own
from autoslim.data.prepared import (
    FILE_NAME,
    DataInfo,
    channel_moments,
    over_images,
    write_arrays,
    write_indices,
    write_manifest,
)
from autoslim.data.scenes import load_scenes_source
from autoslim.data.sources import Part, Source, check_folder, load_digits_source, load_folder_source, located
from autoslim.data.structure import is_tensor
from autoslim.errors import UserError
from autoslim.files import check_space, in_place_of, os_error
from autoslim.user_code import file_of

_log = logging.getLogger(__name__)
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]

ARRAYS_LIMIT = 2**30  # bytes of uint8 pixels up to which "auto" stores arrays
SAMPLE = 2000  # images read for sizes and colours, and for mean and std of "files"
HELD_OUT = 0.25  # fraction that becomes the test split if the source has none
IMAGE_DIMENSIONS = 3  # (C, H, W)
STORAGES = ("auto", "arrays", "files")
# Keys of the random generators in addition to the seed, so that no two choices share their random numbers.
_SEARCH, _TRAIN, _TEST, _HELD_OUT, _SAMPLE = range(5)

Chosen = tuple[Part, np.ndarray]  # a part of the source and the sorted positions chosen from it


def prepare(
    source: str,
    destination: Path,
    *,
    image_size: int | Size | None,
    channels: int | None,
    search_images: int,
    seed: int,
    train_images: int | None = None,
    test_images: int | None = None,
    storage: str = "auto",
    raw: Path = Path("data/raw"),
    relative_to: Path = Path(),
    class_targets: bool = True,
    wrong_values: Callable[[Any, int], str] | None = None,
    workers: int = 0,
    progress: Progress = lambda items, description, total: items,
) -> DataInfo:
    """Writes data.json and either arrays (uint8) or a manifest of files to ``destination``.

    The search split is drawn from the source's training part by ``seed``, class-balanced, with at most half of each
    class. ``train_images`` and ``test_images`` choose class-balanced subsets of the remaining images and of the test
    part. If the source has no test part, a quarter is held out, the same for every seed. ``image_size`` is (height,
    width), or the side of a square. With None, it and ``channels`` are those of the source. Grey images of more than 8
    bits are scaled by the number of bits that the values of all splits use. ``storage`` "auto" stores arrays up to 1
    GiB of pixels, or if the images are not files. Relative paths (``raw`` and a ``folder:``) start at ``relative_to``.
    Equal inputs produce equal bytes. ``destination`` is written atomically.

    Of a user's data sets (``file.py:function``), only the indices of the splits and the class numbers are written.
    ``class_targets`` decides what integers mean, and ``wrong_values`` which targets are errors (see
    ``inspect_own``), and ``workers`` processes read them. Splits are class-balanced if the targets are class
    numbers, and else drawn evenly.

    Raises:
        UserError: an argument is out of range, or the source cannot be read.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    _check(destination, size, channels, storage)
    if file_of(source) is not None:
        if size is not None or channels is not None or storage != "auto":
            raise UserError(
                f"image_size, channels and storage have no effect on data source {source}, whose data sets do their "
                "own transforms; set image_size and channels to null, and storage to auto"
            )
        own = build_own(source, relative_to)
        inspected = inspect_own(own, class_targets, workers, progress, wrong_values)
        return _prepare_own(own, inspected, destination, search_images, train_images, test_images, seed)
    loaded = load_source(source, raw=raw, relative_to=relative_to)
    if len(loaded.classes) < 2:
        raise UserError(f"data source {source} has only one class; at least two are required")
    chosen, limit = _splits(loaded, search_images, train_images, test_images, seed)
    _warn_if_uneven(chosen["search"], loaded.classes)
    sample = _sample(chosen["train"])
    size, channels, shorter_side, deep = _inspect(source, sample, size, channels)
    bits = _bits(chosen, progress) if deep else DEEP_BITS
    pixels = sum(len(indices) for _, indices in chosen.values()) * channels * size[0] * size[1]
    has_files = all(part.paths is not None for part, _ in chosen.values())
    if storage == "files" and not has_files:
        raise UserError(f"storage files: the images of {source} are not files; use storage auto or arrays")
    if storage == "auto":
        storage = "files" if has_files and pixels > ARRAYS_LIMIT else "arrays"

    shape = (channels, shorter_side, size, bits)
    with _folder(destination) as scratch:
        if storage == "arrays":
            check_space(destination, pixels, "the prepared images")
            written = write_arrays(scratch, chosen, *shape, progress)
            moments, contents = (written.mean, written.std), written.contents
        else:
            written = write_manifest(scratch, chosen)
            contents = file_contents(chosen, located(loaded.root, relative_to), progress)
            part, indices = sample
            images = (evaluation_pixels(part.read(int(index)), *shape) for index in indices)
            moments = channel_moments(progress(images, "sampling", len(indices)), channels)
        if text := describe_shared(shared_images(contents)):
            _log.warning("%s", text)
        info = DataInfo(
            source=source,
            classes=loaded.classes,
            channels=channels,
            image_size=size,
            mean=moments[0],
            std=moments[1],
            counts=_counts(chosen),
            storage=storage,
            resize=shorter_side,
            root=loaded.root if storage == "files" else "",
            bits=bits,
            digests=written.digests,
            search_limit=limit,
        )
        (scratch / FILE_NAME).write_text(info.to_json(), encoding="utf-8")
    return info


def _prepare_own(
    own: OwnData,
    inspected: Inspected,
    destination: Path,
    search_images: int,
    train_images: int | None,
    test_images: int | None,
    seed: int,
) -> DataInfo:
    parts = {part: Part(labels, _unread, None) for part, labels in inspected.labels.items()}
    source = Source(
        inspected.classes if inspected.numbered else (), parts["train"], parts["test"], search=parts.get("search")
    )
    chosen, limit = _splits(source, search_images, train_images, test_images, seed)
    if inspected.numbered:
        _warn_if_uneven(chosen["search"], inspected.classes)
    contents = {
        split: [known[index] for index in indices.tolist() if index in known]
        for split, (_, indices) in chosen.items()
        for known in [inspected.contents[own.part_of(split)]]
    }
    if text := describe_shared(shared_images(contents), "samples"):
        _log.warning("%s", text)
    inputs, targets = inspected.structures
    image = is_tensor(inputs) and len(inputs["shape"]) == IMAGE_DIMENSIONS
    channels, height, width = inputs["shape"] if image else (0, 0, 0)
    with _folder(destination) as scratch:
        labels = {split: part.labels[indices] for split, (part, indices) in chosen.items()}
        digests = write_indices(
            scratch, {split: indices for split, (_, indices) in chosen.items()}, labels if inspected.numbered else {}
        )
        info = DataInfo(
            source=own.source,
            classes=inspected.classes,
            channels=channels,
            image_size=(height, width),
            mean=(),
            std=(),
            counts=_counts(chosen),
            storage="own",
            digests=digests,
            search_limit=limit,
            inputs=inputs,
            targets=targets,
            origin={"file": own.digest, "sizes": own.sizes, "samples": inspected.digest},
        )
        (scratch / FILE_NAME).write_text(info.to_json(), encoding="utf-8")
    return info


def _unread(_: int) -> Image.Image:
    raise AssertionError("own data are not images")


def _counts(chosen: dict[str, Chosen]) -> dict[str, int]:
    return {split: len(indices) for split, (_, indices) in chosen.items()}


@contextlib.contextmanager
def _folder(destination: Path) -> Iterator[Path]:
    """Yields an empty folder, which replaces ``destination`` at the end.

    If ``destination`` is a symbolic link, the folder that it names is replaced.

    Raises:
        UserError: the disk is full, or a folder is not writable.
    """
    destination = destination.resolve() if destination.is_symlink() else destination
    scratch = destination.with_name(f".{destination.name}.partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        scratch.mkdir()
        yield scratch
        _move(scratch, destination)
    except OSError as error:
        raise os_error(error, destination) or error from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check(destination: Path, size: Size | None, channels: int | None, storage: str) -> None:
    if channels not in (None, 1, 3):
        raise UserError(f"channels {channels} is not possible; use 1 (grey) or 3 (RGB), or omit it")
    if size is not None and min(size) < 1:
        shown = size[0] if size[0] == size[1] else list(size)
        raise UserError(f"image_size {shown} is not possible; use a number of pixels, at least 1, or [height, width]")
    if storage not in STORAGES:
        raise UserError(f"storage {storage!r} is unknown; expected one of {', '.join(STORAGES)}")
    foreign = destination.exists() and (not destination.is_dir() or any(destination.iterdir()))
    if foreign and not (destination / FILE_NAME).is_file():  # it would be replaced, with everything in it
        raise UserError(f"{destination} exists and is not a prepared data folder; remove it or choose another")
    if obstacle := in_place_of(destination / FILE_NAME):
        raise UserError(f"{destination} could not be written: {obstacle}; move it away, or restore what it names")


def _splits(
    source: Source, search_images: int, train_images: int | None, test_images: int | None, seed: int
) -> tuple[dict[str, Chosen], int]:
    """Returns the images of each split, and the largest number of search images."""
    train, test = source.train, source.test
    pool = np.arange(len(train))
    if test is None:
        test, share = train, round(HELD_OUT * len(train))
        limits = np.bincount(train.labels) // 2
        test_indices = choose_balanced(
            train.labels, min(share, int(limits.sum())), np.random.default_rng(_HELD_OUT), available=limits
        )
        pool = np.setdiff1d(pool, test_indices)
    else:
        test_indices = np.arange(len(test))

    if source.search is None:
        half = f"at most half{' of each class' if source.classes else ''}"
        held, positions = train, pool
        limits = np.bincount(train.labels[pool], minlength=len(source.classes)) // 2
        origin = f"held out of the {len(pool)} training images ({half})"
        rule = f"{half} is held out of the {len(pool)} training images"
    else:
        held, positions = source.search, np.arange(len(source.search))
        limits = np.bincount(held.labels, minlength=len(source.classes))
        origin, rule = "taken from the search data set", "the search data set has fewer"
    possible = int(limits.sum())
    if search_images < 1 or possible < min(search_images, 2):
        raise UserError(
            f"search_images {search_images} is not possible: up to {possible} can be {origin}; "
            + ("set search_images to at least 1" if search_images < 1 else "add images")
        )
    if search_images > possible:
        _log.warning("search_images is %d, but %s: the search split has %d images", search_images, rule, possible)
        search_images = possible
    search = positions[_balanced(held.labels[positions], search_images, seed, _SEARCH, limits)]
    rest = pool if source.search is not None else np.setdiff1d(pool, search)
    if train_images is not None:
        _check_subset("train_images", train_images, max(1, len(source.classes)), len(rest))
        rest = rest[_balanced(train.labels[rest], train_images, seed, _TRAIN)]
    if test_images is not None:
        _check_subset("test_images", test_images, 1, len(test_indices))
        test_indices = test_indices[_balanced(test.labels[test_indices], test_images, seed, _TEST)]
    return {"train": (train, rest), "search": (held, search), "test": (test, test_indices)}, possible


def _balanced(
    labels: np.ndarray, total: int, seed: int, purpose: int, available: np.ndarray | None = None
) -> np.ndarray:
    return choose_balanced(labels, total, np.random.default_rng((seed, purpose)), available=available)


def _check_subset(name: str, images: int, least: int, most: int) -> None:
    if not least <= images <= most:
        raise UserError(f"{name} {images} is not possible; use {least} to {most}, the number of images in the split")


def _sample(train: Chosen) -> Chosen:
    """Returns a fixed, sorted sample of the train split, or the whole split if it is small."""
    part, indices = train
    if len(indices) > SAMPLE:
        indices = np.sort(np.random.default_rng(_SAMPLE).choice(indices, SAMPLE, replace=False))
    return part, indices


def _inspect(source: str, sample: Chosen, size: Size | None, channels: int | None) -> tuple[Size, int, int, bool]:
    """Returns what the sample determines: size, channels, shorter side before the crop, and if there are deep images.

    ``size`` and ``channels`` are returned unchanged unless they are None.
    """
    part, indices = sample
    images = (part.read(int(index)) for index in indices)
    sizes, modes = zip(*((image.size, image.mode) for image in images), strict=True)
    if channels is None:
        channels = 1 if all(map(is_grey, modes)) else 3
    if size is None:
        smallest, largest = min(sizes), max(sizes)
        if smallest != largest:
            raise UserError(
                f"the images of {source} differ in size (from {smallest[0]}x{smallest[1]} "
                f"to {largest[0]}x{largest[1]}); set image_size"
            )
        size = (smallest[1], smallest[0])
    side = min(size)
    native = float(np.median([min(height * side / size[0], width * side / size[1]) for width, height in sizes]))
    return size, channels, shorter_side_for(native, side), any(map(is_deep, modes))


def _bits(chosen: dict[str, Chosen], progress: Progress) -> int:
    """Returns the number of bits that the values of the deep images of all splits use, and prints it."""
    bits = 0
    for split, (part, indices) in chosen.items():

        def of_image(index: int, part: Part = part) -> int:
            return used_bits(part.read(index))

        found = progress(over_images(of_image, part, indices), f"reading values of {split}", len(indices))
        bits = max(bits, *found)
    bits = max(1, bits)  # all values are 0
    _log.warning(
        "the values of images with more than 8 bits use %d bits: they are scaled from 0 .. %d to 0 .. 255",
        bits,
        2**bits - 1,
    )
    return bits


def _warn_if_uneven(search: Chosen, classes: Sequence[str]) -> None:
    """Warns if a class has less than half as many images in the search split as another class."""
    part, indices = search
    counts = np.bincount(part.labels[indices], minlength=len(classes))
    fewest, most = int(counts.argmin()), int(counts.argmax())
    if 2 * counts[fewest] < counts[most]:
        even = len(classes) * int(counts[fewest])
        _log.warning(
            "the search split is uneven: %d of its images are of class %s, and %d of class %s, because at most half of "
            "a class's training images are held out; channels are chosen mostly for the larger classes: add images%s",
            counts[most],
            classes[most],
            counts[fewest],
            classes[fewest],
            f", or set search_images to {even}" if even else "",
        )


def _move(scratch: Path, destination: Path) -> None:
    if destination.exists():
        shutil.rmtree(destination)
    os.replace(scratch, destination)


def balanced_quotas(available: np.ndarray, total: int, order: np.ndarray) -> np.ndarray:
    """Returns numbers of images by class that sum to ``total`` and are as even as ``available`` (K,) allows.

    Every class gets the same number, or all its images if it has fewer. The remainder goes to the classes that are
    first in ``order`` (K,), one image each. With a larger total, no class gets fewer images. ``total`` must not exceed
    ``available.sum()``.
    """
    assert 0 <= total <= available.sum()
    low, high = 0, int(available.max(initial=0))
    while low < high:  # the highest common level within the total
        level = (low + high + 1) // 2
        if np.minimum(available, level).sum() <= total:
            low = level
        else:
            high = level - 1
    quotas: np.ndarray = np.minimum(available, low)
    open_classes = order[available[order] > low]
    quotas[open_classes[: total - int(quotas.sum())]] += 1
    return quotas


def choose_balanced(
    labels: np.ndarray, total: int, rng: np.random.Generator, *, available: np.ndarray | None = None
) -> np.ndarray:
    """Returns the sorted positions of ``total`` images of ``labels`` (N,), class-balanced, drawn by ``rng``.

    ``available`` (K,) bounds the number per class (None: all images). For the same generator state, the choice of a
    smaller total is a subset of that of a larger one.
    """
    counts = np.bincount(labels)
    quotas = balanced_quotas(counts if available is None else available, total, rng.permutation(len(counts)))
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # sorted by class, shuffled within each class
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(labels)) - starts[labels[by_class]]  # 0, 1, ... within the class
    chosen: np.ndarray = np.sort(by_class[rank < quotas[labels[by_class]]])
    return chosen


_FORMS = (
    "expected digits, scenes, torchvision:NAME (for example torchvision:CIFAR10), folder:PATH, hf:PATH, or "
    "path/to/file.py:function"
)


def check_source(source: str, *, relative_to: Path = Path()) -> None:
    """Checks a source without downloading data or opening an image: its form, the folder and its classes, or the name.

    Relative paths start at ``relative_to``. A user's file is imported, but its function is not called.

    Raises:
        UserError: the source is not valid.
    """
    if file_of(source) is not None:
        check_own(source, relative_to)
        return
    scheme, rest = _parse(source)
    if scheme == "torchvision":
        from autoslim.data.torchvision_sets import check_torchvision  # imports torchvision

        check_torchvision(rest)
    elif scheme == "hf":
        check_hugging_face(source, relative_to)
    elif scheme == "folder":
        check_folder(located(rest, relative_to))


def load_source(source: str, *, raw: Path, relative_to: Path = Path()) -> Source:
    """Finds the images of a source and decodes a few of them. A torchvision source is downloaded into ``raw``.

    Raises:
        UserError: the source is not valid or cannot be loaded.
    """
    scheme, rest = _parse(source)
    if scheme == "torchvision":
        from autoslim.data.torchvision_sets import load_torchvision_source

        return load_torchvision_source(rest, raw, relative_to)
    if scheme == "hf":
        return load_hugging_face_source(source, relative_to)
    if scheme == "folder":
        return load_folder_source(rest, located(rest, relative_to))
    if scheme == "scenes":
        return load_scenes_source()
    return load_digits_source()


def _parse(source: str) -> tuple[str, str]:
    scheme, colon, rest = source.partition(":")
    known = (scheme in ("digits", "scenes") and not colon) or (scheme in ("torchvision", "folder", "hf") and rest)
    if not known:
        raise UserError(f"data source {source!r} is unknown; {_FORMS}")
    return scheme, rest
