"""The fixed chunks of search images that every candidate is scored on."""

import math

import torch

from autoslim.engine.data import PreparedData, eval_batches
from autoslim.engine.runtime import Machine


def even_chunk(images: int, least: int) -> int:
    """The chunk size that cuts ``images`` into equal chunks (but for rounding) of at least ``least``, or into one."""
    return math.ceil(images / max(1, images // least))


def search_chunks(
    data: PreparedData, machine: Machine, *, images: int, chunk: int, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first ``images`` of the search split in a fixed shuffled order, in equal chunks of at least ``chunk``.

    They are on the device. Shuffled, because a chunk is its own batch statistics and must hold all classes.
    """
    count = min(images, data.info.counts["search"])
    size = even_chunk(count, chunk)
    batches = eval_batches(
        data, "search", batch_size=size, device=machine.device, workers=machine.workers, limit=count, shuffled_by=seed
    )
    return list(batches)
