"""Random numbers of the training augmentation, keyed by (seed, epoch, image).

An image's draws in an epoch do not depend on the batch, the process or the worker that it falls to, so that a resumed
run, a run on several processes and any number of workers see the same pictures.
"""

from __future__ import annotations

import math

import numpy as np

TRIES = 10  # of the area crop, as torchvision's RandomResizedCrop
COLUMNS = 8 + 2 * TRIES
SHIFT, FLIP, JITTER = slice(0, 2), slice(2, 3), slice(3, 6)
AREA = slice(6, COLUMNS)  # position (2), then areas and aspect ratios of the tries
RATIO = (3 / 4, 4 / 3)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation int64 (count,)."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def uniforms(seed: int, epoch: int, indices: np.ndarray, columns: slice = slice(0, COLUMNS)) -> np.ndarray:
    """Numbers uniform in [0, 1), float64 (len(indices), columns), a function of (seed, epoch, index, column) alone.

    SplitMix64 (Steele, Lea and Flood 2014) at position ``index * COLUMNS + column`` of the stream of (seed, epoch): a
    counter, so that any image's numbers are had without those before it.
    """
    key = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    column = np.arange(columns.start, columns.stop, dtype=np.uint64)
    position = indices.astype(np.uint64)[:, None] * np.uint64(COLUMNS) + column  # (n, columns)
    mixed = key + (position + np.uint64(1)) * _GAMMA  # wraps around, as it should
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _MIX[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _MIX[1]
    mixed ^= mixed >> _SHIFTS[2]
    drawn: np.ndarray = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn


def crop_boxes(drawn: np.ndarray, height: int, width: int, area: tuple[float, float]) -> np.ndarray:
    """Boxes of a random resized crop: int64 (n, 4) of top, left, height, width, for ``drawn`` (n, AREA columns).

    The rule of torchvision's RandomResizedCrop: up to ten tries of a share of the area, uniform in ``area``, and an
    aspect ratio, log-uniform in 3/4 .. 4/3; the first that fits is taken, at a uniform position; else the largest
    centre crop of an allowed ratio.
    """
    shares, ratios = drawn[:, 2 : 2 + TRIES], drawn[:, 2 + TRIES :]
    target = height * width * (area[0] + (area[1] - area[0]) * shares)
    ratio = np.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * ratios)
    widths = np.rint(np.sqrt(target * ratio)).astype(np.int64)  # (n, TRIES)
    heights = np.rint(np.sqrt(target / ratio)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first, row = fits.argmax(axis=1), np.arange(len(drawn))
    size = np.stack((heights[row, first], widths[row, first]), axis=1)  # (n, 2)
    room = np.array((height, width)) - size
    corner = np.floor(drawn[:, :2] * (room + 1)).astype(np.int64)

    whole = np.array((min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))))
    none = ~fits.any(axis=1)
    size[none] = whole
    corner[none] = (np.array((height, width)) - whole) // 2
    return np.concatenate((corner, size), axis=1)
