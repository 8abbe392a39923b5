"""Data sources: scikit-learn's digits and image folders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from autoslim.data.images import open_image
from autoslim.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""The suffixes of torchvision's ImageFolder. They are repeated here because torchvision takes seconds to import."""


def located(path: str, relative_to: Path) -> Path:
    """Returns the path that a user wrote, with ``~`` expanded. Relative paths start at ``relative_to``."""
    return relative_to / Path(path).expanduser()


@dataclass(frozen=True)
class Part:
    """The training or the test part of a source.

    ``labels`` (int64, (N,)) index the classes of the source. ``read`` decodes one image without conversion and raises
    ``UserError`` with the path if that fails. ``paths`` are relative to the root of the source and use "/". They are
    None if the images are not files. ``content`` returns a digest of the encoded image; None stands for that of the
    file.
    """

    labels: np.ndarray
    read: Callable[[int], Image.Image]
    paths: Sequence[str] | None
    content: Callable[[int], bytes] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """A data source. ``test`` is None if it has no test part; ``prepare`` then holds one out.

    ``search`` is None unless the source has a part of its own for the search split, which is otherwise held out, too.
    ``root`` is the folder of the files as the user wrote it; the manifest stores it.
    """

    classes: tuple[str, ...]
    train: Part
    test: Part | None
    root: str = ""
    search: Part | None = None


BRIGHTEST = 16  # scikit-learn's pixels are integers from 0 to 16


def load_digits_source() -> Source:
    """Returns scikit-learn's digits as a single part, because only the test half of the original set is included."""
    from sklearn.datasets import load_digits  # slow to import

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
    """Returns the classes, sorted by name, and the name of the test folder ("test" or else "val").

    No image is opened.

    Raises:
        UserError: the folder or a part is missing, there are fewer than two classes, a class has no image, or the
            classes of the parts differ.
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
        raise UserError(f"{folder / 'train'} has only one class ({classes[0]}); at least two are required")
    for missing, where in (
        (sorted(set(classes) - set(test_classes)), test),
        (sorted(set(test_classes) - set(classes)), "train"),
    ):
        if missing:
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UserError(
                f"classes differ between {folder / 'train'} ({len(classes)}) and {folder / test} "
                f"({len(test_classes)}): {where}/ lacks {names}; both must have the same class folders"
            )
    for part in ("train", test):
        for name in classes:
            if next(iter(_Walk().images(folder / part / name)), None) is None:
                suffixes = " ".join(IMAGE_SUFFIXES)
                raise UserError(
                    f"{folder / part / name} contains no image ({suffixes}); add images or remove the class"
                )
    return classes, test


def load_folder_source(path: str, folder: Path) -> Source:
    """Returns the source in ``folder``, written as ``path`` by the user. test/ takes precedence over val/."""
    classes, test = check_folder(folder)
    if test == "test" and (folder / "val").is_dir():
        _log.warning("%s has both test/ and val/: test/ is the test split, val/ is not used", folder)
    walk = _Walk()
    source = Source(
        classes=classes,
        train=_part(folder, "train", classes, walk),
        test=_part(folder, test, classes, walk),
        root=path,
    )
    if text := walk.summary():
        _log.warning("%s: %s", folder, text)
    return source


def _part(folder: Path, name: str, classes: tuple[str, ...], walk: _Walk) -> Part:
    paths: list[str] = []
    counts: list[int] = []
    for class_name in classes:
        images = sorted(walk.images(folder / name / class_name))
        counts.append(len(images))
        paths += [f"{name}/{class_name}/{image}" for image in images]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return Part(labels=labels, read=lambda index: open_image(folder / paths[index], None), paths=paths)


def _class_names(folder: Path) -> tuple[str, ...]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); correct its permissions") from error
    return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))


class _Walk:
    """Finds the images in class folders, follows symbolic links, and counts what it skips.

    A real file or folder is visited once in each class folder, so that a link upwards neither repeats images nor ends
    in a loop. Hidden files are ignored without being counted (macOS writes ``._x.jpg``).
    """

    def __init__(self) -> None:
        self._owners: dict[str, Path] = {}  # real path of an image -> its class folder
        self._skipped: Counter[str] = Counter()
        self._unreadable: list[str] = []

    def images(self, folder: Path) -> Iterator[str]:
        """Yields the paths of the images in and below ``folder``, relative to it.

        Raises:
            UserError: a file is also in another class or split.
        """
        seen: set[str] = set()
        pending = [("", os.path.realpath(folder))]
        while pending:
            prefix, real = pending.pop()
            if real in seen:
                self._skipped["folder that a link repeats"] += 1
                continue
            seen.add(real)
            try:
                entries = sorted(os.scandir(real), key=lambda entry: entry.name)
            except OSError:
                self._unreadable.append(str(folder / prefix))
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                inside = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if _is_folder(entry):
                    pending.append((f"{prefix}{entry.name}/", inside))
                elif self._is_image(entry, folder / prefix / entry.name):
                    if inside in seen:
                        self._skipped["image that a link repeats"] += 1
                        continue
                    seen.add(inside)
                    self._own(inside, folder, f"{prefix}{entry.name}")
                    yield f"{prefix}{entry.name}"

    def _is_image(self, entry: os.DirEntry[str], path: Path) -> bool:
        try:
            regular = entry.is_file()
            broken = not regular and not os.path.exists(entry.path)
        except OSError:
            self._unreadable.append(str(path))
            return False
        if not regular:
            self._skipped["broken link" if broken else "file that is not a regular file"] += 1
            return False
        if not entry.name.lower().endswith(IMAGE_SUFFIXES):
            self._skipped[f"{path.suffix.lower() or 'other'} file"] += 1
            return False
        return True

    def _own(self, real: str, folder: Path, name: str) -> None:
        owner = self._owners.setdefault(real, folder)
        if owner != folder:
            raise UserError(
                f"{folder / name} is a link to an image that is also in {owner}; an image must be in one class of one "
                "split: remove one of the two"
            )

    def summary(self) -> str:
        """Returns the numbers of files and folders that were skipped, by kind; "" if there are none."""
        counts = [f"{count} x {kind}" for kind, count in sorted(self._skipped.items())]
        if self._unreadable:
            more = f" and {len(self._unreadable) - 1} more" if len(self._unreadable) > 1 else ""
            counts.append(f"{len(self._unreadable)} x not readable ({self._unreadable[0]}{more})")
        return f"skipped {', '.join(counts)}; images are {' '.join(IMAGE_SUFFIXES)}" if counts else ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
