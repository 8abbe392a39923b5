"""Refinement: uses the rest of a budget, and exchanges channels between groups, from a configuration of the search."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from autoslim.channels.grid import Grid
from autoslim.channels.groups import ChannelGroup, Channels
from autoslim.data.prepared import PreparedData
from autoslim.resources.costs import Costs
from autoslim.search.scoring import CURRENT, By, Outcome, concatenated, mean_score
from autoslim.search.search import SearchSettings, scoring_runners
from autoslim.search.trajectory import append_line, recorded_lines
from autoslim.supernet.supernet import Supernet
from autoslim.training.checkpoints import Checkpoints
from autoslim.training.device import RunContext
from autoslim.training.progress import Progress

EXCHANGES = 4  # pairs of groups that are tried at each configuration

Evaluate = Callable[[Channels, Mapping[str, int]], Mapping[str, Outcome]]
"""(configuration, changes) -> outcomes on all images: of the configuration, under ``CURRENT``, and with each change."""


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
) -> Iterator[Change]:
    """Improves a configuration within its limits, until no change improves it.

    The search only slims, and the first configuration within the limits leaves part of the budget unused. So, as long
    as a wider group fits and improves the score, the group that improves it most is widened: by one step of the grid,
    or as far as it fits. Then groups exchange channels: one is widened by a step and another one is slimmed by a step.
    Pairs are ordered by the sum of what each of the two changes alone does to the score. The first few pairs are
    evaluated, and the best one is made if it improves the score by more than a standard error.

    Args:
        channels: a configuration within the limits.
        grid: the grid of the search.
        numbers: the numbers of channels that each group can have, among them those of the grid.
        fits: returns whether a configuration is within the limits.
        evaluate: evaluates configurations on all images.
        by: the score that is improved.

    Yields:
        Each change. The last one's configuration is the result; without a change it is ``channels``.
    """
    refinement = _Refinement(grid, numbers, fits, evaluate, by)
    while change := refinement.growth(channels) or refinement.exchange(channels):
        channels = change.channels
        yield change


def fine_numbers(grid: Grid, groups: Mapping[str, ChannelGroup], divisor: int) -> dict[str, list[int]]:
    """Returns the numbers of the grid, and between them those that are multiples of ``divisor`` below the widest."""
    return {
        name: sorted({*levels, *range(levels[0], levels[-1] - 1, -math.lcm(divisor, groups[name].unit))})
        for name, levels in grid.items()
    }


@dataclass(frozen=True)
class _Refinement:
    grid: Grid
    numbers: Mapping[str, Sequence[int]]
    fits: Callable[[Channels], bool]
    evaluate: Evaluate
    by: By
    known: dict[tuple[tuple[str, int], ...], Tensor] = field(default_factory=dict)
    """Configuration -> (N,), its loss on each image."""

    def growth(self, channels: Channels) -> Change | None:
        """Returns the best improvement by a wider group, if there is one."""
        wider = {name: count for name in channels if (count := self._widest_that_fits(channels, name)) is not None}
        improvements = self._improvements(channels, wider)
        best = max(improvements, key=improvements.__getitem__, default=None)
        if best is None or improvements[best] <= 0:
            return None
        return Change({best: wider[best]}, {**channels, best: wider[best]}, improvements[best])

    def exchange(self, channels: Channels) -> Change | None:
        """Returns the best significant improvement by one wider and one narrower group, if there is one."""
        wider = {n: min(above) for n, count in channels.items() if (above := [k for k in self.grid[n] if k > count])}
        narrower = {n: max(below) for n, count in channels.items() if (below := [k for k in self.grid[n] if k < count])}
        up, down = self._improvements(channels, wider), self._improvements(channels, narrower)
        pairs = [
            {grown: wider[grown], slimmed: narrower[slimmed]}
            for grown, slimmed in sorted(
                ((grown, slimmed) for grown in wider for slimmed in narrower if grown != slimmed),
                key=lambda pair: -up[pair[0]] - down[pair[1]],
            )
            if up[grown] + down[slimmed] > 0
            and self.fits({**channels, grown: wider[grown], slimmed: narrower[slimmed]})
        ]
        changes = []
        for pair in pairs[:EXCHANGES]:
            gained = self._losses(channels) - self._losses({**channels, **pair})
            if float(gained.mean()) > float(gained.std()) / math.sqrt(len(gained)):
                changes.append(Change(pair, {**channels, **pair}, float(gained.mean())))
        return max(changes, key=lambda change: change.improvement, default=None)

    def _widest_that_fits(self, channels: Channels, name: str) -> int | None:
        """Returns the largest number up to the next one of the grid with which the configuration fits."""
        step = min((count for count in self.grid[name] if count > channels[name]), default=channels[name])
        counts = [count for count in self.numbers[name] if channels[name] < count <= step]
        return max((count for count in counts if self.fits({**channels, name: count})), default=None)

    def _improvements(self, channels: Channels, changes: Mapping[str, int]) -> dict[str, float]:
        """Returns the decrease of the mean loss by each change alone."""
        new = {name: count for name, count in changes.items() if self._key({**channels, name: count}) not in self.known}
        if new or self._key(channels) not in self.known:
            for name, outcome in self.evaluate(channels, new).items():
                change = {} if name == CURRENT else {name: new[name]}
                self.known[self._key({**channels, **change})] = outcome.losses(self.by)
        before = self._losses(channels)
        return {name: float((before - self._losses({**channels, name: n})).mean()) for name, n in changes.items()}

    def _losses(self, channels: Channels) -> Tensor:
        key = self._key(channels)
        if key not in self.known:
            self.known[key] = self.evaluate(channels, {})[CURRENT].losses(self.by)
        return self.known[key]

    @staticmethod
    def _key(channels: Channels) -> tuple[tuple[str, int], ...]:
        return tuple(channels.items())


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
) -> dict[str, Any]:
    """Refines a configuration of a trajectory within ``limits`` (see ``refine``), with the scores of the search.

    An interrupted refinement continues after its last change.

    Args:
        supernet: the trained supernet, on the device of ``context``.
        grid: the grid of the search.
        channels: a configuration within the limits.
        limits: resource -> upper bound in its unit.
        divisor: between the numbers of the grid, groups can also have multiples of this number below the widest. A
            latency table has no times for them, so with a limit of latency they have the grid's numbers only.
        seed: seed of the order of the search images, as in the search.

    Returns:
        The changes, and the configuration, its costs and its score before and after them.
    """
    runners, _ = scoring_runners(supernet, data, context, settings, seed)
    numbers = grid if "latency" in limits else fine_numbers(grid, supernet.graph.groups, divisor)

    def evaluate(chosen: Channels, changes: Mapping[str, int]) -> dict[str, Outcome]:
        outcomes = [run_chunk(chosen, changes) for run_chunk in runners]
        return {name: concatenated([outcome[name] for outcome in outcomes]) for name in (*changes, CURRENT)}

    log = checkpoints.folder / "changes.jsonl"
    made = recorded_lines(log)
    refined = {**channels, **{name: count for change in made for name, count in change["groups"].items()}}
    with Progress("refinement", len(made), "change", done=len(made)) as progress:
        for change in refine(refined, grid, numbers, lambda c: costs.within(c, limits), evaluate, settings.score):
            refined = change.channels
            made.append({"groups": change.groups, "improvement": change.improvement})
            append_line(log, made[-1])
            progress.expect(len(made))
            progress.advance()
    ends = {
        which: {"channels": c, **costs.all(c), **asdict(mean_score([evaluate(c, {})[CURRENT]]))}
        for which, c in (("before", channels), ("after", refined))
    }
    return {**ends, "changes": made}
