"""Classification: one class for each sample, as a number or as probabilities of the classes (soft labels)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.data.prepared import DataInfo, PreparedData
from autoslim.data.structure import is_class_number, is_tensor
from autoslim.errors import UserError
from autoslim.tasks.measure import CROSS_ENTROPY, TOP1
from autoslim.tasks.task import Score, Task, bounds, wrong_targets


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Returns the mean cross-entropy with target probability 1 - s of the label and s / (K - 1) of each *other* class.

    This is the authors' definition, with s = ``smoothing`` and K classes. torch spreads ``label_smoothing`` over all K
    classes, including the label; multiplying it by K / (K - 1) makes the two definitions equal. ``labels`` may also be
    probabilities (N, K), which are smoothed in the same way.
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
            f"the targets are {kinds[1]}; pass the name of a task, such as task='regression', "
            f"or a function of your own as {argument}"
        )


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean cross-entropy with the softmax of another network's logits (``teacher``), over dimension 1."""
    return F.cross_entropy(logits, teacher.softmax(1, dtype=torch.promote_types(teacher.dtype, torch.float32)))


class Classification(Task):
    """Classification: logits (N, K), and as targets class numbers (N,) or probabilities of the K classes (N, K)."""

    name = "classification"
    score = TOP1
    loss_name = CROSS_ENTROPY
    smooths_labels = True

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def smoothed_loss(self, output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
        if not label_smoothing:
            return self.loss(output, target)  # which a derived class may define
        return smoothed_cross_entropy(output, target, label_smoothing)

    def distillation(self, output: Tensor, teacher: Tensor) -> Tensor:
        return soft_cross_entropy(output, teacher)

    def sample_scores(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns whether top-1 is wrong, and the cross-entropy in nats. The label of probabilities is the largest."""
        output = output.float()
        wrong = output.argmax(1) != _labels(target)
        return torch.stack([wrong.float(), F.cross_entropy(output, target, reduction="none")])

    def summed_scores(self, output: Tensor, target: Tensor) -> Tensor:
        if type(self).sample_scores is not Classification.sample_scores:
            return super().summed_scores(output, target)
        # torch rounds its sum of cross-entropies otherwise than the sum of sample_scores. Recorded results used it.
        output = output.float()
        wrong = output.argmax(1) != _labels(target)
        return torch.stack([wrong.sum().float(), F.cross_entropy(output, target, reduction="sum")])

    def predictions(self, output: Tensor) -> Tensor:
        """Returns the probabilities of the classes."""
        return output.float().softmax(1)

    def metric_arguments(self, output: Tensor, target: Tensor) -> tuple[Any, ...]:
        return self.predictions(output), _labels(target)

    def misfit(self, info: DataInfo, output: Any) -> str:
        if not is_class_number(info.targets) and not (is_tensor(info.targets) and len(info.targets["shape"]) == 1):
            return wrong_targets(self, info, "a class number (an integer), or a probability for each class")
        classes = info.outputs
        if classes is None or classes < 2:
            return wrong_targets(self, info, "class numbers of at least two classes")
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape != (2, classes):
            returned = shape[1] if isinstance(shape, tuple) and len(shape) == 2 else shape
            return f"returns {returned} outputs for {classes} classes of data; set model.kwargs.num_classes: {classes}"
        return ""

    @staticmethod
    def wrong_values(target: Any, classes: int) -> str:
        if not isinstance(target, Tensor) or not target.is_floating_point():
            return ""  # class numbers are compared with the classes of all samples
        inside = bool(((target >= 0) & (target <= 1)).all())  # False for nan
        return "" if inside else f"has {bounds(target)}, but probabilities are from 0 to 1"

    def chance(self, data: PreparedData) -> float | None:
        return chance_top1(data.labels("search")) if is_class_number(data.info.targets) else None


CLASSIFICATION = Classification()
"""The task of functions that are called without one."""


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


def _labels(target: Tensor) -> Tensor:
    return target.argmax(1) if target.dim() > 1 else target
