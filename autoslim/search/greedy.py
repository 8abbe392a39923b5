"""Greedy slimming: starts from the widest configuration and slims the groups that matter least, step by step."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from autoslim.channels.grid import Grid
from autoslim.channels.groups import Channels
from autoslim.search.scoring import By, Increase, increase, rank
from autoslim.tasks.task import Score

Cost = Callable[[Mapping[str, int]], float]
"""Returns the cost of a configuration in the resource's unit."""


@dataclass(frozen=True)
class Option:
    """A possible slimming step of one group.

    Attributes:
        channels: the group's number of channels after the step.
        cost: the network's cost after the step.
        saved: the cost that the step saves (see ``slimming_options``), greater than 0.
    """

    channels: int
    cost: float
    saved: float


@dataclass(frozen=True)
class SlimmingStep:
    """A configuration on the trajectory, the options that were scored there, and those that were taken.

    Attributes:
        slimmed: the groups that were slimmed to reach it; empty for the widest configuration.
        channels: the configuration.
        cost: its cost.
        score: its score on all images.
        options: the options from it, by group. The last configuration has none.
        scores: the score of each option, on the images that it was run on.
        taken: the groups that are slimmed next.
        increases: the increase of the scores by each option, on the images that it was run on.
    """

    slimmed: tuple[str, ...]
    channels: Channels
    cost: float
    score: Score
    options: Mapping[str, Option] = field(default_factory=dict)
    scores: Mapping[str, Score] = field(default_factory=dict)
    taken: tuple[str, ...] = ()
    increases: Mapping[str, Increase] = field(default_factory=dict)

    @property
    def following(self) -> Channels:
        """The configuration of the next step."""
        return {**self.channels, **{name: self.options[name].channels for name in self.taken}}


@dataclass(frozen=True)
class Evaluation:
    """What a selection rule returns: the score of the current configuration, of each option, and the groups to slim.

    ``increases`` are those of the scores from the current configuration to each option, on the option's images.
    """

    score: Score
    scores: Mapping[str, Score]
    taken: tuple[str, ...]
    increases: Mapping[str, Increase]


Choose = Callable[[Mapping[str, Increase], Collection[str]], tuple[str, ...]]
"""(increases of the score by group, groups that go first) -> the groups to slim, in order. A group without an increase
is not slimmed."""

SelectionRule = Callable[[Channels, Mapping[str, Option], Choose], Evaluation]
"""(current configuration, options by group, choice) -> the scores, and the groups that are chosen with them."""


def greedy_slim(
    grid: Mapping[str, Sequence[int]],
    cost: Cost,
    rule: SelectionRule,
    stop: float,
    *,
    by: By = "error",
    per_cost: bool = False,
    step: float = 0.0,
    coarse_above: float = math.inf,
    done: Sequence[SlimmingStep] = (),
) -> Iterator[SlimmingStep]:
    """Slims the groups that matter least, step by step, from the widest configuration down to the cost ``stop``.

    With the default settings this is AutoSlim's greedy loop (Yu & Huang, arXiv 1903.11728, section 3.3): each step
    slims the one group with the best resulting score. There are two extensions. With ``per_cost``, options are ranked
    by the increase of the score per unit of cost saved. This matters if groups contribute unevenly to the cost, as to
    memory. With ``step``, a step slims several groups: options are taken in the order of their rank until the cost has
    fallen by this share, on the assumption that the increases of the score add up. At most half of the options are
    taken, so that a step remains a choice if only a few groups reduce the cost.

    Options that save nothing are left out while others save something. Ties are broken by the other score and then by
    the larger saving; the authors take the first group, so early layers are slimmed because of their position. A step
    is taken even if it improves the score, and it is never undone. One pass serves every budget.

    Args:
        grid: the numbers of channels that each group can have, in descending order.
        cost: returns the cost of a configuration in the resource's unit.
        rule: scores the options of each step; ``exhaustive_rule`` or ``racing_rule``.
        stop: the search ends when the cost is at most this value, or when slimming does not reduce it any further.
        by: the score that options are ranked by. The paper uses ``error``.
        per_cost: whether to rank by the increase of the score per unit of cost saved instead of by the increase.
        step: the share of the cost that each step removes, in [0, 0.5). With 0, each step slims one group.
        coarse_above: above this cost, where budgets are rare, each step removes twice that share.
        done: steps of an earlier run of the same search. The search continues after them and does not yield them again.

    Yields:
        The widest configuration, then the configuration after each step.
    """
    slimming = _Slimming(Grid(grid), cost, stop, by, per_cost, step, coarse_above)
    last = done[-1] if done else None
    while last is None or last.taken:
        channels = last.following if last else slimming.grid.widest
        options = slimming.options(channels)
        result = rule(channels, options, partial(slimming.choose, channels, options))
        last = SlimmingStep(
            last.taken if last else (),
            channels,
            cost(channels),
            result.score,
            options,
            result.scores,
            result.taken,
            result.increases,
        )
        yield last


def exhaustive_rule(score: Callable[[Mapping[str, int]], Score]) -> SelectionRule:
    """Returns the selection rule that scores every option separately."""

    def rule(channels: Channels, options: Mapping[str, Option], choose: Choose) -> Evaluation:
        current = score(channels)
        scores = {name: score({**channels, name: option.channels}) for name, option in options.items()}
        increases = {name: increase(current, new) for name, new in scores.items()}
        return Evaluation(current, scores, choose(increases, ()), increases)

    return rule


def slimming_options(grid: Grid, channels: Channels, cost: Cost) -> dict[str, Option]:
    """Returns for each group the next narrower number of channels that reduces the cost; other groups are left out.

    It may be that no group reduces the cost alone, for example if two operations need the same peak of memory. Then the
    options are the groups that do so together with one step of all other groups, and ``saved`` is their part in it; or,
    if there is none either, every group.

    Returns:
        Group -> option. Empty if even the narrowest configuration does not reduce the cost.
    """
    current = cost(channels)
    options = {}
    for name, levels in grid.items():
        for count in levels[levels.index(channels[name]) + 1 :]:
            if (after := cost({**channels, name: count})) < current:
                options[name] = Option(count, after, current - after)
                break
    if options or cost(grid.narrowest) >= current:
        return options
    narrower = grid.narrower(channels)
    together = {**channels, **narrower}
    parts = {name: cost({**together, name: channels[name]}) - cost(together) for name in narrower}
    if not any(part > 0 for part in parts.values()):
        parts = dict.fromkeys(narrower, current)
    return {
        name: Option(count, cost({**channels, name: count}), parts[name])
        for name, count in narrower.items()
        if parts[name] > 0
    }


def cost_to_reach(current: float, stop: float, step: float, coarse_above: float) -> float:
    """Returns the cost at which a step from the cost ``current`` ends; see ``greedy_slim``."""
    share = 2 * step if current > coarse_above else step
    return max(stop, current * (1 - share))


@dataclass(frozen=True)
class _Slimming:
    """What decides the options of a step, and the choice among them; see ``greedy_slim``."""

    grid: Grid
    cost: Cost
    stop: float
    by: By
    per_cost: bool
    step: float
    coarse_above: float

    def options(self, channels: Channels) -> dict[str, Option]:
        if self.cost(channels) <= self.stop:
            return {}
        return slimming_options(self.grid, channels, self.cost)

    def choose(
        self,
        channels: Channels,
        options: Mapping[str, Option],
        increases: Mapping[str, Increase],
        first: Collection[str],
    ) -> tuple[str, ...]:
        target = cost_to_reach(self.cost(channels), self.stop, self.step, self.coarse_above)
        left = {name: options[name] for name in options if name in increases}
        taken: list[str] = []

        def key(name: str) -> tuple[float, ...]:
            return name not in first, *rank(increases[name], left[name].saved, self.by, self.per_cost)

        while left and len(taken) < max(1, len(options) // 2):
            best = min(left, key=key)
            taken.append(best)
            channels = {**channels, best: left.pop(best).channels}
            cost = self.cost(channels)
            if not self.step or cost <= target:
                break
            saved = {name: cost - self.cost({**channels, name: option.channels}) for name, option in left.items()}
            left = {name: replace(option, saved=saved[name]) for name, option in left.items() if saved[name] > 0}
        return tuple(taken)
