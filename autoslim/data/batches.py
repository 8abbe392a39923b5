"""Batches on the device: shuffled and augmented for training, in a fixed order for evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from autoslim.data.augmentation import AREA, Augmentation, augment, crop_boxes, draw_seeds, shuffle, uniforms
from autoslim.data.images import area_pixels, evaluation_pixels
from autoslim.data.own import ASIDE, EVALUATION, Reading, loader, own_batches
from autoslim.data.prepared import DataInfo, PreparedData
from autoslim.data.random_transforms import (
    ERASE,
    POLICY,
    check_mixing,
    each_image,
    erasing_transform,
    mixing_transform,
    policy_transform,
    whole_batch,
)
from autoslim.errors import UserError

Draws = tuple[Augmentation, int, int]  # augmentation, seed, epoch


class _Files(Dataset[Any]):
    """Decoded images of a split, uint8 (C, H, W), after the evaluation transform.

    With ``draws``, a random area crop replaces the transform's crop, and the policy follows.
    """

    def __init__(self, data: PreparedData, split: str, draws: Draws | None) -> None:
        self.paths, self.labels, self.open = data.paths(split), data.labels(split), data.opener()
        self.info, self.draws = data.info, draws
        self.policy = None if draws is None else policy_transform(draws[0])

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UserError:
        # An error is returned, because the loader would replace one raised in a worker by an error with a traceback.
        try:
            image = self.open(os.fsdecode(self.paths[index]))
        except UserError as error:
            return error
        info = self.info
        augmentation, seed, epoch = self.draws or (Augmentation(), 0, 0)
        if (area := augmentation.area) is None:
            pixels = evaluation_pixels(image, info.channels, info.shorter_side, info.image_size)
        else:
            drawn = uniforms(seed, epoch, np.array([index]), AREA)
            aspect = info.image_size[1] / info.image_size[0]
            top, left, height, width = crop_boxes(drawn, image.height, image.width, area, aspect)[0].tolist()
            pixels = area_pixels(image, info.channels, (top, left, height, width), info.image_size)
        decoded = torch.from_numpy(np.array(pixels))
        if self.policy is not None:
            decoded = each_image(self.policy, decoded[None], draw_seeds(seed, epoch, POLICY, np.array([index])))[0]
        return decoded, int(self.labels[index])


def _collate(items: list[tuple[Tensor, int] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    images, labels = [], []
    for item in items:
        if isinstance(item, UserError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)


def decoded_batches(
    data: PreparedData, split: str, batches: Sequence[np.ndarray], *, draws: Draws | None, workers: int, pin: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields uint8 images (n, C, H, W) and int64 labels (n,) on the host, for each array of positions in ``batches``.

    ``workers`` processes decode in advance; with 0, this process decodes.

    Raises:
        UserError: an image cannot be decoded. The message contains its path.
    """
    yield from loader(_Files(data, split, draws), batches, _collate, workers, pin)


Batches = Iterator[tuple[Any, Any]]
"""Inputs and targets: images and labels, or tensors in any structure (``data.structure``) for own data."""


def worker_count(number: int | Literal["auto"], ranks: int = 1) -> int:
    """Returns the number of processes that decode images or read own data.

    ``auto`` is the number of cores for each of the machine's ``ranks``, minus one, at most 16.
    """
    if number == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(16, max(1, cores // ranks - 1))
    return number


def batches_per_epoch(data: PreparedData, batch_size: int) -> int:
    """Returns the number of full batches in the train split, or 1 if the split is smaller than a batch."""
    return max(1, data.count("train") // batch_size)


def train_batches(
    data: PreparedData,
    *,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    device: torch.device | str,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    skip: int = 0,
) -> Batches:
    """Yields one epoch of the train split: normalised float32 images (n, C, H, W) and int64 labels (n,) on ``device``.

    Own data are inputs and targets of any structure, as the user's data sets and transforms return them;
    ``augmentation`` has no effect on them. If the augmentation mixes images, the labels are probabilities of the
    classes, float32 (n, classes).

    The order depends on (seed, epoch). An incomplete last batch is dropped, but a split smaller than a batch is one
    batch. ``batch_size`` counts the images of all ranks; each rank gets its slice of the batch that a single process
    would get, and the slices differ by at most one image. The first ``skip`` batches are skipped without being read;
    the others do not change. ``workers`` processes decode images in files and read own data; arrays need none.

    Raises:
        UserError: the batch is smaller than the number of ranks, there are no classes to mix, or a sample cannot be
            read.
    """
    check_mixing(augmentation, len(data.info.classes), "augmentation")
    size = min(batch_size, data.count("train"))
    if size < world_size:
        raise UserError(
            f"a batch of {size} images cannot be shared by {world_size} processes; raise batch_size or lower "
            "runtime.processes"
        )
    count = batches_per_epoch(data, batch_size)
    order = shuffle(data.count("train"), seed, epoch)
    whole = [order[step * batch_size : (step + 1) * batch_size] for step in range(skip, count)]
    batches = [np.array_split(batch, world_size)[rank] for batch in whole]
    if augmentation.mixes and world_size > 1:
        # Each image is mixed with the one before it, and that of the first of this rank's images is another rank's.
        before = [np.array_split(np.roll(batch, 1), world_size)[rank][:1] for batch in whole]
        batches = [np.concatenate(parts) for parts in zip(before, batches, strict=True)]
        mixed = _training(data, batches, augmentation, seed, epoch, torch.device(device), workers, skip)
        return ((images[1:], labels[1:]) for images, labels in mixed)
    return _training(data, batches, augmentation, seed, epoch, torch.device(device), workers, skip)


def eval_batches(
    data: PreparedData,
    split: str,
    *,
    batch_size: int,
    device: torch.device | str,
    workers: int = 0,
    limit: int | None = None,
    shuffled_by: int | None = None,
) -> Batches:
    """Yields all images of a split once, after the evaluation transform. The last batch may be smaller.

    The order is the stored one or, with ``shuffled_by``, a permutation by that seed, so that each batch mixes the
    classes. ``limit`` yields only the first images of that order. Images and labels are as in ``train_batches``.

    Raises:
        UserError: ``batch_size`` or ``limit`` is out of range, or an image cannot be decoded.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is not possible; use at least 1")
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} is not possible; use at least 1 image, or None for all")
    count = data.count(split)
    order = np.arange(count) if shuffled_by is None else shuffle(count, shuffled_by, EVALUATION)
    order = order[:limit]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return _evaluation(data, split, batches, torch.device(device), workers)


def _training(
    data: PreparedData,
    batches: list[np.ndarray],
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    device: torch.device,
    workers: int,
    first: int,
) -> Batches:
    """Yields augmented ``batches``, the first of which is batch ``first`` of the epoch."""
    if data.own is not None:
        yield from _own(data, "train", batches, device, workers, Reading(True, seed, epoch))
        return
    arrays = data.info.storage == "arrays"
    if arrays:
        loaded = _stored(data, "train", batches, device)
    else:
        loaded = _decoded(data, "train", batches, device, workers, (augmentation, seed, epoch))
    policy = policy_transform(augmentation) if arrays else None
    erasing, mixing = erasing_transform(augmentation), mixing_transform(augmentation, len(data.info.classes))
    for number, (indices, (images, labels)) in enumerate(zip(batches, loaded, strict=True), first):
        drawn = uniforms(seed, epoch, indices)
        seeded = policy and partial(each_image, policy, seeds=draw_seeds(seed, epoch, POLICY, indices))
        images = normalised(augment(images, drawn, augmentation, cropped=not arrays, policy=seeded), data.info)
        if erasing is not None:
            images = each_image(erasing, images, draw_seeds(seed, epoch, ERASE, indices))
        if mixing is not None:
            images, labels = whole_batch(mixing, images, labels, seed, epoch, number)
        yield images, labels


def _evaluation(
    data: PreparedData, split: str, batches: list[np.ndarray], device: torch.device, workers: int
) -> Batches:
    if data.own is not None:
        yield from _own(data, split, batches, device, workers, ASIDE)
        return
    arrays = data.info.storage == "arrays"
    loaded = _stored(data, split, batches, device) if arrays else _decoded(data, split, batches, device, workers, None)
    for images, labels in loaded:
        yield normalised(images.float() / 255, data.info), labels


def _own(
    data: PreparedData,
    split: str,
    batches: list[np.ndarray],
    device: torch.device,
    workers: int,
    reading: Reading,
) -> Batches:
    assert data.own is not None
    indices = data.indices(split)
    structures = data.info.inputs, data.info.targets
    chosen = [indices[positions] for positions in batches]
    return own_batches(data.own, split, structures, chosen, reading, device, workers)


def _stored(data: PreparedData, split: str, batches: list[np.ndarray], device: torch.device) -> Batches:
    images = data.resident(split, device)
    labels = data.labels(split)
    for indices in batches:
        selected = images[torch.from_numpy(indices).to(images.device)]
        yield selected.to(device), torch.from_numpy(labels[indices]).to(device)


def _decoded(
    data: PreparedData,
    split: str,
    batches: list[np.ndarray],
    device: torch.device,
    workers: int,
    draws: Draws | None,
) -> Batches:
    pin = device.type == "cuda"
    for images, labels in decoded_batches(data, split, batches, draws=draws, workers=workers, pin=pin):
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def normalised(images: Tensor, info: DataInfo) -> Tensor:
    """Subtracts the mean of each channel and divides by its standard deviation. ``images`` are in [0, 1]."""
    mean = torch.tensor(info.mean, device=images.device)[:, None, None]
    std = torch.tensor(info.std, device=images.device)[:, None, None]
    return (images - mean) / std


def even_chunk(images: int, least: int) -> int:
    """Returns the smallest chunk size for which all chunks have at least ``least`` images, or else ``images``."""
    return next((size for size in range(least, images) if not 0 < images % size < least), images)


def search_chunks(
    data: PreparedData, *, images: int, chunk: int, seed: int, device: torch.device, workers: int
) -> list[tuple[Any, Any]]:
    """Returns the first ``images`` of the search split on the device, in chunks of at least ``chunk`` images.

    The order is shuffled by ``seed``, because batch statistics are those of a chunk, which must therefore mix classes.
    """
    count = min(images, data.info.counts["search"])
    size = even_chunk(count, chunk)
    batches = eval_batches(
        data, "search", batch_size=size, device=device, workers=workers, limit=count, shuffled_by=seed
    )
    return list(batches)
