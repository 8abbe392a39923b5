"""Image classification: losses and scores."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoslim.channels.copying import inference_mode


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy where the label has probability 1 - smoothing and every *other* class smoothing / (K - 1).

    This is the authors' definition. torch spreads its ``label_smoothing`` over all K classes including the label;
    multiplying by K / (K - 1) makes both equal.
    """
    classes = logits.shape[1]
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / (classes - 1) if smoothing else 0.0)


@dataclass(frozen=True)
class Score:
    """``error`` is the top-1 error (a fraction), ``cross_entropy`` the mean in nats, both over ``images`` images."""

    error: float
    cross_entropy: float
    images: int = 0


Chunk = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and labels (N,) on the device."""


def evaluate(network: nn.Module, chunks: Iterable[Chunk], autocast: Callable[[], torch.autocast]) -> Score:
    """Top-1 error and mean cross-entropy of ``network`` over all images, in evaluation mode.

    A supernet uses the batch statistics of each chunk, an ordinary network its running statistics. The host waits for
    the device once, at the end. The mode of every module is restored.
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
