"""Image classification: losses and scores."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoslim.channels.copying import inference_mode
from autoslim.errors import UserError


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Returns the mean cross-entropy with target probability 1 - s of the label and s / (K - 1) of each *other* class.

    This is the authors' definition, with s = ``smoothing`` and K classes. torch spreads ``label_smoothing`` over all K
    classes, including the label; multiplying it by K / (K - 1) makes the two definitions equal.
    """
    classes = logits.shape[1]
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / (classes - 1) if smoothing else 0.0)


def check_logits(output: Any, targets: Any, argument: str) -> None:
    """Checks that ``output`` are logits (N, classes, ...), and ``targets`` classes (N, ...) or probabilities.

    Args:
        argument: the name of the function's argument for other outputs, for the error message.

    Raises:
        UserError: they are something else, for which the cross-entropy would fail or be constant.
    """
    both = isinstance(output, Tensor) and isinstance(targets, Tensor)
    if not both or output.dim() < 2 or output.shape[1] < 2:
        kinds = [
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            for value in (output, targets)
        ]
        raise UserError(
            f"the cross-entropy needs logits (N, classes, ...) and targets (N, ...), but the output is {kinds[0]} and "
            f"the targets are {kinds[1]}; pass a function of your own as {argument}"
        )


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean cross-entropy with the softmax of another network's logits (``teacher``), over dimension 1."""
    return F.cross_entropy(logits, teacher.softmax(1, dtype=torch.promote_types(teacher.dtype, torch.float32)))


@dataclass(frozen=True)
class Score:
    """The top-1 error (a fraction) and the mean cross-entropy in nats over ``images`` images."""

    error: float
    cross_entropy: float
    images: int = 0


TRAIN_BETTER = "train the supernet for more epochs, or correct its learning rate, its weights or the labels"


def chance_top1(labels: np.ndarray) -> float:
    """Returns the top-1 of always answering the most frequent class of ``labels`` (N,): a fraction."""
    return float(np.bincount(labels).max() / len(labels))


def is_chance(score: Score, chance: float, level: float = 0.01) -> bool:
    """Returns whether a top-1 is not significantly above ``chance`` (a fraction), by a one-sided binomial test.

    Args:
        level: significance level: the probability that a network that guesses passes for a better one.
    """
    from scipy.stats import binom

    correct = round((1 - score.error) * score.images)
    return bool(binom.sf(correct - 1, score.images, chance) > level)


Chunk = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and labels (N,) on the device."""


def evaluate(network: nn.Module, chunks: Iterable[Chunk], autocast: Callable[[], torch.autocast]) -> Score:
    """Returns the top-1 error and mean cross-entropy of ``network`` over all images, in evaluation mode.

    A supernet uses the batch statistics of each chunk, a plain network its running statistics. The host synchronises
    with the device once, at the end. The mode of every module is restored.
    """
    errors: list[Tensor] = []
    entropies: list[Tensor] = []
    count = 0
    with inference_mode(network):
        for images, labels in chunks:
            with autocast():
                logits = network(images)  # (N, classes)
            logits = logits.float()
            errors.append((logits.argmax(1) != labels).sum())
            entropies.append(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        error = int(torch.stack(errors).sum())
        nats = float(torch.stack(entropies).cpu().double().sum())  # on the host, because not every device has float64
    return Score(error / count, nats / count, count)
