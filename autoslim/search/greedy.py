"""Greedy slimming: from the widest configuration down, one step of one group at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from autoslim.channels.groups import Channels
from autoslim.tasks.classification import Score


@dataclass(frozen=True)
class Option:
    """One group's removal of one slimming step: the group's channels after it, and the network's cost."""

    channels: int
    cost: float


@dataclass(frozen=True)
class Candidate(Option):
    """An option with its score."""

    score: Score


@dataclass(frozen=True)
class SlimmingStep:
    """A configuration on the trajectory, and the candidates it was chosen from. The widest one has none."""

    slimmed: str | None
    channels: Channels
    cost: float
    score: Score
    candidates: Mapping[str, Candidate] = field(default_factory=dict)

    @property
    def scores(self) -> list[Score]:
        """All that had to be computed for this step."""
        return [candidate.score for candidate in self.candidates.values()] or [self.score]


SelectionRule = Callable[[SlimmingStep, Mapping[str, Option]], tuple[str, Mapping[str, Score]]]
"""From the current step and the options by group: the group to slim, and the options' scores."""

By = Literal["error", "cross_entropy"]


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
    """Slims one group by one level at a time, always the one whose removal scores best, down to the cost ``stop``.

    AutoSlim's greedy loop, with other ties than the authors': they take the first group, here cross-entropy decides
    and then the larger saving, so that early layers are not slimmed for their position. A step is
    taken even where the score improves, and never undone; one pass serves every budget.

    Args:
        grid: each group's numbers of channels, from the widest down.
        cost: of a configuration, in the resource's unit.
        score: of a configuration.
        stop: yields no further step once the cost is at most this. Ends too when every group is at its narrowest.
        by: what is ranked first. ``error`` is the paper's.
        per_cost: rank by the increase of the score for each unit of cost saved, not by the score.
        rule: chooses among the candidates of a step; without it each is scored by ``score``, and the best is taken.
        done: steps of an earlier run of the same search, to go on from; they are not yielded again.

    Yields:
        The widest configuration first, then one step after the other.
    """
    if done:
        current = done[-1]
    else:
        widest = {name: levels[0] for name, levels in grid.items()}
        current = SlimmingStep(None, widest, cost(widest), score(widest))
        yield current
    rule = rule or exhaustive_rule(score, by, per_cost)
    while current.cost > stop:
        options: dict[str, Option] = {}
        for name, levels in grid.items():
            level = levels.index(current.channels[name]) + 1
            if level < len(levels):
                options[name] = Option(levels[level], cost(current.channels | {name: levels[level]}))
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
    """Scores every option by itself, and takes the best."""

    def rule(current: SlimmingStep, options: Mapping[str, Option]) -> tuple[str, Mapping[str, Score]]:
        scores = {name: score({**current.channels, name: option.channels}) for name, option in options.items()}
        return min(options, key=lambda name: rank(scores[name], options[name], current, by, per_cost)), scores

    return rule


def rank(new: Score, option: Option, current: SlimmingStep, by: By, per_cost: bool) -> tuple[float, ...]:
    """What options are compared by, the least the best: what is asked for, then the other score, then the saving."""
    saved = saving(current, option)
    old = current.score
    error, entropy = new.error, new.cross_entropy
    if per_cost:
        error, entropy = _rate(new.error - old.error, saved), _rate(new.cross_entropy - old.cross_entropy, saved)
    return (error, entropy, -saved) if by == "error" else (entropy, error, -saved)


def saving(current: SlimmingStep, option: Option) -> float:
    """What an option saves. Nearly nothing where it saves nothing: fewer channels may be slower, or not bind."""
    return max(current.cost - option.cost, 1e-9 * current.cost)


def _rate(increase: float, saved: float) -> float:
    """An increase for each unit saved. A decrease is better the more is saved with it, so there it is the product."""
    return increase / saved if increase > 0 else increase * saved
