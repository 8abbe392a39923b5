"""Data sources: scikit-learn's digits and image folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from autoslim.data.images import open_image
from autoslim.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those of torchvision's ImageFolder, written out because torchvision takes seconds to import."""


def located(path: str, relative_to: Path) -> Path:
    """A user's path, ``~`` expanded, relative ones from ``relative_to``."""
    return relative_to / Path(path).expanduser()


@dataclass(frozen=True)
class Part:
    """A source's own training or test part.

    ``labels`` int64 (N,) index the source's classes. ``read`` decodes one image, in its own mode, and raises
    ``UserError`` with the path if that fails. ``paths`` are relative to the source's root, in "/" form; None where
    images are not files.
    """

    labels: np.ndarray
    read: Callable[[int], Image.Image]
    paths: Sequence[str] | None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """``test`` is None where the source has no test part of its own (the preparation then holds one out).

    ``root`` is the folder of the files as the user wrote it: it goes into the manifest.
    """

    classes: tuple[str, ...]
    train: Part
    test: Part | None
    root: str = ""


BRIGHTEST = 16  # scikit-learn's pixels are counts from 0 to 16


def load_digits_source() -> Source:
    """All digits as one part: scikit-learn ships the test half of the original set only."""
    from sklearn.datasets import load_digits  # here: a second to import, needed once

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / BRIGHTEST)).astype(np.uint8)  # (1797, 8, 8)
    part = Part(
        labels=digits.target.astype(np.int64),
        read=lambda index: Image.fromarray(pixels[index]),
        paths=None,
    )
    return Source(classes=tuple(str(name) for name in digits.target_names), train=part, test=None)


_log = logging.getLogger(__name__)
_LAYOUT = "expected <folder>/train/<class>/<images> and <folder>/test/<class>/<images> (or val)"


def check_folder(folder: Path) -> tuple[tuple[str, ...], str]:
    """The classes (sorted by name) and the test folder's name ("test", else "val"); opens no image.

    ``UserError``: a missing folder or part of it, fewer than two classes, a class without images, classes that differ.
    """
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist; {_LAYOUT}")
    if not (folder / "train").is_dir():
        raise UserError(f"data folder {folder} has no train/; {_LAYOUT}")
    test = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
    if test is None:
        raise UserError(f"data folder {folder} has neither test/ nor val/; {_LAYOUT}")
    classes, test_classes = _class_names(folder / "train"), _class_names(folder / test)
    if not classes:
        raise UserError(f"{folder / 'train'} is empty: it has no class folders; {_LAYOUT}")
    if len(classes) == 1:
        raise UserError(f"{folder / 'train'} has one class only ({classes[0]}); at least two are needed")
    for missing, where in (
        (sorted(set(classes) - set(test_classes)), test),
        (sorted(set(test_classes) - set(classes)), "train"),
    ):
        if missing:
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UserError(
                f"classes differ between {folder / 'train'} ({len(classes)}) and {folder / test} "
                f"({len(test_classes)}): {where}/ lacks {names}; both need the same class folders"
            )
    for part in ("train", test):
        for name in classes:
            if next(_images(folder / part / name), None) is None:
                endings = " ".join(IMAGE_SUFFIXES)
                raise UserError(f"{folder / part / name} holds no image ({endings}); add some or remove the class")
    return classes, test


def load_folder_source(path: str, folder: Path) -> Source:
    """``path`` as the user wrote it, ``folder`` where it is. Where test/ and val/ exist, test/ is the test split."""
    classes, test = check_folder(folder)
    if test == "test" and (folder / "val").is_dir():
        _log.warning("%s holds both test/ and val/: test/ is the test split, val/ is not used", folder)
    return Source(classes=classes, train=_part(folder, "train", classes), test=_part(folder, test, classes), root=path)


def _part(folder: Path, name: str, classes: tuple[str, ...]) -> Part:
    paths: list[str] = []
    counts: list[int] = []
    for class_name in classes:
        found = sorted(_images(folder / name / class_name))
        counts.append(len(found))
        paths += [f"{name}/{class_name}/{image}" for image in found]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return Part(labels=labels, read=lambda index: open_image(folder / paths[index], None), paths=paths)


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _images(folder: Path) -> Iterator[str]:
    """Paths of the images in and below ``folder``, relative to it; hidden files (macOS leaves ``._x.jpg``) left out."""
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(where).relative_to(folder)
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield (below / name).as_posix()
