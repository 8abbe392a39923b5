"""Batches of storage "files": decoded by worker processes, nothing else kept."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autoslim.engine.data.draws import AREA, crop_boxes, uniforms
from autoslim.engine.data.pixels import area_pixels, evaluation_pixels, open_image
from autoslim.engine.data.prepared import PreparedData
from autoslim.vocabulary.errors import UserError

AreaKey = tuple[tuple[float, float], int, int]  # area range, seed, epoch


class _Files(Dataset[Any]):
    """Decoded images of a split, uint8 (C, S, S): the evaluation transform or, with ``area``, a random part."""

    def __init__(self, data: PreparedData, split: str, area: AreaKey | None) -> None:
        self.paths, self.labels, self.root = data.paths(split), data.labels(split), data.root
        self.info, self.area = data.info, area

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UserError:
        # An error is handed over as a value: raised in a worker, it would arrive as a traceback's text.
        try:
            image = open_image(self.root / Path(os.fsdecode(self.paths[index])), self.info.channels)
        except UserError as error:
            return error
        info = self.info
        if self.area is None:
            pixels = evaluation_pixels(image, info.channels, info.shorter_side, info.image_size)
        else:
            area, seed, epoch = self.area
            drawn = uniforms(seed, epoch, np.array([index]), AREA)
            top, left, height, width = crop_boxes(drawn, image.height, image.width, area)[0].tolist()
            pixels = area_pixels(image, info.channels, (top, left, height, width), info.image_size)
        return torch.from_numpy(np.array(pixels)), int(self.labels[index])


def _collate(items: list[tuple[Tensor, int] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    images, labels = [], []
    for item in items:
        if isinstance(item, UserError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)


def decoded_batches(
    data: PreparedData, split: str, batches: Sequence[np.ndarray], *, area: AreaKey | None, workers: int, pin: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 images (n, C, S, S) and labels int64 (n,) on the host, for each array of positions in ``batches``.

    ``workers`` processes decode ahead (0: this one decodes). An unreadable image raises ``UserError`` with its path.
    """
    loader: DataLoader[Any] = DataLoader(
        _Files(data, split, area),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        generator=torch.Generator(),  # its own: iterating would draw from torch's global one
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch[0], batch[1]
