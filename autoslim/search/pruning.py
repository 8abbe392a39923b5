"""Channel numbers from the importance of channels, or from the sensitivity of groups; neither needs a supernet."""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from autoslim.channels.grid import Grid
from autoslim.channels.groups import ChannelGroup, Channels
from autoslim.errors import UserError
from autoslim.resources.costs import Fits
from autoslim.search.racing import ChunkRunner
from autoslim.search.scoring import CURRENT, By, Outcome

Numbers = Mapping[str, Sequence[int]]
"""The numbers of channels that each group may have."""


def most_important(
    importance: Mapping[str, Tensor], groups: Mapping[str, ChannelGroup], numbers: Numbers, fits: Fits
) -> Channels:
    """Returns the configuration that keeps the most important channels of all groups together within the limits.

    The importances of a group are divided by their mean, because weights of different layers differ in scale (as in
    Torch-Pruning's global pruning). One threshold for all groups then decides how many channels each of them keeps: the
    lowest threshold that is within the limits. Numbers of channels are rounded up to one of ``numbers``.

    Args:
        importance: the importance of each unit of each group: (units,); see ``channel_importance``.
        groups: the channel groups.
        numbers: the numbers of channels that each group may have; groups without importance get the largest one.
        fits: returns whether a configuration is within the limits.

    Raises:
        UserError: even the narrowest configuration exceeds the limits.
    """
    relative = {name: values / values.mean().clamp_min(1e-30) for name, values in importance.items()}
    allowed = {name: sorted(levels) for name, levels in numbers.items()}

    def above(threshold: float) -> Channels:
        channels = {}
        for name, levels in allowed.items():
            kept = levels[-1]
            if name in relative:
                kept = int((relative[name] > threshold).sum()) * groups[name].unit
            channels[name] = levels[min(bisect.bisect_left(levels, kept), len(levels) - 1)]
        return channels

    thresholds = torch.cat([torch.tensor([-1.0], dtype=torch.float64), *relative.values()]).unique().tolist()
    for threshold in _from_first_that_fits(thresholds, lambda value: fits(above(value))):
        if fits(channels := above(threshold)):  # a latency may rise again
            return channels
    raise UserError("the narrowest configuration exceeds the budget; raise budget, or lower supernet.grid.narrowest")


def _from_first_that_fits(values: Sequence[float], fits: Callable[[float], bool]) -> Sequence[float]:
    """Returns the values from the first one that fits, found by bisection, as if all later ones did too."""
    return values[bisect.bisect_left(values, True, key=fits) :]


def sensitivities(runners: Iterable[ChunkRunner], grid: Grid, by: By = "error") -> dict[str, dict[int, float]]:
    """Returns group -> number of channels -> increase of the score if only this group has that number.

    The other groups are at the widest of the grid.

    Args:
        runners: one runner for each chunk of images.
        by: the score.
    """
    runners = list(runners)
    increases: dict[str, dict[int, float]] = {name: {levels[0]: 0.0} for name, levels in grid.items()}

    def mean(outcomes: Iterable[Outcome]) -> float:
        return float(torch.cat([outcome.scores(by) for outcome in outcomes]).mean())

    for level in range(1, max(map(len, grid.values()))):
        changes = {name: levels[level] for name, levels in grid.items() if level < len(levels)}
        outcomes = [run(grid.widest, changes) for run in runners]
        current = mean(outcome[CURRENT] for outcome in outcomes)
        for name, number in changes.items():
            increases[name][number] = mean(outcome[name] for outcome in outcomes) - current
    return increases


def least_sensitive(increases: Mapping[str, Mapping[int, float]], fits: Fits) -> Channels:
    """Returns the configuration within the limits whose groups, slimmed one at a time, cost the least accuracy.

    Each group is slimmed as far as the score of the network in which only this group is slimmed rises by at most a
    tolerance; the lowest tolerance that is within the limits decides. Whatever of the budget is then unused goes back
    to the groups that were slimmed last. (Sensitivity analysis, as in Li et al., "Pruning filters for efficient
    ConvNets", 2017, section 3.2, and in ModelOpt's FastNAS.)

    Args:
        increases: group -> number of channels -> increase of the score if only this group has that number. The largest
            number is that of the network that was measured. A wider group is taken to be no worse than a narrower one.
        fits: returns whether a configuration is within the limits.

    Raises:
        UserError: even the narrowest configuration exceeds the limits.
    """
    events: list[tuple[float, str, int]] = []  # (tolerance, group, number of channels), in the order of slimming
    for name, by_number in increases.items():
        worst = 0.0
        for number in sorted(by_number, reverse=True)[1:]:
            worst = max(worst, by_number[number])
            events.append((worst, name, number))
    events.sort(key=lambda event: (event[0], list(increases).index(event[1]), -event[2]))
    channels = {name: max(by_number) for name, by_number in increases.items()}
    made = []
    for _, name, number in events:
        if fits(channels):
            break
        made.append((name, channels[name]))
        channels[name] = number
    if not fits(channels):
        raise UserError(
            "the narrowest configuration exceeds the budget; raise budget, or lower supernet.grid.narrowest"
        )
    closed: set[str] = set()
    for name, before in reversed(made):
        if name not in closed and fits({**channels, name: before}):
            channels[name] = before
        else:
            closed.add(name)
    return channels
