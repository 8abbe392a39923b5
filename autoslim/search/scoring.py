"""The score of a candidate: its losses on each image, their means, and the order that they put candidates in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from autoslim.tasks.classification import TRAIN_BETTER, is_chance
from autoslim.tasks.task import Score

By = str
"""The score that options are ranked by; the other one breaks ties: ``error``, or ``loss`` or the task's name of it."""

CURRENT = ""
"""The key of the current configuration among the groups."""


@dataclass(frozen=True)
class Outcome:
    """The error and the loss of a configuration on each image (see ``Task.sample_scores``).

    Both are (N,), float64, on the CPU.
    """

    errors: Tensor
    losses: Tensor

    def __sub__(self, other: "Outcome") -> "Outcome":
        """Returns the differences on each image."""
        return Outcome(self.errors - other.errors, self.losses - other.losses)

    def scores(self, by: By) -> Tensor:
        """Returns the numbers of which a score is the mean."""
        return self.errors if by == "error" else self.losses


class Increase(NamedTuple):
    """The increase of both scores from one configuration to another, on the same images."""

    error: float
    loss: float


def increase(old: Score, new: Score) -> Increase:
    """Returns the increase of both scores from ``old`` to ``new``."""
    return Increase(new.error - old.error, new.loss - old.loss)


def concatenated(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns the outcome on the images of all ``outcomes``, one for each chunk."""
    return Outcome(torch.cat([part.errors for part in outcomes]), torch.cat([part.losses for part in outcomes]))


def mean_score(outcomes: Sequence[Outcome]) -> Score:
    """Returns the means over all images of ``outcomes``, one outcome for each chunk."""
    whole = concatenated(outcomes)
    return Score(float(whole.errors.mean()), float(whole.losses.mean()), len(whole.errors))


def chosen_by_noise(scores: Sequence[Score], chance: float | None) -> str:
    """Returns a message if scores of a trajectory are not better than ``chance`` (see ``Task.chance``), else "".

    The differences between the options of such a step are those between guesses.
    """
    guesses = [] if chance is None else [score for score in scores if is_chance(score, chance)]
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
    error, loss = increase
    if per_cost:
        error, loss = _rate(error, saved), _rate(loss, saved)
    return (error, loss, -saved) if by == "error" else (loss, error, -saved)


def _rate(increase: float, saved: float) -> float:
    """Returns the increase per unit saved; for a decrease the product, because a larger saving makes it better."""
    return increase / saved if increase > 0 else increase * saved
