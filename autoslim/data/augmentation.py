"""Training augmentation, vectorised over a batch on its device, with random numbers keyed by (seed, epoch, image).

torchvision's transforms draw from global generators: the random numbers would depend on the numbers of workers and
ranks, and on where a run was resumed. ``data.random_transforms`` runs those that are worth it with seeds of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoslim.errors import UserError

TRIES = 10  # attempts of the area crop, as in torchvision's RandomResizedCrop
COLUMNS = 8 + 2 * TRIES
SHIFT, FLIP, JITTER = slice(0, 2), slice(2, 3), slice(3, 6)
AREA = slice(6, COLUMNS)  # position (2), then the areas and the aspect ratios of the attempts
RATIO = (3 / 4, 4 / 3)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the images in an epoch: a permutation, int64 (count,)."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def uniforms(seed: int, epoch: int, indices: np.ndarray, columns: slice = slice(0, COLUMNS)) -> np.ndarray:
    """Returns uniform numbers in [0, 1) that depend only on (seed, epoch, index, column): float64 (indices, columns).

    They are the numbers of SplitMix64 (Steele, Lea and Flood 2014) at positions ``index * COLUMNS + column`` of the
    stream of (seed, epoch). It is counter-based, so the numbers of an image do not require those of earlier images.
    """
    column = np.arange(columns.start, columns.stop, dtype=np.uint64)
    position = indices.astype(np.uint64)[:, None] * np.uint64(COLUMNS) + column  # (n, columns)
    mixed = _splitmix64(np.random.SeedSequence((seed, epoch)), position)
    drawn: np.ndarray = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn


def draw_seeds(seed: int, epoch: int, purpose: int, positions: np.ndarray) -> np.ndarray:
    """Returns a seed for each position, which depends only on (seed, epoch, purpose, position): uint64 (positions,).

    They are independent of the numbers of ``uniforms``. ``purpose`` separates the uses of seeds; a position is that of
    an image in its split or of a batch in its epoch.
    """
    return _splitmix64(np.random.SeedSequence((seed, epoch), spawn_key=(purpose,)), positions.astype(np.uint64))


def _splitmix64(key: np.random.SeedSequence, position: np.ndarray) -> np.ndarray:
    """Returns the numbers at ``position`` (uint64) of the stream of ``key``: uint64, of the same shape."""
    mixed: np.ndarray = key.generate_state(1, np.uint64) + (position + np.uint64(1)) * _GAMMA  # overflow is intended
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _MIX[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _MIX[1]
    mixed ^= mixed >> _SHIFTS[2]
    return mixed


def crop_boxes(
    drawn: np.ndarray, height: int, width: int, area: tuple[float, float], aspect: float = 1.0
) -> np.ndarray:
    """Returns the boxes of a random resized crop: int64 (n, 4) of top, left, height, width.

    ``drawn`` (n, AREA columns) are uniform random numbers. The rule is that of torchvision's RandomResizedCrop. Up
    to ten attempts draw a fraction of the area, uniform in ``area``, and an aspect ratio, log-uniform in 3/4 .. 4/3.
    The first box that fits is placed uniformly. If none fits, the box is the largest centre crop with an allowed ratio.
    Ratios are relative to ``aspect``, width / height of the network's input (torchvision's are always absolute), so
    that the images of a wide input are not distorted more than those of a square one.
    """
    lowest, highest = aspect * RATIO[0], aspect * RATIO[1]
    shares, ratios = drawn[:, 2 : 2 + TRIES], drawn[:, 2 + TRIES :]
    target = height * width * (area[0] + (area[1] - area[0]) * shares)
    ratio = np.exp(math.log(lowest) + (math.log(highest) - math.log(lowest)) * ratios)
    widths = np.rint(np.sqrt(target * ratio)).astype(np.int64)  # (n, TRIES)
    heights = np.rint(np.sqrt(target / ratio)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first, row = fits.argmax(axis=1), np.arange(len(drawn))
    size = np.stack((heights[row, first], widths[row, first]), axis=1)  # (n, 2)
    room = np.array((height, width)) - size
    corner = np.floor(drawn[:, :2] * (room + 1)).astype(np.int64)

    whole = np.array((min(height, round(width / lowest)), min(width, round(height * highest))))
    none = ~fits.any(axis=1)
    size[none] = whole
    corner[none] = (np.array((height, width)) - whole) // 2
    return np.concatenate((corner, size), axis=1)


_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as in torchvision's rgb_to_grayscale
HALF = 0.5
MAX_MAGNITUDE = 30  # of torchvision's RandAugment, which has 31 levels

Policy = Literal["trivial_augment", "rand_augment"]


@dataclass(frozen=True)
class Augmentation:
    """The transforms of training images. They are applied in this order: ``area``, ``policy``, ``pad``, ``flip``,
    ``jitter``, normalisation, ``erase``, ``mixup`` or ``cutmix``.

    All are off by default. ``area`` crops a random part of the image, with a fraction of its area in this range
    (ImageNet: (0.25, 1)) and an aspect ratio in 3/4 .. 4/3, and resizes it to the image size. ``pad`` crops at random
    after zero padding by this number of pixels on each side. ``flip`` mirrors half of the images horizontally.
    ``jitter`` scales brightness, contrast and saturation, in this order, each by a factor uniform in [1 - jitter,
    1 + jitter] (never below 0).

    The others are torchvision's: ``policy`` is TrivialAugment (Müller and Hutter, arXiv 2103.10158) or RandAugment
    (Cubuk et al., arXiv 1909.13719) with ``operations`` transforms per image of strength ``magnitude``. ``erase`` is
    the probability that a random rectangle of an image is set to the mean of the training pixels (Zhong et al., arXiv
    1708.04896). ``mixup`` (Zhang et al., arXiv 1710.09412) and ``cutmix`` (Yun et al., arXiv 1905.04899) mix each image
    of a batch with the one before, and their labels, in a proportion drawn from Beta(alpha, alpha) for each batch, with
    these alphas; if both are on, each batch gets one of the two with equal probability.
    """

    pad: int = 0
    flip: bool = False
    area: tuple[float, float] | None = None
    jitter: float = 0.0
    policy: Policy | None = None
    operations: int = 2
    magnitude: int = 9
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether images and labels of a batch are mixed. Labels are then probabilities of the classes."""
        return self.mixup > 0 or self.cutmix > 0

    def __post_init__(self) -> None:
        """Raises ``UserError`` for values out of range."""
        if self.pad < 0:
            raise UserError(f"augmentation pad {self.pad} is not possible; use a number of pixels, 0 for none")
        if self.jitter < 0:
            raise UserError(f"augmentation jitter {self.jitter} is not possible; use a number from 0 (none) to 1")
        if self.area is not None and not (len(self.area) == 2 and 0 < self.area[0] <= self.area[1] <= 1):
            raise UserError(f"augmentation area {self.area} is not possible; use two shares with 0 < low <= high <= 1")
        if self.policy not in (None, *get_args(Policy)):
            raise UserError(f"augmentation policy {self.policy!r} does not exist; use {' or '.join(get_args(Policy))}")
        if self.operations < 1 or not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise UserError(
                f"augmentation operations {self.operations} with magnitude {self.magnitude} are not possible; use at "
                f"least 1 operation, and a magnitude from 0 to {MAX_MAGNITUDE}"
            )
        if not 0 <= self.erase <= 1:
            raise UserError(f"augmentation erase {self.erase} is not possible; use a probability from 0 to 1")
        for name in ("mixup", "cutmix"):
            if not (math.isfinite(alpha := getattr(self, name)) and alpha >= 0):
                raise UserError(f"augmentation {name} {alpha} is not possible; use an alpha above 0, or 0 for none")


def augment(
    images: Tensor,
    drawn: np.ndarray,
    augmentation: Augmentation,
    *,
    cropped: bool,
    policy: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Augments images by the random numbers ``drawn`` (n, COLUMNS): uint8 (n, C, H, W) -> float32 in [0, 1].

    ``cropped`` states that the area crop was already applied. Images in files are cropped when they are decoded, at
    full resolution. ``policy`` transforms the cropped images, uint8 (n, C, H, W).
    """
    if augmentation.area is not None and not cropped:
        height, width = images.shape[-2:]
        images = resized_boxes(
            images, crop_boxes(drawn[:, AREA], height, width, augmentation.area, aspect=width / height)
        )
    if policy is not None:
        images = policy(images if images.dtype == torch.uint8 else images.round().to(torch.uint8))
    if augmentation.pad or augmentation.flip:
        offsets = np.floor(drawn[:, SHIFT] * (2 * augmentation.pad + 1)).astype(np.int64)
        flips = (drawn[:, FLIP.start] < HALF) & augmentation.flip
        images = shifted(images, offsets, flips, augmentation.pad)
    images = images.float() / 255
    if augmentation.jitter:
        low, high = max(0.0, 1 - augmentation.jitter), 1 + augmentation.jitter
        images = jittered(images, low + (high - low) * drawn[:, JITTER])
    return images


def resized_boxes(images: Tensor, boxes: np.ndarray) -> Tensor:
    """Resizes the box (top, left, height, width) of each image bilinearly: uint8 (n, C, H, W) -> float32 in [0, 255].

    A box is never larger than the image, so nothing is scaled down and no antialiasing is needed.
    """
    height, width = images.shape[-2:]
    box = torch.from_numpy(boxes).to(images.device, torch.float32)  # (n, 4)

    def centres(start: Tensor, length: Tensor, size: int) -> Tensor:
        """Returns the image positions of the output's pixels, clamped to the box, in grid_sample's range [-1, 1]."""
        step = (torch.arange(size, device=images.device) + 0.5) / size  # (size,), pixel centres of the output
        at = start[:, None] + step * length[:, None]
        at = torch.minimum(torch.maximum(at, start[:, None] + 0.5), (start + length)[:, None] - 0.5)
        return at * (2 / size) - 1

    rows, columns = centres(box[:, 0], box[:, 2], height), centres(box[:, 1], box[:, 3], width)  # (n, H) and (n, W)
    grid = torch.stack((columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)), dim=-1)
    return functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def shifted(images: Tensor, offsets: np.ndarray, flips: np.ndarray, pad: int) -> Tensor:
    """Crops the zero-padded images at ``offsets`` (n, 2; row, column in 0 .. 2 * pad) and mirrors those in ``flips``.

    (n, C, H, W) -> (n, C, H, W) of the same dtype. With offsets equal to ``pad`` and no flip the images are unchanged.
    """
    count, channels, height, width = images.shape
    device = images.device
    offset = torch.from_numpy(offsets).to(device)
    across = torch.arange(width, device=device)
    mirrored = torch.where(torch.from_numpy(flips).to(device)[:, None], across.flip(0), across)  # (n, W)
    rows, columns = offset[:, :1] + torch.arange(height, device=device), offset[:, 1:] + mirrored
    padded = functional.pad(images, (pad, pad, pad, pad))
    return padded[
        torch.arange(count, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def jittered(images: Tensor, factors: np.ndarray) -> Tensor:
    """Scales brightness, contrast and saturation of images (n, C, H, W) in [0, 1] by ``factors`` (n, 3).

    Saturation does not apply to grey images.
    """
    factor = torch.from_numpy(factors).to(images.device, images.dtype)[:, :, None, None, None]  # (n, 3, 1, 1, 1)
    images = (images * factor[:, 0]).clamp(0, 1)
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, factor[:, 1]).clamp(0, 1)
    if images.shape[1] == 1:
        return images
    return torch.lerp(_grey(images).expand_as(images), images, factor[:, 2]).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    weights = torch.tensor(_LUMA, device=images.device, dtype=images.dtype)[:, None, None]
    return (images * weights).sum(dim=1, keepdim=True)
