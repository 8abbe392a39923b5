"""Refinement: widens groups of a configuration within a budget, and exchanges channels between them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoslim.channels.grid import Grid
from autoslim.channels.groups import ChannelGroup, Channels
from autoslim.channels.limits import GroupRange
from autoslim.data.prepared import PreparedData
from autoslim.files import append_line, read_lines
from autoslim.resources.costs import Costs
from autoslim.search.scoring import CURRENT, By, Outcome, concatenated, mean_score
from autoslim.search.search import SearchSettings, scoring_runners
from autoslim.search.trajectory import score_to_dict
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.classification import CLASSIFICATION
from autoslim.tasks.task import Task
from autoslim.training.checkpoints import Checkpoints
from autoslim.training.device import RunContext
from autoslim.training.progress import Progress

EXCHANGES = 4  # pairs of groups that are tried at each configuration

Evaluate = Callable[[Channels, Mapping[str, int]], Mapping[str, Outcome]]
"""(configuration, changes) -> outcomes on all images: of the configuration, under ``CURRENT``, and with each change."""


Step = tuple[str, int, int]
"""A group, and its numbers of channels before and after the step."""

Improvements = dict[Step, tuple[float, float]]
"""By how much a step alone decreased the score, and for ties the other score, where it was last evaluated."""


@dataclass(frozen=True)
class Change:
    """A change of a configuration.

    Attributes:
        groups: the changed groups, with their number of channels after it.
        channels: the configuration after it.
        improvement: the decrease of the score.
    """

    groups: Channels
    channels: Channels
    improvement: float


def refine(
    channels: Channels,
    grid: Grid,
    numbers: Mapping[str, Sequence[int]],
    fits: Callable[[Channels], bool],
    evaluate: Evaluate,
    by: By,
    improvements: Improvements | None = None,
) -> Iterator[Change]:
    """Improves a configuration within its limits, until no change improves it.

    The search only slims, and the first configuration within the limits leaves part of the budget unused. So, as long
    as a wider group fits and improves the score, the group that improves it most is widened: by one step of the grid,
    or as far as it fits. Then groups exchange channels: one is widened by a step and another one is slimmed by a step.
    Pairs are ordered by the sum of what each of the two steps alone does to the score, as it was when this was last
    evaluated. The first few pairs are evaluated, and the best one is made if it improves the score by more than a
    standard error.

    Args:
        channels: a configuration within the limits.
        grid: the grid of the search.
        numbers: the numbers of channels that each group can have, among them those of the grid.
        fits: returns whether a configuration is within the limits.
        evaluate: evaluates configurations on all images.
        by: the score that is improved.
        improvements: what has been evaluated so far; it is updated. To continue an interrupted refinement, pass what it
            contained after the last change.

    Yields:
        Each change. The last one's configuration is the result; without a change it is ``channels``.
    """
    refinement = _Refinement(grid, numbers, fits, evaluate, by, {} if improvements is None else improvements)
    while change := refinement.growth(channels) or refinement.exchange(channels):
        channels = change.channels
        yield change


def fine_numbers(
    grid: Grid,
    groups: Mapping[str, ChannelGroup],
    divisor: int,
    ranges: Mapping[str, GroupRange] | None = None,
) -> dict[str, list[int]]:
    """Returns the numbers of the grid, and between them the narrowest number plus multiples of ``divisor``.

    The numbers of groups with limits are also multiples of ``ranges[name].multiple``.
    """
    numbers = {}
    for name, levels in grid.items():
        multiple = ranges[name].multiple if ranges and name in ranges else 1
        step = math.lcm(divisor, groups[name].unit, multiple)
        numbers[name] = sorted({*levels, *range(levels[-1], levels[0], step)})
    return numbers


@dataclass(frozen=True)
class _Refinement:
    grid: Grid
    numbers: Mapping[str, Sequence[int]]
    fits: Callable[[Channels], bool]
    evaluate: Evaluate
    by: By
    improvements: Improvements
    outcomes: dict[tuple[int, ...], Outcome] = field(default_factory=dict)  # by numbers of channels

    def growth(self, channels: Channels) -> Change | None:
        """Returns the best improvement by a wider group, if there is one.

        What a step improves falls as the network grows. Earlier improvements are therefore upper bounds, and only the
        best ones have to be evaluated again (lazy greedy; Minoux, 1978).
        """
        steps = [
            (name, channels[name], count)
            for name in channels
            if (count := self._widest_that_fits(channels, name)) is not None
        ]
        fresh = self._evaluate_new(channels, steps)
        while steps:
            best = max(steps, key=self.improvements.__getitem__)
            if self.improvements[best] <= (0.0, 0.0):
                return None
            if best in fresh:
                name, _, count = best
                return Change({name: count}, {**channels, name: count}, self.improvements[best][0])
            fresh |= self._evaluate(channels, [best])
        return None

    def exchange(self, channels: Channels) -> Change | None:
        """Returns the best significant improvement by one wider and one narrower group, if there is one."""
        wider, narrower = [], []
        for name, count in channels.items():
            wider += [(name, count, level) for level in sorted(self.grid[name]) if level > count][:1]
            narrower += [(name, count, level) for level in sorted(self.grid[name]) if level < count][-1:]
        self._evaluate_new(channels, wider + narrower)
        pairs = [
            (self.improvements[up][0] + self.improvements[down][0], {up[0]: up[2], down[0]: down[2]})
            for up in wider
            for down in narrower
            if up[0] != down[0]
        ]
        pairs = [(both, pair) for both, pair in pairs if both > 0 and self.fits({**channels, **pair})]
        changes = []
        for _, pair in sorted(pairs, key=lambda ranked: -ranked[0])[:EXCHANGES]:
            improved = {**channels, **pair}
            decrease = (self._outcome(channels) - self._outcome(improved)).scores(self.by)
            if float(decrease.mean()) > float(decrease.std()) / math.sqrt(len(decrease)):
                changes.append(Change(pair, improved, float(decrease.mean())))
        return max(changes, key=lambda change: change.improvement, default=None)

    def _widest_that_fits(self, channels: Channels, name: str) -> int | None:
        """Returns the largest number up to the next one of the grid with which the configuration fits."""
        step = min((count for count in self.grid[name] if count > channels[name]), default=channels[name])
        counts = [count for count in self.numbers[name] if channels[name] < count <= step]
        return max((count for count in counts if self.fits({**channels, name: count})), default=None)

    def _evaluate_new(self, channels: Channels, steps: Sequence[Step]) -> set[Step]:
        """Evaluates the steps that have not been evaluated at any configuration, and returns them."""
        return self._evaluate(channels, [step for step in steps if step not in self.improvements])

    def _evaluate(self, channels: Channels, steps: Sequence[Step]) -> set[Step]:
        """Evaluates the steps from ``channels``, and returns them."""
        slimming = {
            name: after
            for name, before, after in steps
            if after < before and tuple({**channels, name: after}.values()) not in self.outcomes
        }
        if slimming:
            for name, outcome in self.evaluate(channels, slimming).items():  # incrementally
                changed = channels if name == CURRENT else {**channels, name: slimming[name]}
                self.outcomes[tuple(changed.values())] = outcome
        for name, before, after in steps:
            decrease = self._outcome(channels) - self._outcome({**channels, name: after})
            means = float(decrease.errors.mean()), float(decrease.losses.mean())
            self.improvements[name, before, after] = means if self.by == "error" else means[::-1]
        return set(steps)

    def _outcome(self, channels: Channels) -> Outcome:
        key = tuple(channels.values())
        if key not in self.outcomes:
            self.outcomes[key] = self.evaluate(channels, {})[CURRENT]
        return self.outcomes[key]


def refine_within(
    supernet: Supernet,
    grid: Grid,
    data: PreparedData,
    context: RunContext,
    *,
    channels: Channels,
    costs: Costs,
    limits: Mapping[str, float],
    divisor: int,
    settings: SearchSettings,
    seed: int,
    checkpoints: Checkpoints,
    ranges: Mapping[str, GroupRange] | None = None,
    task: Task = CLASSIFICATION,
) -> dict[str, Any]:
    """Refines a configuration of a trajectory within ``limits`` (see ``refine``), with the scores of the search.

    An interrupted refinement continues after its last change. It runs in one process.

    Args:
        supernet: the trained supernet, on the device of ``context``.
        grid: the grid of the search.
        channels: a configuration within the limits.
        limits: resource -> upper bound in its unit.
        divisor: see ``fine_numbers``. A latency table has times for the numbers of the grid only, so with a limit of
            latency groups have only those.
        seed: seed of the order of the search images, as in the search.
        ranges: limits of groups (see ``fine_numbers``).
        task: computes the scores.

    Returns:
        The changes, and the configuration, its costs and its score before and after them.
    """
    runners, _ = scoring_runners(supernet, data, context, settings, seed, task)
    numbers = grid if "latency" in limits else fine_numbers(grid, supernet.graph.groups, divisor, ranges)

    def evaluate(chosen: Channels, changes: Mapping[str, int]) -> dict[str, Outcome]:
        outcomes = [run_chunk(chosen, changes) for run_chunk in runners]
        return {name: concatenated([outcome[name] for outcome in outcomes]) for name in (*changes, CURRENT)}

    log = checkpoints.folder / "changes.jsonl"
    lines = read_lines(log)
    made = [line["change"] for line in lines]
    refined = {**channels, **{name: count for change in made for name, count in change["groups"].items()}}
    known = lines[-1]["known"] if lines else []
    improvements: Improvements = {(name, before, after): (*both,) for name, before, after, both in known}
    with Progress("refinement", len(made), "change", done=len(made)) as progress:
        for change in refine(
            refined, grid, numbers, lambda c: costs.within(c, limits), evaluate, settings.score, improvements
        ):
            refined = change.channels
            made.append({"groups": change.groups, "improvement": change.improvement})
            append_line(log, {"change": made[-1], "known": [[*step, both] for step, both in improvements.items()]})
            progress.expect(len(made))
            progress.advance()
    ends = {
        which: {"channels": c, **costs.all(c), **score_to_dict(mean_score([evaluate(c, {})[CURRENT]]), task.loss_name)}
        for which, c in (("before", channels), ("after", refined))
    }
    return {**ends, "changes": made}
