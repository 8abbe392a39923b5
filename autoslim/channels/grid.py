"""Width multipliers, and the grid of channel numbers on which configurations are sampled and searched."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from autoslim.channels.groups import ChannelGroup, Channels

if TYPE_CHECKING:
    from autoslim.channels.graph import ChannelGraph


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of ``divisor`` nearest to ``value``, never more than 10 % below it and never under ``divisor``.

    The rule by which the MobileNet papers round widths.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def scaled(groups: Mapping[str, ChannelGroup], width: float, divisor: int) -> Channels:
    """The configuration of a uniform width multiplier, rounded to multiples of ``divisor`` as the papers do.

    An expansion follows the rounded width that it expands, so ``scaled(groups, 1.5, 8)`` of MobileNetV2 has the
    channels of the paper's 1.5x network (the authors' code rounds the width before the expansion).
    A width of 1 gives the sizes as they are.
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
    """Channels that one slimming step removes: ``widest / steps`` to the nearest multiple of ``divisor``, at least one.

    Ties go to the even multiple; with 12 steps and divisor 8 this explains every channel number that the authors
    released.
    """
    return max(divisor, round(widest / steps / divisor) * divisor)


Anchor = Literal["widest", "zero"]


def grid(
    groups: Mapping[str, ChannelGroup],
    widest: Mapping[str, int],
    narrowest: Mapping[str, int],
    steps: int,
    divisor: int,
    anchor: Anchor = "widest",
) -> dict[str, tuple[int, ...]]:
    """Each group's allowed numbers of channels, from the widest down.

    They are ``widest - k * slimming_step``, as long as they are not below ``narrowest``.
    With anchor ``zero`` they are the multiples of the slimming step, and the widest as it is: so are the authors'
    ResNet-50 lists. The last entry is the number of channels that the narrowest subnet has.
    """
    levels = {}
    for name, top in widest.items():
        unit = groups[name].unit
        step = slimming_step(top, steps, math.lcm(divisor, unit))
        floor = max(1, unit, min(top, narrowest[name]))
        if anchor == "zero":
            below = range((top - 1) // step * step, floor - 1, -step)
            levels[name] = (top, *below)
        else:
            levels[name] = tuple(range(top, floor - 1, -step))
    return levels


@dataclass(frozen=True)
class Span:
    """What a supernet spans: its widest and narrowest as width multipliers, and the grid between them."""

    width: float
    narrowest: float
    steps: int
    divisor: int
    anchor: Anchor = "widest"

    def grid(self, graph: "ChannelGraph") -> dict[str, tuple[int, ...]]:
        """Each group's numbers of channels, from the widest down (``vocabulary.channels.grid``)."""
        floor = {n: max(1, round(self.narrowest * g.size)) for n, g in graph.groups.items()}
        widest = graph.scaled(self.width, self.divisor)
        return grid(graph.groups, widest, floor, self.steps, self.divisor, self.anchor)
