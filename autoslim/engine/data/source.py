"""A data source as the preparation sees it: two lists of labelled images, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image


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
