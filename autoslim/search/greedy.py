"""Greedy slimming: starts from the widest configuration and slims one group by one step at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autoslim.channels.grid import Grid
from autoslim.channels.groups import Channels
from autoslim.search.scoring import By, rank, saving
from autoslim.tasks.classification import Score


@dataclass(frozen=True)
class Option:
    """A possible slimming step of one group: the group's channels and the network's cost after it."""

    channels: int
    cost: float


@dataclass(frozen=True)
class Candidate(Option):
    """An option with its score."""

    score: Score


@dataclass(frozen=True)
class SlimmingStep:
    """A configuration on the trajectory, and the candidates that it was chosen from (none for the widest one)."""

    slimmed: str | None
    channels: Channels
    cost: float
    score: Score
    candidates: Mapping[str, Candidate] = field(default_factory=dict)

    @property
    def scores(self) -> list[Score]:
        """All scores that were computed for this step."""
        return [candidate.score for candidate in self.candidates.values()] or [self.score]


SelectionRule = Callable[[SlimmingStep, Mapping[str, Option]], tuple[str, Mapping[str, Score]]]
"""(current step, options by group) -> (the group to slim, the options' scores)."""


def greedy_slim(
    grid: Mapping[str, Sequence[int]],
    cost: Callable[[Mapping[str, int]], float],
    score: Callable[[Mapping[str, int]], Score],
    stop: float,
    *,
    by: By = "error",
    per_cost: bool = False,
    rule: SelectionRule | None = None,
    done: Sequence[SlimmingStep] = (),
) -> Iterator[SlimmingStep]:
    """Slims one group by one step at a time, always the one with the best resulting score, down to the cost ``stop``.

    This is AutoSlim's greedy loop (Yu & Huang, arXiv 1903.11728, section 3.3). Ties are broken differently: the authors
    take the first group; here the lower cross-entropy and then the larger saving decides, so that early layers are not
    slimmed because of their position. A step is taken even if it improves the score, and it is never undone. One
    pass serves every budget.

    Args:
        grid: the numbers of channels that each group can have, in descending order.
        cost: returns the cost of a configuration in the resource's unit.
        score: returns the score of a configuration.
        stop: the search ends when the cost is at most this value, or when every group is at its narrowest.
        by: the score that candidates are ranked by. The paper uses ``error``.
        per_cost: whether to rank by the increase of the score per unit of cost saved instead of by the score.
        rule: the selection rule, in place of ``by`` and ``per_cost``. By default, ``score`` scores each option, and the
            best one is taken.
        done: steps of an earlier run of the same search. The search continues after them and does not yield them again.

    Yields:
        The widest configuration, then each slimming step.
    """
    grid = Grid(grid)
    if done:
        current = done[-1]
    else:
        current = SlimmingStep(None, grid.widest, cost(grid.widest), score(grid.widest))
        yield current
    rule = rule or exhaustive_rule(score, by, per_cost)
    while current.cost > stop:
        options = {
            name: Option(count, cost(current.channels | {name: count}))
            for name, count in grid.narrower(current.channels).items()
        }
        if not options:
            return
        best, scores = rule(current, options)
        current = SlimmingStep(
            best,
            current.channels | {best: options[best].channels},
            options[best].cost,
            scores[best],
            {name: Candidate(option.channels, option.cost, scores[name]) for name, option in options.items()},
        )
        yield current


def exhaustive_rule(score: Callable[[Mapping[str, int]], Score], by: By, per_cost: bool) -> SelectionRule:
    """Returns the selection rule that scores every option separately and takes the best one."""

    def rule(current: SlimmingStep, options: Mapping[str, Option]) -> tuple[str, Mapping[str, Score]]:
        scores = {name: score({**current.channels, name: option.channels}) for name, option in options.items()}
        return min(
            options,
            key=lambda name: rank(scores[name], current.score, saving(current.cost, options[name].cost), by, per_cost),
        ), scores

    return rule
