"""Image folders for the tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Counts = dict[str, dict[str, int]]  # split -> class -> images


def noise(key: tuple[int, ...], size: tuple[int, int], mode: str) -> Image.Image:
    """Returns an image with random pixels that depend on the key. ``size`` is (width, height)."""
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(key).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes PNG images in ImageFolder layout and returns the folder."""

    def make(counts: Counts, *, size: tuple[int, int] = (8, 8), mode: str = "RGB", name: str = "images") -> Path:
        for s, (split, classes) in enumerate(counts.items()):
            for c, (label, images) in enumerate(classes.items()):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for index in range(images):
                    noise((s, c, index), size, mode).save(folder / f"{index:03}.png")
        return tmp_path / name

    return make


@pytest.fixture
def pets(make_folder: Callable[..., Path]) -> Path:
    """Returns a folder with three classes of 20 training and 6 test images, 8x8 RGB."""
    classes = ("cat", "dog", "emu")
    return make_folder({"train": dict.fromkeys(classes, 20), "test": dict.fromkeys(classes, 6)})
