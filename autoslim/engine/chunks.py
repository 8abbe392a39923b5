"""The fixed chunks of search images that every candidate is scored on."""

import torch

from autoslim.engine.data import PreparedData, eval_batches
from autoslim.engine.runtime import Machine


def even_chunk(images: int, least: int) -> int:
    """The smallest chunk size that leaves no chunk below ``least`` images, not even the last; or all in one."""
    return next((size for size in range(least, images) if not 0 < images % size < least), images)


def search_chunks(
    data: PreparedData, machine: Machine, *, images: int, chunk: int, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first ``images`` of the search split in a fixed shuffled order, in chunks of at least ``chunk``.

    They are on the device. Shuffled, because a chunk is its own batch statistics and must hold all classes.
    """
    count = min(images, data.info.counts["search"])
    size = even_chunk(count, chunk)
    batches = eval_batches(
        data, "search", batch_size=size, device=machine.device, workers=machine.workers, limit=count, shuffled_by=seed
    )
    return list(batches)
