"""What a classifier's output means: probabilities, and the names of the classes.

Together with ``predictor``, this module is copied into the MLflow model, which runs without autoslim (see
``pipeline.tracking``). It needs only NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, with their probabilities, in descending order."""

    probabilities: dict[str, float]

    @property
    def label(self) -> str:
        """The most probable class."""
        return next(iter(self.probabilities))

    @property
    def probability(self) -> float:
        """The probability of ``label``."""
        return self.probabilities[self.label]


def predictions(logits: np.ndarray, classes: Sequence[str], top: int) -> list[Prediction]:
    """Returns the ``top`` most probable classes (all, if there are fewer) of each image.

    Args:
        logits: (N, classes). Their softmax is the probability of each class.
    """
    scores = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))  # (N, classes)
    shares = scores / scores.sum(axis=1, keepdims=True)
    order = np.argsort(-shares, axis=1, kind="stable")[:, :top]
    return [
        Prediction({classes[index]: float(row[index]) for index in chosen})
        for row, chosen in zip(shares, order, strict=True)
    ]
