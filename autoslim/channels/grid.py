"""Width multipliers, and the grid of channel numbers on which configurations are sampled and searched."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from autoslim.channels.groups import ChannelGroup, Channels
from autoslim.channels.limits import GroupLimits


def make_divisible(value: float, divisor: int) -> int:
    """Returns the multiple of ``divisor`` nearest to ``value``, at least ``divisor`` and at most 10 % below ``value``.

    This is how the MobileNet papers round widths.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def scaled(groups: Mapping[str, ChannelGroup], width: float, divisor: int) -> Channels:
    """Returns the configuration of one width multiplier for all groups, rounded to multiples of ``divisor``.

    A group that expands another one (the hidden layer of an inverted residual) follows the rounded width of that group,
    so ``scaled(groups, 1.5, 8)`` of MobileNetV2 has the channels of the paper's 1.5x network: the authors' code rounds
    before it expands. A width of 1 returns the sizes unchanged.
    """
    if width == 1.0:
        return {name: group.size for name, group in groups.items()}
    channels: Channels = {}

    def size(group: ChannelGroup) -> int:
        if group.name not in channels:
            if group.expansion is not None:
                narrow, factor = group.expansion
                channels[group.name] = size(groups[narrow]) * factor
            else:
                channels[group.name] = make_divisible(group.size * width, math.lcm(divisor, group.unit))
        return channels[group.name]

    return {name: size(group) for name, group in groups.items()}


def slimming_step(widest: int, steps: int, divisor: int) -> int:
    """Returns the number of channels that one slimming step removes from a group.

    This is ``widest / steps`` rounded to the nearest multiple of ``divisor``, and at least ``divisor``. Ties go to the
    even multiple: with 12 steps and divisor 8 this explains every channel number that the authors released.
    """
    return max(divisor, round(widest / steps / divisor) * divisor)


class Grid(dict[str, tuple[int, ...]]):
    """The numbers of channels that each group may have: group name -> numbers in descending order.

    Configurations are sampled and searched on this grid. Treat it as immutable.

    Args:
        levels: numbers of channels by group, each in descending order.
        multiples: numbers of which other numbers of channels between those of the grid have to be multiples, by group.
            By default, they are the greatest common divisors of the grid's numbers.
    """

    def __init__(
        self,
        levels: Mapping[str, Sequence[int]] | Iterable[tuple[str, Sequence[int]]],
        multiples: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__((name, tuple(numbers)) for name, numbers in dict(levels).items())
        self.multiples = dict(multiples or {name: math.gcd(*numbers) for name, numbers in self.items()})

    @property
    def widest(self) -> Channels:
        """The configuration with the most channels in every group."""
        return {name: numbers[0] for name, numbers in self.items()}

    @property
    def narrowest(self) -> Channels:
        """The configuration with the fewest channels in every group."""
        return {name: numbers[-1] for name, numbers in self.items()}

    @property
    def steps(self) -> int:
        """The number of slimming steps from the widest configuration to the narrowest."""
        return sum(len(numbers) - 1 for numbers in self.values())

    def narrower(self, channels: Mapping[str, int]) -> Channels:
        """Returns the next narrower number of each group in ``channels``; groups at their narrowest are left out.

        Raises:
            ValueError: a number of ``channels`` is not on the grid.
        """
        following = {name: numbers.index(channels[name]) + 1 for name, numbers in self.items()}
        return {name: self[name][index] for name, index in following.items() if index < len(self[name])}


Anchor = Literal["widest", "zero"]
"""How a grid counts: down from the widest number, or up from zero in multiples of the step."""


@dataclass(frozen=True)
class GridSpec:
    """How a grid is built for any network (see ``ChannelGraph.grid``).

    Attributes:
        width: width multiplier of the widest configuration.
        narrowest: width multiplier of the narrowest configuration.
        steps: slimming steps of each group from its widest down.
        divisor: numbers of channels decrease by multiples of this.
        anchor: see ``make_grid``.
        groups: limits of groups by pattern; see ``autoslim.channels.limits``.
    """

    width: float = 1.0
    narrowest: float = 0.25
    steps: int = 12
    divisor: int = 8
    anchor: Anchor = "widest"
    groups: Mapping[str, GroupLimits] = field(default_factory=dict)


def make_grid(
    groups: Mapping[str, ChannelGroup],
    widest: Mapping[str, int],
    narrowest: Mapping[str, int],
    steps: int,
    divisor: int,
    anchor: Anchor = "widest",
    multiples: Mapping[str, int] | None = None,
) -> Grid:
    """Returns each group's numbers of channels from ``widest`` down.

    They are ``widest - k * slimming_step`` as long as they are not below ``narrowest``. With anchor ``zero`` they are
    the widest and the multiples of the slimming step below it, as in the authors' ResNet-50 lists. The last number of
    each group belongs to the narrowest subnet. ``multiples`` are multiplied into the divisor of some groups.
    """
    levels, divisors = {}, {}
    for name, top in widest.items():
        unit = groups[name].unit
        divisors[name] = math.lcm(divisor, unit, (multiples or {}).get(name, 1))
        step = slimming_step(top, steps, divisors[name])
        floor = max(1, unit, min(top, narrowest[name]))
        if anchor == "zero":
            levels[name] = (top, *range((top - 1) // step * step, floor - 1, -step))
        else:
            levels[name] = tuple(range(top, floor - 1, -step))
    return Grid(levels, divisors)
