"""Channel allocation: how a method chooses channel numbers within a budget."""

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from autoslim.channels.groups import ChannelGroup, Channels
from autoslim.errors import UserError
from autoslim.models.released import released_lists, released_method
from autoslim.resources.budgets import format_named_amount
from autoslim.resources.costs import Costs

Holds = Callable[[Channels], bool]
"""Whether a configuration is within the limits."""


def check_method(method: str) -> None:
    """Raises:
    UserError: there is no such method.
    """
    if released_method(method) is None and method not in ("autoslim", "uniform"):
        lists = ", ".join(f"released/{name}" for name in released_lists())
        raise UserError(f"method {method!r} is unknown; methods are autoslim, uniform, and {lists}")


def allocate(
    method: str,
    costs: Costs,
    configurations: Sequence[Channels],
    limits: Mapping[str, float],
    divisor: int = 1,
    narrowest: Mapping[str, int] | None = None,
) -> Channels:
    """The channels that a method gives within limits (resource -> amount in its unit).

    Args:
        method: ``autoslim``, ``uniform``, or ``released/NAME``, which has a budget of its own and heeds no other.
        configurations: the trajectory, from the widest down; its first entry bounds ``uniform`` too.
        divisor: of ``uniform``'s channels where latency is limited.
        narrowest: of the grid; where latency is limited it bounds ``uniform`` as the first configuration does.

    Raises:
        UserError: the method is unknown, has nothing within the limits, or is the list of another network.
    """
    check_method(method)
    graph = costs.graph
    if listed := released_method(method):
        return listed.channels(graph)

    def holds(channels: Channels) -> bool:
        return costs.within(channels, limits)

    measured = "latency" in limits
    most, least = configurations[0], (narrowest or {}) if measured else {}
    widest = max(most[name] / group.size for name, group in graph.groups.items())
    # `most` is rounded, so that one width multiplier is not the most of every group.
    between = {name: (least.get(name, 1), count) for name, count in most.items()}
    try:
        if method == "autoslim":
            return from_trajectory(configurations, holds)
        return uniform(graph.groups, holds, widest, divisor if measured else 1, between=between, monotone=not measured)
    except UserError as error:
        asked = ", ".join(format_named_amount(limit, resource) for resource, limit in limits.items())
        last = ", ".join(format_named_amount(costs.of(configurations[-1], resource), resource) for resource in limits)
        raise UserError(f"{error} (it is {asked}; the search ended at {last})") from error


def from_trajectory(configurations: Iterable[Channels], holds: Holds) -> Channels:
    """The first configuration on the way of greedy slimming that holds the limits: all later ones are parts of it.

    Raises:
        UserError: none of them does.
    """
    for channels in configurations:
        if holds(channels):
            return channels
    raise UserError("the trajectory has no configuration within the budget; lower search.stop or raise budget")


def uniform(
    groups: Mapping[str, ChannelGroup],
    holds: Holds,
    widest: float,
    divisor: int = 1,
    *,
    between: Mapping[str, tuple[int, int]] | None = None,
    monotone: bool = True,
) -> Channels:
    """The configuration of the largest width multiplier up to ``widest`` that holds the limits.

    Each group has the multiple of ``divisor`` (and of its unit) nearest to ``width * size``, at least one. With 1 that
    is the finest uniform network there is, so that a method is not praised for using a budget better. A latency table
    knows nothing of numbers between the grid's, and odd numbers are slow: there it is the grid's divisor.

    Args:
        between: the least and the most channels of each group, beyond which rounding may go: those of the supernet, or
            those that were measured.
        monotone: what is limited does not fall as the width grows; without that (latency) every width is tried.

    Raises:
        UserError: even the narrowest is beyond the limits.
    """
    steps = {name: math.lcm(group.unit, divisor) for name, group in groups.items()}

    def at(width: float) -> Channels:
        counts = {n: max(1, int(width * g.size / steps[n] + 0.5)) * steps[n] for n, g in groups.items()}
        if between is None:
            return counts
        return {name: min(max(count, between[name][0]), between[name][1]) for name, count in counts.items()}

    changes = {  # the widths at which a group gets one step more
        (number + 0.5) / (group.size / steps[name]) * (1 + 1e-12)
        for name, group in groups.items()
        for number in range(1, int(widest * group.size / steps[name] + 0.5))
    }
    widths = [0.0, *sorted(changes), widest]
    if monotone:
        fitting = bisect.bisect_left(widths, True, key=lambda width: not holds(at(width)))
        widths = widths[:fitting]
    for width in reversed(widths):
        if holds(channels := at(width)):
            return channels
    raise UserError("no uniform width multiplier is within the budget; raise budget")
