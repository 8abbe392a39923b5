"""The score of a candidate: its losses on each image, their means, and the order that they put candidates in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.tasks.classification import TRAIN_BETTER, Score, is_chance

By = Literal["error", "cross_entropy"]
"""The score that options are ranked by; the other one breaks ties."""

CURRENT = ""
"""The key of the current configuration among the groups."""


@dataclass(frozen=True)
class Outcome:
    """The losses of a configuration on each image: ``wrong`` (top-1, 0 or 1), and ``nats`` (cross-entropy).

    Both are (N,), float64, on the CPU.
    """

    wrong: Tensor
    nats: Tensor

    def __sub__(self, other: "Outcome") -> "Outcome":
        """Returns the differences of the losses on each image."""
        return Outcome(self.wrong - other.wrong, self.nats - other.nats)

    def losses(self, by: By) -> Tensor:
        """Returns the losses that belong to a score."""
        return self.wrong if by == "error" else self.nats


class Increase(NamedTuple):
    """The increase of both scores from one configuration to another, on the same images."""

    error: float
    cross_entropy: float


def increase(old: Score, new: Score) -> Increase:
    """Returns the increase of both scores from ``old`` to ``new``."""
    return Increase(new.error - old.error, new.cross_entropy - old.cross_entropy)


def losses_by_image(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns for each image whether top-1 is wrong, and the cross-entropy in nats: (N, classes), (N,) -> (2, N)."""
    logits = logits.float()
    return torch.stack([(logits.argmax(1) != labels).float(), F.cross_entropy(logits, labels, reduction="none")])


def concatenated(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns the outcome on the images of all ``outcomes``, one for each chunk."""
    return Outcome(torch.cat([part.wrong for part in outcomes]), torch.cat([part.nats for part in outcomes]))


def mean_score(outcomes: Sequence[Outcome]) -> Score:
    """Returns the means over all images of ``outcomes``, one outcome for each chunk."""
    whole = concatenated(outcomes)
    return Score(float(whole.wrong.mean()), float(whole.nats.mean()), len(whole.wrong))


def chosen_by_noise(scores: Sequence[Score], chance: float) -> str:
    """Returns a message if scores of a trajectory are not better than ``chance`` (see ``chance_top1``), else "".

    The differences between the options of such a step are those between guesses.
    """
    guesses = [score for score in scores if is_chance(score, chance)]
    if not guesses:
        return ""
    best = 1 - min(score.error for score in guesses)
    return (
        f"{len(guesses)} of the {len(scores)} configurations on the search's path have a top-1 that is not above "
        f"chance, which is {chance:.1%} (the best of them has {best:.1%}); there the search chose by noise: "
        f"{TRAIN_BETTER}"
    )


def rank(increase: Increase, saved: float, by: By, per_cost: bool) -> tuple[float, ...]:
    """Returns the key that orders options, lowest first: the score named ``by``, the other score, the saving.

    Args:
        increase: the increase of the scores.
        saved: cost that the option saves, greater than 0.
        by: the score that is compared first.
        per_cost: whether to compare the increase of the score per unit of cost saved.
    """
    error, entropy = increase
    if per_cost:
        error, entropy = _rate(error, saved), _rate(entropy, saved)
    return (error, entropy, -saved) if by == "error" else (entropy, error, -saved)


def _rate(increase: float, saved: float) -> float:
    """Returns the increase per unit saved; for a decrease the product, because a larger saving makes it better."""
    return increase / saved if increase > 0 else increase * saved
