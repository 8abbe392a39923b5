"""Channel groups, channel configurations, and tensor axes as runs of channels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Channels = dict[str, int]
"""A channel configuration: group name -> number of channels."""


@dataclass(frozen=True)
class ChannelGroup:
    """Layers that must keep the same number of channels.

    Attributes:
        name: The path of the first layer that produces the group.
        size: The number of channels in the traced network.
        unit: The number of channels that are added or removed together: 1, or the width of one group of a grouped
            convolution.
        members: The layers that produce or pass on the group.
        expansion: ``(group, t)`` if this group is the hidden layer of an inverted residual, t times as wide as the
            group that it expands.
    """

    name: str
    size: int
    unit: int
    members: tuple[str, ...]
    expansion: tuple[str, int] | None = None


@dataclass(frozen=True)
class Segment:
    """A run of consecutive channels along a tensor's axis: ``count`` of them for every ``unit`` channels of ``group``.

    Without a group, the run has ``count`` channels in every configuration.
    """

    group: str | None
    count: int
    unit: int = 1

    def size(self, channels: Mapping[str, int]) -> int:
        """Returns the number of channels in a configuration."""
        return self.count if self.group is None else channels[self.group] // self.unit * self.count


Axis = tuple[Segment, ...]
"""A tensor's axis as a concatenation of runs of channels."""


def axis_size(axis: Iterable[Segment], channels: Mapping[str, int]) -> int:
    """Returns the size of an axis in a configuration."""
    return sum(segment.size(channels) for segment in axis)
