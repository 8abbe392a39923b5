"""Scenes made of scikit-learn's digits: a data set that needs no download and is harder than the digits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from autoslim.data.sources import BRIGHTEST, Part, Source

SIDE = 24  # pixels of a scene
DIGIT_SIDES = (10, 16)  # pixels, smallest and largest
FRAGMENTS = 6
NOISE = 0.1  # standard deviation; white is 1
COUNTS = {"train": 4000, "test": 2000}
_SEED = 0


def load_scenes_source() -> Source:
    """Returns grey 24x24 images that each show one of scikit-learn's digits among fragments of others.

    The digit that gives an image its class has a side of 10 to 16 pixels and any place and brightness. Behind it are
    six fragments of other digits, a third of a digit's side each, and noise. A quarter of the digits, the same share of
    every class, appears only in the test part. The images are the same in every run.
    """
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    images = [Image.fromarray((image / BRIGHTEST).astype(np.float32)) for image in digits.images]  # mode F, 0 to 1
    held_out = np.sort(np.argsort(labels, kind="stable")[::4])
    pools = {"train": np.setdiff1d(np.arange(len(labels)), held_out), "test": held_out}

    def part(name: str) -> Part:
        pool = [images[index] for index in pools[name]]
        shown = np.arange(COUNTS[name]) % len(pool)  # every digit equally often, or once more
        seed = (_SEED, list(COUNTS).index(name))

        def read(index: int) -> Image.Image:
            return draw_scene(pool[shown[index]], pool, np.random.default_rng((*seed, index)))

        return Part(labels=labels[pools[name]][shown], read=read, paths=None)

    return Source(classes=tuple(str(name) for name in digits.target_names), train=part("train"), test=part("test"))


def draw_scene(digit: Image.Image, others: Sequence[Image.Image], rng: np.random.Generator) -> Image.Image:
    """Draws ``digit`` and fragments of ``others``, all of mode F from 0 to 1, into one image of mode L."""
    scene = np.zeros((SIDE, SIDE), np.float32)
    for _ in range(FRAGMENTS):
        pixels = _scaled(others[int(rng.integers(len(others)))], rng)
        side = len(pixels) // 3
        top, left = rng.integers(0, len(pixels) + 1 - side, 2)
        _draw(pixels[top : top + side, left : left + side], scene, rng)
    _draw(_scaled(digit, rng), scene, rng)
    noisy = scene + rng.normal(0, NOISE, scene.shape)
    return Image.fromarray(np.rint(noisy.clip(0, 1) * 255).astype(np.uint8))


def _scaled(digit: Image.Image, rng: np.random.Generator) -> np.ndarray:
    smallest, largest = DIGIT_SIDES
    side = int(rng.integers(smallest, largest + 1))
    return np.asarray(digit.resize((side, side), Image.Resampling.BILINEAR))


def _draw(pixels: np.ndarray, scene: np.ndarray, rng: np.random.Generator) -> None:
    """Draws ``pixels`` into ``scene`` at a random place and brightness. The brighter of two pixels is visible."""
    side = len(pixels)
    top, left = rng.integers(0, SIDE + 1 - side, 2)
    window = scene[top : top + side, left : left + side]
    np.maximum(window, pixels * rng.uniform(0.5, 1), out=window)
