"""Limits of channel groups: layers that keep their channels, floors, ceilings, and multiples."""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from autoslim.channels.groups import ChannelGroup
from autoslim.errors import UserError


@dataclass(frozen=True)
class GroupLimits:
    """Limits of the channel groups that match a pattern (see ``group_ranges``).

    Attributes:
        freeze: the group keeps the channels of the traced network. The other limits then have no effect.
        minimum: smallest number of channels.
        maximum: largest number of channels.
        multiple: numbers of channels are multiples of this number, such as 8 for tensor cores. A group that is narrower
            than this number keeps its channels.
        max_shrink: largest share of the traced network's channels that is removed, in [0, 1].
    """

    freeze: bool = False
    minimum: int | None = None
    maximum: int | None = None
    multiple: int | None = None
    max_shrink: float | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a number is out of range, or ``minimum`` is larger than ``maximum``.
        """
        for name in ("minimum", "maximum", "multiple"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; set it to a positive number of channels")
        if self.max_shrink is not None and not 0 <= self.max_shrink <= 1:
            raise UserError(f"max_shrink is {self.max_shrink}; set it to a share of the channels between 0 and 1")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise UserError(f"minimum is {self.minimum}, but maximum is {self.maximum}; lower minimum")


@dataclass(frozen=True)
class GroupRange:
    """What ``GroupLimits`` allow one group: multiples of ``multiple`` from ``low`` to ``high`` channels."""

    name: str
    low: int
    high: float
    multiple: int

    def clamped(self, widest: int, narrowest: int) -> tuple[int, int]:
        """Returns the widest and the narrowest number within the limits, given those without limits.

        Raises:
            UserError: no number is within the limits.
        """
        top = min(widest, self.high)
        if self.low > top:
            raise UserError(
                f"group {self.name} must have at least {self.low} channels, but at most {top:g} are possible; lower "
                "minimum, or raise maximum or the width of the supernet"
            )
        if top < self.multiple:
            return int(top), int(top)
        top = int(top // self.multiple * self.multiple)
        bottom = math.ceil(max(self.low, narrowest) / self.multiple) * self.multiple
        return top, min(top, bottom)


def group_ranges(groups: Mapping[str, ChannelGroup], limits: Mapping[str, GroupLimits]) -> dict[str, GroupRange]:
    """Returns the range of each group that a pattern matches; groups without limits are left out.

    Args:
        groups: the network's channel groups.
        limits: pattern -> limits. A pattern is compared with the name of the group and with its layers, which share
            their channels; ``*`` stands for any text and ``?`` for any character (``fnmatch``). If several patterns
            match, later ones replace the limits that they set.

    Raises:
        UserError: a pattern matches no group, or no number of channels is within the limits of a group.
    """
    merged: dict[str, dict[str, object]] = {}
    for pattern, limit in limits.items():
        matches = [
            name
            for name, group in groups.items()
            if any(fnmatch.fnmatchcase(each, pattern) for each in (name, *group.members))
        ]
        if not matches:
            known = ", ".join(list(groups)[:8]) + (", ..." if len(groups) > 8 else "")
            raise UserError(
                f"the limits of {pattern!r} (supernet.grid.groups) apply to no channel group; the groups are {known} "
                "(see `autoslim profile`)"
            )
        given = {field.name: getattr(limit, field.name) for field in fields(limit)}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        for name in matches:
            merged.setdefault(name, {}).update(given)
    return {name: _range(groups[name], GroupLimits(**given)) for name, given in merged.items()}  # type: ignore[arg-type]


def _range(group: ChannelGroup, limits: GroupLimits) -> GroupRange:
    if limits.freeze:
        return GroupRange(group.name, group.size, group.size, group.unit)
    shrunk = math.ceil((1 - (1 if limits.max_shrink is None else limits.max_shrink)) * group.size - 1e-9)
    low = max(1, limits.minimum or 1, shrunk)
    multiple = math.lcm(limits.multiple or 1, group.unit)
    return GroupRange(group.name, low, limits.maximum or math.inf, multiple)
