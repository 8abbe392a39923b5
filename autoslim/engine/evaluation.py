"""Scores on a split: top-1 error and cross-entropy."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoslim.algorithms.slimming import Score
from autoslim.engine.runtime import evaluating
from autoslim.networks.supernet import Supernet

Chunk = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and labels (N,) on the device."""


def evaluate(network: nn.Module, chunks: Iterable[Chunk], autocast: Callable[[], torch.autocast]) -> Score:
    """Top-1 error and mean cross-entropy of ``network`` over all images, in evaluation mode.

    A supernet uses the statistics of each chunk, a plain network its running statistics. The host waits for the device
    once, at the end. The mode is given back as it was.
    """
    wrong: Tensor | int = 0
    entropy: Tensor | float = 0.0
    count = 0
    with evaluating(network):
        for images, labels in chunks:
            with autocast():
                logits = network(images)  # (N, classes)
            logits = logits.float()
            wrong = wrong + (logits.argmax(1) != labels).sum()
            entropy = entropy + F.cross_entropy(logits, labels, reduction="sum").double()
            count += len(labels)
    return Score(error=int(wrong) / count, cross_entropy=float(entropy) / count)


def subnet_scorer(
    supernet: Supernet, chunks: Sequence[Chunk], autocast: Callable[[], torch.autocast]
) -> Callable[[Mapping[str, int]], Score]:
    """The search's score function: a configuration under the batch statistics of each of the fixed chunks."""

    def score(channels: Mapping[str, int]) -> Score:
        supernet.select(channels)
        return evaluate(supernet, chunks, autocast)

    return score
