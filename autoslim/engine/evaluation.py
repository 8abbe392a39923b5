"""Scores on a split: top-1 error and cross-entropy."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoslim.engine.runtime import evaluating
from autoslim.networks.supernet import Supernet
from autoslim.vocabulary.errors import UserError
from autoslim.vocabulary.scores import Score

Chunk = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and labels (N,) on the device."""


def evaluate(network: nn.Module, chunks: Iterable[Chunk], autocast: Callable[[], torch.autocast]) -> Score:
    """Top-1 error and mean cross-entropy of ``network`` over all images, in evaluation mode.

    A supernet uses the statistics of each chunk, a plain network its running statistics. The host waits for the device
    once, at the end. The mode is given back as it was.
    """
    wrong: list[Tensor] = []
    entropy: list[Tensor] = []
    count = 0
    with evaluating(network):
        for images, labels in chunks:
            with autocast():
                logits = network(images)  # (N, classes)
            logits = logits.float()
            wrong.append((logits.argmax(1) != labels).sum())
            entropy.append(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        errors = int(torch.stack(wrong).sum())
        nats = float(torch.stack(entropy).cpu().double().sum())  # summed on the host: not every device has float64
    return Score(errors / count, nats / count, count)


def subnet_scorer(
    supernet: Supernet, chunks: Sequence[Chunk], autocast: Callable[[], torch.autocast]
) -> Callable[[Mapping[str, int]], Score]:
    """The search's score function: a configuration under the batch statistics of each of the fixed chunks."""

    def score(channels: Mapping[str, int]) -> Score:
        supernet.select(channels)
        return evaluate(supernet, chunks, autocast)

    return score


def check_finite(cross_entropy: float, subnet: str) -> None:
    """Raises:
    UserError: the cross-entropy of ``subnet`` (in words) is no finite number.
    """
    if not math.isfinite(cross_entropy):
        raise UserError(
            f"{subnet} scores a cross-entropy of {cross_entropy}; set search.precision to fp32, or lower the "
            "supernet's learning_rate"
        )
