"""The score of a candidate: its losses on each image, their means, and the order that they put candidates in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.tasks.classification import Score

By = Literal["error", "cross_entropy"]
"""The score that candidates are ranked by; the other one breaks ties."""


@dataclass(frozen=True)
class Outcome:
    """The losses of a configuration on each image: ``wrong`` (top-1, 0 or 1), and ``nats`` (cross-entropy).

    Both are (N,), float64, on the CPU.
    """

    wrong: Tensor
    nats: Tensor


def losses_by_image(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns for each image whether top-1 is wrong, and the cross-entropy in nats: (N, classes), (N,) -> (2, N)."""
    logits = logits.float()
    return torch.stack([(logits.argmax(1) != labels).float(), F.cross_entropy(logits, labels, reduction="none")])


def mean_score(outcomes: Sequence[Outcome]) -> Score:
    """Returns the means over all images of ``outcomes``, one outcome for each chunk."""
    wrong = torch.cat([outcome.wrong for outcome in outcomes])
    nats = torch.cat([outcome.nats for outcome in outcomes])
    return Score(float(wrong.mean()), float(nats.mean()), len(wrong))


def rank(new: Score, old: Score, saved: float, by: By, per_cost: bool) -> tuple[float, ...]:
    """Returns the key that orders candidates, lowest first: the score named ``by``, the other score, the saving.

    Args:
        new: score of the candidate.
        old: score of the current configuration on the same images.
        saved: cost that the candidate saves (see ``saving``).
        by: the score that is compared first.
        per_cost: whether to compare the increase of the score per unit of cost saved.
    """
    error, entropy = new.error, new.cross_entropy
    if per_cost:
        error, entropy = _rate(new.error - old.error, saved), _rate(new.cross_entropy - old.cross_entropy, saved)
    return (error, entropy, -saved) if by == "error" else (entropy, error, -saved)


def saving(before: float, after: float) -> float:
    """Returns the cost that a step saves, but at least a tiny amount, because slimming may save no latency."""
    return max(before - after, 1e-9 * before)


def _rate(increase: float, saved: float) -> float:
    """Returns the increase per unit saved; for a decrease the product, because a larger saving makes it better."""
    return increase / saved if increase > 0 else increase * saved
