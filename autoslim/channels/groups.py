"""Channel groups, channel configurations, and tensor axes as runs of channels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Channels = dict[str, int]
"""A channel configuration: group name -> number of channels."""


@dataclass(frozen=True)
class ChannelGroup:
    """Layers that must keep the same number of channels.

    ``name`` is the path of the first layer that produces the group, ``size`` its number of channels in the network as
    traced, ``unit`` the number by which channels come and go together (1, or the width of one group of a grouped
    convolution), ``members`` the layers that produce or carry the group. ``expansion`` is ``(group, t)`` where this
    group is the hidden layer of an inverted residual, t times as wide as the group it expands.
    """

    name: str
    size: int
    unit: int
    members: tuple[str, ...]
    expansion: tuple[str, int] | None = None


@dataclass(frozen=True)
class Segment:
    """A run of consecutive channels on a tensor's axis: ``count`` of them for every ``unit`` channels of ``group``.

    Without a group the run has ``count`` channels whatever the configuration.
    """

    group: str | None
    count: int
    unit: int = 1

    def size(self, channels: Mapping[str, int]) -> int:
        return self.count if self.group is None else channels[self.group] // self.unit * self.count


Axis = tuple[Segment, ...]
"""A tensor's axis, as the runs of channels that it concatenates."""


def axis_size(axis: Iterable[Segment], channels: Mapping[str, int]) -> int:
    return sum(segment.size(channels) for segment in axis)
